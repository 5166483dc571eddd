"""What a recipe calibrates and judges on: where the text comes from, and which windows of it."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.core.store import write_tensors
from compot_deploy.embedded import HELD_OUT_TEXT, TRAINING_TEXT
from compot_deploy.errors import ArtifactError
from compot_deploy.models.checkpoint import Checkpoint
from compot_deploy.models.tokens import (
    HELD_OUT_SHARE,
    SELF,
    Tokenizer,
    TokenWindows,
    load_tokenizer,
    make_windows,
    read_text,
    sample_from_model,
    text_of_dataset,
    windows_of_jsonl,
    windows_of_text,
)
from compot_deploy.planning.settings import device_of
from compot_deploy.progress import Progress, silent
from compot_deploy.recipe import Recipe

EVALUATION: Final = "compot/evaluation.json"
_PROMPTS: Final = 3
_PROMPT_TOKENS: Final = 12


def calibration_windows(
    recipe: Recipe, checkpoint: Checkpoint, tokenizer: Tokenizer, work: Path, progress: Progress = silent
) -> TokenWindows:
    """The windows to calibrate on; sampled text is kept in the work folder, other text is read again."""
    common: dict[str, Any] = {
        "samples": recipe.samples,
        "length": min(recipe.length, checkpoint.context),
        "seed": recipe.seed,
        "vocabulary": checkpoint.vocabulary,
    }
    source = recipe.calibration
    if source is None and recipe.model is None:
        text = lzma.decompress(TRAINING_TEXT.read_bytes()).decode()
        return windows_of_text(text, tokenizer, source="the shipped model's training text", **common)
    if source is None or source == SELF:
        return _own_text(recipe, checkpoint, tokenizer, work / "calibration.safetensors", progress, common)
    path = Path(source)
    if path.exists() or path.suffix in (".txt", ".jsonl", ".json", ".md"):
        text = read_text(path)
        if path.suffix == ".jsonl":
            return windows_of_jsonl(text, tokenizer, source=str(path), **common)
        if recipe.evaluation is None:
            text = text[: round(len(text) * (1 - HELD_OUT_SHARE))]
        return windows_of_text(text, tokenizer, source=str(path), **common)
    return windows_of_text(text_of_dataset(source), tokenizer, source=source, **common)


def evaluation_windows(
    recipe: Recipe, checkpoint: Checkpoint, tokenizer: Tokenizer, work: Path, progress: Progress = silent
) -> TokenWindows:
    """The windows to judge on: never ones that were calibrated on, unless a note says so."""
    length = min(recipe.length, checkpoint.context)
    common: dict[str, Any] = {
        "samples": max(1, recipe.evaluation_tokens // length),
        "length": length,
        "seed": recipe.seed + 1,
        "vocabulary": checkpoint.vocabulary,
    }
    if recipe.evaluation is not None:
        path = Path(recipe.evaluation)
        reader = windows_of_jsonl if path.suffix == ".jsonl" else windows_of_text
        return reader(read_text(path), tokenizer, source=str(path), **common)
    source = recipe.calibration
    if source is None and recipe.model is None:
        return windows_of_text(
            read_text(HELD_OUT_TEXT), tokenizer, source="the shipped model's held-out text", **common
        )
    if source is not None and source != SELF and Path(source).exists() and Path(source).suffix != ".jsonl":
        text = read_text(Path(source))
        rest = text[round(len(text) * (1 - HELD_OUT_SHARE)) :]
        return windows_of_text(
            rest, tokenizer, source=f"the last {HELD_OUT_SHARE:.0%} of {source}, not calibrated on", **common
        )
    return _own_text(recipe, checkpoint, tokenizer, work / "evaluation.safetensors", progress, common)


def _own_text(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    path: Path,
    progress: Progress,
    common: Mapping[str, Any],
) -> TokenWindows:
    from transformers import AutoModelForCausalLM

    source = "text sampled from the model itself"
    if path.exists():
        return make_windows(list(load_file(path)["windows"]), source, checkpoint.vocabulary)
    progress(0, 1, "Sample text from the model")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    windows = sample_from_model(model.eval().to(device_of(recipe)), tokenizer, **common)
    write_tensors(path, {"windows": torch.stack(windows.windows)}, {})
    progress(1, 1, "Sample text from the model")
    return windows


def evaluation_of(
    recipe: Recipe, checkpoint: Checkpoint, work: Path, progress: Progress = silent
) -> Evaluation:
    """Windows to judge on, and prompts cut from their beginnings."""
    tokenizer = load_tokenizer(checkpoint.folder)
    windows = evaluation_windows(recipe, checkpoint, tokenizer, work, progress)
    return _evaluation(windows, _prompts(windows), tokenizer, checkpoint.config)


def _prompts(windows: TokenWindows) -> tuple[tuple[int, ...], ...]:
    step = max(1, len(windows.windows) // _PROMPTS)
    chosen = windows.windows[::step][:_PROMPTS]
    return tuple(tuple(window[: min(_PROMPT_TOKENS, len(window))].tolist()) for window in chosen)


def _evaluation(
    windows: TokenWindows,
    prompts: tuple[tuple[int, ...], ...],
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
) -> Evaluation:
    end = config.get("eos_token_id")
    context = int(config.get("max_position_embeddings", 2048))
    return Evaluation(
        text=windows,
        prompts=prompts,
        decode=tokenizer.decode,
        new_tokens=min(48, context - _PROMPT_TOKENS),
        end_tokens=frozenset(end if isinstance(end, list) else [] if end is None else [end]),
    )


def evaluation_json(evaluation: Evaluation) -> str:
    """What a folder keeps of the evaluation, so that it can be judged again."""
    return json.dumps(
        {
            "source": evaluation.text.source,
            "notes": list(evaluation.text.notes),
            "windows": [window.tolist() for window in evaluation.text.windows],
            "prompts": [list(prompt) for prompt in evaluation.prompts],
        }
    )


def read_evaluation(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> Evaluation:
    """Read what `evaluation_json` made.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = folder / EVALUATION
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        windows = make_windows(
            stored["windows"], stored["source"], int(config["vocab_size"]), notes=stored["notes"]
        )
        return _evaluation(windows, tuple(tuple(prompt) for prompt in stored["prompts"]), tokenizer, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); export the model again.") from None
