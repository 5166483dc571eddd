"""Laws of two models side by side: sums are those of the whole models, and residual streams are known as such."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import any_models
import pytest
import tiny
import torch
from torch import Tensor

from compot_deploy.core.matrix import Dense
from compot_deploy.models.experts import same_place
from compot_deploy.models.side_by_side import Disturbed, SideBySide
from compot_deploy.models.sites import InputGroup
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.whole import put_in, whole_model

WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bert": (),  # norms stand behind its sums
}


@pytest.mark.parametrize("kind", WRITERS)
def test_sums_are_those_of_two_whole_models(kind: str, tmp_path: Path) -> None:
    save = tiny.save if kind in tiny.KINDS else any_models.save
    source = open_source(save(tmp_path / "model", kind))
    windows = list(torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0)))
    batches = source.task.batches(windows)
    felt: dict[str, Disturbed] = {}
    others: dict[str, Tensor] = {}

    def make(group: InputGroup, found: Disturbed) -> Mapping[str, Tensor]:
        felt[group.name] = found
        made = {name: source.weight(name).float() * 1.1 for name in group.names}
        others.update(made)
        return made

    with SideBySide(source, batches) as both:
        both.advance(make)
        both.pass_over({name: source.weight(name).float() for name in _names(source, 1)})
    first = source.layout.blocks[0]
    for group in source.layout.of(first):
        found = felt[group.name]
        site, before = group.sites[0], list(others)[: list(others).index(group.names[0])]
        dense = {name: Dense(others[name]) for name in before}
        original, changed = whole_model(source), put_in(whole_model(source), source.sites, dense)
        x, y = (_inputs(model, site.name, batches) for model in (original, changed))
        torch.testing.assert_close(found.gram.matrix, (y.T @ y).double(), rtol=1e-4, atol=1e-3)
        if site.name.removeprefix(f"{first}.") not in WRITERS[kind]:
            assert found.lacking is None and found.cross is not None
            torch.testing.assert_close(found.cross, (y.T @ x).double(), rtol=1e-4, atol=1e-3)
            continue
        assert found.lacking is not None and found.cross is None
        lacks = sum(
            _inputs(original, name, batches) @ source.weight(name).float()
            - _inputs(changed, name, batches)
            @ (others[name] if name in before else source.weight(name).float())
            for name in [*before, site.name]
            if name.removeprefix(f"{first}.") in WRITERS[kind]
        )
        assert isinstance(lacks, Tensor)
        torch.testing.assert_close(found.lacking, (y.T @ lacks).double(), rtol=1e-3, atol=1e-3)


def test_experts_come_last_for_the_tokens_that_are_sent_to_them(tmp_path: Path) -> None:
    source = open_source(any_models.save(tmp_path / "model", "mixtral"))
    batches = source.task.batches(list(torch.randint(3, 300, (3, 20))))
    felt: dict[str, Disturbed] = {}

    def make(group: InputGroup, found: Disturbed) -> Mapping[str, Tensor]:
        felt[group.name] = found
        return {name: source.weight(name).float() for name in group.names}

    with SideBySide(source, batches) as both:
        both.advance(make)
    groups = {group.name: group for group in source.layout.of(source.layout.blocks[0])}
    assert set(felt) == set(groups)
    apart = [same_place(groups[name].names[0]) is not None for name in felt]
    assert apart == sorted(apart) and any(apart) and not all(apart)
    sent = [found.gram.tokens for name, found in felt.items() if groups[name].names[0].endswith("down_proj")]
    assert sum(sent) == 60 * source.config["num_experts_per_tok"]
    assert all(felt[name].cross is None for name, expert in zip(felt, apart, strict=True) if expert)


def _names(source: ModelSource, block: int) -> list[str]:
    return [name for group in source.layout.of(source.layout.blocks[block]) for name in group.names]


def _inputs(model: Any, name: str, batches: Any) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch.arguments)
    hook.remove()
    return torch.cat([values.reshape(-1, values.shape[-1]) for values in seen])
