"""Ways to spoil an exported folder, as a mistake or an enemy would; each must fail, with and without the original.

    python tests/attack/spoils.py

Most of them write every hash anew afterwards, those of files and those of matrices: whoever can change a folder can do
that. The folder is of the model that ships, int8 in ONNX; what is called original is a copy of that model. Whoever
checks asks for a KL divergence of at most 0.01, forty times that of the sound export, but for the spoils that are about
limits of the folder's own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import onnx
import torch
from onnx.external_data_helper import load_external_data_for_tensor
from signing import manifest_of, sign_again, write_manifest
from torch import Tensor

from compot_deploy import check, deploy
from compot_deploy.core.matrix import Matrix, Quantized
from compot_deploy.embedded import MODEL
from compot_deploy.errors import CompotDeployError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.pipeline.evaluation import REFERENCE

GRAPH: Final = "onnx/model.onnx"
DATA: Final = "onnx/model.onnx_data"
BLOCK: Final = "model.layers.{}."

Spoil = Callable[[Path], None]
SPOILS: Final[dict[str, Spoil]] = {}
"""What is wrong with the folder afterwards, and what makes it so."""

STRICT: Final[set[str]] = set()
"""Of these, the ones that fail with --strict."""

OWN_LIMITS: Final[set[str]] = set()
"""Of these, the ones that must fail though whoever checks asks for nothing."""

LIMITS: Final = {"max_kl": 0.01}


def spoil(what: str, *, strict: bool = False, own_limits: bool = False) -> Callable[[Spoil], Spoil]:
    """Take a function into `SPOILS`."""

    def take(function: Spoil) -> Spoil:
        SPOILS[what] = function
        if strict:
            STRICT.add(what)
        if own_limits:
            OWN_LIMITS.add(what)
        return function

    return take


# --- tools of an enemy


def rewrite(folder: Path, change: Callable[[CompressedModel], CompressedModel]) -> None:
    """Write the files again of another model, and sign."""
    exporter = EXPORTERS["onnx"]
    model = exporter.read_model(folder)
    held = {name: model.matrices[name] for name in model.matrices}
    changed = change(replace(model, matrices=held, tensors={k: v.clone() for k, v in model.tensors.items()}))
    with tempfile.TemporaryDirectory() as scratch:
        exporter.write(changed, Path(scratch), exporter.options(manifest_of(folder)["recipe"]))
        for name in (GRAPH, DATA):
            shutil.copyfile(Path(scratch) / name, folder / name)
    sign_again(folder)


def with_matrices(change: Callable[[str, Matrix], Matrix]) -> Callable[[CompressedModel], CompressedModel]:
    return lambda model: replace(
        model, matrices={name: change(name, matrix) for name, matrix in model.matrices.items()}
    )


def scaled(matrix: Matrix, factor: float) -> Matrix:
    assert isinstance(matrix, Quantized)
    return Quantized(matrix.integers, (matrix.scales.float() * factor).half(), matrix.grid)


def with_rows(matrix: Matrix, order: Tensor) -> Matrix:
    """Outputs in another order."""
    assert isinstance(matrix, Quantized)
    return Quantized(
        matrix.integers[:, order].contiguous(), matrix.scales[:, order].contiguous(), matrix.grid
    )


def edit_json(
    folder: Path, name: str, change: Callable[[dict[str, Any]], None], *, sign: bool = True
) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    if sign:
        sign_again(folder)


def edit_constants(folder: Path, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    """Change float tensors of the graph in place."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    data = bytearray((folder / DATA).read_bytes())
    for tensor in model.graph.initializer:
        if tensor.name in names:
            place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
            load_external_data_for_tensor(tensor, str(folder / "onnx"))
            values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            changed = change(values).contiguous().numpy().tobytes()
            data[place["offset"] : place["offset"] + len(changed)] = changed
    (folder / DATA).write_bytes(data)
    sign_again(folder)


def shuffled(length: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))


# --- wrong numbers, everything signed anew


