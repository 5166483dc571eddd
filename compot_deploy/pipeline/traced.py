"""From a folder to a judged ONNX folder, for models that have no graph of ours: encoders, classifiers, GPT-2.

The same steps as `compot_deploy.pipeline.deploy`, over texts instead of windows: the model reads whole texts,
one Gram per shared input is collected, every linear of its blocks is compressed, the model is traced, and the file is
judged by how far its embeddings are from the original's. Budgets by plan are for decoders with a graph of ours.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from compot_deploy import __version__
from compot_deploy.accuracy.gate import Criterion
from compot_deploy.accuracy.onnx_losses import Losses, measure
from compot_deploy.core.diagnostics import Finding, errors
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Matrix
from compot_deploy.core.storage import Storage, matrix_bytes
from compot_deploy.core.store import write_text
from compot_deploy.embedded import HELD_OUT_TEXT, TRAINING_TEXT
from compot_deploy.errors import ArtifactError, InputError, RecipeError, UnsupportedModelError
from compot_deploy.exporters.artifact import (
    describe_matrices,
    file_record,
    library_versions,
    list_files,
    verify,
    write_manifest,
)
from compot_deploy.exporters.manifest import MANIFEST_FORMAT, Manifest
from compot_deploy.exporters.onnx.exporter import OnnxExporter
from compot_deploy.exporters.onnx.interface import interface_of
from compot_deploy.exporters.onnx.lint.folder import lint_onnx
from compot_deploy.exporters.onnx.matrices import OnnxMatrices
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.exporters.onnx.traced import export
from compot_deploy.exporters.staging import staged_folder
from compot_deploy.models.hints import ARCHITECTURES
from compot_deploy.models.tokens import read_text
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.pipeline.workspace import targets_of
from compot_deploy.planning.compress import compress_linear
from compot_deploy.planning.factorization import grams_by_input
from compot_deploy.planning.settings import size_of, spread, table_grid
from compot_deploy.progress import Progress, silent
from compot_deploy.quant import rtn
from compot_deploy.recipe import Recipe, recipe_from_mapping
from compot_deploy.report.inspection import Overview
from compot_deploy.transformers_plugin.modeling import linears_of, weight_of

REPORT: Final = "compot/traced.json"
RECIPE: Final = "compot/recipe.toml"
TEXTS: Final = "compot/traced_texts.json"
"""The lines that are judged on, so that a folder can be checked again."""

EXPORTER: Final = "onnx-traced"
"""What the manifest says wrote the folder."""

REPORT_VERSION: Final = 1

_PLACES: Final = ("out", "force", "archive")
"""Knobs of the run that say nothing about what was made."""

_BATCH: Final = 16
_SHORTEST: Final = 20
"""Characters of a line that is worth reading."""

_HELD_OUT_SHARE: Final = 0.1
_FEWEST: Final = 16
"""Texts to judge on, at least."""


@dataclass(frozen=True)
class TracedDeployment:
    """A finished folder and what is known about it.

    Attributes:
        folder: where it is.
        losses: method, export and total.
        criteria: of the gate.
        findings: of the lint.
        sizes: bytes of the folder without report and manifest (``artifact``), of its matrices (``matrices``), of
            the same ones plain int4 (``plain_int4``) and in float16 (``fp16``).
        facts: what a reader must know besides: texts, matrices that stay plain.
    """

    folder: Path
    losses: Losses
    criteria: tuple[Criterion, ...]
    findings: tuple[Finding, ...]
    sizes: Mapping[str, int]
    facts: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every criterion holds and the lint found no error."""
        return all(criterion.passed for criterion in self.criteria) and not errors(self.findings)


@dataclass(frozen=True)
class _Texts:
    """Lines to calibrate and to judge on, and where they come from."""

    calibration: list[str]
    evaluation: list[str]
    source: str


def is_traced(recipe: Recipe) -> bool:
    """Whether the model is a local folder of a kind that has no graph of ours."""
    config = Path(recipe.model or "") / "config.json"
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False  # the pipeline says what is wrong with it
    return isinstance(model_type, str) and model_type not in ARCHITECTURES and model_type != "compot"


