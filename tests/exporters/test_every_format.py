"""Laws for models of any kind: what is written comes back, and every format computes what torch computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from any_models import KINDS, UNUSUAL, VOCABULARY
from cases import nightly
from exported_models import compressed, some_of_everything, source_of
from matrices import same_matrix
from reference_onnx import rounded
from torch import Tensor

from compot_deploy.accuracy.onnx_runner import OnnxRunner
from compot_deploy.accuracy.torch_runner import TorchRunner
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Dense, Quantized
from compot_deploy.errors import RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import digest
from compot_deploy.exporters.huggingface.bnb import dequantized
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.whole import model_of
from compot_deploy.quant import rtn
from compot_deploy.transformers_plugin.filling import from_compressed

pytestmark = pytest.mark.slow

transformers.utils.logging.disable_progress_bar()

ONNX, GGUF, HUGGING_FACE = (EXPORTERS[name] for name in ("onnx", "gguf", "huggingface"))
SHOWN = ("gpt2", "bert")
REST = tuple(kind for kind in (*KINDS, *UNUSUAL) if kind not in SHOWN)
UNREAD = {
    ("onnx", "bert"): {"pooler.dense"},
    ("onnx", "roberta"): {"pooler.dense"},
    ("onnx", "albert"): {"pooler"},
}
"""Matrices that a graph of token vectors does not need; exactly these are left out of it."""


class Case:
    """A model, and what each format makes of it, once for all tests."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.source = source_of(kind, folder / "source")
        self.given = compressed(self.source, some_of_everything(self.source))

    def exported(self, name: str) -> Path:
        """The folder of a format."""
        target = self.folder / name
        if not target.exists():
            exporter = EXPORTERS[name]
            assert exporter.supports(self.source) is None
            exporter.check(self.source, {}, exporter.options({}))
            target.mkdir()
            exporter.write(self.given, target, exporter.options({}))
        return target


