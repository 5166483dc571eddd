"""Laws of evaluating models that read whole texts: a copy is no loss, damage is seen, padding never counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import any_models
import pytest
import torch
from torch import Tensor, nn

from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.metrics import Comparison
from compot_deploy.accuracy.outcome import AccuracyReport
from compot_deploy.accuracy.texts import TorchTexts, check_texts, compare_outputs, measure_texts
from compot_deploy.errors import InputError
from compot_deploy.models.source import open_source
from compot_deploy.models.tasks import EMBEDDING, Batch, Task
from compot_deploy.models.tokens import make_windows
from compot_deploy.models.whole import whole_model

MASKED = Task("masked", "AutoModelForMaskedLM", "masked language model", padding=0)
CLASSES = Task("classification", "AutoModelForSequenceClassification", "classifier", padding=0)
LABELS = Task("token-classification", "AutoModelForTokenClassification", "token classifier", padding=0)
VECTORS = replace(EMBEDDING, padding=0)
TASKS = (VECTORS, MASKED, CLASSES, LABELS)
WIDTH = 12

Change = Callable[[Tensor, Batch], Tensor]


def same(output: Tensor, batch: Batch) -> Tensor:
    return output


class Toy:
    """A table of vectors, one for each token; a text's class is where the mean of its vectors points to."""

    def __init__(self, task: Task, change: Change = same, name: str = "toy") -> None:
        self.task, self.change, self.name = task, change, name
        self.table = torch.randn(320, WIDTH, generator=torch.Generator().manual_seed(0))
        self.calls = 0

    def outputs(self, batch: Batch) -> Tensor:
        self.calls += 1
        found = self.table[batch.arguments["input_ids"]]
        if self.task.kind == "classification":
            weights = batch.real[..., None].float()
            found = (found * weights).sum(1) / weights.sum(1)
        return self.change(found, batch)


def evaluation(lengths: Sequence[int] = (9, 4, 7, 12) * 5) -> Evaluation:
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(3, 320, (length,), generator=generator) for length in lengths]
    return Evaluation(make_windows(windows, "made up", 320), (), str)


def checked(task: Task, change: Change = same, gate: Gate | None = None, **more: Any) -> AccuracyReport:
    """The toy, compressed without loss, exported with `change`."""
    exported = Toy(task, change, "exported")
    roles = {
        "reference": Toy(task),
        "compressed": Toy(task),
        "exported": exported,
        "exported_exact": exported,
    }
    return check_texts(task, **roles | {"evaluation": evaluation(), "gate": gate or Gate()} | more)  # type: ignore[arg-type]


def figures(task: Task, change: Change) -> Comparison:
    total = checked(task, change).total
    assert total is not None
    return total.comparison


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_model_is_no_loss_to_its_copy(task: Task) -> None:
    report = checked(task, factorized=Toy(task))
    losses = [report.method, report.export_reference, report.export_deployed, report.total]
    losses += [report.factorization, report.quantization]
    for loss in losses:
        assert loss is not None
        one = loss.comparison
        assert one.nmse == 0 and one.largest_difference == 0
        if task.kind == "embedding":
            assert one.cosine is not None and one.cosine.value == pytest.approx(1, abs=1e-12)
            assert one.lowest_cosine == pytest.approx(1, abs=1e-12)
            assert one.divergence is None and one.top1_agreement is None
            assert one.positions == 20
        else:
            assert one.divergence is not None and one.top1_agreement is not None
            assert one.divergence.mean.value == 0 and one.top1_agreement.value == 1
            assert one.cosine is None
            assert one.positions == (20 if task.pools else sum((9, 4, 7, 12)) * 5)
        assert one.perplexity_ratio is None and one.reference_perplexity is None
    assert report.gate.passed
    assert report.continuations == () and report.evaluation.windows == 20


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_an_output_whose_features_are_permuted_is_seen(task: Task) -> None:
    def permuted(output: Tensor, batch: Batch) -> Tensor:
        return output.roll(1, -1)

    found = figures(task, permuted)
    assert found.nmse > 0.5
    if task.kind == "embedding":
        assert found.cosine is not None and found.cosine.value < 0.5
    else:
        assert found.top1_agreement is not None and found.top1_agreement.value < 0.2
        assert found.divergence is not None and found.divergence.mean.value > (0.01 if task.pools else 0.5)
    assert not checked(task, permuted).gate.passed


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_texts_that_change_places_are_seen(task: Task) -> None:
    """What a wrong batch axis does."""
    assert figures(task, lambda output, batch: output.flip(0)).nmse > 0.1


