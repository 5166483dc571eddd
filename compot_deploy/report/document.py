"""One report, several readers: JSON for machines, JUnit XML for CI, tables for people.

Everything here turns values into strings (and JSON back into values); nothing is printed, written or
measured. The JSON layout is documented field by field in ``docs/report-schema.md``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints
from xml.etree import ElementTree

from compot_deploy.accuracy.gate import shown
from compot_deploy.accuracy.losses import AccuracyReport, GreedyMatch, Loss
from compot_deploy.accuracy.metrics import METRICS_VERSION, Estimate
from compot_deploy.core.diagnostics import Finding, errors
from compot_deploy.errors import InputError
from compot_deploy.report.facts import Frontier, LayerFigures, Origin

SCHEMA_VERSION: Final = 1
"""Raised when a field of report.json changes its meaning or disappears; a new field does not raise it."""

SCHEMA_MINOR: Final = 1
"""Raised with every field that is added: a report without this field has 0, and lacks what came with 1."""

ABSENT: Final = "—"
"""Stands in a table where nothing was or could be measured."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of an artifact beside what the same model would take without factorisation.

    Attributes:
        artifact: the whole folder or file, tokenizer and all.
        weights: the weights in it, scales, masks and padding included.
        plain_int4: the same weights, every linear plain int4, the rest as in the artifact.
        plain_int8: the same with plain int8.
        fp16: all weights at 16 bits.
        transport: the artifact compressed for transport, where that was measured.
        memory: weights in memory after loading, where that is known.
        memory_int4: the same weights in memory with every linear plain int4.
        memory_int8: the same with plain int8.
        linears: bytes of the linears alone, in the file.
        linear_weights: how many weights they have.
    """

    artifact: int
    weights: int
    plain_int4: int
    plain_int8: int
    fp16: int
    transport: int | None = None
    memory: int | None = None
    memory_int4: int | None = None
    memory_int8: int | None = None
    linears: int | None = None
    linear_weights: int | None = None


@dataclass(frozen=True)
class Rival:
    """The same factors in as many bytes, quantized by another quantizer: what the choice of quantizer costs.

    Attributes:
        name: quantizer and grid, ``gptq int4/g32``.
        bytes: of the weights.
        loss: its method loss.
    """

    name: str
    bytes: int
    loss: Loss


@dataclass(frozen=True)
class Report:
    """Everything that is known about how good an artifact is.

    Attributes:
        model: what was compressed: a folder name or hub id.
        artifact: name of the folder or file.
        format: kind of artifact, ``onnx`` for example.
        package: version of compot-deploy.
        created: UTC, ISO 8601.
        sizes: in bytes.
        accuracy: losses, texts and the gate.
        findings: of the structural lint.
        facts: what the run did other than asked: fallbacks, layers that stayed dense, fewer samples.
        recipe: every knob of the run; plain JSON values.
        versions: of the libraries that took part.
        schema_version: layout of this report.
        schema_minor: fields that were added to it since.
        layers: one entry per matrix, in block order.
        frontier: what a plan could have chosen; None where nothing was planned.
        origin: calibration and provenance.
        rival: the same factors through GPTQ, where another quantizer was chosen; None otherwise.
    """

    model: str
    artifact: str
    format: str
    package: str
    created: str
    sizes: Sizes
    accuracy: AccuracyReport
    findings: tuple[Finding, ...] = ()
    facts: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    schema_minor: int = SCHEMA_MINOR
    layers: tuple[LayerFigures, ...] = ()
    frontier: Frontier | None = None
    origin: Origin = field(default_factory=Origin)
    rival: Rival | None = None

    @property
    def passed(self) -> bool:
        """Whether the gate passed and the lint found no error."""
        return self.accuracy.gate.passed and not errors(self.findings)


def verdict(report: Report) -> str:
    """The outcome in one sentence, failures named."""
    failed = [criterion.sentence for criterion in report.accuracy.gate.criteria if not criterion.passed]
    failed += [f"{finding.where}: {finding.sentence}" for finding in errors(report.findings)]
    if not failed:
        return f"PASSED: all {len(report.accuracy.gate.criteria)} criteria of the gate hold."
    return "FAILED: " + "; ".join(failed)


# JSON


def to_json(report: Report) -> str:
    """The report as JSON. NaN and infinity, which JSON does not know, become null."""
    document = {"passed": report.passed, **_encode(report)}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, origin: str = "report.json") -> Report:
    """Read a report back. Null where a number belongs becomes NaN; unknown fields are ignored.

    Args:
        text: what `to_json` made.
        origin: where it comes from, for the error message.

    Raises:
        InputError: not a report, or of another schema or metrics version.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InputError(f"{origin} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InputError(f"{origin} is not a report: it holds no JSON object.")
    accuracy = document.get("accuracy")
    for what, found, known in (
        ("schema", document.get("schema_version"), SCHEMA_VERSION),
        (
            "metrics",
            accuracy.get("metrics_version") if isinstance(accuracy, dict) else None,
            METRICS_VERSION,
        ),
    ):
        if found != known:
            raise InputError(
                f"{origin} has the {what} version {found}; this compot-deploy knows version {known}. "
                "Make the report again with this version."
            )
    return _decode(Report, document, origin)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _encode(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):  # a half character of broken text could not be written as UTF-8
        return value.encode("utf-8", "replace").decode("utf-8")
    return value


T = TypeVar("T")


def _decode(kind: type[T], value: Any, where: str) -> T:
    """Build a dataclass from parsed JSON, checking every field."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {_describe(value)}, not an object.")
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        place = f"{where}: {entry.name}" if ": " not in where else f"{where}.{entry.name}"
        if entry.name in value:
            found[entry.name] = _decode_value(hints[entry.name], value[entry.name], place)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise InputError(f"{place} is missing.")
    return kind(**found)


def _decode_value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode(kind, value, where)
    if kind is Any:
        return _tuples(value)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode_value(inner, value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_decode_value(arguments[0], entry, f"{where}[{n}]") for n, entry in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _decode_value(arguments[1], entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    wanted = "one of " + ", ".join(map(str, arguments)) if origin is Literal else _NAMES.get(kind, "a list")
    raise InputError(f"{where} is {_describe(value)}, not {wanted}.")


_NAMES: Final = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def _describe(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _tuples(value: Any) -> Any:
    """Lists as tuples, the way recipes keep them."""
    if isinstance(value, list):
        return tuple(_tuples(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return value


# JUnit XML


def to_junit(report: Report) -> str:
    """JUnit XML: one test case per criterion of the gate and per finding of the lint.

    A failed criterion and a finding of severity ``error`` are failures; warnings and notes pass, and say in
    their output what they found.
    """
    suites = ElementTree.Element("testsuites", name="compot-deploy")
    failures = sum(not criterion.passed for criterion in report.accuracy.gate.criteria)
    failures += len(errors(report.findings))
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        name=printable(f"compot-deploy: {report.artifact}"),
        tests=str(len(report.accuracy.gate.criteria) + len(report.findings)),
        failures=str(failures),
        errors="0",
        skipped="0",
        timestamp=printable(report.created),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (
        ("model", report.model),
        ("format", report.format),
        ("artifact_bytes", str(report.sizes.artifact)),
        ("metrics_version", str(report.accuracy.metrics_version)),
    ):
        ElementTree.SubElement(properties, "property", name=name, value=printable(value))
    for criterion in report.accuracy.gate.criteria:
        case = ElementTree.SubElement(
            suite, "testcase", classname="compot_deploy.report.gate", name=printable(criterion.name), time="0"
        )
        tag = "system-out" if criterion.passed else "failure"
        detail = ElementTree.SubElement(case, tag)
        detail.text = printable(criterion.sentence)
        if not criterion.passed:
            detail.attrib.update(type="gate", message=printable(criterion.sentence))
    for finding in report.findings:
        case = ElementTree.SubElement(
            suite, "testcase", classname="compot_deploy.lint", name=printable(finding.where), time="0"
        )
        failed = finding.severity == "error"
        detail = ElementTree.SubElement(case, "failure" if failed else "system-out")
        detail.text = printable(f"{finding.severity}: {finding.sentence}")
        if failed:
            detail.attrib.update(type="lint", message=printable(finding.sentence))
    ElementTree.indent(suites)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"
    )


def printable(text: str) -> str:
    """Control characters and half characters as escapes: XML cannot hold them, a terminal would obey them."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Of Unicode's categories Cc and Cs, without tab and newline, and what XML forbids besides."""


# Tables


@dataclass(frozen=True)
class Table:
    """A table of finished strings; the first column names the row.

    Attributes:
        title: above the table.
        columns: headings; the first may be empty.
        rows: as many entries as columns each.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: every row needs {len(self.columns)} entries.")


def tables(report: Report) -> tuple[Table, ...]:
    """All tables of a report in reading order; those that would be empty are left out."""
    candidates = (
        gate_table(report),
        size_table(report),
        loss_table(report),
        choice_table(report),
        finding_table(report),
        text_table(report),
    )
    return tuple(table for table in candidates if table.rows)


def gate_table(report: Report) -> Table:
    """Each criterion of the gate: value, limit, verdict."""
    rows = tuple(
        (
            criterion.name,
            limit_figure(criterion.value),
            f"{criterion.relation} {limit_figure(criterion.threshold)}",
            "passed" if criterion.passed else "FAILED",
        )
        for criterion in report.accuracy.gate.criteria
    )
    return Table("Gate", ("criterion", "value", "limit", "verdict"), rows)


def size_table(report: Report) -> Table:
    """Bytes of the artifact beside plain int4, plain int8 and fp16."""
    sizes = report.sizes
    entries: list[tuple[str, int | None]] = [
        ("artifact, all files", sizes.artifact),
        ("artifact, weights", sizes.weights),
        ("plain int4, weights", sizes.plain_int4),
        ("plain int8, weights", sizes.plain_int8),
        ("fp16, weights", sizes.fp16),
        ("artifact, compressed for transport", sizes.transport),
    ]
    in_memory: list[tuple[str, int | None]] = [
        ("artifact, weights in memory", sizes.memory),
        ("plain int4, weights in memory", sizes.memory_int4),
        ("plain int8, weights in memory", sizes.memory_int8),
    ]
    rows = tuple(
        (name, readable_bytes(count), f"{count:,}", ratio(weights, count))
        for weights, group in ((sizes.weights, entries), (sizes.memory, in_memory))
        for name, count in group
        if count is not None and weights is not None
    )
    return Table("Size", ("", "size", "bytes", "artifact's weights / this"), rows, report.facts)


def loss_table(report: Report) -> Table:
    """The three losses side by side, the export twice, and the noise floor."""
    accuracy = report.accuracy
    columns: dict[str, Loss | None] = {}
    if accuracy.factorization is not None:
        columns = {"factorisation": accuracy.factorization, "quantization": accuracy.quantization}
    columns["method"] = accuracy.method
    if report.rival is not None:
        columns[f"method, {report.rival.name}"] = report.rival.loss
    columns |= {
        "export, exact": accuracy.export_exact,
        "export, shipped": accuracy.export_shipped,
        "total": accuracy.total,
        "noise floor": accuracy.noise,
    }
    figures = [None if loss is None else _figures(loss) for loss in columns.values()]
    names = tuple(_figures(accuracy.export_exact))
    rows = tuple(
        (name, *(ABSENT if column is None else column[name] for column in figures)) for name in names
    )
    facts = accuracy.evaluation
    notes = [
        f"{facts.positions:,} positions in {facts.windows} windows of {facts.source}; "
        f"metrics version {accuracy.metrics_version}.",
        f"The noise floor is {accuracy.noise.reference} against itself, token by token.",
        *(f"{note}." for note in facts.notes),
    ]
    if accuracy.reference_absent is not None:
        notes.append(f"No method and total loss: {accuracy.reference_absent}.")
    elif accuracy.factorization is not None:
        notes.append("The method loss is split: factorisation alone, then what quantization adds to it.")
    rival = report.rival
    if rival is not None:
        notes.append(
            f"{rival.name} is the same model with the same factors, quantized by {rival.name.split()[0]} instead, in "
            f"{rival.bytes:,} bytes of weights; this one has {report.sizes.weights:,}."
        )
    return Table("Accuracy", ("", *columns), rows, tuple(notes))


def choice_table(report: Report) -> Table:
    """What was chosen for how many matrices, what that takes, and the error that it makes."""
    groups: dict[str, list[LayerFigures]] = {}
    for layer in report.layers:
        groups.setdefault(kind_of(layer), []).append(layer)
    rows = []
    for kind, layers in sorted(groups.items()):
        size = sum(layer.bytes for layer in layers)
        weights = sum(layer.inputs * layer.outputs for layer in layers)
        measured = [layer.error for layer in layers if layer.error is not None]
        rows.append(
            (
                kind,
                str(len(layers)),
                readable_bytes(size),
                f"{size * 8 / weights:.2f}",
                figure(sum(measured) / len(measured)) if measured else ABSENT,
                ratio(size, sum(layer.plain_int4_bytes for layer in layers)),
            )
        )
    columns = ("form", "matrices", "size", "bits per weight", "mean error", "of plain int4")
    notes = ("Error is relative, of a matrix's output on calibration text; scales count as bits.",)
    return Table("Matrices", columns, tuple(rows), notes if rows else ())


def kind_of(layer: LayerFigures) -> str:
    """The form of a matrix without its sizes: what matrices are grouped by."""
    if layer.kind == "factorized":
        return "dictionary and codes"
    return layer.choice


def finding_table(report: Report) -> Table:
    """What the structural lint found."""
    rows = tuple(
        (finding.severity, printable(finding.where), printable(finding.sentence))
        for finding in report.findings
    )
    return Table("Structure", ("severity", "where", "finding"), rows)


def text_table(report: Report) -> Table:
    """Greedy continuations side by side."""
    rows: list[tuple[str, ...]] = []
    for text in report.accuracy.continuations:
        voices: dict[str, list[str]] = {}
        for who, said in (
            ("original", text.reference),
            ("factorised", text.factorized),
            ("compressed", text.compressed),
            ("exported, exact", text.exact),
            ("exported, as shipped", text.exported),
        ):
            if said is not None:
                voices.setdefault(said, []).append(who)
        rows += [(printable(text.prompt), " = ".join(who), printable(said)) for said, who in voices.items()]
    return Table("Greedy text", ("prompt", "model", "continuation"), tuple(rows))


def to_markdown(report: Report, without: Sequence[str] = ()) -> str:
    """Verdict and tables as GitHub Markdown, for a model card or a job summary.

    Args:
        report: to show.
        without: titles of tables that are left out.
    """
    blocks = [f"**{_markdown(verdict(report))}**"]
    blocks += [table_markdown(table) for table in tables(report) if table.title not in without]
    return "\n\n".join(blocks) + "\n"


def table_markdown(table: Table) -> str:
    """A table as GitHub Markdown, its title above it and its notes below."""
    right = "---" if table.title in ("Gate", "Structure", "Greedy text") else "---:"
    lines = [
        f"### {table.title}",
        "",
        _markdown_row(table.columns),
        _markdown_row(["---", *[right] * (len(table.columns) - 1)], escape=False),
        *(_markdown_row(row) for row in table.rows),
    ]
    if table.notes:
        lines += ["", *(f"- {_markdown(note)}" for note in table.notes)]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str], escape: bool = True) -> str:
    return "| " + " | ".join(_markdown(cell) if escape else cell for cell in cells) + " |"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = printable(text)
    for character in "\\`*_[]<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _figures(loss: Loss) -> dict[str, str]:
    figures = loss.comparison
    divergence = figures.divergence
    return {
        "perplexity, from": estimate(figures.reference_perplexity),
        "perplexity, to": estimate(figures.candidate_perplexity),
        "perplexity ratio": estimate(figures.perplexity_ratio),
        "KL divergence, mean [nats]": estimate(divergence.mean),
        "KL divergence, median": figure(divergence.median),
        "KL divergence, p90": figure(divergence.p90),
        "KL divergence, p99": figure(divergence.p99),
        "KL divergence, largest": figure(divergence.maximum),
        "same top token": percent(figures.top1_agreement),
        "logit NMSE": figure(figures.nmse),
        "largest logit difference": figure(figures.largest_difference),
        "non-finite logits": str(figures.nonfinite_reference + figures.nonfinite_candidate),
        "same greedy tokens": greedy_matches(loss.greedy),
    }


def greedy_matches(matches: Sequence[GreedyMatch]) -> str:
    """How much of the greedy continuations is the same."""
    if not matches:
        return ABSENT
    shared, length = sum(match.common_prefix for match in matches), sum(match.length for match in matches)
    return f"{shared}/{length}, {sum(match.equal for match in matches)} of {len(matches)} texts"


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if math.isfinite(value) else ABSENT


def limit_figure(value: float) -> str:
    """A value or a limit of the gate; absent where nothing was measured."""
    return shown(value) if math.isfinite(value) else ABSENT


def estimate(measured: Estimate) -> str:
    """As many decimals as the standard error justifies: two of its digits."""
    value, error = measured.value, measured.standard_error
    if not math.isfinite(value):
        return ABSENT
    if not math.isfinite(error):
        return f"{value:.4g}"
    if error == 0:
        return f"{value:.4g} ± 0"
    if abs(value) < 1e-3:
        return f"{value:.2e} ± {error:.1e}"
    if error < 1e-6:
        return f"{value:.6g} ± {error:.0e}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def percent(measured: Estimate) -> str:
    """A fraction with its standard error."""
    if not math.isfinite(measured.value):
        return ABSENT
    error = f" ± {100 * measured.standard_error:.2f}" if math.isfinite(measured.standard_error) else ""
    return f"{100 * measured.value:.2f}{error} %"


def readable_bytes(count: int) -> str:
    """Decimal units, three digits; gigabytes with two decimals."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def ratio(count: int, of: int) -> str:
    """One number in per cent of another."""
    return f"{100 * count / of:.1f} %" if of else ABSENT
