from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from toy_models import VOCABULARY, ToyRunner, save_toy_onnx, toy_weights

from compot_deploy.accuracy import evaluate, reading
from compot_deploy.accuracy.evaluate import Evaluation, check
from compot_deploy.accuracy.gate import Criterion, Gate, apply_gate
from compot_deploy.accuracy.metrics import Comparison, compare, concatenate, predict, summarize
from compot_deploy.accuracy.onnx_runner import OnnxRunner
from compot_deploy.accuracy.outcome import AccuracyReport, Continuation
from compot_deploy.accuracy.runner import Runner
from compot_deploy.accuracy.torch_runner import torch_runner
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.models.source import open_source
from compot_deploy.models.tokens import make_windows


def decode(tokens: Sequence[int]) -> str:
    return " ".join(str(token) for token in tokens)


def evaluation(
    lengths: Sequence[int] = (20, 20, 20, 9, 9, 30), batch: int = 2, seed: int = 1, new_tokens: int = 12
) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    windows = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    text = make_windows(windows, "random tokens", VOCABULARY)
    return Evaluation(text, ((3, 1), (4, 1, 5)), decode, new_tokens, batch=batch)


def toy(damage: float = 0.0, name: str = "toy", seed: int = 5) -> ToyRunner:
    embedding, output = toy_weights()
    weight = output.dequantize()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return ToyRunner(embedding, weight + damage * weight.std() * noise, name)


def run(
    reference: Runner | None, compressed: Runner, exported: Runner, exact: Runner, gate: Gate | None = None
) -> AccuracyReport:
    return check(reference, compressed, exported, exact, evaluation(), gate or Gate())


def brute_force(first: ToyRunner, second: ToyRunner, windows: Sequence[torch.Tensor]) -> Comparison:
    parts = []
    for window in windows:
        one, other = (
            next(iter(runner.logits(window[None], len(window))))[0, :-1] for runner in (first, second)
        )
        parts.append(compare(predict(one, window[1:]), predict(other, window[1:])))
    return summarize(concatenate(parts))


def close(one: Comparison, other: Comparison, rel: float = 1e-9) -> bool:
    return (
        one.positions == other.positions
        and one.nmse == pytest.approx(other.nmse, rel=rel, abs=1e-15)
        and one.divergence.mean.value == pytest.approx(other.divergence.mean.value, rel=rel, abs=1e-15)
        and one.perplexity_ratio.value == pytest.approx(other.perplexity_ratio.value, rel=rel)
        and one.top1_agreement.value == other.top1_agreement.value
    )


def test_identical_models_lose_nothing() -> None:
    report = run(toy(), toy(), toy(), toy())
    assert report.gate.passed
    for loss in (report.method, report.export_reference, report.export_deployed, report.total):
        assert loss is not None
        assert loss.comparison.divergence.mean.value == 0 and loss.comparison.nmse == 0
        assert loss.comparison.perplexity_ratio.value == 1 and loss.comparison.top1_agreement.value == 1
        assert all(match.equal and match.common_prefix == match.length == 12 for match in loss.greedy)


def test_each_loss_is_the_one_between_its_two_models() -> None:
    models = [toy(), toy(0.3, seed=1), toy(0.4, seed=2), toy(0.5, seed=3)]
    reference, compressed, exported, exact = models
    report = run(reference, compressed, exported, exact)
    windows = evaluation().text.windows
    assert report.method is not None and report.total is not None
    # float32 matrix products of different shapes differ in the last bits
    assert close(report.method.comparison, brute_force(reference, compressed, windows), 1e-4)
    assert close(report.export_reference.comparison, brute_force(compressed, exact, windows), 1e-4)
    assert close(report.export_deployed.comparison, brute_force(compressed, exported, windows), 1e-4)
    assert close(report.total.comparison, brute_force(reference, exported, windows), 1e-4)
    positions = 3 * 19 + 2 * 8 + 29
    assert report.method.comparison.positions == positions == report.evaluation.positions


def test_damage_by_the_method_is_not_blamed_on_the_export() -> None:
    report = run(toy(), toy(0.2), toy(0.2), toy(0.2))
    assert report.method is not None and report.total is not None
    assert report.method.comparison.nmse > 1e-3
    assert report.total.comparison == report.method.comparison
    assert report.export_reference.comparison.nmse == 0 and report.export_deployed.comparison.nmse == 0
    assert report.gate.passed


