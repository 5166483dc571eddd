"""Similarity of sentences, as encoders are judged: Spearman's correlation with what people said of pairs.

A file has pairs of texts, each with a score of how alike they are (the STS benchmarks have 0 to 5). A model scores a
pair by the cosine of the two embeddings; what counts is the order, so the ranks of both are correlated. What a file
keeps of its original's correlation is its recovery; its standard error is drawn from the same pairs for both
(bootstrap), so what both models find hard tells nothing of their difference.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float64, Int64

from compot_deploy.accuracy.harness import RESAMPLES, TaskFigures
from compot_deploy.accuracy.metrics import Estimate
from compot_deploy.accuracy.texts import TextRunner
from compot_deploy.core.parsing import UnreadableError, json_of
from compot_deploy.errors import InputError
from compot_deploy.models.tasks import Task, pooled
from compot_deploy.models.text_files import read_text
from compot_deploy.models.tokens import Tokenizer

METRIC: Final = "spearman"

_COLUMNS: Final = ("sentence1", "sentence2", "score")
_TAB: Final = "\t"
_TABLES: Final[Mapping[str, str]] = {".tsv": _TAB, ".csv": ","}
_LINES: Final = (".jsonl", ".ndjson")
ENDINGS: Final = (*_TABLES, *_LINES)
"""Of the names of pairs files."""

_FEWEST: Final = 10
"""Pairs: of fewer, a correlation of ranks says nothing."""

_LONGEST: Final = 256
"""Tokens of a text that are read."""

_AT_ONCE: Final = 16
"""Texts."""

_SEED: Final = 1234
"""Of the pairs that are drawn for standard errors."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts that people scored.

    Attributes:
        name: of the file, without its ending.
        texts: the first and the second of each pair.
        scores: how alike they are; any scale.
    """

    name: str
    texts: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]


def read_pairs(path: Path, samples: int | None = None) -> Pairs:
    """Pairs of a file: a table with the columns sentence1, sentence2 and score, or JSON lines with these keys.

    Of a table without a line of names, the first three columns are taken.

    Args:
        path: its ending is one of `ENDINGS`.
        samples: the first so many; None for all.

    Raises:
        InputError: missing, empty, a pair without two texts and a finite score, fewer than ten pairs, or all of one
            score.
    """
    text, ending = read_text(path), path.suffix.lower()
    rows = _of_table(text, path, _TABLES[ending]) if ending in _TABLES else _of_lines(text, path)
    rows = rows[:samples]
    if len(rows) < _FEWEST:
        raise InputError(
            f"{path} has {len(rows)} pairs, fewer than the {_FEWEST} of which ranks can be compared."
        )
    scores = tuple(score for _, _, score in rows)
    if len(set(scores)) == 1:
        raise InputError(f"{path}: all pairs have the score {scores[0]:g}, so nothing can be ranked by it.")
    return Pairs(path.stem, tuple((first, second) for first, second, _ in rows), scores)


def _of_table(text: str, path: Path, delimiter: str) -> list[tuple[str, str, float]]:
    try:
        if delimiter == _TAB:  # quotes are letters there: the STS files hold lone ones
            lines = [line.split(delimiter) if line else [] for line in text.replace("\r\n", "\n").split("\n")]
        else:
            lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise InputError(f"{path} is no table: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line]
    places: Sequence[int] = range(3)
    if set(_COLUMNS) <= set(numbered[0][1]):
        places = [numbered[0][1].index(name) for name in _COLUMNS]
        numbered = numbered[1:]
    found = []
    for number, line in numbered:
        values = [line[place] if place < len(line) else None for place in places]
        found.append(_pair(values, f"{path}, row {number}"))
    return found


def _of_lines(text: str, path: Path) -> list[tuple[str, str, float]]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json_of(line)
        except UnreadableError as error:
            raise InputError(f"{where}: {error}.") from None
        found.append(
            _pair([value.get(name) if isinstance(value, dict) else None for name in _COLUMNS], where)
        )
    return found


def _pair(values: Sequence[Any], where: str) -> tuple[str, str, float]:
    first, second, score = values
    try:
        number = math.nan if isinstance(score, bool) else float(score)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not isinstance(first, str) or not isinstance(second, str) or not math.isfinite(number):
        raise InputError(
            f"{where} is no pair: it needs {', '.join(_COLUMNS[:2])} and a number {_COLUMNS[2]}."
        )
    return first, second, number


def cosines(
    runner: TextRunner, task: Task, tokenizer: Tokenizer, pairs: Pairs, context: int
) -> Float64[np.ndarray, " pairs"]:
    """How alike a model finds the two texts of each pair: the cosine of their mean token vectors.

    Args:
        runner: the model.
        task: that of embeddings.
        tokenizer: of the same folder as the model.
        pairs: at least one.
        context: tokens that the model reads.
    """
    every = list(dict.fromkeys(text for pair in pairs.texts for text in pair))
    ids = [torch.tensor(tokenizer.whole(text, min(context, _LONGEST))) for text in every]
    order = sorted(range(len(every)), key=lambda number: len(ids[number]))
    vectors: dict[str, torch.Tensor] = {}
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        at = start
        for batch in task.batches([ids[number] for number in some]):
            for vector in pooled(runner.outputs(batch), batch.real):
                vectors[every[order[at]]] = vector
                at += 1
    first, second = (torch.stack([vectors[pair[side]] for pair in pairs.texts]) for side in (0, 1))
    return torch.nn.functional.cosine_similarity(first, second, dim=-1).numpy()


def compare_pairs(
    pairs: Pairs,
    exported: Float64[np.ndarray, " pairs"],
    original: Float64[np.ndarray, " pairs"] | None,
) -> TaskFigures:
    """Correlations of a file and of its original, and what the file keeps.

    Args:
        pairs: with their scores.
        exported: cosines of the file.
        original: those of the original; None where it was not there.
    """
    scores = np.asarray(pairs.scores)
    drawn = np.random.default_rng(_SEED).integers(0, len(scores), (RESAMPLES, len(scores)))
    of_file = _correlations(scores, exported, drawn)
    if original is None:
        return TaskFigures(pairs.name, METRIC, len(scores), _estimate(*of_file))
    of_original = _correlations(scores, original, drawn)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = of_file[0] / of_original[0], of_file[1] / of_original[1]
    # A share of no correlation is no share.
    recovered = _estimate(*shares) if of_original[0] > 0 else Estimate(math.nan, math.nan)
    return TaskFigures(
        pairs.name, METRIC, len(scores), _estimate(*of_file), _estimate(*of_original), recovered
    )


def spearman(first: Float64[np.ndarray, " pairs"], second: Float64[np.ndarray, " pairs"]) -> float:
    """Pearson's correlation of ranks, equal values at the mean of their ranks; NaN where one of both is constant."""
    one, other = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size else math.nan


def _ranks(values: Float64[np.ndarray, " pairs"]) -> Float64[np.ndarray, " pairs"]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[place.reshape(-1)]


def _correlations(
    scores: Float64[np.ndarray, " pairs"],
    values: Float64[np.ndarray, " pairs"],
    drawn: Int64[np.ndarray, "draws pairs"],
) -> tuple[float, Float64[np.ndarray, " draws"]]:
    """Of all pairs, and of each draw of them."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        return math.nan, np.full(len(drawn), math.nan)
    return spearman(scores, values), np.array([spearman(scores[some], values[some]) for some in drawn])


def _estimate(value: float, draws: Float64[np.ndarray, " draws"]) -> Estimate:
    finite = draws[np.isfinite(draws)]
    return Estimate(float(value), float(finite.std(ddof=1)) if len(finite) > 1 else math.nan)
