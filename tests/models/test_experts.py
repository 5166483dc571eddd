"""Laws of experts: they compute what transformers computes, and each is calibrated on the tokens routed to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import any_models
import pytest
import torch
import transformers
from torch import Tensor, nn

from compot_deploy.models.experts import Experts, routers, same_place, unstack
from compot_deploy.models.sites import Gram
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.streaming import BlockStream
from compot_deploy.models.whole import whole_model

TEXTS = [
    torch.randint(3, any_models.VOCABULARY, (24,), generator=torch.Generator().manual_seed(n))
    for n in range(3)
]


@pytest.fixture(scope="module", params=any_models.EXPERTS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(any_models.save(tmp_path_factory.mktemp("experts"), request.param))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(input_ids=text[None]).logits[0] for text in TEXTS])


def test_a_model_is_found_in_its_checkpoint_and_computes_what_transformers_computes(
    source: ModelSource,
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.folder).eval()
    wanted = logits(theirs)
    assert float((logits(whole_model(source)) - wanted).abs().max()) < 1e-5 * float(wanted.std())
    unstack(theirs)
    assert sum(isinstance(module, Experts) for module in theirs.modules()) == 2
    assert float((logits(theirs) - wanted).abs().max()) < 1e-5 * float(wanted.std())


def test_gate_and_up_of_an_expert_read_one_input_and_routers_are_no_matrices(source: ModelSource) -> None:
    groups = {group.name: group for group in source.layout.of("model.layers.0")}
    for number in range(4):
        paths = [f"mlp.experts.{number}.{part}_proj" for part in ("gate", "up", "down")]
        assert groups[paths[0]].names == tuple(f"model.layers.0.{path}" for path in paths[:2])
        assert groups[paths[2]].names == (f"model.layers.0.{paths[2]}",)
    decided = tuple(routers(source.meta))
    assert len(decided) >= 2 and not set(decided) & set(source.layout.names)
    assert all(isinstance(source.meta.get_submodule(name), nn.Linear) for name in source.layout.names)


def routed(source: ModelSource, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What the experts of a block are called with, text by text: tokens, and the experts of each."""
    model = whole_model(source)
    called: list[Any] = []
    experts = model.get_submodule(f"model.layers.{block}.mlp.experts")
    experts.register_forward_pre_hook(lambda _, args: called.append(args))
    logits(model)
    yield from ((args[0], args[1]) for args in called)


def grams_of(source: ModelSource, block: int) -> dict[str, Gram]:
    with BlockStream(source, source.task.batches(TEXTS)) as stream:
        stream.skip_to(block)
        return stream.advance()


def test_the_gram_of_an_expert_is_that_of_the_tokens_routed_to_it(source: ModelSource) -> None:
    grams = grams_of(source, 1)
    for number in range(4):
        rows = torch.cat([x[(index == number).any(-1)] for x, index in routed(source, 1)]).double()
        gram = grams[f"mlp.experts.{number}.gate_proj"]
        assert gram.tokens == len(rows)
        wanted = rows.T @ rows
        assert float((gram.matrix - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_an_expert_that_no_token_reaches_has_the_gram_of_its_neighbours(source: ModelSource) -> None:
    router = next(name for name in routers(source.meta) if ".layers.1." in name and "shared" not in name)
    tensors = {name: source.tensors[name] for name in source.tensors}
    tensors[f"{router}.weight"] = torch.zeros_like(
        tensors[f"{router}.weight"]
    )  # all alike: two win every token
    grams = grams_of(source.with_tensors(tensors), 1)
    for part in ("gate", "down"):
        found = [grams[f"mlp.experts.{number}.{part}_proj"] for number in range(4)]
        reached = [gram.matrix for gram in found if gram.tokens]
        assert 0 < len(reached) < 4
        for gram in found:
            assert gram.tokens or torch.equal(gram.matrix, torch.stack(reached).sum(0))


def test_names_of_experts_tell_what_they_share() -> None:
    assert same_place("model.layers.0.mlp.experts.12.gate_proj") == "model.layers.0.mlp.experts.gate_proj"
    assert same_place("model.layers.0.mlp.shared_expert.gate_proj") is None
    assert same_place("model.layers.0.mlp.experts.act_fn") is None


def test_linears_that_are_experts_one_by_one_are_seen_without_values(tmp_path: Path) -> None:
    """As transformers 4 has them: which experts run is asked of values, which a model of shapes does not have."""
    from compot_deploy.models.sites import Products
    from compot_deploy.models.skeleton import ValuesUnknown

    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).to("meta")
    values, mask = torch.zeros(5, 8, device="meta"), torch.zeros(3, 2, 5, device="meta")
    mode = Products(experts, "")
    with ValuesUnknown(), mode:
        for number in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            _, tokens = torch.where(mask[number[0]])
            experts[int(number[0])](values[tokens])
    assert [seen.site.name for seen in mode.seen] == ["0", "1", "2"]
