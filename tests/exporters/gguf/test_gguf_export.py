"""Files of all layouts: nothing is lost, nothing is left behind, sizes are the promised ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from matrices import same_matrix
from reference_gguf import compressed, quantized_by_rounding, random_quantized, shared_change

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import RecipeError, UnsupportedModelError
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.kinds import KINDS
from compot_deploy.exporters.gguf.model import read
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.reader import read_header
from compot_deploy.exporters.gguf.rotary import interleaved_rope, rope_parameters
from compot_deploy.exporters.gguf.storage import GgufStorage, ProductStorage
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.models.compressed import CompressedModel

MIXES: dict[str, Any] = {
    "head and shared dictionaries": shared_change(Grid(4, 64), DENSE, 0.6, head=4),
    "2:4": shared_change(Grid(4, 64), Pattern(2, 4), 0.6, head=8),
    "4:8": shared_change(Grid(4, 32), Pattern(4, 8), 0.7),
    "odd pattern": shared_change(Grid(4, 32), Pattern(1, 3), 0.7),
    "plain integers": lambda name, weight: quantized_by_rounding(weight, Grid(3 if "mlp" in name else 2, 32)),
    "floating factors": lambda name, weight: Factorized(
        (
            FactorPair(
                Dense(weight[:, :5].half().contiguous()), Dense(torch.randn(5, weight.shape[1]).half()), name
            ),
        )
    ),
    "everything": lambda name, weight: (
        Dense(weight.bfloat16())
        if "q_proj" in name
        else quantized_by_rounding(weight, Grid(8, 128))
        if "k_proj" in name
        else shared_change(Grid(4, 64), Pattern(2, 4), 0.5)(f"{name}.q_proj", weight)
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(root / kind, kind) for kind in tiny.KINDS}


@pytest.mark.parametrize("layout", ["factorized", "sparse"])
@pytest.mark.parametrize("mix", MIXES)
def test_reading_gives_back_every_bit(
    folders: dict[str, Path], tmp_path: Path, layout: str, mix: str
) -> None:
    for kind in ("llama", "qwen2"):
        model = compressed(folders[kind], MIXES[mix], Grid(8, 64) if kind == "llama" else None)
        written = write(model, tmp_path / "m.gguf", GgufOptions(layout=layout))  # type: ignore[arg-type]
        back = read(written.path)
        assert back.layout == layout and back.tied == model.tied
        assert set(back.matrices) == set(model.matrices) and set(back.tensors) == set(model.tensors)
        for name, matrix in model.matrices.items():
            assert same_matrix(matrix, back.matrices[name]), name
            if isinstance(matrix, Factorized):
                other = back.matrices[name]
                assert isinstance(other, Factorized)
                assert [(p.dictionary_name, p.pattern) for p in matrix.pairs] == [
                    (p.dictionary_name, p.pattern) for p in other.pairs
                ]
        for name, tensor in model.tensors.items():
            assert torch.equal(tensor, back.tensors[name]), name


@pytest.mark.parametrize("layout", ["factorized", "sparse"])
@pytest.mark.parametrize("mix", ["head and shared dictionaries", "2:4", "plain integers", "floating factors"])
def test_bytes_are_those_that_the_plan_counts(
    folders: dict[str, Path], tmp_path: Path, layout: str, mix: str
) -> None:
    model = compressed(folders["llama"], MIXES[mix], Grid(8, 64))
    written = write(model, tmp_path / "m.gguf", GgufOptions(layout=layout))  # type: ignore[arg-type]
    # These floating factors are in float16; those of a compression are float32, four bytes.
    storage = GgufStorage(layout, 2 if mix == "floating factors" else 4)  # type: ignore[arg-type]
    planned = matrix_bytes(model.matrices, storage)
    assert written.matrix_bytes == planned
    in_file = sum(t.nbytes for t in read_header(written.path).tensors.values() if len(t.shape) == 2)
    assert in_file == sum(planned.values())


@pytest.mark.parametrize("layout", ["factorized", "sparse"])
def test_floating_leaves_of_a_compression_take_the_four_bytes_that_are_counted(
    folders: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    model = compressed(folders["llama"])
    written = write(model, tmp_path / "m.gguf", GgufOptions(layout=layout))  # type: ignore[arg-type]
    planned = matrix_bytes(model.matrices, GgufStorage(layout))  # type: ignore[arg-type]
    assert written.matrix_bytes == planned
    assert planned["model.layers.0.mlp.up_proj"] == 4 * 64 * 160


@pytest.mark.parametrize("kind", ["auto", "Q4_K", "Q6_K", "IQ3_S", "Q4_1", "Q8_0", "BF16", "F32"])
@pytest.mark.parametrize("mix", ["everything", "2:4"])
def test_products_take_the_bytes_that_are_counted(
    folders: dict[str, Path], tmp_path: Path, kind: str, mix: str
) -> None:
    """A dense file read back and counted gives its own bytes, fallbacks included."""
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    model = compressed(folders["llama"], MIXES[mix], Grid(8, 64))
    path = write(model, tmp_path / "m.gguf", GgufOptions(type=kind)).path
    in_file = {t.name: t.nbytes for t in read_header(path).tensors.values() if len(t.shape) == 2}
    counted = matrix_bytes(read(path).matrices, ProductStorage(kind))
    assert sum(counted.values()) == sum(in_file.values())
    assert sorted(counted.values()) == sorted(in_file.values())


def test_a_shared_dictionary_is_stored_once(folders: dict[str, Path], tmp_path: Path) -> None:
    model = compressed(folders["llama"], MIXES["head and shared dictionaries"])
    write(model, tmp_path / "m.gguf", GgufOptions(layout="sparse"))
    names = set(read_header(tmp_path / "m.gguf").tensors)
    assert "blk.0.attn_q.dict.weight" in names and "blk.0.attn_q.dict.1.weight" in names
    assert not {"blk.0.attn_k.dict.weight", "blk.0.attn_v.dict.weight", "blk.0.ffn_up.dict.weight"} & names


def test_dense_files_carry_integers_over_exactly(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> Matrix:
        return quantized_by_rounding(weight, Grid(8 if "mlp" in name else 4, 32))

    model = compressed(folders["llama"], change, Grid(8, 32))
    written = write(model, tmp_path / "m.gguf")
    back = read(written.path)
    for name, matrix in model.matrices.items():
        assert same_matrix(matrix, back.matrices[name]), name
    assert set(written.kinds.values()) == {"Q4_0 exact", "Q8_0 exact", "F32"}


def test_values_of_a_codebook_are_rounded_like_floats(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its numbers are places in a table: carried over as integers they would mean something else."""

    def change(name: str, weight: torch.Tensor) -> Matrix:
        made = quantized_by_rounding(weight, Grid(4, 32))
        return Quantized(made.integers.clamp(min=-7), made.scales, Grid(4, 32, "nf4"))

    model = compressed(folders["llama"], change)
    written = write(model, tmp_path / "m.gguf")
    assert not any("exact" in kind for kind in written.kinds.values())
    back = read(written.path).matrices["model.layers.0.mlp.up_proj"].dequantize()
    expected = model.matrices["model.layers.0.mlp.up_proj"].dequantize()
    assert float(((back - expected).norm() / expected.norm()) ** 2) < 0.02
    with pytest.raises(RecipeError, match="no nf4"):
        write(model, tmp_path / "m.gguf", GgufOptions(layout="sparse"))