def test_damage_by_the_export_is_not_blamed_on_the_method() -> None:
    report = run(toy(), toy(), toy(0.2), toy(0.2))
    assert report.method is not None and report.total is not None
    assert report.method.comparison.nmse == 0
    assert report.export_reference.comparison.nmse > 1e-3
    assert report.total.comparison == report.export_deployed.comparison
    failed = [criterion.name for criterion in report.gate.criteria if not criterion.passed]
    assert failed == ["max_export_nmse"] and not report.gate.passed


def test_a_real_export_is_evaluated_at_level_0_and_shown_as_deployed(tmp_path: Path) -> None:
    embedding, output = toy_weights()
    folder = save_toy_onnx(tmp_path / "toy", embedding, output)
    compressed = ToyRunner(embedding, output.dequantize())
    report = run(None, compressed, OnnxRunner(folder), OnnxRunner(folder, 0))
    assert report.gate.passed and report.export_reference.comparison.nmse < 1e-10
    assert report.export_deployed.comparison.nmse > 1e-7
    assert all(match.equal for match in report.export_reference.greedy)

    # One scale of 80 that is half as large again is found, and only in the export.
    scales = output.scales.clone()
    scales[0, 7] *= 1.5
    wrong = save_toy_onnx(tmp_path / "wrong", embedding, replace(output, scales=scales))
    report = run(compressed, compressed, OnnxRunner(wrong), OnnxRunner(wrong, 0))
    assert not report.gate.passed and report.method is not None and report.method.comparison.nmse == 0


