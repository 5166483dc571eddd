"""A file in the unmodified llama.cpp of the wheel: what is refused, found, or run in another way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_files import CHANGES, EXACT, TOKENS, exported, torch_logits
from reference_gguf import compressed, torch_model

from compot_deploy.core.grid import Grid
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.gguf import library as library_module
from compot_deploy.exporters.gguf.library import LlamaError, UnsupportedLlamaError
from compot_deploy.exporters.gguf.model import read
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama import generate
from compot_deploy.llama.model import LlamaModel
from compot_deploy.llama.plugin import has_plugin, load_plugin
from compot_deploy.llama.runner import LlamaRunner

pytest.importorskip("xllamacpp", reason="the extra llama is not installed")

pytestmark = pytest.mark.consumer
needs_plugin = pytest.mark.skipif(not has_plugin(), reason="the C plug-in is not built")


@needs_plugin
@pytest.mark.parametrize("name", CHANGES)
def test_threads_do_not_change_a_bit(folders: dict[str, Path], name: str) -> None:
    _, path = exported(folders["qwen3"], name)
    results = []
    for threads in (1, 2):
        with LlamaModel(path, exact=True, execution="plugin", threads=threads) as llama:
            tokens = TOKENS[0, :20].tolist()
            results.append((llama.logits(tokens), llama.generate(tokens, max_tokens=6, stop=False).tokens))
    assert np.array_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_text_in_text_out(folders: dict[str, Path]) -> None:
    _, path = exported(folders["llama3"], "sparse")
    heard: list[str] = []
    made = generate(path, "the quick brown", max_tokens=8, on_token=heard.append)
    assert made.prompt_tokens > 3 and made.seconds > 0 and len(made.tokens) <= 8
    assert made.text.startswith("".join(heard))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16", "IQ4_NL"])
def test_dense_files_of_any_type_run_exactly_when_expanded(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Their own arithmetic rounds activations; in F32 what remains is what the file holds."""
    for name in ("llama3", "qwen2"):
        write(compressed(folders[name]), tmp_path / "m.gguf", GgufOptions(type=kind))
        held = read(tmp_path / "m.gguf")
        expected = torch_logits(torch_model(folders[name], held))  # type: ignore[arg-type]
        runner = LlamaRunner(tmp_path / "m.gguf", exact=True, threads=1)
        (got,) = runner.logits(TOKENS, 50)
        assert np.abs(got[0].numpy() - expected).max() < EXACT and "expand" in runner.name
        runner.close()


def test_batches_and_single_steps_agree(folders: dict[str, Path]) -> None:
    _, path = exported(folders["llama"], "dense", type="F32")
    with LlamaModel(path, exact=True) as whole, LlamaModel(path, exact=True, batch=7) as pieces:
        tokens = TOKENS[0].tolist()
        assert np.abs(whole.logits(tokens) - pieces.logits(tokens)).max() < EXACT


@pytest.mark.parametrize("name", ["factorized", "sparse"])
def test_stock_llama_cpp_refuses_a_factorized_file(folders: dict[str, Path], name: str) -> None:
    _, path = exported(folders["llama"], name)
    library = library_module.load_library()
    library.clear_log()
    assert not library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert "unknown model architecture: 'compot'" in library.said


