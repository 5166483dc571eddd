"""The text of the small default model: documentation of the running Python, foreign notices left out.

The committed text is the input of record: another Python version gives other text.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import lzma
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_BREAK = "\n\n\n"  # two blank lines part documents, one blank line parts blocks

SKIPPED_PARTS = {
    "__pycache__",
    "encodings",  # character tables, all with the same docstring
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",  # taken as topics
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# A file that carries any of these is left out, whatever else it says: only text that is plainly under
# the PSF licence is taken.
FOREIGN_NOTICE = re.compile(
    r"permission to use|permission is hereby|redistributions? |apache license|\bMIT\b|\bGPL\b|\bZPL\b"
    r"|zlib/libpng|provided 'as-is'|public domain|secret labs|cnri|sublicense|released under",
    re.IGNORECASE,
)
COPYRIGHT = re.compile(
    r"(copyright\s+(\(c\)\s*)?(by )?\d{4}|\(c\) copyright|copyright \(c\)).*", re.IGNORECASE
)
CONTRIBUTED = re.compile(r"licensed to (the )?psf under a contributor agreement", re.IGNORECASE)
COMMON_WORDS = frozenset(
    """
    a an and any are as at be been but by can does each for from has have if in into is it its may must
    no not of on one only or otherwise return returned returns should so such than that the then there
    these they this to used using was when where which while will with you your
    """.split()  # noqa: SIM905
)
LIST_ITEM = re.compile(r"^([-*o+] |\d+[.)] |:\w+|@\w+|\S+( \S+)? --? |'\S+'\s|\S+:( |$))")
UNDERLINE = re.compile(r"^\W+$")


def is_psf_only(source: str) -> bool:
    """Says whether a source file carries no notice but the PSF's own."""
    if FOREIGN_NOTICE.search(source):
        return False
    if CONTRIBUTED.search(source):
        return True
    notices = COPYRIGHT.finditer(source)
    return all("python software foundation" in notice.group(0).lower() for notice in notices)


def is_english(block: str) -> bool:
    """Says whether a block of text reads as English prose and not as code, a table or a grammar."""
    words = re.findall(r"[A-Za-z']+", block)
    if len(words) < 3:
        return False
    common = sum(word.lower() in COMMON_WORDS for word in words) / len(words)
    prose = sum(char.isalpha() or char in " ,.'\n" for char in block) / len(block)
    return common >= 0.15 and prose >= 0.88


def join_lines(lines: list[str]) -> str:
    """Joins the hard-wrapped lines of a block, keeping each list item on a line of its own."""
    base = min(len(line) - len(line.lstrip()) for line in lines)
    joined: list[str] = []
    hanging = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        stripped = re.sub(r"\s+", " ", line.strip())
        if joined and not LIST_ITEM.match(stripped) and not (hanging and indent == base):
            joined[-1] += " " + stripped
        else:
            joined.append(stripped)
        hanging = indent > base
    return "\n".join(joined)


def clean(text: str) -> list[str]:
    """Turns a docstring or a help topic into blocks of English, without doctests, code and tables."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text).expandtabs(8)):
        lines = [
            line.rstrip() for line in block.splitlines() if line.strip() and not UNDERLINE.match(line.strip())
        ]
        if not lines or any(line.lstrip().startswith((">>>", "$ ")) for line in lines):
            continue
        joined = join_lines(lines)
        if re.search(r"copyright|\S@\S+\.\w|\$Id|::=|^Version ", joined, re.IGNORECASE) or not is_english(
            joined
        ):
            continue
        blocks.append(joined)
    return blocks


def docstrings(source: str) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and its functions in the order of the source."""
    nodes = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring


def gather() -> tuple[dict[str, list[str]], list[str]]:
    """Gathers the documents of the running Python.

    Returns:
        The blocks of each document by its name, and the names of the files left out for their notices.
    """
    documents: dict[str, list[str]] = {}
    left_out: list[str] = []
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        documents[f"topic/{name}"] = clean(text)
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_PARTS & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if not is_psf_only(source):
            left_out.append(relative.as_posix())
            continue
        documents[f"lib/{relative.as_posix()}"] = [
            block for text in docstrings(source) for block in clean(text)
        ]
    return documents, left_out


def shingles(block: str, size: int = 6) -> set[tuple[str, ...]]:
    """Returns the runs of `size` words in a block (the whole block if it is shorter)."""
    words = re.findall(r"\w+", block.lower())
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def collect(args: argparse.Namespace) -> None:
    """Writes text/train.txt.xz and text/heldout.txt from the documentation of the running Python."""
    documents, left_out = gather()
    names = sorted(documents)
    random.Random(args.seed).shuffle(names)

    held: list[str] = []
    size = 0
    for name in names:
        length = sum(len(block) + 2 for block in documents[name])
        if size < args.heldout_bytes and 400 <= length <= args.heldout_bytes // 4:
            held.append(name)
            size += length
    held_names = set(held)

    seen: set[str] = set()
    known: set[tuple[str, ...]] = set()
    train_texts: list[str] = []
    for name in names:
        if name in held_names:
            continue
        kept = []
        for block in documents[name]:
            key = " ".join(re.findall(r"\w+", block.lower()))
            if key not in seen:
                seen.add(key)
                known |= shingles(block)
                kept.append(block)
        if kept:
            train_texts.append("\n\n".join(kept))

    held_texts: list[str] = []
    dropped = 0
    for name in held:
        kept = []
        for block in documents[name]:
            runs = shingles(block)
            if len(runs & known) > 0.2 * len(runs):
                dropped += 1
                continue
            known |= runs
            kept.append(block)
        if kept:
            held_texts.append("\n\n".join(kept))

    folder = args.text
    folder.mkdir(parents=True, exist_ok=True)
    train_bytes = (DOCUMENT_BREAK.join(train_texts) + "\n").encode()
    held_bytes = (DOCUMENT_BREAK.join(held_texts) + "\n").encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}]
    (folder / "train.txt.xz").write_bytes(lzma.compress(train_bytes, filters=filters))
    (folder / "heldout.txt").write_bytes(held_bytes)
    print(f"Python {sys.version.split()[0]}; left out for their notices: {' '.join(left_out)}")
    print(f"train: {len(train_texts)} documents, {len(train_bytes)} bytes")
    print(f"heldout: {len(held_texts)} documents, {len(held_bytes)} bytes, {dropped} near duplicates dropped")
    print("heldout documents: " + " ".join(sorted(held)))


def read_documents(path: Path) -> list[str]:
    """Reads the documents of a text file, xz-compressed or plain."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    return [document.strip("\n") for document in text.split(DOCUMENT_BREAK) if document.strip()]