def test_factors_are_multiplied_out_in_dense_files(folders: dict[str, Path], tmp_path: Path) -> None:
    model = compressed(folders["qwen3"], MIXES["2:4"])
    write(model, tmp_path / "m.gguf", GgufOptions(type="F32"))
    back = read(tmp_path / "m.gguf")
    for name, matrix in model.matrices.items():
        assert torch.equal(matrix.dequantize(), back.matrices[name].dequantize())


def test_rows_that_do_not_split_get_a_wider_type_and_a_note(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    written = write(
        compressed(folders["llama"]), tmp_path / "m.gguf", GgufOptions(type="Q4_K", table_type="F16")
    )
    assert written.kinds["blk.0.attn_q.weight"] == "Q5_0"  # 64 inputs: no block of 256
    assert any("attn_q" in note and "stored as Q5_0" in note for note in written.notes)


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "Q2_K", "Q6_K", "IQ4_XS", "Q4_0", "Q5_0", "Q8_0"])
def test_importance_weights_lower_the_weighted_error(kind: str) -> None:
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((16, 512)).astype(np.float32)
    importance = (rng.random(512) ** 4 + 0.01).astype(np.float32)

    def error(weights: np.ndarray | None) -> float:
        done = gguf_quantize.dequantize(gguf_quantize.quantize(rows, kind, weights), kind)
        return float(((done - rows) ** 2 * importance).sum())

    plain, weighted = error(None), error(importance)
    # llama.cpp has no search for Q8_0; 6 bits leave it little to find.
    assert weighted == plain if kind == "Q8_0" else weighted < plain


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_both_quantizers_write_the_same_bytes(kind: str) -> None:
    pytest.importorskip("xllamacpp", reason="the extra llama is not installed")
    rows = np.random.default_rng(1).standard_normal((8, 256)).astype(np.float32)
    assert np.array_equal(gguf_quantize.quantize(rows, kind), gguf_quantize._by_library(rows, kind, None))


