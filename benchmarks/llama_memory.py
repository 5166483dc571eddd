"""What a GGUF file takes in memory, in a process that imports nothing but what runs it.

    python benchmarks/llama_memory.py model.gguf --threads 2

The growth from the loaded libraries until 32 tokens are decoded, in MB: anonymous, mapped from the file, and program
code. `cache` and `compute` are llama.cpp's buffers, as it says itself (the latter reserved, touched as far as a batch
needs); `tiles` is what the plug-in holds; `beyond` is everything that grew, program code included, less the cache,
above the size of the file, in parts of the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from pathlib import Path
from unittest import mock

from compot_deploy.exporters.gguf.library import Library, load_library
from compot_deploy.llama.model import LlamaModel

STEPS = 32
FIELDS = ("anonymous", "file", "libraries")


def resident(path: Path) -> dict[str, float]:
    """Resident memory of this process in MB: anonymous, mapped from `path`, mapped from libraries; 0 where unknown."""
    held = dict.fromkeys(FIELDS, 0.0)
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return held
    field = "anonymous"
    for line in lines:
        words = line.split()
        if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", words[0]):
            mapped = words[5] if len(words) > 5 and words[5].startswith("/") else ""
            field = "anonymous" if not mapped else "file" if mapped == str(path.resolve()) else "libraries"
        elif words[0] == "Anonymous:":
            held["anonymous"] += float(words[1]) * 1024 / 1e6
            held[field] -= float(words[1]) * 1024 / 1e6  # written pages of a private mapping
        elif words[0] == "Rss:":
            held[field] += float(words[1]) * 1024 / 1e6
    return held


def memory_of(path: Path, threads: int, context: int) -> dict[str, float]:
    """What a file takes in this process, in MB; see the head of this file."""
    said: list[str] = []
    with mock.patch.object(Library, "_remember", lambda self, level, text, data: said.append(text.decode())):
        load_library()
        gc.collect()
        before = resident(path)
        with LlamaModel(path, threads=threads, context=context) as model:
            model.generate([1, 2, 3], max_tokens=STEPS, stop=False)
            grown = {field: value - before[field] for field, value in resident(path).items()}
            grown["tiles"] = model.plugin_bytes / 1e6
    for name, words in (("cache", r"KV buffer size"), ("compute", r"compute buffer size")):
        found = re.findall(words + r" *= *([0-9.]+) MiB", "".join(said))
        grown[name] = sum(map(float, found)) * 2**20 / 1e6
    size = path.stat().st_size / 1e6
    grown["beyond"] = (sum(grown[field] for field in FIELDS) - grown["cache"]) / size - 1
    grown["torch"] = float("torch" in sys.modules)
    return grown


def main() -> None:
    """Measure one file and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()
    print(json.dumps(memory_of(arguments.path, arguments.threads, arguments.context)))


if __name__ == "__main__":
    main()
