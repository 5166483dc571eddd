"""Run every code block of the documentation, as a reader would, in small.

    python docs/run_blocks.py [--list] [PAGE …]

``console`` and ``python`` blocks of README.md and docs/*.md are run in order, each page in a temporary folder of
its own. ``MODEL`` stands for the model that ships, ``ENCODER``, ``WHISPER`` and ``T5`` for small random ones, ``DIR``
for a folder, ``text.txt`` for a text. Every block stands by itself, but for the files that earlier blocks of its page
wrote. ``make demo`` runs with this environment in place of one of its own. A block that cannot be run has a comment
in the line before it, which says why, and which test or make target does what it says::

    <!-- not run: serves for ever; tests/cli/test_serve.py::test_ctrl_c_ends_it_cleanly_and_frees_the_port -->

and one that needs something to be there has a command that makes it::

    <!-- before: mkdir reports -->

Calibration and evaluation texts are cut short: `SMALL` is added to every command and every call that does not set these
options, and text that ships stands for text that the model would write. What is shown is what was run, otherwise. A
gate may fail on so little text: exit code 1 counts as run, anything else that is not 0 fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))  # tiny models
LANGUAGES = ("console", "python")
SMALL = {"samples": 8, "length": 64, "evaluation_tokens": 512}
"""Options that make a run short, and its figures coarse."""

LIMIT = 1800
"""Seconds that a block may take."""

_FENCE = re.compile(
    r"(?:^<!-- (?:not run: (?P<reason>[^\n]+?)|before: (?P<before>[^\n]+?)) -->\n)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

_WRAPPER = """\
import sys
from compot_deploy.cli import main
from compot_deploy.cli.arguments import NAMES
arguments = sys.argv[1:]
known = (*NAMES, "-h", "--help", "--version", "--recipe")
if arguments[:1] == ["plan"] or not arguments or arguments[0] not in known:
    for option, value in {small}.items():
        flag = "--" + option.replace("_", "-")
        if flag not in arguments:
            arguments += [flag, str(value)]
    if arguments[0] != "plan" and "--out" in arguments and "--force" not in arguments:
        arguments.append("--force")  # the same DIR in every block
    if "--calibration" not in arguments:
        arguments += ["--calibration", {text!r}]
code = main(arguments)
sys.exit(0 if code == 1 else code)  # a gate that fails on so little text
"""

_PREAMBLE = """\
import compot_deploy.recipe as _recipe  # before anybody else takes the function from there
_original = _recipe.recipe_from_mapping
def _small(values, *, origin):
    return _original({**%r, "calibration": "text.txt", **values}, origin=origin)
