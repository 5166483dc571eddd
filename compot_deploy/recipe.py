"""Every knob in one place: default, unit, reason. The command line, `deploy()` and recipe files share it.

A `Recipe` is frozen. A flag ``--code-bits 4``, the keyword ``code_bits=4`` and the TOML line
``code_bits = 4`` are the same knob, generated from the one field below, so they cannot drift apart.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.errors import InputError, RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 only
    import tomli as tomllib

Quant = Literal["none", "int8", "int4", "nf4", "fp4"]
Precision = Literal["none", "int8", "int4"]


def _knob(default: Any, text: str, *, unit: str = "", group: str = "method") -> Any:
    return field(default=default, metadata={"help": text, "unit": unit, "group": group})


@dataclass(frozen=True)
class Recipe:
    """What to do to which model; see each field. `validate` has run on every instance."""

    # What and where
    model: str | None = _knob(
        None, "local folder or hub id; none takes the small model that ships with the package", group="model"
    )
    out: str | None = _knob(None, "output folder (default: named after model and settings)", group="model")
    format: tuple[str, ...] = _knob(("onnx",), "what to write; may be given several times", group="model")
    force: bool = _knob(False, "replace an existing output folder", group="model")
    allow_pickle: bool = _knob(
        False,
        "read .bin checkpoints with torch's weights-only unpickler when there are no safetensors",
        group="model",
    )

    # Size
    quant: Quant = _knob(
        "int4", "precision of dictionaries and codes; nf4 and fp4 are bitsandbytes' tables", group="size"
    )
    ratio: float = _knob(
        0.2,
        "how much smaller the linears become than the same linears stored dense at the same precision",
        unit="fraction of bytes",
        group="size",
    )
    bits: float | None = _knob(
        None,
        "budget instead of --ratio: bits per weight of the linears, scales and everything counted",
        unit="bits per weight",
        group="size",
    )
    size: str | None = _knob(
        None,
        "budget instead of --ratio: size of the whole output but report.html, 400MB for example",
        group="size",
    )
    budget: Literal["file", "memory"] = _knob(
        "file",
        "what a budget counts: bytes of the file, or of the tensors of the loaded graph, where codes lie dense; "
        "what a runtime keeps beside them is not counted",
        group="size",
    )
    embeddings: Precision = _knob(
        "int8", "precision of the token embedding (and of a tied head)", group="size"
    )
    head: Precision = _knob("int8", "precision of an untied output head", group="size")
    dictionary_bits: int | None = _knob(
        None, "bits of dictionaries (default: --quant)", unit="bits", group="size"
    )
    code_bits: int | None = _knob(None, "bits of codes (default: --quant)", unit="bits", group="size")
    dictionary_group: int | None = _knob(
        None, "inputs that share a scale in dictionaries (default: 32)", unit="inputs", group="size"
    )
    code_group: int | None = _knob(
        None,
        "atoms that share a scale in codes; k is a multiple of it (default: 32)",
        unit="atoms",
        group="size",
    )

    # Method
    method: Literal["auto", "compot", "svd-llm", "plain"] = _knob(
        "auto",
        "auto plans among everything, plain integers included; compot and svd-llm factorise every linear that gets "
        "smaller by it; plain only quantizes, and needs no --ratio",
    )
    allocation: Literal["auto", "knapsack", "uniform", "spectral"] = _knob(
        "auto",
        "how the budget is spread over the matrices: knapsack weighs measured forms of each by what they cost "
        "the model and is never worse than plain grids of the same bytes; spectral and uniform give every matrix "
        "atoms of one form, for --ratio; auto is knapsack, and spectral where the form is settled by hand "
        "(--method, --code-bits, --rounds and the like) or by the format",
    )
    search: Literal["auto", "full", "coarse"] = _knob(
        "auto",
        "which forms a plan measures: full is all of them, coarse those that promise to lie 3 % below the error of "
        "what was measured before; auto is coarse above 30 million weights in the linears",
    )
    quantizer: Literal["gptq", "rtn", "bnb"] = _knob(
        "gptq", "how factors are quantized; bnb is bitsandbytes, with --quant nf4, fp4 or int8"
    )
    atoms_per_nonzero: float = _knob(
        2.0, "k/s: atoms in a dictionary per non-zero in a column of the codes (paper: 2)", unit="ratio"
    )
    code_pattern: Literal["column", "2:4", "4:8"] = _knob(
        "column",
        "which codes are kept: the strongest of a whole column, or of every 4 or 8 neighbouring atoms, for "
        "kernels and --onnx-codes packed",
    )
    rounds: int = _knob(20, "alternations of coding and dictionary update (paper: 20)", unit="rounds")
    paper_exact: bool = _knob(
        False,
        "stop where the paper stops: no least-squares dictionary, no re-fit of the codes, and a spectral "
        "allocation that pools singular values as they are, not per byte",
    )

    compare: tuple[str, ...] = _knob(
        (),
        "also judge these methods at the same bytes, beside the result: compot, svd-llm, plain, auto; may be given "
        "several times, or separated by commas",
    )

    # Calibration
    calibration: str | None = _knob(
        None,
        "text file, JSON lines, a datasets name, or 'self' for text sampled from the model "
        "(default: the shipped model's own text; otherwise self)",
        group="calibration",
    )
    samples: int = _knob(128, "calibration windows", unit="windows", group="calibration")
    length: int = _knob(
        256, "tokens of a window, at most what the model was made for", unit="tokens", group="calibration"
    )
    sequential: bool = _knob(
        False,
        "calibrate each block on what the compressed blocks before it give, not on what the original ones do",
        group="calibration",
    )
    seed: int = _knob(0, "seed of everything that is drawn at random", group="calibration")
    device: str = _knob("auto", "where to compute: auto, cpu, cuda, cuda:1, mps", group="calibration")
    dtype: Literal["float32", "bfloat16", "float16"] = _knob(
        "float32", "precision of the forward pass while calibrating", group="calibration"
    )

    # Output
    onnx_ops: Literal["matmulnbits", "qdq"] = _knob(
        "matmulnbits", "ONNX linears as MatMulNBits, or as standard DequantizeLinear + MatMul", group="output"
    )
    onnx_codes: Literal["dense", "packed"] = _knob(
        "dense",
        "what an ONNX file holds in other bytes than runtimes read, expanded when loaded (packed): 4-bit codes of "
        "the pattern 2:4 in 3 bits, and with a plan 3-bit integers",
        group="output",
    )

    gguf_layout: Literal["dense", "factorized", "sparse"] = _knob(
        "dense",
        "GGUF: factors multiplied out for any llama.cpp, or as they are for compot-deploy's runtime",
        group="output",
    )
    gguf_type: str = _knob(
        "auto",
        "GGUF, dense layout: ggml type of the linears, Q4_K or IQ3_XXS for example, rounded with importance weights",
        group="output",
    )
    archive: bool = _knob(
        False, "also write the folder as one zip file beside it, for transport", group="output"
    )

    # Check and gate
    evaluation: str | None = _knob(
        None,
        "text to judge on (default: the shipped model's held-out text; otherwise held-out calibration text)",
        group="gate",
    )
    evaluation_tokens: int = _knob(4096, "tokens to judge on", unit="tokens", group="gate")
    max_perplexity_ratio: float | None = _knob(
        2.0,
        "gate: perplexity of the shipped model over the original's; the default only catches collapse",
        unit="ratio",
        group="gate",
    )
    max_kl: float | None = _knob(
        None, "gate: mean Kullback-Leibler divergence from the original", unit="nats per token", group="gate"
    )
    min_top1: float | None = _knob(
        None, "gate: share of positions with the original's most likely token", unit="fraction", group="gate"
    )
    min_cosine: float = _knob(
        0.9,
        "gate for encoders and other models that are traced: mean cosine of embeddings to the original's",
        unit="cosine",
        group="gate",
    )
    max_export_nmse: float = _knob(
        1e-4,
        "gate, always on: normalised squared error that the export itself may add",
        unit="ratio",
        group="gate",
    )

    def __post_init__(self) -> None:
        self.validate()

    # -- budget --------------------------------------------------------------------------------------

    @property
    def planned(self) -> bool:
        """Whether a knapsack over measured forms spreads the budget."""
        return self.allocation == "knapsack" or (self.allocation == "auto" and not self.why_one_form)

    @property
    def why_one_form(self) -> str:
        """What leaves a plan no forms to choose from, so that `auto` counts atoms; empty if nothing does."""
        if self.bits is not None or self.size is not None:
            return ""
        if self.method == "plain":
            return "--method plain"
        if self.quantizer == "bnb":
            return "--quantizer bnb"
        if self.format[:1] == ("gguf",) and self.gguf_layout == "dense":
            return "a dense GGUF file, which stores products,"
        changed = [_flag(knob) for knob in fields(self) if knob.name in _ONE_FORM and self._changed(knob)]
        return " and ".join(changed)

    def counting_atoms(self) -> Recipe:
        """The same where nothing can be planned: `auto` becomes spectral, what asks for a plan stays."""
        by_ratio = self.bits is None and self.size is None
        return replace(self, allocation="spectral") if self.allocation == "auto" and by_ratio else self

    @property
    def factorizer(self) -> Literal["compot", "svd-llm"]:
        """How factors are made where one form serves all matrices."""
        return "svd-llm" if self.method == "svd-llm" else "compot"

    def _changed(self, knob: Field[Any]) -> bool:
        return bool(getattr(self, knob.name) != knob.default)

    @property
    def allocator(self) -> str:
        """The rule that spreads the budget, with `auto` decided."""
        if self.planned:
            return "knapsack"
        rule = "spectral" if self.allocation == "auto" else self.allocation
        return "spectral by value" if rule == "spectral" and self.paper_exact else rule

    @property
    def size_bytes(self) -> int | None:
        """--size in bytes: a number with B, KB, MB or GB (powers of 1000), or KiB, MiB, GiB (of 1024).

        Raises:
            RecipeError: not a size.
        """
        if self.size is None:
            return None
        size = size_in_bytes(self.size)
        if size is None:
            raise RecipeError(f"--size {self.size}: give a number and a unit, 400MB or 1.5GiB for example.")
        return size

    # -- grids ---------------------------------------------------------------------------------------

    @property
    def dictionary_grid(self) -> Grid | None:
        """Grid of dictionaries and plain matrices, None for floating point."""
        return self._grid(self.dictionary_bits, self.dictionary_group)

    @property
    def code_grid(self) -> Grid | None:
        """Grid of codes, None for floating point."""
        return self._grid(self.code_bits, self.code_group)

    @property
    def fixed_pattern(self) -> Pattern | None:
        """Pattern of neighbouring atoms; None where the strongest of a whole column are kept."""
        if self.code_pattern == "column":
            return None
        kept, _, of = self.code_pattern.partition(":")
        return Pattern(int(kept), int(of))

    def _grid(self, bits: int | None, group: int | None) -> Grid | None:
        if self.quant == "none":
            return None
        if self.quant == "nf4" or self.quant == "fp4":
            return Grid(4, group or DEFAULT_GROUP, self.quant)
        return Grid(bits or int(self.quant.removeprefix("int")), group or DEFAULT_GROUP)

    # -- validation ----------------------------------------------------------------------------------

    def validate(self) -> None:
        """Refuse values outside their range.

        Raises:
            RecipeError: names the knob, its value and its range.
        """
        hints = _hints()
        for knob in fields(self):
            choices = _choices(hints[knob.name])
            value = getattr(self, knob.name)
            if choices and value not in choices:
                raise RecipeError(f"{_flag(knob)} {value}: choose one of {', '.join(map(str, choices))}.")
        if not 0 < self.ratio < 1:
            raise RecipeError(
                f"--ratio {self.ratio:g}: give a fraction between 0 and 1; 0.2 makes the linears 20 % smaller."
            )
        if self.bits is not None and self.size is not None:
            raise RecipeError("--bits and --size are two budgets: give one of them.")
        if self.bits is not None and not 0 < self.bits <= 32:
            raise RecipeError(f"--bits {self.bits:g}: give bits per weight above 0, 2.2 for example.")
        if (self.bits is not None or self.size is not None) and not self.planned:
            raise RecipeError(
                f"--allocation {self.allocation} takes a --ratio; --bits and --size need --allocation knapsack."
            )
        _ = self.size_bytes  # refuses what is no size
        for name in ("samples", "length", "rounds", "evaluation_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least 1.")
        if self.length < 2:
            raise RecipeError("--length 1: a window needs at least 2 tokens, one to read and one to predict.")
        if self.atoms_per_nonzero < 1:
            raise RecipeError(
                f"--atoms-per-nonzero {self.atoms_per_nonzero:g}: a column cannot use more atoms than there are; "
                "give 1 (dense codes) or more."
            )
        for method in self.compare:
            if method not in ("auto", "compot", "svd-llm", "plain"):
                raise RecipeError(f"--compare {method}: choose among auto, compot, svd-llm, plain.")
        self._check_plan()
        if self.code_pattern != "column" and (self.atoms_per_nonzero != 2 or self.method == "svd-llm"):
            other = "--method svd-llm" if self.method == "svd-llm" else "--atoms-per-nonzero"
            raise RecipeError(
                f"--code-pattern {self.code_pattern} keeps every second code, which contradicts {other}: "
                "leave one out."
            )
        for name in ("dictionary_bits", "code_bits"):
            bits = getattr(self, name)
            if bits is not None and bits not in (2, 4, 8):
                raise RecipeError(f"--{name.replace('_', '-')} {bits}: runtimes execute 2, 4 or 8 bits.")
            if bits is not None and self.quant == "none":
                raise RecipeError(
                    f"--{name.replace('_', '-')} {bits} contradicts --quant none: leave one out."
                )
        self._check_quantizer()
        for name in ("dictionary_group", "code_group"):
            group = getattr(self, name)
            if group is not None and (group < 16 or group > 256 or group & (group - 1)):
                raise RecipeError(f"--{name.replace('_', '-')} {group}: use 16, 32, 64, 128 or 256.")
        grid = self.code_grid
        two_of_four = self.code_pattern == "2:4" and grid is not None and grid.bits == 4
        if self.onnx_codes == "packed" and not two_of_four and (grid is None or not self.planned):
            raise RecipeError(
                "--onnx-codes packed stores 4-bit codes of the pattern 2:4, and these are "
                f"{'floating point' if grid is None else f'of {grid.bits} bits'} of the pattern "
                f"{self.code_pattern}: add --code-pattern 2:4 and --code-bits 4, leave --allocation to a plan for "
                "3-bit integers, or leave it out."
            )
        for name in ("max_perplexity_ratio", "max_kl", "max_export_nmse"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise RecipeError(f"--{name.replace('_', '-')} {limit}: a limit cannot be negative or NaN.")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise RecipeError(f"--min-top1 {self.min_top1}: give a fraction between 0 and 1.")
        if not -1 <= self.min_cosine <= 1:
            raise RecipeError(f"--min-cosine {self.min_cosine}: give a number between -1 and 1.")
        if not self.format:
            raise RecipeError("--format: give at least one format.")

    def _check_plan(self) -> None:
        if not self.planned:
            return
        asked = next(
            (f"--{name}" for name in ("bits", "size") if getattr(self, name) is not None),
            "--allocation knapsack",
        )
        for knob in fields(self):
            tried = knob.name == "code_pattern" or (knob.name == "atoms_per_nonzero" and self.quant == "none")
            if knob.name in _ONE_FORM and not tried and self._changed(knob):
                raise RecipeError(
                    f"{_flag(knob)} settles the one form of all matrices, and with {asked} a plan chooses a form for "
                    "each: leave one of them out."
                )

    def _check_quantizer(self) -> None:
        table = self.quant in ("nf4", "fp4")
        if table and self.quantizer != "bnb":
            raise RecipeError(
                f"--quant {self.quant} is a table of bitsandbytes, which --quantizer {self.quantizer} does not know: "
                "add --quantizer bnb."
            )
        if self.quantizer != "bnb":
            return
        if self.quant not in ("nf4", "fp4", "int8"):
            raise RecipeError(
                f"--quantizer bnb: bitsandbytes has nf4, fp4 and int8, not {self.quant}; add --quant nf4."
            )
        if self.planned:
            raise RecipeError(
                "--quantizer bnb: a plan chooses among integer grids, which bitsandbytes does not have; give a "
                "--ratio instead of --bits, --size or --allocation knapsack."
            )
        for name in ("dictionary_bits", "code_bits"):
            if getattr(self, name) is not None:
                raise RecipeError(f"--{name.replace('_', '-')} contradicts --quantizer bnb: leave one out.")
        if table and 16 in (self.dictionary_group, self.code_group):
            raise RecipeError(f"--quant {self.quant}: bitsandbytes has blocks of 32 and more, not 16.")

    # -- TOML ----------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """The recipe as TOML, one commented knob a line; knobs left unset are commented out."""
        lines = ["# A compot-deploy recipe: use it with --recipe FILE."]
        group = None
        for knob in fields(self):
            if knob.metadata["group"] != group:
                group = knob.metadata["group"]
                lines += ["", f"# {group}"]
            value = getattr(self, knob.name)
            unit = f" [{knob.metadata['unit']}]" if knob.metadata["unit"] else ""
            line = f"{knob.name} = {_toml_value(value)}" if value is not None else f"# {knob.name} ="
            lines.append(f"{line}  # {knob.metadata['help']}{unit}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, path: Path, **overrides: Any) -> Recipe:
        """Read a recipe file; `overrides` win over the file.

        Raises:
            InputError: the file is missing or is not TOML.
            RecipeError: an unknown key, or a value of the wrong type.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"The recipe {path} does not exist.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"The recipe {path} cannot be read: {error}.") from None
        return recipe_from_mapping({**values, **overrides}, origin=str(path))


