"""Laws of models that hear and write: both stacks run block by block, gradients pass from one to the other."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import spoken
import torch
from torch import Tensor

from compot_deploy.errors import InputError
from compot_deploy.models.audio import files_of, read_recordings
from compot_deploy.models.backward import products_backwards
from compot_deploy.models.listening import Listener, load_listener
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.tasks import Batch, Utterance
from compot_deploy.models.whole import whole_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(spoken.save(tmp_path_factory.mktemp("speech") / "model"))


@pytest.fixture(scope="module")
def batches(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    listener = load_listener(source.folder, source.config)
    files = files_of(spoken.record(tmp_path_factory.mktemp("recordings"), 6))
    read = read_recordings(files, listener.rate, listener.seconds).found
    draw = torch.Generator().manual_seed(0)
    utterances = []
    for number, recording in enumerate(read):
        tokens = [*listener.beginning, *torch.randint(10, 300, (4 + number,), generator=draw).tolist()]
        utterances.append(listener.utterance(recording, tokens, len(listener.beginning)))
    return source.task.batches(utterances)


def test_blocks_of_both_stacks_stand_in_running_order(source: ModelSource) -> None:
    sides = ("encoder", "decoder")
    assert source.layout.blocks == tuple(f"model.{side}.layers.{n}" for side in sides for n in range(2))
    crossed = [group.names for group in source.layout.groups if "encoder_attn.k_proj" in group.name]
    assert all([name.rsplit(".", 1)[1] for name in names] == ["k_proj", "v_proj"] for names in crossed)
    assert len(crossed) == 2 and source.tied


def test_streaming_gives_what_a_plain_forward_pass_gives(source: ModelSource, batches: list[Batch]) -> None:
    model = whole_model(source)
    with BlockStream(source, batches, finish=True) as stream:
        for _ in source.layout.blocks:
            stream.advance(capture=False)
        streamed = stream.outputs()
    with torch.no_grad():
        for batch, found in zip(batches, streamed, strict=True):
            assert torch.equal(found, model(**batch.arguments).logits)


def test_grams_are_those_of_what_each_matrix_reads(source: ModelSource, batches: list[Batch]) -> None:
    model = whole_model(source)
    read: dict[str, Tensor] = {}
    rows = dict.fromkeys(source.layout.names, 0)
    now: list[Batch] = []

    def hook(name: str) -> Any:
        def seen(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            # Tokens that fill up a transcript are not counted; every frame that is heard is.
            kept = x[now[0].real] if x.shape[1] == now[0].real.shape[1] else x.flatten(0, 1)
            read[name] = read.get(name, 0) + kept.double().T @ kept.double()
            rows[name] += len(kept)

        return seen

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in source.layout.names]
    with torch.no_grad():
        for batch in batches:
            now[:] = [batch]
            model(**batch.arguments)
    for handle in handles:
        handle.remove()
    with BlockStream(source, batches) as stream:
        for block in source.layout.blocks:
            grams = stream.advance()
            for group in source.layout.of(block):
                for name in group.names:
                    torch.testing.assert_close(grams[group.name].matrix, read[name], rtol=1e-5, atol=1e-4)
                    assert grams[group.name].tokens == rows[name]
    heard = sum(len(batch.real) for batch in batches) * 50
    assert rows["model.decoder.layers.1.encoder_attn.v_proj"] == heard


def test_gradients_pass_from_the_decoder_to_the_encoder(source: ModelSource, batches: list[Batch]) -> None:
    model = whole_model(source)
    directions = torch.randn(320, generator=torch.Generator().manual_seed(1))

    def scalar(output: Tensor, batch: Batch) -> Tensor:
        return (output[batch.compared] @ directions).sum()

    expected: dict[str, list[Tensor]] = defaultdict(list)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def seen(module: Any, inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            kept[name] = output

        return seen

    for name in source.layout.names:
        model.get_submodule(name).register_forward_hook(keep(name))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in batches:
        scalar(model(**batch.arguments).logits, batch).backward()
        for name, output in kept.items():
            assert output.grad is not None  # a bias that is added does not change it
            expected[name].append(output.grad.flatten(0, 1))
    found: dict[str, list[Tensor]] = defaultdict(list)
    for _, products in products_backwards(source, batches, scalar):
        for product in products:
            found[product.name].append(product.gradient.flatten(0, 1))
    assert set(found) == set(source.layout.names)
    for name, gradients in expected.items():
        for one, other in zip(gradients, found[name], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_what_a_decoder_is_given_is_read_and_not_judged(batches: list[Batch]) -> None:
    for batch in batches:
        assert torch.equal(batch.real & ~batch.compared, batch.real & (torch.arange(batch.real.shape[1]) < 1))


def test_an_utterance_is_cut_like_a_window_of_tokens(batches: list[Batch]) -> None:
    utterance = Utterance(torch.arange(9), torch.zeros(2, 3), 2, "input_features")
    assert len(utterance) == 9 and utterance[:4].tokens.tolist() == [0, 1, 2, 3]
    assert utterance[:4].features is utterance.features


def test_a_listener_knows_how_a_transcript_begins_and_what_is_never_written(source: ModelSource) -> None:
    listener: Listener = load_listener(source.folder, source.config)
    assert listener.beginning == (3, 5) and listener.end == {2} and listener.longest == 12
    choose = listener.chooser()
    scores = torch.zeros(320).numpy()
    scores[[7, 8, 9, 20]] = [4, 9, 8, 1]
    assert (choose(scores), choose(scores), choose(scores)) == (20, 7, 7)


def test_a_model_that_does_not_say_how_it_hears_is_refused(tmp_path: Path) -> None:
    folder = spoken.save(tmp_path / "deaf")
    (folder / "preprocessor_config.json").unlink()
    opened = open_source(folder)
    with pytest.raises(InputError, match="nobody knows how it hears"):
        load_listener(opened.folder, opened.config)
