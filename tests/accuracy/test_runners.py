from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
from safetensors.torch import load_file
from toy_models import VOCABULARY, ToyRunner, save_toy_onnx, toy_weights

from compot_deploy.accuracy.onnx_runner import OnnxRunner, onnx_runner
from compot_deploy.accuracy.runner import Runner, texts_of
from compot_deploy.accuracy.runners import RUNNERS
from compot_deploy.accuracy.torch_runner import TorchRunner, compressed_runner, torch_runner
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.errors import ArtifactError, InputError, MissingDependencyError
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import ARCHITECTURES
from compot_deploy.models.source import open_source
from compot_deploy.models.whole import replaced, whole_model

# A window of 8 is shorter than the test's texts, so that it matters.
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in tiny.KINDS),
    ("mistral", {"sliding_window": 8}),
]


def save_tiny(folder: Path, kind: str = "llama", **changes: Any) -> Any:
    """Save a tiny model as a folder; the model."""
    model = tiny.model(kind, **changes)
    model.set_attn_implementation("sdpa")  # what loading the folder chooses; eager differs in the last bit
    model.save_pretrained(folder)
    return model


def all_logits(runner: Runner, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    return torch.cat(list(runner.logits(tokens, chunk)), dim=1)


def windows(batch: int = 3, length: int = 20, vocabulary: int = 320) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length))


def full_recompute_greedy(runner: Runner, prompt: list[int], new_tokens: int) -> tuple[int, ...]:
    text = list(prompt)
    for _ in range(new_tokens):
        logits = all_logits(runner, torch.tensor([text]), len(text))
        text.append(int(logits[0, -1].argmax()))
    return tuple(text[len(prompt) :])


# torch


