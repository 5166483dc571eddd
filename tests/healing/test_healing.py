"""Laws of healing: integers stay, what is tuned is what is stored, and what held-out text calls worse is not kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import any_models
import gguf_models
import pytest
import tiny
import torch
from cases import nightly
from matrices import same_matrix
from torch import Tensor

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized, leaves
from compot_deploy.core.store import load_matrices, save_matrices
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.healing import Healed, Patient, heal, objection, split_texts
from compot_deploy.healing import distance as distances
from compot_deploy.healing import run as healing
from compot_deploy.healing import steps as sizes
from compot_deploy.healing import texts as reading
from compot_deploy.healing.distance import Head, distance, distance_before_heads
from compot_deploy.healing.parameters import grids_of, scale_gradients, weight_of, with_scales
from compot_deploy.healing.student import tuning_of
from compot_deploy.healing.teacher import Teacher
from compot_deploy.models.answers import Answers
from compot_deploy.models.ending import ends_with_head
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.tasks import Batch, Task
from compot_deploy.models.tokens import make_windows
from compot_deploy.models.weight_gradients import OUTSIDE, gradients_backwards
from compot_deploy.models.whole import put_in, whole_model
from compot_deploy.planning.candidates import Search
from compot_deploy.planning.context import PlanningContext, collect_grams
from compot_deploy.planning.schemes import GridChoice
from compot_deploy.progress import silent
from compot_deploy.quant import rtn

STEPS = 20
KINDS = ("llama", "gpt2", "bert", "bert masked", "bert classes")


def leaf(rows: int, columns: int, grid: Grid, seed: int = 0) -> Quantized:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return rtn(values, None, grid)


def pair(name: str, codes: Quantized | Dense, seed: int = 0) -> FactorPair:
    return FactorPair(leaf(24, codes.shape[0], Grid(4, 16), seed), codes, name, Pattern())


MATRICES: Mapping[str, Callable[[], Matrix]] = {
    "floating point": lambda: Dense(torch.randn(24, 8)),
    "plain": lambda: leaf(24, 8, Grid(2, 16)),  # a shorter last group
    "table": lambda: leaf(24, 8, Grid(4, 8, "nf4")),
    "factorized": lambda: Factorized((pair("m", leaf(12, 8, Grid(3, 8), 1)),)),
    "two pairs": lambda: Factorized(
        (pair("m", leaf(12, 8, Grid(2, 4), 1)), pair("m", leaf(4, 8, Grid(8, 4), 2), 3))
    ),
    "codes not quantized": lambda: Factorized((pair("m", Dense(torch.randn(12, 8))),)),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_every_kind_of_matrix_has_its_values_and_their_gradients_from_its_scales(kind: str) -> None:
    matrix = MATRICES[kind]()
    scales = {key: one.scales.float().requires_grad_(True) for key, one in grids_of("m", matrix).items()}
    assert len(scales) == sum(isinstance(one, Quantized) for one in leaves(matrix))
    weight = weight_of("m", matrix, scales)
    torch.testing.assert_close(weight.detach(), matrix.dequantize(), rtol=1e-5, atol=1e-5)
    other = {key: (values.detach() * 1.25).half() for key, values in scales.items()}
    tuned = with_scales("m", matrix, other)
    torch.testing.assert_close(
        weight_of("m", matrix, {key: values.float() for key, values in other.items()}),
        tuned.dequantize(),
        rtol=1e-5,
        atol=1e-5,
    )
    own = with_scales("m", matrix, {key: values.detach() for key, values in scales.items()})
    assert same_matrix(own, matrix)
    if scales:
        way = torch.randn(weight.shape)
        by_graph = torch.autograd.grad(weight, list(scales.values()), way, retain_graph=True)
        found = scale_gradients("m", matrix, {key: one.detach() for key, one in scales.items()}, way)
        assert list(found) == list(scales)
        for one, other_one in zip(found.values(), by_graph, strict=True):
            torch.testing.assert_close(one, other_one, rtol=1e-4, atol=1e-4)
    # Along the scales themselves a plain matrix grows by itself, a product of two by twice itself.
    if scales:
        gradients = torch.autograd.grad(weight, list(scales.values()), matrix.dequantize())
        slope = sum(float((g * s.detach()).sum()) for g, s in zip(gradients, scales.values(), strict=True))
        times = max(1, len(scales) // len(getattr(matrix, "pairs", (0,))))
        assert slope == pytest.approx(times * float(matrix.dequantize().square().sum()), rel=1e-4)


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps read some of the windows, in several batches."""
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", 64)
    monkeypatch.setattr(reading, "TOKENS_PER_STEP", 200)


