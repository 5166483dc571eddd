"""What the main command takes on a model that people ship: CPU seconds and memory, stage by stage, beside peers.

    python benchmarks/real_model.py MODEL --calibration wiki.valid.txt --evaluation wiki.test.txt --bits 2.5
    python benchmarks/real_model.py MODEL --calibration wiki.valid.txt --evaluation wiki.test.txt --method plain

Everything runs on one thread (`--threads`), one process after the other, so CPU seconds of a busy machine mean the same
for all. A stage is what the command's own progress calls one; its peak is that of the whole process while the stage
lasts, libraries and mapped files included (Linux). Beside it, in the same run and on the same Grams, the linears are
quantized by GPTQ as published on one grid and by llama.cpp's own code (one thread, importance included) to types of
about the same size: peers that only round take nothing but this and, where they want importance, the calibration.

`--json FILE` keeps the figures; exit code 1 where a limit of `--max-cpu` (seconds) or `--max-memory` (megabytes) is
exceeded, or the gate fails.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROUNDED = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "Q4_K")
"""llama.cpp's types that are timed, from small to large."""


class Stages:
    """A progress that notes CPU seconds and peak memory between one label and the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self._label, self._since = "Start", 0.0
        _reset_peak()

    def __call__(self, done: int, total: int, label: str) -> None:
        """See `compot_deploy.progress.Progress`."""
        if label != self._label:
            self._note(label)

    def close(self) -> None:
        """Note the last stage."""
        self._note("")

    def _note(self, label: str) -> None:
        now = time.process_time()
        self.seconds[self._label] = self.seconds.get(self._label, 0.0) + now - self._since
        self.peak[self._label] = max(self.peak.get(self._label, 0.0), _peak())
        self._label, self._since = label, now
        _reset_peak()


def _reset_peak() -> None:
    """The kernel's mark of the most memory starts again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("/proc/self/status has no VmHWM: this benchmark needs Linux.")


def run_command(options: Mapping[str, Any]) -> dict[str, Any]:
    """The main command in this process."""
    stages = Stages()
    from compot_deploy import deploy
    from compot_deploy.core.memory import use_one_heap

    use_one_heap()  # as the command line does

    (deployment,) = deploy(progress=stages, **options)
    stages.close()
    report = deployment.report
    total = report.accuracy.total
    assert total is not None and total.comparison.divergence is not None
    return {
        "stages": {
            label: {"cpu": seconds, "peak": stages.peak[label]} for label, seconds in stages.seconds.items()
        },
        "bits": 8 * (report.sizes.linears or 0) / (report.sizes.linear_weights or 1),
        "bytes": report.sizes.artifact,
        "weights": report.sizes.linear_weights,
        "kl": total.comparison.divergence.mean.value,
        "passed": report.passed,
    }


def run_peers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Calibration alone, then every linear by the peers' code; seconds for each."""
    import torch

    from compot_deploy.core.grid import Grid
    from compot_deploy.exporters.gguf import quantize as ggml
    from compot_deploy.models.sites import importance
    from compot_deploy.models.source import open_source
    from compot_deploy.pipeline.compress import context_of
    from compot_deploy.planning.context import collect_grams
    from compot_deploy.planning.settings import resolve
    from compot_deploy.quant import gptq
    from compot_deploy.recipe import recipe_from_mapping

    recipe = recipe_from_mapping(options, origin="benchmark")
    source = open_source(options["model"])
    settings = resolve(recipe, source)
    seconds: dict[str, float] = {}
    size: dict[str, float] = {}

    def timed(name: str, work: Callable[[], float]) -> None:
        started = time.process_time()
        size[name] = size.get(name, 0.0) + work()
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - started

    with tempfile.TemporaryDirectory() as folder:
        context = context_of(settings, Path(folder))

        def calibrated() -> float:
            collect_grams(context)
            return 0.0

        timed("calibration", calibrated)
        weights = 0
        for group in context.groups:
            gram = context.grams(group.block)[group.name]
            weighed = importance(gram).numpy()
            for weight in context.weights(group.names).values():
                weights += weight.numel()
                rows = weight.T.contiguous().numpy()
                for bits in (2, 4):
                    grid = Grid(bits, 32)
                    timed(
                        f"GPTQ as published, {grid}",
                        lambda grid=grid, weight=weight, gram=gram: (  # type: ignore[misc]
                            gptq(weight, gram, grid, sweeps=0).integers.numel()
                            * (grid.bits + 16 / grid.group)
                            / 8
                        ),
                    )
                for kind in ROUNDED:
                    fitting = ggml.fitting_type(kind, rows.shape[1])
                    timed(
                        f"llama.cpp {kind}",
                        lambda fitting=fitting, rows=rows, weighed=weighed: float(  # type: ignore[misc]
                            ggml.quantize(rows, fitting, weighed).nbytes
                        ),
                    )
    assert torch.get_num_threads() >= 1
    return {"seconds": seconds, "bits": {name: 8 * value / weights for name, value in size.items()}}


