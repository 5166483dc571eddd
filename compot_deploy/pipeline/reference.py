"""The reference file: an original's answers to the evaluation text, for machines on which the original is not.

It is safetensors: ``tokens`` and ``lengths`` of the text, the answers (see `compot_deploy.accuracy.answers`), and JSON
in the metadata. Keep it where the folder that is judged cannot change it: in the repository of the check, for example.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compot_deploy.accuracy.answers import Distributions
from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.accuracy.listening import Shortening, positions_of
from compot_deploy.core.disk import put_in_place, safetensors_errors
from compot_deploy.errors import InputError
from compot_deploy.models.source import ModelSource
from compot_deploy.models.tasks import Task
from compot_deploy.models.tokens import TokenWindows, make_windows
from compot_deploy.pipeline.evaluation import REFERENCE
from compot_deploy.pipeline.reading import Reading, reading_of

_FORMAT: Final = 1
_READ_BACK: Final = 2
"""Windows of the evaluation text that tokenizers read as well."""

_WHOLE = {torch.int64: torch.int32, torch.float64: torch.float32}


@dataclass(frozen=True)
class Reference:
    """What an original said.

    Attributes:
        model: its name.
        fingerprint: of its files, see `ModelSource.fingerprint`.
        kind: of its task.
        vocabulary: number of token ids.
        text: that it read.
        prompts: that are continued.
        reading: how it reads text.
        answers: its distributions, or the vectors of its texts.
    """

    model: str
    fingerprint: str
    kind: str
    vocabulary: int
    text: TokenWindows
    prompts: tuple[tuple[int, ...], ...]
    reading: Reading
    answers: Distributions | Tensor

    @property
    def name(self) -> str:
        """For reports."""
        return f"answers of {self.model}, kept"


def reading_of_source(source: ModelSource, text: TokenWindows) -> Reading:
    """How an original reads text; a window or two of the evaluation text is among it."""
    windows = [window.tolist() for window in text.windows[:_READ_BACK]]
    return reading_of(source.folder, source.config, windows)


def write_reference(
    path: Path, model: str, source: ModelSource, evaluation: Evaluation, heard: Shortening
) -> None:
    """Write the answers that were heard while an original read the evaluation text."""
    text = evaluation.text
    described = {
        "format": _FORMAT,
        "model": model,
        "fingerprint": source.fingerprint,
        "kind": source.task.kind,
        "vocabulary": source.vocabulary,
        "source": text.source,
        "notes": list(text.notes),
        "prompts": [list(prompt) for prompt in evaluation.prompts],
        "reading": asdict(reading_of_source(source, text)),
    }
    tensors = {
        "tokens": torch.cat([window.flatten() for window in text.windows]),
        "lengths": torch.tensor([len(window) for window in text.windows]),
        **heard.tensors,
    }
    short = {name: value.to(_WHOLE.get(value.dtype, value.dtype)) for name, value in tensors.items()}
    temporary = path.with_name(path.name + ".part")
    with safetensors_errors(path):
        save_file(short, temporary, metadata={"reference": json.dumps(described, sort_keys=True)})
    temporary.chmod((path.parent.stat().st_mode & 0o444) | 0o200)  # safetensors lets nobody else read it
    put_in_place(temporary, path)


def read_reference(path: Path, task_of_folder: Task) -> Reference:
    """Read what `write_reference` wrote.

    Args:
        path: of the file.
        task_of_folder: what the model that is held against it is for.

    Raises:
        InputError: not a reference file, damaged, or of a model of another kind.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            described = json.loads((reader.metadata() or {})["reference"])
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        if described["format"] != _FORMAT:
            raise InputError(
                f"{path} is a reference file of format {described['format']}, and this version reads {_FORMAT}: make "
                "it again."
            )
        if described["kind"] != task_of_folder.kind:
            raise InputError(
                f"{path} holds the answers of a model for {described['kind']}, and the folder's is one for "
                f"{task_of_folder.kind}."
            )
        return _reference(described, tensors, task_of_folder)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise InputError(
            f"{path} is no reference file, or damaged ({type(error).__name__}): give {REFERENCE} of an export, or the "
            "original model."
        ) from None


def _reference(described: Mapping[str, Any], tensors: dict[str, Tensor], task: Task) -> Reference:
    lengths = [int(length) for length in tensors.pop("lengths")]
    windows = tensors.pop("tokens").long().split(lengths)
    vocabulary = int(described["vocabulary"])
    text = make_windows(
        windows, str(described["source"]), vocabulary, [str(note) for note in described["notes"]]
    )
    reading = described["reading"]
    answers: Distributions | Tensor
    if task.kind == "embedding":
        answers = tensors["vectors"]
        ids = torch.empty(0, dtype=torch.int64)
        floats, positions = [answers], len(answers)
    else:
        found = {entry.name: tensors[entry.name] for entry in fields(Distributions)}
        answers = Distributions(
            **{name: value if value.is_floating_point() else value.long() for name, value in found.items()}
        )
        ids = torch.cat([answers.ids.flatten(), answers.drawn.flatten(), answers.choice])
        floats, positions = (
            [answers.logs, answers.drawn_logs, answers.rest, answers.surprise],
            len(answers.choice),
        )
        if {len(value) for value in found.values()} != {positions}:
            raise ValueError("rows")
    if positions != positions_of(task, text.windows) or not all(
        bool(value.isfinite().all()) for value in floats
    ):
        raise ValueError("positions")
    if len(ids) and int(ids.min()) < 0:
        raise ValueError("ids")
    return Reference(
        model=str(described["model"]),
        fingerprint=str(described["fingerprint"]),
        kind=str(described["kind"]),
        vocabulary=vocabulary,
        text=text,
        prompts=tuple(tuple(int(token) for token in prompt) for prompt in described["prompts"]),
        reading=Reading(
            ids={text: tuple(ids) for text, ids in reading["ids"].items()},
            words=cast(dict[str, str], reading["words"]),
            template=str(reading["template"]),
            ends=tuple(reading["ends"]),
        ),
        answers=answers,
    )