_recipe.recipe_from_mapping = _small
"""


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: where it is, relative to the repository.
        line: of its first line of code.
        language: console or python.
        text: the code.
        reason: why it is not run; empty if it is.
        before: a command that makes what it needs.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    before: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README.md and the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> Iterator[Block]:
    """The console and python blocks of a page, in order."""
    content = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(content):
        if match["language"] in LANGUAGES:
            line = content.count("\n", 0, match.start("text")) + 1
            reason = match["reason"] or ""
            where = str(page.relative_to(ROOT))
            yield Block(where, line, match["language"], match["text"], reason, match["before"] or "")


def run(block: Block, folder: Path, tools: Path) -> str:
    """Run a block in a folder; what it printed, if it failed, otherwise nothing."""
    from compot_deploy.embedded import MODEL

    text = re.sub(r"\bMODEL\b|path/to/model", str(MODEL), block.text)
    text = re.sub(r"\bDIR\b", "dir", text)
    if re.search(r"\bENCODER\b", text):
        text = re.sub(r"\bENCODER\b", "encoder", text)
        _write_encoder(folder / "encoder", MODEL)
    if re.search(r"\bWHISPER\b", text):
        text = re.sub(r"\bWHISPER\b", "whisper", text)
        _write_speech(folder)
    if re.search(r"\bT5\b", text):
        text = re.sub(r"\bT5\b", "t5", text)
        _write_translator(folder)
    if block.before:
        made = run(Block(block.page, block.line, "console", block.before), folder, tools)
        if made:
            return f"before it: {made}"
    if block.language == "console":
        command = ["bash", "-euo", "pipefail", "-c", text]
    else:
        script = folder / "block.py"
        script.write_text(_PREAMBLE % SMALL + text, encoding="utf-8")
        command = [sys.executable, str(script)]
    path = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    return (
        ""
        if done.returncode == 0
        else f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )


def _write_encoder(target: Path, model: Path) -> None:
    """A small BERT of random weights with the tokenizer of a model."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=512,
    )
    encoder: Any = BertModel(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("dense.weight"):  # inputs of falling weight, so that there is something to factorize
            parameter.data *= 0.95 ** torch.arange(parameter.shape[1])
    encoder.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _write_speech(folder: Path) -> None:
    """A tiny speech model of random weights, and recordings of tones, as the tests have them."""
    import spoken

    spoken.save(folder / "whisper")
    spoken.record(folder / "recordings", 8)


def _write_translator(folder: Path) -> None:
    """A tiny T5 of random weights, and lines that it could read."""
    import translators

    translators.save(folder / "t5", "t5")
    lines = (f"the quick brown fox jumps over {number} lazy dogs of the river\n" for number in range(80))
    (folder / "lines.txt").write_text("".join(lines), encoding="utf-8")


def wrapper(folder: Path) -> Path:
    """A folder with a ``compot-deploy`` that uses small settings, and a ``make`` that uses it."""
    from compot_deploy.embedded import HELD_OUT_TEXT

    tools = folder / "tools"
    tools.mkdir()
    (tools / "small.py").write_text(
        _WRAPPER.replace("{small}", repr(SMALL)).replace("{text!r}", repr(str(HELD_OUT_TEXT))),
        encoding="utf-8",
    )
    command = tools / "compot-deploy"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tools / "small.py"}" "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    # README: `compot-deploy … && deploy DIR`, where deploy is whatever the reader does with a folder that passed.
    (tools / "deploy").write_text('#!/bin/sh\ntest -d "$1"\n', encoding="utf-8")
    (tools / "deploy").chmod(0o755)
    # The recipe of a target as it stands, without the environment that it would make first.
    make = tools / "make"
    make.write_text(
        f'#!/bin/sh\nexec /usr/bin/env PATH="${{PATH#*:}}" make -s -C "{ROOT}" -o "{tools}/demo.stamp" '
        f'VENV="{tools}" BIN="{tools}" DEMO="$PWD/demo" "$@"\n',
        encoding="utf-8",
    )
    make.chmod(0o755)
    return tools


def main(argv: Sequence[str] | None = None) -> int:
    """Run all blocks, or those of some pages; 1 if one failed."""
    parser = argparse.ArgumentParser(description="Run the code blocks of the documentation.")
    parser.add_argument(
        "pages", nargs="*", type=Path, help="README.md, docs/budget.md …; all if none is given"
    )
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    options = parser.parse_args(argv)
    from compot_deploy.embedded import HELD_OUT_TEXT

    chosen = [page.resolve() for page in options.pages] or pages()
    failed = ran = 0
    left: list[Block] = []
    with tempfile.TemporaryDirectory() as scratch:
        tools = wrapper(Path(scratch))
        for page in chosen:
            folder = Path(scratch) / page.stem
            folder.mkdir()
            (folder / "text.txt").write_bytes(HELD_OUT_TEXT.read_bytes())
            for block in blocks_of(page):
                if block.reason:
                    left.append(block)
                    continue
                ran += 1
                if options.list:
                    print(block)
                    continue
                started = time.monotonic()
                try:
                    problem = run(block, folder, tools)
                except subprocess.TimeoutExpired:
                    problem = f"it did not end within {LIMIT} seconds"
                failed += bool(problem)
                print(f"{block}: {problem or 'ok'} ({time.monotonic() - started:.0f} s)", flush=True)
    for block in left:
        print(f"{block}: not run, {block.reason}")
    print(f"{ran} blocks {'to run' if options.list else 'run'}, {failed} failed, {len(left)} not run.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
