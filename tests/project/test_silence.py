"""Nobody is told what is compressed or run here: no look-up, no connection, nothing in the home directory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from cases import nightly
from watched import Watched, watch

from compot_deploy.exporters.manifest import MANIFEST
from compot_deploy.silence import GENERAL, SWITCHES, silence

QUICK = ["--samples", "2", "--length", "32", "--evaluation-tokens", "256", "--max-perplexity-ratio", "1e9"]


FONTS = re.compile(r"\.(cache|config)(/matplotlib(/fontlist-.*)?)?")
COMPRESS = "from compot_deploy.cli import main\nassert main({arguments!r}) == 0"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watched]:
    """An ONNX folder, and what making it did."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    folder = tmp_path_factory.mktemp("silence")
    text, source, out = folder / "words.txt", tiny.save(folder / "source", "llama"), folder / "out"
    text.write_text("".join(f"{tiny.WORDS}{number} " for number in range(160)))
    arguments = [str(source), "--calibration", str(text), "--out", str(out), "--method", "plain", *QUICK]
    return out, watch(COMPRESS.format(arguments=arguments), folder / "watched")


@pytest.fixture(scope="module")
def exported(compressed: tuple[Path, Watched]) -> Path:
    return compressed[0]


def test_compressing_looks_nothing_up_and_leaves_nothing_at_home(compressed: tuple[Path, Watched]) -> None:
    _, seen = compressed
    assert seen.code == 0, seen.output
    # The plots of the report are drawn by matplotlib, which keeps a list of this machine's fonts.
    assert (seen.network, [path for path in seen.home if not FONTS.fullmatch(path)]) == ((), [])


SERVE = """
import os, signal, subprocess, sys, threading
from compot_deploy.serving import __main__ as serving

CLIENT = '''
import sys, urllib.request
body = b'{"prompt": "the quick", "max_tokens": 4}'
with urllib.request.urlopen(sys.argv[1] + "/completions", body) as reply:
    sys.stdout.write(reply.read().decode())
'''

class Told:  # where the server says that it listens
    def write(self, text):
        def ask():  # from outside: the client's own connection is not meant
            apart = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "WATCHED")}
            subprocess.run([sys.executable, "-c", CLIENT, text.split()[-1]], env=apart)
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=ask).start()

    def flush(self):
        pass

sys.stdout = Told()
assert serving.main([FOLDER, "--port", "0"]) == 0
"""

COMMANDS = {
    "check, run and the page": (
        "import pathlib\n"
        "from compot_deploy.cli import main\n"
        "assert main(['check', FOLDER]) == 0\n"
        "assert main(['run', FOLDER, '-p', 'the quick']) == 0\n"
        "import compot_deploy.cli.serve as serve\n"
        "serve.page_files = lambda bundle: {}\n"
        "with serve.PageServer(pathlib.Path(FOLDER), 0): pass"
    ),
    "serving": SERVE,
}


@pytest.mark.parametrize("command", nightly(*COMMANDS))
def test_a_command_looks_nothing_up_and_leaves_nothing_at_home(
    exported: Path, tmp_path: Path, command: str
) -> None:
    seen = watch(COMMANDS[command].replace("FOLDER", repr(str(exported))), tmp_path)
    assert seen.code == 0, seen.output
    assert (seen.network, seen.home) == ((), ())
    assert command != "serving" or '"text_completion"' in seen.output


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("form", ["gguf", "huggingface"])
def test_other_formats_are_silent_too(form: str, tmp_path: Path) -> None:
    if form == "gguf":
        pytest.importorskip("xllamacpp", reason="llama.cpp's library is the extra llama")
    source, out = tiny.save(tmp_path / "source", "llama", num_hidden_layers=1), tmp_path / "out"
    arguments = [str(source), "--format", form, "--out", str(out), "--method", "plain", *QUICK]
    seen = watch(COMPRESS.format(arguments=arguments), tmp_path / "compress")
    assert (seen.code, seen.network) == (0, ()), seen.output
    for command in (["check", str(out), "--reference", str(source)], ["run", str(out), "-p", "the quick"]):
        seen = watch(COMPRESS.format(arguments=command), tmp_path / command[0])
        assert (seen.code, seen.network, seen.home) == (0, (), ()), seen.output


FOREIGN = ("someone/private-model", "/home/somebody/private-model")


def test_a_folder_of_somebody_else_leads_nowhere(exported: Path, tmp_path: Path) -> None:
    """Its recipe may name what it likes: neither the hub nor a path of this machine is asked unasked."""
    lines = ["from compot_deploy.cli import main"]
    for number, named in enumerate(FOREIGN):
        folder = tmp_path / f"foreign-{number}"
        shutil.copytree(exported, folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["recipe"]["model"] = named
        (folder / MANIFEST).write_text(json.dumps(manifest))
        lines.append(f"assert main(['check', {str(folder)!r}]) == 2")
    seen = watch("\n".join(lines), tmp_path / "watched")
    assert (seen.code, seen.network, seen.home) == (0, (), ()), seen.output
    said = " ".join(seen.output.split())
    assert said.count("unasked). Give it with --reference MODEL") == len(FOREIGN)
    assert all(named in said for named in FOREIGN)


@pytest.mark.slow
@pytest.mark.nightly  # it waits
def test_onnxruntime_stays_silent_while_it_waits(exported: Path, tmp_path: Path) -> None:
    # Left to itself, 1.32 makes its first look-up five to ten seconds after a session is made.
    program = (
        "import pathlib, time\nfrom compot_deploy.accuracy.runners import onnx_runner\n"
        f"runner = onnx_runner(pathlib.Path({str(exported)!r}))\ntime.sleep(13)"
    )
    seen = watch(program, tmp_path)
    assert (seen.code, seen.network, seen.home) == (0, (), ()), seen.output


def test_the_watch_sees_a_look_up_a_connection_and_a_file(tmp_path: Path) -> None:
    seen = watch(
        "import pathlib, socket\n"
        "(pathlib.Path.home() / 'deviceid').write_text('1')\n"
        "socket.getaddrinfo('127.0.0.1', 80)\n"
        "try: socket.create_connection(('127.0.0.1', 1), 1)\n"
        "except OSError: pass",
        tmp_path,
    )
    assert seen.code == 0, seen.output
    assert seen.home == ("deviceid",)
    assert {line.split()[1] for line in seen.network} >= {"socket.getaddrinfo", "socket.connect"}


def test_every_switch_is_set_where_the_user_says_nothing() -> None:
    environment: dict[str, str] = {"HOME": "/h"}
    silence(environment)
    assert environment == {"HOME": "/h", GENERAL: "1", **SWITCHES}
    silence(environment)
    assert environment == {"HOME": "/h", GENERAL: "1", **SWITCHES}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_the_user_says_about_one_library_holds_for_it_alone(name: str) -> None:
    environment = {name: "whatever"}
    silence(environment)
    assert environment == {**SWITCHES, name: "whatever"}


@pytest.mark.parametrize("value", ["0", "False", "no"])
def test_who_wants_to_be_tracked_is(value: str) -> None:
    environment = {GENERAL: value}
    silence(environment)
    assert environment == {GENERAL: value}


def test_importing_the_package_is_enough(tmp_path: Path) -> None:
    seen = watch("import compot_deploy, os; print(os.environ['ORT_DISABLE_TELEMETRY'])", tmp_path)
    assert (seen.code, seen.output) == (0, "1\n")