@pytest.fixture(scope="module", params=[*SHOWN, *nightly(*REST)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield Case(request.param, tmp_path_factory.mktemp(request.param))


def texts() -> dict[str, Tensor]:
    """Random tokens, two of three texts padded on the right."""
    tokens = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[1, -4:] = mask[2, -7:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def output(model: Any, given: CompressedModel, batch: dict[str, Tensor]) -> Tensor:
    """What a torch model gives for the real tokens of some texts, or for the texts."""
    with torch.no_grad():
        return real(given.task.output(model(**batch)), batch)


def real(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return values[batch["attention_mask"].bool()] if values.dim() == 3 else values


@pytest.mark.parametrize("name", ["onnx", "huggingface"])
def test_every_matrix_and_tensor_comes_back(case: Case, name: str) -> None:
    given, again = case.given, EXPORTERS[name].read_model(case.exported(name))
    unread = UNREAD.get((name, case.kind), set())
    assert set(again.matrices) == set(given.matrices) - unread
    for path, matrix in again.matrices.items():
        assert digest(matrix) == digest(given.matrices[path]), path
        assert same_matrix(matrix, given.matrices[path])
        assert again.role(path) == given.role(path)
    assert set(again.tensors) == set(given.tensors) - {f"{path}.bias" for path in unread}
    for path in again.tensors:
        assert torch.equal(again.tensors[path].float(), given.tensors[path].float()), path
    assert (again.tied, again.embedding, again.head, again.task) == (
        given.tied,
        given.embedding,
        given.head,
        given.task,
    )
    assert [
        diagnostic
        for diagnostic in EXPORTERS[name].lint(case.exported(name))
        if diagnostic.severity == "error"
    ] == []


def test_an_onnx_folder_computes_what_torch_makes_of_it(case: Case) -> None:
    again = ONNX.read_model(case.exported("onnx"))
    session, batch = open_session(case.exported("onnx"), 0, 1), texts()
    feeds: dict[str, Any] = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = torch.zeros(3, entry.shape[1], 0, entry.shape[3]).numpy()
        else:
            feeds[entry.name] = batch.get(entry.name, torch.zeros_like(batch["input_ids"])).numpy()
    found = real(torch.from_numpy(session.run(None, feeds)[0]), batch)
    expected = output(model_of(again), again, batch)
    assert float((found - expected).abs().max()) < 1e-5
    assert float(expected.abs().max()) > 0.1


def test_a_decoder_reads_its_cache(case: Case) -> None:
    if not case.given.task.generates:
        pytest.skip("it has none")
    runner = OnnxRunner(case.exported("onnx"), 0, threads=1)
    tokens = texts()["input_ids"][:1]
    expected = torch.cat(list(TorchRunner(model_of(case.given)).logits(tokens, 9)), dim=1)
    pieces = torch.cat(list(runner.logits(tokens, 2)), dim=1)
    assert float((pieces - expected).abs().max()) < 1e-5


def test_a_hugging_face_folder_loads_bit_for_bit(case: Case) -> None:
    auto = getattr(transformers, case.source.task.auto_class)
    loaded = auto.from_pretrained(case.exported("huggingface"), dtype=torch.float32).eval()
    in_memory = from_compressed(case.given)
    batch = texts()
    assert torch.equal(output(loaded, case.given, batch), output(in_memory, case.given, batch))
    multiplied_out = output(model_of(case.given), case.given, batch)
    assert torch.allclose(output(loaded, case.given, batch), multiplied_out, atol=2e-5)


def test_a_folder_that_is_read_is_written_the_same(case: Case, tmp_path: Path) -> None:
    again = HUGGING_FACE.read_model(case.exported("huggingface"))
    HUGGING_FACE.write(again, tmp_path, HUGGING_FACE.options({}))
    for file in ("model.safetensors", "compot_modeling.py"):
        assert (tmp_path / file).read_bytes() == (case.exported("huggingface") / file).read_bytes()
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, case.folder / "huggingface")
    ]
    assert configs[0]["compot"] == configs[1]["compot"]


def test_floating_point_and_tied_tables_come_back_too(tmp_path: Path) -> None:
    source = source_of("bert masked", tmp_path / "source")
    given = compressed(source)
    assert given.tied and all(isinstance(matrix, Dense) for matrix in given.matrices.values())
    for name in ("onnx", "huggingface"):
        folder = tmp_path / name
        folder.mkdir()
        EXPORTERS[name].write(given, folder, EXPORTERS[name].options({}))
        again = EXPORTERS[name].read_model(folder)
        assert all(same_matrix(again.matrices[path], matrix) for path, matrix in given.matrices.items())
        assert set(again.tensors) == set(given.tensors) and again.tied
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "huggingface")
    original = transformers.AutoModelForMaskedLM.from_pretrained(source.folder)
    assert torch.equal(output(loaded, given, texts()), output(original, given, texts()))


def test_gguf_says_which_models_it_has_a_way_for(case: Case) -> None:
    """The others have an activation or a scale that llama.cpp lacks, a type that it lacks, or write no text."""
    reason, source = GGUF.supports(case.source), case.source
    if source.task.generates and source.model_type in ("gpt2", "phi3"):
        assert reason is None
    else:
        assert reason is not None and source.model_type in reason


class Normed(torch.nn.Embedding):
    """A table of which nobody knows what it gives."""


def test_what_packed_folders_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    bnb = {"quantizer": "bnb", "method": "plain", "embeddings": "none", "head": "none"}
    gpt2, gemma = source_of("gpt2", tmp_path / "gpt2"), source_of("gemma3", tmp_path / "gemma3")
    with pytest.raises(RecipeError, match="layout keeps linears as"):
        HUGGING_FACE.check(gpt2, {}, HUGGING_FACE.options(bnb))
    HUGGING_FACE.check(gemma, {}, HUGGING_FACE.options(bnb))
    for source in (gpt2, gemma):
        HUGGING_FACE.check(source, {"embedding": Grid(8, 32)}, HUGGING_FACE.options({}))
    gemma.meta.set_submodule("model.embed_tokens", Normed(4, 4))
    with pytest.raises(RecipeError, match="does more than to look up rows"):
        HUGGING_FACE.check(gemma, {"embedding": Grid(8, 32)}, HUGGING_FACE.options({}))


@pytest.mark.parametrize("kind", ["opt projected", "bert classes", "phi3"])
@pytest.mark.parametrize("grid", [Grid(4, 64, "nf4"), Grid(8, 32)])
def test_bitsandbytes_own_layout_holds_models_of_any_kind(kind: str, grid: Grid, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    width = {"ffn_dim" if kind.startswith("opt") else "intermediate_size": 192}  # whole blocks of 64
    source = source_of(kind, tmp_path / "source", **width)
    inside = set(source.layout.names)
    given = compressed(
        source, lambda name, weight: on_one_scale(weight, grid) if name in inside else Dense(weight)
    )
    options = HUGGING_FACE.options(
        {"quantizer": "bnb", "method": "plain", "embeddings": "none", "head": "none"}
    )
    HUGGING_FACE.write(given, tmp_path, options)
    again = HUGGING_FACE.read_model(tmp_path)
    assert all(digest(again.matrices[name]) == digest(matrix) for name, matrix in given.matrices.items())
    assert set(again.tensors) == set(given.tensors) and HUGGING_FACE.lint(tmp_path) == ()
    auto = getattr(transformers, source.task.auto_class)
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    assert {name for name, module in loaded.named_modules() if isinstance(module, kinds)} == inside
    found, expected = output(dequantized(loaded), given, texts()), output(model_of(given), given, texts())
    assert torch.allclose(found, expected, atol=1e-4)


def on_one_scale(weight: Tensor, grid: Grid) -> Quantized:
    """Rounded; 8 bits with one scale per output, as bitsandbytes has them."""
    if grid.codebook != "integer":
        return rtn(weight, None, grid)
    whole = rounded(weight, Grid(8, weight.shape[0]))
    return Quantized(whole.integers, whole.scales.expand(grid.groups(weight.shape[0]), -1).contiguous(), grid)