@pytest.mark.parametrize("value", [1e6, torch.nan, torch.inf])
@pytest.mark.parametrize("task", [VECTORS, MASKED, LABELS], ids=lambda task: task.kind)
def test_what_stands_at_padding_never_counts(task: Task, value: float) -> None:
    def damaged(output: Tensor, batch: Batch) -> Tensor:
        assert not batch.real.all()
        noisy = output + 0.01 * torch.sin(100 * output)
        return noisy.masked_fill(~batch.real[..., None], value)

    def noisy(output: Tensor, batch: Batch) -> Tensor:
        return output + 0.01 * torch.sin(100 * output)

    assert figures(task, damaged) == figures(task, noisy)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_value_that_is_no_number_fails_the_gate(task: Task) -> None:
    def one_nan(output: Tensor, batch: Batch) -> Tensor:
        output = output.clone()
        output[0, 0] = torch.nan if output.dim() == 2 else output[0, 0] * torch.nan
        return output

    report = checked(task, one_nan)
    assert not report.gate.passed
    assert report.export_reference.comparison.nonfinite_candidate > 0
    assert next(one.name for one in report.gate.criteria if not one.passed) == "nonfinite_logits"


def test_figures_of_vectors_are_what_they_say() -> None:
    texts = evaluation((3, 5))
    (batch,) = VECTORS.batches(texts.text.windows)
    one = Toy(VECTORS).outputs(batch)
    other = one + torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    found = compare_outputs(VECTORS, [batch], [one], [other])
    rows = [(one[text, :length], other[text, :length]) for text, length in ((0, 3), (1, 5))]
    cosines = [float(nn.functional.cosine_similarity(a.mean(0), b.mean(0), dim=0)) for a, b in rows]
    assert found.cosine is not None and found.cosine.value == pytest.approx(sum(cosines) / 2, rel=1e-5)
    assert found.lowest_cosine == pytest.approx(min(cosines), rel=1e-5)
    error = sum(float((b - a).square().sum()) for a, b in rows)
    power = sum(float((a - a.mean(-1, keepdim=True)).square().sum()) for a, _ in rows)
    assert found.nmse == pytest.approx(error / power, rel=1e-5)
    assert found.largest_difference == pytest.approx(max(float((b - a).abs().max()) for a, b in rows))


def test_figures_of_distributions_are_what_they_say() -> None:
    texts = evaluation((3, 5))
    (batch,) = MASKED.batches(texts.text.windows)
    one = Toy(MASKED).outputs(batch)
    other = one + torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    found = compare_outputs(MASKED, [batch], [one], [other])
    r, c = one[batch.real].double(), other[batch.real].double()
    expected = nn.functional.kl_div(c.log_softmax(-1), r.softmax(-1), reduction="batchmean")
    assert found.divergence is not None
    assert found.divergence.mean.value == pytest.approx(float(expected), rel=1e-9)
    assert found.top1_agreement is not None
    assert found.top1_agreement.value == pytest.approx(float((r.argmax(-1) == c.argmax(-1)).double().mean()))
    assert found.positions == 8


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_limit_that_is_kept_passes_and_one_that_is_not_fails(task: Task) -> None:
    def noisy(output: Tensor, batch: Batch) -> Tensor:
        return output + 0.3 * torch.sin(100 * output)

    found = figures(task, noisy)
    if task.kind == "embedding":
        assert found.cosine is not None
        value, limits = found.cosine.value, {"min_cosine": (-1e-6, 1e-6)}
    else:
        assert found.top1_agreement is not None and found.divergence is not None
        value, limits = found.divergence.mean.value, {"max_kl": (1e-6, -1e-6)}
        assert 0 < found.top1_agreement.value < 1
    ((name, (kept, broken)),) = limits.items()
    for limit, passes in ((value + kept, True), (value + broken, False)):
        gate = Gate(**{name: limit}, max_export_nmse=1.0)  # type: ignore[arg-type]
        report = checked(task, noisy, gate)
        assert report.gate.passed is passes
        assert [one.name for one in report.gate.criteria if not one.passed] == ([] if passes else [name])


