"""Healing from beginning to end: ask the original, step, let held-out text decide, keep the best.

Gradients go end to end, block by block: what is kept of a step is what every block was called with, which is less
than the weights of one block, so no model needs more. Every few steps the rounded model reads the text that nothing is
learned from, and its state goes into the work folder: a run that was stopped goes on there, and ends with the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from compot_deploy.core.matrix import Matrix
from compot_deploy.core.memory import give_back_freed_memory
from compot_deploy.core.store import StoredMatrices, save_matrices
from compot_deploy.core.work_files import digest_of, is_sound, open_tensors, read_tensors, write_tensors
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.healing.cost import EVERY
from compot_deploy.healing.parameters import with_scales
from compot_deploy.healing.steps import NotFiniteError, part_of_rate
from compot_deploy.healing.student import Student, tuning_of
from compot_deploy.healing.teacher import Both, Teacher
from compot_deploy.healing.texts import Texts, schedule, split_texts, tokens_of
from compot_deploy.models.answers import Answers
from compot_deploy.models.source import ModelSource
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import LossSum
from compot_deploy.models.tokens import TokenWindows
from compot_deploy.models.weight_gradients import gradients_backwards
from compot_deploy.progress import Progress

_PATIENCE: Final = 3
"""Looks without a gain after which healing ends."""

_LABEL: Final = "Heal"


@dataclass(frozen=True)
class Patient:
    """A compressed model that is to be healed.

    Attributes:
        source: the original.
        windows: calibration text.
        blocks: file of every matrix of the blocks, in running order.
        others: files of the tables and of linears outside of the blocks, which stay as they are.
        work: folder for what is finished.
        device: where to compute.
    """

    source: ModelSource
    windows: TokenWindows
    blocks: Mapping[str, Path]
    others: Mapping[str, Path]
    work: Path
    device: str = "cpu"


@dataclass(frozen=True)
class Course:
    """What happened.

    Attributes:
        steps: that were asked for.
        done: that were made.
        kept: number of the step whose values are kept; 0 where no step was better than none.
        tokens: of the text that all steps together read.
        tuned: numbers that were tuned.
        losses: on the held-out text after every so many steps, by their number; 0 is before.
        stopped: why it ended before the last step; empty if it did not.
    """

    steps: int
    done: int
    kept: int
    tokens: int
    tuned: int
    losses: Mapping[int, float]
    stopped: str = ""

    @property
    def before(self) -> float:
        """Loss on the held-out text without healing."""
        return self.losses[0]

    @property
    def after(self) -> float:
        """Loss on the held-out text of what is kept."""
        return self.losses[self.kept]


@dataclass(frozen=True)
class Healed:
    """A healed model.

    Attributes:
        files: file of every matrix of the blocks; those of the patient where nothing was gained.
        vectors: norm weights and biases, by name in the checkpoint.
        course: what happened.
    """

    files: Mapping[str, Path]
    vectors: Mapping[str, Tensor]
    course: Course


def heal(patient: Patient, steps: int, seed: int, progress: Progress) -> Healed:
    """Tune a model for a number of steps, and keep it where held-out text says that it is better.

    Raises:
        UnsupportedModelError: a model that gradients do not go through.
    """
    key = _key(patient, steps, seed)
    course_file = patient.work / f"healed-{key}.safetensors"
    if not is_sound(course_file):
        _Healing(patient, steps, seed, key, progress).run(course_file)
    with open_tensors(course_file) as reader:
        told = json.loads(reader.metadata()["course"])
        vectors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    losses = {int(number): loss for number, loss in told.pop("losses").items()}
    course = Course(**told, losses=losses)
    if course.kept == 0:
        return Healed(patient.blocks, {}, course)
    layout = patient.source.layout
    blocks = {
        name: _block_file(patient, key, layout.blocks.index(group.block))
        for group in layout.groups
        for name in group.names
    }
    return Healed({name: blocks[name] for name in patient.blocks}, vectors, course)


class _Healing:
    """The steps, and what is known between two of them."""

    def __init__(self, patient: Patient, steps: int, seed: int, key: str, progress: Progress) -> None:
        self._patient, self._steps, self._seed, self._key = patient, steps, seed, key
        self._progress = progress
        source, device = patient.source, patient.device
        matrices = StoredMatrices({**patient.blocks, **patient.others})
        self._texts: Texts = split_texts(source, patient.windows.inputs)
        self._teacher = Teacher(source, Answers(patient.work), self._texts, device)
        self._tuning = tuning_of(source, matrices, device)
        self._student = Student(source, matrices, self._tuning, device)
        self._losses: dict[int, float] = {}
        self._kept = 0
        self._tokens = 0

    def run(self, course_file: Path) -> None:
        """All steps, and the files of what is kept."""
        self._teacher.ask(self._patient.windows, self._progress)
        both = Both(self._teacher, self._student.model)
        give_back_freed_memory()
        done, stopped = self._go_on(), ""
        if not self._losses:
            stopped = self._begin(both)
        steps = 0 if stopped else self._steps
        for number, numbers in enumerate(islice(schedule(self._texts, self._seed), steps), start=1):
            if number <= done:
                continue
            try:
                self._step(number, numbers, both)
                done = number
                if number % EVERY == 0 or number == self._steps:
                    self._look(number, both)
            except NotFiniteError:
                stopped = f"step {number} gave numbers that are not finite"
                break
            if self._is_over():
                stopped = f"the held-out text gained nothing in {_PATIENCE * EVERY} steps"
                break
        self._progress(self._steps, self._steps, _LABEL)
        self._write(course_file, done, stopped)
        give_back_freed_memory()

    def _begin(self, both: Both) -> str:
        """Measure what is to be healed; says why it cannot be."""
        try:
            self._look(0, both)
        except NotFiniteError:
            self._losses[0] = math.nan
            return "the model as it was made gives numbers that are not finite"
        return ""

    def _step(self, number: int, numbers: Sequence[int], both: Both) -> None:
        student, task = self._student, self._patient.source.task
        device = torch.device(self._patient.device)
        batches = [self._texts.batches[one].to(device) for one in numbers]
        total = sum(len(batch.real) if task.pools else int(batch.compared.sum()) for batch in batches)

        def judge(output: Tensor, place: int) -> Tensor:
            found = both.distance(output, numbers[place])
            if not math.isfinite(found.loss.total):
                raise NotFiniteError
            return found.gradient / total

        reached = False
        part = part_of_rate(number, self._steps)
        with both.reading(numbers):
            gradients = gradients_backwards(
                student.source,
                student.model,
                batches,
                judge,
                student.wanted,
                device=self._patient.device,
                step=self._ticks(number - 1),
            )
            for block, found in gradients:
                reached = student.step(block, found, number, part) or reached
        if not reached:
            raise UnsupportedModelError("No gradient reaches the weights of this model.")
        self._tokens += sum(map(tokens_of, batches))

    def _look(self, number: int, both: Both) -> None:
        """Let the held-out text decide, and keep the state."""
        loss = self._held_out(both)
        if not math.isfinite(loss):
            raise NotFiniteError
        self._losses[number] = loss
        if number > 0 and loss < self._losses[self._kept]:
            self._kept = number
            self._tuning.keep()
        told = {"done": number, "kept": self._kept, "tokens": self._tokens, "losses": self._losses}
        write_tensors(self._state_file, self._tuning.state(), {"told": json.dumps(told)})

    def _held_out(self, both: Both) -> float:
        student, numbers = self._student, self._texts.held_out
        batches = [self._texts.batches[number].to(torch.device(self._patient.device)) for number in numbers]
        total = LossSum(0.0, 0)
        left = iter(numbers)

        def add(output: Tensor, batch: object, *_: object) -> None:
            nonlocal total
            number = next(left)
            total += both.distance(output, number).loss

        with (
            both.reading(numbers),
            BlockStream(
                student.source, batches, device=self._patient.device, finish=True, model=student.model
            ) as stream,
        ):
            for _ in self._patient.source.layout.blocks[:-1]:
                stream.advance(capture=False)
            stream.finish_with(add)
        return total.total / total.count

    def _is_over(self) -> bool:
        looked = sorted(self._losses)
        return len(looked) > _PATIENCE and self._kept < looked[-_PATIENCE]

    def _ticks(self, before: int) -> Callable[[], None]:
        """Tells how far a step is, block by block."""
        units = 2 * len(self._patient.source.layout.blocks)
        done = 0

        def tick() -> None:
            nonlocal done
            self._progress(before * units + done, self._steps * units, _LABEL)
            done += 1

        return tick

    def _go_on(self) -> int:
        """Be where a run was stopped; the number of the step that was looked at last."""
        if not is_sound(self._state_file):
            return 0
        with open_tensors(self._state_file) as reader:
            told = json.loads(reader.metadata()["told"])
        self._tuning.go_on(read_tensors(self._state_file))
        self._student.renew_outside()
        self._losses = {int(number): loss for number, loss in told["losses"].items()}
        self._kept, self._tokens = told["kept"], told["tokens"]
        return int(told["done"])

    @property
    def _state_file(self) -> Path:
        return self._patient.work / f"healing-{self._key}.safetensors"

    def _write(self, course_file: Path, done: int, stopped: str) -> None:
        patient, best = self._patient, self._tuning.best
        matrices = self._student.matrices
        if self._kept:
            for number, block in enumerate(patient.source.layout.blocks):
                made: dict[str, Matrix] = {
                    name: with_scales(name, matrices[name], best) for name in self._student.names[block]
                }
                save_matrices(_block_file(patient, self._key, number), made)
        course = Course(
            self._steps, done, self._kept, self._tokens, self._tuning.count, self._losses, stopped
        )
        vectors = {name: value for name, value in best.items() if name in patient.source.tensors}
        write_tensors(course_file, vectors if self._kept else {}, {"course": json.dumps(asdict(course))})


def _key(patient: Patient, steps: int, seed: int) -> str:
    files = [digest_of(path) for path in dict.fromkeys([*patient.blocks.values(), *patient.others.values()])]
    named = json.dumps([files, patient.windows.digest, steps, seed])
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def _block_file(patient: Patient, key: str, number: int) -> Path:
    return patient.work / f"healed-{key}-{number:04d}.safetensors"
