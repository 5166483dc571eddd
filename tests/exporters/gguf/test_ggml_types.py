"""The table of ggml types against the package that has the same, and how little is needed to read a file."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from compot_deploy.exporters.gguf.ggml_types import BY_NUMBER, GGML_TYPES


def test_types_equal_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {name: (kind.number, kind.block, kind.nbytes) for name, kind in GGML_TYPES.items()}
    # A newer package may know more types; what both know is the same, and no older one is left out.
    assert ours == {name: theirs[name] for name in ours}
    newest = max(number for number, _, _ in ours.values())
    assert all(theirs[name][0] > newest for name in set(theirs) - set(ours))


def test_every_number_names_one_type() -> None:
    assert len(BY_NUMBER) == len(GGML_TYPES)
    assert all(GGML_TYPES[kind.name] is kind for kind in BY_NUMBER.values())


def test_a_row_is_whole_blocks() -> None:
    assert GGML_TYPES["Q4_K"].row_bytes(512) == 2 * 144
    assert GGML_TYPES["F16"].row_bytes(3) == 6


def test_reading_a_file_imports_no_package_that_only_exports_need(tmp_path: Path) -> None:
    name = b"token_embd.weight"
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 32, GGML_TYPES["Q8_0"].number, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor
    path = tmp_path / "one.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(34))
    code = (
        "import sys, compot_deploy.llama.model\n"
        "from compot_deploy.exporters.gguf.reader import read_header\n"
        "print([(t.kind, t.nbytes) for t in read_header(sys.argv[1]).tensors.values()])\n"
        "print(sorted({'gguf', 'torch', 'transformers', 'yaml', 'sentencepiece'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[('Q8_0', 34)]", "[]"]
