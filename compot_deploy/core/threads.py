"""Threads of torch: the same numbers for any number of them.

A factorization (Cholesky, eigenvectors) and a sum are not the same for one thread and for many: LAPACK cuts the
matrix into as many parts as there are threads, and rounding follows the cut. Work that is resumed on another machine
must go on with the same numbers. And what is quantized row by row is thousands of small steps, at each of which threads
would wait for each other; where the other cores are busy that costs a hundred times the whole (see LOG.md). So these
run on one thread. Inputs know nothing of each other: they are where many cores belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body on one thread of torch."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
