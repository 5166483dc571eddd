"""Laws of running block by block: blockwise equals whole, padding is nothing, weights in the middle may change."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from cases import some_by_day
from torch import Tensor
from whole_models import Recorded, hooked_grams, loaded, outputs

from compot_deploy.errors import InputError
from compot_deploy.models.sites import Gram
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.streaming import BlockStream, _Pass

KINDS = (*tiny.KINDS, *any_models.KINDS)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert passes() == []


def passes() -> list[threading.Thread]:
    """Threads that stand somewhere in a model."""
    return [one for one in threading.enumerate() if isinstance(one, _Pass)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("models")}


def opened(folders: dict[str, Path], kind: str) -> ModelSource:
    """A model, made once for all tests of this file."""
    if kind not in folders:
        save = tiny.save if kind in tiny.KINDS else any_models.save
        folders[kind] = save(folders["root"] / kind.replace(" ", "-"), kind)
    return open_source(folders[kind])


def windows_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator) for length in lengths]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        found.double(),
        expected.double(),
        rtol=tolerance,
        atol=tolerance * float(expected.abs().max()),
    )


@pytest.mark.parametrize("kind", some_by_day(KINDS))
def test_blockwise_grams_and_outputs_equal_those_of_the_whole_model(
    kind: str, folders: dict[str, Path]
) -> None:
    """Texts of four lengths side by side: what stands behind the end of a short one changes nothing."""
    source = opened(folders, kind)
    windows = windows_of([40, 40, 17, 23])
    whole = loaded(source.folder, source.task.auto_class)
    names = [group.sites[0].name for group in source.layout.groups]
    expected = hooked_grams(whole, names, windows)
    batches = source.task.batches(windows)
    with BlockStream(source, batches, finish=True) as stream:
        found: dict[str, Gram] = {}
        for block in source.layout.blocks:
            grams = stream.advance()
            assert set(grams) == {group.name for group in source.layout.of(block)}
            found |= {f"{block}.{name}": gram for name, gram in grams.items()}
        results = stream.outputs()
    assert set(found) == set(names)
    for name, gram in found.items():
        assert gram.tokens == 120
        close(gram.matrix, expected[name])
    (result,), (batch,) = results, batches
    for row, (window, alone) in enumerate(zip(windows, outputs(whole, source, windows), strict=True)):
        close(result[row] if source.task.kind == "classification" else result[row, : len(window)], alone)
        assert int(batch.real[row].sum()) == len(window)


@pytest.mark.parametrize("kind", some_by_day(KINDS))
def test_every_reader_of_an_input_shares_its_gram(kind: str, folders: dict[str, Path]) -> None:
    source = opened(folders, kind)
    windows = windows_of([12])
    whole = loaded(source.folder, source.task.auto_class)
    expected = hooked_grams(whole, source.layout.names, windows)
    shared = [group for group in source.layout.groups if len(group.sites) > 1]
    assert shared or kind in ("gpt2", "gpt2 classes", "gpt_neox", "phi3"), "these have fused matrices only"
    for group in shared:
        assert all(torch.equal(expected[name], expected[group.names[0]]) for name in group.names)
    inputs = [expected[group.names[0]] for group in source.layout.groups]
    different = {tuple(gram.flatten()[:8].tolist()) for gram in inputs}
    assert len(different) == len(inputs), "two groups read one input"


def test_more_tokens_than_fit_into_a_batch_are_several_batches(folders: dict[str, Path]) -> None:
    source = opened(folders, "llama")
    windows = windows_of([250] * 20)
    batches = source.task.batches(windows)
    assert [len(batch.real) for batch in batches] == [4] * 5
    with BlockStream(source, batches) as stream:
        gram = stream.advance()["self_attn.q_proj"]
    assert gram.tokens == 5000
    whole = loaded(source.folder, source.task.auto_class)
    name = "model.layers.0.self_attn.q_proj"
    close(gram.matrix, hooked_grams(whole, [name], windows)[name])


@pytest.mark.parametrize(("kind", "changes"), [("mistral", {"sliding_window": 8}), ("gemma3", {})])
def test_a_sliding_window_is_seen(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    def save(name: str, window: int | None) -> ModelSource:
        folder = tmp_path / name
        if kind == "mistral":
            return open_source(tiny.save(folder, kind, **changes | {"sliding_window": window}))
        any_models.save(folder, kind)
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"sliding_window": 8', f'"sliding_window": {window or 64}'))
        return open_source(folder)

    windows = windows_of([40])
    name, seen = "self_attn.q_proj", {}
    for label, size in (("slides", 8), ("sees all", None)):
        source = save(label.replace(" ", "-"), size)
        with BlockStream(source, source.task.batches(windows)) as stream:
            stream.advance()
            seen[label] = stream.advance()[name].matrix
        whole = loaded(source.folder, source.task.auto_class)
        full = f"{source.layout.blocks[1]}.{name}"
        close(seen[label], hooked_grams(whole, [full], windows)[full])
    assert not torch.allclose(seen["slides"], seen["sees all"], rtol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "bert"])
def test_a_forward_pass_in_half_precision_is_near_that_in_full(
    kind: str, dtype: str, folders: dict[str, Path]
) -> None:
    source = opened(folders, kind)
    batches = source.task.batches(windows_of([40, 17]))
    made: dict[str, list[Tensor]] = {}
    for name in ("float32", dtype):
        with BlockStream(source, batches, dtype=name, finish=True) as stream:
            grams = [gram for _ in source.layout.blocks for gram in stream.advance().values()]
            made[name] = [gram.matrix for gram in grams]
            (result,) = stream.outputs()
            assert result.dtype == getattr(torch, name)
    assert all(gram.dtype == torch.float64 for gram in made[dtype])
    for half, full in zip(made[dtype], made["float32"], strict=True):
        assert not torch.equal(half, full)
        assert float((half - full).norm()) < 0.05 * float(full.norm())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_skipping_the_capture_does_not_change_what_follows(kind: str, folders: dict[str, Path]) -> None:
    source = opened(folders, kind)
    batches = source.task.batches(windows_of([30, 30]))
    results = []
    for capture in (True, False):
        with BlockStream(source, batches) as stream:
            assert bool(stream.advance(capture=capture)) is capture
            results.append(stream.advance())
    with BlockStream(source, batches) as stream:
        stream.skip_to(1)
        results.append(stream.advance())
    for name, gram in results[0].items():
        assert all(torch.equal(gram.matrix, other[name].matrix) for other in results[1:])


@pytest.mark.parametrize(
    ("kind", "site", "group"),
    [
        ("llama", "model.layers.0.mlp.down_proj", "self_attn.q_proj"),
        ("gpt2", "transformer.h.0.mlp.c_proj", "attn.c_attn"),  # kept as (in, out)
        ("bert", "encoder.layer.0.output.dense", "attention.self.query"),
    ],
)
def test_later_blocks_see_replaced_weights(
    kind: str, site: str, group: str, folders: dict[str, Path]
) -> None:
    source = opened(folders, kind)
    windows = windows_of([30])
    first = source.layout.blocks[0]

    def run(scale: float) -> tuple[Mapping[str, Gram], Mapping[str, Gram], Tensor]:
        asked: list[Mapping[str, Gram]] = []

        def replacements(grams: Mapping[str, Gram]) -> Mapping[str, Tensor]:
            asked.append(grams)
            return {site: scale * source.weight(site)}

        with BlockStream(source, source.task.batches(windows), finish=True) as stream:
            given = stream.advance(replacements=replacements)
            assert len(asked) == 1 and set(asked[0]) == set(given)
            assert all(torch.equal(asked[0][name].matrix, given[name].matrix) for name in given)
            return given, stream.advance(), stream.outputs()[0]

    with BlockStream(source, source.task.batches(windows), finish=True) as stream:
        own, unchanged = stream.advance(), stream.advance()
        (output,) = stream.outputs()
    given, following, result = run(1.0)
    assert torch.equal(following[group].matrix, unchanged[group].matrix)
    assert torch.equal(result, output)
    given, following, result = run(0.5)
    # A block's own Grams are taken before its weights change.
    assert all(torch.equal(gram.matrix, own[name].matrix) for name, gram in given.items())
    assert not torch.allclose(following[group].matrix, unchanged[group].matrix)

    def halve(model: Any) -> None:
        with torch.no_grad():
            model.get_submodule(site).weight.mul_(0.5)

    whole = loaded(source.folder, source.task.auto_class)
    name = f"{source.layout.blocks[1]}.{group}"
    close(following[group].matrix, hooked_grams(whole, [name], windows, halve)[name])
    close(result[0], outputs(whole, source, windows)[0])
    # The same by running past the block, as a run that was stopped does.
    with BlockStream(source, source.task.batches(windows)) as stream:
        passed: list[str] = []

        def of(block: str) -> Any:
            passed.append(block)
            return lambda _: {site: 0.5 * source.weight(site)}

        stream.skip_to(1, of)
        assert passed == [first]
        assert torch.equal(stream.advance()[group].matrix, following[group].matrix)


@pytest.mark.parametrize("kind", ["llama", "llama3", "gpt2", "bert"])
def test_one_block_is_in_memory_at_a_time(kind: str, folders: dict[str, Path]) -> None:
    source = opened(folders, kind)
    blocks = source.layout.blocks
    with BlockStream(source, source.task.batches(windows_of([8, 8]))) as stream:

        def held() -> set[str]:
            return {
                path
                for path in blocks
                if any(not value.is_meta for value in stream._model.get_submodule(path).parameters())
            }

        for block in blocks:
            assert held() == set()

            def look(_: Mapping[str, Gram], block: str = block) -> Mapping[str, Tensor]:
                assert held() == {block}
                return {}

            stream.advance(replacements=look)
        assert held() == set()


@pytest.mark.parametrize("finish", [False, True])
def test_a_head_is_read_only_where_it_runs(finish: bool, folders: dict[str, Path]) -> None:
    source = opened(folders, "llama")
    tensors = Recorded(source.tensors)
    with BlockStream(
        replace(source, tensors=tensors), source.task.batches(windows_of([8])), finish=finish
    ) as stream:
        stream.advance()
        assert not any(".layers.1." in name for name in tensors.read)
        stream.advance()
    assert ("lm_head.weight" in tensors.read) is finish
    assert {name for name in source.tensors if "layers" in name} <= tensors.read


def test_passes_end_when_the_stream_is_closed_in_the_middle(folders: dict[str, Path]) -> None:
    source = opened(folders, "gpt2")
    stream = BlockStream(source, source.task.batches(windows_of([250] * 20)))
    stream.advance()
    assert len(passes()) == 5
    stream.close()
    assert passes() == []
    stream.close()  # once more does no harm


def test_passes_end_when_the_last_block_has_run(folders: dict[str, Path]) -> None:
    source = opened(folders, "llama")
    stream = BlockStream(source, source.task.batches(windows_of([30])))
    for _ in source.layout.blocks:
        stream.advance()
    assert passes() == []


def test_an_error_in_the_middle_reaches_the_caller_and_ends_the_passes(
    folders: dict[str, Path],
) -> None:
    source = opened(folders, "llama")

    class Damaged(Recorded):
        def __getitem__(self, name: str) -> Tensor:
            if ".layers.1." in name:
                raise InputError(f"{name} is damaged")
            return super().__getitem__(name)

    batches = source.task.batches(windows_of([30, 20]))
    with (
        BlockStream(replace(source, tensors=Damaged(source.tensors)), batches) as stream,
        pytest.raises(InputError, match=r"layers\.1\..* is damaged"),
    ):
        stream.advance()
        stream.advance()

    def fail(_: Mapping[str, Gram]) -> Mapping[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BlockStream(source, batches) as stream:
        stream.advance(replacements=fail)
    # A model's own code that fails: its error arrives here, not in a thread that nobody watches.
    bad = source.task.batches([torch.tensor([3, 4, 5])])
    bad[0].arguments["input_ids"][0, 0] = 10_000  # type: ignore[index]
    with pytest.raises(IndexError), BlockStream(source, bad) as stream:
        stream.advance()


def test_two_runs_are_bitwise_equal(folders: dict[str, Path]) -> None:
    source = opened(folders, "opt")
    batches = source.task.batches(windows_of([30, 12, 12]))
    runs = []
    for _ in range(2):
        with BlockStream(source, batches) as stream:
            runs.append([gram.matrix for _ in source.layout.blocks for gram in stream.advance().values()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
