"""What MkDocs does for this site besides its own: formulas, and pages that do not exist yet.

Formulas are written in LaTeX between dollar signs and become MathML, which browsers draw by themselves: no script,
no font, no network.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_LOG = logging.getLogger("mkdocs.hooks.compot")
_FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ ]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])", re.DOTALL)
_ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)|<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="(https?:[^"]+)"""
)


def on_config(config: Any) -> Any:
    """Leave entries of the navigation out whose page is not there."""
    config["nav"] = _existing(config["nav"], Path(config["docs_dir"]))
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Formulas to markers, so that Markdown does not take their underscores for emphasis."""
    page.meta["formulas"] = formulas = []

    def keep(match: re.Match[str]) -> str:
        block = match.group(1) is not None
        formulas.append(
            convert((match.group(1) or match.group(2)).strip(), display="block" if block else "inline")
        )
        return f"\n\nFORMULA{len(formulas) - 1}X\n\n" if block else f"FORMULA{len(formulas) - 1}X"

    parts = _FENCE.split(markdown)
    # Every second part is code.
    return "".join(part if number % 2 else _MATH.sub(keep, part) for number, part in enumerate(parts))


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Markers to formulas."""
    return re.sub(r"FORMULA(\d+)X", lambda match: page.meta["formulas"][int(match.group(1))], html)


def on_post_build(config: Any) -> None:
    """Refuse a site that loads anything from elsewhere."""
    for page in sorted(Path(config["site_dir"]).rglob("*.html")):
        for found in _ELSEWHERE.findall(page.read_text(encoding="utf-8")):
            _LOG.warning("%s loads %s from elsewhere.", page.name, found)


def _existing(nav: list[Any], folder: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _existing(target, folder)})
        elif (folder / target).is_file():
            kept.append(entry)
        else:
            _LOG.info("There is no page %s; its entry is left out.", target)
    return kept
