"""What packed 2:4 codes cost and save: bytes, load time, memory and decode latency beside dense codes.

A decoder of about 30M random weights, every linear a dictionary and codes of the pattern 2:4, is written
twice with the same integers. Loading is measured in a process of its own each time; a token is decoded by
both in turns, so that what else the machine does hits both.

    OMP_NUM_THREADS=1 python benchmarks/onnx_packed.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Factorized, FactorPair, Matrix, Quantized, leaves
from compot_deploy.core.storage import Storage, matrix_bytes
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.onnx.expansion import unfolded_nodes
from compot_deploy.exporters.onnx.options import OnnxOptions
from compot_deploy.exporters.onnx.session import open_session
from compot_deploy.exporters.onnx.tensors import GRAPH
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.models.hints import find_architecture

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GRID = Grid(4, 32)
PAST = 16


def random_model(hidden: int, intermediate: int, layers: int) -> CompressedModel:
    """A decoder with random integers; half of min(in, out) atoms, two of every four codes."""
    config = {
        **CONFIG,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "head_dim": hidden // 8,
    }
    architecture = find_architecture(config)
    outputs = {"q_proj": hidden, "k_proj": hidden // 2, "v_proj": hidden // 2, "o_proj": hidden}
    outputs |= {"gate_proj": intermediate, "up_proj": intermediate, "down_proj": hidden}
    matrices: dict[str, Matrix] = {
        architecture.embedding: random_integers(hidden, 4096, Grid(8, 32)),
        architecture.head: random_integers(hidden, 4096, Grid(8, 32)),
    }
    for name in architecture.linear_names(layers):
        rows = intermediate if name.endswith("down_proj") else hidden
        columns = outputs[name.rpartition(".")[2]]
        atoms = min(rows, columns) // 2
        dictionary, codes = random_integers(rows, atoms, GRID), random_integers(atoms, columns, GRID)
        places = torch.rand(atoms // 4, 4, columns).argsort(dim=1)
        kept = codes.integers * (places < 2).view(atoms, columns)
        codes = Quantized(kept, codes.scales, GRID)
        matrices[name] = Factorized((FactorPair(dictionary, codes, name, Pattern(2, 4)),))
    norms = [f"{architecture.block_path(i)}.{n}" for i in range(layers) for n in ("input", "post_attention")]
    tensors = {f"{name}_layernorm.weight": torch.ones(hidden) for name in norms}
    tensors[f"{architecture.final_norm}.weight"] = torch.ones(hidden)
    return CompressedModel(architecture, config, matrices, tensors, tied=False, source="")


def random_integers(rows: int, columns: int, grid: Grid) -> Quantized:
    """Uniform integers with scales that keep activations of about 1."""
    integers = torch.randint(grid.lowest + 1, grid.highest + 1, (rows, columns), dtype=torch.int8)
    scale = 2 / (grid.highest * rows**0.5)
    return Quantized(integers, torch.full((grid.groups(rows), columns), scale).half(), grid)


def load(folder: Path) -> None:
    """Load once; print seconds and resident memory as JSON."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = {field: memory_of_process(field) for field in ("RssAnon", "VmRSS")}
    started = time.perf_counter()
    session = open_session(folder, threads=1)
    seconds = time.perf_counter() - started
    after = {"private": memory_of_process("RssAnon") - before["RssAnon"]}
    after["peak"] = memory_of_process("VmHWM") - before["VmRSS"]
    print(json.dumps({"seconds": seconds, **after}))
    del session


def memory_of_process(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux): RssAnon leaves mapped files out, VmHWM is a peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}.")