def deploy_traced(recipe: Recipe, progress: Progress = silent) -> TracedDeployment:
    """Compress a model that is traced, export it to ONNX, judge it.

    Args:
        recipe: `model` is a local folder; `samples` and `length` are texts and tokens of each. Knobs that only
            the planned pipeline has are refused.
        progress: told how far the work is.

    Raises:
        RecipeError: a knob that does not apply here.
        InputError: a folder that transformers does not load, or too little text.
        UnsupportedModelError, MissingDependencyError: see `compot_deploy.exporters.onnx.traced.export`.
    """
    recipe = recipe.counting_atoms()
    _check(recipe)
    source = Path(recipe.model or "")
    model, tokenizer = _load(source)
    texts = _texts(recipe)
    batches, judged = (
        _batches(tokenizer, part, recipe.length) for part in (texts.calibration, texts.evaluation)
    )
    exporter = OnnxExporter()
    options = exporter.options(asdict(recipe))
    storage = exporter.storage(options)
    matrices, reasons = _compress(model, batches, recipe, storage, progress)
    target = targets_of(recipe)["onnx"]
    with staged_folder(target, recipe.force) as folder:
        progress(0, 2, "Trace")
        written = export(model, folder, matrices, options, source)
        progress(1, 2, "Judge")
        losses = measure(model, folder, judged, written)
        progress(2, 2, "Judge")
        unused = sorted(set(matrices) - set(written))
        facts = (
            f"{len(texts.calibration)} texts calibrated on, {len(texts.evaluation)} judged on: {texts.source}.",
            *(f"{name} stays plain: {reason}." for name, reason in reasons.items()),
            *(f"{name} is left out: the output does not depend on it." for name in unused),
        )
        (folder / RECIPE).parent.mkdir(exist_ok=True)
        write_text(folder / RECIPE, recipe.to_toml())
        write_text(folder / TEXTS, json.dumps(texts.evaluation, indent=0, ensure_ascii=False))
        deployment = TracedDeployment(
            folder=target,
            losses=losses,
            criteria=_judge(losses, recipe),
            findings=lint_onnx(folder),
            sizes=_sizes(folder, written, storage),
            facts=facts,
        )
        write_text(folder / REPORT, to_json(deployment))
        manifest = Manifest(
            format=MANIFEST_FORMAT,
            exporter=EXPORTER,
            package=__version__,
            model_type=str(model.config.model_type),
            tied=False,
            recipe={name: value for name, value in asdict(recipe).items() if name not in _PLACES},
            calibration=hashlib.sha256("\n".join(texts.calibration).encode()).hexdigest(),
            seed=recipe.seed,
            facts={"source": _fingerprint(source), "notes": list(facts)},
            versions=library_versions(),
            matrices=describe_matrices(written, storage, reasons),
            files=(),
        )
        write_manifest(folder, manifest)
    return deployment


def is_traced_folder(folder: Path) -> bool:
    """Whether a folder is one that `deploy_traced` wrote."""
    return (folder / REPORT).is_file()


