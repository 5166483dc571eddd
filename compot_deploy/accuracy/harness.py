"""Accuracy on tasks, as users judge: questions and answers through lm-eval, which asks our runners.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) knows the tasks, their prompts and their metrics; a runner
gives log-likelihoods and greedy text, see `compot_deploy.accuracy.harness_model`. The exported file is asked the same
questions as the original, and what counts is how much of the original's score it keeps.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compot_deploy.accuracy.gate import Criterion, criterion
from compot_deploy.accuracy.metrics import Estimate
from compot_deploy.errors import CompotDeployError, InputError, MissingDependencyError, first_line

_YAML: Final = (".yaml", ".yml")
_LOCAL_DATA: Final = ("json", "csv", "parquet", "text", "arrow")
"""Builders of data sets that read files."""

_PREFERRED: Final = ("acc_norm", "acc", "exact_match")
"""Metrics that stand for a task, the first that it has; otherwise the first of its own."""

RESAMPLES: Final = 1000
"""Draws for the standard error of metrics that have none in closed form."""

_SEED: Final = 1234
"""Of examples that stand before a question; lm-eval's own."""

_MOST_TOLD: Final = 3


@dataclass(frozen=True)
class TaskScore:
    """What one model scores in a task.

    Attributes:
        task: its name, of a group of tasks that of the group.
        metric: what is scored, with the filter of answers where there is one: ``acc_norm``.
        higher_is_better: whether more is better.
        score: mean and standard error.
        samples: questions.
        each: score of every question in their order; empty for a group, and where it is no number.
    """

    task: str
    metric: str
    higher_is_better: bool
    score: Estimate
    samples: int
    each: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskFigures:
    """What the exported file scores in a task, beside the original.

    Attributes:
        task: its name.
        metric: what is scored.
        samples: questions, or pairs.
        exported: of the file as deployed.
        original: of the original; None where it was not there.
        recovery: share of the original's score that the file keeps; what the error rate of both allows above 1 is
            chance. Its standard error is that of the ratio, question by question where that is known.
    """

    task: str
    metric: str
    samples: int
    exported: Estimate
    original: Estimate | None = None
    recovery: Estimate | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found, before anything is asked.

    Attributes:
        names: as they were asked for, without folders.
        loaded: lm-eval's own tasks and groups of tasks, as its `TaskManager.load` gives them.
        samples: most questions of each; None for all.
    """

    names: tuple[str, ...]
    loaded: Mapping[str, dict[str, Any]]
    samples: int | None = None


def find_tasks(given: Sequence[str], samples: int | None = None) -> Tasks:
    """Load tasks with their questions, by name or from files.

    Args:
        given: names that lm-eval knows, or YAML files of tasks, or folders of such; files that a task names are looked
            for beside it. A task file may name functions of Python files, which run.
        samples: most questions of each task.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        InputError: no such task, or its questions cannot be had here.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    files = [path for place in given for path in _files_of(place)]
    names = [place for place in given if not Path(place).exists()]
    with _quiet():
        manager = TaskManager(
            include_path=sorted({str(path.parent) for path in files}) or None, include_defaults=bool(names)
        )
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        near = [known for known in manager.all_tasks if unknown.lower() in known.lower()][:_MOST_TOLD]
        hint = f"; is it {' or '.join(near)}" if near else ""
        raise InputError(
            f"--tasks {unknown}: lm-eval has no task of this name, and there is no such file{hint}."
        )
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in (*names, *map(_local, files)):
        name = spec if isinstance(spec, str) else str(spec.get("task"))
        try:
            with _quiet():
                one = manager.load([spec])
        except Exception as error:  # of lm-eval, of datasets, of the hub, of a task's own code
            raise InputError(
                f"--tasks {Path(name).name}: its questions cannot be had here ({first_line(error)})."
            ) from None
        for kind, entries in loaded.items():
            entries.update(one[kind])
    for task in loaded["tasks"].values():  # as lm-eval's own command does
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return Tasks((*names, *(path.stem for path in files)), loaded, samples)


def require_harness() -> None:
    """Say how lm-eval is installed where it is not.

    Raises:
        MissingDependencyError: it is not.
    """
    try:
        import lm_eval.evaluator
    except ImportError:
        raise MissingDependencyError("lm-eval", "eval", "Measuring accuracy on tasks") from None
    assert lm_eval.evaluator


def score_tasks(runner: Any, tokenizer: Any, tasks: Tasks) -> tuple[TaskScore, ...]:
    """Ask a model the questions of all tasks.

    Args:
        runner: see `compot_deploy.accuracy.runner.Runner`.
        tokenizer: of transformers.
        tasks: from `find_tasks`.

    Raises:
        InputError: a task asks for what a runner does not do.
    """
    from lm_eval.evaluator import evaluate

    from compot_deploy.accuracy.harness_model import RunnerModel

    try:
        with _quiet():
            results: Any = evaluate(
                RunnerModel(runner, tokenizer),
                tasks.loaded,
                limit=tasks.samples,
                bootstrap_iters=RESAMPLES,
                log_samples=True,
            )
    except CompotDeployError:
        raise
    except Exception as error:
        raise InputError(
            f"--tasks {', '.join(tasks.names)}: lm-eval gives up ({first_line(error)})."
        ) from error
    grouped = {name for names in results.get("group_subtasks", {}).values() for name in names}
    scores = []
    for name, values in results["results"].items():
        if name not in grouped and (score := _score(name, values, results)) is not None:
            scores.append(score)
    return tuple(scores)


