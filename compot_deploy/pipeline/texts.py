"""What a recipe calibrates and evaluates on: where the text comes from, and which windows of it."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.core.parsing import decoded, json_of
from compot_deploy.core.store import write_text
from compot_deploy.core.work_files import is_sound, read_tensors, write_tensors
from compot_deploy.embedded import HELD_OUT_TEXT, TRAINING_TEXT
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.models.configuration import CONFIG, context_of, settings_of
from compot_deploy.models.generation import end_tokens, read_generation
from compot_deploy.models.listening import load_listener
from compot_deploy.models.paged import original_to_run
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Utterance
from compot_deploy.models.text_files import ENDINGS, read_text, read_text_file
from compot_deploy.models.tokens import (
    HELD_OUT_SHARE,
    SELF,
    Tokenizer,
    TokenWindows,
    load_tokenizer,
    make_windows,
    sample_from_model,
    text_of_dataset,
    windows_of_lines,
    windows_of_records,
    windows_of_text,
)
from compot_deploy.models.writing import Writer, load_writer
from compot_deploy.pipeline.recordings import (
    calibration_recordings,
    evaluation_recordings,
    keep_recordings,
    kept_recordings,
)
from compot_deploy.pipeline.replies import windows_of, with_replies
from compot_deploy.planning.settings import device_of
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import Recipe

EVALUATION: Final = "compot/evaluation.json"
_SHIPPED_TRAINING: Final = "the shipped model's training text"
_SHIPPED_HELD_OUT: Final = "the shipped model's held-out text"
_FEWEST_TEXTS: Final = 16
"""Texts that a model of whole texts is evaluated on, at least."""

_PROMPTS: Final = 3
_PROMPT_TOKENS: Final = 12
_NEW_TOKENS: Final = 32


def calibration_windows(
    recipe: Recipe, source: ModelSource, work: Path, progress: Progress = silent
) -> TokenWindows:
    """The windows to calibrate on; sampled text is kept in the work folder, other text is read again."""
    if source.task.listens:
        return calibration_recordings(recipe, source, work, progress)
    if source.task.has_towers:
        read = _calibration_texts(recipe, source, work, progress)
        return _with_replies("calibration", read, recipe, source, work, progress)
    return _calibration_texts(recipe, source, work, progress)


def _calibration_texts(recipe: Recipe, source: ModelSource, work: Path, progress: Progress) -> TokenWindows:
    reader = _Reader(recipe, source, work, progress, samples=recipe.samples, seed=recipe.seed)
    text = recipe.calibration
    if text is None and (recipe.model is None or not source.task.generates):
        return reader.text(lzma.decompress(TRAINING_TEXT.read_bytes()).decode(), _SHIPPED_TRAINING)
    if text is None or text == SELF:
        return reader.own("calibration")
    if not names_dataset(text):
        return reader.file(Path(text), _first_part if recipe.evaluation is None else _all)
    return reader.text(text_of_dataset(text), text)


def names_dataset(text: str) -> bool:
    """Whether a calibration text is asked for by the name of a data set, not as a file or from the model itself."""
    path = Path(text)
    return text != SELF and not path.exists() and path.suffix.lower() not in ENDINGS


def evaluation_windows(
    recipe: Recipe, source: ModelSource, work: Path, progress: Progress = silent
) -> TokenWindows:
    """The windows to evaluate on: never ones that were calibrated on, unless a note says so."""
    if source.task.listens:
        return evaluation_recordings(recipe, source, work, progress)
    if source.task.has_towers:
        read = _evaluation_texts(recipe, source, work, progress)
        return _with_replies("evaluation", read, recipe, source, work, progress)
    return _evaluation_texts(recipe, source, work, progress)


def _with_replies(
    name: str, read: TokenWindows, recipe: Recipe, source: ModelSource, work: Path, progress: Progress
) -> TokenWindows:
    """Texts that an encoder reads, with what the original's decoder writes of them."""
    writer = load_writer(source.folder, source.config)
    nothing = torch.zeros(0, dtype=torch.int64)
    utterances = [Utterance(nothing, window, 0, "input_ids") for window in read.windows]
    path = work / f"{name}-{read.digest[:12]}.json"
    replied = with_replies(utterances, writer, path, recipe, source, progress)
    return windows_of(replied, source.vocabulary, read.source, read.notes)


