"""Recordings that a speech model is calibrated and evaluated on, with the transcripts that the original writes of them.

The decoder is teacher-forced on the original's own greedy transcript, so no transcript has to be given. Where what is
said is known (``NAME.txt`` beside ``NAME.wav``), word errors are also counted against that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from compot_deploy.accuracy.speech import TorchSpeech
from compot_deploy.core.work_files import is_sound, read_value, write_tensors, write_value
from compot_deploy.errors import InputError
from compot_deploy.models.audio import Recording, digest_of, files_of, read_recordings
from compot_deploy.models.listening import Listener, load_listener
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Utterance
from compot_deploy.models.tokens import TokenWindows, make_windows
from compot_deploy.models.whole import whole_model
from compot_deploy.planning.settings import device_of
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import Recipe

RECORDINGS: Final = "compot/evaluation.safetensors"
"""Where a folder keeps the recordings that it is evaluated on, as 16-bit samples."""

_HELD_OUT: Final = 10
"""Every so many recordings one is kept for evaluation, where no others are given for it."""


def calibration_recordings(
    recipe: Recipe, source: ModelSource, work: Path, progress: Progress = silent
) -> TokenWindows:
    """Recordings to calibrate on, with the original's transcripts.

    Raises:
        InputError: a folder without recordings.
    """
    folder = Path(recipe.calibration or "")
    files = files_of(folder)
    origin = folder.resolve().name
    if recipe.evaluation is None:
        held = _held_out(files)
        files = tuple(path for path in files if path not in held)
        if not files:
            raise InputError(
                f"{folder} has one recording, which is kept for evaluation: give more of them, or --evaluation."
            )
    return _windows("calibration", _some(files, recipe), origin, recipe, source, work, progress)


def evaluation_recordings(
    recipe: Recipe, source: ModelSource, work: Path, progress: Progress = silent
) -> TokenWindows:
    """Recordings to evaluate on, as many as tokens allow: of --evaluation, or some that were not calibrated on."""
    if recipe.evaluation is not None:
        files, origin = files_of(Path(recipe.evaluation)), Path(recipe.evaluation).resolve().name
    else:
        folder = Path(recipe.calibration or "")
        files = _held_out(files_of(folder))
        origin = f"one of {_HELD_OUT} recordings of {folder.resolve().name}, not calibrated on"
    windows = _windows("evaluation", files, origin, recipe, source, work, progress)
    kept, tokens = 0, 0
    for window in windows.windows:
        if kept and tokens + len(window) > recipe.evaluation_tokens:
            break
        kept, tokens = kept + 1, tokens + len(window)
    return (
        windows
        if kept == len(windows.windows)
        else _heard(
            windows.recordings[:kept],
            windows.utterances[:kept],
            source.vocabulary,
            windows.source,
            windows.notes,
        )
    )


def _held_out(files: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(files[_HELD_OUT - 1 :: _HELD_OUT]) or tuple(files[-1:])


def _some(files: Sequence[Path], recipe: Recipe) -> Sequence[Path]:
    """At most as many as samples are asked for, drawn with the seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(files), generator=generator)[: recipe.samples].sort().values.tolist()
    return [files[number] for number in order]


def _windows(
    name: str,
    files: Sequence[Path],
    origin: str,
    recipe: Recipe,
    source: ModelSource,
    work: Path,
    progress: Progress,
) -> TokenWindows:
    listener = load_listener(source.folder, source.config)
    read = read_recordings(files, listener.rate, listener.seconds)
    path = work / f"{name}-{digest_of(read.found)[:12]}.json"
    if not is_sound(path):
        write_value(path, _transcripts(read.found, listener, recipe, source, progress))
    utterances = [
        listener.utterance(recording, entry["tokens"], entry["given"])
        for recording, entry in zip(read.found, read_value(path), strict=True)
    ]
    return _heard(read.found, utterances, source.vocabulary, origin, read.notes)


def _transcripts(
    recordings: Sequence[Recording],
    listener: Listener,
    recipe: Recipe,
    source: ModelSource,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What the original writes of each recording, its beginning included."""
    runner = TorchSpeech(whole_model(source, device=device_of(recipe)), source.task, "original")
    found = []
    for number, recording in enumerate(recordings):
        progress(number, len(recordings), "Transcribe with the original")
        beginning = listener.beginning
        utterance = listener.utterance(recording, beginning, len(beginning))
        if listener.languages:
            beginning = (beginning[0], runner.language(utterance, listener.languages), *beginning[1:])
            utterance = replace(utterance, tokens=torch.tensor(beginning), given=len(beginning))
        tokens = [*beginning, *runner.transcribe(utterance, listener)]
        found.append({"tokens": tokens, "given": len(beginning)})
    progress(len(recordings), len(recordings), "Transcribe with the original")
    return found


def _heard(
    recordings: Sequence[Recording],
    utterances: Sequence[Utterance],
    vocabulary: int,
    origin: str,
    notes: Sequence[str],
) -> TokenWindows:
    windows = make_windows([utterance.tokens for utterance in utterances], origin, vocabulary, notes)
    digest = hashlib.sha256((windows.digest + digest_of(recordings)).encode()).hexdigest()
    return replace(windows, digest=digest, recordings=tuple(recordings), utterances=tuple(utterances))


def keep_recordings(folder: Path, windows: TokenWindows) -> None:
    """Put the samples of recordings into an exported folder, so that it can be evaluated again by itself."""
    tensors = {f"{number:05d}": one.samples for number, one in enumerate(windows.recordings)}
    write_tensors(folder / RECORDINGS, tensors, {})


def kept_recordings(folder: Path, stored: dict[str, Any], config: Any, listener: Listener) -> TokenWindows:
    """Read what `keep_recordings` and evaluation.json hold.

    Args:
        folder: exported.
        stored: evaluation.json.
        config: of the model.
        listener: of the folder.
    """
    samples = load_file(folder / RECORDINGS)
    recordings = [
        Recording(entry["name"], samples[f"{number:05d}"], entry["reference"])
        for number, entry in enumerate(stored["recordings"])
    ]
    utterances = [
        listener.utterance(recording, tokens, entry["given"])
        for recording, tokens, entry in zip(recordings, stored["windows"], stored["recordings"], strict=True)
    ]
    return _heard(recordings, utterances, int(config["vocab_size"]), stored["source"], stored["notes"])
