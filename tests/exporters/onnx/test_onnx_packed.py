"""Laws of packed codes: the same integers and the same logits from fewer bytes, expanded once and for all."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import tiny
import torch
from matrices import same_matrix
from onnx import ModelProto, TensorProto
from reference_onnx import (
    MODELS,
    OnnxRun,
    compressed,
    padded_batch,
    rounded,
    share_dictionaries,
    sparse_pair,
    torch_logits,
    torch_model,
    two_pairs,
    with_matrices,
)
from torch import Tensor

from compot_deploy import cli
from compot_deploy.core.diagnostics import Diagnostic, errors
from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Factorized, Matrix
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import EXIT_BAD_INPUT, EXIT_OK, MissingDependencyError, RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import verify
from compot_deploy.exporters.onnx import expansion as onnx_expansion
from compot_deploy.exporters.onnx.expansion import EXPANSION_TABLE, unfolded_nodes
from compot_deploy.exporters.onnx.lint.folder import lint_onnx
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.packed_codes import expansion_table
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.storage import OnnxStorage
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.planning.sizing import MatrixSize, Precision, Sparsity
from compot_deploy.planning.spectral import ALLOCATIONS
from compot_deploy.report.json import from_json

EXPORTER = EXPORTERS["onnx"]
PACKED = OnnxOptions(codes="packed")
TWO_OF_FOUR = Pattern(2, 4)
OPERATORS = ["Cast", "Concat", "MatMulInteger", "Gather", "Reshape"]


# --- the folder


def scheme(name: str, weight: Tensor) -> Matrix:
    """2:4 in attention, with a block that is not full; both of two pairs elsewhere; int8 embedding."""
    if "embed" in name or "lm_head" in name:
        return rounded(weight, Grid(8, 32))
    if "self_attn" in name:
        return sparse_pair(name, weight, atoms=40)
    if "up_proj" in name:
        return Factorized((*two_pairs(name, weight).pairs, *sparse_pair(name, weight).pairs))
    return sparse_pair(name, weight, 64, Grid(8, 32)) if "gate" in name else rounded(weight, Grid(4, 32))


@pytest.fixture(scope="module")
def model() -> CompressedModel:
    model = compressed(torch_model(MODELS["qwen3"]), scheme)
    block = "model.layers.1.self_attn"
    shared = share_dictionaries(model.matrices, [f"{block}.q_proj", f"{block}.k_proj"], f"{block}.input")
    return replace(model, matrices=shared)


def export(model: CompressedModel, folder: Path, options: OnnxOptions) -> Path:
    folder.mkdir()
    EXPORTER.write(model, folder, options)
    return folder


@pytest.fixture(scope="module")
def folders(model: CompressedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    return {codes: export(model, root / codes, OnnxOptions(codes=codes)) for codes in ("dense", "packed")}  # type: ignore[arg-type]


def graph_of(folder: Path) -> ModelProto:
    return onnx.load(folder / GRAPH, load_external_data=False)


def test_reading_packed_codes_gives_back_every_matrix_bit_for_bit(
    model: CompressedModel, folders: dict[str, Path]
) -> None:
    found = EXPORTER.read(folders["packed"])
    assert list(found) == list(model.matrices)
    for name, matrix in model.matrices.items():
        assert same_matrix(found[name], matrix), name
        if isinstance(matrix, Factorized):
            read = found[name]
            assert isinstance(read, Factorized)
            assert [pair.pattern for pair in read.pairs] == [pair.pattern for pair in matrix.pairs]


def test_a_packed_folder_that_is_read_back_is_written_to_the_same_bytes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    again = export(EXPORTER.read_model(folders["packed"]), tmp_path / "again", PACKED)
    for path in folders["packed"].rglob("*.onnx*"):
        assert (again / path.relative_to(folders["packed"])).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("codes", ["dense", "packed"])
def test_the_plan_counts_what_lies_in_the_file(
    codes: str, model: CompressedModel, folders: dict[str, Path]
) -> None:
    stored = 0
    for tensor in graph_of(folders[codes]).graph.initializer:
        if tensor.name.endswith((".integers", ".scales", ".values", ".patterns")):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            stored += int(entries["length"]) if entries else len(tensor.raw_data)
    storage = EXPORTER.storage(OnnxOptions(codes=codes))  # type: ignore[arg-type]
    assert stored == sum(matrix_bytes(model.matrices, storage).values())


def test_each_packed_product_has_five_nodes_and_all_share_one_table(folders: dict[str, Path]) -> None:
    graph = graph_of(folders["packed"]).graph
    path = "/model/layers.0/attn/q_proj/codes"
    assert [node.op_type for node in graph.node if node.name.startswith(f"{path}/expand/")] == OPERATORS
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 2 * (4 + 1)
    assert [tensor.name for tensor in graph.initializer if list(tensor.dims) == [1536, 2]] == [
        EXPANSION_TABLE
    ]
    values = {tensor.name: tensor for tensor in graph.initializer}
    assert values["model.layers.0.self_attn.q_proj.codes.patterns"].data_type == TensorProto.UINT4


def test_dense_codes_have_nothing_of_it(folders: dict[str, Path]) -> None:
    graph = graph_of(folders["dense"]).graph
    assert not {node.op_type for node in graph.node} & {"MatMulInteger"}
    assert not any(node.name.count("/expand/") for node in graph.node)
    assert not any("two_of_four" in tensor.name or ".values" in tensor.name for tensor in graph.initializer)


@pytest.mark.parametrize("level", [0, None])
def test_logits_are_those_of_dense_codes_bit_for_bit(level: int | None, folders: dict[str, Path]) -> None:
    tokens, mask = padded_batch()
    found = [
        OnnxRun(open_session(folders[codes], accuracy_level=level, threads=1))(tokens, mask)
        for codes in ("dense", "packed")
    ]
    assert torch.equal(found[0], found[1])


def test_the_oracle_agrees_with_torch(model: CompressedModel, folders: dict[str, Path]) -> None:
    tokens, mask = padded_batch()
    expected = torch_logits(with_matrices(torch_model(MODELS["qwen3"]), model.matrices), tokens, mask)
    found = OnnxRun(open_session(folders["packed"], accuracy_level=0))(tokens, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-4)


def test_standard_operators_refuse_to_pack() -> None:
    with pytest.raises(RecipeError, match=r"--onnx-codes packed .* cannot be written as --onnx-ops qdq"):
        OnnxOptions(ops="qdq", codes="packed")
    assert EXPORTER.options({"onnx_codes": "packed"}) == PACKED
    assert EXPORTER.options({}) == OnnxOptions()
    with pytest.raises(RecipeError, match="--onnx-codes thin: choose one of dense, packed"):
        EXPORTER.options({"onnx_codes": "thin"})


# --- the expansion is gone after loading


def test_after_loading_nothing_of_the_expansion_is_left(folders: dict[str, Path]) -> None:
    assert unfolded_nodes(folders["packed"]) == ()
    assert unfolded_nodes(folders["dense"]) == ()
    assert [diagnostic.severity for diagnostic in EXPORTER.lint(folders["packed"])] == ["note"]
    assert EXPORTER.lint(folders["dense"]) == ()


def test_an_expansion_that_is_not_folded_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = unfolded_nodes(folders["packed"], disabled_optimizers=["ConstantFolding"])
    expected = [node.name for node in graph_of(folders["packed"]).graph.node if "/expand/" in node.name]
    assert list(left) == expected

    monkeypatch.setattr(onnx_expansion, "unfolded_nodes", lambda _: left)
    found = errors(EXPORTER.lint(folders["packed"]))
    assert len(found) == 1
    assert "50 are left after loading: decoding would be up to 100x slower" in found[0].sentence


def test_the_check_leaves_no_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = sorted(folders["packed"].rglob("*"))
    assert unfolded_nodes(folders["packed"]) == ()
    assert list(tmp_path.iterdir()) == []
    assert sorted(folders["packed"].rglob("*")) == before


def test_without_onnxruntime_it_is_noted_that_nothing_was_checked(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime"):
        unfolded_nodes(folders["packed"])
    found = EXPORTER.lint(folders["packed"])
    assert [diagnostic.severity for diagnostic in found] == ["note", "note"]
    assert "onnxruntime is not installed, so it was not checked" in found[1].sentence


# --- the lint knows the nodes


QUERY = "model.layers.0.self_attn.q_proj.codes"


def tensor(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def wrong_values_shape(model: ModelProto) -> None:
    dims = tensor(model, f"{QUERY}.values").dims
    dims[0], dims[1] = dims[0] * 2, dims[1] // 2


def wrong_weights(model: ModelProto) -> None:
    tensor(model, "/constants/two_of_four/weights").raw_data = b"\x01\x05"


def wrong_table(model: ModelProto) -> None:
    proto = tensor(model, EXPANSION_TABLE)
    proto.ClearField("external_data")
    proto.data_location = TensorProto.DEFAULT
    proto.raw_data = bytes([0x98]) + expansion_table().numpy().tobytes()[1:]


def impossible_pattern(model: ModelProto) -> None:
    proto = tensor(model, f"{QUERY}.patterns")
    count = proto.dims[0] * proto.dims[1] // 2
    proto.ClearField("external_data")
    proto.data_location = TensorProto.DEFAULT
    proto.raw_data = bytes(count - 1) + b"\x60"


def only_zeros(model: ModelProto) -> None:
    proto = tensor(model, f"{QUERY}.values")
    count = proto.dims[0] * proto.dims[1]
    proto.ClearField("external_data")
    proto.data_location = TensorProto.DEFAULT
    proto.raw_data = b"\x88" * count


@pytest.mark.parametrize(
    ("edit", "severity", "sentence"),
    [
        (wrong_values_shape, "error", "and should have (128, 12, 1)"),
        (wrong_weights, "error", "expands its codes with it, and it holds other numbers"),
        (wrong_table, "error", "expands its codes with it, and it holds other numbers"),
        (impossible_pattern, "error", "It has a pattern 6, and they are numbered 0 to 5"),
        (only_zeros, "warning", "Every integer is zero"),
    ],
)
def test_each_fault_of_packed_codes_is_found(
    edit: Callable[[ModelProto], None],
    severity: str,
    sentence: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(folders["packed"], tmp_path / "model"))
    assert [diagnostic.severity for diagnostic in lint_onnx(folder)] == ["note"]
    graph = graph_of(folder)
    edit(graph)
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    found: tuple[Diagnostic, ...] = lint_onnx(folder)
    assert any(diagnostic.severity == severity and sentence in diagnostic.sentence for diagnostic in found), (
        found
    )


def test_a_folder_that_does_not_run_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["packed"], tmp_path / "model"))
    graph = graph_of(folder)
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            for attribute in node.attribute:
                if attribute.name == "num_heads":
                    attribute.i = 3
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    assert errors(lint_onnx(folder)) == ()
    assert "onnxruntime cannot run" in errors(EXPORTER.lint(folder))[0].sentence


# --- from the command line

QUICK = ["--samples", "4", "--length", "32", "--evaluation-tokens", "128", "--rounds", "3"]
NO_LIMIT = ["--max-perplexity-ratio", "1e9"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("source")
    model = tiny.save(
        root / "tiny-llama",
        "llama",
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=1,
        head_dim=48,
    )
    text = root / "words.txt"
    text.write_text("".join(f"{tiny.WORDS}{number} " for number in range(60)))
    return [str(model), "--calibration", str(text), *QUICK, *NO_LIMIT]


def test_a_model_is_packed_from_the_command_line(source: list[str], tmp_path: Path) -> None:
    for codes in ("dense", "packed"):
        flags = ["--code-pattern", "2:4", "--onnx-codes", codes, "--ratio", "0.1"]
        assert cli.main([*source, *flags, "--out", str(tmp_path / codes)]) == EXIT_OK
        report = from_json((tmp_path / codes / "compot" / "report.json").read_text())
        assert report.accuracy.export_reference.comparison.nmse < 1e-9
        assert all(match.equal for match in report.accuracy.export_reference.greedy)
    assert unfolded_nodes(tmp_path / "packed") == ()
    # At one ratio what packing saves is spent on atoms, so the sizes are compared at the same matrices.
    model = EXPORTER.read_model(tmp_path / "packed")
    dense = export(replace(model, source=""), tmp_path / "same", OnnxOptions())
    sizes = [
        sum(path.stat().st_size for path in (folder / "onnx").iterdir())
        for folder in (tmp_path / "packed", dense)
    ]
    assert sizes[0] < sizes[1]
    factorized = [matrix for matrix in model.matrices.values() if isinstance(matrix, Factorized)]
    assert factorized and all(matrix.pairs[0].pattern == TWO_OF_FOUR for matrix in factorized)
    bytes_of = matrix_bytes(model.matrices, EXPORTER.storage(PACKED))
    assert {record.name: record.bytes for record in verify(tmp_path / "packed").matrices} == bytes_of


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--onnx-codes", "packed"], "of 4 bits of the pattern column: add --code-pattern 2:4"),
        (["--onnx-codes", "packed", "--code-pattern", "4:8"], "of the pattern 4:8"),
        (["--onnx-codes", "packed", "--code-pattern", "2:4", "--quant", "int8"], "of 8 bits"),
        (["--onnx-codes", "packed", "--code-pattern", "2:4", "--quant", "none"], "floating point"),
        (["--onnx-codes", "packed", "--code-pattern", "2:4", "--onnx-ops", "qdq"], "--onnx-ops qdq"),
        (["--code-pattern", "2:4", "--atoms-per-nonzero", "3"], "contradicts --atoms-per-nonzero"),
        (["--code-pattern", "4:8", "--method", "svd-llm"], "contradicts --method svd-llm"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_any_work(
    flags: list[str],
    complaint: str,
    source: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*source, *flags, "--out", str(tmp_path / "out")]) == EXIT_BAD_INPUT
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_packed_bytes_buy_atoms() -> None:
    matrices = [MatrixSize("w", 256, 512)]
    grid = Grid(4, 32)
    found = [
        ALLOCATIONS["uniform"](
            matrices,
            ratio=0.3,
            storage=OnnxStorage(codes=codes),  # type: ignore[arg-type]
            precision=Precision(grid, grid, grid),
            sparsity=Sparsity(pattern=TWO_OF_FOUR),
        )
        for codes in ("dense", "packed")
    ]
    atoms = [allocation.choices["w"].atoms for allocation in found]
    assert atoms[0] < atoms[1] and found[1].bytes <= found[1].budget
