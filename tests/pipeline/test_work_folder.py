"""Laws of the work folder: it saves time and decides nothing; damaged in any way, it gives what a sound one gives."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import tiny
from damage import DAMAGES, Damage
from places import Place, few_schemes
from texts import write_lines

from compot_deploy.core import code_version
from compot_deploy.core.matrix import Matrix
from compot_deploy.core.work_files import is_sound
from compot_deploy.errors import InputError
from compot_deploy.exporters.artifact import digest
from compot_deploy.models.source import open_source
from compot_deploy.pipeline import workspace
from compot_deploy.pipeline.compress import compress
from compot_deploy.pipeline.deploy import deploy, plan_only
from compot_deploy.pipeline.texts import evaluation_of
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe

COMMON: Final[dict[str, Any]] = {"samples": 4, "length": 32, "evaluation_tokens": 64}
RECIPES: Final[dict[str, dict[str, Any]]] = {
    "predicted": {"bits": 2.6, "search": "predicted"},
    "factorized": {"method": "compot", "allocation": "uniform", "rounds": 2},
    "classifier": {"method": "plain", "quant": "int8"},
}


@dataclass(frozen=True)
class Run:
    """A recipe, its finished work folder, and what came of it."""

    recipe: Recipe
    work: Path
    result: str

    def kinds(self) -> dict[str, Path]:
        """A file of each kind."""
        files = sorted(self.work.iterdir(), reverse=True)
        return {f"{path.name.partition('-')[0]}{path.suffix}": path for path in files}


def result_of(recipe: Recipe, work: Path) -> str:
    """Everything that a work folder gives, as one hash."""
    work.mkdir(parents=True, exist_ok=True)
    source = open_source(str(recipe.model))
    made = compress(resolve(recipe, source), work)

    def numbers(matrices: Mapping[str, Matrix] | None) -> dict[str, str]:
        return {name: digest(matrix) for name, matrix in (matrices or {}).items()}

    told = {
        "matrices": numbers(made.model.matrices),
        "unquantized": numbers(made.unquantized),
        "linears": [asdict(record) for record in made.linears],
        "notes": made.notes,
        "sensitivities": dict(made.sensitivities),
        "importance": {name: values.tolist() for name, values in made.importance.items()},
        "plan": str(made.plan),
        "frontier": str(made.frontier),
        "calibration": (made.calibration.digest, made.calibration.source, made.calibration.notes),
        "evaluation": evaluation_of(recipe, source, work).text.digest,
    }
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    root = tmp_path_factory.mktemp("models")
    place = Place(root)
    write_lines(place.text)
    decoder = str(tiny.save(root / "decoder", num_hidden_layers=1))
    of = {
        "predicted": {"model": decoder},  # calibrated on text that it writes itself
        "factorized": {"model": decoder, "calibration": str(place.text)},
        "classifier": {"model": str(place.model("bert classes")), "calibration": str(place.text)},
    }
    return {name: Recipe(**of[name], **COMMON, **options) for name, options in RECIPES.items()}


SLOW: Final = {
    "factorized": [],
    "predicted": [pytest.mark.slow],
    "classifier": [pytest.mark.nightly, pytest.mark.slow],
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW[name]) for name in RECIPES])
def run(
    request: pytest.FixtureRequest, models: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A finished run, and beside its work folder that of the same recipe with another seed."""
    root, recipe = tmp_path_factory.mktemp("runs"), models[request.param]
    with few_schemes():
        result = result_of(recipe, root / "one")
        assert result_of(Recipe(**{**vars(recipe), "seed": 1, "samples": 3}), root / "two") != result
    return Run(recipe, root / "one", result)


def test_every_file_of_a_work_folder_is_checked(run: Run) -> None:
    assert all(is_sound(path) for path in run.work.iterdir())


