"""What plans want of the matrices of one input, made: a pure function, so that inputs can be made anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compot_deploy.numerics.whiten import whiten
from compot_deploy.planning.candidates import Realized, Search, realize
from compot_deploy.planning.context import InputNumbers
from compot_deploy.planning.schemes import Scheme
from compot_deploy.quant import QUANTIZERS


@dataclass(frozen=True)
class Wanted:
    """A scheme for some matrices of one input.

    Attributes:
        names: of the matrices.
        scheme: what they become.
        quantizer: of plain grids, by name.
    """

    names: tuple[str, ...]
    scheme: Scheme
    quantizer: str


@dataclass(frozen=True)
class Order:
    """Everything that is to be made of one input; what several plans want is wanted once.

    Attributes:
        numbers: the Gram of the input, and the matrices.
        wanted: each for some of the matrices.
    """

    numbers: InputNumbers
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True)
class MadeInput:
    """What was made of one input, and what whitening found out about it.

    Attributes:
        realized: matrices and their errors.
        ridge: see `compot_deploy.numerics.whiten.Whitening`.
        escalated: likewise.
        empty: likewise.
    """

    realized: Mapping[Wanted, Realized]
    ridge: float
    escalated: bool
    empty: bool


def make_input(search: Search, order: Order) -> MadeInput:
    """Make an order."""
    weights, whitening = order.numbers.weights, whiten(order.numbers.gram)
    realized = {
        wanted: realize(
            wanted.scheme,
            {name: weights[name] for name in wanted.names},
            whitening,
            search,
            dictionary_name="+".join(wanted.names),
            quantizer=QUANTIZERS[wanted.quantizer],
        )
        for wanted in order.wanted
    }
    return MadeInput(realized, whitening.ridge, whitening.escalated, whitening.empty)
