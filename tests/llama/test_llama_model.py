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

import tiny
from reference_gguf import compressed, random_quantized, shared_change, torch_model

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Factorized, Matrix
from compot_deploy.embedded import HELD_OUT_TEXT, MODEL
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.gguf import library as library_module
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.exporters.gguf.library import LlamaError, UnsupportedLlamaError
from compot_deploy.exporters.gguf.model import read
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama import generate
from compot_deploy.llama.model import LlamaModel
from compot_deploy.llama.plugin import has_plugin, leaf, load_plugin
from compot_deploy.llama.runner import LlamaRunner
from compot_deploy.models.compressed import CompressedModel

pytestmark = pytest.mark.consumer
needs_plugin = pytest.mark.skipif(not has_plugin(), reason="the C plug-in is not built")

EXACT = 1e-4
F16_NOISE = 2e-2
EDGE = 1e-4
"""Of a step between two integers: what float32 noise moves an activation by, at most (seen: 2e-5)."""
MOST_FLIPS = 2
AGREES = 2e-5
"""Of a logit, where nothing was rounded to the other side: 5e-6 is seen, and some flips move less than `EXACT`."""
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
    write(model, path, GgufOptions(layout=layout, **options))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_the_shipped_model_equals_torch_at_every_position(tmp_path: Path, kind: str) -> None:
    """In F32 to rounding. For F16 weights llama.cpp rounds activations to F16 too, which is what is left then."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = HELD_OUT_TEXT.read_text()[:3000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:400]
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    write(compressed(MODEL), tmp_path / "m.gguf", GgufOptions(type=kind))
    with LlamaModel(tmp_path / "m.gguf", exact=True) as llama:
        got = llama.logits(ids)
    assert len(ids) == 400 and np.abs(got - expected).max() < (EXACT if kind == "F32" else F16_NOISE)


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


class Rounder:
    """Rounds activations to int8 per 64 as the plug-in does, and can be told to take the other side of an edge.

    An activation is known by the number of its tensor in one evaluation, its position and its column. Tensors with
    the same bits have one number: the plug-in rounds what several matrices read from the same values alike.

    Attributes:
        flips: activations to be rounded to the second nearest integer.
        near: activations less than `EDGE` from halfway between two integers, in the last evaluation.
    """

    def __init__(self) -> None:
        self.flips: set[tuple[int, int, int]] = set()
        self.near: dict[tuple[int, int, int], float] = {}
        self._seen: list[Tensor] = []

    def begin(self) -> None:
        self.near, self._seen = {}, []

    def __call__(self, x: Tensor) -> Tensor:
        number = next((n for n, other in enumerate(self._seen) if torch.equal(other, x)), len(self._seen))
        if number == len(self._seen):
            self._seen.append(x)
        width = x.shape[-1]
        units = nn.functional.pad(x, (0, -width % 64)).unflatten(-1, (-1, 64))
        peak = units.abs().amax(-1, keepdim=True)
        values = (units * (127 / peak.clamp(min=1e-30))).flatten(-2)
        integers = values.round()
        distance = 0.5 - (values - integers).abs()
        for _, position, column in (distance < EDGE).nonzero().tolist():
            self.near[number, position, column] = float(distance[0, position, column])
        for n, position, column in self.flips:
            if n == number:
                at = (0, position, column)
                integers[at] += torch.sign(values[at] - integers[at])
        return (integers.unflatten(-1, (-1, 64)) * (peak / 127)).flatten(-2)[..., :width]


class Rounding(nn.Module):
    """A linear as the plug-in computes it: inputs rounded to int8 per 64 before every leaf but narrow ones."""

    def __init__(self, matrix: Matrix, narrow: bool, rounder: Rounder) -> None:
        super().__init__()
        self.matrix, self.narrow, self.rounder = matrix, narrow, rounder

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.matrix, Factorized):
            return self.rounder(x) @ self.matrix.dequantize()
        total: Any = 0
        for pair in self.matrix.pairs:
            z = self.rounder(x) @ pair.dictionary.dequantize()
            z = z if self.narrow and pair.atoms <= 32 else self.rounder(z)
            total = total + z @ pair.codes.dequantize()
        return total


def round_activations(reference: Any, model: CompressedModel, name: str) -> Rounder:
    """Make torch compute as the plug-in does, from the factors."""
    rounder = Rounder()
    for module, matrix in model.matrices.items():
        if module != model.architecture.embedding:
            parent, _, child = module.rpartition(".")
            linear = Rounding(matrix, name != "factorized", rounder)
            setattr(reference.get_submodule(parent), child, linear)
    reference.lm_head = Rounding(model.matrices[model.architecture.embedding], False, rounder)
    return rounder


def flips_between(reference: Any, rounder: Rounder, tokens: Tensor, got: np.ndarray) -> dict[int, int]:
    """Make the emulation agree with `got`, position by position, by flips at edges; how many each position took.

    What comes before a position agrees already, so only its own activations can be the reason. The fewest flips
    are looked for first, in the order of computation: one upstream brings others downstream to an edge.
    """

    def difference(position: int) -> float:
        rounder.begin()
        with torch.no_grad():
            made = reference(tokens).logits[0, position].float().numpy()  # other lengths round otherwise
        return float(np.abs(made - got[position]).max())

    def explained(position: int, more: int, after: int) -> bool:
        left = difference(position)
        if left < AGREES or not more:
            return left < AGREES
        near = [key for key in rounder.near if key[1] == position and key[0] >= after]
        for key in sorted(set(near) - rounder.flips, key=lambda key: rounder.near[key]):
            rounder.flips.add(key)
            if explained(position, more - 1, key[0]):
                return True
            rounder.flips.remove(key)
            difference(position)
        return False

    rounder.flips.clear()
    taken: dict[int, int] = {}
    for position in range(tokens.shape[1]):
        taken[position] = next((n for n in range(MOST_FLIPS + 1) if explained(position, n, 0)), -1)
        assert taken[position] >= 0, f"{MOST_FLIPS} flips at edges do not explain position {position}"
    return taken


@needs_plugin
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_the_plugin_equals_torch_with_rounded_activations(
    folders: dict[str, Path], kind: str, name: str
) -> None:
    """What differs from torch is the int8 rounding of activations and nothing else.

    llama.cpp's norms and attention differ from torch's in the last bits, so an activation that lies on an edge
    between two integers may fall either way, and moves logits by about the noise of rounding. Such flips are
    named: with few activations, each on an edge, moved by one step, every position agrees to rounding.
    """
    model, path = exported(folders[kind], name)
    reference = torch_model(folders[kind], model)
    rounder = round_activations(reference, model, name)
    with LlamaModel(path, exact=True, execution="plugin") as llama:
        batch = llama.logits(TOKENS[0].tolist())
        single = llama.logits(TOKENS[0, :3].tolist())
        assert llama.factorised_runs > 0
    for tokens, got in ((TOKENS[:, :3], single), (TOKENS, batch)):
        taken = flips_between(reference, rounder, tokens, got)
        assert sum(taken.values()) <= 2 + len(got) // 10, taken


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


def greedy(reference: Any, prompt: Tensor, count: int) -> list[int]:
    """What torch continues a prompt with."""
    with torch.no_grad():
        made = reference.generate(
            prompt,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in made[0, prompt.shape[1] :]]


@needs_plugin
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["llama3", "qwen3", "qwen2"])
def test_factors_run_unrounded_generate_what_torch_does(
    folders: dict[str, Path], kind: str, name: str
) -> None:
    """Dictionary and codes inside llama.cpp's own graph and threads, with one thread and with two."""
    model, path = exported(folders[kind], name)
    reference = torch_model(folders[kind], model)
    plain, text = torch_logits(reference), greedy(reference, TOKENS[:, :8], 24)
    logits = []
    for threads in (1, 2):
        with LlamaModel(path, exact=True, execution="float", threads=threads) as llama:
            logits.append(llama.logits(TOKENS[0].tolist()))
            made = llama.generate(TOKENS[0, :8].tolist(), max_tokens=24, stop=False)
            assert list(made.tokens) == text
            assert llama.factorised_runs > 0
    assert np.abs(logits[0] - plain).max() < EXACT and np.array_equal(logits[0], logits[1])


