"""COMPOT's alternation here against the same alternation with `torch.linalg.svd` in every round.

Interleaved in one process with one number of threads, so that a busy machine hits all alike; ratios are taken
within a repetition and their median is printed. Time is processor time, all threads added up: what other
programs do meanwhile does not count, and two threads that wait for each other do.

* the textbook with its rounds in float64, as whitening is, and with its rounds in float32, which is faster;
* the same number of rounds here (`paper_exact`), never stopped early;
* with Newton steps, for as many rounds as it takes to reach the float64 textbook's objective;
* with momentum, the default, likewise.

All begin at the same principal directions, whiten and unwhiten, so only the rounds differ. "Rounds" is the
time of a run less that of the same run without any round. Every objective is computed in float64 from the
final dictionary. It is sensitive: the same textbook from starting points that differ by 1e-6 is listed too.

    OMP_NUM_THREADS=1 python benchmarks/factorize.py
    OMP_NUM_THREADS=2 python benchmarks/factorize.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from compot_deploy.core.grid import Pattern
from compot_deploy.numerics.compot import compot
from compot_deploy.numerics.factors import Alternation
from compot_deploy.numerics.spectrum import principal_directions
from compot_deploy.numerics.whiten import Whitening, whiten


def textbook(
    weight: Tensor,
    whitening: Whitening,
    atoms: int,
    kept: int,
    rounds: int,
    dtype: torch.dtype,
    disturbance: float = 0.0,
) -> float:
    """Relative squared error, in float64, after `rounds` rounds of thresholding and Procrustes by SVD."""
    whitened = whitening.apply(weight)
    dictionary = principal_directions(whitened, atoms)
    if disturbance:
        noise = torch.randn(dictionary.shape, dtype=dictionary.dtype)
        dictionary = torch.linalg.qr(dictionary + disturbance * noise / noise.norm(dim=0)).Q
    target, dictionary = (whitened / whitened.norm()).to(dtype), dictionary.to(dtype)
    for _ in range(rounds):
        codes = largest(dictionary.T @ target, kept)
        u, _, vt = torch.linalg.svd(target @ codes.T, full_matrices=False)
        dictionary = u @ vt
    dictionary = dictionary.double()
    codes = largest(dictionary.T @ whitened, kept)
    whitening.unapply(dictionary)
    return float((whitened - dictionary @ codes).square().sum() / whitened.square().sum())


def largest(coefficients: Tensor, kept: int) -> Tensor:
    """The `kept` largest magnitudes of every column."""
    where = coefficients.abs().topk(kept, dim=0, sorted=False).indices
    return torch.zeros_like(coefficients).scatter(0, where, coefficients.gather(0, where))


def main() -> None:
    """Print seconds, ratios to both textbooks, and objectives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--atoms", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    parser.add_argument("--disturbed", type=int, default=0, help="textbooks from disturbed starts, not timed")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    # Activations and weights with the decaying spectra that trained layers have.
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    m, n, k = arguments.inputs, arguments.outputs, arguments.atoms
    mixing = torch.randn(m, m, generator=generator) * torch.logspace(0, -2, m)
    tokens = torch.randn(4 * m, m, generator=generator) @ mixing
    weight = torch.randn(m, n, generator=generator) * torch.logspace(0, -0.5, n)
    whitening = whiten(tokens.T @ tokens)
    pattern = Pattern(k // 2, k)

    def here(rounds: int, *, how: Alternation) -> float:
        factors = compot(weight, whitening, k, pattern, replace(how, rounds=rounds))
        if len(factors.objective) - 1 < rounds:
            print(f"stopped after {len(factors.objective) - 1} of {rounds} rounds")
        return factors.error**2

    def svd(rounds: int, dtype: torch.dtype) -> float:
        return textbook(weight, whitening, k, k // 2, rounds, dtype)

    # Nothing is refined afterwards: the alternation is what is compared.
    plain = Alternation(tolerance=0.0, refinements=0)
    goal, turns = svd(arguments.rounds, torch.float64), arguments.rounds

    def enough(how: Alternation) -> int:
        history = compot(weight, whitening, k, pattern, how).objective
        return next((turn for turn, lost in enumerate(history) if lost <= goal), turns)

    published = replace(plain, paper_exact=True)
    newton = replace(plain, newton=turns, rounds=turns)
    ways: dict[str, tuple[int, Callable[[int], float]]] = {
        "SVD, float64 rounds": (turns, partial(svd, dtype=torch.float64)),
        "SVD, float32 rounds": (turns, partial(svd, dtype=torch.float32)),
        "compot, paper_exact": (turns, partial(here, how=published)),
        "compot, Newton": (enough(newton), partial(here, how=newton)),
        "compot, momentum": (enough(plain), partial(here, how=plain)),
    }
    whole: dict[str, list[float]] = {label: [] for label in ways}
    alone: dict[str, list[float]] = {label: [] for label in ways}
    lost: dict[str, float] = {}
    for _ in range(arguments.repeat):
        for label, (rounds, way) in ways.items():
            started = time.process_time()
            way(0)
            between = time.process_time()
            lost[label] = way(rounds)
            whole[label].append(time.process_time() - between)
            alone[label].append(whole[label][-1] - (between - started))

    def faster(times: dict[str, list[float]], label: str, reference: str) -> float:
        return median(slow / fast for slow, fast in zip(times[reference], times[label], strict=True))

    references = list(ways)[:2]
    print(f"{m} x {n}, {k} atoms, {torch.get_num_threads()} threads, median of {arguments.repeat}")
    print(f"{'':20s} rounds  seconds  (rounds)   times faster than float64 / float32 SVD   objective")
    for label, (rounds, _) in ways.items():
        ratios = [
            f"{faster(whole, label, reference):5.2f} ({faster(alone, label, reference):5.2f})"
            for reference in references
        ]
        print(
            f"{label:20s} {rounds:6d}  {median(whole[label]):7.2f}  ({median(alone[label]):6.2f})   "
            f"{'  /  '.join(ratios)}   {lost[label]:.9f}  {lost[label] / goal - 1:+.1e}"
        )
    for _ in range(arguments.disturbed):
        again = textbook(weight, whitening, k, k // 2, turns, torch.float64, disturbance=1e-6)
        print(f"SVD, float64, start disturbed by 1e-6: objective {again / goal - 1:+.1e}")


if __name__ == "__main__":
    main()
