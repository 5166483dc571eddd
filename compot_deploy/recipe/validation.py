"""Values of options outside their range, and options that contradict each other: one sentence that says what to do."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Final

from compot_deploy.errors import RecipeError
from compot_deploy.recipe.option_types import choices_of, hints
from compot_deploy.recipe.options import ONE_SCHEME, Recipe, flag_of

_MOST: Final = 10**9
"""Samples, tokens, rounds: more than anybody waits for."""


def validate(recipe: Recipe) -> None:
    """Refuse values outside their range.

    Raises:
        RecipeError: names the option, its value and its range.
    """
    _check_choices(recipe)
    _check_budget(recipe)
    _check_counts(recipe)
    _check_methods(recipe)
    _check_plan(recipe)
    _check_codes(recipe)
    _check_quantizer(recipe)
    _check_layout(recipe)
    _check_gate(recipe)
    _check_cluster(recipe)
    _check_healing(recipe)
    if not recipe.format:
        raise RecipeError("--format: give at least one format.")


def _check_choices(recipe: Recipe) -> None:
    """Values that an option does not have."""
    types = hints()
    for option in fields(recipe):
        choices = choices_of(types[option.name])
        value = getattr(recipe, option.name)
        if choices and value not in choices:
            raise RecipeError(f"{flag_of(option)} {value}: choose one of {', '.join(map(str, choices))}.")


def _check_budget(recipe: Recipe) -> None:
    """One budget, and one that can be."""
    if not 0 < recipe.ratio < 1:
        raise RecipeError(
            f"--ratio {recipe.ratio:g}: give a fraction between 0 and 1; 0.2 makes the linears 20 % smaller."
        )
    if recipe.bits is not None and recipe.size is not None:
        raise RecipeError("--bits and --size are two budgets: give one of them.")
    if recipe.bits is not None and not 0 < recipe.bits <= 32:
        raise RecipeError(f"--bits {recipe.bits:g}: give bits per weight above 0, 2.2 for example.")
    if (recipe.bits is not None or recipe.size is not None) and not recipe.planned:
        raise RecipeError(
            f"--allocation {recipe.allocation} takes a --ratio; --bits and --size need --allocation knapsack."
        )
    _ = recipe.size_bytes  # refuses what is no size


def _check_counts(recipe: Recipe) -> None:
    """Numbers of samples, tokens, rounds and atoms."""
    for name in ("samples", "length", "rounds", "evaluation_tokens"):
        if getattr(recipe, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: give at least 1.")
    for name in ("samples", "length", "rounds", "evaluation_tokens"):
        if getattr(recipe, name) > _MOST:
            raise RecipeError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: {_MOST:,} is the most.")
    if not 0 <= recipe.seed < 2**63:
        raise RecipeError(f"--seed {recipe.seed}: give a whole number from 0 to 2**63 - 1.")
    if recipe.length < 2:
        raise RecipeError("--length 1: a window needs at least 2 tokens, one to read and one to predict.")
    if not 1 <= recipe.atoms_per_nonzero < math.inf:
        raise RecipeError(
            f"--atoms-per-nonzero {recipe.atoms_per_nonzero:g}: a column cannot use more atoms than there are; "
            "give 1 (dense codes) or more."
        )


def _check_methods(recipe: Recipe) -> None:
    """Methods that a plan is compared with."""
    for method in recipe.compare:
        if method not in ("auto", "compot", "svd-llm", "plain"):
            raise RecipeError(f"--compare {method}: choose among auto, compot, svd-llm, plain.")


def _check_plan(recipe: Recipe) -> None:
    """A plan and a scheme settled by hand."""
    if not recipe.planned:
        return
    asked = next(
        (f"--{name}" for name in ("bits", "size") if getattr(recipe, name) is not None),
        "--allocation knapsack",
    )
    for option in fields(recipe):
        tried = option.name == "code_pattern" or (
            option.name == "atoms_per_nonzero" and recipe.quant == "none"
        )
        if option.name in ONE_SCHEME and not tried and recipe.changed(option):
            raise RecipeError(
                f"{flag_of(option)} settles the one scheme of all matrices, and with {asked} a plan chooses one "
                "for each: leave one of them out."
            )


def _check_codes(recipe: Recipe) -> None:
    """Patterns and bits of factors."""
    if recipe.code_pattern != "column" and (recipe.atoms_per_nonzero != 2 or recipe.method == "svd-llm"):
        other = "--method svd-llm" if recipe.method == "svd-llm" else "--atoms-per-nonzero"
        raise RecipeError(
            f"--code-pattern {recipe.code_pattern} keeps every second code, which contradicts {other}: "
            "leave one out."
        )
    for name in ("dictionary_bits", "code_bits"):
        bits = getattr(recipe, name)
        if bits is not None and bits not in (2, 4, 8):
            raise RecipeError(f"--{name.replace('_', '-')} {bits}: runtimes execute 2, 4 or 8 bits.")
        if bits is not None and recipe.quant == "none":
            raise RecipeError(f"--{name.replace('_', '-')} {bits} contradicts --quant none: leave one out.")


def _check_quantizer(recipe: Recipe) -> None:
    """Tables of bitsandbytes and its quantizer."""
    table = recipe.quant in ("nf4", "fp4")
    if table and recipe.quantizer != "bnb":
        raise RecipeError(
            f"--quant {recipe.quant} is a table of bitsandbytes, which --quantizer {recipe.quantizer} does not know: "
            "add --quantizer bnb."
        )
    if recipe.quantizer != "bnb":
        return
    if recipe.quant not in ("nf4", "fp4", "int8"):
        raise RecipeError(
            f"--quantizer bnb: bitsandbytes has nf4, fp4 and int8, not {recipe.quant}; add --quant nf4."
        )
    if recipe.planned:
        raise RecipeError(
            "--quantizer bnb: a plan chooses among integer grids, which bitsandbytes does not have; give a "
            "--ratio instead of --bits, --size or --allocation knapsack."
        )
    for name in ("dictionary_bits", "code_bits"):
        if getattr(recipe, name) is not None:
            raise RecipeError(f"--{name.replace('_', '-')} contradicts --quantizer bnb: leave one out.")
    if table and 16 in (recipe.dictionary_group, recipe.code_group):
        raise RecipeError(f"--quant {recipe.quant}: bitsandbytes has blocks of 32 and more, not 16.")


def _check_layout(recipe: Recipe) -> None:
    """Groups, and codes that ONNX packs."""
    for name in ("dictionary_group", "code_group"):
        group = getattr(recipe, name)
        if group is not None and (group < 16 or group > 256 or group & (group - 1)):
            raise RecipeError(f"--{name.replace('_', '-')} {group}: use 16, 32, 64, 128 or 256.")
    grid = recipe.code_grid
    two_of_four = recipe.code_pattern == "2:4" and grid is not None and grid.bits == 4
    if recipe.onnx_codes == "packed" and not two_of_four and (grid is None or not recipe.planned):
        raise RecipeError(
            "--onnx-codes packed stores 4-bit codes of the pattern 2:4, and these are "
            f"{'floating point' if grid is None else f'of {grid.bits} bits'} of the pattern "
            f"{recipe.code_pattern}: add --code-pattern 2:4 and --code-bits 4, leave --allocation to a plan for "
            "3-bit integers, or leave it out."
        )


def _check_gate(recipe: Recipe) -> None:
    """Limits of the gate."""
    for name in ("max_perplexity_ratio", "max_kl", "max_wer_increase", "max_export_nmse"):
        limit = getattr(recipe, name)
        if limit is not None and not 0 <= limit < math.inf:
            raise RecipeError(
                f"--{name.replace('_', '-')} {limit}: a limit is a number from 0 on; leave it out for none."
            )
    if recipe.min_positions is not None and recipe.min_positions < 1:
        raise RecipeError(f"--min-positions {recipe.min_positions}: give at least 1.")
    if recipe.task_samples is not None and not 1 <= recipe.task_samples <= _MOST:
        raise RecipeError(f"--task-samples {recipe.task_samples}: give a number from 1 to {_MOST:,}.")
    if recipe.min_recovery is not None and not 0 <= recipe.min_recovery < math.inf:
        raise RecipeError(f"--min-recovery {recipe.min_recovery}: give a share from 0 on, 0.95 for 95 %.")
    for name in ("task_samples", "min_recovery"):
        if getattr(recipe, name) is not None and not recipe.tasks:
            raise RecipeError(f"--{name.replace('_', '-')} is about tasks: give --tasks with it.")
    if recipe.min_top1 is not None and not 0 <= recipe.min_top1 <= 1:
        raise RecipeError(f"--min-top1 {recipe.min_top1}: give a fraction between 0 and 1.")
    if not -1 <= recipe.min_cosine <= 1:
        raise RecipeError(f"--min-cosine {recipe.min_cosine}: give a number between -1 and 1.")


_MOST_STEPS: Final = 100_000
"""Of healing: more than anybody waits for."""


def _check_healing(recipe: Recipe) -> None:
    """Steps of healing, and formats that would round what it tunes."""
    steps = recipe.heal
    if steps in ("auto", "off"):
        return
    if not (steps.isascii() and steps.isdigit()) or not 0 < int(steps[:9]) <= _MOST_STEPS or len(steps) > 9:
        raise RecipeError(
            f"--heal {steps}: give auto, off, or a number of steps from 1 to {_MOST_STEPS:,}, 40 for example."
        )
    if recipe.rounds_again:
        raise RecipeError(
            f"--heal {steps} tunes the scales that are stored, and --gguf-type {recipe.gguf_type} rounds every weight "
            "again: leave one of them out."
        )


def _check_cluster(recipe: Recipe) -> None:
    """Where the workers are."""
    cluster = recipe.cluster
    if cluster is None or cluster in ("local", "auto"):
        return
    host, _, port = cluster.rpartition(":")
    if not host or "/" in host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise RecipeError(
            f"--cluster {cluster}: give local, auto, or the address that ray start --head printed, 10.0.0.1:6379 for "
            "example."
        )
