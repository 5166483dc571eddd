"""Files in the unmodified llama.cpp of the wheel, against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cases import nightly
from llama_files import CHANGES, EXACT, TOKENS, exported, torch_logits
from reference_gguf import compressed, random_quantized, torch_model
from torch import Tensor, nn

from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Factorized, Matrix
from compot_deploy.embedded import HELD_OUT_TEXT, MODEL
from compot_deploy.exporters.gguf import planes as gguf_planes
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama.model import LlamaModel
from compot_deploy.llama.plugin import has_plugin, leaf, load_plugin
from compot_deploy.llama.runner import LlamaRunner
from compot_deploy.models.compressed import CompressedModel

pytest.importorskip("xllamacpp", reason="the extra llama is not installed")

pytestmark = pytest.mark.consumer
needs_plugin = pytest.mark.skipif(not has_plugin(), reason="the C plug-in is not built")

F16_NOISE = 2e-2
EDGE = 1e-4
"""Of a step between two integers: what float32 noise moves an activation by, at most (seen: 2e-5)."""
MOST_FLIPS = 2
AGREES = 2e-5
"""Of a logit, where nothing was rounded to the other side: 5e-6 is seen, and some flips move less than `EXACT`."""


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
@pytest.mark.parametrize("kind", ["llama3", *nightly("qwen3")])
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
        assert llama.factorized_runs > 0
    for tokens, got in ((TOKENS[:, :3], single), (TOKENS, batch)):
        taken = flips_between(reference, rounder, tokens, got)
        assert sum(taken.values()) <= 2 + len(got) // 10, taken


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
@pytest.mark.parametrize("name", ["sparse", *nightly("factorized", "sparse 4:8")])
@pytest.mark.parametrize("kind", ["llama3", *nightly("qwen3", "qwen2")])
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
            assert llama.factorized_runs > 0
    assert np.abs(logits[0] - plain).max() < EXACT and np.array_equal(logits[0], logits[1])


@needs_plugin
@pytest.mark.parametrize("name", ["factorized", *nightly("sparse", "sparse 4:8")])
@pytest.mark.parametrize("kind", ["llama3", *nightly("qwen3")])
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
