"""Laws of tasks: what is compared of two models, and that padding is no part of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compot_deploy.models.tasks import EMBEDDING, GENERATION, TOKENS_PER_BATCH, LossSum, Task, pooled, task_of

REAL = torch.tensor([[True, True, True], [True, True, False]])
CLASSES = Task("classification", "AutoModelForSequenceClassification", "classifier")
MASKED = Task("masked", "AutoModelForMaskedLM", "masked language model")


def outputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", [GENERATION, MASKED, EMBEDDING, CLASSES], ids=lambda task: task.kind)
def test_a_model_is_no_loss_to_itself_and_another_is(task: Task) -> None:
    shape = (2, 5) if task.kind == "classification" else (2, 3, 5)
    first, second = outputs(*shape), outputs(*shape, seed=1)
    assert task.loss(first, first, REAL).mean == pytest.approx(0, abs=1e-12)
    assert task.loss(first, second, REAL).mean > 0.01
    assert task.loss(first, second, REAL).count == (5 if task.kind in ("generation", "masked") else 2)


@pytest.mark.parametrize("task", [GENERATION, MASKED, EMBEDDING], ids=lambda task: task.kind)
@pytest.mark.parametrize("value", [1e3, torch.nan])
def test_padding_never_counts(task: Task, value: float) -> None:
    first, second = outputs(2, 3, 5), outputs(2, 3, 5, seed=1)
    loss = task.loss(first, second, REAL)
    first[1, 2], second[1, 2] = value, -value
    assert task.loss(first, second, REAL) == loss
    second[1, 1] += 1 + torch.arange(5.0)
    assert task.loss(first, second, REAL) != loss


def test_the_divergence_is_what_torch_says() -> None:
    first, second = outputs(2, 3, 5), outputs(2, 3, 5, seed=1)
    expected = nn.functional.kl_div(
        second[REAL].double().log_softmax(-1), first[REAL].double().softmax(-1), reduction="sum"
    )
    assert GENERATION.loss(first, second, REAL).total == pytest.approx(float(expected))


def test_embeddings_are_compared_by_the_angle_between_their_means() -> None:
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [9.0, 9.0]]])
    real = torch.tensor([[True, True], [True, False]])
    assert pooled(vectors, real).tolist() == [[0.5, 0.5], [2.0, 0.0]]
    other = torch.tensor([[[3.0, 3.0], [3.0, 3.0]], [[0.0, 5.0], [0.0, 0.0]]])
    assert EMBEDDING.loss(vectors, other, real).mean == pytest.approx(0.5)  # cosines 1 and 0


def test_sums_of_losses_are_weighted_by_positions() -> None:
    total = LossSum(1.0, 1) + LossSum(0.5, 4)
    assert total.mean == pytest.approx(0.3)
    assert LossSum(-1e-17, 3).mean == 0.0 and LossSum(0.0, 0).mean == 0.0


def test_a_model_that_generates_gets_no_mask_and_the_others_do() -> None:
    windows = [torch.tensor([3, 4, 5]), torch.tensor([6])]
    for task in (GENERATION, EMBEDDING, MASKED):
        (batch,) = replace(task, padding=9).batches(windows)
        assert batch.arguments["input_ids"].tolist() == [[3, 4, 5], [6, 9, 9]]
        assert batch.real.tolist() == [[True, True, True], [True, False, False]]
        assert ("attention_mask" in batch.arguments) is not task.generates
        if not task.generates:
            assert batch.arguments["attention_mask"].tolist() == batch.real.long().tolist()


def test_windows_keep_their_order_over_batches_and_none_is_too_large() -> None:
    windows = [torch.full((length,), number) for number, length in enumerate([3000, 100, 200, 1000] * 3)]
    batches = GENERATION.batches(windows)
    assert [int(row[0]) for batch in batches for row in batch.arguments["input_ids"]] == list(range(12))
    together = [batch for batch in batches if len(batch.real) > 1]
    assert together and all(batch.real.numel() <= TOKENS_PER_BATCH for batch in together)
    assert [int(row.sum()) for batch in batches for row in batch.real] == [len(window) for window in windows]
    assert GENERATION.batches([]) == []


def test_texts_are_classified_one_by_one_where_there_is_no_token_to_fill_them_up() -> None:
    windows = [torch.tensor([3, 4, 5]), torch.tensor([6])]
    assert [batch.arguments["input_ids"].tolist() for batch in CLASSES.batches(windows)] == [
        [[3, 4, 5]],
        [[6]],
    ]
    assert len(replace(CLASSES, padding=0).batches(windows)) == 1


@pytest.mark.parametrize(
    ("config", "kind", "padding"),
    [
        ({"architectures": ["LlamaForCausalLM"], "pad_token_id": None}, "generation", None),
        ({"architectures": ["GPT2LMHeadModel"], "pad_token_id": 7}, "generation", 7),
        ({"architectures": ["LlamaForCausalLM"], "pad_token_id": -1}, "generation", None),
        ({"architectures": ["BertForMaskedLM"]}, "masked", None),
        ({"architectures": ["BertForSequenceClassification"], "pad_token_id": 0}, "classification", 0),
        ({"architectures": ["BertForTokenClassification"]}, "token-classification", None),
        ({"architectures": ["BertModel"]}, "embedding", None),
        ({"architectures": []}, "embedding", None),
        ({"model_type": "bert"}, "embedding", None),
        ({"model_type": "qwen3"}, "generation", None),
        ({"architectures": ["MistralModel"], "model_type": "mistral"}, "embedding", None),
    ],
)
def test_the_class_of_a_configuration_says_the_task(
    config: dict[str, object], kind: str, padding: int | None
) -> None:
    task = task_of(config)
    assert task is not None and (task.kind, task.padding) == (kind, padding)
