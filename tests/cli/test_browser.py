"""Laws of the page, in a headless Chromium: the browser writes what onnxruntime writes, and says what stops it.

Needs Chromium, Node.js and the page that ``make web`` builds; skipped where one of them is missing.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compot_deploy import cli
from compot_deploy.accuracy.onnx_runner import onnx_runner
from compot_deploy.cli.serve import BUNDLE, PageServer
from compot_deploy.errors import EXIT_OK
from compot_deploy.models.tokens import load_tokenizer

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "web" / "test" / "drive.mjs"
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
MISSING = [
    what
    for what, there in {
        "Chromium": CHROMIUM,
        "Node.js": shutil.which("node"),
        "the page (make web)": (BUNDLE / "bundle.json").is_file(),
        "web/node_modules (make web)": (ROOT / "web" / "node_modules" / "playwright-core").is_dir(),
    }.items()
    if not there
]
pytestmark = [
    pytest.mark.consumer,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}"),
]

QUICK = ["--samples", "4", "--length", "64", "--evaluation-tokens", "256", "--rounds", "2"]
PROMPTS = ("Return a", "def test_", "The argument must be a string", "Ungewöhnliche Zeichen: ½ → 日本\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ships, factorized, int4."""
    out = tmp_path_factory.mktemp("browser") / "small"
    assert (
        cli.main(["--quant", "int4", "--out", str(out), *QUICK, "--max-perplexity-ratio", "1e9"]) == EXIT_OK
    )
    return out


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    with PageServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def static_host(site: Path) -> Iterator[str]:
    """Files and nothing else, as any web space serves them."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder) as url:
        yield url


def drive(url: str, *steps: dict[str, Any], **options: Any) -> Any:
    plan = {"url": url, "chromium": CHROMIUM, "steps": steps, **options}
    done = subprocess.run(
        ["node", str(DRIVER), json.dumps(plan)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def expected(folder: Path, prompt: str, tokens: int) -> tuple[list[int], str]:
    """What onnxruntime writes. WebAssembly has no int8 kernels, so it is the exact computation that it repeats."""
    tokenizer = load_tokenizer(folder)
    ids = [*tokenizer.first, *tokenizer.encode(prompt)]
    added = list(onnx_runner(folder, exact=True, threads=1).generate(ids, tokens))
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    if end in added:  # the runner goes on after the end of the text, the page does not
        added = added[: added.index(end) + 1]
    return added, tokenizer.decode(added)


def test_the_page_writes_the_tokens_that_onnxruntime_writes(folder: Path, url: str) -> None:
    report = json.loads((folder / "compot" / "report.json").read_text())
    known = report["accuracy"]["continuations"][0]
    steps: list[dict[str, Any]] = [{"generate": prompt, "tokens": 32} for prompt in PROMPTS]
    seen = drive(url, *steps, {"generate": known["prompt"], "tokens": 16})
    *written, again = seen["results"]
    for prompt, result in zip(PROMPTS, written, strict=True):
        ids, text = expected(folder, prompt, 32)
        assert (result["ids"], result["text"], result["given"]) == (ids, text, prompt)
        assert float(result["speed"].replace(",", "")) > 0
    assert "The same text as onnxruntime's, computed exactly, in the report" in again["note"]
    assert known["exact"].startswith(again["text"])
    assert seen["isolated"]
    assert seen["messages"] == []
    assert seen["alert"] is None
    assert all(request.startswith(url) for request in seen["requests"])
    assert seen["verdict"].strip().endswith("Passed its gate")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the machine has one core")
def test_threads_change_nothing_but_the_speed(folder: Path, url: str) -> None:
    seen = drive(url + "?threads=2", {"generate": PROMPTS[0], "tokens": 32})
    assert "2 of" in seen["facts"]
    assert seen["results"][0]["ids"] == expected(folder, PROMPTS[0], 32)[0]


def test_a_server_without_isolation_headers_leaves_one_thread_and_the_same_text(
    folder: Path, tmp_path: Path
) -> None:
    """Any static host will do: the bundle, and the folder beside it as model/."""
    shutil.copytree(BUNDLE, tmp_path / "site" / "page")
    shutil.copytree(folder, tmp_path / "site" / "page" / "model")
    with static_host(tmp_path / "site") as url:
        seen = drive(f"{url}page/index.html?threads=2", {"generate": PROMPTS[0], "tokens": 32})
    assert seen["results"][0]["ids"] == expected(folder, PROMPTS[0], 32)[0]
    assert not seen["isolated"]
    assert "1 of" in seen["facts"] and "only one thread" in seen["facts"]


def test_what_cannot_be_done_is_said_in_a_sentence(url: str) -> None:
    stopped, empty, long, after = drive(
        url,
        {"generate": PROMPTS[0], "tokens": 500, "stopAfter": 0.3},
        {"generate": ""},
        {"generate": "many words " * 300, "tokens": 64},
        {"generate": "Say", "temperature": 1.5, "tokens": 8},
    )["results"]
    assert 0 < len(stopped["ids"]) < 500
    assert stopped["note"].endswith("then stopped.")
    assert empty["alert"] == "The prompt has no tokens: give at least one word."
    assert "tokens of prompt and 64 new ones are more than the model's context of 512" in long["alert"]
    assert after["alert"] is None and len(after["ids"]) == 8  # it goes on after all that
    assert "onnxruntime" not in after["note"]


def test_a_browser_without_simd_is_told_so_before_anything_large_is_fetched(url: str) -> None:
    # On x86 V8 offers SIMD only with SSE 4.1, and can be told that there is none; elsewhere the page is told.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    how: dict[str, Any] = (
        {"arguments": ["--js-flags=--no-enable-sse4-1"]}
        if x86
        else {"script": "WebAssembly.validate = () => false"}
    )
    seen = drive(url, {"generate": PROMPTS[0]}, until="broken", **how)
    assert seen["alert"].startswith("This browser has no WebAssembly SIMD, which the runtime needs")
    assert seen["results"] == []
    assert not any(request.endswith((".wasm", ".onnx", ".onnx_data")) for request in seen["requests"])
    without = drive(url, until="broken", script="delete globalThis.WebAssembly")
    assert without["alert"].startswith("This browser has no WebAssembly, so")


def test_a_file_that_changed_or_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with serving(copy) as url:
        (copy / "onnx" / "model.onnx_data").write_bytes(b"other")
        changed = drive(url, until="broken")
        assert "model.onnx_data has changed since it was verified" in changed["alert"]


def test_nothing_sticks_out_of_the_screen(url: str) -> None:
    step = {"generate": "x" * 300, "tokens": 8}
    narrow, wide = drive(url, step, {"size": [1280, 800]}, step, size=[360, 740], touch=True, scheme="dark")[
        "results"
    ]
    assert narrow["overhang"] == wide["overhang"] == 0


def test_the_documented_page_of_ones_own_runs(folder: Path, tmp_path: Path) -> None:
    block = re.search(r"```js\n(.*?)```", (ROOT / "docs" / "browser.md").read_text(), re.DOTALL)
    assert block is not None
    modules = ROOT / "web" / "node_modules"
    source, site = tmp_path / "own.js", tmp_path / "site"
    source.write_text(block[1] + '\ndocument.body.dataset.state = "ready";\n')
    shutil.copytree(folder, site / "models" / "small")
    (site / "runtime").mkdir()
    for name in ("ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(modules / "onnxruntime-web" / "dist" / name, site / "runtime")
    (site / "index.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><body><script type="module" src="own.js"></script>'
    )
    subprocess.run(
        [modules / ".bin" / "esbuild", source, "--bundle", "--format=esm", f"--outfile={site / 'own.js'}"],
        check=True,
        capture_output=True,
        env={**os.environ, "NODE_PATH": str(modules)},
    )
    with static_host(site) as url:
        seen = drive(url, raw=True)
    assert seen["messages"] == []
    assert seen["body"] == PROMPTS[0] + expected(folder, PROMPTS[0], 32)[1]
    assert all(request.startswith((url, f"blob:{url}", "data:")) for request in seen["requests"])
