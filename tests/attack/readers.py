"""Readers of everything that somebody else may have written, each with a sound input and a way to spoil it.

A reader gets a folder in which one file is other than it was, and does with it what the commands do: it reads the whole
of it, and computes nothing.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mutants
import tiny
import torch

from compot_deploy import deploy
from compot_deploy.accuracy.pairs import read_pairs
from compot_deploy.accuracy.runners import RUNNERS
from compot_deploy.core.matrix import Dense
from compot_deploy.core.store import load_matrices, save_matrices
from compot_deploy.core.work_files import is_sound, read_value, write_value
from compot_deploy.errors import InputError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import digest
from compot_deploy.exporters.manifest import MANIFEST, Manifest, read_manifest
from compot_deploy.llama.model import LlamaModel
from compot_deploy.models.generation import end_tokens, read_generation
from compot_deploy.models.source import open_source
from compot_deploy.models.tasks import GENERATION
from compot_deploy.models.text_files import read_text_file
from compot_deploy.models.tokens import load_tokenizer
from compot_deploy.pipeline.evaluation import REFERENCE, REPORT, notes_of, sizes_of
from compot_deploy.pipeline.integrity import unlisted
from compot_deploy.pipeline.reference import read_reference
from compot_deploy.pipeline.texts import EVALUATION, read_evaluation
from compot_deploy.recipe import Recipe, recipe_from_mapping, recipe_from_toml, recipe_to_toml
from compot_deploy.report.gate import GateRequirements, read_baseline, read_gate
from compot_deploy.report.html.page import to_html
from compot_deploy.report.json import to_json
from compot_deploy.report.junit import to_junit
from compot_deploy.report.manifest import frontier_of, layers_of, origin_of
from compot_deploy.report.model_card import model_card
from compot_deploy.report.summary import to_summary
from compot_deploy.serving.request import RequestError, read_request

GATE: Final = """max_perplexity_ratio = 1.5
max_kl = 0.5
max_export_nmse = 1e-6
max_bytes = "1.5MB"
[regression]
kl = "10%"
bytes = "2%"
"""

LINES: Final = """{"text": "the fox"}
{"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "reads"}], "tools": [{"a": 1}]}
{"conversations": [{"from": "human", "value": "the dog"}]}
"""

REQUEST: Final = {
    "model": "it", "messages": [{"role": "user", "content": [{"type": "text", "text": "the"}]}], "max_tokens": 4,
    "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["a", "b"], "stream": True, "logprobs": True,
    "top_logprobs": 2, "stream_options": {"include_usage": True}, "response_format": {"type": "text"}, "n": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """One kind of input.

    Attributes:
        folder: of the sound inputs, below the root; the reader gets a copy of it.
        file: in it, that is spoilt.
        mutate: spoils it.
        read: the reader.
        share: of all inputs that are tried.
        may_die: what its process does is watched by another in the commands as well.
    """

    folder: str
    file: str
    mutate: mutants.Mutator
    read: Callable[[Path], Any]
    share: float = 1.0
    may_die: bool = False


def prepare_inputs(root: Path) -> None:
    """Sound inputs that users bring: a model in one part and in several, and small files."""
    model = tiny.save(root / "model", num_hidden_layers=1)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    shutil.copytree(model, root / "sharded")
    names = open_source(model).tensors
    (root / "sharded" / "model.safetensors").rename(root / "sharded" / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (root / "sharded" / "model.safetensors.index.json").write_text(index)
    small = root / "small"
    small.mkdir()
    matrices = {"a.weight": Dense(torch.ones(4, 3)), "b.weight": Dense(torch.zeros(2, 2))}
    save_matrices(small / "block-0.safetensors", matrices)
    write_value(small / "value.json", {"a": [1, 2.5, "x"], "b": None})
    (small / "recipe.toml").write_text(recipe_to_toml(Recipe(model="m", calibration="text.txt", max_kl=0.1)))
    (small / "gate.toml").write_text(GATE)
    (small / "records.jsonl").write_text(LINES)
    (small / "records.json").write_text(json.dumps([json.loads(line) for line in LINES.splitlines()]))
    pairs = [{"sentence1": f'a "{n}', "sentence2": f"b, {n}", "score": n / 2} for n in range(12)]
    (small / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (small / "pairs.csv").write_text(
        "sentence1,sentence2,score\n" + "".join(f'"a ""{n}",b,{n}\n' for n in range(12))
    )
    (small / "request.json").write_text(json.dumps(REQUEST))
    text = {key: value for key, value in REQUEST.items() if key not in ("messages", "top_logprobs")}
    (small / "text.json").write_text(json.dumps({**text, "prompt": "the", "logprobs": 2, "best_of": 1}))


INPUTS: Final = ("model", "sharded", "small")
"""Folders of `prepare_inputs`; the others are those of exports, which take longer."""


def prepare(root: Path) -> None:
    """Sound inputs of every kind."""
    prepare_inputs(root)
    model = root / "model"
    deploy(
        str(model),
        format=("onnx", "gguf", "huggingface"),
        method="compot",
        allocation="uniform",
        rounds=2,
        gguf_layout="factorized",
        samples=2,
        length=32,
        evaluation_tokens=256,
        max_perplexity_ratio=1e9,
        out=str(root),
        force=True,
    )
    deploy(
        str(model),
        format="gguf",
        method="plain",
        samples=2,
        length=32,
        evaluation_tokens=256,
        max_perplexity_ratio=1e9,
        out=str(root / "dense"),
    )
    kept = root / "kept"
    kept.mkdir()
    shutil.copyfile(root / "onnx" / REFERENCE, kept / "kept.safetensors")
    shutil.copyfile(root / "onnx" / REPORT, kept / "report.json")


# --- what the commands do with a file


def _source(folder: Path) -> None:
    source = open_source(folder, ask_hub=False)
    assert source.layers >= 0 and source.context and source.vocabulary
    for name in source.tensors:
        source.tensors[name].float()


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the quick fox\n  é😀")
    tokenizer.decode(ids)
    tokenizer.whole("the dog", 8)


def _generation(folder: Path) -> None:
    end_tokens(read_generation(folder), {"eos_token_id": 2})


def _exported(kind: str) -> Callable[[Path], None]:
    exporter = EXPORTERS[kind]

    def read(folder: Path) -> None:
        model = exporter.read_model(folder)
        for name in model.matrices:
            digest(model.matrices[name])
        for name in model.tensors:
            model.tensors[name].float()
        exporter.lint(folder)

    return read


def _session(folder: Path) -> None:
    for _ in RUNNERS["onnx"](folder).logits(torch.tensor([[1, 5, 6, 7]]), 4):
        pass


def _llama(folder: Path) -> None:
    with LlamaModel(next(folder.glob("*.gguf")), threads=1) as model:
        model.logits([1, 5, 6])


def _manifest(folder: Path) -> None:
    manifest: Manifest = read_manifest(folder)
    unlisted(folder, manifest)
    if manifest.exporter not in EXPORTERS:
        raise InputError("as the commands say")
    recipe_from_mapping(manifest.recipe, origin="a manifest")
    layers_of(manifest), sizes_of(manifest), frontier_of(manifest), origin_of(manifest), notes_of(manifest)


def _report(path: Path) -> None:
    report = read_baseline(path)
    requirements = GateRequirements(baseline=report)
    to_html(report), to_junit(report), to_json(report), to_summary(report, requirements)
    requirements.apply(report)


def _card(folder: Path) -> None:
    model_card(read_baseline(folder), read_manifest(folder))


def _work(path: Path) -> None:
    if is_sound(path):
        load_matrices(path) if path.suffix == ".safetensors" else read_value(path)


def _evaluation(folder: Path) -> None:
    read_evaluation(folder, load_tokenizer(folder), json.loads((folder / "config.json").read_text()))


def _request(chat: bool) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        try:
            read_request(path.read_bytes(), chat, "it")
        except RequestError as error:
            json.dumps(error.body())
            raise InputError(str(error)) from None

    return read


def _within(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: read(folder / name)


READERS: Final[Mapping[str, Reader]] = {
    "config": Reader("model", "config.json", mutants.some_json, _source, 1.0),
    "generation settings": Reader("model", "generation_config.json", mutants.some_json, _generation, 1.0),
    "tokenizer": Reader("model", "tokenizer.json", mutants.some_json, _tokenizer, 1.0),
    "tokenizer settings": Reader("model", "tokenizer_config.json", mutants.some_json, _tokenizer, 0.5),
    "safetensors": Reader("model", "model.safetensors", mutants.safetensors, _source, 1.0),
    "safetensors index": Reader("sharded", "model.safetensors.index.json", mutants.some_json, _source, 0.5),
    "ONNX graph": Reader("onnx", "onnx/model.onnx", mutants.graph, _exported("onnx"), 1.0),
    "ONNX folder's config": Reader("onnx", "config.json", mutants.some_json, _exported("onnx"), 0.5),
    "ONNX in its runtime": Reader("onnx", "onnx/model.onnx", mutants.graph, _session, 0.3),
    "GGUF, factors": Reader("gguf", "model.gguf", mutants.gguf, _exported("gguf"), 1.5),
    "GGUF, dense": Reader("dense", "model.gguf", mutants.gguf, _exported("gguf"), 1.5),
    "GGUF in llama.cpp": Reader("gguf", "model.gguf", mutants.gguf, _llama, 0.5, may_die=True),
    "dense GGUF in llama.cpp": Reader("dense", "model.gguf", mutants.gguf, _llama, 0.5, may_die=True),
    "Hugging Face tensors": Reader(
        "huggingface", "model.safetensors", mutants.safetensors, _exported("huggingface"), 1.0
    ),
    "Hugging Face config": Reader(
        "huggingface", "config.json", mutants.some_json, _exported("huggingface"), 1.0
    ),
    "manifest": Reader("onnx", MANIFEST, mutants.some_json, _manifest, 2.0),
    "manifest and card": Reader("onnx", MANIFEST, mutants.some_json, _card, 0.5),
    "report": Reader("kept", "report.json", mutants.some_json, _within("report.json", _report), 0.5),
    "report and card": Reader("onnx", REPORT, mutants.some_json, _card, 0.5),
    "recipe": Reader(
        "small",
        "recipe.toml",
        mutants.some_toml,
        _within("recipe.toml", lambda path: recipe_to_toml(recipe_from_toml(path))),
        2.0,
    ),
    "gate": Reader("small", "gate.toml", mutants.some_toml, _within("gate.toml", read_gate), 2.0),
    "matrices of a work folder": Reader(
        "small", "block-0.safetensors", mutants.safetensors, _within("block-0.safetensors", _work), 1.0
    ),
    "values of a work folder": Reader(
        "small", "value.json", mutants.some_json, _within("value.json", _work), 1.0
    ),
    "reference": Reader(
        "kept",
        "kept.safetensors",
        mutants.safetensors,
        _within("kept.safetensors", lambda path: read_reference(path, GENERATION)),
        1.5,
    ),
    "evaluation text": Reader("onnx", EVALUATION, mutants.some_json, _evaluation, 0.5),
    "JSON lines": Reader(
        "small", "records.jsonl", mutants.json_lines, _within("records.jsonl", read_text_file), 2.0
    ),
    "pairs, lines": Reader(
        "small", "pairs.jsonl", mutants.json_lines, _within("pairs.jsonl", read_pairs), 0.5
    ),
    "pairs, table": Reader("small", "pairs.csv", mutants.some_bytes, _within("pairs.csv", read_pairs), 0.5),
    "records": Reader(
        "small", "records.json", mutants.some_json, _within("records.json", read_text_file), 1.0
    ),
    "request of a conversation": Reader(
        "small", "request.json", mutants.some_json, _within("request.json", _request(True)), 2.0
    ),
    "request of a text": Reader(
        "small", "text.json", mutants.some_json, _within("text.json", _request(False)), 1.0
    ),
}


def mutant(reader: str, data: bytes, seed: int, number: int) -> bytes:
    """The spoilt bytes of one input; the same numbers give the same bytes."""
    return READERS[reader].mutate(data, random.Random(f"{seed}/{reader}/{number}"))