@pytest.mark.parametrize("kind, changes", MODELS)
def test_torch_logits_do_not_depend_on_the_chunk(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    model = save_tiny(tmp_path, kind, **changes)
    tokens = windows()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    runner = torch_runner(open_source(tmp_path))
    assert runner.vocabulary == 320 and runner.context == 256
    for chunk in (1, 7, 20, 50):
        pieces = list(runner.logits(tokens, chunk))
        assert [piece.shape[1] for piece in pieces[:-1]] == [chunk] * (len(pieces) - 1)
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


def test_torch_greedy_equals_full_recompute(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    runner = torch_runner(open_source(tmp_path))
    assert runner.generate([3, 1, 4], 12) == full_recompute_greedy(runner, [3, 1, 4], 12)


def random_matrix(rows: int, columns: int, kind: int) -> Matrix:
    if kind == 0:
        return Dense(torch.randn(rows, columns) / rows**0.5)
    grid = Grid(4, 16)

    def leaf(inputs: int, outputs: int) -> Quantized:
        integers = torch.randint(-8, 8, (inputs, outputs), dtype=torch.int8)
        return Quantized(integers, torch.full((grid.groups(inputs), outputs), 0.05).half(), grid)

    if kind == 1:
        return leaf(rows, columns)
    return Factorized((FactorPair(leaf(rows, 16), leaf(16, columns), "shared"),))


def matrices_of(model: Any) -> dict[str, Matrix]:
    """A fresh matrix of some form for every linear, the embedding and an untied head."""
    architecture = ARCHITECTURES[model.config.model_type]
    names = [architecture.embedding, *architecture.linear_names(2)]
    if not model.config.tie_word_embeddings:
        names.append(architecture.head)
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    return {
        name: random_matrix(shape[1], shape[0], position % 3)
        for position, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("kind, changes", MODELS)
def test_replaced_matrices_give_the_model_with_replaced_weights(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    model = save_tiny(tmp_path, kind, **changes)
    matrices = matrices_of(model)
    before = load_file(tmp_path / "model.safetensors")
    source, tokens = open_source(tmp_path), windows()
    whole = whole_model(source)
    linears = {name: matrix for name, matrix in matrices.items() if name in source.sites}

    def filled(some: dict[str, Matrix]) -> torch.Tensor:
        with torch.no_grad():
            for name, matrix in some.items():
                model.get_submodule(name).weight.copy_(matrix.dequantize().T)
        return all_logits(TorchRunner(model), tokens, 20)

    original = all_logits(TorchRunner(whole), tokens, 20)
    with replaced(whole, source, linears):
        assert torch.equal(all_logits(TorchRunner(whole), tokens, 20), filled(linears))
    assert torch.equal(all_logits(torch_runner(source), tokens, 20), original)
    expected = filled(matrices)
    assert not torch.allclose(original, expected, atol=0.1)

    # All of them from the compressed model alone, without the original checkpoint.
    others = {
        name: tensor
        for name, tensor in before.items()
        if name.removesuffix(".weight") not in matrices and name != "lm_head.weight"
    }
    config = json.loads((tmp_path / "config.json").read_text())
    compressed = CompressedModel(
        ARCHITECTURES[model.config.model_type],
        config,
        matrices,
        others,
        model.config.tie_word_embeddings,
        "nowhere",
    )
    assert torch.equal(all_logits(compressed_runner(compressed), tokens, 20), expected)


def compressed_tiny(tmp_path: Path, tied: bool) -> tuple[CompressedModel, dict[str, Matrix]]:
    model = save_tiny(tmp_path, tie_word_embeddings=tied)
    matrices = matrices_of(model)
    others = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.ndim == 1}
    config = json.loads((tmp_path / "config.json").read_text())
    return CompressedModel(ARCHITECTURES["llama"], config, matrices, others, tied, ""), matrices


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.up_proj"])
def test_a_compressed_model_that_lacks_a_weight_is_refused(tmp_path: Path, missing: str) -> None:
    model, matrices = compressed_tiny(tmp_path, tied=True)
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != missing}
    rest = {name: matrix for name, matrix in matrices.items() if name != missing}
    broken = CompressedModel(model.architecture, model.config, rest, tensors, True, "")
    with pytest.raises(InputError, match=f"lacks {missing}"):
        compressed_runner(broken)


def test_a_compressed_model_may_store_the_head_apart_where_the_original_tied_it(tmp_path: Path) -> None:
    model, matrices = compressed_tiny(tmp_path, tied=False)
    claims_tied = {**model.config, "tie_word_embeddings": True}
    runner = compressed_runner(
        CompressedModel(model.architecture, claims_tied, matrices, model.tensors, False, "")
    )
    tokens = windows()
    expected = all_logits(compressed_runner(model), tokens, 20)
    assert torch.equal(all_logits(runner, tokens, 20), expected)


def test_matrices_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, matrices = compressed_tiny(tmp_path, tied=True)
    linear = "model.layers.0.mlp.up_proj"

    def run(**changed: Matrix) -> None:
        compressed_runner(replace(model, matrices={**matrices, **changed}))

    with pytest.raises(InputError, match=r"shape \(160, 64\) in the model, not \(64, 160\)"):
        run(**{linear: Dense(torch.zeros(160, 64))})
    with pytest.raises(InputError, match=r"no weight model.layers.9.mlp.up_proj.weight"):
        run(**{"model.layers.9.mlp.up_proj": Dense(torch.zeros(64, 160))})
    with pytest.raises(
        InputError, match=r"model.norm.weight has the shape \(64,\) in the model, not \(64, 1\)"
    ):
        run(**{"model.norm": Dense(torch.zeros(1, 64))})
    with pytest.raises(InputError, match=r"lm_head and model.embed_tokens are tied"):
        run(lm_head=Dense(torch.zeros(64, 320)))
    with pytest.raises(InputError, match=r"no tensor extra.bias to fill"):
        compressed_runner(replace(model, tensors={**model.tensors, "extra.bias": torch.zeros(3)}))


# ONNX Runtime


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, ToyRunner]:
    embedding, output = toy_weights()
    folder = save_toy_onnx(tmp_path / "toy", embedding, output)
    return folder, ToyRunner(embedding, output.dequantize())


@pytest.mark.parametrize("form", ["nbits", "qdq", "none"])
@pytest.mark.parametrize("position_ids", [False, True])
@pytest.mark.parametrize("chunk", [1, 6, 20])
def test_onnx_logits_equal_torch_at_level_0(
    tmp_path: Path, form: str, position_ids: bool, chunk: int
) -> None:
    embedding, output = toy_weights()
    folder = save_toy_onnx(tmp_path / "toy", embedding, output, form=form, position_ids=position_ids)
    tokens = windows(vocabulary=VOCABULARY)
    expected = all_logits(ToyRunner(embedding, output.dequantize()), tokens, 20)
    assert float(expected.std()) > 0.5
    exact = all_logits(OnnxRunner(folder, 0), tokens, chunk)
    torch.testing.assert_close(exact, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", ["nbits", "qdq"])
def test_level_0_is_exact_where_the_shipped_setting_rounds_activations(tmp_path: Path, form: str) -> None:
    embedding, output = toy_weights()
    folder = save_toy_onnx(tmp_path / "toy", embedding, output, form=form)
    tokens = windows(vocabulary=VOCABULARY)
    expected = all_logits(ToyRunner(embedding, output.dequantize()), tokens, 20)
    shipped = (all_logits(onnx_runner(folder), tokens, 20) - expected).abs().max()
    exact = (all_logits(onnx_runner(folder, exact=True), tokens, 20) - expected).abs().max()
    assert exact < 2e-5 and shipped > 100 * exact


def test_texts_side_by_side_are_those_one_by_one(tmp_path: Path) -> None:
    runner = torch_runner(open_source(tiny.save(tmp_path / "tiny", "qwen3")))
    prompts = [[3, 1, 4], [5, 9], [2, 6, 5], [3, 5, 8], [7]]
    expected = [runner.generate(prompt, 12) for prompt in prompts]
    assert texts_of(runner, prompts, 12) == expected
    assert len(set(expected)) == len(prompts)
    with pytest.raises(InputError, match="without tokens"):
        texts_of(runner, [[1], []], 3)


def test_onnx_greedy_equals_full_recompute(toy: tuple[Path, ToyRunner]) -> None:
    folder, reference = toy
    prompt = [5, 7, 11]
    runner = OnnxRunner(folder, 0, threads=1)
    assert runner.generate(prompt, 16) == full_recompute_greedy(runner, prompt, 16)
    assert runner.generate(prompt, 16) == reference.generate(prompt, 16)
    assert len(set(runner.generate(prompt, 16))) > 3
    shipped = OnnxRunner(folder, threads=1)
    assert shipped.generate(prompt, 16) == full_recompute_greedy(shipped, prompt, 16)


def test_running_an_artifact_leaves_its_folder_as_it_was(toy: tuple[Path, ToyRunner]) -> None:
    folder, _ = toy
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for exact in (False, True):
        onnx_runner(folder, exact=exact).generate([1], 2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_vocabulary_and_context_come_from_the_folder(toy: tuple[Path, ToyRunner]) -> None:
    folder, _ = toy
    assert OnnxRunner(folder).vocabulary == VOCABULARY and OnnxRunner(folder).context is None
    (folder / "config.json").write_text('{"max_position_embeddings": 77}')
    assert OnnxRunner(folder).context == 77
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config.json cannot be read: it is not JSON"):
        OnnxRunner(folder)


@pytest.mark.parametrize("size", [0, -1, 2**31, 2**62])
def test_sizes_that_the_runtime_would_divide_by_are_refused(toy: tuple[Path, ToyRunner], size: int) -> None:
    path = toy[0] / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    node = next(node for node in graph.graph.node if node.op_type == "MatMulNBits")
    next(one for one in node.attribute if one.name == "block_size").i = size
    onnx.save(graph, path)
    with pytest.raises(ArtifactError, match=rf"has block_size = {size}, which no runtime can compute with"):
        onnx_runner(toy[0])


@pytest.mark.parametrize("name", ["batch", "input_ids", "logits"])
def test_names_that_are_no_text_are_refused(toy: tuple[Path, ToyRunner], name: str) -> None:
    path = toy[0] / "onnx" / "model.onnx"
    content = path.read_bytes()
    assert name.encode() in content
    path.write_bytes(content.replace(name.encode(), b"\xff" * len(name)))
    with pytest.raises(ArtifactError, match=r"model.onnx .*(no text|not an ONNX graph)"):
        onnx_runner(toy[0])


@pytest.mark.parametrize("exact", [False, True])
def test_a_damaged_artifact_is_refused_in_one_sentence(toy: tuple[Path, ToyRunner], exact: bool) -> None:
    folder, _ = toy
    data = folder / "onnx" / "model.onnx_data"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"model.onnx does not load in ONNX Runtime") as caught:
        onnx_runner(folder, exact=exact)
    assert "\n" not in str(caught.value)
    data.unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx does not load in ONNX Runtime"):
        onnx_runner(folder, exact=exact)
    graph = folder / "onnx" / "model.onnx"
    graph.write_bytes(b"not a graph at all")
    with pytest.raises(ArtifactError, match=r"model.onnx"):
        onnx_runner(folder, exact=exact)
    graph.unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx does not exist"):
        onnx_runner(folder, exact=exact)


@pytest.mark.parametrize(
    "rename, message",
    [
        ({"attention_mask": "mask"}, "lacks the inputs attention_mask"),
        ({"logits": "scores"}, "lacks the outputs logits"),
        ({"present.0.key": "cache.0.key"}, "lacks the outputs present.0.key"),
        ({"past_key_values.0.value": "past.0.value"}, "not understood: past.0.value"),
        (
            {"past_key_values.0.key": "position_ids", "past_key_values.0.value": "attention_mask"},
            "model.onnx",
        ),
    ],
)
def test_other_names_of_inputs_and_outputs_are_refused(
    tmp_path: Path, rename: dict[str, str], message: str
) -> None:
    folder = save_toy_onnx(tmp_path / "toy", *toy_weights(), rename=rename)
    with pytest.raises(ArtifactError, match=message):
        OnnxRunner(folder)


def test_a_missing_runtime_names_its_extra(
    toy: tuple[Path, ToyRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_runtime(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_runtime)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[onnx\]"):
        onnx_runner(toy[0])


def test_an_empty_prompt_is_refused(toy: tuple[Path, ToyRunner]) -> None:
    with pytest.raises(InputError, match="A prompt without tokens"):
        OnnxRunner(toy[0]).generate([], 4)


def test_every_artifact_kind_opens_through_the_same_seam(toy: tuple[Path, ToyRunner]) -> None:
    runner = RUNNERS["onnx"](toy[0], exact=True, threads=1)
    assert "accuracy level 0" in runner.name and runner.vocabulary == VOCABULARY
