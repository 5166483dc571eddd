"""Does the work grow with the model and nothing else? Random Llamas of several sizes and depths, by the main command.

    python benchmarks/scale.py                                   # 135M, 0.5B and 1.1B, plain int4 to ONNX
    python benchmarks/scale.py --sizes 1.1B --samples 128 --limit 4000 --bits 2.5

Two claims, exit code 1 where one fails: CPU seconds per million weights differ by 20 % at most between sizes, and a
model twice as deep takes no more memory (5 % at most). Weights are random and stored in float16; what a stage is, and
its peak, is told in `benchmarks/real_model.py`. `--limit` is a hard limit in megabytes on the memory that a process
allocates (RLIMIT_DATA, on Linux: all that the system could not read again from a file); beyond it the command fails.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from real_model import in_a_process, show

from compot_deploy.embedded import HELD_OUT_TEXT, MODEL, TRAINING_TEXT

SIZES: Final[Mapping[str, Mapping[str, int]]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 16,
             "num_key_value_heads": 4},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
}  # fmt: skip
"""Shapes of SmolLM2-135M, of one between, and of TinyLlama-1.1B; 32,000 tokens and a head of its own."""

CHARACTERS: Final = 2**21
"""Of the text to calibrate on, which ships."""

TIME: Final = 1.20
MEMORY: Final = 1.05


def random_llama(folder: Path, shape: Mapping[str, int], seed: int = 0) -> Path:
    """A model folder, written block by block so that making it takes no memory either."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=32_000,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float16",
        **shape,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    folder.mkdir(parents=True)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    generator, parts = torch.Generator().manual_seed(seed), dict[str, dict[str, torch.Tensor]]()
    weight_map: dict[str, str] = {}
    for name, value in model.named_parameters():
        place = name.split(".")[2] if ".layers." in name else "rest"
        part = parts.setdefault(place, {})
        drawn = (
            torch.ones(value.shape)
            if value.dim() == 1
            else torch.randn(value.shape, generator=generator) * 0.03
        )
        part[name] = drawn.half()
        weight_map[name] = f"model-{place}.safetensors"
        if name.endswith("post_attention_layernorm.weight"):  # the last of a block
            save_file(parts.pop(place), folder / f"model-{place}.safetensors")
    save_file(parts["rest"], folder / "model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(MODEL / name, folder / name)
    return folder


def run(name: str, shape: Mapping[str, int], given: argparse.Namespace) -> dict[str, Any]:
    """The main command on a random model of a shape."""
    options: dict[str, Any] = {
        name: getattr(given, name) for name in ("samples", "length", "evaluation_tokens")
    }
    options |= {"format": ["onnx"], "method": "auto" if given.bits else "plain", "max_perplexity_ratio": 1e9}
    if given.bits:
        options["bits"] = given.bits
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        model = random_llama(Path(folder) / "model", shape)
        text = Path(folder) / "text.txt"
        text.write_bytes(lzma.decompress(TRAINING_TEXT.read_bytes())[:CHARACTERS])
        options |= {"calibration": str(text), "evaluation": str(HELD_OUT_TEXT)}
        options |= {"model": str(model), "out": str(Path(folder) / "out")}
        found = in_a_process("command", options, given.threads, limit=given.limit)
    print(f"\n{name}, {shape['num_hidden_layers']} blocks")
    show(found, None)
    sys.stdout.flush()
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument(
        "--depths", nargs="*", type=int, default=[15, 30], help="blocks of the smallest, for memory"
    )
    parser.add_argument("--bits", type=float)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--evaluation-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="megabytes")
    parser.add_argument("--scratch", type=Path, help="folder for models and what is made of them")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sizes = {name: run(name, SIZES[name], given) for name in given.sizes}
    base = SIZES["135M"]
    depths = {depth: run("135M", {**base, "num_hidden_layers": depth}, given) for depth in given.depths}
    failed = []
    each = {name: 1e6 * one["cpu"] / one["weights"] for name, one in sizes.items()}
    if len(each) > 1 and max(each.values()) > TIME * min(each.values()):
        failed.append(
            "CPU seconds per million weights: " + ", ".join(f"{n} {v:.2f}" for n, v in each.items())
        )
    peaks = {depth: max(stage["peak"] for stage in one["stages"].values()) for depth, one in depths.items()}
    if len(peaks) > 1 and peaks[max(peaks)] > MEMORY * peaks[min(peaks)]:
        failed.append("megabytes by depth: " + ", ".join(f"{n} blocks {v:.0f}" for n, v in peaks.items()))
    if given.json is not None:
        given.json.write_text(json.dumps({"sizes": sizes, "depths": depths}, indent=1))
    for line in failed:
        print(f"FAILED: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