def in_a_process(
    what: str, options: Mapping[str, Any], threads: int, limit: int | None = None
) -> dict[str, Any]:
    """Run one part in a process of its own; what it took is counted by the system.

    Args:
        what: the part.
        options: of the main command.
        threads: of torch.
        limit: megabytes that the process may allocate; None sets no limit.
    """

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**20, limit * 2**20))

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--part", what, json.dumps([dict(options), str(answer)])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if subprocess.run(command, env=environment, preexec_fn=limited).returncode:
            raise SystemExit(f"The part {what!r} failed.")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found: dict[str, Any] = json.loads(answer.read_text())
    found["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found


def show(ours: Mapping[str, Any], peers: Mapping[str, Any] | None) -> None:
    """Both tables."""
    millions = ours["weights"] / 1e6
    peak = max(stage["peak"] for stage in ours["stages"].values())
    print(f"{'stage':34} {'CPU s':>8} {'s per million weights':>22} {'peak MB':>9}")
    for label, stage in ours["stages"].items():
        print(f"{label[:34]:34} {stage['cpu']:8.1f} {stage['cpu'] / millions:22.2f} {stage['peak']:9.0f}")
    print(f"{'the whole process':34} {ours['cpu']:8.1f} {ours['cpu'] / millions:22.2f} {peak:9.0f}")
    print(
        f"\n{ours['bits']:.2f} bits per weight of {millions:.1f} million in linears, {ours['bytes'] / 1e6:.1f} MB, "
        f"KL {ours['kl']:.4f} nats, gate {'passed' if ours['passed'] else 'FAILED'}"
    )
    if peers is None:
        return
    print(f"\n{'the same linears':34} {'CPU s':>8} {'s per million weights':>22} {'bits':>9}")
    for name, seconds in peers["seconds"].items():
        bits = peers["bits"][name]
        print(
            f"{name:34} {seconds:8.1f} {seconds / millions:22.2f} " + (f"{bits:9.2f}" if bits else f"{'':9}")
        )


def main() -> int:
    """See the module."""
    if sys.argv[1:2] == ["--part"]:
        options, answer = json.loads(sys.argv[3])
        found = (run_command if sys.argv[2] == "command" else run_peers)(options)
        Path(answer).write_text(json.dumps(found))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    parser.add_argument("--format", default="onnx")
    parser.add_argument("--gguf-layout")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--bits", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--max-cpu", type=float)
    parser.add_argument("--max-memory", type=float)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    names = ("model", "calibration", "evaluation", "samples", "length", "evaluation_tokens", "method")
    options: dict[str, Any] = {name: getattr(given, name) for name in names}
    options["format"] = [given.format]
    options |= {
        name: value for name in ("bits", "gguf_layout") if (value := getattr(given, name)) is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        ours = in_a_process("command", {**options, "out": str(Path(folder) / "out")}, given.threads)
    peers = None if given.no_peers else in_a_process("peers", options, given.threads)
    show(ours, peers)
    if given.json is not None:
        given.json.write_text(json.dumps({"command": ours, "peers": peers}, indent=1))
    peak = max(stage["peak"] for stage in ours["stages"].values())
    exceeded = [
        f"{name} {value:.0f} {unit} is more than {limit:.0f}"
        for name, value, limit, unit in (
            ("CPU time", ours["cpu"], given.max_cpu, "s"),
            ("memory", peak, given.max_memory, "MB"),
        )
        if limit is not None and value > limit
    ]
    for line in exceeded:
        print(line)
    return int(bool(exceeded) or not ours["passed"])


if __name__ == "__main__":
    sys.exit(main())
