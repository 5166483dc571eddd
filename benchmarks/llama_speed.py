"""Decode and prompt speed, bytes and memory of dense ggml types against factorized files: one table of ratios.

    python benchmarks/llama_speed.py                     # a 181M-parameter Llama of random weights, a few minutes
    python benchmarks/llama_speed.py --embedded          # the shapes of the model that the package brings
    python benchmarks/llama_speed.py --small --rounds 3  # seconds, for trying it out

All models are open at once and measured in turn, round after round, in one process, so that a busy machine
slows all of them; the table gives medians, bests and their ratios to the first dense type. Weights are random: this
measures speed and bytes, never quality. Memory is what a fresh process of each file holds after 32 tokens, above the
loaded libraries (`llama_memory.py`): anonymous, mapped from the file, and program code read meanwhile, which is `libs`;
`extra` is all of it beyond the file and the cache, in parts of the file; `cache` and `compute` are llama.cpp's buffers
(the latter reserved, touched as far as a batch needs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from compot_deploy import embedded
from compot_deploy.core.grid import DENSE, Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.exporters.gguf import quantize as gguf_quantize
from compot_deploy.exporters.gguf.options import GgufOptions
from compot_deploy.exporters.gguf.writer import write
from compot_deploy.llama.model import LlamaModel
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import find_architecture

EMBEDDED = Path(embedded.__file__).parent / "model"
CODES, DICTIONARY = Grid(4, 64), Grid(4, 64)


class RandomMatrices(Mapping[str, Matrix]):
    """Matrices made when asked for, the same each time; `fraction` None leaves the linears dense.

    With `shared`, matrices that read the same input have one dictionary, as the joint method makes them.
    """

    def __init__(
        self, config: Mapping[str, Any], fraction: float | None, pattern: Pattern, shared: bool
    ) -> None:
        self.config, self.fraction, self.pattern, self.shared = config, fraction, pattern, shared
        architecture = find_architecture(config)
        self.names = [*architecture.linear_names(config["num_hidden_layers"]), architecture.embedding]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Matrix:
        hidden, wide = self.config["hidden_size"], self.config["intermediate_size"]
        narrow = hidden * self.config["num_key_value_heads"] // self.config["num_attention_heads"]
        if name.endswith("embed_tokens"):
            return self._quantized(hidden, self.config["vocab_size"], Grid(8, 32), Pattern(), name)
        shapes = {"k_proj": (hidden, narrow), "v_proj": (hidden, narrow), "gate_proj": (hidden, wide)}
        shapes |= {"up_proj": (hidden, wide), "down_proj": (wide, hidden)}
        inputs, outputs = shapes.get(name.rpartition(".")[2], (hidden, hidden))
        if self.fraction is None:
            generator = torch.Generator().manual_seed(abs(hash(name)) % 2**31)
            return Dense(torch.randn(inputs, outputs, generator=generator) / inputs**0.5)
        owner = name
        if self.shared:
            for follower, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
                owner = owner.replace(follower, first)
        smaller = inputs if self.shared and not name.endswith("down_proj") else min(inputs, outputs)
        atoms = int(smaller * self.fraction)
        atoms = atoms // 64 * 64 if atoms >= 256 else max(32, atoms // 32 * 32)
        pair = FactorPair(
            self._quantized(inputs, atoms, DICTIONARY, Pattern(), owner),
            self._quantized(atoms, outputs, CODES, self.pattern, name),
            owner,
            self.pattern,
        )
        return Factorized((pair,))

    def _quantized(self, inputs: int, outputs: int, grid: Grid, pattern: Pattern, name: str) -> Quantized:
        generator = torch.Generator().manual_seed(len(name) + inputs)
        integers = torch.randint(grid.lowest, grid.highest + 1, (inputs, outputs), generator=generator).to(
            torch.int8
        )
        if not pattern.is_dense:
            grouped = integers.view(inputs // pattern.of, pattern.of, outputs)
            start = torch.randint(0, pattern.of, (inputs // pattern.of, 1, outputs), generator=generator)
            places = torch.arange(pattern.of)[None, :, None]
            grouped[(places - start) % pattern.of >= pattern.kept] = 0
        scales = torch.full((grid.groups(inputs), outputs), 0.3 / (inputs**0.5 * 2 ** (grid.bits - 1)))
        return Quantized(integers, scales.half(), grid)


def random_model(
    config: Mapping[str, Any], fraction: float | None, pattern: Pattern = DENSE, shared: bool = False
) -> CompressedModel:
    """A Llama of random weights."""
    tensors = {"model.norm.weight": torch.ones(config["hidden_size"])}
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(config["hidden_size"])
    matrices = RandomMatrices(config, fraction, pattern, shared)
    return CompressedModel(find_architecture(config), config, matrices, tensors, True, "random-llama")


def tiled(rows: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize a few rows and repeat their bytes: speed does not depend on values, and IQ types take minutes."""
    few = np.ascontiguousarray(rows[:16])
    weights = np.ones(rows.shape[1], np.float32) if kind in gguf_quantize.NEED_IMPORTANCE else importance
    done = ORIGINAL(few, kind, weights)
    return np.ascontiguousarray(np.tile(done, (-(-len(rows) // 16), 1))[: len(rows)])


ORIGINAL = gguf_quantize.quantize


def write_all(
    folder: Path, config: Mapping[str, Any], types: list[str], fractions: list[float]
) -> dict[str, Path]:
    """One file per candidate; the embedding is Q8_0 in all of them."""
    paths: dict[str, Path] = {}
    dense = random_model(config, None)
    for kind in types:
        name = f"dense {kind}"
        paths[name] = folder / f"dense-{kind}.gguf"
        ones = {name: torch.ones(dense.matrices[name].shape[0]) for name in dense.matrices}
        with mock.patch.object(gguf_quantize, "quantize", tiled):
            write(dense, paths[name], GgufOptions(type=kind, importance=ones))
    for fraction in fractions:
        for layout, pattern, shared in (
            ("factorized", Pattern(), False),
            ("sparse", Pattern(2, 4), False),
            ("sparse", Pattern(2, 4), True),
            ("sparse", Pattern(4, 8), False),
        ):
            name = f"k={fraction} {layout} {pattern}{' shared' if shared else ''}"
            paths[name] = folder / f"{name.replace(' ', '-').replace(':', '')}.gguf"
            model = random_model(config, fraction, pattern, shared)
            write(model, paths[name], GgufOptions(layout=layout))  # type: ignore[arg-type]
    return paths


def measure_memory(path: Path, threads: int, context: int) -> dict[str, float]:
    """What `llama_memory` finds, in a process of its own."""
    script = Path(__file__).with_name("llama_memory.py")
    command = [sys.executable, str(script), str(path), "--threads", str(threads), "--context", str(context)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Write, open, measure in turn, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a model of 6M parameters")
    parser.add_argument(
        "--embedded", action="store_true", help="the shapes of the model that the package brings"
    )
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="GGUF files to measure as well")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument(
        "--types", help="dense types (default: Q4_K,Q4_0,Q3_K,Q2_K,IQ2_XS; embedded: Q4_0,Q8_0)"
    )
    parser.add_argument("--fractions", default="0.25,0.375,0.5")
    arguments = parser.parse_args()
    size = (512, 1408, 2) if arguments.small else (2048, 5632, 4)
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": size[0], "intermediate_size": size[1], "num_hidden_layers": size[2],
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    if arguments.embedded:
        config = json.loads((EMBEDDED / "config.json").read_text())
        arguments.types = arguments.types or "Q4_0,Q8_0"  # rows of 192 are too short for K types
        arguments.context = min(arguments.context, config["max_position_embeddings"])
    arguments.types = arguments.types or "Q4_K,Q4_0,Q3_K,Q2_K,IQ2_XS"
    with tempfile.TemporaryDirectory() as name:
        fractions = [float(text) for text in arguments.fractions.split(",")]
        paths = write_all(Path(name), config, arguments.types.split(","), fractions)
        paths |= {path.stem: path for path in arguments.files}
        measure(paths, f"dense {arguments.types.split(',')[0]}", config["vocab_size"], arguments)


def measure(paths: Mapping[str, Path], base: str, vocabulary: int, arguments: argparse.Namespace) -> None:
    """Open all files, measure them in turn, print the table."""
    context = arguments.context
    memory = {label: measure_memory(path, arguments.threads, context) for label, path in paths.items()}
    length = max(arguments.prompt, arguments.steps + 8)
    tokens = np.random.default_rng(0).integers(1, vocabulary, length).tolist()
    models: dict[str, LlamaModel] = {}
    for label, path in paths.items():
        models[label] = LlamaModel(path, threads=arguments.threads, context=context)
        models[label].logits(tokens[:8])
    decode: dict[str, list[float]] = {label: [] for label in models}
    prompt: dict[str, list[float]] = {label: [] for label in models}
    for _ in range(arguments.rounds):
        for label, model in models.items():
            made = model.generate(tokens[:4], max_tokens=arguments.steps + 1, stop=False)
            decode[label].append(made.seconds / arguments.steps)
            begin = time.perf_counter()
            model.generate(tokens[: arguments.prompt], max_tokens=1, stop=False)
            prompt[label].append((time.perf_counter() - begin) / arguments.prompt)
    table(base, paths, memory, decode, prompt)


def table(
    base: str,
    paths: Mapping[str, Path],
    memory: Mapping[str, Mapping[str, float]],
    decode: Mapping[str, list[float]],
    prompt: Mapping[str, list[float]],
) -> None:
    """Medians, bests and ratios to the first dense type."""
    print(f"{'file':27s} {'MB':>7s} {'of base':>7s} {'memory':>7s} {'extra':>6s} {'libs':>5s} {'cache':>6s} "
          f"{'compute':>7s} {'decode':>7s} {'x med':>6s} {'x best':>6s} "
          f"{'prompt':>7s} {'x med':>6s} {'x best':>6s}")  # fmt: skip
    for label, path in paths.items():
        size, size_base = path.stat().st_size / 1e6, paths[base].stat().st_size / 1e6
        step, step_base = statistics.median(decode[label]), statistics.median(decode[base])
        best, best_base = min(decode[label]), min(decode[base])
        word, word_base = statistics.median(prompt[label]), statistics.median(prompt[base])
        quick, quick_base = min(prompt[label]), min(prompt[base])
        held = memory[label]
        own = held["anonymous"] + held["file"] + held["libraries"]
        print(f"{label:27s} {size:7.2f} {size / size_base:7.2f} {own:7.1f} {held['beyond']:+6.0%} "
              f"{held['libraries']:5.1f} {held['cache']:6.2f} {held['compute']:7.1f} {1 / step:7.1f} "
              f"{step_base / step:6.2f} {best_base / best:6.2f} {1 / word:7.1f} {word_base / word:6.2f} "
              f"{quick_base / quick:6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
