"""Laws of the documentation: pages hang together, blocks are code that parses, quoted messages exist.

`make docs` builds the site with warnings as errors and runs every block; what can be said in a second is said here.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compot_deploy.cli.arguments import parse_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LATER = {"ci-gate.md", "serving.md", "browser.md", "gguf_frontier.md"}
"""Pages that the navigation may name before they are there."""


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run_blocks: Any = _load(DOCS / "run_blocks.py")
BLOCKS = [block for page in run_blocks.pages() for block in run_blocks.blocks_of(page)]
RUN = [block for block in BLOCKS if not block.reason]


def test_there_are_blocks_and_nearly_all_of_them_are_run() -> None:
    assert len(RUN) >= 24
    assert len(RUN) >= 4 * (len(BLOCKS) - len(RUN)), "more than a fifth of the blocks is not run"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.reason], ids=str)
def test_what_is_not_run_names_what_runs_it(block: Any) -> None:
    tests = re.findall(r"(tests/[\w/]+\.py)::(\w+)", block.reason)
    for path, name in tests:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"
    targets = re.findall(r"\bmake ([a-z-]+)", block.reason)
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    assert tests or targets, f"{block} is not run, and nothing is named that runs it"
    for target in re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_no_fence_escapes_the_runner() -> None:
    for page in run_blocks.pages():
        opened = re.findall(r"^```(console|python)\b", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(opened) == sum(block.page == str(page.relative_to(ROOT)) for block in BLOCKS), page


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "python"], ids=str)
def test_python_blocks_parse_and_import_what_exists(block: Any) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compot_deploy"):
            module = __import__(node.module, fromlist=["*"])
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert missing == [], f"{block}: {node.module} has no {missing}"


COMMANDS = [
    (str(block), line.split("#")[0].split("&&")[0].strip())
    for block in RUN
    if block.language == "console"
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.startswith("compot-deploy ")
]


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{where} {line}" for where, line in COMMANDS])
def test_commands_have_flags_that_exist(where: str, command: str) -> None:
    words = shlex.split(command)
    assert len(words) > 1, where
    if words[1] in ("check", "inspect", "run", "plan", "report", "serve", "supports") or "--recipe" in words:
        return  # run by `make docs`
    parse_recipe(words[1:])


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    listed = re.findall(r"^ +- [^:\n]+: ([\w.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    pages = {page.name for page in DOCS.glob("*.md")}
    assert pages - set(listed) == set()
    assert set(listed) - pages <= LATER


def _squeezed(text: str) -> str:
    """Source text without quotes, line ends and placeholders, so that a message is one string again."""
    text = re.sub(r"\{[^{}]*\}", "\0", text)
    return re.sub(r"[\s\"'f]+", "", text)


def test_the_messages_that_troubleshooting_quotes_exist() -> None:
    sources = "".join(
        _squeezed(path.read_text(encoding="utf-8"))
        for folder in ("compot_deploy", "exporters", "quant")
        for path in sorted((ROOT / folder).rglob("*.py"))
    )
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        for part in message.split("…"):
            assert _squeezed(part) in sources, f"no message has {part!r}"


def test_the_block_runner_notices_a_block_that_fails(tmp_path: Path) -> None:
    tools = run_blocks.wrapper(tmp_path)
    good = run_blocks.Block("page.md", 1, "console", "test -d DIR || mkdir DIR\n")
    assert run_blocks.run(good, tmp_path, tools) == ""
    bad = run_blocks.Block("page.md", 1, "console", "false\ntrue\n")
    assert "exit code 1" in run_blocks.run(bad, tmp_path, tools)
    broken = run_blocks.Block("page.md", 1, "python", "import json\njson.loads('{')\n")
    assert "JSONDecodeError" in run_blocks.run(broken, tmp_path, tools)


def test_a_block_with_a_reason_is_counted_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_blocks, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n<!-- not run: needs a hub -->\n```console\nx\n```\n\n```python\ny = 1\n```\n\n```text\nz\n```\n"
    )
    first, second = run_blocks.blocks_of(page)
    assert (first.reason, first.line, first.text) == ("needs a hub", 5, "x\n")
    assert (second.reason, second.language, second.line) == ("", "python", 9)


def test_examples_are_listed_and_documented() -> None:
    scripts = sorted(path.name for path in (ROOT / "examples").glob("[0-9]*.py"))
    assert len(scripts) == 5
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for name in scripts:
        assert f"[{name}]({name})" in readme
        tree = ast.parse((ROOT / "examples" / name).read_text(encoding="utf-8"))
        assert ast.get_docstring(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compot_deploy"):
                module = __import__(node.module, fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names), name


def test_formulas_become_mathml_and_code_stays_code() -> None:
    hooks = pytest.importorskip("latex2mathml") and _load(DOCS / "hooks.py")

    class Page:
        meta: dict[str, Any] = {}  # noqa: RUF012

    page = Page()
    text = "Costs $x_1$ of $$G = L L^\\top$$ and `$HOME` for 5 $ or 6 $.\n```\n$a$\n```\n"
    marked = hooks.on_page_markdown(text, page=page)
    assert "`$HOME`" in marked and "```\n$a$\n```" in marked and "5 $ or 6 $" in marked
    html = hooks.on_page_content(marked, page=page)
    assert html.count("<math") == 2 and 'display="block"' in html and "FORMULA" not in html
