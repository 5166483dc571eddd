"""Whatever is wrong with what somebody gives, the answer is one sentence and exit code 2 or 3, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from compot_deploy.cli import main
from compot_deploy.models.streaming import BlockStream

DEEP, LONG = "[" * 100_000, "9" * 5000
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=1)


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and a conversation in it; whoever begins to work fails."""

    def worked(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(BlockStream, "__init__", worked)
    (tmp_path / "model").mkdir()
    for path in original.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "text.txt").write_text(tiny.WORDS * 20)
    chat = {"messages": [{"role": "user", "content": "the fox"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**changes: Any) -> Change:
    def change(place: Path) -> None:
        path = place / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def file(name: str, text: str) -> Change:
    def change(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")

    return change


def cast(name: str, kind: torch.dtype) -> Change:
    def change(place: Path) -> None:
        path = place / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors[name] = tensors[name].to(kind)
        save_file(tensors, path, {"format": "pt"})

    return change


def template(text: str) -> Change:
    return file("model/chat_template.jinja", text)


def index(weight_map: Any) -> Change:
    def change(place: Path) -> None:
        (place / "model" / "model.safetensors").rename(place / "model" / "part.safetensors")
        text = json.dumps({"weight_map": weight_map})
        (place / "model" / "model.safetensors.index.json").write_text(text)

    return change


def nothing(place: Path) -> None:
    """The input is good; the options are not."""


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MATRIX = "model.layers.0.mlp.up_proj.weight"

CASES: dict[str, tuple[Change, list[str], int, str]] = {
    "config, deep": (file("model/config.json", DEEP), [], 2, "nested too deeply"),
    "config, long": (file("model/config.json", f'{{"vocab_size": {LONG}}}'), [], 2, "thousands of digits"),
    "config, a mark": (file("model/config.json", "\ufeff{"), [], 2, "config.json"),
    "config, half a pair": (config(name="\ud800"), [], 2, "half of a UTF-16 pair"),
    "generation, deep": (file("model/generation_config.json", DEEP), [], 2, "generation_config.json"),
    "tokenizer, deep": (file("model/tokenizer.json", DEEP), [], 2, "no tokenizer that can be read"),
    "tokenizer settings, deep": (file("model/tokenizer_config.json", DEEP), [], 2, "no tokenizer"),
    "index, deep": (
        lambda place: (index(None)(place), file("model/model.safetensors.index.json", DEEP)(place)),
        [],
        2,
        "nested too deeply",
    ),
    "index, null": (index(None), [], 2, "no weight_map"),
    "index, outside": (index({MATRIX: "../model.safetensors"}), [], 2, "not the plain name"),
    "recipe, deep": (file("r.toml", "a = " + DEEP), ["--recipe", "r.toml"], 2, "r.toml"),
    "recipe, long": (file("r.toml", f"seed = {LONG}"), ["--recipe", "r.toml"], 2, "r.toml"),
    "text, deep": (file("a.jsonl", DEEP), ["--calibration", "a.jsonl"], 2, "nested too deeply"),
    "text, half a pair": (file("a.jsonl", '{"text": "\\ud800"}'), ["--calibration", "a.jsonl"], 2, "UTF-16"),
    "template, refusing": (
        template("{{ raise_exception('no') }}"),
        ["--calibration", "chat.jsonl"],
        2,
        "no.",
    ),
    "template, broken": (template("{% for"), ["--calibration", "chat.jsonl"], 2, "line 1"),
    "template, none": (nothing, ["--calibration", "chat.jsonl"], 2, "no chat template"),
    "head_dim": (config(head_dim=0), [], 2, "head_dim is 0"),
    "rope": (config(rope_parameters="fast"), [], 2, "rope_parameters is 'fast'"),
    "context of 0": (config(max_position_embeddings=0), [], 2, "max_position_embeddings is 0"),
    "context of -1": (config(max_position_embeddings=-1), [], 2, "max_position_embeddings is -1"),
    "context of 1e15": (config(max_position_embeddings=10**15), [], 2, "max_position_embeddings"),
    "layers": (config(num_hidden_layers=10**9), [], 2, "num_hidden_layers"),
    "dtype": (config(dtype=5), [], 2, "dtype is 5"),
    "unknown type": (config(model_type="nobody"), [], 3, "model type 'nobody'"),
    "a norm's shape": (
        lambda place: cast("model.norm.weight", torch.int8)(place),
        [],
        3,
        "model.norm.weight is of the type I8",
    ),
    "float8": (cast(MATRIX, torch.float8_e5m2), [], 3, "F8_E5M2"),
    "complex": (cast(MATRIX, torch.complex64), [], 3, "C64"),
    "seed": (nothing, ["--seed", str(2**64)], 2, "--seed"),
    "seed below zero": (nothing, ["--seed", "-1"], 2, "--seed"),
    "device": (nothing, ["--device", "meta"], 2, "--device meta"),
    "a long name": (nothing, ["--out", "n" * 250], 2, "--out"),
    "a name beyond all": (nothing, ["--out", "n" * 5000], 2, "--out"),
    "a limit of inf": (nothing, ["--max-kl", "inf"], 2, "--max-kl inf"),
    "a limit of NaN": (nothing, ["--max-kl", "nan"], 2, "--max-kl nan"),
    "a ratio of atoms": (nothing, ["--atoms-per-nonzero", "inf"], 2, "--atoms-per-nonzero"),
    "samples": (nothing, ["--samples", "9" * 30], 2, "--samples"),
    "a type of GGUF's": (
        file("r.toml", 'gguf_type = "EVIL"'),
        ["--recipe", "r.toml", "--format", "gguf"],
        2,
        "'EVIL'",
    ),
    "a size beyond all": (nothing, ["--size", "9" * 400], 2, "--size"),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_input_is_refused_in_one_sentence_before_any_work(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, flags, code, words = CASES[case]
    change(place)
    before = sorted(place.rglob("*"))
    text = [] if "--calibration" in flags else ["--calibration", "text.txt"]
    command = ["model", *text, "--length", "16", "--samples", "2", "--evaluation-tokens", "32", *flags]
    out = [] if "--out" in flags else ["--out", "out"]
    assert main([*command, *out]) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    sentence = [line for line in said.splitlines() if line.startswith("compot-deploy:")]
    assert len(sentence) == 1 and len(sentence[0]) < 1200
    assert sorted(place.rglob("*")) == before  # nothing is left behind


def manifest(**changes: Any) -> str:
    values = {
        "format": 1, "exporter": "onnx", "package": "0", "model_type": "llama", "tied": False, "recipe": {},
        "calibration": None, "seed": None, "facts": {}, "versions": {}, "matrices": [], "files": [],
    }  # fmt: skip
    return json.dumps(values | changes)


UNKNOWN = file("out/config.json", '{"model_type": "nobody", "architectures": ["NobodyForCausalLM"]}')
GRAPH = file("out/onnx/model.onnx", "")


@pytest.mark.parametrize(
    ("changes", "command", "code", "words"),
    [
        ([file("out/compot/manifest.json", DEEP)], ["check", "out"], 2, "nested too deeply"),
        ([file("out/compot/manifest.json", f'{{"seed": {LONG}}}')], ["inspect", "out"], 2, "thousands"),
        ([file("out/compot/manifest.json", "[]")], ["report", "out"], 2, "manifest.json"),
        ([file("out/compot/manifest.json", manifest()), file("out/compot/report.json", DEEP)],
         ["report", "out"], 2, "nested too deeply"),
        ([file("out/compot/manifest.json", manifest(recipe={"seed": 2**70}))], ["check", "out"], 2, "seed"),
        ([file("g.toml", "max_kl = inf"), file("out/compot/manifest.json", manifest())],
         ["check", "out", "--gate", "g.toml"], 2, "max_kl = inf"),
        ([file("g.toml", "max_kl = " + DEEP)], ["check", "out", "--gate", "g.toml"], 2, "nested too deeply"),
        ([file("g.toml", "max_kl = " + LONG)], ["check", "out", "--gate", "g.toml"], 2, "g.toml"),
        ([file("b.json", DEEP)], ["check", "out", "--baseline", "b.json"], 2, "nested too deeply"),
        ([file("out/compot/manifest.json", manifest(exporter="gguf")), UNKNOWN], ["check", "out"], 3, "'nobody'"),
        ([file("out/compot/manifest.json", manifest(exporter="huggingface")), UNKNOWN], ["check", "out"], 2, "type"),
        ([UNKNOWN, GRAPH], ["run", "out", "-p", "the"], 3, "'nobody'"),
        ([file("out/config.json", DEEP), GRAPH], ["run", "out", "-p", "the"], 2, "nested too deeply"),
        ([file("out/m.gguf", "GGUF")], ["run", "out", "-p", "the"], 2, "4 bytes are too few"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else None,
)  # fmt: skip
def test_hostile_folders_are_refused_in_one_sentence(
    changes: list[Change], command: list[str], code: int, words: str, place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for change in changes:
        change(place)
    assert main(command) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and len(said) < 1200
