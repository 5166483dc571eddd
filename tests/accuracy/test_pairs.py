"""Laws of pairs: ranks are compared, files are read alike, and a file that changes nothing keeps the order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import any_models
import numpy as np
import pytest

from compot_deploy import check, deploy
from compot_deploy.accuracy.pairs import Pairs, compare_pairs, cosines, read_pairs, spearman
from compot_deploy.accuracy.texts import TorchTexts
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.models.source import open_source
from compot_deploy.models.tasks import EMBEDDING
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.models.whole import whole_model
from compot_deploy.pipeline.task_accuracy import questions_of

WORDS = ["river", "house", "bridge", "boat", "rain", "wind", "night", "the", "old", "runs", "waits", "past"]


def sentences(count: int) -> tuple[tuple[str, str], ...]:
    draw = np.random.default_rng(0)
    return tuple((" ".join(draw.choice(WORDS, 5)), " ".join(draw.choice(WORDS, 5))) for _ in range(count))


def test_spearman_is_the_correlation_of_ranks_and_ties_share_theirs() -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        first, second = (draw.integers(0, 6, 12).astype(float) for _ in range(2))
        ranks = [
            [
                sum(other < one for other in some) + (sum(other == one for other in some) + 1) / 2
                for one in some
            ]
            for some in (first, second)
        ]
        assert spearman(first, second) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-12)
    assert spearman(first, np.exp(first)) == pytest.approx(1.0), "only the order counts"
    assert math.isnan(spearman(first, np.zeros(12)))


def test_what_is_kept_is_the_ratio_and_no_chance_is_in_equal_answers() -> None:
    draw = np.random.default_rng(2)
    scores = draw.random(200)
    pairs = Pairs("p", sentences(200), tuple(scores))
    original, near = scores + draw.normal(0, 0.3, 200), scores + draw.normal(0, 0.6, 200)
    same = compare_pairs(pairs, original, original)
    assert same.recovery is not None and (same.recovery.value, same.recovery.standard_error) == (1.0, 0.0)
    # Fisher's approximation of the error of a correlation: (1 - r²)/√(n - 1), a little more for ranks.
    assert same.exported.standard_error == pytest.approx(
        (1 - same.exported.value**2) / math.sqrt(199), rel=0.25
    )
    less = compare_pairs(pairs, near, original)
    assert less.recovery is not None and less.original is not None
    assert less.recovery.value == pytest.approx(less.exported.value / less.original.value)
    assert 0.5 < less.recovery.value < 0.9 and less.samples == 200 and less.metric == "spearman"
    for unknown in (
        compare_pairs(pairs, original, -original),
        compare_pairs(pairs, original * math.nan, original),
    ):
        assert unknown.recovery is not None and math.isnan(unknown.recovery.value)
    assert compare_pairs(pairs, original, None).recovery is None


def test_tables_and_lines_are_read_alike(tmp_path: Path) -> None:
    rows = [(f'a "{number}', f"b, {number}", number / 2) for number in range(12)]
    lines = [json.dumps(dict(zip(("sentence1", "sentence2", "score"), row, strict=True))) for row in rows]
    files = {
        "bare.tsv": "".join(f"{one}\t{two}\t{score}\r\n" for one, two, score in rows),
        "named.tsv": "score\tid\tsentence2\tsentence1\n" + "".join(f"{c}\t9\t{b}\t{a}\n" for a, b, c in rows),
        "named.csv": "sentence1,sentence2,score\n"
        + "".join('"{}","{}",{}\n'.format(a.replace('"', '""'), b, c) for a, b, c in rows),
        "lines.jsonl": "\n".join(lines) + "\n\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        found = read_pairs(tmp_path / name)
        assert found.texts == tuple((a, b) for a, b, _ in rows), name
        assert found.scores == tuple(c for _, _, c in rows), name
    assert len(read_pairs(tmp_path / "bare.tsv", 10).texts) == 10


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("few.tsv", "a\tb\t1\n" * 9, "9 pairs, fewer than the 10"),
        ("equal.tsv", "a\tb\t1\n" * 10, "the score 1"),
        ("short.tsv", "a\tb\t1\n" * 10 + "a\tb\n", "row 11 is no pair"),
        ("words.csv", "a,b,much\n", "row 1 is no pair"),
        ("infinite.csv", "a,b,inf\n", "row 1 is no pair"),
        ("true.jsonl", '{"sentence1": "a", "sentence2": "b", "score": true}\n', "line 1 is no pair"),
        ("list.jsonl", "[1]\n", "line 1 is no pair"),
        ("broken.jsonl", "{\n", "line 1: it is not JSON"),
        ("gone.tsv", None, "does not exist"),
    ],
)
def test_what_are_no_pairs_is_one_sentence(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_pairs(tmp_path / name)


def test_encoders_are_asked_about_pairs_alone(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"hellaswag: an encoder writes no text.*\.tsv"):
        questions_of(("hellaswag",), None, EMBEDDING)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.tsv").write_text("".join(f"a\tb\t{score}\n" for score in range(10)))
    with pytest.raises(InputError, match="two files are named same"):
        questions_of((str(tmp_path / "a/same.tsv"), str(tmp_path / "b/same.tsv")), None, EMBEDDING)


@pytest.mark.slow
def test_a_file_that_changes_nothing_keeps_the_order_and_a_limit_above_it_fails(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    model = any_models.save(tmp_path / "bert", "bert")
    source, pairs = open_source(str(model)), Pairs("pairs", sentences(40), tuple(range(40)))
    found = cosines(
        TorchTexts(whole_model(source), EMBEDDING), EMBEDDING, load_tokenizer(model), pairs, source.context
    )
    table = tmp_path / "pairs.tsv"  # people agree with this model
    table.write_text("".join(f"{a}\t{b}\t{c}\n" for (a, b), c in zip(pairs.texts, found, strict=True)))
    small = {"samples": 4, "length": 32, "evaluation_tokens": 256, "format": "onnx", "min_cosine": 0.0}
    plain = {"method": "plain", "tasks": (str(table),), "min_recovery": 0.999}
    (same,) = deploy(
        str(model), **small, **plain, quant="none", embeddings="none", out=str(tmp_path / "same")
    )
    assert same.passed, same.report.accuracy.gate
    (figures,) = same.report.tasks
    assert figures.original is not None and figures.original.value == pytest.approx(1.0)
    assert figures.exported.value == pytest.approx(1.0, abs=1e-3)
    coarse = check(same.folder, reference=str(model), tasks=[str(table)], limits={"min_recovery": 1.01})
    assert not coarse.passed
