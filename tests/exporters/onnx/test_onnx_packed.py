"""Laws of packed codes: the same integers and the same logits from fewer bytes, expanded once and for all."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import same_matrix
from onnx import ModelProto, TensorProto
from reference_onnx import (
    MODELS,
    OnnxRun,
    compressed,
    padded_batch,
    reference_nbits_bytes,
    reference_two_of_four,
    rounded,
    share_dictionaries,
    sparse_pair,
    torch_logits,
    torch_model,
    two_of_four,
    two_pairs,
    with_matrices,
)
from torch import Tensor

from compot_deploy.cli import main as cli
from compot_deploy.core.diagnostics import Finding, errors
from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Factorized, Matrix, Quantized
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import EXIT_BAD_INPUT, EXIT_OK, MissingDependencyError, RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import verify
from compot_deploy.exporters.onnx import expansion as onnx_expansion
from compot_deploy.exporters.onnx.expansion import EXPANSION_TABLE, unfolded_nodes
from compot_deploy.exporters.onnx.layouts import pack_nbits
from compot_deploy.exporters.onnx.lint.folder import lint_onnx
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.packed_codes import (
    POSITIONS,
    TwoOfFour,
    expansion_table,
    pack_two_of_four,
    unpack_two_of_four,
)
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.storage import BLOCKS, OnnxStorage
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.planning.sizing import MatrixSize, Precision, Sparsity
from compot_deploy.planning.spectral import ALLOCATIONS
from compot_deploy.report.json import from_json

EXPORTER = EXPORTERS["onnx"]
PACKED = OnnxOptions(codes="packed")
TWO_OF_FOUR = Pattern(2, 4)
OPERATORS = ["Cast", "Concat", "MatMulInteger", "Gather", "Reshape"]


# --- the codec


@st.composite
def sparse_matrices(draw: st.DrawFn) -> Quantized:
    """Any integers on at most two places of every four; a kept place may hold a zero."""
    grid = Grid(4, draw(st.sampled_from(BLOCKS)))
    rows, outputs = draw(st.integers(1, 300)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    groups = -(-rows // 4)
    integers = torch.randint(-8, 8, (groups, 4, outputs), dtype=torch.int8, generator=generator)
    integers *= torch.rand(integers.shape, generator=generator) > draw(st.sampled_from([0.0, 0.5, 1.0]))
    places = torch.rand(integers.shape, generator=generator).argsort(dim=1)
    integers = torch.where(places < 2, integers, torch.zeros_like(integers)).view(-1, outputs)[:rows]
    scales = torch.randn(grid.groups(rows), outputs, generator=generator).half()
    return Quantized(integers.contiguous(), scales, grid)


@settings(max_examples=60, deadline=None)
@given(sparse_matrices())
def test_unpacking_gives_back_every_bit(matrix: Quantized) -> None:
    packed = pack_two_of_four(matrix)
    assert same_matrix(unpack_two_of_four(packed, matrix.shape[0], matrix.grid), matrix)


@settings(max_examples=40, deadline=None)
@given(sparse_matrices())
def test_the_bytes_are_those_of_trying_every_pattern(matrix: Quantized) -> None:
    packed = pack_two_of_four(matrix)
    values, patterns = reference_two_of_four(matrix)
    assert packed.values[..., 0].tolist() == values
    numbers = [number for output in patterns for number in output]
    assert packed.patterns.tolist() == [
        low + 16 * high for low, high in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    assert torch.equal(packed.scales, pack_nbits(matrix).scales)


@settings(max_examples=40, deadline=None)
@given(sparse_matrices())
def test_storage_counts_exactly_the_bytes_that_are_written(matrix: Quantized) -> None:
    packed = pack_two_of_four(matrix)
    written = packed.values.numel() + packed.patterns.numel() + 2 * packed.scales.numel()
    assert OnnxStorage(codes="packed").leaf_bytes(*matrix.shape, matrix.grid, TWO_OF_FOUR) == written


def test_the_worked_example_and_the_rule_for_open_places() -> None:
    integers = torch.zeros(16, 1, dtype=torch.int8)
    integers[:, 0] = torch.tensor([0, 3, 0, -2, 0, 0, 0, 0, 0, 0, 0, 7, 0, -8, 0, 0])
    packed = pack_two_of_four(Quantized(integers, torch.ones(1, 1).half(), Grid(4, 16)))
    # (1, 3), then nothing: (0, 1); then only the last: (0, 3); then only the second: (0, 1).
    assert packed.patterns.tolist() == [4 | 0 << 4, 2 | 0 << 4]
    assert packed.values.flatten().tolist() == [0x6B, 0x88, 0xF8, 0x08]


def test_whichever_place_of_a_zero_is_written_the_same_integers_are_read() -> None:
    grid = Grid(4, 16)
    for kept, number in itertools.product(range(4), (-8, -1, 0, 7)):
        integers = torch.zeros(16, 1, dtype=torch.int8)
        integers[kept] = number
        matrix = Quantized(integers, torch.ones(1, 1).half(), grid)
        for pattern, places in enumerate(POSITIONS):
            if kept in places:
                codes = [number + 8 if place == kept else 8 for place in places]
                values = torch.tensor([[[codes[0] | codes[1] << 4], [0x88], [0x88], [0x88]]])
                patterns = torch.tensor([pattern, 5 << 4 | 3])
                packed = TwoOfFour(values.to(torch.uint8), patterns.to(torch.uint8), matrix.scales)
                assert same_matrix(unpack_two_of_four(packed, 16, grid), matrix)


def test_the_table_holds_the_bytes_of_every_four_codes() -> None:
    table = expansion_table().tolist()
    for value, (pattern, places) in itertools.product(range(256), enumerate(POSITIONS)):
        four = [0, 0, 0, 0]
        four[places[0]], four[places[1]] = (value & 15) - 8, (value >> 4) - 8
        column = torch.tensor([[number] for number in four + [0] * 12], dtype=torch.int8)
        block = reference_nbits_bytes(Quantized(column, torch.ones(1, 1).half(), Grid(4, 16)))[0][0]
        assert bytes(table[pattern + 6 * value]) == block[:2]


def test_what_is_not_two_of_four_is_refused_not_cut() -> None:
    integers = torch.zeros(64, 3, dtype=torch.int8)
    integers[40:43, 1] = 1
    with pytest.raises(ValueError, match="Output 1 has more than 2 non-zeros among the atoms 40 to 43"):
        pack_two_of_four(Quantized(integers, torch.ones(2, 3).half(), Grid(4, 32)))
    with pytest.raises(ValueError, match="packed at 4 bits, and these integers are on int8/g32"):
        pack_two_of_four(Quantized(integers, torch.ones(2, 3).half(), Grid(8, 32)))


def test_bytes_that_cannot_be_meant_are_refused() -> None:
    packed = pack_two_of_four(two_of_four(torch.randn(64, 2), Grid(4, 32)))
    with pytest.raises(ValueError, match="96 inputs on int4/g32 are 24 groups of four, and here are 16"):
        unpack_two_of_four(packed, 96, Grid(4, 32))
    with pytest.raises(ValueError, match="There is a pattern 6, and they are numbered 0 to 5"):
        unpack_two_of_four(replace(packed, patterns=packed.patterns & 0xF8 | 0x06), 64, Grid(4, 32))


def test_packing_leaves_its_argument_unchanged() -> None:
    matrix = two_of_four(torch.randn(50, 5), Grid(4, 32))
    integers, scales = matrix.integers.clone(), matrix.scales.clone()
    pack_two_of_four(matrix)
    assert torch.equal(matrix.integers, integers) and torch.equal(matrix.scales, scales)


# --- what it costs


def test_a_million_packed_codes_take_three_bits_and_their_scales() -> None:
    storage = OnnxStorage(codes="packed")
    assert storage.leaf_bytes(1024, 1024, Grid(4, 32), TWO_OF_FOUR) * 8 == 1024 * 1024 * 3.5
    assert storage.leaf_bytes(1024, 1024, Grid(4, 128), TWO_OF_FOUR) * 8 == 1024 * 1024 * 3.125
    # 70 atoms are filled up to 96 in blocks of 32.
    assert storage.leaf_bytes(70, 8, Grid(4, 32), TWO_OF_FOUR) == 8 * (96 * 3 // 8 + 3 * 2)


@pytest.mark.parametrize("grid", [None, Grid(2, 32), Grid(4, 32), Grid(8, 32)])
@pytest.mark.parametrize("pattern", [DENSE, Pattern(4, 8), Pattern(32, 64), TWO_OF_FOUR])
@pytest.mark.parametrize("ops", ["matmulnbits", "qdq"])
def test_everything_but_two_of_four_in_four_bits_costs_as_before(
    grid: Grid | None, pattern: Pattern, ops: str
) -> None:
    sizes = [
        OnnxStorage(ops, codes=codes).leaf_bytes(70, 9, grid, pattern)  # type: ignore[arg-type]
        for codes in ("dense", "packed")
    ]
    cheaper = grid == Grid(4, 32) and pattern == TWO_OF_FOUR and ops == "matmulnbits"
    assert (sizes[1] < sizes[0]) if cheaper else (sizes[1] == sizes[0])


@pytest.mark.parametrize("codes", ["dense", "packed"])
def test_memory_is_that_of_dense_integers_and_float32_scales_whatever_the_file(codes: str) -> None:
    storage = OnnxStorage(codes=codes)  # type: ignore[arg-type]
    assert storage.memory_bytes(70, 9, Grid(4, 32), TWO_OF_FOUR) == 9 * 3 * (16 + 4)
    assert storage.memory_bytes(70, 9, Grid(4, 32)) == 9 * 3 * (16 + 4)
    assert storage.memory_bytes(64, 9, Grid(2, 64)) == 9 * (16 + 4)
    assert OnnxStorage(float_bytes=2).memory_bytes(70, 9, None) == 70 * 9 * 4


# --- the folder


def form(name: str, weight: Tensor) -> Matrix:
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
    model = compressed(torch_model(MODELS["qwen3"]), form)
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
    assert [finding.severity for finding in EXPORTER.lint(folders["packed"])] == ["note"]
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
    assert [finding.severity for finding in found] == ["note", "note"]
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
    assert [finding.severity for finding in lint_onnx(folder)] == ["note"]
    graph = graph_of(folder)
    edit(graph)
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    found: tuple[Finding, ...] = lint_onnx(folder)
    assert any(finding.severity == severity and sentence in finding.sentence for finding in found), found


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
        assert report.accuracy.export_exact.comparison.nmse < 1e-9
        assert all(match.equal for match in report.accuracy.export_exact.greedy)
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
def test_knobs_that_contradict_each_other_are_refused_before_any_work(
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
