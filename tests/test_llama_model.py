"""Files in the unmodified llama.cpp of the wheel, against torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("xllamacpp", reason="the extra llama is not installed")

from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters import gguf
from compot_deploy.llama import LlamaError, LlamaModel, UnsupportedLlamaError, generate
from compot_deploy.llama import library as library_module
from compot_deploy.llama.plugin import has_plugin
from compot_deploy.llama.runner import LlamaRunner
from compot_deploy.weights import DENSE, CompressedModel, Factorized, Grid, Matrix, Pattern
from tests import tiny
from tests.reference_gguf import compressed, shared_change, torch_model

pytestmark = pytest.mark.consumer
needs_plugin = pytest.mark.skipif(not has_plugin(), reason="the C plug-in is not built")

EXACT = 1e-4
TOKENS = torch.randint(3, 320, (1, 50), generator=torch.Generator().manual_seed(3))
CHANGES: dict[str, Any] = {
    "factorized": shared_change(Grid(4, 64), DENSE, 0.6, head=4),
    "sparse": shared_change(Grid(4, 64), Pattern(2, 4), 0.6, head=4),
    "sparse 4:8": shared_change(Grid(4, 32), Pattern(4, 8), 0.6),
}


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(TOKENS).logits[0].float().numpy())


def exported(folder: Path, name: str, **options: Any) -> tuple[CompressedModel, Path]:
    layout = name.split()[0]
    model = compressed(folder, CHANGES.get(name), Grid(8, 64) if layout != "dense" else None)
    path = folder / f"{name.replace(' ', '-').replace(':', '')}.gguf"
    gguf.write(model, path, gguf.GgufOptions(layout=layout, **options))  # type: ignore[arg-type]
    return model, path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(root / kind, kind) for kind in tiny.KINDS}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_dense_logits_equal_torch_at_every_position(folders: dict[str, Path], kind: str) -> None:
    model, path = exported(folders[kind], "dense", type="F32")
    with LlamaModel(path, exact=True) as llama:
        got = llama.logits(TOKENS[0].tolist())
    assert np.abs(got - torch_logits(torch_model(folders[kind], model))).max() < EXACT


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn without attention factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.0,
    },
    "another base": {"rope_type": "default"},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rope_scalings_equal_torch(tmp_path: Path, kind: str, rope: str) -> None:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("rope_parameters is the configuration of transformers 5")
    base = 500000.0 if rope == "another base" else 10000.0
    folder = tiny.save(tmp_path / "model", kind, rope_parameters=ROPES[rope] | {"rope_theta": base})
    model, path = exported(folder, "dense", type="F32")
    with LlamaModel(path, exact=True) as llama:
        got = llama.logits(TOKENS[0].tolist())
    assert np.abs(got - torch_logits(torch_model(folder, model))).max() < EXACT


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen3"])
def test_expanded_factors_equal_torch(folders: dict[str, Path], kind: str, name: str) -> None:
    model, path = exported(folders[kind], name)
    with LlamaModel(path, exact=True, execution="expand") as llama:
        got = llama.logits(TOKENS[0].tolist())
    assert np.abs(got - torch_logits(torch_model(folders[kind], model))).max() < EXACT


class Rounding(nn.Module):
    """A linear as the plug-in computes it: inputs rounded to int8 per 64 before every leaf but narrow ones."""

    def __init__(self, matrix: Matrix, narrow: bool) -> None:
        super().__init__()
        self.matrix, self.narrow = matrix, narrow

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.matrix, Factorized):
            return rounded(x) @ self.matrix.dequantize()
        total: Any = 0
        for pair in self.matrix.pairs:
            z = rounded(x) @ pair.dictionary.dequantize()
            z = z if self.narrow and pair.atoms <= 32 else rounded(z)
            total = total + z @ pair.codes.dequantize()
        return total


def rounded(x: Tensor) -> Tensor:
    width = x.shape[-1]
    units = nn.functional.pad(x, (0, -width % 64)).unflatten(-1, (-1, 64))
    peak = units.abs().amax(-1, keepdim=True)
    integers = (units * (127 / peak.clamp(min=1e-30))).round()
    return (integers * (peak / 127)).flatten(-2)[..., :width]


@needs_plugin
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_the_plugin_equals_torch_with_rounded_activations(
    folders: dict[str, Path], kind: str, name: str
) -> None:
    """What differs from torch is the int8 rounding of activations and nothing else.

    A value on the edge between two integers may fall either way and then moves logits by about the noise itself,
    so the median position must agree tightly, and the worst stays within the noise.
    """
    model, path = exported(folders[kind], name)
    reference = torch_model(folders[kind], model)
    plain = torch_logits(reference)
    for module, matrix in model.matrices.items():
        if module != model.architecture.embedding:
            parent, _, child = module.rpartition(".")
            setattr(reference.get_submodule(parent), child, Rounding(matrix, name != "factorized"))
    reference.lm_head = Rounding(model.matrices[model.architecture.embedding], False)
    expected = torch_logits(reference)
    with LlamaModel(path, exact=True, execution="plugin") as llama:
        batch = llama.logits(TOKENS[0].tolist())
        single = llama.logits(TOKENS[0, :3].tolist())
        assert llama.factorised_runs > 0
    worst = np.abs(batch - expected).max(axis=1)
    assert np.median(worst) < EXACT or worst[:4].max() < EXACT
    assert worst.max() <= np.abs(plain - expected).max() * 2
    assert np.median(np.abs(single - expected[:3]).max(axis=1)) < EXACT
    assert np.abs(single - expected[:3]).max() <= np.abs(plain - expected).max() * 2


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


def test_greedy_tokens_equal_torch(folders: dict[str, Path]) -> None:
    model, path = exported(folders["llama3"], "sparse")
    reference = torch_model(folders["llama3"], model)
    with torch.no_grad():
        expected = reference.generate(
            TOKENS[:, :8],
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 8:].tolist()
    runner = LlamaRunner(path, exact=True, threads=1)
    assert list(runner.generate(TOKENS[0, :8].tolist(), 24)) == expected
    pieces = list(runner.logits(TOKENS, 20))
    assert [piece.shape for piece in pieces] == [(1, 20, 320), (1, 20, 320), (1, 10, 320)]
    assert np.abs(torch.cat(pieces, 1)[0].numpy() - torch_logits(reference)).max() < EXACT
    runner.close()


def test_text_in_text_out(folders: dict[str, Path]) -> None:
    _, path = exported(folders["llama3"], "sparse")
    heard: list[str] = []
    made = generate(path, "the quick brown", max_tokens=8, on_token=heard.append)
    assert made.prompt_tokens > 3 and made.seconds > 0 and len(made.tokens) <= 8
    assert made.text.startswith("".join(heard))


def test_batches_and_single_steps_agree(folders: dict[str, Path]) -> None:
    _, path = exported(folders["llama"], "dense", type="F32")
    with LlamaModel(path, exact=True) as whole, LlamaModel(path, exact=True, batch=7) as pieces:
        tokens = TOKENS[0].tolist()
        assert np.abs(whole.logits(tokens) - pieces.logits(tokens)).max() < EXACT


# --- bad input --------------------------------------------------------------------------------------------------


def test_stock_llama_cpp_refuses_a_factorised_file(folders: dict[str, Path]) -> None:
    _, path = exported(folders["llama"], "sparse")
    library = library_module.load_library()
    library.clear_log()
    assert not library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert "unknown model architecture: 'compot'" in library.said


def test_transformers_refuses_a_factorised_file(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    _, path = exported(folders["llama"], "factorized")
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