@spoil("all weights are zero", own_limits=True)
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, matrix: scaled(matrix, 0.0)))


@spoil("the embedding is zero")
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, m: scaled(m, 0.0) if "embed" in name else m))


@spoil("every row of the embedding is the same", own_limits=True)
def _(folder: Path) -> None:
    rewrite(
        folder,
        with_matrices(lambda name, m: with_rows(m, torch.zeros(m.shape[1]).long()) if "embed" in name else m),
    )


@spoil("the rows of the embedding have changed places")
def _(folder: Path) -> None:
    rewrite(
        folder, with_matrices(lambda name, m: with_rows(m, shuffled(m.shape[1])) if "embed" in name else m)
    )


@spoil("two matrices of equal shape have changed places")
def _(folder: Path) -> None:
    first, second = "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"

    def swap(model: CompressedModel) -> CompressedModel:
        held = dict(model.matrices)
        return replace(model, matrices={**held, first: held[second], second: held[first]})

    rewrite(folder, swap)


@spoil("gate and up of every block have changed places")
def _(folder: Path) -> None:
    def swap(model: CompressedModel) -> CompressedModel:
        held = dict(model.matrices)
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return replace(
            model,
            matrices={
                name: held[name.rpartition(".")[0] + "." + other.get(name.rpartition(".")[2], "")]
                if name.rpartition(".")[2] in other
                else matrix
                for name, matrix in held.items()
            },
        )

    rewrite(folder, swap)


@spoil("two blocks have changed places")
def _(folder: Path) -> None:
    def other(name: str) -> str:
        for one, two in ((0, 3), (3, 0)):
            if name.startswith(BLOCK.format(one)):
                return BLOCK.format(two) + name.removeprefix(BLOCK.format(one))
        return name

    rewrite(
        folder,
        lambda model: replace(
            model,
            matrices={name: model.matrices[other(name)] for name in model.matrices},
            tensors={name: model.tensors[other(name)] for name in model.tensors},
        ),
    )


@spoil("a matrix is eight times as large")
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, m: scaled(m, 8.0) if name.endswith("0.mlp.down_proj") else m))


@spoil("the signs of all output projections are turned")
def _(folder: Path) -> None:
    rewrite(folder, with_matrices(lambda name, m: scaled(m, -1.0) if name.endswith("o_proj") else m))


@spoil("the outputs of one matrix have changed places")
def _(folder: Path) -> None:
    rewrite(
        folder,
        with_matrices(
            lambda name, m: with_rows(m, shuffled(m.shape[1])) if name.endswith("3.mlp.down_proj") else m
        ),
    )


@spoil("square matrices lie transposed")
def _(folder: Path) -> None:
    def transposed(name: str, matrix: Matrix) -> Matrix:
        if not isinstance(matrix, Quantized) or matrix.shape[0] != matrix.shape[1]:
            return matrix
        from compot_deploy.quant import rtn

        return rtn(matrix.dequantize().T.contiguous(), None, matrix.grid)

    rewrite(folder, with_matrices(transposed))


@spoil("one block is noise")
def _(folder: Path) -> None:
    def noise(name: str, matrix: Matrix) -> Matrix:
        if not isinstance(matrix, Quantized) or not name.startswith(BLOCK.format(1)):
            return matrix
        generator = torch.Generator().manual_seed(0)
        integers = torch.randint(-128, 128, matrix.shape, dtype=torch.int8, generator=generator)
        return Quantized(integers, matrix.scales, matrix.grid)

    rewrite(folder, with_matrices(noise))


@spoil("a norm is zero")
def _(folder: Path) -> None:
    rewrite(folder, lambda model: replace(model, tensors=_tensors(model, "layers.0.input", lambda v: 0 * v)))


@spoil("the last norm is zero: the logits are constant", own_limits=True)
def _(folder: Path) -> None:
    rewrite(folder, lambda model: replace(model, tensors=_tensors(model, "model.norm", lambda v: 0 * v)))