def _evaluation_texts(recipe: Recipe, source: ModelSource, work: Path, progress: Progress) -> TokenWindows:
    length = min(recipe.length, source.context)
    samples = max(1, recipe.evaluation_tokens // length)
    if not source.task.generates:
        samples = max(_FEWEST_TEXTS, samples)
    reader = _Reader(recipe, source, work, progress, samples=samples, seed=recipe.seed + 1)
    if recipe.evaluation is not None:
        return reader.file(Path(recipe.evaluation), _all)
    text = recipe.calibration
    if text is None and (recipe.model is None or not source.task.generates):
        return reader.text(read_text(HELD_OUT_TEXT), _SHIPPED_HELD_OUT)
    if text is not None and text != SELF and Path(text).exists():
        file = read_text_file(Path(text))
        if file.records is None:
            return reader.text(
                _last_part(file.text), f"the last {HELD_OUT_SHARE:.0%} of {file.name}, not calibrated on"
            )
    if not source.task.generates:
        raise InputError(
            f"{text} is calibrated on as a whole, and a {source.task.noun} writes no text to be evaluated on: give "
            "--evaluation."
        )
    return reader.own("evaluation")


def _all(text: str) -> str:
    return text


def _first_part(text: str) -> str:
    return text[: round(len(text) * (1 - HELD_OUT_SHARE))]


def _last_part(text: str) -> str:
    return text[round(len(text) * (1 - HELD_OUT_SHARE)) :]


class _Reader:
    """Windows of a number and length, as the model reads them: running text, or line by line."""

    def __init__(
        self, recipe: Recipe, source: ModelSource, work: Path, progress: Progress, *, samples: int, seed: int
    ) -> None:
        self._recipe, self._source, self._work, self._progress = recipe, source, work, progress
        self._tokenizer = load_tokenizer(source.folder)
        self._common: dict[str, Any] = {
            "samples": samples,
            "length": min(recipe.length, source.context),
            "seed": seed,
            "vocabulary": source.vocabulary,
        }

    def text(self, text: str, origin: str) -> TokenWindows:
        """Of a text."""
        reader = windows_of_text if self._source.task.generates else windows_of_lines
        return reader(text, self._tokenizer, source=origin, **self._common)

    def file(self, path: Path, part: Callable[[str], str]) -> TokenWindows:
        """Of a file; of records all of them, of running text the part that is asked for."""
        file = read_text_file(path)
        if file.records is None:
            return self.text(part(file.text), file.name)
        whole = not self._source.task.generates
        return windows_of_records(
            file.records, self._tokenizer, source=file.name, whole=whole, **self._common
        )

    def own(self, name: str) -> TokenWindows:
        """Sampled from the model itself."""
        samples, length, seed = (self._common[key] for key in ("samples", "length", "seed"))
        path = self._work / f"{name}-{samples}x{length}-{seed}.safetensors"
        origin = "text sampled from the model itself"
        if is_sound(path):
            return make_windows(list(read_tensors(path)["windows"]), origin, self._source.vocabulary)
        model = original_to_run(self._source, device=device_of(self._recipe))
        windows = sample_from_model(model, self._tokenizer, progress=self._progress, **self._common)
        write_tensors(path, {"windows": torch.stack(windows.windows)}, {})
        return windows


def evaluation_of(recipe: Recipe, source: ModelSource, work: Path, progress: Progress = silent) -> Evaluation:
    """Windows to evaluate on, and prompts cut from their beginnings for a model that goes on with them."""
    windows = evaluation_windows(recipe, source, work, progress)
    prompts = _prompts(windows) if source.task.generates else ()
    ends = end_tokens(read_generation(source.folder), source.config)
    writer: Writer | None = None
    if source.task.has_towers:
        load = load_listener if source.task.listens else load_writer
        writer = load(source.folder, source.config)
    return _evaluation(windows, prompts, load_tokenizer(source.folder), source.context, ends, writer)


def _prompts(windows: TokenWindows) -> tuple[tuple[int, ...], ...]:
    step = max(1, len(windows.windows) // _PROMPTS)
    chosen = windows.windows[::step][:_PROMPTS]
    return tuple(tuple(window[: min(_PROMPT_TOKENS, len(window))].tolist()) for window in chosen)


def _evaluation(
    windows: TokenWindows,
    prompts: tuple[tuple[int, ...], ...],
    tokenizer: Tokenizer,
    context: int,
    ends: Sequence[int],
    writer: Writer | None = None,
) -> Evaluation:
    return Evaluation(
        text=windows,
        prompts=prompts,
        decode=tokenizer.decode,
        new_tokens=max(1, min(_NEW_TOKENS, context - _PROMPT_TOKENS)),
        end_tokens=frozenset(ends),
        writer=writer,
    )


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """What a folder keeps of the evaluation, so that it can be evaluated again."""
    text = evaluation.text
    kept: dict[str, Any] = {
        "source": text.source,
        "notes": list(text.notes),
        "windows": [window.tolist() for window in text.windows],
        "prompts": [list(prompt) for prompt in evaluation.prompts],
    }
    (folder / EVALUATION).parent.mkdir(exist_ok=True)
    if text.utterances and not text.recordings:
        kept["read"] = [utterance.features.tolist() for utterance in text.utterances]
        kept["given"] = [utterance.given for utterance in text.utterances]
    if text.recordings:
        kept["recordings"] = [
            {"name": recording.name, "reference": recording.reference, "given": utterance.given}
            for recording, utterance in zip(text.recordings, text.utterances, strict=True)
        ]
        keep_recordings(folder, text)
    write_text(folder / EVALUATION, json.dumps(kept))


def read_evaluation(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> Evaluation:
    """Read what `write_evaluation` wrote.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = folder / EVALUATION
    try:
        stored = json_of(decoded(path.read_bytes()))
        settings = settings_of(config, str(folder / CONFIG), ArtifactError)
        rows = int(settings.get_text_config().vocab_size)
        ends = end_tokens(read_generation(folder), config)
        if "recordings" in stored:
            listener = load_listener(folder, config)
            heard = kept_recordings(folder, stored, config, listener)
            return _evaluation(heard, (), tokenizer, context_of(settings), ends, listener)
        if "read" in stored:
            writer = load_writer(folder, config)
            replied = [
                Utterance(torch.tensor(tokens), torch.tensor(read), int(given), "input_ids")
                for tokens, read, given in zip(
                    stored["windows"], stored["read"], stored["given"], strict=True
                )
            ]
            texts = windows_of(replied, rows, stored["source"], stored["notes"])
            return _evaluation(texts, (), tokenizer, context_of(settings), ends, writer)
        windows = make_windows(stored["windows"], stored["source"], rows, notes=stored["notes"])
        prompts = tuple(tuple(prompt) for prompt in stored["prompts"])
        return _evaluation(windows, prompts, tokenizer, context_of(settings), ends)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); export the model again.") from None
