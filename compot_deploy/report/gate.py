"""The gate of continuous integration: a file of limits, and no more growth over a baseline than is allowed.

::

    max_perplexity_ratio = 1.25
    max_kl = 0.3
    max_bytes = "1.2MB"

    [regression]
    kl = "10%"
    bytes = "2%"

Limits on the loss replace those of the recipe; limits on bytes and on growth become further criteria of the
report, so that the table, the JUnit file and the job summary show them like any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from compot_deploy.accuracy.gate import LOSS_LIMITS, Criterion, GateResult, criterion, shown
from compot_deploy.accuracy.metrics import Comparison, Estimate
from compot_deploy.core.parsing import UnreadableError, decoded, toml_of
from compot_deploy.errors import InputError
from compot_deploy.recipe import size_in_bytes
from compot_deploy.report.document import Report
from compot_deploy.report.json import from_json

BYTE_LIMITS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "max_bytes": ("artifact", "bytes of all files"),
        "max_weight_bytes": ("weights", "bytes of the weights in the file"),
        "max_memory_bytes": ("memory", "bytes of the weights in memory"),
        "max_transport_bytes": ("transport", "bytes of all files as one zip"),
    }
)
"""Keys that limit a size of the report, and what it is in words."""

REGRESSION: Final = "regression"

_HUGE: Final = 1e300
"""No limit is as large, and no whole number below it is too large for a float."""

DEFAULT_GROWTH: Final[Mapping[str, float]] = MappingProxyType({"kl": 0.10, "bytes": 0.02})
"""What may grow how much where a baseline is given and nothing else is said: a KL divergence repeats to about
1 % when kernels or thread counts change, bytes to a few hundred."""


@dataclass(frozen=True)
class GateFile:
    """What a gate file asks for.

    Attributes:
        losses: limits on losses, by option of the recipe.
        sizes: limits on bytes, by key.
        growth: fraction by which a figure may grow over the baseline: ``kl``, ``bytes`` and the other names of
            `GROWING`.
    """

    losses: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    growth: Mapping[str, float] = field(default_factory=dict)


def read_gate(path: Path) -> GateFile:
    """Read a gate file.

    Raises:
        InputError: it is missing or not TOML, has a key that is not known or a value of a wrong type.
    """
    try:
        values = toml_of(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"The gate file {path} does not exist.") from None
    except (UnreadableError, OSError) as error:
        raise InputError(f"The gate file {path} cannot be read: {error}.") from None
    return gate_from_mapping(values, str(path))


def gate_from_mapping(values: Mapping[str, Any], origin: str) -> GateFile:
    """A gate from parsed values.

    Args:
        values: what TOML holds.
        origin: where it comes from, for the error message.

    Raises:
        InputError: a key that is not known, or a value of a wrong type.
    """
    known = (*LOSS_LIMITS, *BYTE_LIMITS, f"[{REGRESSION}]")
    for key in values:
        if key not in LOSS_LIMITS and key not in BYTE_LIMITS and key != REGRESSION:
            raise InputError(f"{origin}: unknown key {key!r}. Known keys: {', '.join(known)}.")
    growth = values.get(REGRESSION, {})
    if not isinstance(growth, dict):
        raise InputError(f"{origin}: {REGRESSION} = {growth!r} is not a table such as [{REGRESSION}].")
    for key in growth:
        if key not in GROWING:
            raise InputError(
                f"{origin}: unknown key {key!r} in [{REGRESSION}]. Known keys: {', '.join(GROWING)}."
            )
    return GateFile(
        losses={key: _limit(values[key], f"{origin}: {key}") for key in LOSS_LIMITS if key in values},
        sizes={key: _size(values[key], f"{origin}: {key}") for key in BYTE_LIMITS if key in values},
        growth={key: parse_growth(value, f"{origin}: {REGRESSION}.{key}") for key, value in growth.items()},
    )


def parse_growth(value: Any, where: str) -> float:
    """A growth as a fraction: ``"10%"`` and ``0.1`` are the same.

    Raises:
        InputError: not a growth, or negative.
    """
    growth = math.nan
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", value)):
        growth = float(match[1]) / (100 if match[2] else 1)
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE:
        growth = float(value)
    if not 0 <= growth < math.inf:
        raise InputError(f'{where} = {value!r} is not a growth: give "10%", or 0.1 for the same.')
    return growth


def read_baseline(path: Path) -> Report:
    """The report to compare with; the folder of an artifact stands for the report in it.

    Raises:
        InputError: it is missing, not a report, or of another schema or metrics version.
    """
    file = path / "compot" / "report.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"The baseline {file} does not exist: give the report.json of a run that was good."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The baseline {file} cannot be read: {error}.") from None
    return from_json(text, f"The baseline {file}")


@dataclass(frozen=True)
class GateRequirements:
    """What a check holds a folder against besides its recipe.

    Attributes:
        gate: limits on bytes, and allowed growth.
        baseline: what growth is measured from; None where nothing is compared.
        baseline_name: for error messages.
        max_growth: allowed growth of the loss and of bytes; what `gate` names itself wins. None leaves it to
            `gate`, and to `DEFAULT_GROWTH` where that names nothing.
    """

    gate: GateFile = field(default_factory=GateFile)
    baseline: Report | None = None
    baseline_name: str = "The baseline"
    max_growth: float | None = None

    def __post_init__(self) -> None:
        if self.baseline is not None:
            return
        if self.gate.growth:
            raise InputError(
                f"The gate limits growth ([{REGRESSION}]), and there is nothing to grow from: give --baseline with "
                "the report.json of a run that was good."
            )
        if self.max_growth is not None:
            raise InputError(
                "--max-growth limits growth over a baseline: give --baseline with the report.json of a good run."
            )

    @property
    def growth(self) -> Mapping[str, float]:
        """Allowed growth of every figure that is compared."""
        if self.baseline is None:
            return {}
        default = _default_growth(self.baseline)
        if self.max_growth is not None:
            return {**dict.fromkeys(default, self.max_growth), **self.gate.growth}
        return self.gate.growth or default

    @property
    def compares_losses(self) -> bool:
        """Whether a figure of the total loss is compared."""
        return any(GROWING[key].loss for key in self.growth)

    def check_text(self, digest: str, source: str) -> None:
        """Refuse a baseline that cannot be compared, before anything is measured.

        Args:
            digest: sha256 of the token ids that will be read.
            source: where they come from.

        Raises:
            InputError: the baseline was measured on other text, or has no total loss.
        """
        if self.baseline is None or not self.compares_losses:
            return
        known = self.baseline.accuracy
        if known.evaluation.digest != digest:
            raise InputError(
                f"{self.baseline_name} was measured on other text ({known.evaluation.source}, sha256 "
                f"{known.evaluation.digest[:12]}…) than this folder is ({source}, {digest[:12]}…): their losses do "
                "not compare. Make the baseline again on this text."
            )
        if known.total is None:
            raise InputError(
                f"{self.baseline_name} has no total loss to compare with ({known.reference_absent}). Make it again "
                "with the original model at hand."
            )

    def apply(self, report: Report) -> Report:
        """The report with the criteria of bytes and growth behind its own.

        Raises:
            InputError: see `check_text`; or this report has no total loss.
        """
        self.check_text(report.accuracy.evaluation.digest, report.accuracy.evaluation.source)
        criteria = list(report.accuracy.gate.criteria)
        for key, limit in self.gate.sizes.items():
            size, what = BYTE_LIMITS[key]
            count = getattr(report.sizes, size)
            value = math.nan if count is None else float(count)
            criteria.append(criterion(key, value, float(limit), "at most", what))
        if self.baseline is not None:
            criteria += [_growth(report, self.baseline, key, allowed) for key, allowed in self.growth.items()]
        passed = all(one.passed for one in criteria)
        return replace(report, accuracy=replace(report.accuracy, gate=GateResult(tuple(criteria), passed)))


# -- growth --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growing:
    """A figure that can be held against a baseline.

    Attributes:
        read: its value in a report.
        what: it is, in words.
        loss: it is a figure of the total loss, which only compares on the same text.
    """

    read: Callable[[Report], float]
    what: str
    loss: bool


def _default_growth(baseline: Report) -> Mapping[str, float]:
    """Of a model that gives embeddings, the cosine takes the place of the divergence, which it does not have."""
    total = baseline.accuracy.total
    if total is None or total.comparison.divergence is not None:
        return DEFAULT_GROWTH
    return {("cosine_distance" if key == "kl" else key): value for key, value in DEFAULT_GROWTH.items()}


def _kl(report: Report) -> float:
    noise, total = report.accuracy.noise.comparison.divergence, _total(report).divergence
    if total is None:
        raise _no_figure("KL divergence")
    return _above_noise(total.mean.value, None if noise is None else noise.mean.value)


def _cosine_distance(report: Report) -> float:
    noise = report.accuracy.noise.comparison.cosine
    distance = 1.0 - _value(_total(report).cosine, "cosine")
    return _above_noise(distance, None if noise is None else 1.0 - noise.value)


def _above_noise(value: float, noise: float | None) -> float:
    """A loss below the numerical noise is arithmetic: it may come and go."""
    return value if noise is None or not math.isfinite(noise) else max(value, noise)


def _value(figure: Estimate | None, what: str) -> float:
    if figure is None:
        raise _no_figure(what)
    return figure.value


def _no_figure(what: str) -> InputError:
    return InputError(f"Growth of the {what} cannot be measured: a model of this kind has none.")


def _total(report: Report) -> Comparison:
    if report.accuracy.total is None:
        raise InputError(
            f"Growth of the loss cannot be measured: there is no total loss ({report.accuracy.reference_absent}). "
            "Give the original model with --reference."
        )
    return report.accuracy.total.comparison


GROWING: Final[Mapping[str, Growing]] = MappingProxyType(
    {
        "kl": Growing(_kl, "mean KL divergence from the original in nats", True),
        "perplexity_ratio": Growing(
            lambda report: _value(_total(report).perplexity_ratio, "perplexity"),
            "perplexity over the original's",
            True,
        ),
        "top1_disagreement": Growing(
            lambda report: 1.0 - _value(_total(report).top1_agreement, "share of the same choices"),
            "share of positions without the original's most likely token",
            True,
        ),
        "cosine_distance": Growing(
            _cosine_distance, "one minus the mean cosine to the original's embeddings", True
        ),
        "bytes": Growing(lambda report: float(report.sizes.artifact), "bytes of all files", False),
        "weight_bytes": Growing(
            lambda report: float(report.sizes.weights), "bytes of the weights in the file", False
        ),
    }
)
"""What can be held against a baseline, by its key in a gate file."""


def _growth(report: Report, baseline: Report, key: str, allowed: float) -> Criterion:
    figure = GROWING[key]
    before, now = figure.read(baseline), figure.read(report)
    limit = before * (1 + allowed)
    grown = f"{(now / before - 1) * 100:+.2f} %" if before > 0 else "from nothing"
    return criterion(
        f"{key}_growth",
        now,
        limit if figure.loss else float(math.floor(limit)),
        "at most",
        f"{figure.what}, {shown(before)} in the baseline ({grown}, allowed +{allowed * 100:g} %)",
    )


# -- values --------------------------------------------------------------------------------------------


def _limit(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where} = {value!r} is not a number.")
    if not 0 <= value < _HUGE:
        raise InputError(f"{where} = {value!r}: a limit is a number from 0 on; leave it out for none.")
    return float(value)


def _size(value: Any, where: str) -> int:
    if isinstance(value, str):
        size = size_in_bytes(value)
        if size is not None:
            return size
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise InputError(f'{where} = {value!r} is not a size: give bytes, or a text such as "1.5MB".')