_ONE_FORM: Final = (
    "dictionary_bits",
    "code_bits",
    "dictionary_group",
    "code_group",
    "atoms_per_nonzero",
    "code_pattern",
    "rounds",
    "paper_exact",
)
"""Knobs that say what every factorised matrix looks like or how it is made, which a plan decides by itself."""

DEFAULT_GROUP: Final = 32
"""Inputs per scale: the finest that every runtime runs fast, 0.5 bit per weight."""


def size_in_bytes(text: str) -> int | None:
    """``400MB`` or ``1.5GiB`` in bytes; None for what is no size above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]) > 0:
        return None
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " kmg".index(unit[:1] or " "))


def recipe_from_mapping(values: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from parsed values, each checked against its knob's type.

    Args:
        values: knob to value; lists are taken for tuples, integers for floats.
        origin: where the values come from, for the error message.

    Raises:
        RecipeError: an unknown knob, or a value of the wrong type.
    """
    hints = _hints()
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise RecipeError(f"{origin}: unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(hints))}.")
    checked: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        converted = tuple(value) if isinstance(value, list) else value
        if isinstance(converted, str) and name in ("format", "compare"):
            converted = (converted,)
        if isinstance(converted, tuple) and name == "compare":
            converted = tuple(part for entry in converted for part in str(entry).split(","))
        if isinstance(converted, int) and not isinstance(converted, bool) and _accepts(kind, float):
            converted = float(converted) if not _accepts(kind, int) else converted
        if not _fits(converted, kind):
            raise RecipeError(f"{origin}: {name} = {value!r} is not {_describe(kind)}.")
        checked[name] = converted
    return Recipe(**checked)