def test_a_figure_that_a_task_does_not_have_lets_no_limit_pass() -> None:
    """What `limits.gate_of` refuses before any work would fail here, too: nothing is not good enough."""
    report = checked(VECTORS, gate=Gate(max_kl=10.0))
    assert not report.gate.passed
    assert not checked(MASKED, gate=Gate(min_cosine=-1.0)).gate.passed


def test_without_the_original_only_the_export_is_evaluated() -> None:
    report = checked(VECTORS, reference=None, reference_absent="it has moved", factorized=Toy(VECTORS))
    assert report.method is None and report.total is None and report.factorization is None
    assert report.reference_absent == report.split_absent == "it has moved"
    assert report.gate.passed
    with pytest.raises(InputError, match=r"needs the original model, and it has moved\. Give it"):
        checked(VECTORS, gate=Gate(min_cosine=0.5), reference=None, reference_absent="it has moved")


def test_outputs_of_different_shapes_are_not_compared() -> None:
    with pytest.raises(InputError, match=r"shape .*, 12\) and .*, 6\) cannot be compared"):
        checked(VECTORS, lambda output, batch: output[..., :6])


def test_a_model_that_lets_texts_see_each_other_has_numerical_noise() -> None:
    """The same model twice: texts side by side, and one at a time."""

    def leaks(output: Tensor, batch: Batch) -> Tensor:
        return output + 0.1 * output.mean(0, keepdim=True)

    assert checked(VECTORS).noise.comparison.nmse == 0
    leaky = checked(VECTORS, reference=Toy(VECTORS, leaks, "leaky"))
    assert leaky.noise.comparison.nmse > 1e-4
    assert (leaky.noise.reference, leaky.noise.candidate) == ("leaky", "leaky, text by text")


def test_one_loss_by_itself_is_that_of_the_check() -> None:
    def noisy(output: Tensor, batch: Batch) -> Tensor:
        return output + 0.3 * torch.sin(100 * output)

    for task in TASKS:
        alone = measure_texts(task, Toy(task), Toy(task, noisy, "other"), evaluation())
        assert alone.comparison == figures(task, noisy)
        assert (alone.reference, alone.candidate) == ("toy", "other")


def test_every_model_reads_every_text_once() -> None:
    toys = [Toy(VECTORS, name=str(number)) for number in range(4)]
    reference, compressed, exported, exact = toys
    check_texts(VECTORS, reference, compressed, exported, exact, evaluation(), Gate())
    assert [toy.calls for toy in toys[1:]] == [2, 2, 2]  # 20 texts, 16 at once


@pytest.mark.parametrize("kind", any_models.READERS)
def test_a_model_of_transformers_reads_texts_side_by_side_as_one_by_one(kind: str, tmp_path: Path) -> None:
    """Masks and padding reach the model: without them the numerical noise would be as large as the outputs."""
    source = open_source(any_models.save(tmp_path / "model", kind))
    runner = TorchTexts(whole_model(source), source.task)
    report = check_texts(source.task, runner, runner, runner, runner, evaluation(), Gate())
    assert report.noise.comparison.nmse < 1e-9
    assert report.total is not None and report.total.comparison.nmse == 0
    (batch,) = source.task.batches([torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])])
    blind = TorchTexts(whole_model(source), source.task)
    arguments = {"input_ids": batch.arguments["input_ids"]}
    unmasked = blind.outputs(Batch(arguments, batch.real))
    loss = compare_outputs(source.task, [batch], [runner.outputs(batch)], [unmasked])
    if kind != "gpt2 classes":  # which finds the end of a text by the token behind it
        assert loss.nmse > 1e-4
