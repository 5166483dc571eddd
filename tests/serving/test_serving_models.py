"""What is opened, and what is said of what cannot be: a GGUF file, an ONNX folder, anything else."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cases import nightly
from servers import Served, ask, serving, started

from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.serving import engines
from compot_deploy.serving.__main__ import main
from compot_deploy.serving.engines import open_model

pytestmark = pytest.mark.consumer
PROMPT = "the quick brown fox"


def copied(source: Path, target: Path, **files: Any) -> Path:
    """A copy of an ONNX folder with some of its JSON files changed."""
    shutil.copytree(source, target)
    for name, changes in files.items():
        path = target / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_both_formats_continue_a_text_as_their_runtimes_do(
    served: Served, kind: str, models: dict[str, Path]
) -> None:
    text, made = served.greedy(PROMPT, 12)
    if kind == "gguf":
        from compot_deploy.llama import generate

        assert text == generate(models[kind], PROMPT, max_tokens=12, context=64).text
    else:
        from compot_deploy.accuracy.onnx_runner import onnx_runner
        from compot_deploy.models.tokens import load_tokenizer

        tokenizer = load_tokenizer(models[kind])
        ids = [*tokenizer.first, *tokenizer.encode(PROMPT)]
        greedy = onnx_runner(models[kind], threads=1).generate(ids, 12)
        assert tuple(made) == greedy[: len(made)] and tokenizer.decode(made) == text


def test_a_prompt_is_the_same_read_at_once_or_in_parts(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    with serving(models["onnx"]) as served:
        ids = list(range(5, 45))
        whole = served.greedy(ids, 8)
        monkeypatch.setattr(engines, "_PIECE", 7)
        assert served.greedy(ids, 8) == whole


def test_a_token_that_ends_the_text_is_not_part_of_it(
    models: dict[str, Path], tmp_path: Path, served: Served, kind: str
) -> None:
    if kind != "onnx":
        pytest.skip("llama.cpp's own")
    _, made = served.greedy(PROMPT, 12)
    own, one, several = {"eos_token_id": None}, {"eos_token_id": made[5]}, {"eos_token_id": [made[5], 2]}
    for name, generation, config in (("one", one, {}), ("several", several, {}), ("config", own, one)):
        folder = copied(models["onnx"], tmp_path / name, generation_config=generation, config=config)
        with serving(folder) as shorter:
            assert shorter.greedy(PROMPT, 12)[1] == made[: made.index(made[5])]


def test_a_gguf_file_brings_its_template(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    real = engines.read_header(models["gguf"]).metadata
    source = "{{ bos_token }}{{ messages[0].content }}"
    metadata = {**real, "tokenizer.chat_template": source}
    monkeypatch.setattr(engines, "read_header", lambda path: SimpleNamespace(metadata=metadata))
    opened = open_model(models["gguf"].parent, context=16)
    opened.engine.close()
    bos = real["tokenizer.ggml.tokens"][int(real["tokenizer.ggml.bos_token_id"])]
    assert (opened.template, opened.words["bos_token"], opened.name) == (source, bos, "small")


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}", [{"name": "default", "template": "{{ bos_token }}"}]]
)
def test_an_onnx_folder_brings_its_template(
    models: dict[str, Path], tmp_path: Path, template: object
) -> None:
    pytest.importorskip("onnxruntime")
    changes = {"chat_template": template, "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    folder = copied(models["onnx"], tmp_path / "model", tokenizer_config=changes)
    opened = open_model(folder)
    assert (opened.template, opened.words["bos_token"], opened.words["eos_token"]) == (
        "{{ bos_token }}", "<s>", "</s>",
    )  # fmt: skip
    assert (opened.name, opened.engine.context) == ("model", 256)
    (folder / "chat_template.jinja").write_text("its own file")
    assert open_model(folder).template == "its own file"


@pytest.mark.parametrize(
    "found", [None, 3, {}, [3], [{}], [{"name": "rag", "template": "x"}], [{"name": "default"}]]
)
def test_what_is_no_default_template_is_none(found: object, tmp_path: Path) -> None:
    assert engines._template(tmp_path, {"chat_template": found}) is None


def test_what_cannot_be_served_is_one_sentence(
    models: dict[str, Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match=r"neither a GGUF file nor onnx/model\.onnx"):
        open_model(tmp_path)
    if kind == "onnx":
        (copied(models[kind], tmp_path / "encoder") / "generation_config.json").unlink()
        with pytest.raises(InputError, match="writes no text"):
            open_model(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"A context of 9999 positions: small.* was made for 1 to 256"):
        open_model(models[kind], context=9999)
    assert main([str(tmp_path / "nothing.gguf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(models[kind]), "--port", "99999"]) == 2
    assert "Choose another with --port" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
@pytest.mark.parametrize("kind", ["gguf", *nightly("onnx")], indirect=True)
def test_sigterm_in_the_middle_of_an_answer_ends_it_with_exit_code_0(
    models: dict[str, Path], kind: str
) -> None:
    with started(models[kind], "--name", "mine") as (process, url):
        assert json.loads(ask(url + "/v1/models")[1])["data"][0]["id"] == "mine"
        body = {"prompt": PROMPT, "max_tokens": 250, "stream": True, "temperature": 2}
        with urllib.request.urlopen(url + "/v1/completions", json.dumps(body).encode(), timeout=60) as reply:
            reply.readline()
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - begin < 10


def test_a_gguf_file_is_served_without_torch_and_transformers(models: dict[str, Path]) -> None:
    pytest.importorskip("xllamacpp")
    program = (
        "import sys, compot_deploy.serving.server\n"
        "from pathlib import Path\n"
        "from compot_deploy.serving.engines import open_model\n"
        f"open_model(Path({str(models['gguf'])!r})).engine.close()\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
