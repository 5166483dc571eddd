"""Recordings that a speech model is calibrated and evaluated on, with the transcripts that the original writes of them.

The decoder is teacher-forced on the original's own greedy transcript, so no transcript has to be given. Where what is
said is known (``NAME.txt`` beside ``NAME.wav``), word errors are also counted against that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from compot_deploy.core.work_files import write_tensors
from compot_deploy.errors import InputError
from compot_deploy.models.audio import Recording, digest_of, files_of, read_recordings
from compot_deploy.models.listening import Listener, load_listener
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.pipeline.replies import first_of, windows_of, with_replies
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
    return first_of(windows, recipe.evaluation_tokens, source.vocabulary)


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
    utterances = [listener.utterance(recording, (), 0) for recording in read.found]
    replied = with_replies(utterances, listener, path, recipe, source, progress)
    return windows_of(replied, source.vocabulary, origin, read.notes, read.found)


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
    return windows_of(utterances, int(config["vocab_size"]), stored["source"], stored["notes"], recordings)
