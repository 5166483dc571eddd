"""The reader on damaged files: one clean error, never a crash, never a read outside the file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_gguf import random_quantized

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.gguf.ggml_types import GGML_TYPES
from compot_deploy.exporters.gguf.model import read, read_file
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.reader import GgufFile, parse, read_header
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import ARCHITECTURES

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def tiny_model() -> CompressedModel:
    """The smallest model that has every kind of leaf."""
    shapes = {"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8)}
    shapes |= {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    architecture = ARCHITECTURES["llama"]
    matrices: dict[str, Matrix] = {}
    for name in architecture.linear_names(1):
        inputs, outputs = shapes[name.rpartition(".")[2]]
        pair = FactorPair(
            random_quantized(inputs, 40, Grid(4, 32), seed=1),
            random_quantized(40, outputs, Grid(4, 32), Pattern(2, 4), seed=2),
            name,
            Pattern(2, 4),
        )
        matrices[name] = Factorized((pair,)) if "proj" in name else Dense(torch.randn(inputs, outputs))
    matrices[architecture.embedding] = Dense(torch.randn(8, 10))
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    tensors = {f"{name}.weight": torch.ones(8) for name in norms}
    return CompressedModel(architecture, CONFIG, matrices, tensors, True, "nowhere")


@pytest.fixture(params=["sparse", "factorized", "dense"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write(tiny_model(), path, GgufOptions(layout=request.param, type="F16"))
    return path


def read_quietly(path: Path) -> str | None:
    """None when the file reads, the message when it is refused; anything else propagates."""
    return read_bytes_quietly(np.fromfile(path, np.uint8))


def read_bytes_quietly(data: np.ndarray) -> str | None:
    try:
        read_file(parse(data, Path("damaged.gguf")))
    except ArtifactError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "share", [0.05, pytest.param(1.0, marks=[pytest.mark.slow, pytest.mark.nightly])], ids=["few", "all"]
)
def test_damaged_files_give_clean_errors(tmp_path: Path, share: float) -> None:
    """Bit flips, truncations, bytes set to extremes, three layouts: a result or an ArtifactError, nothing else.

    Of 10,000 damaged files a part is read.
    """
    rng = np.random.default_rng(0)
    refused = 0
    for layout, count in (("sparse", 5000), ("factorized", 3000), ("dense", 2000)):
        path = tmp_path / f"{layout}.gguf"
        write(tiny_model(), path, GgufOptions(layout=layout, type="F16"))  # type: ignore[arg-type]
        good = np.frombuffer(path.read_bytes(), np.uint8)
        header = min(tensor.offset for tensor in read_header(path).tensors.values())
        for case in range(int(count * share)):
            data = good.copy()
            where = rng.integers(0, header if case % 4 else len(data), size=int(rng.integers(1, 4)))
            kind = case % 3
            if kind == 0:
                data[where] ^= np.uint8(1) << rng.integers(0, 8, len(where)).astype(np.uint8)
            elif kind == 1:
                data[where] = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), len(where))
            else:
                data = data[: int(rng.integers(0, len(data)))]
            message = read_bytes_quietly(data)
            refused += message is not None
            assert message is None or (len(message) < 600 and "\n" not in message)
    assert refused > 5000 * share


def test_every_truncation_of_the_header_is_refused(file: Path) -> None:
    data = file.read_bytes()
    header = min(tensor.offset for tensor in read_header(file).tensors.values())
    for size in range(0, header, 7):
        file.write_bytes(data[:size])
        assert read_quietly(file) is not None
    file.write_bytes(data[:-1])
    message = read_quietly(file)
    assert message is not None and "truncated" in message


def patched(path: Path, at: int, raw: bytes) -> str:
    data = bytearray(path.read_bytes())
    data[at : at + len(raw)] = raw
    path.write_bytes(bytes(data))
    message = read_quietly(path)
    assert message is not None
    return message


def test_another_magic_is_named(file: Path) -> None:
    assert "not a GGUF file" in patched(file, 0, b"ONNX")


def test_another_version_is_named(file: Path) -> None:
    assert "GGUF version 4" in patched(file, 4, struct.pack("<I", 4))


@pytest.mark.parametrize("at", [8, 16])
def test_a_hostile_count_is_refused_before_a_loop(file: Path, at: int) -> None:
    assert "cannot fit" in patched(file, at, struct.pack("<Q", 2**63))


def replaced(path: Path, old: bytes, new: bytes) -> str:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    message = read_quietly(path)
    assert message is not None
    return message


def tensor_info(path: Path, name: bytes) -> int:
    """Where the number of dimensions of a tensor stands."""
    data = path.read_bytes()
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def test_a_size_that_overflows_64_bits_is_refused(file: Path) -> None:
    at = tensor_info(file, b"output_norm.weight")
    assert "impossible shape" in patched(file, at + 4, struct.pack("<Q", 2**63))


def test_a_tensor_outside_the_file_is_refused(file: Path) -> None:
    at = tensor_info(file, b"output_norm.weight")
    message = patched(file, at + 4 + 8 + 4, struct.pack("<Q", 2**40))
    assert "overlaps" in message or "truncated" in message


def test_tensors_that_share_bytes_are_refused(file: Path) -> None:
    at = tensor_info(file, b"output_norm.weight")
    assert "overlaps" in patched(file, at + 4 + 8 + 4, struct.pack("<Q", 0))


def test_an_unknown_tensor_type_is_refused(file: Path) -> None:
    at = tensor_info(file, b"output_norm.weight")
    assert "unknown type" in patched(file, at + 4 + 8, struct.pack("<I", 4242))


def test_an_unknown_layout_version_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(tiny_model(), path, GgufOptions(layout="sparse"))
    key = b"compot.layout.version"
    at = path.read_bytes().index(key) + len(key) + 4
    message = patched(path, at, struct.pack("<I", 9))
    assert "version 9" in message and "version 1" in message


def test_metadata_that_contradicts_a_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(tiny_model(), path, GgufOptions(layout="sparse"))
    assert "asks for" in replaced(path, b'"inputs":40,"outputs":4,', b'"inputs":99,"outputs":4,')


# --- headers made by hand: one number wrong at a time --------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, sizes: Sequence[int], kind: str = "F32", offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return string(name) + shape + struct.pack("<IQ", GGML_TYPES[kind].number, offset)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def parsed(
    *tensors: bytes, keys: Sequence[bytes] = (), data: int = 0, alignment: int = 32, version: int = 3
) -> GgufFile:
    """A file of these tensors and keys, and `data` bytes behind the padding."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join((*keys, *tensors))
    whole = head + bytes(-len(head) % alignment) + bytes(data)
    return parse(np.frombuffer(whole, np.uint8), Path("made.gguf"))