def figures_of(
    exported: Sequence[TaskScore], original: Sequence[TaskScore] | None
) -> tuple[TaskFigures, ...]:
    """The scores of a file beside those of its original."""
    beside = {(score.task, score.metric): score for score in original or ()}
    found = []
    for score in exported:
        other = beside.get((score.task, score.metric))
        found.append(
            TaskFigures(
                score.task,
                score.metric,
                score.samples,
                score.score,
                None if other is None else other.score,
                None if other is None else recovery(score, other),
            )
        )
    return tuple(found)


def recovery(exported: TaskScore, original: TaskScore) -> Estimate:
    """The share of the original's score that is kept; where less is better, how much less the original has.

    The standard error is that of a ratio of means to first order, of the same questions where both are known:
    questions that both answer right or wrong together tell nothing of the difference.
    """
    above, below = (exported, original) if exported.higher_is_better else (original, exported)
    if not math.isfinite(above.score.value) or not math.isfinite(below.score.value) or below.score.value == 0:
        return Estimate(math.nan, math.nan)
    ratio = above.score.value / below.score.value
    count = len(above.each)
    if count > 1 and count == len(below.each):
        spread = math.fsum(
            (one - ratio * other) ** 2 for one, other in zip(above.each, below.each, strict=True)
        )
        return Estimate(ratio, math.sqrt(spread / count / (count - 1)) / abs(below.score.value))
    errors = math.hypot(above.score.standard_error, ratio * below.score.standard_error)
    return Estimate(ratio, errors / abs(below.score.value))


def recovery_criteria(figures: Sequence[TaskFigures], limit: float | None) -> Iterator[Criterion]:
    """Each task against the limit; a recovery that is not known fails."""
    if limit is None:
        return
    for one in figures:
        value = math.nan if one.recovery is None else one.recovery.value
        error = "" if one.recovery is None else f" (standard error {one.recovery.standard_error:.2g})"
        what = f"share of the original's score in {one.task}, {one.metric}{error}"
        yield criterion(f"min_recovery {one.task}", value, limit, "at least", what)


def _score(name: str, values: Mapping[str, Any], results: Mapping[str, Any]) -> TaskScore | None:
    """The score of a task or group; None where it has none of its own."""
    metrics = [
        key for key in values if "," in key and "_stderr," not in key and isinstance(values[key], int | float)
    ]
    if not metrics:
        return None
    names = [key.partition(",")[0] for key in metrics]
    wanted = next((metric for metric in _PREFERRED if metric in names), names[0])
    key = metrics[names.index(wanted)]
    kind = key.partition(",")[2]
    error = values.get(f"{wanted}_stderr,{kind}")
    better = results.get("higher_is_better", {}).get(name, {}).get(wanted)
    docs = results.get("samples", {}).get(name, [])
    each = [
        doc.get(wanted)
        for doc in sorted(docs, key=lambda doc: doc["doc_id"])
        if doc.get("filter", kind) == kind
    ]
    numbers = all(isinstance(one, int | float) for one in each)
    return TaskScore(
        task=name,
        metric=wanted if kind == "none" else f"{wanted}, {kind}",
        higher_is_better=better is not False,
        score=Estimate(float(values[key]), float(error) if isinstance(error, int | float) else math.nan),
        samples=len(each) or int(values.get("sample_len", 0)),
        each=tuple(map(float, each)) if numbers else (),
    )


def _files_of(place: str) -> list[Path]:
    """The task files that a place names; none for the name of a task.

    Raises:
        InputError: a folder or file without a task.
    """
    path = Path(place)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in _YAML and "task" in _read(file))
        if not found:
            raise InputError(f"--tasks {place}: the folder holds no YAML file of a task.")
        return found
    if path.suffix in _YAML and not path.exists():
        raise InputError(f"--tasks {place}: there is no such file.")
    if path.is_file() and "task" not in _read(path):
        raise InputError(f"--tasks {place}: this is no task of lm-eval: a YAML file with the key task.")
    return [path] if path.is_file() else []


def _read(path: Path) -> Mapping[str, Any]:
    """What a task file says, functions by their names alone; nothing of what is no mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes a function for its name."""

    Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"--tasks {path}: it cannot be read: {first_line(error)}.") from None
    return value if isinstance(value, dict) else {}


def _local(path: Path) -> str | dict[str, Any]:
    """A task as lm-eval takes it: its configuration where that names files beside it, otherwise its path."""
    config = dict(_read(path))
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    plain = "include" not in config and "!function" not in path.read_text(encoding="utf-8")
    if not plain or config.get("dataset_path") not in _LOCAL_DATA or files is None:
        return str(path)
    beside = path.resolve().parent

    def placed(name: Any) -> Any:
        if isinstance(name, dict):
            return {key: placed(entry) for key, entry in name.items()}
        if isinstance(name, list):
            return [placed(entry) for entry in name]
        return str(beside / name) if isinstance(name, str) and (beside / name).exists() else name

    config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": placed(files)}
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What lm-eval has to say goes nowhere: bars, and advice about options that are not ours."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