def test_types_that_need_importance_are_refused_without(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = tiny.save(
        tmp_path / "wide", "llama", hidden_size=256, num_attention_heads=4, intermediate_size=256
    )
    model = compressed(wide)
    with pytest.raises(RecipeError, match="IQ2_XXS needs importance"):
        write(model, tmp_path / "m.gguf", GgufOptions(type="IQ2_XXS"))
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from compot_deploy.errors import MissingDependencyError
    from compot_deploy.exporters.gguf import library

    library.load_library.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else find(name, *a)
    )
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[llama\]"):
        gguf_quantize.quantize(np.zeros((1, 256), np.float32), "Q4_K")


@pytest.mark.parametrize(
    "options",
    [{"type": "Q9_K"}, {"table_type": "int4"}],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="Use "):
        GgufOptions(**options)


def test_a_group_that_cannot_be_stored_is_refused_before_writing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = compressed(folders["llama"], lambda name, weight: quantized_by_rounding(weight, Grid(4, 48)))
    for layout in ("factorized", "sparse"):
        with pytest.raises(RecipeError, match="48"):
            write(model, tmp_path / "m.gguf", GgufOptions(layout=layout))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


class Failing(Mapping[str, Matrix]):
    """Matrices of which one cannot be read when its bytes are due."""

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self.matrices, self.reads = matrices, 0

    def __getitem__(self, name: str) -> Matrix:
        self.reads += 1
        if self.reads > len(self.matrices) + 3:
            raise OSError("the disk is gone")
        return self.matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)


def test_a_failure_leaves_the_old_file_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    model = compressed(folders["llama"])
    broken = dataclasses.replace(model, matrices=Failing(model.matrices))
    with pytest.raises(OSError, match="gone"):
        write(broken, path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_two_writes_are_equal_and_the_model_is_unchanged(folders: dict[str, Path], tmp_path: Path) -> None:
    model = compressed(folders["llama3"], MIXES["2:4"])
    before = {name: matrix.dequantize().clone() for name, matrix in model.matrices.items()}
    options = GgufOptions(layout="sparse", provenance={"recipe": "test", "calibration": "abc"})
    for name in ("a.gguf", "b.gguf"):
        write(model, tmp_path / name, options)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert all(torch.equal(before[name], matrix.dequantize()) for name, matrix in model.matrices.items())
    metadata = read(tmp_path / "a.gguf").metadata
    assert metadata["compot.recipe"] == "test" and metadata["compot.calibration"] == "abc"
    assert metadata["general.architecture"] == "compot" and metadata["compot.base_architecture"] == "llama"


def test_a_factorized_embedding_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = compressed(folders["llama"])
    pair = FactorPair(random_quantized(64, 8, Grid(4, 32)), random_quantized(8, 320, Grid(4, 32)), "e")
    matrices = {**model.matrices, model.architecture.embedding: Factorized((pair,))}
    broken = dataclasses.replace(model, matrices=matrices)
    with pytest.raises(UnsupportedModelError, match="embed_tokens"):
        write(broken, tmp_path / "m.gguf", GgufOptions(layout="sparse"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
    ],
)
def test_rope_without_a_key_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        rope_parameters(KINDS["llama"], {"rope_theta": 1e4} | change)


def test_a_sliding_window_cuts_the_context_and_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    model = compressed(folders["mistral"])
    config = {**model.config, "sliding_window": 100}
    written = write(dataclasses.replace(model, config=config), tmp_path / "m.gguf", GgufOptions(type="F16"))
    assert read(written.path).metadata["llama.context_length"] == 100
    assert any("sliding window" in note for note in written.notes)


def test_rotary_pairs_become_neighbours() -> None:
    assert interleaved_rope(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_quantized_leaves_know_no_other_orientation() -> None:
    """Rows of the file are outputs: the first row of blocks is the first column of the matrix."""
    matrix = Quantized(
        torch.arange(64, dtype=torch.int8).reshape(32, 2) % 8, torch.ones(1, 2).half(), Grid(4, 32)
    )
    from compot_deploy.exporters.gguf.blocks import pack_blocks

    rows = pack_blocks(matrix.integers.numpy(), matrix.scales.numpy(), 32, "Q4_0")
    assert (
        rows[0, 2] & 15 == int(matrix.integers[0, 0]) + 8
        and rows[1, 2] & 15 == int(matrix.integers[0, 1]) + 8
    )


def test_the_model_type_is_the_only_thing_mistral_loses(folders: dict[str, Path], tmp_path: Path) -> None:
    model: CompressedModel = compressed(folders["mistral"])
    write(model, tmp_path / "m.gguf", GgufOptions(type="F32"))
    assert read(tmp_path / "m.gguf").architecture.model_type == "llama"