@pytest.fixture(scope="module", params=[*KINDS[:-2], *nightly(*KINDS[-2:])])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    save = tiny.save if request.param in tiny.KINDS else any_models.save
    return open_source(save(tmp_path_factory.mktemp("model") / "model", request.param))


def patient_of(source: ModelSource, work: Path, windows: int = 32, bits: int = 2) -> Patient:
    """A model in plain integers, rounded to nearest."""
    work.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    lengths = [24] * windows if source.task.generates else [12 + number % 13 for number in range(windows)]
    tokens = [torch.randint(3, source.vocabulary, (length,), generator=generator) for length in lengths]
    files: dict[str, Path] = {}
    for number, block in enumerate(source.layout.blocks):
        names = [name for group in source.layout.of(block) for name in group.names]
        made = {name: rtn(source.weight(name).float().contiguous(), None, Grid(bits, 32)) for name in names}
        save_matrices(work / f"plain-{number}.safetensors", made)
        files |= dict.fromkeys(names, work / f"plain-{number}.safetensors")
    others: dict[str, Path] = {}
    layout = source.layout
    tables = {layout.embedding, layout.head} - {None, layout.head if layout.tied else None}
    for name in (*sorted(map(str, tables)), *source.outside):
        others[name] = work / f"other-{name}.safetensors"
        save_matrices(others[name], {name: Dense(source.weight(name).float().contiguous())})
    return Patient(source, make_windows(tokens, "random", source.vocabulary), files, others, work)


def matrices_of(files: Mapping[str, Path]) -> dict[str, Matrix]:
    return {name: load_matrices(path)[name] for name, path in files.items()}


def same(first: Healed, second: Healed) -> bool:
    one, two = matrices_of(first.files), matrices_of(second.files)
    return (
        first.course == second.course
        and all(same_matrix(one[name], two[name]) for name in one)
        and all(torch.equal(first.vectors[name], second.vectors[name]) for name in first.vectors)
    )


def test_gradients_block_by_block_are_those_of_the_whole_model(source: ModelSource, tmp_path: Path) -> None:
    patient = patient_of(source, tmp_path / "work", windows=16)
    batches = split_texts(source, patient.windows.inputs).batches[:2]
    task, device = source.task, torch.device("cpu")
    original = whole_model(source)
    targets = [task.output(original(**batch.arguments)).float() + 0.3 for batch in batches]
    targets[0][..., ::2] -= 0.7
    parts = tuning_of(source, matrices_of({**patient.blocks, **patient.others}), "cpu")
    names = {
        block: [
            *(name for name in parts.of(block) if name in source.tensors),
            *(
                site.parameter
                for group in source.layout.groups
                for site in group.sites
                if group.block == block
            ),
        ]
        for block in (*source.layout.blocks, OUTSIDE)
    }
    model = source.skeleton(device=device, dtype=torch.float32, head=True)
    found: dict[str, Tensor] = {}
    for _, gradients in gradients_backwards(
        source,
        model,
        batches,
        lambda output, number: distance(task, targets[number], output, batches[number]).gradient,
        lambda block: names[block],
    ):
        found |= gradients
    for name in found:
        original.get_parameter(name).requires_grad_(True)
    for batch, target in zip(batches, targets, strict=True):
        output = task.output(original(**batch.arguments))
        output.backward(distance(task, target, output, batch).gradient)
    assert (
        {name for of in names.values() for name in of}
        >= set(found)
        >= set(source.layout.sites and names[source.layout.blocks[0]])
    )
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, original.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_a_distance_is_the_slope_of_the_loss(source: ModelSource) -> None:
    task, generator = source.task, torch.Generator().manual_seed(0)
    (batch,) = task.batches([torch.arange(3, 9), torch.arange(4, 8)])[:1]
    texts = len(batch.real)
    shape = (texts, 5) if task.kind == "classification" else (*batch.real.shape, 5)
    one, other, way = (torch.randn(shape, generator=generator) for _ in range(3))
    found = distance(task, one, other, batch)
    assert found.loss.mean == pytest.approx(task.loss(one, other, batch.compared).mean, rel=1e-4)
    ahead, behind = (distance(task, one, other + step * way, batch).loss.total for step in (1e-2, -1e-2))
    assert float((found.gradient * way).sum()) == pytest.approx((ahead - behind) / 2e-2, rel=0.02, abs=1e-3)