def loaded(folder: Path) -> dict[str, float]:
    """`load` in a process of its own."""
    command = [sys.executable, __file__, "--load", str(folder)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(answer.stdout)
    return values


def decode(session: Any, feeds: dict[str, Any]) -> float:
    """Milliseconds of one token."""
    started = time.perf_counter()
    session.run(["logits"], feeds)
    return 1e3 * (time.perf_counter() - started)


def one_token(session: Any) -> dict[str, Any]:
    """Inputs for one token behind `PAST` others."""
    feeds = {
        "input_ids": torch.ones(1, 1, dtype=torch.int64).numpy(),
        "attention_mask": torch.ones(1, PAST + 1, dtype=torch.int64).numpy(),
    }
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = torch.randn(1, entry.shape[1], PAST, entry.shape[3]).numpy()
    return feeds


def memory(model: CompressedModel, storage: Storage) -> int:
    """What the loaded leaves should take."""
    sizes = (
        storage.memory_bytes(*leaf.shape, leaf.grid)  # type: ignore[attr-defined]
        for matrix in model.matrices.values()
        for leaf in leaves(matrix)
        if isinstance(leaf, Quantized)
    )
    return sum(sizes)


def main() -> None:
    """Write both folders, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load)
        return
    import onnxruntime  # after compot_deploy, which silences it

    torch.manual_seed(0)
    model = random_model(arguments.hidden, arguments.intermediate, arguments.layers)
    pairs = [pair for m in model.matrices.values() if isinstance(m, Factorized) for pair in m.pairs]
    codes = sum(pair.codes.shape[0] * pair.codes.shape[1] for pair in pairs)
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in model.matrices.values())
    print(f"onnxruntime {onnxruntime.__version__}; {weights / 1e6:.1f}M weights, {codes / 1e6:.2f}M codes")
    exporter = EXPORTERS["onnx"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("dense", "packed")}
        print("        graph kB    data MB  planned MB  in memory MB")
        for name, folder in folders.items():
            folder.mkdir()
            options = OnnxOptions(codes=name)  # type: ignore[arg-type]
            exporter.write(model, folder, options)
            graph, data = (
                (folder / GRAPH).stat().st_size,
                (folder / GRAPH).with_suffix(".onnx_data").stat().st_size,
            )
            planned = sum(matrix_bytes(model.matrices, exporter.storage(options)).values())
            held = memory(model, exporter.storage(options))
            print(f"{name:6s} {graph / 1e3:9.1f} {data / 1e6:10.3f} {planned / 1e6:11.3f} {held / 1e6:13.3f}")
        print(f"nodes left after loading: {len(unfolded_nodes(folders['packed']))}")

        print("        load s (median)   private MB   peak MB")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
        for _ in range(arguments.loads):
            for name, folder in folders.items():
                runs[name].append(loaded(folder))
        for name, values in runs.items():
            found = [statistics.median(run[key] for run in values) for key in ("seconds", "private", "peak")]
            print(f"{name:6s} {found[0]:16.3f} {found[1] / 1e6:12.1f} {found[2] / 1e6:9.1f}")

        print("loaded first     dense ms  packed ms  packed / dense, at best and by quartiles")
        for first, second in (("dense", "packed"), ("packed", "dense")):
            # Of two sessions in one process the later one is a little faster, whichever it is.
            sessions = {name: open_session(folders[name], threads=1) for name in (first, second)}
            feeds = one_token(sessions[first])
            times: dict[str, list[float]] = {name: [] for name in folders}
            for turn in range(arguments.tokens):
                for name in (first, second) if turn % 2 else (second, first):
                    times[name].append(decode(sessions[name], feeds))
            best = {name: min(values) for name, values in times.items()}
            ratios = [packed / dense for dense, packed in zip(times["dense"], times["packed"], strict=True)]
            quartiles = ", ".join(f"{value:.3f}" for value in statistics.quantiles(ratios, n=4))
            print(
                f"{first:13s} {best['dense']:11.2f} {best['packed']:10.2f}  "
                f"{best['packed'] / best['dense']:.3f} and {quartiles}"
            )
            logits = [torch.from_numpy(session.run(["logits"], feeds)[0]) for session in sessions.values()]
            assert torch.equal(*logits)

        unfolded = onnxruntime.InferenceSession(
            str(folders["packed"] / GRAPH), session_options(), disabled_optimizers=["ConstantFolding"]
        )
        slow = statistics.median(decode(unfolded, feeds) for _ in range(3))
        print(
            f"without constant folding: {slow:.0f} ms, {slow / statistics.median(times['dense']):.0f} times"
        )


def session_options() -> Any:
    """One thread, and no warnings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


if __name__ == "__main__":
    main()