@spoil("a norm holds NaN")
def _(folder: Path) -> None:
    rewrite(
        folder,
        lambda model: replace(model, tensors=_tensors(model, "layers.2.post", lambda v: v + float("nan"))),
    )


@spoil("a scale is infinite")
def _(folder: Path) -> None:
    def infinite(name: str, matrix: Matrix) -> Matrix:
        assert isinstance(matrix, Quantized)
        if not name.endswith("1.self_attn.q_proj"):
            return matrix
        scales = matrix.scales.clone()
        scales[0, 0] = float("inf")
        return Quantized(matrix.integers, scales, matrix.grid)

    rewrite(folder, with_matrices(infinite))


def _tensors(model: CompressedModel, part: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(value) if part in name else value for name, value in model.tensors.items()}


# --- a graph that computes something else


@spoil("rotations are wrong behind position 300, where no window reaches")
def _(folder: Path) -> None:
    def wrong(values: Tensor) -> Tensor:
        values[300:] = values[300:].flip(-1)
        return values

    edit_constants(folder, ("rotary.cosine", "rotary.sine"), wrong)


@spoil("rotations are NaN behind position 400")
def _(folder: Path) -> None:
    def wrong(values: Tensor) -> Tensor:
        values[400:] = float("nan")
        return values

    edit_constants(folder, ("rotary.cosine",), wrong)


@spoil("no position is rotated")
def _(folder: Path) -> None:
    edit_constants(folder, ("rotary.sine",), lambda values: 0 * values)


@spoil("attention is six times as sharp")
def _(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept = [attribute for attribute in node.attribute if attribute.name != "scale"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("scale", 1.0)])
    (folder / GRAPH).write_bytes(model.SerializeToString())
    sign_again(folder)


@spoil("a block of the graph reads the weights of another")
def _(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    (node,) = [node for node in model.graph.node if node.name == "/model/layers.1/mlp/down_proj/MatMul"]
    node.input[1] = "model.layers.2.mlp.down_proj.weight.integers"
    (folder / GRAPH).write_bytes(model.SerializeToString())
    sign_again(folder)


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


# --- the attack


def prepare(root: Path) -> Path:
    """The original, an export of it, and the reference file, kept elsewhere."""
    shutil.copytree(MODEL, root / "original")
    (made,) = deploy(
        str(root / "original"),
        method="plain",
        quant="int8",
        samples=4,
        length=64,
        evaluation_tokens=256,
        out=str(root / "out"),
    )
    assert made.passed
    shutil.copyfile(root / "out" / REFERENCE, root / "kept.safetensors")
    return root


def references(root: Path) -> dict[str, str]:
    """With the original, and without it."""
    return {"original": str(root / "original"), "reference file": str(root / "kept.safetensors")}


def fooled(root: Path, what: str, number: int) -> Iterator[str]:
    """Spoil a copy, and tell in which way the check was fooled; nothing if it was not."""
    place = root / f"spoilt-{number}"
    place.mkdir()
    folder = place / "out"
    shutil.copytree(root / "out", folder)
    SPOILS[what](folder)
    for how, reference in references(root).items():
        try:
            limits = {} if what in OWN_LIMITS else LIMITS
            found = check(folder, reference=reference, limits=limits, strict=what in STRICT)
        except CompotDeployError:
            continue
        except Exception as error:
            yield f"{what}: a traceback with the {how}: {type(error).__name__}: {error}"
            continue
        if found.passed:
            yield f"{what}: passes with the {how}"
    shutil.rmtree(place)


def main() -> int:
    """All of them."""
    torch.set_num_threads(1)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = prepare(Path(scratch))
        for reference in references(root).values():
            assert check(root / "out", reference=reference, limits=LIMITS, strict=True).passed
        for number, what in enumerate(SPOILS):
            began = time.process_time()
            found = list(fooled(root, what, number))
            wrong += found
            sys.stdout.write(f"{time.process_time() - began:5.1f} s  {'; '.join(found) or what}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(SPOILS)} ways, {len(wrong)} of {2 * len(SPOILS)} checks fooled\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
