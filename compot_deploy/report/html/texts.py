"""The section of a report with greedy continuations side by side, marked where they differ."""

from __future__ import annotations

from typing import Final

from compot_deploy.accuracy.outcome import Continuation
from compot_deploy.report.document import Report
from compot_deploy.report.html.elements import LONGEST_TEXT, html_text, page_section
from compot_deploy.report.tables import speakers

_MOST_TEXTS: Final = 12
"""Prompts that are shown."""


def text_section(report: Report) -> str:
    """The section as HTML; nothing for a report without prompts."""
    texts = report.accuracy.continuations
    if not texts:
        return ""
    shown = "".join(_text_card(text) for text in texts[:_MOST_TEXTS])
    if len(texts) > _MOST_TEXTS:
        shown += f'<p class="note">{len(texts) - _MOST_TEXTS} more prompts are in report.json.</p>'
    return page_section(
        "Texts side by side",
        '<p class="note">Greedy continuations. What differs from the first is marked from where it starts to '
        f"differ.</p>{shown}",
    )


def _text_card(text: Continuation) -> str:
    voices = speakers(text, "file")
    first = next(iter(voices))
    cards = []
    for said, who in voices.items():
        same = _shared(first, said)
        told, cut = said[:LONGEST_TEXT], "…" if len(said) > LONGEST_TEXT else ""
        rest = told[same:]
        differing = f"<mark>{html_text(rest)}</mark>" if rest and said != first else html_text(rest)
        ended = " <em>ends here</em>" if said != first and not rest and len(said) < len(first) else ""
        cards.append(
            f'<div class="voice"><h4>{" = ".join(who)}</h4>'
            f"<p>{html_text(told[:same])}{differing}{cut}{ended}</p></div>"
        )
    prompt = text.prompt[:LONGEST_TEXT]
    return (
        f'<article class="text"><p class="prompt"><span>prompt</span>{html_text(prompt)}</p>'
        f'<div class="voices">{"".join(cards)}</div></article>\n'
    )


def _shared(first: str, second: str) -> int:
    """Characters that two texts have in common from the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))
