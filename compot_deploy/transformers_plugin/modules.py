"""Compressed matrices as torch modules: what a transformers model is built of after factorization.

A `CompotLinear` is an ``nn.Linear`` to everybody who looks (peft wraps it, hooks find it), but its weight is
one leaf or pairs of leaves, packed (see `compot_deploy.core.packed`) and dequantized when they are used. Each leaf
is a module of its own and is *called*, so that whatever follows modules around (device maps, offloading,
hooks) works. A dictionary that several linears share belongs to the first; the others refer to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import assert_never

from compot_deploy.core.grid import DENSE, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Leaf, Matrix, Quantized
from compot_deploy.core.packed import LeafScheme, dequantize_rows, pack, unpack
from compot_deploy.errors import ArtifactError, InputError


class LeafModule(nn.Module):
    """One leaf: ``x @ weight``.

    Integers are buffers; dense floating-point values are a parameter, as in ``nn.Linear``. Made empty; see
    `fill`.

    Attributes:
        scheme: shape, grid and pattern.
    """

    def __init__(self, scheme: LeafScheme) -> None:
        super().__init__()
        self.scheme = scheme
        for name, (shape, dtype) in scheme.tensors.items():
            tensor = torch.zeros(shape, dtype=dtype)
            if name == "weight":
                self.weight = nn.Parameter(tensor)
            else:
                self.register_buffer(name, tensor)
        self._kept: Tensor | None = None
        self._is_hf_initialized = True  # nothing here is ever drawn at random

    def keep(self) -> None:
        """Dequantize once and keep the result beside the packed values, until they move or change."""
        self._kept = self.rows()

    def fill(self, leaf: Leaf) -> None:
        """Take the numbers of a leaf of this scheme."""
        scheme = self.scheme
        if LeafScheme.of(leaf, scheme.pattern) != scheme:
            raise ValueError(f"A leaf of {leaf.shape} does not fit the scheme {scheme}.")
        self._kept = None
        with torch.no_grad():
            for name, tensor in pack(leaf, scheme.pattern).items():
                getattr(self, name).copy_(tensor)

    def leaf(self) -> Leaf:
        """The leaf, bit for bit."""
        return unpack(self._tensors(), self.scheme)

    def rows(self) -> Float[Tensor, "outputs inputs"]:
        """The values, transposed as ``nn.Linear`` keeps them; float32 for integers."""
        return dequantize_rows(self._tensors(), self.scheme) if self._kept is None else self._kept

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """``x @ weight``, in the type of x."""
        return functional.linear(x, self.rows().to(x.dtype))

    def extra_repr(self) -> str:
        """For printing."""
        scheme = self.scheme
        pattern = "" if scheme.pattern.is_dense else f", {scheme.pattern}"
        return f"{scheme.inputs}, {scheme.outputs}, {scheme.grid or 'float'}{pattern}"

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.scheme.tensors}

    def _apply(self, fn: Any, recurse: bool = True) -> LeafModule:
        super()._apply(fn, recurse)
        self._kept = None
        scheme = self.scheme
        if scheme.grid is None:  # model.half()
            dtype = getattr(self, "values" if scheme.sparse else "weight").dtype
            self.scheme = LeafScheme(scheme.inputs, scheme.outputs, None, scheme.pattern, dtype)
        return self


class _FrozenWeight(Tensor):
    """A dequantized weight to look at; there is nothing behind it that could be written."""

    @property
    def data(self) -> NoReturn:
        """Refuses: whoever takes the data of a weight is about to change it."""
        raise InputError(
            "The weight of a compressed linear is the product of packed factors and cannot be changed in place; "
            "keep the adapter beside it instead of merging it."
        )

    @data.setter
    def data(self, value: Tensor) -> None:
        raise InputError(
            "The weight of a compressed linear is the product of packed factors and cannot be replaced."
        )


class CompotLinear(nn.Linear):
    """``y = Σ x · dictionary · codes + bias``, or ``y = x · matrix + bias``.

    Modules are named ``dictionary0``, ``codes0``, ``dictionary1`` … for a factorized matrix, ``matrix`` for a
    plain one.

    Args:
        schemes: of the leaves: one for a plain matrix, otherwise dictionary, codes, dictionary, codes …
        bias: whether there is one.
        owner: the linear (or embedding) whose leaves are shared: the dictionaries of a factorized matrix, all
            of a plain one.
    """

    def __init__(
        self,
        schemes: Sequence[LeafScheme],
        *,
        bias: bool,
        owner: CompotLinear | CompotEmbedding | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.factorized = len(schemes) > 1
        self.in_features, self.out_features = schemes[0].inputs, schemes[-1].outputs
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_features)) if bias else None)
        # Lists hide modules from torch: a leaf is registered where it is owned, and nowhere else.
        self._chain: list[list[LeafModule]] = []
        if not self.factorized:
            leaf = LeafModule(schemes[0]) if owner is None else owner.leaves[0]
            if owner is None:
                self.add_module("matrix", leaf)
            self._chain = [[leaf]]
        for number in range(len(schemes) // 2):
            codes = LeafModule(schemes[2 * number + 1])
            if owner is None:
                dictionary = LeafModule(schemes[2 * number])
                self.add_module(f"dictionary{number}", dictionary)
            else:
                assert isinstance(owner, CompotLinear)
                dictionary = owner._chain[number][0]
            self.add_module(f"codes{number}", codes)
            self._chain.append([dictionary, codes])
        self._is_hf_initialized = True

    @classmethod
    def of(
        cls,
        matrix: Matrix,
        bias: Tensor | None = None,
        *,
        owner: CompotLinear | CompotEmbedding | None = None,
    ) -> CompotLinear:
        """A linear that holds a matrix, packed.

        Args:
            matrix: what to hold.
            bias: shape (out,).
            owner: see the class.
        """
        made = cls(schemes_of(matrix), bias=bias is not None, owner=owner)
        made.fill(matrix)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone())
        return made

    @property
    def leaves(self) -> tuple[LeafModule, ...]:
        """All leaves, in the order of `compot_deploy.core.matrix.leaves`, shared ones included."""
        return tuple(leaf for chain in self._chain for leaf in chain)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:  # type: ignore[override]
        """The product, multiplied out; computed at each access, and not to be changed."""
        total: Tensor | None = None
        for chain in self._chain:
            rows = chain[-1].rows()
            if len(chain) == 2:
                rows = rows @ chain[0].rows().to(rows.dtype)
            total = rows if total is None else total + rows
        assert total is not None
        dtype = total.dtype if self.bias is None else self.bias.dtype
        return total.detach().to(dtype).as_subclass(_FrozenWeight)

    def fill(self, matrix: Matrix) -> None:
        """Take the numbers of a matrix; shared leaves are left to their owner."""
        own = {id(leaf) for leaf in self.children()}
        for module, leaf in zip(self.leaves, _leaves(matrix), strict=True):
            if id(module) in own:
                module.fill(leaf)

    def matrix_of(self, dictionary_name: str) -> Matrix:
        """The matrix, bit for bit.

        Args:
            dictionary_name: for `FactorPair.dictionary_name`.
        """
        if not self.factorized:
            return self._chain[0][0].leaf()
        return Factorized(
            tuple(
                FactorPair(dictionary.leaf(), codes.leaf(), dictionary_name, codes.scheme.pattern)
                for dictionary, codes in self._chain
            )
        )

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """``x @ weight + bias``, factor by factor."""
        total: Tensor | None = None
        for chain in self._chain:
            y = x
            for leaf in chain:
                y = leaf(y)
            total = y if total is None else total + y
        assert total is not None
        return total if self.bias is None else total + self.bias.to(total.dtype)

    def extra_repr(self) -> str:
        """For printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class CompotEmbedding(nn.Embedding):
    """A token table (hidden, vocabulary), packed; only the rows that are asked for are dequantized.

    Args:
        scheme: of the table; it cannot be sparse.
        padding_idx: as in ``nn.Embedding``; kept for whoever asks.
        dtype: of what comes out.
        scale: rows are multiplied with it, as in Gemma; None leaves them.
        owner: the embedding whose table this one looks up as well.
    """

    def __init__(
        self,
        scheme: LeafScheme,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
        owner: CompotEmbedding | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = scheme.outputs, scheme.inputs
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        leaf = LeafModule(scheme) if owner is None else owner.leaves[0]
        if owner is None:
            self.add_module("matrix", leaf)
        self._leaves = [leaf]  # a list hides it from torch, as in `CompotLinear`
        self.scale = scale
        # Holds no number, only follows the model's type and device.
        self._like: Tensor
        self.register_buffer("_like", torch.zeros(0, dtype=dtype), persistent=False)
        self._is_hf_initialized = True

    @property
    def leaves(self) -> tuple[LeafModule, ...]:
        """The table."""
        return tuple(self._leaves)

    @property
    def weight(self) -> Float[Tensor, "vocabulary hidden"]:  # type: ignore[override]
        """The whole table, dequantized; not to be changed."""
        return self.leaves[0].rows().detach().to(self._like.dtype).as_subclass(_FrozenWeight)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:
        """Rows of the table."""
        leaf = self.leaves[0]
        scheme = leaf.scheme
        flat = input.reshape(-1)
        rows = {name: getattr(leaf, name)[flat] for name in scheme.tensors}
        values = dequantize_rows(rows, scheme)
        found = values.to(self._like.dtype).view(*input.shape, scheme.inputs)
        # Rounded to the type of the model first, as transformers does.
        return found if self.scale is None else found * torch.tensor(self.scale, dtype=found.dtype)

    def extra_repr(self) -> str:
        """For printing."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def schemes_of(matrix: Matrix) -> tuple[LeafScheme, ...]:
    """Schemes of the leaves of a matrix, patterns included."""
    match matrix:
        case Dense() | Quantized():
            return (LeafScheme.of(matrix),)
        case Factorized():
            return tuple(
                LeafScheme.of(leaf, pattern)
                for pair in matrix.pairs
                for leaf, pattern in _with_patterns(pair)
            )
        case _:
            assert_never(matrix)


def _with_patterns(pair: FactorPair) -> tuple[tuple[Leaf, Pattern], ...]:
    return ((pair.dictionary, DENSE), (pair.codes, pair.pattern))


def _leaves(matrix: Matrix) -> tuple[Leaf, ...]:
    if isinstance(matrix, Factorized):
        return tuple(leaf for pair in matrix.pairs for leaf in (pair.dictionary, pair.codes))
    return (matrix,)


def looks_up_rows(module: nn.Module) -> bool:
    """Whether an embedding gives rows of its table, or one multiple of them, and nothing else."""
    return type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")


def row_scale(module: nn.Module) -> float | None:
    """What an embedding multiplies its rows with; None if it leaves them.

    Raises:
        ArtifactError: it does something else, or does not say its factor.
    """
    if type(module) is nn.Embedding:
        return None
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if not looks_up_rows(module) or scale is None or (isinstance(scale, Tensor) and scale.is_meta):
        raise ArtifactError(
            f"config.json lists a {type(module).__name__}, which does more than to look up rows. Export the model "
            "again with --embeddings none."
        )
    return float(scale)