@needs_plugin
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_text_of_rounded_activations_is_torchs_where_its_margin_exceeds_the_noise(
    folders: dict[str, Path], kind: str, name: str
) -> None:
    """The noise is what torch says it is: that of rounding activations to int8, the worst of fifty positions.

    At every step of its own text, the token that is taken is one that torch puts less than twice the noise below
    its best; where the second best is further away, it is torch's.
    """
    model, path = exported(folders[kind], name)
    reference = torch_model(folders[kind], model)
    plain, prompt = torch_logits(reference), TOKENS[0, :8].tolist()
    made = []
    for threads in (1, 2):
        with LlamaModel(path, exact=True, execution="plugin", threads=threads) as llama:
            made.append(llama.generate(prompt, max_tokens=24, stop=False).tokens)
            got = llama.logits(TOKENS[0].tolist())
    assert made[0] == made[1]
    with torch.no_grad():
        along = reference(torch.tensor([[*prompt, *made[0]]])).logits[0, 7:-1]
    round_activations(reference, model, name)
    noise = float(np.abs(torch_logits(reference) - plain).max())
    assert 0.5 * noise <= np.abs(got - plain).max() <= 1.5 * noise
    best = along.topk(2).values
    behind = best[:, 0] - along[torch.arange(24), torch.tensor(made[0])]
    assert float(behind.max()) <= 2 * noise
    assert int((best[:, 0] - best[:, 1] > 2 * noise).sum()) >= 1, "the text says nothing: it is never sure"
    # Nothing is said of a model that is never sure: random weights are at a few of fifty positions.
    certain = np.sort(plain, axis=1)[:, -1] - np.sort(plain, axis=1)[:, -2] > 2 * noise
    assert certain.sum() >= 3
    assert (got.argmax(axis=1) == plain.argmax(axis=1))[certain].all()


