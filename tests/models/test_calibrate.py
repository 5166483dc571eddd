"""Laws of calibration: blockwise equals whole, padding is nothing, weights in the middle may change."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from compot_deploy.models.calibrate import collect_grams

from compot_deploy.models.source import open_source
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tokens import make_windows


def _windows(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(320, (length,), generator=generator) for length in lengths]


def _reference(folder: Path, windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Grams by hooks on the whole model, one window at a time, no padding anywhere."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_source(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = {
        f"{checkpoint.architecture.block_path(layer)}|{shared.name}": (
            f"{checkpoint.architecture.block_path(layer)}.{shared.linears[-1]}"
        )
        for layer in range(checkpoint.layers)
        for shared in checkpoint.architecture.inputs
    }
    grams = collect_grams(
        model,
        inputs,
        lambda: windows,
        lambda window: model(input_ids=window[None]),
        lambda window: torch.ones(1, len(window), dtype=torch.bool),
    )
    return {name: gram.matrix for name, gram in grams.items()}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_blockwise_grams_equal_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / kind, kind)
    windows = _windows([40, 40, 17, 23])
    reference = _reference(folder, windows)
    checkpoint = open_source(folder)
    stream = BlockStream(checkpoint, make_windows(windows, "test", 320), device="cpu", dtype="float32")
    for layer in range(checkpoint.layers):
        for name, gram in stream.advance(layer).items():
            expected = reference[f"{checkpoint.architecture.block_path(layer)}|{name}"]
            assert gram.tokens == 120
            torch.testing.assert_close(
                gram.matrix, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
            )


def test_a_sliding_window_is_seen(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "mistral", "mistral", sliding_window=8)
    windows = _windows([40])
    reference = _reference(folder, windows)
    checkpoint = open_source(folder)
    stream = BlockStream(checkpoint, make_windows(windows, "test", 320), device="cpu", dtype="float32")
    stream.advance(0)
    gram = stream.advance(1)["attention_input"].matrix
    expected = reference[f"{checkpoint.architecture.block_path(1)}|attention_input"]
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_skipping_the_capture_does_not_change_what_follows(tmp_path: Path) -> None:
    checkpoint = open_source(tiny.save(tmp_path / "llama"))
    windows = make_windows(_windows([30, 30]), "test", 320)
    results = []
    for capture in (True, False):
        stream = BlockStream(checkpoint, windows, device="cpu", dtype="float32")
        stream.advance(0, capture=capture)
        results.append(stream.advance(1))
    for name in results[0]:
        assert torch.equal(results[0][name].matrix, results[1][name].matrix)


def test_later_blocks_see_replaced_weights(tmp_path: Path) -> None:
    checkpoint = open_source(tiny.save(tmp_path / "llama"))
    windows = make_windows(_windows([30]), "test", 320)

    def second_gram(scale: float) -> torch.Tensor:
        stream = BlockStream(checkpoint, windows, device="cpu", dtype="float32")
        path = "mlp.down_proj"
        weight = scale * checkpoint.weight(f"model.layers.0.{path}")
        stream.advance(0, replacements=lambda _: {path: weight})
        return stream.advance(1)["attention_input"].matrix

    stream = BlockStream(checkpoint, windows, device="cpu", dtype="float32")
    stream.advance(0)
    unchanged = stream.advance(1)["attention_input"].matrix
    assert torch.equal(second_gram(1.0), unchanged)
    assert not torch.allclose(second_gram(0.5), unchanged)


def test_blocks_come_in_order(tmp_path: Path) -> None:
    checkpoint = open_source(tiny.save(tmp_path / "llama"))
    stream = BlockStream(checkpoint, make_windows(_windows([8]), "test", 320), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="Block 0 comes next"):
        stream.advance(1)
