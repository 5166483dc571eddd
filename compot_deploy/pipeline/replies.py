"""What the original writes of everything that is read: its decoder is taught with that, so no text has to be given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compot_deploy.accuracy.towers import TorchTowers
from compot_deploy.core.work_files import is_sound, read_value, write_value
from compot_deploy.models.audio import Recording, digest_of
from compot_deploy.models.paged import original_to_run
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Utterance
from compot_deploy.models.tokens import TokenWindows, make_windows
from compot_deploy.models.writing import Writer
from compot_deploy.planning.settings import device_of
from compot_deploy.progress import Progress
from compot_deploy.recipe import Recipe


def with_replies(
    utterances: Sequence[Utterance],
    writer: Writer,
    path: Path,
    recipe: Recipe,
    source: ModelSource,
    progress: Progress,
) -> list[Utterance]:
    """The same with what the original writes of each, its beginning included.

    Args:
        utterances: whose tokens nobody knows yet.
        writer: of the model.
        path: of a file that keeps what is written.
        recipe: says where to compute.
        source: the model.
        progress: told how far the work is.
    """
    if not is_sound(path):
        write_value(path, _written(utterances, writer, recipe, source, progress))
    return [
        replace(utterance, tokens=torch.tensor(entry["tokens"]), given=entry["given"])
        for utterance, entry in zip(utterances, read_value(path), strict=True)
    ]


def _written(
    utterances: Sequence[Utterance], writer: Writer, recipe: Recipe, source: ModelSource, progress: Progress
) -> list[dict[str, Any]]:
    runner = TorchTowers(original_to_run(source, device=device_of(recipe)), source.task, "original")
    label = "Transcribe with the original" if source.task.listens else "Write with the original"
    found = []
    for number, utterance in enumerate(utterances):
        progress(number, len(utterances), label)
        beginning = writer.beginning
        begun = replace(utterance, tokens=torch.tensor(beginning), given=len(beginning))
        if writer.languages:
            beginning = (beginning[0], runner.language(begun, writer.languages), *beginning[1:])
            begun = replace(begun, tokens=torch.tensor(beginning), given=len(beginning))
        found.append({"tokens": [*beginning, *runner.write(begun, writer)], "given": len(beginning)})
    progress(len(utterances), len(utterances), label)
    return found


def windows_of(
    utterances: Sequence[Utterance],
    vocabulary: int,
    origin: str,
    notes: Sequence[str],
    recordings: Sequence[Recording] = (),
) -> TokenWindows:
    """Utterances as what a model is calibrated or evaluated on.

    Raises:
        InputError: a token that the model does not know.
    """
    windows = make_windows([utterance.tokens for utterance in utterances], origin, vocabulary, notes)
    if recordings:
        heard = digest_of(recordings)
    else:
        heard = make_windows([utterance.features for utterance in utterances], origin, vocabulary).digest
    digest = hashlib.sha256((windows.digest + heard).encode()).hexdigest()
    return replace(windows, digest=digest, recordings=tuple(recordings), utterances=tuple(utterances))


def first_of(windows: TokenWindows, tokens: int, vocabulary: int) -> TokenWindows:
    """The first utterances, as many as so many tokens allow; one at least."""
    kept, read = 0, 0
    for window in windows.windows:
        if kept and read + len(window) > tokens:
            break
        kept, read = kept + 1, read + len(window)
    if kept == len(windows.windows):
        return windows
    return windows_of(
        windows.utterances[:kept], vocabulary, windows.source, windows.notes, windows.recordings[:kept]
    )
