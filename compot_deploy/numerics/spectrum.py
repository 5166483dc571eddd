"""Eigenvectors of Grams, and the singular vectors and values that follow from them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def principal_directions(matrix: Float[Tensor, "rows columns"], count: int) -> Float[Tensor, "rows count"]:
    """The first `count` left singular vectors, strongest first, signs fixed; completed beyond the rank.

    From the eigenvectors of the smaller Gram.

    Args:
        matrix: any shape.
        count: at most the number of rows.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        vectors = eigenvectors(matrix @ matrix.T)[1].flip(1)[:, :count]
    else:
        right = eigenvectors(matrix.T @ matrix)[1].flip(1)[:, :count]
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


def squared_singular_values(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " count"]:
    """Largest first, as many as the smaller side has; from the eigenvalues of the smaller Gram."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)


def singular_spectrum(weight: Float[Tensor, "inputs outputs"]) -> tuple[float, ...]:
    """Singular values of ``W / ‖W‖_F``, largest first, min(in, out) of them; zeros for a zero weight."""
    work = weight.double()
    norm = float(work.norm())
    if norm == 0.0:
        return (0.0,) * min(work.shape)
    return tuple(float(value) for value in squared_singular_values(work / norm).sqrt())


def eigenvectors(symmetric: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
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