@needs_plugin
@pytest.mark.parametrize("pattern", [DENSE, Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_rounding_moves_a_product_by_no_more_than_is_documented(pattern: Pattern) -> None:
    """Each activation moves by 1/254 of the largest of its 64 at most; halves, which move so far, come close."""
    plugin = load_plugin()
    quantized = random_quantized(192, 24, Grid(4, 64), pattern)
    form = gguf_planes.PlaneFormat.of(192, quantized.grid, pattern)
    payload = gguf_planes.pack(quantized.integers.numpy(), quantized.scales.numpy(), form).view(np.uint8)
    of = leaf(payload, "planes", 192, 24, quantized.grid, form.pattern)
    weight = quantized.dequantize().double().numpy()
    rng = np.random.default_rng(0)
    worst = 0.0
    for row in range(24):
        # Halves between integers, each on the side that its weight makes worst.
        halves = rng.integers(-100, 100, 192) + 0.5 - 1e-3 * np.sign(weight[:, row])
        for x in (halves, rng.standard_normal(192)):
            x[::64] = 127 * np.abs(x).max() / np.abs(x).max() if x is halves else x[::64]
            x = x.astype(np.float32)
            peak = np.abs(x.reshape(3, 64)).max(axis=1, keepdims=True)
            bound = (np.repeat(peak, 64, axis=1).reshape(-1)[:, None] / 254 * np.abs(weight)).sum(axis=0)
            moved = np.abs(plugin.product(of, x[None])[0] - x.astype(np.float64) @ weight)
            assert (moved <= bound * 1.001 + 1e-6).all()
            worst = max(worst, float((moved / bound).max()))
    assert worst > 0.4


def test_greedy_tokens_equal_torch(folders: dict[str, Path]) -> None:
    model, path = exported(folders["llama3"], "sparse")
    reference = torch_model(folders["llama3"], model)
    runner = LlamaRunner(path, exact=True, threads=1)
    assert list(runner.generate(TOKENS[0, :8].tolist(), 24)) == greedy(reference, TOKENS[:, :8], 24)
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


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["factorized", "sparse"])
def test_stock_llama_cpp_refuses_a_factorised_file(folders: dict[str, Path], name: str) -> None:
    _, path = exported(folders["llama"], name)
    library = library_module.load_library()
    library.clear_log()
    assert not library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert "unknown model architecture: 'compot'" in library.said


@pytest.mark.parametrize("name", ["factorized", "sparse"])
def test_transformers_refuses_a_factorised_file(folders: dict[str, Path], name: str) -> None:
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
def test_nothing_of_torch_is_imported_to_run_a_factorised_file(folders: dict[str, Path]) -> None:
    """Its code alone would take more memory than small models."""
    _, path = exported(folders["llama"], "sparse")
    code = (
        "import sys\n"
        "from compot_deploy.llama import LlamaModel, server\n"
        "for execution in ('plugin', 'expand'):\n"
        "    with LlamaModel(sys.argv[1], execution=execution) as model:\n"
        "        assert model.execution == execution\n"
        "        assert len(model.generate([3, 4, 5], max_tokens=4, stop=False).tokens) == 4\n"
        "    server.open_service(sys.argv[1], context=16, name='x').model.close()\n"
        "print(sorted({'torch', 'onnx', 'transformers', 'compot_deploy.core.matrix'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
