"""Wrong settings, folders that tell untruths of themselves, manifests that hide something, and files beside them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from enemy import (
    DATA,
    GRAPH,
    SPOILS,
    edit_json,
    spoil,
)
from signing import manifest_of, sign_again, write_manifest

# --- settings


@spoil("config.json has another base of rotations")
def _(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["rope_theta"] = 500.0
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}

    edit_json(folder, "config.json", change)


@spoil("config.json has another epsilon")
def _(folder: Path) -> None:
    edit_json(folder, "config.json", lambda values: values.update(rms_norm_eps=1.0))


@spoil("config.json has another number of heads")
def _(folder: Path) -> None:
    edit_json(folder, "config.json", lambda values: values.update(num_attention_heads=3, head_dim=64))


@spoil("generation_config.json ends text with another token")
def _(folder: Path) -> None:
    edit_json(folder, "generation_config.json", lambda values: values.update(eos_token_id=77))


@spoil("the tokenizer has a chat template of somebody else")
def _(folder: Path) -> None:
    edit_json(folder, "tokenizer_config.json", lambda values: values.update(chat_template="{{ 'obey: ' }}"))


@spoil("two words of the vocabulary have changed places")
def _(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        words = values["model"]["vocab"]
        words["e"], words["t"] = words["t"], words["e"]

    edit_json(folder, "tokenizer.json", change)


@spoil("the vocabulary is upside down")
def _(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        words = values["model"]["vocab"]
        numbers = sorted(words.values())[3:]
        moved = dict(zip(numbers, reversed(numbers), strict=True))
        values["model"]["vocab"] = {word: moved.get(number, number) for word, number in words.items()}

    edit_json(folder, "tokenizer.json", change)


@spoil("there is no tokenizer")
def _(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    sign_again(folder)


# --- what the folder says of itself, with weights that are wrong


def _swapped(folder: Path) -> None:
    SPOILS["two blocks have changed places"](folder)


@spoil("the folder allows itself everything, and its matrices are wrong", own_limits=True)
def _(folder: Path) -> None:
    _swapped(folder)
    limits = {"max_perplexity_ratio": 1e9, "max_export_nmse": 1e9}
    sign_again(folder, recipe={**manifest_of(folder)["recipe"], **limits})


@spoil("the folder has no limits, and its matrices are wrong", own_limits=True)
def _(folder: Path) -> None:
    _swapped(folder)
    sign_again(folder, recipe={**manifest_of(folder)["recipe"], "max_perplexity_ratio": float("inf")})


@spoil("the evaluation text is two tokens, and the matrices are wrong")
def _(folder: Path) -> None:
    _swapped(folder)
    edit_json(folder, "compot/evaluation.json", lambda values: values.update(windows=[[1, 5]], prompts=[[1]]))
    sign_again(folder, recipe={**manifest_of(folder)["recipe"], "min_positions": 1})


@spoil("the evaluation text is one word, and the matrices are wrong")
def _(folder: Path) -> None:
    _swapped(folder)
    edit_json(folder, "compot/evaluation.json", lambda values: values.update(windows=[[9] * 64] * 8))


@spoil("the report says that it passed, and the matrices are wrong", own_limits=True)
def _(folder: Path) -> None:
    report = (folder / "compot/report.json").read_bytes()
    _swapped(folder)
    (folder / "compot/report.json").write_bytes(report)
    sign_again(folder)


@spoil("it is said to be of another original")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    sign_again(folder, facts={**manifest["facts"], "source": "0" * 64})


# --- manifests that hide something


@spoil("the manifest lists no files")
def _(folder: Path) -> None:
    write_manifest(folder, {**manifest_of(folder), "files": []})


@spoil("the manifest lists no matrices")
def _(folder: Path) -> None:
    write_manifest(folder, {**manifest_of(folder), "matrices": []})


@spoil("the manifest does not list the weights")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    kept = [record for record in manifest["files"] if record["path"] != DATA]
    write_manifest(folder, {**manifest, "files": kept})


@spoil("the manifest does not list the evaluation text")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    kept = [record for record in manifest["files"] if "evaluation" not in record["path"]]
    write_manifest(folder, {**manifest, "files": kept})


@spoil("the manifest describes other numbers than the files hold")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    manifest["matrices"][3]["digest"] = "0" * 64
    write_manifest(folder, manifest)


@spoil("the manifest leaves a matrix out")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    del manifest["matrices"][3]
    write_manifest(folder, manifest)


@spoil("the manifest has a negative size")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    manifest["matrices"][3]["bytes"] = -(10**9)
    write_manifest(folder, manifest)


@spoil("the manifest lists a file twice")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    write_manifest(folder, {**manifest, "files": [*manifest["files"], manifest["files"][0]]})


@spoil("the manifest lists a file outside of the folder")
def _(folder: Path) -> None:
    manifest = manifest_of(folder)
    manifest["files"][0]["path"] = "../original/config.json"
    write_manifest(folder, manifest)


# --- files


@spoil("a bit of the weights is flipped")
def _(folder: Path) -> None:
    data = bytearray((folder / DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / DATA).write_bytes(data)


@spoil("the weights are cut off")
def _(folder: Path) -> None:
    os.truncate(folder / DATA, (folder / DATA).stat().st_size // 2)
    sign_again(folder)


@spoil("the graph is missing")
def _(folder: Path) -> None:
    (folder / GRAPH).unlink()
    sign_again(folder)


@spoil("the weights are a link that leads out of the folder")
def _(folder: Path) -> None:
    outside = folder.parent / "outside"
    shutil.copyfile(folder / DATA, outside)
    (folder / DATA).unlink()
    (folder / DATA).symlink_to(outside)


@spoil("a second set of weights lies there unlisted")
def _(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 64)


@spoil("a pickle lies there unlisted", strict=True)
def _(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@spoil("a program lies there unlisted", strict=True)
def _(folder: Path) -> None:
    (folder / "modeling_llama.py").write_text("import os\n")


@spoil("a link to somewhere lies there unlisted", strict=True)
def _(folder: Path) -> None:
    (folder / "more").symlink_to("/etc")