def test_the_numerical_noise_of_a_transformer_is_rounding(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    runner = torch_runner(open_source(tmp_path))
    windows = [torch.randint(320, (length,)) for length in (40, 40, 24)]
    evaluated = Evaluation(make_windows(windows, "random", 320), ((1, 2),), decode, 4)
    report = check(runner, runner, runner, runner, evaluated, Gate())
    noise = report.noise.comparison
    assert noise.positions == 2 * 23 and 0 < noise.nmse < 1e-10 and noise.divergence.maximum < 1e-9
    assert report.total is not None and report.total.comparison.nmse == 0


@pytest.mark.parametrize(
    "logits_at_once, rows_at_once", [(1, 1), (3 * VOCABULARY, 2 * VOCABULARY), (10**6, 70)]
)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_chunks_and_batches_are_irrelevant(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int, rows_at_once: int, batch: int
) -> None:
    models = toy(), toy(0.3, seed=1), toy(0.4, seed=2), toy(0.5, seed=3)
    whole = check(*models, evaluation(), Gate())
    monkeypatch.setattr(reading, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setattr(reading, "COMPARED_AT_ONCE", rows_at_once)
    pieces = check(*models, evaluation(batch=batch), Gate())
    for name in ("method", "export_reference", "export_deployed", "total"):
        assert close(getattr(pieces, name).comparison, getattr(whole, name).comparison, 1e-4)
    assert pieces.continuations == whole.continuations


class Spy(ToyRunner):
    """Records the largest piece of logits that was asked for."""

    largest = 0

    def logits(self, tokens: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
        for piece in super().logits(tokens, chunk):
            self.largest = max(self.largest, piece.numel())
            yield piece


def test_only_a_few_logits_exist_at_a_time_and_each_model_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LOGITS_AT_ONCE", 6 * VOCABULARY)
    embedding, output = toy_weights()
    spies = [Spy(embedding, output.dequantize()) for _ in range(4)]
    check(*spies, evaluation(), Gate())
    assert 0 < max(spy.largest for spy in spies) <= 6 * VOCABULARY
    batches = 6  # windows whose logits have no room beside each other are read alone
    prompts = 2  # which the exact one is asked whether it would continue as the compressed one did
    assert [spy.calls for spy in spies[1:]] == [batches, batches, batches + prompts]


def test_the_exact_one_reads_a_part_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(toy(), toy(0.1), toy(0.1), toy(0.2))
    monkeypatch.setattr(evaluate, "EXACT_POSITIONS", 1)
    part = run(toy(), toy(0.1), toy(0.1), toy(0.2))
    assert part.export_reference.comparison.positions < whole.export_reference.comparison.positions
    assert (part.total, part.method, part.export_deployed) == (
        whole.total,
        whole.method,
        whole.export_deployed,
    )


def test_one_runner_in_two_roles_runs_once() -> None:
    exported = toy(0.1)
    compressed = toy()
    report = check(None, compressed, exported, exported, evaluation(), Gate())
    assert exported.calls == 4 + 2
    assert report.export_reference.comparison == report.export_deployed.comparison


# A reference that is not there


def test_without_a_reference_the_export_loss_is_still_evaluated() -> None:
    report = run(None, toy(0.1), toy(0.1), toy(0.1))
    assert report.method is None and report.total is None and report.gate.passed
    assert report.reference_absent == "the original model was not given"
    assert report.continuations[0].reference is None
    assert not run(None, toy(), toy(0.2), toy(0.2)).gate.passed


@pytest.mark.parametrize("limit", ["max_perplexity_ratio", "max_kl", "min_top1"])
def test_limits_on_the_total_loss_need_a_reference(limit: str) -> None:
    runner = toy()
    with pytest.raises(InputError, match=r"and it was deleted\. Give it with --reference"):
        check(
            None,
            runner,
            runner,
            runner,
            evaluation(),
            Gate(**{limit: 1.0}),
            reference_absent="it was deleted",
        )
    assert runner.calls == 0


# The gate


@pytest.fixture(scope="module")
def lossy() -> AccuracyReport:
    return run(toy(), toy(0.3), toy(0.31), toy(0.3))


def verdict(report: AccuracyReport, gate: Gate) -> tuple[bool, list[Criterion]]:
    result = apply_gate(gate, report.export_reference, report.export_deployed, report.method, report.total)
    return result.passed, list(result.criteria)


@pytest.mark.parametrize(
    "limit, figure, upper",
    [
        ("max_perplexity_ratio", lambda c: c.perplexity_ratio.value, True),
        ("max_kl", lambda c: c.divergence.mean.value, True),
        ("min_top1", lambda c: c.top1_agreement.value, False),
    ],
)
def test_each_limit_is_held_against_its_figure(
    lossy: AccuracyReport, limit: str, figure: object, upper: bool
) -> None:
    assert lossy.total is not None and callable(figure)
    value = float(figure(lossy.total.comparison))
    assert 0 < value < 3
    step = 1e-9 if upper else -1e-9
    for threshold, expected in ((value, True), (value + step, True), (value - step, False)):
        passed, criteria = verdict(lossy, Gate(**{limit: threshold}))
        assert passed is expected
        (criterion,) = [c for c in criteria if c.name == limit]
        assert (criterion.value, criterion.threshold, criterion.passed) == (value, threshold, expected)
        assert f"{value:.4g}" in criterion.sentence


def test_the_gate_is_monotone(lossy: AccuracyReport) -> None:
    seen: dict[str, list[bool]] = {}
    for step in range(41):
        share = step / 40
        for name, gate in (
            ("ratio", Gate(max_perplexity_ratio=0.5 + 2 * share)),
            ("kl", Gate(max_kl=share)),
            ("top1", Gate(min_top1=1 - share)),
            ("nmse", Gate(max_export_nmse=share)),
        ):
            seen.setdefault(name, []).append(verdict(lossy, gate)[0])
    for name in ("ratio", "kl", "top1"):
        assert seen[name] == sorted(seen[name]) and not seen[name][0] and seen[name][-1]
    assert all(seen["nmse"])  # the export of this report is exact


def test_the_export_limit_is_always_on(lossy: AccuracyReport) -> None:
    for gate in (Gate(), Gate(max_kl=5.0)):
        names = [criterion.name for criterion in verdict(lossy, gate)[1]]
        assert names[:2] == ["nonfinite_logits", "max_export_nmse"]
    assert Gate().max_export_nmse == 1e-4


class Broken(ToyRunner):
    """Gives a NaN at one position."""

    def logits(self, tokens: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
        for number, piece in enumerate(super().logits(tokens, chunk)):
            if number == 0:
                piece[0, 0, 0] = math.nan
            yield piece


@pytest.mark.parametrize("role", range(4))
def test_a_nan_in_any_model_fails_the_gate(role: int) -> None:
    embedding, output = toy_weights()
    models: list[ToyRunner] = [toy() for _ in range(4)]
    models[role] = Broken(embedding, output.dequantize())
    report = check(*models, evaluation(), Gate())
    failed = [criterion for criterion in report.gate.criteria if not criterion.passed]
    assert [criterion.name for criterion in failed] == ["nonfinite_logits"]
    assert failed[0].value == 4  # one in each of four batches
    assert report.export_reference.comparison.nmse == 0  # counted, not spread


def test_what_could_not_be_measured_fails() -> None:
    report = run(toy(), toy(), toy(), toy())
    nothing = replace(report.export_reference.comparison, nmse=math.nan)
    result = apply_gate(
        Gate(), replace(report.export_reference, comparison=nothing), report.export_deployed, None, None
    )
    assert not result.passed


@pytest.mark.parametrize(
    "limits",
    [
        {"max_kl": -1.0},
        {"max_kl": math.nan},
        {"max_export_nmse": -1e-9},
        {"min_top1": 1.1},
        {"min_top1": math.nan},
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        Gate(**limits)


# Greedy text


class Script(ToyRunner):
    """Continues every prompt with given tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(*(toy_weights()[0], toy_weights()[1].dequantize()))
        self.tokens = tuple(tokens)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        return self.tokens[:new_tokens]


def test_greedy_texts_are_compared_up_to_their_end() -> None:
    evaluated = replace(evaluation(new_tokens=6), end_tokens=frozenset({9}))
    report = check(
        Script([1, 2, 3, 4, 5, 6]),
        Script([1, 2, 3, 9, 5, 6]),
        Script([1, 2, 9, 8, 8, 8]),
        Script([1, 2, 3, 9, 7, 7]),
        evaluated,
        Gate(),
    )
    assert report.method is not None and report.total is not None
    matches = [
        loss.greedy[0]
        for loss in (report.method, report.export_reference, report.export_deployed, report.total)
    ]
    assert [(m.common_prefix, m.length, m.equal) for m in matches] == [
        (3, 6, False),
        (4, 4, True),  # what follows the end does not count
        (2, 4, False),
        (2, 6, False),
    ]
    assert report.continuations[0] == Continuation("3 1", "1 2 3 4 5 6", "1 2 3 9", "1 2 3 9", "1 2 9")


# Input that does not fit


def test_text_that_a_model_cannot_read_is_refused_before_anything_runs() -> None:
    runner = toy()
    short = ToyRunner(runner.embedding, runner.output, "short", context=25)
    with pytest.raises(InputError, match=r"window 5 takes 30 tokens, but short reads at most 25"):
        check(runner, runner, short, runner, evaluation(), Gate())
    with pytest.raises(InputError, match=r"prompt 1 takes 26 tokens"):
        check(runner, runner, short, runner, evaluation((20,), new_tokens=23), Gate())
    strange = replace(evaluation(), prompts=((1, VOCABULARY),))
    with pytest.raises(InputError, match=r"prompt 0 holds the token id 40, .* ids 0 to 39"):
        check(runner, runner, runner, runner, strange, Gate())
    narrow = ToyRunner(runner.embedding, runner.output[:, :-1], "narrow")
    with pytest.raises(InputError, match="narrow has 39 logits, toy has 40"):
        check(runner, runner, narrow, runner, evaluation(), Gate())
    assert runner.calls == short.calls == 0


def test_an_evaluation_without_anything_to_predict_is_refused() -> None:
    with pytest.raises(InputError, match="no window of two tokens"):
        evaluation((1, 1))
    with pytest.raises(InputError, match="A prompt has no tokens"):
        replace(evaluation(), prompts=((),))


def test_progress_counts_to_its_end() -> None:
    seen: list[tuple[int, int, str]] = []
    runner = toy()
    check(runner, toy(), toy(), toy(), evaluation(), Gate(), progress=lambda *step: seen.append(step))
    total = seen[0][1]
    assert [done for done, _, _ in seen] == list(range(1, total + 1))
    assert {whole for _, whole, _ in seen} == {total} and all(label for _, _, label in seen)


def test_one_model_is_open_at_a_time() -> None:
    now: list[str] = []
    most = 0

    class Counted(ToyRunner):
        def __del__(self) -> None:
            now.remove(self.name)

    def opening(name: str, damage: float) -> Callable[[], Runner]:
        def open_it() -> Runner:
            nonlocal most
            made = toy(damage)
            now.append(name)
            most = max(most, len(now))
            return Counted(made.embedding, made.output, name)

        return open_it

    openings = [opening(name, damage) for name, damage in (("a", 0.0), ("b", 0.3), ("c", 0.4), ("d", 0.5))]
    report = check(*openings, evaluation(), Gate())
    assert most == 1 and not now
    assert report == run(toy(name="a"), toy(0.3, "b"), toy(0.4, "c"), toy(0.5, "d"))


def test_no_room_for_logits_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no device that is always full here")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: full.open("r+b", buffering=0))
    with pytest.raises(InputError, match=r"The logits of 108 positions cannot be kept in .*take 0 MB"):
        check(toy(), toy(), toy(), toy(), evaluation(), Gate(), scratch=tmp_path)
