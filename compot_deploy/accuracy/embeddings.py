"""How far the embeddings of one text model are from another's; pure.

Both models read the same texts and give a vector per token. Tokens that are padding never count::

    NMSE      Σ ‖c − r‖² / Σ ‖r − mean r‖²      over all tokens; r reference, c candidate
    cosine    ⟨r̄, c̄⟩ / ‖r̄‖‖c̄‖                   of a text, r̄ and c̄ the means over its tokens

The mean over the tokens is how most sentence encoders pool. All of it in float64: a faithful file differs by 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One model against another on some texts.

    Attributes:
        nmse: normalised squared error of the token vectors.
        largest: largest difference of one number of the pooled, normalised embeddings.
        cosine: mean over the texts.
        lowest_cosine: of the worst text.
        texts: how many there were.
    """

    nmse: float
    largest: float
    cosine: float
    lowest_cosine: float
    texts: int


@dataclass(frozen=True)
class Texts:
    """What a model made of a batch of texts.

    Attributes:
        vectors: per token: hidden states, or logits.
        mask: 1 where a token is text, 0 where it is padding.
    """

    vectors: Float[Tensor, "texts tokens width"]
    mask: Int64[Tensor, "texts tokens"]

    @property
    def pooled(self) -> Float[Tensor, "texts width"]:
        """The normalised mean over the tokens of each text, float64."""
        weights = self.mask[..., None].double()
        # Not multiplied: what stands at a padded token may be NaN.
        vectors = self.vectors.double().masked_fill(weights == 0, 0.0)
        return torch.nn.functional.normalize(vectors.sum(1) / weights.sum(1), dim=-1)

    @property
    def tokens(self) -> Float[Tensor, "all_tokens width"]:
        """The vectors of all tokens that are not padding, float64."""
        return self.vectors[self.mask.bool()].double()


def compare_texts(reference: Iterable[Texts], candidate: Iterable[Texts]) -> Difference:
    """Two models on the same texts, batch by batch.

    Example:
        One text of one token, reference (1, 0) and candidate (1, 1): NMSE 1 / 0.5 = 2, cosine 1/√2.

    Raises:
        ValueError: the batches differ in number, shape or padding, or there is no text.
    """
    error = power = largest = 0.0
    cosines: list[Tensor] = []
    for first, second in zip(reference, candidate, strict=True):
        if first.vectors.shape != second.vectors.shape or not torch.equal(first.mask, second.mask):
            raise ValueError(
                f"Vectors of shape {tuple(first.vectors.shape)} and {tuple(second.vectors.shape)} "
                "(texts, tokens, width), or their padding, do not belong to the same texts."
            )
        r, c = first.tokens, second.tokens
        error += float((c - r).square().sum())
        power += float((r - r.mean(-1, keepdim=True)).square().sum())
        one, two = first.pooled, second.pooled
        largest = max(largest, float((one - two).abs().max()))
        cosines.append((one * two).sum(-1))
    if not cosines:
        raise ValueError("No text was compared.")
    cosine = torch.cat(cosines)
    return Difference(
        nmse=error / power if power else float(error > 0),
        largest=largest,
        cosine=float(cosine.mean()),
        lowest_cosine=float(cosine.min()),
        texts=len(cosine),
    )