def check_traced(
    folder: Path,
    *,
    reference: str | None = None,
    limits: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> TracedDeployment:
    """Check a folder of `deploy_traced` again: every file, the graph, and all losses on the same texts.

    Args:
        folder: to check; nothing in it is changed.
        reference: folder of the original model, where it is no longer where the recipe says.
        limits: ``min_cosine`` and ``max_export_nmse``, in place of those of the recipe.
        progress: told how far the work is.

    Raises:
        ArtifactError: a file does not match the manifest, or the manifest is not of such a folder.
        InputError: the original model is not there, or it is another one: the graph holds no torch modules, so
            no loss can be measured without it.
    """
    manifest = verify(folder)
    if manifest.exporter != EXPORTER:
        raise ArtifactError(
            f"{folder} has a {REPORT}, and its manifest says that {manifest.exporter!r} wrote it: export the "
            "model again."
        )
    recipe = recipe_from_mapping({**manifest.recipe, **(limits or {})}, origin=f"{folder}'s manifest")
    source = Path(reference or recipe.model or "")
    where = "--reference" if reference is not None else "where the recipe says"
    if not (source / "config.json").is_file():
        raise InputError(
            f"The files of {folder} are as the manifest says, and its losses cannot be measured without the "
            f"original model, which is not there ({where}: {source}). Give its folder with --reference."
        )
    if _fingerprint(source) != manifest.facts.get("source"):
        raise InputError(
            f"{source} ({where}) is not the model that {folder} was made from: its weights have another sha256. "
            "Give the right one with --reference."
        )
    model, tokenizer = _load(source)
    lines = _read_texts(folder / TEXTS)
    batches = _batches(tokenizer, lines, recipe.length)
    matrices = OnnxMatrices(folder / GRAPH)
    progress(0, 1, "Judge")
    losses = measure(model, folder, batches, matrices)
    progress(1, 1, "Judge")
    exporter = OnnxExporter()
    return TracedDeployment(
        folder=folder,
        losses=losses,
        criteria=_judge(losses, recipe),
        findings=lint_onnx(folder),
        sizes=_sizes(folder, matrices, exporter.storage(exporter.options(asdict(recipe)))),
        facts=tuple(str(note) for note in manifest.facts.get("notes", ())),
    )


def to_json(deployment: TracedDeployment) -> str:
    """What ``compot/traced.json`` holds."""
    return json.dumps(
        {
            "report_version": REPORT_VERSION,
            "passed": deployment.passed,
            "losses": asdict(deployment.losses),
            "criteria": [asdict(criterion) for criterion in deployment.criteria],
            "findings": [asdict(finding) for finding in deployment.findings],
            "sizes": dict(deployment.sizes),
            "facts": list(deployment.facts),
        },
        indent=1,
    )


def overview(deployment: TracedDeployment) -> Overview:
    """The report for people: losses, sizes, and why it passed or failed."""
    losses, sizes = deployment.losses, deployment.sizes
    rows = [
        (
            label,
            f"{found.cosine:.5f}",
            f"{found.lowest_cosine:.5f}",
            f"{found.nmse:.2e}",
            f"{found.largest:.2e}",
        )
        for label, found in (
            ("method: compression", losses.method),
            ("export, computed exactly", losses.export_exact),
            ("export, as shipped", losses.export),
            ("total", losses.total),
        )
        if found is not None
    ]
    lines = [
        f"{sizes['artifact']:,} bytes in all; matrices {sizes['matrices']:,}, plain int4 {sizes['plain_int4']:,}, "
        f"fp16 {sizes['fp16']:,}.",
        *deployment.facts,
        *(f"{finding.severity}: {finding.where}: {finding.sentence}" for finding in deployment.findings),
        *(criterion.sentence for criterion in deployment.criteria),
        f"{deployment.folder}: {'PASSED' if deployment.passed else 'FAILED'}",
    ]
    columns = ("loss", "mean cosine", "lowest", "NMSE", "largest difference")
    return Overview("Embeddings", columns, tuple(rows), tuple(lines))


def _check(recipe: Recipe) -> None:
    """Refuse what is not possible here, before a weight is read."""
    if set(recipe.format) != {"onnx"}:
        others = ", ".join(kind for kind in recipe.format if kind != "onnx")
        raise RecipeError(
            f"--format {others}: a model without a graph of ours is traced, and that makes ONNX only. "
            "Use --format onnx."
        )
    if recipe.planned:
        raise RecipeError(
            "--bits, --size and --allocation knapsack plan decoders with a graph of ours; give --ratio for a "
            "model that is traced."
        )
    if recipe.archive:
        raise RecipeError("--archive is not there for a model that is traced: zip the folder.")
    if recipe.calibration == "self":
        raise RecipeError("--calibration self: a model that is traced gets text from a file; give one.")


def _load(source: Path) -> tuple[Any, Any]:
    import transformers

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = next(iter(config.get("architectures") or ()), "")
    kinds = {
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForTokenClassification": "AutoModelForTokenClassification",
    }
    auto = next((auto for suffix, auto in kinds.items() if name.endswith(suffix)), "AutoModel")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        model, found = getattr(transformers, auto).from_pretrained(
            source, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers' own errors share no base class
        raise InputError(
            f"{source} does not load in transformers: {str(error).strip().splitlines()[0]}"
        ) from error
    model = model.eval()
    try:
        interface_of(model)  # before any work
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"The model type {config['model_type']!r} is not supported. It has no graph of ours (those of "
            f"{', '.join(sorted(ARCHITECTURES))} have one), and {error}"
        ) from None
    # An encoder of a masked language model comes without the pooler, which nothing here reads.
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(
            f"{source} lacks {missing[0]} and {len(missing) - 1} more tensors of a {type(model).__name__}. "
            "Download the checkpoint again."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _texts(recipe: Recipe) -> _Texts:
    """Lines of a file; those that are judged on are never calibrated on."""
    judged = max(_FEWEST, recipe.evaluation_tokens // recipe.length)
    if recipe.calibration is None:
        lines = _lines(lzma.decompress(TRAINING_TEXT.read_bytes()).decode(), "the text that ships")
        held_out, source = (
            _lines(read_text(HELD_OUT_TEXT), "the text that ships"),
            "Python's documentation, ships",
        )
    else:
        lines = _lines(read_text(Path(recipe.calibration)), recipe.calibration)
        cut = round(len(lines) * (1 - _HELD_OUT_SHARE)) if recipe.evaluation is None else len(lines)
        lines, held_out = lines[:cut], lines[cut:]
        source = f"{recipe.calibration}, its last {_HELD_OUT_SHARE:.0%} to judge on"
    if recipe.evaluation is not None:
        held_out = _lines(read_text(Path(recipe.evaluation)), recipe.evaluation)
        source = f"{source.split(',')[0]}, judged on {recipe.evaluation}"
    if not lines or not held_out:
        raise InputError(
            f"{recipe.calibration} has too few lines of {_SHORTEST} characters to calibrate and judge on. "
            "Give more text, or --evaluation."
        )
    order = random.Random(recipe.seed)
    return _Texts(
        calibration=order.sample(lines, min(recipe.samples, len(lines))),
        evaluation=order.sample(held_out, min(judged, len(held_out))),
        source=source,
    )


def _lines(text: str, source: str) -> list[str]:
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if len(line.strip()) >= _SHORTEST))
    if not lines:
        raise InputError(f"{source} has no line of at least {_SHORTEST} characters.")
    return lines


def _read_texts(path: Path) -> list[str]:
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Export the model again.") from None
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ArtifactError(f"{path} is not a list of texts: export the model again.")
    return lines


def _fingerprint(source: Path) -> dict[str, str]:
    """The sha256 of every weight file of a model, by name."""
    names = sorted(path.name for kind in ("*.safetensors", "*.bin") for path in source.glob(kind))
    return {name: file_record(source, name).sha256 for name in names}


def _batches(tokenizer: Any, lines: Sequence[str], length: int) -> list[dict[str, Tensor]]:
    return [
        _tokens(tokenizer, lines[start : start + _BATCH], length) for start in range(0, len(lines), _BATCH)
    ]


def _tokens(tokenizer: Any, lines: Sequence[str], length: int) -> dict[str, Tensor]:
    return dict(tokenizer(list(lines), return_tensors="pt", padding=True, truncation=True, max_length=length))


def _compress(
    model: Any, batches: Sequence[Mapping[str, Tensor]], recipe: Recipe, storage: Storage, progress: Progress
) -> tuple[dict[str, Matrix], dict[str, str]]:
    """The matrices of all blocks and of the token embedding, and why some stay plain."""
    linears = {
        name: module
        for name, module in linears_of(model).items()
        if any(part.isdigit() for part in name.split("."))  # poolers and heads stand outside the blocks
    }
    progress(0, len(linears) + 1, "Calibrate")
    grams, shared = grams_by_input(model, linears, batches)
    first_of = {name: first for first, names in shared.items() for name in names}
    sizes = [size_of(recipe, name, weight_of(module).float()) for name, module in linears.items()]
    choices = spread(recipe, sizes, storage).choices
    matrices: dict[str, Matrix] = {}
    reasons: dict[str, str] = {}
    whitenings: dict[str, Whitening] = {}
    for number, (name, module) in enumerate(linears.items(), start=1):
        progress(number, len(linears) + 1, "Factorise, quantize")
        first = first_of[name]
        if first not in whitenings:
            whitenings = {first: whiten(grams[first])}
        result = compress_linear(
            weight_of(module).float().contiguous(), whitenings[first], choices[name], recipe
        )
        matrices[name] = result.matrix
        if result.facts.reason:
            reasons[name] = result.facts.reason
    table, grid = model.get_input_embeddings(), table_grid(recipe.embeddings)
    if isinstance(table, nn.Embedding):
        path = next(path for path, module in model.named_modules() if module is table)
        weight = table.weight.detach().T.contiguous()
        matrices[path] = Dense(weight) if grid is None else rtn(weight, None, grid)
    progress(len(linears) + 1, len(linears) + 1, "Factorise, quantize")
    return matrices, reasons


def _judge(losses: Losses, recipe: Recipe) -> tuple[Criterion, ...]:
    def criterion(name: str, value: float, threshold: float, least: bool, what: str) -> Criterion:
        passed = value >= threshold if least else value <= threshold
        relation = "at least" if least else "at most"
        sentence = f"{what} is {value:.3g}, and has to be {relation} {threshold:g}."
        return Criterion(name, value, threshold, "at least" if least else "at most", passed, sentence)

    exact = losses.export_exact.nmse
    found = [
        criterion(
            "max_export_nmse",
            exact,
            recipe.max_export_nmse,
            False,
            "The NMSE of the export, computed exactly,",
        )
    ]
    if losses.total is not None:
        found.append(
            criterion(
                "min_cosine", losses.total.cosine, recipe.min_cosine, True, "The mean cosine to the original"
            )
        )
    return tuple(found)


def _sizes(folder: Path, matrices: Mapping[str, Matrix], storage: Storage) -> dict[str, int]:
    plain = Grid(4, 32)
    shapes = [matrix.shape for matrix in matrices.values()]
    return {
        "artifact": sum((folder / name).stat().st_size for name in list_files(folder) if name != REPORT),
        "matrices": sum(matrix_bytes(matrices, storage).values()),
        "plain_int4": sum(storage.leaf_bytes(*shape, plain) for shape in shapes),
        "fp16": sum(2 * rows * columns for rows, columns in shapes),
    }
