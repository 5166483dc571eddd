"""COMPOT's alternation here against the same alternation with a full SVD in every round.

Both run interleaved in one process on the same whitened weight, so a busy machine hits both alike; the best
time of each is taken. The textbook version is all float64, as whitening is.

    python benchmarks/factorize.py
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from compot_deploy.factorize import Alternation, compot
from compot_deploy.weights import Pattern
from compot_deploy.whiten import whiten


def textbook(whitened: Tensor, atoms: int, kept: int, rounds: int) -> float:
    """Relative squared error after `rounds` rounds of thresholding and Procrustes by SVD."""
    dictionary = torch.linalg.svd(whitened, full_matrices=False).U[:, :atoms]
    codes = torch.empty(0)
    for turn in range(rounds + 1):
        coefficients = dictionary.T @ whitened
        largest = coefficients.abs().topk(kept, dim=0).indices
        codes = torch.zeros_like(coefficients).scatter(0, largest, coefficients.gather(0, largest))
        if turn < rounds:
            u, _, vt = torch.linalg.svd(whitened @ codes.T, full_matrices=False)
            dictionary = u @ vt
    return float((whitened - dictionary @ codes).square().sum() / whitened.square().sum())


def main() -> None:
    """Print both times, their ratio, and both objectives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--atoms", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    # Activations and weights with the decaying spectra that trained layers have.
    generator = torch.Generator().manual_seed(0)
    m, n, k = arguments.inputs, arguments.outputs, arguments.atoms
    mixing = torch.randn(m, m, generator=generator) * torch.logspace(0, -2, m)
    tokens = torch.randn(4 * m, m, generator=generator) @ mixing
    weight = torch.randn(m, n, generator=generator) * torch.logspace(0, -0.5, n)
    whitening = whiten(tokens.T @ tokens)
    whitened = whitening.apply(weight)
    alternation = Alternation(rounds=arguments.rounds, tolerance=0.0, paper_exact=True)

    slow, fast = [], []
    objective, reference = 0.0, 0.0
    for _ in range(arguments.repeat):
        started = time.perf_counter()
        factors = compot(weight, whitening, k, Pattern(k // 2, k), alternation)
        fast.append(time.perf_counter() - started)
        objective = factors.error**2
        started = time.perf_counter()
        reference = textbook(whitened, k, k // 2, arguments.rounds)
        slow.append(time.perf_counter() - started)
    print(f"{m} x {n}, {k} atoms, {arguments.rounds} rounds, {torch.get_num_threads()} threads")
    print(f"SVD in every round  {min(slow):7.2f} s   objective {reference:.8f}")
    print(
        f"compot              {min(fast):7.2f} s   objective {objective:.8f}   "
        f"rounds {len(factors.objective) - 1}"
    )
    print(f"ratio {min(slow) / min(fast):.2f}, relative difference {abs(objective / reference - 1):.1e}")


if __name__ == "__main__":
    main()