@pytest.mark.parametrize("name", ["factorized", "sparse"])
def test_transformers_refuses_a_factorized_file(folders: dict[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    _, path = exported(folders["llama"], name)
    with pytest.raises(Exception, match="compot"):
        AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("name", ["dense", "factorized", "sparse"])
def test_gguf_dump_reads_every_layout(folders: dict[str, Path], name: str) -> None:
    from gguf import GGUFReader

    _, path = exported(folders["llama"], name)
    reader = GGUFReader(path)
    assert len(reader.tensors) > 10
    assert str(reader.fields["general.architecture"].contents()) == ("llama" if name == "dense" else "compot")
    code = "from gguf.scripts.gguf_dump import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "token_embd.weight" in done.stdout


def test_a_prompt_longer_than_the_context_is_one_sentence(folders: dict[str, Path]) -> None:
    _, path = exported(folders["llama"], "dense", type="F16")
    with LlamaModel(path, context=16) as llama:
        with pytest.raises(InputError, match="has 50 tokens, the context holds 16"):
            llama.generate(TOKENS[0].tolist())
        with pytest.raises(InputError, match="outside the vocabulary"):
            llama.logits([5, 320])
        with pytest.raises(InputError, match="no tokens"):
            llama.logits([])
        made = llama.generate(TOKENS[0, :10].tolist(), max_tokens=99, stop=False)
        assert len(made.tokens) == 16 - 10 + 1
    with pytest.raises(InputError, match="1 to 256"):
        LlamaModel(path, context=257)


def test_impossible_threads_are_refused(folders: dict[str, Path]) -> None:
    _, path = exported(folders["llama"], "dense", type="F16")
    for threads in (0, 513):
        with pytest.raises(InputError, match="1 to 512"):
            LlamaModel(path, threads=threads)


def test_an_untested_library_is_refused_with_versions_that_work(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = exported(folders["llama"], "sparse")
    monkeypatch.setattr(library_module.load_library(), "version", "2031.1")
    library_module.check_layout.cache_clear()
    try:
        with pytest.raises(UnsupportedLlamaError, match=r"2031.1.*never tested.*2026\.10") as caught:
            LlamaModel(path)
    finally:
        library_module.check_layout.cache_clear()
    assert caught.value.exit_code == 4


def test_a_tensor_layout_that_differs_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_module.load_library()
    monkeypatch.setattr(library, "ggml_tensor_overhead", lambda: 400, raising=False)
    library_module.check_layout.cache_clear()
    try:
        with pytest.raises(UnsupportedLlamaError, match="400 bytes"):
            library_module.check_layout()
    finally:
        library_module.check_layout.cache_clear()


def test_a_file_that_is_damaged_inside_llama_cpp_is_one_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    _, path = exported(folders["llama"], "dense", type="F16")
    data = path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(LlamaError, match="attn_q"):
        LlamaModel(broken)


def leaves_of(path: Path) -> list[Any]:
    """Every leaf of a file that the plug-in computes with."""
    from compot_deploy.exporters.gguf import index as gguf_index
    from compot_deploy.exporters.gguf.reader import read_header
    from compot_deploy.llama.parts import Parts

    file = read_header(path)
    parts = Parts(file, gguf_index.read_index(file))
    return [leaf for _, _, leaves, _ in parts.linears() for leaf in leaves]


@needs_plugin
def test_wrong_kernels_are_found_when_loading(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compot_deploy.llama.plugin import Plugin

    _, path = exported(folders["llama"], "sparse")
    right = Plugin.product
    monkeypatch.setattr(Plugin, "product", lambda self, of, x: right(self, of, x) * np.float32(1.001))
    with pytest.raises(LlamaError, match="wrongly"):
        LlamaModel(path, execution="plugin")


@needs_plugin
def test_one_kind_of_leaf_or_one_output_that_is_wrong_is_found_when_loading(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of leaf in the file is tried, with the instruction set that will run, at every output of a tile."""
    from compot_deploy.llama.plugin import Leaf, Plugin

    path = tmp_path / "m.gguf"
    table = Grid(8, 32)  # which nothing but the embedding has
    write(compressed(folders["llama"], CHANGES["sparse"], table), path, GgufOptions(layout="sparse"))
    right, choose = Plugin.product, Plugin.use
    tried: list[tuple[int, ...]] = []
    chosen: list[str] = []

    def kind_of(of: Leaf) -> tuple[int, ...]:
        return of.kind, of.bits, of.of, of.group, of.group < of.inputs

    def remember(plugin: Plugin, of: Leaf, x: np.ndarray) -> np.ndarray:
        tried.append(kind_of(of))
        return right(plugin, of, x)

    monkeypatch.setattr(Plugin, "use", lambda plugin, isa: (chosen.append(isa), choose(plugin, isa))[1])
    monkeypatch.setattr(Plugin, "product", remember)
    with LlamaModel(path, execution="plugin") as llama:
        held = {kind_of(of) for of in leaves_of(path)}
        assert llama.execution == "plugin"
    assert chosen == [load_plugin().isa]
    assert set(tried) == held and len(tried) == len(held) >= 5
    for kind in held:
        for output in (0, 7, 15, 31):
            for damage in (1e-3, np.nan):

                def spoilt(plugin: Plugin, of: Leaf, x: np.ndarray) -> np.ndarray:
                    y = right(plugin, of, x)
                    if kind_of(of) == kind:  # noqa: B023
                        y[0, min(output, y.shape[1] - 1)] += damage * np.abs(y).max()  # noqa: B023
                    return y

                monkeypatch.setattr(Plugin, "product", spoilt)
                with pytest.raises(LlamaError, match="wrongly"):
                    LlamaModel(path, execution="plugin")


def test_an_unknown_layout_version_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    _, path = exported(folders["llama"], "sparse")
    key = b"compot.layout.version"
    data = bytearray(path.read_bytes())
    data[data.index(key) + len(key) + 4] = 7
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="version 7"):
        LlamaModel(broken)


def test_without_a_compiler_the_factors_are_expanded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = exported(folders["llama"], "sparse")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "_plugin" in name else find(name, *a)
    )
    with LlamaModel(path) as llama:
        assert llama.execution == "expand"
        assert llama.generate(TOKENS[0, :4].tolist(), max_tokens=3, stop=False).tokens


@needs_plugin
def test_nothing_of_torch_is_imported_to_run_a_factorized_file(folders: dict[str, Path]) -> None:
    """Its code alone would take more memory than small models."""
    _, path = exported(folders["llama"], "sparse")
    code = (
        "import sys\n"
        "from compot_deploy.llama import LlamaModel\n"
        "for execution in ('plugin', 'expand'):\n"
        "    with LlamaModel(sys.argv[1], execution=execution) as model:\n"
        "        assert model.execution == execution\n"
        "        assert len(model.generate([3, 4, 5], max_tokens=4, stop=False).tokens) == 4\n"
        "print(sorted({'torch', 'onnx', 'transformers', 'compot_deploy.core.matrix'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
