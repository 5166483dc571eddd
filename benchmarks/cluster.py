"""What more workers bring: a random Llama calibrated, planned and made by a Ray cluster on this machine.

    python benchmarks/cluster.py --workers 1 2
    python benchmarks/cluster.py --workers 1 --bytes --hidden 2048 --intermediate 5632 --heads 32 --layers 1

Prints wall-clock seconds of each stage for each number of workers, one thread each, and checks that the result is the
same to the last bit; beside them processor seconds, which tell on a busy machine how evenly work was divided, and the
largest memory of a worker. With ``--bytes`` also how many bytes were sent and came back, by kind of task.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from compot_deploy.cluster import ALONE, Workers
from compot_deploy.cluster.connection import workers_of
from compot_deploy.embedded import MODEL
from compot_deploy.exporters.artifact import digest
from compot_deploy.models.source import TOKENIZER_FILES, open_source
from compot_deploy.pipeline.compress import compress
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe

DIVIDED = ("Calibrate", "List schemes", "Predict candidates", "Measure what was chosen", "Make matrices")
Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Stages:
    """Wall-clock seconds from the first to the last word of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def __call__(self, done: int, total: int, label: str) -> None:
        """See `compot_deploy.progress.Progress`."""
        now = time.perf_counter()
        if done == 0 or label not in self._began:
            self._began[label] = now
        elif done == total:
            self.seconds[label] = self.seconds.get(label, 0.0) + now - self._began[label]


class Counting:
    """Workers whose traffic is counted, as pickles."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.traffic: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self.largest: dict[str, int] = defaultdict(int)

    @property
    def alone(self) -> bool:
        """As those that are counted."""
        return self._workers.alone

    def map(
        self, function: Callable[[Shared, Item], Result], shared: Shared, items: Iterable[Item]
    ) -> Iterator[Result]:
        """See `compot_deploy.cluster.Workers.map`."""
        counted = self.traffic[function.__name__]
        counted[1] += len(pickle.dumps(shared, 5))

        def sent() -> Iterator[Item]:
            for item in items:
                size = len(pickle.dumps(item, 5))
                counted[0] += 1
                counted[2] += size
                self.largest[function.__name__] = max(self.largest[function.__name__], size)
                yield item

        for result in self._workers.map(function, shared, sent()):
            counted[3] += len(pickle.dumps(result, 5))
            yield result


@dataclass(frozen=True)
class Usage:
    """What a process has used.

    Attributes:
        process: its id.
        seconds: of a processor.
        memory: bytes, at most.
    """

    process: int
    seconds: float
    memory: int


def usage(_: None, number: int) -> Usage:
    """Of this process."""
    time.sleep(0.05)  # so that every worker is asked
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(os.getpid(), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def usages(workers: Workers, count: int) -> dict[int, Usage]:
    """Of every worker, by its process."""
    return {one.process: one for one in workers.map(usage, None, range(10 * count))}


def save_model(folder: Path, options: argparse.Namespace) -> Path:
    """A random Llama that reads what the shipped model reads."""
    import transformers

    shipped = transformers.AutoConfig.from_pretrained(MODEL)
    config = transformers.LlamaConfig(
        vocab_size=shipped.vocab_size,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=512,
        bos_token_id=shipped.bos_token_id,
        eos_token_id=shipped.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (Path(MODEL) / name).exists():
            shutil.copy(Path(MODEL) / name, folder / name)
    return folder


@contextmanager
def cluster_of(count: int) -> Iterator[Workers]:
    """So many machines of one processor; none is this process alone."""
    if count == 0:
        yield ALONE
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        with workers_of(str(cluster.address)) as workers:
            yield workers
    finally:
        cluster.shutdown()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="0 is this process alone")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=6)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--bytes", action="store_true", help="count what is sent, which takes time of its own"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    results: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = save_model(Path(scratch) / "model", options)
        source = open_source(model)
        recipe = Recipe(
            model=str(model),
            calibration=str(Path(MODEL).parent / "text" / "heldout.txt"),
            bits=options.bits,
            samples=options.samples,
            length=256,
            search="predicted",
        )
        settings = resolve(recipe, source)
        print(f"{settings.weights / 1e6:.1f} million weights in {source.layers} blocks")
        for number, count in enumerate(options.workers):
            stages, work = Stages(), Path(scratch) / f"work-{number}"
            work.mkdir()
            with cluster_of(count) as workers:
                used = Counting(workers) if options.bytes else workers
                before = usages(workers, count) if count else {}
                own = usage(None, 0).seconds
                made = compress(settings, work, stages, used)
                own = usage(None, 0).seconds - own
                after = usages(workers, count) if count else {}
            named = {name: digest(matrix) for name, matrix in made.model.matrices.items()}
            results[number] = hashlib.sha256(repr(named).encode()).hexdigest()[:12]
            divided = sum(stages.seconds.get(label, 0.0) for label in DIVIDED)
            told = ", ".join(f"{label.lower()} {took:.1f}" for label, took in stages.seconds.items())
            print(f"{count} workers: divided stages {divided:.1f} s ({told}); result {results[number]}")
            took = [one.seconds - before[name].seconds for name, one in after.items() if name in before]
            theirs = ", ".join(f"{one:.1f}" for one in took) or "no"
            print(f"  processor seconds: {own:.1f} of this process, {theirs} of workers")
            if count:
                most, first = (max(one.memory for one in some.values()) / 1e6 for some in (after, before))
                print(f"  memory of a worker: {most:.0f} MB at most, {first:.0f} MB at the beginning")
            if isinstance(used, Counting):
                for name, (tasks, shared, sent, back) in used.traffic.items():
                    print(
                        f"  {name}: {tasks} tasks, {sent / 1e6:.1f} MB sent (largest {used.largest[name] / 1e6:.1f}), "
                        f"{shared / 1e6:.1f} MB shared, {back / 1e6:.1f} MB back"
                    )
    return int(len(set(results.values())) != 1)


if __name__ == "__main__":
    sys.exit(main())
