"""COMPOT's alternation here against the same alternation with a full SVD in every round.

Three ways from the same whitened weight: the textbook (torch.linalg.svd in every round, float64 as whitening
is), the same rounds here (`paper_exact`), and the default here, with momentum, for as many rounds as it takes
to reach the textbook's objective. They run interleaved in one process, so a busy machine hits all alike; the
best time of each is taken.

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
    pattern = Pattern(k // 2, k)
    same = Alternation(rounds=arguments.rounds, tolerance=0.0, paper_exact=True)

    textbook_times, same_times, default_times = [], [], []
    goal, rounds = textbook(whitened, k, k // 2, arguments.rounds), arguments.rounds
    history = compot(weight, whitening, k, pattern, Alternation(rounds=rounds, tolerance=0.0)).objective
    rounds = next((turn for turn, lost in enumerate(history) if lost <= goal * (1 + 1e-4)), rounds)
    default = Alternation(rounds=rounds, tolerance=0.0, refinements=0)
    for _ in range(arguments.repeat):
        started = time.perf_counter()
        published = compot(weight, whitening, k, pattern, same)
        same_times.append(time.perf_counter() - started)
        started = time.perf_counter()
        pushed = compot(weight, whitening, k, pattern, default)
        default_times.append(time.perf_counter() - started)
        started = time.perf_counter()
        textbook(whitened, k, k // 2, arguments.rounds)
        textbook_times.append(time.perf_counter() - started)
    print(f"{m} x {n}, {k} atoms, {torch.get_num_threads()} threads")
    print("                       rounds  seconds  faster  objective   relative to textbook")
    for label, turns, times, lost in (
        ("SVD in every round", arguments.rounds, textbook_times, goal),
        ("compot, paper_exact", len(published.objective) - 1, same_times, published.objective[-1]),
        ("compot", rounds, default_times, pushed.objective[-1]),
    ):
        print(
            f"{label:22s} {turns:6d}  {min(times):7.2f}  {min(textbook_times) / min(times):6.2f}  "
            f"{lost:.8f}  {lost / goal - 1:+.1e}"
        )


if __name__ == "__main__":
    main()
