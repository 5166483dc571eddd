"""Laws of traced decoders that keep something else than keys and values of one size."""

from __future__ import annotations

from pathlib import Path

import any_models
import pytest
import torch
import transformers
from cases import nightly
from exported_models import compressed, some_of_everything, source_of

from compot_deploy.accuracy.onnx_runner import OnnxRunner
from compot_deploy.errors import UnsupportedModelError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx.interface import interface_of
from compot_deploy.exporters.onnx.lint.folder import lint_onnx
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.models.whole import model_of

TOKENS = torch.randint(3, any_models.VOCABULARY, (1, 17), generator=torch.Generator().manual_seed(0))

ROUNDING = 5e-5
"""Torch computes a recurrence by blocks of tokens, the file token by token."""


def test_what_a_decoder_keeps_is_found_layer_by_layer(tmp_path: Path) -> None:
    lfm2 = interface_of(source_of("lfm2", tmp_path / "lfm2").meta)
    assert (lfm2.cache, lfm2.layers, lfm2.states) == (((2, 16),), (1,), (("conv", 0, (64, 3)),))
    assert lfm2.past == ("past_key_values.1.key", "past_key_values.1.value", "past_conv.0")
    assert lfm2.present == ("present.1.key", "present.1.value", "present_conv.0")
    deepseek = interface_of(source_of("deepseek", tmp_path / "deepseek").meta)
    ((heads, keys, values),) = deepseek.cache
    assert keys != values and deepseek.cache_tensors == ((heads, keys), (heads, values))
    assert deepseek.states == () and deepseek.past == ("past_key_values.0.key", "past_key_values.0.value")


def test_a_recurrence_is_refused_in_a_sentence() -> None:
    config = transformers.Mamba2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        state_size=16,
        n_groups=1,
    )
    with torch.device("meta"):
        model = transformers.Mamba2ForCausalLM(config).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"it keeps the state of a recurrence, .* Use another --format\."
    ):
        interface_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly("lfm2", "qwen3_5", "deepseek"))
def test_a_decoder_continues_in_pieces_of_any_length_as_torch_reads_at_once(
    kind: str, tmp_path: Path
) -> None:
    source = source_of(kind, tmp_path / "source")
    given, exporter, folder = (
        compressed(source, some_of_everything(source)),
        EXPORTERS["onnx"],
        tmp_path / "out",
    )
    folder.mkdir()
    exporter.write(given, folder, exporter.options({}))
    assert not [found for found in lint_onnx(folder) if found.severity == "error"]
    model = model_of(given)
    with torch.no_grad():
        wanted = model(TOKENS).logits
    runner = OnnxRunner(folder, 0, threads=1)
    for chunk in (17, 5, 2, 1):
        found = torch.cat(list(runner.logits(TOKENS, chunk)), 1)
        assert float((found - wanted).abs().max()) < ROUNDING * float(wanted.std()), chunk
    # A row that is padded on the left gives what it gives alone.
    session = open_session(folder, 0, 1)
    feeds = {"input_ids": torch.cat((torch.zeros(1, 4, dtype=torch.int64), TOKENS), 1)}
    feeds["attention_mask"] = (torch.arange(21) >= 4).long()[None]
    feeds = {name: torch.cat((value, torch.ones_like(value))) for name, value in feeds.items()}
    for entry in session.get_inputs()[2:]:
        feeds[entry.name] = torch.zeros(
            [2, *(size if isinstance(size, int) else 0 for size in entry.shape[1:])]
        )
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in feeds.items()})
    padded = torch.from_numpy(logits)[:1, 4:]
    assert float((padded - wanted).abs().max()) < ROUNDING * float(wanted.std())
