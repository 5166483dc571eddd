"""A tiny random speech model, and recordings of tones that stand for speech, saved as real folders."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any, Final

import numpy as np
import tiny
import torch
import transformers

RATE: Final = 16_000
BANDS: Final = 16


def config(**changes: Any) -> Any:
    """Two blocks on each side, 32 wide, that hear one second."""
    sizes = {
        "vocab_size": 320,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_mel_bins": BANDS,
        "max_source_positions": 50,
        "max_target_positions": 24,
        "init_std": 0.2,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return transformers.WhisperConfig(**sizes | tokens | none | changes)


def model(seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, evaluation mode; biases and norms are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.WhisperForConditionalGeneration(config(**changes)).float().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    with torch.no_grad():  # a tied head of large rows repeats what it reads
        made.model.decoder.embed_tokens.weight.mul_(0.1)
    made.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_length=12,
        no_timestamps_token_id=5,
        is_multilingual=False,
        begin_suppress_tokens=[7],
        suppress_tokens=[8, 9],
    )
    return made


def save(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A complete model folder: weights, tokenizer, and how it hears."""
    folder.mkdir(parents=True, exist_ok=True)
    model(seed, **changes).save_pretrained(folder)
    tiny.tokenizer_files(folder)
    transformers.WhisperFeatureExtractor(feature_size=BANDS, chunk_length=1).save_pretrained(folder)
    return folder


def record(folder: Path, count: int = 6, rate: int = RATE, *, texts: bool = True) -> Path:
    """Recordings of chords over noise, with a text beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(count)
    words = tiny.WORDS.split()
    for number in range(count):
        seconds = 0.5 + 0.4 * numbers.random()
        times = np.arange(int(seconds * rate)) / rate
        sound = sum(np.sin(2 * np.pi * pitch * times) for pitch in numbers.uniform(100, 3000, size=4))
        sound = 0.15 * sound * (1 + np.sin(9 * times)) + 0.02 * numbers.standard_normal(len(times))
        write_wave(folder / f"{number}.wav", sound, rate)
        if texts:
            (folder / f"{number}.txt").write_text(" ".join(words[number : number + 4]))
    return folder


def write_wave(path: Path, sound: np.ndarray, rate: int, channels: int = 1) -> None:
    """16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
