"""Law of the store: what is read is what was written, bit for bit, structure included."""

from __future__ import annotations

from pathlib import Path

import torch
from matrices import same_matrix

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.core.store import StoredMatrices, load_matrices, save_matrices


def _quantized(inputs: int, outputs: int, grid: Grid) -> Quantized:
    return Quantized(
        torch.randint(grid.lowest, grid.highest + 1, (inputs, outputs), dtype=torch.int8),
        torch.rand(grid.groups(inputs), outputs).half(),
        grid,
    )


def _matrices() -> dict[str, Matrix]:
    shared = _quantized(64, 32, Grid(4, 32))
    strong = _quantized(64, 8, Grid(8, 32))
    codes = Grid(4, 16)
    return {
        "dense": Dense(torch.randn(64, 48)),
        "quantized": _quantized(60, 48, Grid(2, 32)),
        "q": Factorized((FactorPair(shared, _quantized(32, 40, codes), "qk", Pattern(16, 32)),)),
        "k": Factorized(
            (
                FactorPair(shared, _quantized(32, 20, codes), "qk", Pattern(2, 4)),
                FactorPair(strong, _quantized(8, 20, Grid(8, 16)), "k"),
            )
        ),
    }


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    matrices = _matrices()
    save_matrices(tmp_path / "m.safetensors", matrices)
    loaded = load_matrices(tmp_path / "m.safetensors")
    assert list(loaded) == list(matrices)
    for name, matrix in matrices.items():
        assert same_matrix(loaded[name], matrix), name
        if isinstance(matrix, Factorized):
            other = loaded[name]
            assert isinstance(other, Factorized)
            assert [(p.dictionary_name, p.pattern) for p in other.pairs] == [
                (p.dictionary_name, p.pattern) for p in matrix.pairs
            ]


def test_a_shared_dictionary_is_stored_once(tmp_path: Path) -> None:
    matrices = _matrices()
    save_matrices(tmp_path / "both", matrices)
    save_matrices(tmp_path / "one", {name: m for name, m in matrices.items() if name != "k"})
    extra = (tmp_path / "both").stat().st_size - (tmp_path / "one").stat().st_size
    k = matrices["k"]
    assert isinstance(k, Factorized)
    assert extra < 3000 + k.pairs[0].dictionary.shape[0] * k.pairs[0].atoms


def test_several_files_are_one_mapping_in_order(tmp_path: Path) -> None:
    matrices = _matrices()
    files = {}
    for name, matrix in matrices.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_matrices(files[name], {name: matrix})
    stored = StoredMatrices(files)
    assert list(stored) == list(matrices)
    assert all(same_matrix(stored[name], matrices[name]) for name in reversed(list(stored)))
