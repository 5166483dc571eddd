"""The factorizations by name. A method is one pure function and one line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from compot_deploy.core.grid import Pattern
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.factors import Alternation, Factors
from compot_deploy.numerics.svd_llm import svd_llm
from compot_deploy.numerics.whiten import Whitening


@runtime_checkable
class Method(Protocol):
    """What every factorization looks like; concatenate weights of one input to share a dictionary."""

    def __call__(
        self,
        weight: Float[Tensor, "inputs outputs"],
        whitening: Whitening,
        atoms: int,
        pattern: Pattern,
        alternation: Alternation = ...,
    ) -> Factors:
        """Factorize `weight` into `atoms` atoms and codes of the given pattern."""
        ...


METHODS: Final[Mapping[str, Method]] = MappingProxyType({"compot": compot, "svd-llm": svd_llm})
"""By the name that ``--method`` takes."""
