"""Laws of exported experts: every format gives back what it was given, and computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import any_models
import pytest
import torch
import transformers
from cases import nightly
from exported_models import compressed, some_of_everything

from compot_deploy.accuracy.onnx_runner import OnnxRunner
from compot_deploy.core.matrix import Dense, Leaf, Matrix, leaves
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.source import open_source
from compot_deploy.models.whole import model_of

TOKENS = torch.randint(3, any_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=any_models.EXPERTS)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CompressedModel:
    source = open_source(any_models.save(tmp_path_factory.mktemp("experts"), request.param))
    return compressed(source, some_of_everything(source), outside=False)


def same(one: Matrix, other: Matrix) -> bool:
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return all(type(a) is type(b) and _equal(a, b) for a, b in pairs)


def _equal(one: Leaf, other: Leaf) -> bool:
    parts = ("weight",) if isinstance(one, Dense) else ("integers", "scales")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def test_a_folder_of_transformers_loads_bit_for_bit_and_computes_the_same(
    given: CompressedModel, tmp_path: Path
) -> None:
    exporter = EXPORTERS["huggingface"]
    exporter.write(given, tmp_path, exporter.options({}))
    read = exporter.read_model(tmp_path)
    assert list(read.matrices) == list(given.matrices)
    for name, matrix in given.matrices.items():
        assert same(read.matrices[name], matrix), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, matrix in loaded.compressed_matrices.items():
        assert same(given.matrices[name], matrix), name
    with torch.no_grad():
        found, wanted = loaded(TOKENS).logits, model_of(given)(TOKENS).logits
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.std())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name, matrix in exporter.read(again).items():
        assert same(given.matrices[name], matrix), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly("qwen2_moe", "gpt_oss", "mixtral"))
def test_a_traced_graph_computes_what_torch_computes_whichever_experts_are_reached(
    kind: str, tmp_path: Path
) -> None:
    """One token reaches two of four experts, many reach all; token by token is the same as at once."""
    one = {"num_hidden_layers": 1} | ({} if kind == "mixtral" else {"layer_types": ["full_attention"]})
    source = open_source(any_models.save(tmp_path / "m", kind, **one))
    given = compressed(source, some_of_everything(source), outside=False)
    exporter = EXPORTERS["onnx"]
    assert exporter.supports(source) is None
    (tmp_path / "out").mkdir()
    exporter.write(given, tmp_path / "out", exporter.options({}))
    with torch.no_grad():
        wanted = model_of(given)(TOKENS).logits
    runner = OnnxRunner(tmp_path / "out", 0, threads=1)
    for chunk in (12, 1):
        found = torch.cat(list(runner.logits(TOKENS, chunk)), dim=1)
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.std())
    read = exporter.read_model(tmp_path / "out")
    for name, matrix in given.matrices.items():
        assert same(read.matrices[name], matrix), name