def override(recipe: Recipe, **values: Any) -> Recipe:
    """A copy with some knobs changed, validated again."""
    return replace(recipe, **values)


def one_form_options() -> tuple[Field[Any], ...]:
    """Options that settle the one form of all factorised matrices."""
    return tuple(knob for knob in knobs() if knob.name in _ONE_FORM)


def knobs() -> Sequence[Field[Any]]:
    """The fields of `Recipe`, for building a command line."""
    return fields(Recipe)


def knob_type(name: str) -> tuple[type, tuple[Any, ...], bool]:
    """(scalar type, choices, repeatable) of a knob, for building a command line."""
    kind = _hints()[name]
    choices = _choices(kind)
    if choices:
        return str, choices, False
    if get_origin(kind) is tuple:
        return str, (), True
    for candidate in (bool, int, float, str):
        if _accepts(kind, candidate):
            return candidate, (), False
    raise TypeError(name)  # unreachable: every knob has one of these types


def default_of(knob: Field[Any]) -> Any:
    """A knob's default."""
    return None if knob.default is MISSING else knob.default


def _flag(knob: Field[Any]) -> str:
    return "--" + knob.name.replace("_", "-")


def _hints() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) not in (None, Literal, tuple) else (kind,)


def _accepts(kind: Any, candidate: type) -> bool:
    return candidate in _members(kind)


def _fits(value: Any, kind: Any) -> bool:
    if _choices(kind):
        return value in _choices(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return _accepts(kind, bool)
    return any((member is type(None) and value is None) or member is type(value) for member in _members(kind))


def _describe(kind: Any) -> str:
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): ""}
    if _choices(kind):
        return "one of " + ", ".join(_choices(kind))
    if get_origin(kind) is tuple:
        return "a list of strings"
    return " or ".join(filter(None, (names.get(member, str(member)) for member in _members(kind))))


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