def test_a_damaged_work_folder_gives_what_an_undamaged_one_gives(run: Run) -> None:
    """Every kind of file is damaged once, each in another way; then all of them."""
    damages = itertools.cycle(DAMAGES)
    with few_schemes():
        for kind, path in run.kinds().items():
            name = next(damages)
            DAMAGES[name](Damage(path))
            assert not is_sound(path), (kind, name)
            assert result_of(run.recipe, run.work) == run.result, (kind, name)
        for path in sorted(run.work.iterdir()):
            DAMAGES["cut off"](Damage(path))
        assert result_of(run.recipe, run.work) == run.result


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_every_kind_of_damage_to_every_kind_of_file(run: Run, name: str) -> None:
    with few_schemes():
        for kind, path in run.kinds().items():
            DAMAGES[name](Damage(path))
            assert result_of(run.recipe, run.work) == run.result, kind


@pytest.mark.slow
def test_what_was_measured_for_another_budget_does_not_change_a_plan(
    models: dict[str, Recipe], tmp_path: Path
) -> None:
    recipe = models["predicted"]
    with few_schemes():
        results = []
        for folder, before in (("one", ()), ("two", (3.9, 2.2))):
            for bits in before:
                result_of(Recipe(**{**vars(recipe), "bits": bits}), tmp_path / folder)
            results.append(result_of(recipe, tmp_path / folder))
        assert sorted(path.name.partition("-")[0] for path in (tmp_path / "two").iterdir()).count("errors")
    assert results[0] == results[1]


def test_another_tokenizer_or_other_code_is_other_work(
    models: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(str(models["predicted"].model), folder)
    recipe = Recipe(**{**vars(models["predicted"]), "model": str(folder)})

    def name() -> str:
        return workspace.work_folder(recipe, open_source(folder)).name

    first = name()
    assert name() == first
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    second = name()
    monkeypatch.setattr(workspace, "code_version", lambda: "another")
    assert len({first, second, name()}) == 3


def test_the_version_of_the_code_covers_whatever_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for name, _ in code_version.sources()}
    for one in (
        "quant/gptq.py",
        "planning/measure.py",
        "exporters/onnx/storage.py",
        "embedded/text/train.txt.xz",
    ):
        assert one in names
    assert not [name for name in names if name.startswith(("cli/", "report/", "serving/"))]
    code_version.code_version.cache_clear()
    before = code_version.code_version()
    read = Path.read_bytes
    changed = next(path for name, path in code_version.sources() if name == "quant/gptq.py")
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path == changed))
    code_version.code_version.cache_clear()
    assert code_version.code_version() != before
    code_version.code_version.cache_clear()


def test_two_runs_of_one_output_refuse_each_other(models: dict[str, Recipe], tmp_path: Path) -> None:
    recipe = Recipe(**{**vars(models["predicted"]), "out": str(tmp_path / "out")})
    with workspace.reserved(recipe):
        for other in (
            {},
            {"bits": 3.0},
            {"format": ("onnx", "huggingface")},
            {"out": str(tmp_path / "out" / "onnx")},
        ):
            with pytest.raises(InputError, match="Another run writes"):
                deploy(**{**vars(recipe), **other})
        with pytest.raises(InputError, match="Another run writes"):
            plan_only(recipe)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_nothing_else(
    models: dict[str, Recipe], tmp_path: Path
) -> None:
    recipe = Recipe(**{**vars(models["predicted"]), "out": str(tmp_path / "out")})
    dead = [".out.staging-0123abcd", ".out.replaced-0123abcd", ".out.zip.staging-0123abcd"]
    others = [
        ".out.staging-mine",
        ".other.staging-0123abcd",
        "out.staging-0123abcd",
        ".out.work-0123456789ab",
    ]
    (tmp_path / "out").mkdir()
    for name in (*dead, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.staging-ffffffff").symlink_to(tmp_path / "elsewhere")
    with workspace.reserved(recipe):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", ".out.lock", "elsewhere", ".out.staging-ffffffff", *others}


def test_a_folder_that_a_killed_run_moved_aside_is_put_back(
    models: dict[str, Recipe], tmp_path: Path
) -> None:
    recipe = Recipe(**{**vars(models["predicted"]), "out": str(tmp_path / "out")})
    (tmp_path / ".out.replaced-0123abcd").mkdir()
    (tmp_path / ".out.replaced-0123abcd" / "precious").write_text("x")
    with workspace.reserved(recipe):
        assert (tmp_path / "out" / "precious").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
