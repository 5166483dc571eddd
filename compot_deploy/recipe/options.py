"""Every option in one place: default, unit, reason. The command line, `deploy()` and recipe files share it.

A `Recipe` is frozen. A flag ``--code-bits 4``, the keyword ``code_bits=4`` and the TOML line
``code_bits = 4`` are the same option, generated from the one field below, so they cannot drift apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Final, Literal

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.errors import RecipeError

Quant = Literal["none", "int8", "int4", "nf4", "fp4"]
Precision = Literal["auto", "none", "int8", "int4", "int3", "int2"]

DEFAULT_GROUP: Final = 32
"""Inputs per scale: the finest that every runtime runs fast, 0.5 bit per weight."""

ONE_SCHEME: Final = (
    "dictionary_bits",
    "code_bits",
    "dictionary_group",
    "code_group",
    "atoms_per_nonzero",
    "code_pattern",
    "rounds",
    "paper_exact",
)
"""Options that say what every factorized matrix looks like or how it is made, which a plan decides by itself."""


def _option(default: Any, text: str, *, unit: str = "", group: str = "method") -> Any:
    return field(default=default, metadata={"help": text, "unit": unit, "group": group})


@dataclass(frozen=True)
class Recipe:
    """What to do to which model; see each field. `compot_deploy.recipe.validation` has run on every instance."""

    # What and where
    model: str | None = _option(
        None, "local folder or hub id; none takes the small model that ships with the package", group="model"
    )
    out: str | None = _option(None, "output folder (default: named after model and settings)", group="model")
    format: tuple[str, ...] = _option(("onnx",), "what to write; may be given several times", group="model")
    force: bool = _option(False, "replace an existing output folder", group="model")
    allow_pickle: bool = _option(
        False,
        "read .bin checkpoints with torch's weights-only unpickler when there are no safetensors",
        group="model",
    )

    # Size
    quant: Quant = _option(
        "int4", "precision of dictionaries and codes; nf4 and fp4 are bitsandbytes' tables", group="size"
    )
    ratio: float = _option(
        0.2,
        "how much smaller the linears become than the same linears stored dense at the same precision",
        unit="fraction of bytes",
        group="size",
    )
    bits: float | None = _option(
        None,
        "budget instead of --ratio: bits per weight of the linears, scales and everything counted",
        unit="bits per weight",
        group="size",
    )
    size: str | None = _option(
        None,
        "budget instead of --ratio: size of the whole output but report.html, 400MB for example",
        group="size",
    )
    budget: Literal["file", "memory"] = _option(
        "file",
        "what a budget counts: bytes of the file, or of the tensors of the loaded graph, where codes lie dense; "
        "what a runtime keeps beside them is not counted",
        group="size",
    )
    embeddings: Precision = _option(
        "auto",
        "precision of the token embedding (and of a tied head); auto lets a plan choose bits and group: with --size "
        "they compete with the linears for bytes, else they may add 5 % to the linears' predicted loss; int8 without "
        "a plan",
        group="size",
    )
    head: Precision = _option(
        "auto", "precision of an output head that is not tied to the embedding; auto as above", group="size"
    )
    dictionary_bits: int | None = _option(
        None, "bits of dictionaries (default: --quant)", unit="bits", group="size"
    )
    code_bits: int | None = _option(None, "bits of codes (default: --quant)", unit="bits", group="size")
    dictionary_group: int | None = _option(
        None, "inputs that share a scale in dictionaries (default: 32)", unit="inputs", group="size"
    )
    code_group: int | None = _option(
        None,
        "atoms that share a scale in codes; k is a multiple of it (default: 32)",
        unit="atoms",
        group="size",
    )

    # Method
    method: Literal["auto", "compot", "svd-llm", "plain"] = _option(
        "auto",
        "auto plans among everything, plain integers included; compot and svd-llm factorize every linear that gets "
        "smaller by it; plain only quantizes, and needs no --ratio",
    )
    allocation: Literal["auto", "knapsack", "uniform", "spectral"] = _option(
        "auto",
        "how the budget is allocated over the matrices: knapsack weighs measured schemes of each by what they cost "
        "the model and is never worse than plain grids of the same bytes; spectral and uniform give every matrix "
        "atoms of one scheme, for --ratio; auto is knapsack, and spectral where the scheme is settled by hand "
        "(--method, --code-bits, --rounds and the like) or by the format",
    )
    search: Literal["auto", "full", "coarse", "predicted"] = _option(
        "auto",
        "which schemes a plan measures: full is all of them; coarse prunes those not predicted to lie 3 % below the "
        "error of what was measured before; predicted tries grids on some outputs and makes of the factorized schemes "
        "only those that it chooses; auto is full up to a million weights in the linears, and predicted above",
    )
    quantizer: Literal["gptq", "rtn", "bnb"] = _option(
        "gptq", "how factors are quantized; bnb is bitsandbytes, with --quant nf4, fp4 or int8"
    )
    atoms_per_nonzero: float = _option(
        2.0, "k/s: atoms in a dictionary per non-zero in a column of the codes (paper: 2)", unit="ratio"
    )
    code_pattern: Literal["column", "2:4", "4:8"] = _option(
        "column",
        "which codes are kept: the strongest of a whole column, or of every 4 or 8 neighbouring atoms, for "
        "kernels and --onnx-codes packed",
    )
    rounds: int = _option(20, "alternations of coding and dictionary update (paper: 20)", unit="rounds")
    paper_exact: bool = _option(
        False,
        "stop where the paper stops: no least-squares dictionary, no re-fit of the codes, and a spectral "
        "allocation that pools singular values as they are, not per byte",
    )

    heal: str = _option(
        "off",
        "tune scales, norms and biases to what the original says to calibration text, integers and bytes as they "
        "are: off, auto (as many steps as take no longer than the rest of the run), or a number of steps; a held-out "
        "part of the text decides what is kept",
    )
    compare: tuple[str, ...] = _option(
        (),
        "also evaluate these methods at the same bytes, beside the result: compot, svd-llm, plain, auto; may be given "
        "several times, or separated by commas",
    )

    # Calibration
    calibration: str | None = _option(
        None,
        "text file, JSON lines, a datasets name, or 'self' for text sampled from the model "
        "(default: the shipped model's own text; otherwise self); for speech to text a folder of WAV or FLAC files, "
        "with what is said in NAME.txt beside NAME.wav where that is known",
        group="calibration",
    )
    samples: int = _option(128, "calibration windows", unit="windows", group="calibration")
    length: int = _option(
        256, "tokens of a window, at most what the model was made for", unit="tokens", group="calibration"
    )
    sequential: bool = _option(
        False,
        "make each matrix for the inputs that the compressed ones before it give and for the outputs that the original "
        "gave: closer at the same bytes, for some five forward passes more",
        group="calibration",
    )
    seed: int = _option(0, "seed of everything that is drawn at random", group="calibration")
    device: str = _option("auto", "where to compute: auto, cpu, cuda, cuda:1, mps", group="calibration")
    dtype: Literal["float32", "bfloat16", "float16"] = _option(
        "float32", "precision of the forward pass while calibrating", group="calibration"
    )
    cluster: str | None = _option(
        None,
        "compute with Ray: local takes all processors of this machine, auto the cluster that this machine is a part "
        "of, HOST:PORT a certain one; the result is the same to the last bit",
        group="calibration",
    )

    # Output
    onnx_ops: Literal["matmulnbits", "qdq"] = _option(
        "matmulnbits", "ONNX linears as MatMulNBits, or as standard DequantizeLinear + MatMul", group="output"
    )
    onnx_codes: Literal["dense", "packed"] = _option(
        "dense",
        "what an ONNX file holds in other bytes than runtimes read, expanded when loaded (packed): 4-bit codes of "
        "the pattern 2:4 in 3 bits, and with a plan 3-bit integers",
        group="output",
    )

    gguf_layout: Literal["dense", "factorized", "sparse"] = _option(
        "dense",
        "GGUF: factors multiplied out for any llama.cpp, or as they are for compot-deploy's runtime",
        group="output",
    )
    gguf_type: str = _option(
        "auto",
        "GGUF, dense layout: ggml type of the linears, Q4_K or IQ3_XXS for example, rounded with importance weights",
        group="output",
    )
    archive: bool = _option(
        False, "also write the folder as one zip file beside it, for transport", group="output"
    )

    sign: str | None = _option(
        None,
        "sign the manifest with this secret key of minisign, for check --trusted-key; see keygen",
        group="output",
    )

    # Check and gate
    evaluation: str | None = _option(
        None,
        "text, or for speech to text a folder of recordings, to evaluate on (default: the shipped model's held-out "
        "text; otherwise a part of what was given for calibration)",
        group="gate",
    )
    evaluation_tokens: int = _option(4096, "tokens to evaluate on", unit="tokens", group="gate")
    min_positions: int | None = _option(
        None,
        "gate: tokens to evaluate on, at least; of models that read whole texts a text counts as 16 (default: 256, or "
        "the --evaluation-tokens where those are fewer)",
        unit="tokens",
        group="gate",
    )
    max_perplexity_ratio: float | None = _option(
        2.0,
        "gate: perplexity of the deployed model over the original's; the default only catches collapse",
        unit="ratio",
        group="gate",
    )
    max_kl: float | None = _option(
        None, "gate: mean Kullback-Leibler divergence from the original", unit="nats per token", group="gate"
    )
    min_top1: float | None = _option(
        None, "gate: share of positions with the original's most likely token", unit="fraction", group="gate"
    )
    min_cosine: float = _option(
        0.9,
        "gate for encoders and other models that are traced: mean cosine of embeddings to the original's",
        unit="cosine",
        group="gate",
    )
    max_wer_increase: float | None = _option(
        None,
        "gate for speech to text: word errors per word that the deployed model adds to the original's, 0.01 for one "
        "point; counted against what was said where that is known, otherwise against the original's text",
        unit="fraction",
        group="gate",
    )
    tasks: tuple[str, ...] = _option(
        (),
        "also score these tasks, beside the original: names of lm-eval, or YAML files of tasks and folders of such; of "
        "encoders files of scored pairs of sentences (.tsv, .csv, .jsonl); may be given several times, or separated by "
        "commas",
        group="gate",
    )
    task_samples: int | None = _option(
        None, "questions or pairs of each task, at most (default: all)", unit="questions", group="gate"
    )
    min_recovery: float | None = _option(
        None,
        "gate: share of the original's score in each of the --tasks that the deployed model keeps, 0.95 for 95 %",
        unit="fraction",
        group="gate",
    )
    max_export_nmse: float = _option(
        1e-4,
        "gate, always on: normalized squared error that the export itself may add",
        unit="ratio",
        group="gate",
    )

    def __post_init__(self) -> None:
        from compot_deploy.recipe.validation import validate  # it knows this class

        validate(self)

    @property
    def planned(self) -> bool:
        """Whether a knapsack over measured schemes allocates the budget."""
        return self.allocation == "knapsack" or (self.allocation == "auto" and not self.why_one_scheme)

    @property
    def heal_steps(self) -> int | None:
        """Steps of healing that were asked for; None where --heal is auto or off."""
        return None if self.heal in ("auto", "off") else int(self.heal)

    @property
    def rounds_again(self) -> bool:
        """Whether the file rounds every weight to a type of its own, whatever its grid was."""
        dense = set(self.format) == {"gguf"} and self.gguf_layout == "dense"
        return dense and self.gguf_type != "auto"

    @property
    def why_one_scheme(self) -> str:
        """What leaves a plan no schemes to choose from, so that `auto` counts atoms; empty if nothing does."""
        if self.bits is not None or self.size is not None:
            return ""
        if self.method == "plain":
            return "--method plain"
        if self.quantizer == "bnb":
            return "--quantizer bnb"
        if self.format[:1] == ("gguf",) and self.gguf_layout == "dense":
            return "a dense GGUF file, which stores products,"
        changed = [
            flag_of(option) for option in fields(self) if option.name in ONE_SCHEME and self.changed(option)
        ]
        return " and ".join(changed)

    def counting_atoms(self) -> Recipe:
        """The same where nothing can be planned: `auto` becomes spectral, what asks for a plan stays."""
        by_ratio = self.bits is None and self.size is None
        return replace(self, allocation="spectral") if self.allocation == "auto" and by_ratio else self

    @property
    def factorizer(self) -> Literal["compot", "svd-llm"]:
        """How factors are made where one scheme serves all matrices."""
        return "svd-llm" if self.method == "svd-llm" else "compot"

    def changed(self, option: Field[Any]) -> bool:
        """Whether an option is not at its default."""
        return bool(getattr(self, option.name) != option.default)

    @property
    def allocator(self) -> str:
        """The rule that allocates the budget, with `auto` decided."""
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


def size_in_bytes(text: str) -> int | None:
    """``400MB`` or ``1.5GiB`` in bytes; None for what is no size above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]) > 0:
        return None
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    size = float(match[1]) * base ** " kmg".index(unit[:1] or " ")
    return int(size) if size < math.inf else None


def override(recipe: Recipe, **values: Any) -> Recipe:
    """A copy with some options changed, validated again."""
    return replace(recipe, **values)


def one_scheme_options() -> tuple[Field[Any], ...]:
    """Options that settle the one scheme of all factorized matrices."""
    return tuple(option for option in recipe_options() if option.name in ONE_SCHEME)


def recipe_options() -> Sequence[Field[Any]]:
    """The fields of `Recipe`, for building a command line."""
    return fields(Recipe)


def default_of(option: Field[Any]) -> Any:
    """An option's default."""
    return None if option.default is MISSING else option.default


def flag_of(option: Field[Any]) -> str:
    """An option as the command line spells it."""
    return "--" + option.name.replace("_", "-")
