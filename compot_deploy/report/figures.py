"""Figures as people read them: as many digits as they justify, units, and a dash where nothing was measured."""

from __future__ import annotations

import math
import re
from typing import Final

from compot_deploy.accuracy.gate import shown
from compot_deploy.accuracy.metrics import Estimate

ABSENT: Final = "—"
"""Stands in a table where nothing was or could be measured."""


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if math.isfinite(value) else ABSENT


def limit_figure(value: float) -> str:
    """A value or a limit of the gate; absent where nothing was measured."""
    return shown(value) if math.isfinite(value) else ABSENT


def estimate(measured: Estimate | None) -> str:
    """As many decimals as the standard error justifies: two of its digits."""
    if measured is None:
        return ABSENT
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


def percent(measured: Estimate | None) -> str:
    """A fraction with its standard error."""
    if measured is None or not math.isfinite(measured.value):
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


def printable(text: str) -> str:
    """Control characters and half characters as escapes: XML cannot hold them, a terminal would obey them."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Of Unicode's categories Cc and Cs, without tab and newline, and what XML forbids besides."""