ALIGNMENT = b"general.alignment"


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_that_ends_with_its_last_tensor_is_read(version: int) -> None:
    file = parsed(
        tensor(b"a" * 63, [64, 3], "Q4_0"),
        tensor(b"b", [5], "F16", 128),
        keys=[key(ALIGNMENT, 4, struct.pack("<I", 128))],
        data=128 + 10,
        alignment=128,
        version=version,
    )
    first, second = file.tensors.values()
    assert first.shape == (3, 64) and first.nbytes == 3 * 2 * 18 and second.nbytes == 10
    assert first.offset % 128 == 0 and second.offset == first.offset + 128
    assert file.bytes_of("b").shape == (1, 10) and file.bytes_of("a" * 63).shape == (3, 36)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ([tensor(b"a", [8]), tensor(b"b", [8], offset=24)], "not aligned to 32"),
        ([tensor(b"a", [9]), tensor(b"b", [8], offset=32)], "overlaps"),
        ([tensor(b"a", [8], offset=32), tensor(b"b", [8])], "overlaps"),
        ([tensor(b"a", [8]), tensor(b"a", [8], offset=32)], "'a' appears twice"),
        ([tensor(b"a", [2**32, 2**32])], "impossible shape"),
        ([tensor(b"a", [2**31, 2**31])], "impossible shape"),
        ([tensor(b"a", [33], "Q4_0")], "impossible shape .* for Q4_0"),
        ([tensor(b"a", [8, 0])], "impossible shape"),
        ([tensor(b"a", [1] * 5)], "5 dimensions"),
        ([tensor(b"a", [])], "0 dimensions"),
        ([tensor(b"a" * 64, [8])], "name of 64 bytes"),
        ([tensor(b"", [8])], "name of 0 bytes"),
        ([tensor(b"a", [1025], "I8")], "ends at byte .* truncated"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tensors: Sequence[bytes], complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        parsed(*tensors, data=1024)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ([key(ALIGNMENT, 4, struct.pack("<I", 48))], "48 is not a power of two"),
        ([key(ALIGNMENT, 4, struct.pack("<I", 0))], "0 is not a power of two"),
        ([key(ALIGNMENT, 5, struct.pack("<i", -32))], "-32 is not a power of two"),
        ([key(ALIGNMENT, 7, b"\1")], "True is not a power of two"),
        ([key(ALIGNMENT, 8, string(b"32"))], "'32' is not a power of two"),
        ([key(b"k", 0, b"\1")] * 2, "'k' appears twice"),
        ([key(b"k", 13, b"\1")], "unknown type 13"),
        ([key(b"k", 9, struct.pack("<IQ", 9, 1))], "array of the unknown type 9"),
        ([key(b"k", 9, struct.pack("<IQ", 8, 2**40))], "strings cannot fit"),
        ([key(b"k", 9, struct.pack("<IQ", 10, 2**61))], "truncated"),
        ([key(b"k", 8, string(b"\xff"))], "not UTF-8"),
    ],
)
def test_a_key_that_cannot_be_is_refused(keys: Sequence[bytes], complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        parsed(keys=keys, data=64)


def test_values_of_every_type_are_read_as_they_were_written() -> None:
    forms = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    numbers = {
        kind: [1, 0, 1] if kind == 7 else [3, 0, -5 if form.islower() else 250]
        for kind, form in forms.items()
    }
    keys = [
        key(b"text", 8, string("é".encode())),
        key(b"texts", 9, struct.pack("<IQ", 8, 2) + string(b"a") + string(b"")),
    ]
    for kind, form in forms.items():
        keys.append(key(b"one %d" % kind, kind, struct.pack(f"<{form}", numbers[kind][-1])))
        keys.append(key(b"many %d" % kind, 9, struct.pack(f"<IQ3{form}", kind, 3, *numbers[kind])))
    found = parsed(keys=keys).metadata
    assert found["text"] == "é" and found["texts"] == ["a", ""]
    for kind, expected in numbers.items():
        assert found[f"one {kind}"] == expected[-1] and found[f"many {kind}"].tolist() == expected


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_only_versions_2_and_3_are_read(version: int) -> None:
    with pytest.raises(ArtifactError, match=f"GGUF version {version}; versions 2 and 3"):
        parsed(data=64, version=version)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read(tmp_path / "none.gguf")
