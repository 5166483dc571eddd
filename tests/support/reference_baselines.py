"""Slow, obvious versions of what the baselines do."""

from __future__ import annotations

import torch
from torch import Tensor


def slow_pursuit(dictionary: Tensor, column: Tensor, kept: int) -> Tensor:
    """Orthogonal matching pursuit of one column, a least-squares fit on all rows in every step."""
    chosen: list[int] = []
    left, codes = column, torch.zeros(dictionary.shape[1], dtype=column.dtype)
    for _ in range(kept):
        correlation = (dictionary.T @ left).abs()
        correlation[chosen] = -1.0
        chosen.append(int(correlation.argmax()))
        fitted = torch.linalg.lstsq(dictionary[:, chosen], column[:, None]).solution[:, 0]
        left = column - dictionary[:, chosen] @ fitted
    codes[chosen] = fitted
    return codes


def slow_atom(target: Tensor, dictionary: Tensor, codes: Tensor, number: int) -> float:
    """Squared error once an atom and its codes are the best there are: the first singular pair."""
    users = codes[number] != 0
    others = dictionary.clone()
    others[:, number] = 0.0
    left = target - others @ codes
    values = torch.linalg.svdvals(left[:, users])
    return float(left[:, ~users].square().sum() + values[1:].square().sum())


def slow_round_to_range(group: Tensor, bits: int) -> Tensor:
    """Numbers of one group and output on the grid from its smallest to its largest, zero included."""
    top = 2**bits - 1
    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
    scale = float(torch.tensor((high - low) / top).half())
    zero = max(0, min(top, round(-low / scale)))
    return torch.tensor([(max(0, min(top, round(float(x) / scale + zero))) - zero) * scale for x in group])
