"""Laws of tasks: lm-eval asks our runners what it asks transformers, and a file keeps what its weights keep."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from compot_deploy import check, deploy
from compot_deploy.accuracy.gate import Gate
from compot_deploy.accuracy.harness import (
    TaskFigures,
    TaskScore,
    figures_of,
    find_tasks,
    recovery,
    recovery_criteria,
    score_tasks,
)
from compot_deploy.accuracy.metrics import Estimate
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.errors import InputError, MissingDependencyError, RecipeError
from compot_deploy.models.tasks import EMBEDDING
from compot_deploy.models.tokens import open_tokenizer
from compot_deploy.pipeline.task_accuracy import questions_of
from compot_deploy.recipe import Recipe
from compot_deploy.report.junit import to_junit

OWN = Path(__file__).parent / "tasks"


def score(each: list[float], **changes: Any) -> TaskScore:
    mean = sum(each) / len(each)
    error = math.sqrt(sum((one - mean) ** 2 for one in each) / (len(each) - 1) / len(each))
    values: dict[str, Any] = {"task": "t", "metric": "acc", "higher_is_better": True, "samples": len(each)}
    return TaskScore(**values | {"score": Estimate(mean, error), "each": tuple(each)} | changes)


def test_recovery_is_the_share_that_is_kept_and_its_error_that_of_the_pairs() -> None:
    before, after = score([1.0, 1.0, 1.0, 0.0]), score([1.0, 1.0, 0.0, 0.0])
    found = recovery(after, before)
    assert found.value == pytest.approx(2 / 3)
    # By hand: residuals after - before * 2/3 are 1/3, 1/3, -2/3, 0; their mean square over n - 1, over the mean 3/4.
    assert found.standard_error == pytest.approx(math.sqrt((6 / 9) / 3 / 4) / 0.75)
    assert recovery(before, before) == Estimate(1.0, 0.0), "the same answers: no chance in it"
    worse, better = (score(each, higher_is_better=False) for each in ([4.0, 4.0], [2.0, 2.0]))
    assert recovery(worse, better).value == 0.5, "where less is better"
    alone = recovery(replace(score([1.0, 0.0]), each=()), replace(score([1.0, 1.0]), each=()))
    assert alone == Estimate(0.5, pytest.approx(0.5)), "the errors of both where questions are not known"
    assert math.isnan(recovery(after, score([0.0, 0.0])).value)


def test_a_recovery_below_the_limit_or_unknown_fails() -> None:
    known = TaskFigures("t", "acc", 9, Estimate(0.4, 0.1), Estimate(0.5, 0.1), Estimate(0.8, 0.05))
    unknown = TaskFigures("u", "acc", 9, Estimate(0.4, 0.1))
    verdicts = {
        limit: [one.passed for one in recovery_criteria((known, unknown), limit)]
        for limit in (0.7, 0.9, None)
    }
    assert verdicts == {0.7: [True, False], 0.9: [False, False], None: []}
    (first, _) = recovery_criteria((known, unknown), 0.9)
    assert first.name == "min_recovery t" and "standard error 0.05" in first.sentence


def test_options_that_cannot_be_are_refused_before_work() -> None:
    for options in ({"min_recovery": 0.9}, {"task_samples": 3}, {"tasks": ("a",), "min_recovery": -0.1}):
        with pytest.raises(RecipeError, match=r"task|min-recovery"):
            Recipe(**options)
    with pytest.raises(RecipeError, match="min_recovery"):
        Gate(min_recovery=math.inf)
    with pytest.raises(RecipeError, match="give --tasks"):
        check("nowhere", limits={"min_recovery": 0.9})
    with pytest.raises(RecipeError, match="writes no text"):
        questions_of(("hellaswag",), None, EMBEDDING)
    assert questions_of((), None, EMBEDDING) is None


def test_without_the_extra_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[eval\]"):
        find_tasks(["hellaswag"])


@pytest.fixture
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason="the extra eval is not installed")


def test_what_is_no_task_is_one_sentence(lm_eval: Any, tmp_path: Path) -> None:
    (tmp_path / "no.yaml").write_text("a: [")
    (tmp_path / "other.yaml").write_text("a: 1")
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: nothing.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
    )
    for given in ("no.yaml", "other.yaml", "lost.yaml", "nothing.yaml"):
        with pytest.raises(InputError, match=rf"{given}|{Path(given).stem}"):
            find_tasks([str(tmp_path / given)])


@pytest.mark.slow
def test_the_harness_is_asked_and_answers_as_with_transformers(lm_eval: Any, tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    folder = tiny.save(tmp_path / "tiny", num_hidden_layers=1, max_position_embeddings=64)
    tasks = find_tasks([str(OWN)])
    found = {one.task: one for one in score_tasks(
        TorchRunner(tiny.model("llama", num_hidden_layers=1, max_position_embeddings=64)), open_tokenizer(folder), tasks
    )}  # fmt: skip
    theirs = evaluate(
        HFLM(pretrained=str(folder), device="cpu", dtype="float32"),
        find_tasks([str(OWN)]).loaded,
        bootstrap_iters=0,
    )
    assert set(found) == {"own_choice", "own_text", "own_writing"}
    for name, one in found.items():
        value = theirs["results"][name][f"{one.metric},none"]
        assert one.score.value == pytest.approx(value, rel=1e-5), name
    assert found["own_text"].score.value > 1 and not found["own_text"].higher_is_better


def test_a_runner_tells_of_each_answer_what_the_logits_say(lm_eval: Any, tmp_path: Path) -> None:
    from compot_deploy.accuracy.harness_model import RunnerModel

    model = tiny.model("llama", num_hidden_layers=1, max_position_embeddings=32)
    tiny.tokenizer_files(tmp_path)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    ours = RunnerModel(TorchRunner(model), open_tokenizer(tmp_path))
    ids = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = [
        (ids[:5], ids[5:9]),
        (ids[:5], ids[5:8]),
        (ids[:5], [7, *ids[6:9]]),
        (ids[:38], ids[38:]),
        ([1], [4] * 40),
    ]
    answers = ours._loglikelihood_tokens([(None, *one) for one in asked])
    for (context, answer), (value, greedy) in zip(asked, answers, strict=True):
        whole = (context + answer)[-33:]
        wanted = whole[1:][-len(answer) :]
        with torch.no_grad():
            logs = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)[-len(wanted) :]
        by_hand = sum(float(row[token]) for row, token in zip(logs, wanted, strict=True))
        assert value == pytest.approx(by_hand, rel=1e-6)
        assert greedy == all(int(row.argmax()) == token for row, token in zip(logs, wanted, strict=True))
    prompt = torch.tensor([ours.tok_encode("the fox")])
    greedy_text = ours._text(TorchRunner(model).generate(prompt[0].tolist(), 12))
    assert ours._written("the fox", {"max_gen_toks": 12}) == greedy_text.partition("</s>")[0]
    stop = greedy_text[3:5]
    assert (
        ours._written("the fox", {"max_gen_toks": 12, "until": [stop]})
        == greedy_text[: greedy_text.find(stop)]
    )
    with pytest.raises(InputError, match="at random"):
        ours._written("the fox", {"do_sample": True})


@pytest.mark.slow
@pytest.mark.nightly
def test_unquantized_files_score_what_the_original_does(lm_eval: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    model = tiny.save(tmp_path / "tiny", num_hidden_layers=1)
    (tmp_path / "questions").mkdir()
    for name in ("text.yaml", "texts.jsonl"):
        shutil.copyfile(OWN / name, tmp_path / "questions" / name)
    made = deploy(
        str(model),
        method="plain",
        quant="none",
        embeddings="none",
        head="none",
        format=("onnx", "gguf", "huggingface"),
        samples=2,
        length=32,
        evaluation_tokens=256,
        tasks=(str(tmp_path / "questions"),),
        min_recovery=0.99,
        out=str(tmp_path / "out"),
    )
    assert len(made) == 3
    for one in made:
        assert one.passed, one.report.accuracy.gate
        for figures in one.report.tasks:
            assert figures.original is not None
            assert figures.exported.value == pytest.approx(figures.original.value, rel=1e-3)
            assert figures.recovery is not None and figures.recovery.value == pytest.approx(1, rel=1e-3)
    again = check(
        tmp_path / "out" / "onnx",
        reference=str(model),
        tasks=[str(OWN / "text.yaml")],
        limits={"min_recovery": 1.5},
    )
    assert not again.passed and "min_recovery own_text" in to_junit(again.report)
    unasked = check(tmp_path / "out" / "onnx", reference=str(model)).report
    assert unasked.tasks == () and any(
        "--min-recovery 0.99 was not measured" in note for note in unasked.notes
    )


def test_figures_stand_beside_those_of_the_original() -> None:
    one, other = score([1.0, 0.0]), score([1.0, 1.0])
    (beside,), (alone,) = figures_of([one], [other]), figures_of([one], None)
    assert beside.original == other.score and beside.recovery is not None and alone.recovery is None