def test_a_model_ends_with_its_head_unless_it_does_something_behind_it(
    source: ModelSource, tmp_path: Path
) -> None:
    assert ends_with_head(source) == (source.layout.head is not None)
    for kind in ("gemma2", "cohere"):
        assert not ends_with_head(open_source(gguf_models.save(tmp_path / kind, kind)))


@pytest.mark.parametrize("masked", [False, True])
def test_what_heads_read_is_compared_as_what_they_give(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_LOGITS", 3 * 11)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 5, 4, generator=generator) for _ in range(2))
    heads = [
        Head(torch.randn(11, 4, generator=generator), torch.randn(11, generator=generator)),
        Head(torch.randn(11, 4, generator=generator), None),
    ]
    real = torch.ones(2, 5, dtype=torch.bool)
    if masked:
        real[0, 3:] = False
    batch = Batch({}, real)
    found = distance_before_heads((heads[0], heads[1]), one, other, batch)
    wanted = distance(Task("generation", "", ""), heads[0](one), heads[1](other), batch)
    assert found.loss.count == wanted.loss.count == int(real.sum())
    assert found.loss.total == pytest.approx(wanted.loss.total, rel=1e-5)
    torch.testing.assert_close(found.gradient, wanted.gradient @ heads[1].weight)


def test_healing_gains_on_held_out_text_with_integers_as_they_are(
    source: ModelSource, tmp_path: Path
) -> None:
    patient = patient_of(source, tmp_path / "work")
    healed = heal(patient, STEPS, 0, silent)
    course = healed.course
    assert 0 < course.kept <= course.done and course.after < course.before
    before, after = matrices_of(patient.blocks), matrices_of(healed.files)
    assert list(before) == list(after)
    changed = 0
    for name, matrix in before.items():
        other = after[name]
        assert isinstance(matrix, Quantized) and isinstance(other, Quantized)
        assert torch.equal(matrix.integers, other.integers) and other.scales.dtype == torch.float16
        changed += int((matrix.scales != other.scales).sum())
    assert changed > 0 and healed.vectors
    assert all(values.dtype == source.tensors[name].dtype for name, values in healed.vectors.items())
    # What is told is what the files give: the whole model, filled from them, loses as much.
    texts, task = split_texts(source, patient.windows.inputs), source.task
    original, model = whole_model(source), put_in(whole_model(source), source.sites, after)
    for name, values in healed.vectors.items():
        model.get_parameter(name).data.copy_(values)
    losses = [
        task.loss(*(task.output(one(**batch.arguments)) for one in (original, model)), batch.compared)
        for batch in (texts.batches[number] for number in texts.held_out)
    ]
    total = sum(loss.total for loss in losses) / sum(loss.count for loss in losses)
    assert total == pytest.approx(course.after, rel=1e-3)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(tiny.save(tmp_path_factory.mktemp("model") / "llama", "llama", num_hidden_layers=1))


def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    decoder: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = heal(patient_of(decoder, tmp_path / "one" / "work"), STEPS, 0, silent)
    patient = patient_of(decoder, tmp_path / "two" / "work")
    step = healing._Healing._step

    def stopped(self: Any, number: int, *more: Any) -> None:
        if number == 14:
            raise KeyboardInterrupt
        step(self, number, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(healing._Healing, "_step", stopped)
        heal(patient, STEPS, 0, silent)
    seen: list[int] = []

    def counted(self: Any, number: int, *more: Any) -> None:
        seen.append(number)
        step(self, number, *more)

    monkeypatch.setattr(healing._Healing, "_step", counted)
    assert same(heal(patient, STEPS, 0, silent), undisturbed)
    assert seen == list(range(11, STEPS + 1)), "it goes on behind the last look"
    assert same(heal(patient, STEPS, 0, silent), undisturbed) and len(seen) == 10, "what is finished is taken"
    other = heal(patient_of(decoder, tmp_path / "three" / "work"), STEPS, 1, silent)
    assert not same(other, undisturbed), "the seed decides what a step reads"


def test_numbers_that_are_not_finite_stop_and_the_best_is_kept(
    decoder: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = patient_of(decoder, tmp_path / "work")
    step = healing._Healing._step

    def broken(self: Any, number: int, *more: Any) -> None:
        if number == 13:
            for one in self._tuning.of(decoder.layout.blocks[0]).values():
                one.change.fill_(float("nan"))
        step(self, number, *more)

    monkeypatch.setattr(healing._Healing, "_step", broken)
    course = heal(patient, STEPS, 0, silent).course
    assert (course.done, course.kept) == (12, 10) and "not finite" in course.stopped
    assert course.after < course.before


def test_what_gains_nothing_is_left_out(
    decoder: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "SCALE_RATE", 4.0)
    patient = patient_of(decoder, tmp_path / "work")
    healed = heal(patient, 60, 0, silent)
    assert healed.course.kept == 0 and healed.course.after == healed.course.before
    assert healed.files == patient.blocks and not healed.vectors
    assert healed.course.done < 60 and "gained nothing" in healed.course.stopped


def test_too_little_text_is_named_with_what_would_do(decoder: ModelSource, tmp_path: Path) -> None:
    assert objection(decoder, patient_of(decoder, tmp_path / "enough" / "work", 16).windows) is None
    told = objection(decoder, patient_of(decoder, tmp_path / "little" / "work", 15).windows)
    assert told is not None and "needs 16 windows" in told and "15" in told


def test_a_model_that_gradients_do_not_go_through_is_refused(
    decoder: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "gradients_backwards", lambda *_, **__: iter([(OUTSIDE, {})]))
    with pytest.raises(UnsupportedModelError, match="No gradient"):
        heal(patient_of(decoder, tmp_path / "work"), STEPS, 0, silent)


def test_what_calibration_keeps_on_its_way_is_what_the_original_says_when_it_is_asked(
    source: ModelSource, tmp_path: Path
) -> None:
    asked, heard = (patient_of(source, tmp_path / name / "work") for name in ("asked", "heard"))
    texts = split_texts(source, asked.windows.inputs)
    Teacher(source, Answers(asked.work), texts, "cpu").ask(asked.windows, silent)
    exporter = EXPORTERS["onnx"]
    storage, search = exporter.storage(exporter.options({})), Search(GridChoice({2: (32,)}))
    collect_grams(
        PlanningContext(source, heard.windows, heard.work, storage, search, answers=Answers(heard.work))
    )
    count = len(asked.windows.windows)
    assert Answers(asked.work).complete(count) and not Answers(asked.work).complete(count + 1)
    # A model without a head never comes to one, so it is asked.
    assert Answers(heard.work).complete(count) == (source.layout.head is not None)
    for number in range(count if source.layout.head is not None else 0):
        assert torch.equal(Answers(asked.work).read([number]), Answers(heard.work).read([number]))
    # Batches of healing are others: each finds the answers to its own windows.
    original = whole_model(source)
    head = None if source.layout.head is None else original.get_submodule(source.layout.head)
    for number in (0, len(texts.batches) - 1):
        batch, found = texts.batches[number], Answers(asked.work).read(texts.windows[number])
        said = found if head is None else head(found)
        wanted = source.task.output(original(**batch.arguments))
        where = slice(None) if source.task.pools and wanted.dim() == 2 else batch.real
        torch.testing.assert_close(said[where], wanted[where], rtol=1e-3, atol=1e-3)
