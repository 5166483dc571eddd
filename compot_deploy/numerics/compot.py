"""COMPOT: a weight matrix as an orthonormal dictionary times sparse codes, without training.

Source: COMPOT (arXiv 2602.15200). Letters: ``W~ = LᵀW`` the whitened weight (m × n), ``D`` the dictionary
(m × k, ``DᵀD = I``), ``S`` the codes (k × n, sparse), ``A = L⁻ᵀD`` the dictionary that is deployed,
``Ŵ = A S``. The problem is ``min ‖W~ − D S‖²``, and for orthonormal D both halves have exact solutions:

* codes: the largest entries of ``DᵀW~``, as many as the pattern keeps (hard thresholding);
* dictionary: the polar factor of ``W~Sᵀ`` (orthogonal Procrustes).

Departures, which `Alternation.paper_exact` switches off. The alternation converges slowly, so the matrix
whose polar factor is taken is extrapolated, ``W~Sᵀ`` plus its last change: eight such rounds reach what
twenty plain ones do, at no cost per round; a round that overshoots is taken back and repeated plainly. Five
Newton steps (`newton`) reach it too, each at three quarters of the cost, and then fall behind. When
the alternation is over, orthogonality has done its work and is dropped: the dictionary becomes the
least-squares one (ROCKET, arXiv 2602.11008) and the non-zeros are re-fitted on their support (GeoPair, arXiv
2609.25963), in turns; same bytes, never more error.

Precision: the alternation multiplies in float32 and takes the polar factor in float64. The codes of a
round enter only through *which* entries are kept, and the objective of a round, ``‖W~‖² − ‖S‖²``, is summed
in float64; a round that does not lower it is not kept. What leaves this module was computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from compot_deploy.core.grid import DENSE, Pattern
from compot_deploy.errors import InputError, RecipeError
from compot_deploy.numerics.newton import Newton
from compot_deploy.numerics.whiten import Whitening, relative_error


@dataclass(frozen=True)
class Alternation:
    """How long to alternate, and whether to improve on the published method afterwards.

    Attributes:
        rounds: codes and dictionary, at most this often; 20 as in the paper.
        tolerance: a round that lowers the squared error by less than this part of the weight's energy is
            the last. 1e-7 is where float32 products stop telling better from worse.
        momentum: how much of the last change of ``W~Sᵀ`` is added to it. 1 is best on trained weights; 2
            overshoots, 0 is the paper's alternation.
        newton: how many of the rounds, from the first, are Newton steps. Five of them reach what twenty
            rounds of the paper do; after ten or more rounds those with momentum have gone further.
        refinements: turns of {re-fit codes, least-squares dictionary} afterwards; the third still gains
            about 0.5 % of the error, the fourth nothing that can be measured. 0 leaves the dictionary
            orthonormal.
        arrangements: times that atoms are put into another order for a pattern of neighbours, each followed by
            rounds; see `arrange`.
        paper_exact: no momentum, no Newton steps, and leave the dictionary orthonormal and the codes as
            thresholded.
    """

    rounds: int = 20
    tolerance: float = 1e-7
    momentum: float = 1.0
    newton: int = 0
    refinements: int = 3
    arrangements: int = 1
    paper_exact: bool = False

    def __post_init__(self) -> None:
        if (
            min(self.rounds, self.newton, self.refinements, self.tolerance, self.momentum, self.arrangements)
            < 0
        ):
            raise RecipeError(
                f"Rounds ({self.rounds}), Newton steps ({self.newton}), refinements ({self.refinements}), "
                f"tolerance ({self.tolerance}) and momentum ({self.momentum}) of the factorization cannot be "
                "negative."
            )


_SHORT: Final = 10
"""Rounds up to which a run that begins with Newton steps ends lower than one without."""


def alternation_of(rounds: int, *, paper_exact: bool = False) -> Alternation:
    """The best alternation of that many rounds: short ones begin with five Newton steps."""
    return Alternation(rounds=rounds, newton=5 if rounds <= _SHORT else 0, paper_exact=paper_exact)


@dataclass(frozen=True)
class Factors:
    """A weight as ``dictionary @ codes``, in full precision.

    Attributes:
        dictionary: A = L⁻ᵀD, shape (in, k), float64: multiplies the activations as they are.
        codes: S, shape (k, out), float64; exactly zero outside of `support`.
        support: entries of the codes that the pattern keeps, exactly as many as it says in every group.
        pattern: which codes may be non-zero.
        error: relative whitened error ``‖X(W − A S)‖ / ‖X W‖``.
        objective: relative squared whitened error after each round of the alternation, never rising.
        converged: the alternation ended by itself, before its last allowed round.
    """

    dictionary: Float64[Tensor, "inputs atoms"]
    codes: Float64[Tensor, "atoms outputs"]
    support: Bool[Tensor, "atoms outputs"]
    pattern: Pattern
    error: float
    objective: tuple[float, ...] = ()
    converged: bool = True

    @property
    def atoms(self) -> int:
        """k, the number of atoms."""
        return self.dictionary.shape[1]


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


def compot(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    atoms: int,
    pattern: Pattern,
    alternation: Alternation = Alternation(),
) -> Factors:
    """COMPOT with an SVD initialisation; by default its result is then refined by least squares.

    Any shape, from one atom to as many as inputs; a weight of rank below `atoms` is met exactly.

    Args:
        weight: W, shape (in, out).
        whitening: of the inputs.
        atoms: k, at most the number of inputs.
        pattern: of the codes; ``Pattern(s, k)`` is the paper's, s of all atoms in each column.
        alternation: length and departures from the paper.

    Raises:
        RecipeError: more atoms than inputs, or a pattern that does not divide them.
        InputError: a weight with NaN or infinity.
    """
    _check(weight, whitening, atoms, pattern)
    whitened = whitening.apply(weight)
    energy = float(whitened.square().sum())
    rows = whitened.shape[0]
    if energy == 0.0:
        return _zero(whitening, weight.shape[1], atoms, pattern)
    rotation = None
    if rows > whitened.shape[1] and atoms <= whitened.shape[1]:
        # All that matters of a tall matrix lies in the span of its columns.
        rotation, whitened = torch.linalg.qr(whitened)

    # A start is only a start; where five rounds have to do, half its time is worth saving.
    start = whitened.float() if alternation.newton and not alternation.paper_exact else whitened
    dictionary = _spread(principal_directions(start, atoms).double(), pattern)
    objective: tuple[float, ...] = ()
    for number in range(1 + alternation.arrangements if _arrangeable(pattern, atoms) else 1):
        if number:
            dictionary = dictionary[:, arrange(dictionary.T @ whitened, pattern)]
        dictionary, further, converged = _alternate(whitened, dictionary, pattern, alternation)
        objective += tuple(value for value in further if not objective or value < objective[-1])

    # The support once more in float64: at a near tie float32 may have chosen the smaller entry.
    codes, support = threshold(dictionary.T @ whitened, pattern)
    if alternation.refinements and not alternation.paper_exact and not pattern.is_dense:
        dictionary, codes = refine(whitened, dictionary, codes, support, alternation.refinements)
    error = relative_error(whitened, whitened - dictionary @ codes)
    if rotation is not None:
        dictionary = rotation @ dictionary
    return Factors(whitening.unapply(dictionary), codes, support, pattern, error, objective, converged)


def arrange(coefficients: Float[Tensor, "atoms outputs"], pattern: Pattern) -> Int64[Tensor, " atoms"]:
    """An order of atoms in which a pattern of neighbours keeps more of the coefficients' energy.

    The order of atoms is free, but a pattern keeps only so many of each group of neighbours, so atoms that are
    large in the same outputs should not be neighbours. Two atoms of different groups are swapped where that
    keeps more, the best swaps first, until none does. What a group keeps when one of its members is another atom
    follows from the others alone: their largest, and what the atom exceeds the last of those by.

    Args:
        coefficients: of an orthonormal dictionary, so that what is kept is what the objective gains.
        pattern: of neighbours.

    Returns:
        Old numbers of the atoms in their new order, which never keeps less than the given one.
    """
    atoms, outputs = coefficients.shape
    order = torch.arange(atoms, device=coefficients.device)
    squares = coefficients.double().square()
    some = squares[:, :: max(1, outputs // _ARRANGED_OUTPUTS)].float()
    kept = _kept_energy(squares, pattern)
    for _ in range(_ARRANGEMENT_SWEEPS):
        swapped = order.clone()
        for first, second in _best_swaps(some[order], pattern):
            swapped[[first, second]] = swapped[[second, first]]
        now = _kept_energy(squares[swapped], pattern)
        if now <= kept * (1 + 1e-7):
            break
        order, kept = swapped, now
    return order


def _best_swaps(squares: Float[Tensor, "atoms outputs"], pattern: Pattern) -> list[tuple[int, int]]:
    """Swaps that keep more, no group in two of them, so that their gains add up."""
    atoms, outputs = squares.shape
    groups = squares.view(-1, pattern.of, outputs)
    energy = groups.topk(pattern.kept, dim=1).values.sum((1, 2)).repeat_interleave(pattern.of)
    bases, bars = [], []
    for member in range(pattern.of):
        others = torch.cat((groups[:, :member], groups[:, member + 1 :]), dim=1)
        largest = others.topk(pattern.kept, dim=1).values
        bases.append(largest.sum((1, 2)))
        bars.append(largest[:, -1])
    base, bar = torch.stack(bases, 1).flatten(), torch.stack(bars, 1).flatten(0, 1)
    step = max(1, _ARRANGEMENT_NUMBERS // squares.numel())
    instead = torch.cat(
        [
            (squares[None] - bar[start : start + step, None]).clamp_min_(0.0).sum(-1)
            for start in range(0, atoms, step)
        ]
    )
    instead = instead + base[:, None]  # what the group of the row keeps with the atom of the column instead
    gain = instead + instead.T - energy[:, None] - energy[None]
    group = torch.arange(atoms, device=squares.device) // pattern.of
    gain = torch.where(group[:, None] < group[None], gain, 0.0).flatten()
    found: list[tuple[int, int]] = []
    used: set[int] = set()
    for place in torch.argsort(gain, descending=True, stable=True)[: 64 * atoms].tolist():
        first, second = divmod(place, atoms)
        if float(gain[place]) <= 1e-9 * float(energy[0]):
            break
        pair = {first // pattern.of, second // pattern.of}
        if not used & pair:
            used |= pair
            found.append((first, second))
    return found


def _kept_energy(squares: Float64[Tensor, "atoms outputs"], pattern: Pattern) -> float:
    return float(squares.view(-1, pattern.of, squares.shape[1]).topk(pattern.kept, dim=1).values.sum())


def _arrangeable(pattern: Pattern, atoms: int) -> bool:
    """Whether the order of atoms matters: a pattern of neighbours, more than one group of them."""
    return not pattern.is_dense and pattern.of < atoms


def _alternate(
    whitened: Float64[Tensor, "rows outputs"],
    dictionary: Float64[Tensor, "rows atoms"],
    pattern: Pattern,
    alternation: Alternation,
) -> tuple[Float64[Tensor, "rows atoms"], tuple[float, ...], bool]:
    """Rounds of coding and Procrustes from an orthonormal dictionary.

    Returns:
        The orthonormal dictionary of the last round that was kept, the objective after each of those, and
        whether the alternation ended by itself.
    """
    target = (
        (whitened / whitened.norm()).float().T.contiguous()
    )  # outputs first: a column's codes lie together
    momentum = 0.0 if alternation.paper_exact else alternation.momentum
    newton = Newton() if alternation.newton and not alternation.paper_exact else None
    coefficients = target @ dictionary.float()
    codes = _keep(coefficients, pattern)
    objective = [_lost(codes)]
    product = target.T @ codes
    previous = product
    for turn in range(alternation.rounds):
        pushed = previous is not product
        found = None
        if newton is not None and turn < alternation.newton:
            found = newton.step(dictionary.float(), coefficients, codes, product)
        else:
            newton = None
        if found is None:
            wanted = product + momentum * (product - previous) if pushed else product
            candidate = _polar(wanted.double())  # orthonormal to 1e-8: all that float32 products can use
        else:
            candidate = found.double()
        following_coefficients = target @ candidate.float()
        following_codes = _keep(following_coefficients, pattern)
        gain = objective[-1] - _lost(following_codes)
        if gain > 0:
            dictionary, coefficients, codes = candidate, following_coefficients, following_codes
            objective.append(objective[-1] - gain)
            following = target.T @ codes
            previous, product = (product if momentum and newton is None else following), following
        if newton is not None:
            if found is not None and gain > alternation.tolerance:
                newton.keep()
            elif found is None or not newton.forget():
                newton = None  # from here on Procrustes
        elif gain <= alternation.tolerance:
            if not pushed:
                return _nearer(dictionary), tuple(objective), True
            previous = product  # overshot: once more without
    return _nearer(dictionary), tuple(objective), False


def svd_llm(
    weight: Float[Tensor, "inputs outputs"],
    whitening: Whitening,
    atoms: int,
    pattern: Pattern = DENSE,
    alternation: Alternation = Alternation(),
) -> Factors:
    """Truncated SVD of the whitened weight (SVD-LLM, arXiv 2403.07378): the best of rank `atoms`.

    Args:
        weight: W, shape (in, out).
        whitening: of the inputs.
        atoms: rank.
        pattern: must be dense.
        alternation: not used; the solution is closed.

    Raises:
        RecipeError: a sparse pattern, or more atoms than inputs.
        InputError: a weight with NaN or infinity.
    """
    if not pattern.is_dense:
        raise RecipeError(f"svd-llm has dense codes and cannot keep {pattern}: use the method compot.")
    _check(weight, whitening, atoms, pattern)
    whitened = whitening.apply(weight)
    if not bool(whitened.any()):
        return _zero(whitening, weight.shape[1], atoms, pattern)
    dictionary = principal_directions(whitened, atoms)
    codes = dictionary.T @ whitened
    error = relative_error(whitened, whitened - dictionary @ codes)
    support = torch.ones_like(codes, dtype=torch.bool)
    return Factors(whitening.unapply(dictionary), codes, support, pattern, error, (error**2,))


_ARRANGED_OUTPUTS: Final = 1024
"""Outputs that swaps are looked for on, evenly spread; whether they pay is decided on all."""

_ARRANGEMENT_SWEEPS: Final = 24
_ARRANGEMENT_NUMBERS: Final = 1 << 24
"""Numbers in memory at a time while all swaps are valued: 64 MB."""

METHODS: Final[Mapping[str, Method]] = MappingProxyType({"compot": compot, "svd-llm": svd_llm})


def threshold(
    coefficients: Float[Tensor, "atoms outputs"], pattern: Pattern
) -> tuple[Float[Tensor, "atoms outputs"], Bool[Tensor, "atoms outputs"]]:
    """The largest coefficients of every group of the pattern, and where they are.

    Optimal codes for an orthonormal dictionary. Exactly ``pattern.kept`` entries are kept in each group and
    column; of equal magnitudes the one of the earlier atom.

    Returns:
        The coefficients with all others set to zero, and the support.
    """
    support = _largest(coefficients.T.contiguous(), pattern).T.contiguous()
    return torch.where(support, coefficients, 0.0), support


def _largest(coefficients: Float[Tensor, "outputs atoms"], pattern: Pattern) -> Bool[Tensor, "outputs atoms"]:
    """Where the largest magnitudes of each group of neighbours in a row are, exactly as many as are kept."""
    if pattern.is_dense:
        return torch.ones_like(coefficients, dtype=torch.bool)
    magnitude = coefficients.abs().unflatten(1, (-1, pattern.of))
    # NaN never gets here (`_check`), so the order is total.
    bar = magnitude.kthvalue(pattern.of - pattern.kept + 1, dim=-1, keepdim=True).values
    kept = magnitude >= bar
    if int(torch.count_nonzero(kept)) > coefficients.numel() // pattern.of * pattern.kept:
        # Ties at the bar: all above it stay, of those at it as many as are missing, earliest first.
        above = magnitude > bar
        tied = magnitude == bar
        missing = pattern.kept - above.sum(-1, keepdim=True)
        kept = above | (tied & (tied.cumsum(-1) <= missing))
    return kept.flatten(1)


def _keep(coefficients: Float[Tensor, "outputs atoms"], pattern: Pattern) -> Float[Tensor, "outputs atoms"]:
    """The largest magnitudes of each group, all others set to zero."""
    return coefficients * _largest(coefficients, pattern)


def polar(matrix: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """The matrix with orthonormal columns nearest to `matrix`: ``U Vᵀ`` of its thin SVD ``U Σ Vᵀ``.

    It maximises ``tr(DᵀM)``, the Procrustes problem. Taken from the small Gram ``MᵀM = V Σ² Vᵀ`` as
    ``M V Σ⁻¹ Vᵀ``; a Gram squares the condition, so singular values below 1e-4 of the largest are taken from
    the Gram of what is left when the others are removed, and so on. Directions without any energy are
    completed to an orthonormal basis. On CUDA Newton–Schulz iterations replace the eigenvectors wherever
    they converge, because matrix products are what a GPU is good at.

    Args:
        matrix: M, at least as many rows as columns.
    """
    return _nearer(_polar(matrix))


def _polar(matrix: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """`polar`, with columns orthonormal to 1e-8 only."""
    if matrix.is_cuda:
        iterate = _newton_schulz(matrix)
        if iterate is not None:
            return iterate
    columns = matrix.shape[1]
    squares, vectors = _eigh(matrix.T @ matrix)
    if float(squares[0]) > _STRONG * float(squares[-1]):
        return matrix @ (vectors * squares.rsqrt() @ vectors.T)
    norm = float(matrix.norm())
    left = matrix.new_zeros(matrix.shape[0], 0)
    right = matrix.new_zeros(columns, 0)
    remaining, basis = matrix, torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
    while basis.shape[1]:
        if left.shape[1]:
            squares, vectors = _eigh(remaining.T @ remaining)
        limit = max(float(squares[-1]) * _STRONG, (norm * 1e-14) ** 2)
        strong = squares > limit
        if not bool(strong.any()):
            break
        scaled = remaining @ vectors[:, strong] * squares[strong].rsqrt()
        left = torch.cat([left, scaled], dim=1)
        right = torch.cat([right, basis @ vectors[:, strong]], dim=1)
        basis = basis @ vectors[:, ~strong]
        if basis.shape[1]:
            remaining = matrix @ basis
            for _ in range(2):  # the second pass removes what the first one's rounding left
                remaining = remaining - left @ (left.T @ remaining)
    found = left.shape[1]
    if found < columns:
        complete = (
            torch.linalg.qr(left, mode="complete").Q
            if found
            else torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        )
        left = torch.cat([left, complete[:, found:columns]], dim=1)
        right = torch.cat([right, basis], dim=1)
    return left @ right.T


def _eigh(symmetric: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues, rising, and eigenvectors; on one thread where torch has two.

    LAPACK's threads wait for each other again and again on the way. When the second core has other work that
    cost seven times the whole, for 512 x 512 in the median (see LOG.md); there is at most a factor of two to win.
    """
    threads = torch.get_num_threads()
    if symmetric.is_cuda or threads != 2:
        values, vectors = torch.linalg.eigh(symmetric)
        return values, vectors
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    finally:
        torch.set_num_threads(threads)
    return values, vectors


