"""Text that a model wrote, and how fast it came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """Text, and how fast it came.

    Attributes:
        text: what was generated, without the prompt.
        tokens: its ids.
        prompt_tokens: how many tokens the prompt had.
        prompt_seconds: time until the first token.
        seconds: time for the tokens after the first.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, without the prompt; 0 when fewer than two tokens were made."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else 0.0