_STRONG: Final = 1e-8
"""Eigenvalues of a Gram above this part of the largest are good to eight digits."""


def _nearer(factor: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """One Newton–Schulz step: squares the distance to orthonormality, which Grams leave at 1e-8 at worst."""
    return 1.5 * factor - 0.5 * factor @ (factor.T @ factor)


def principal_directions(matrix: Float[Tensor, "rows columns"], count: int) -> Float[Tensor, "rows count"]:
    """The first `count` left singular vectors, strongest first, signs fixed; completed beyond the rank.

    From the eigenvectors of the smaller Gram.

    Args:
        matrix: any shape.
        count: at most the number of rows.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        vectors = _eigh(matrix @ matrix.T)[1].flip(1)[:, :count]
    else:
        right = _eigh(matrix.T @ matrix)[1].flip(1)[:, :count]
        # QR instead of a division by singular values: weak directions stay orthonormal.
        product = matrix @ right
        if count > columns:
            product = torch.cat([product, product.new_zeros(rows, count - columns)], dim=1)
        vectors = (
            torch.linalg.qr(product).Q
            if count <= columns
            else torch.linalg.qr(product[:, :columns], mode="complete").Q[:, :count]
        )
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def least_squares_dictionary(
    whitened: Float64[Tensor, "rows outputs"], codes: Float64[Tensor, "atoms outputs"]
) -> Float64[Tensor, "rows atoms"]:
    """``W~Sᵀ(SSᵀ + εI)⁻¹``: the best dictionary for given codes (ROCKET, eq. 8); an unused atom becomes 0."""
    gram = codes @ codes.T
    ridge = 1e-10 * float(gram.diagonal().mean())
    if ridge == 0.0:
        return torch.zeros_like(whitened[:, :1]).expand(-1, codes.shape[0]).clone()
    gram.diagonal().add_(ridge)
    lower = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(codes @ whitened.T, lower).T.contiguous()


def refit_codes(
    gram: Float64[Tensor, "atoms atoms"],
    correlation: Float64[Tensor, "atoms outputs"],
    codes: Float64[Tensor, "atoms outputs"],
    support: Bool[Tensor, "atoms outputs"],
    *,
    steps: int = 50,
    tolerance: float = 1e-8,
) -> Float64[Tensor, "atoms outputs"]:
    """Least-squares codes on a given support, for a dictionary that need not be orthonormal.

    Solves ``min ‖w − D s‖`` for every column w with s zero off its support, all columns at once, by conjugate
    gradients preconditioned with the diagonal and projected on the support. The objective falls in every
    step, so the result is never worse than `codes`, however early it stops. Singular systems are fine.

    Args:
        gram: ``DᵀD``.
        correlation: ``DᵀW~``.
        codes: where to begin; taken as zero outside the support.
        support: entries that may be non-zero.
        steps: at most.
        tolerance: on the preconditioned residual of each column, relative to its first right-hand side.
    """
    diagonal = gram.diagonal()
    inverse = torch.where(diagonal > 0, 1.0 / diagonal.clamp_min(1e-300), 0.0)[:, None] * support
    codes = codes * support
    residual = correlation - gram @ codes
    scaled = inverse * residual
    direction = scaled.clone()
    size = (residual * scaled).sum(0)
    enough = tolerance**2 * (correlation.square() * inverse).sum(0)
    for _ in range(steps):
        active = size > enough
        if not bool(active.any()):
            break
        product = gram @ direction  # `inverse` projects on the support
        curvature = (direction * product).sum(0)
        # A column that has arrived, or whose direction is in the null space, stands still.
        moving = active & (curvature > 0)
        step = torch.where(moving, size / torch.where(moving, curvature, 1.0), 0.0)
        codes = codes + step * direction
        residual = residual - step * product
        scaled = inverse * residual
        following = (residual * scaled).sum(0)
        ratio = torch.where(moving, following / torch.where(moving, size, 1.0), 0.0)
        direction = scaled + ratio * direction
        size = torch.where(moving, following, 0.0)
    return codes


def refine(
    whitened: Float64[Tensor, "rows outputs"],
    dictionary: Float64[Tensor, "rows atoms"],
    codes: Float64[Tensor, "atoms outputs"],
    support: Bool[Tensor, "atoms outputs"],
    turns: int,
) -> tuple[Float64[Tensor, "rows atoms"], Float64[Tensor, "atoms outputs"]]:
    """Least-squares dictionary, then `turns` times {codes re-fitted on their support, dictionary again}.

    Returns:
        Dictionary and codes, with no more error than the ones that came in.
    """
    best = dictionary, codes
    best_error = float((whitened - dictionary @ codes).norm())
    dictionary = least_squares_dictionary(whitened, codes)
    for turn in range(turns + 1):
        if turn:
            codes = refit_codes(dictionary.T @ dictionary, dictionary.T @ whitened, codes, support)
            dictionary = least_squares_dictionary(whitened, codes)
        error = float((whitened - dictionary @ codes).norm())
        if error >= best_error:  # rounding; or nothing left to gain
            break
        best, best_error = (dictionary, codes), error
    return best


def singular_spectrum(weight: Float[Tensor, "inputs outputs"]) -> tuple[float, ...]:
    """Singular values of ``W / ‖W‖_F``, largest first, min(in, out) of them; zeros for a zero weight."""
    work = weight.double()
    norm = float(work.norm())
    if norm == 0.0:
        return (0.0,) * min(work.shape)
    work = work / norm
    gram = work @ work.T if work.shape[0] <= work.shape[1] else work.T @ work
    squares = torch.linalg.eigvalsh(gram).clamp_min(0.0).flip(0)
    return tuple(float(value) for value in squares.sqrt())


def _check(
    weight: Float[Tensor, "inputs outputs"], whitening: Whitening, atoms: int, pattern: Pattern
) -> None:
    inputs, outputs = weight.shape
    if not 1 <= atoms <= inputs:
        raise RecipeError(
            f"A weight of {inputs} inputs and {outputs} outputs cannot have {atoms} atoms: use 1 to {inputs}."
        )
    if atoms % pattern.of:
        raise RecipeError(f"{atoms} atoms do not split into groups of {pattern.of} (pattern {pattern}).")
    if whitening.factor.shape[0] != inputs:
        raise InputError(
            f"The Gram matrix has {whitening.factor.shape[0]} inputs, the weight {inputs}: "
            "they belong to different layers."
        )
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            f"A weight of {inputs} inputs and {outputs} outputs has NaN or infinite entries: "
            "the checkpoint is damaged."
        )


def _zero(whitening: Whitening, outputs: int, atoms: int, pattern: Pattern) -> Factors:
    """Factors of a weight that is zero: orthonormal atoms, zero codes, no error."""
    factor = whitening.factor
    dictionary = torch.eye(factor.shape[0], atoms, dtype=factor.dtype, device=factor.device)
    codes, support = threshold(factor.new_zeros(atoms, outputs), pattern)
    return Factors(whitening.unapply(dictionary), codes, support, pattern, 0.0, (0.0,))


def _spread(dictionary: Float64[Tensor, "rows atoms"], pattern: Pattern) -> Float64[Tensor, "rows atoms"]:
    """Atoms dealt out so that a group of neighbours has one from each energy class (order is free).

    Sorted by energy, the first groups would hold strong atoms only and have to drop some of them.
    """
    atoms = dictionary.shape[1]
    order = torch.arange(atoms, device=dictionary.device).reshape(pattern.of, atoms // pattern.of).T
    return dictionary[:, order.flatten()]


def _lost(codes: Float[Tensor, "atoms outputs"]) -> float:
    """Relative squared error: with ``‖W~‖ = 1`` and orthonormal D it is ``1 − ‖S‖²``."""
    norm = float(torch.linalg.vector_norm(codes, dtype=torch.float64))  # widens as it adds: no copy
    return max(0.0, 1.0 - norm * norm)


def _newton_schulz(
    matrix: Float64[Tensor, "rows columns"], *, steps: int = 60
) -> Float64[Tensor, "rows columns"] | None:
    """The polar factor by ``X ← X (3I − XᵀX) / 2``; None where a direction is too weak to converge."""
    norm = torch.linalg.matrix_norm(matrix.T @ matrix).sqrt()  # no smaller than the largest singular value
    if float(norm) == 0.0:
        return None
    iterate = matrix / norm
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for step in range(steps):
        gram = iterate.T @ iterate
        if step % 5 == 4 and float((gram - identity).abs().amax()) < 1e-12:
            return iterate
        iterate = iterate @ (1.5 * identity - 0.5 * gram)
    return None
