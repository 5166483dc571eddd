"""What is in a folder: its matrices described, its files listed and compared with the list.

Every exporter's folder has a manifest, see `compot_deploy.exporters.manifest`; here it is made of a model and
the files, and held against them. It holds no time and no path of the machine that wrote it: the same run writes
the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from compot_deploy import __version__
from compot_deploy.core.disk import disk_errors
from compot_deploy.core.grid import DENSE, Grid
from compot_deploy.core.json_files import as_object
from compot_deploy.core.matrix import Factorized, Leaf, Matrix, Quantized, leaves
from compot_deploy.core.storage import Storage, matrix_bytes
from compot_deploy.errors import ArtifactError
from compot_deploy.exporters.manifest import (
    MANIFEST,
    MANIFEST_FORMAT,
    SIGNATURE,
    FactorPairRecord,
    FileRecord,
    LeafRecord,
    Manifest,
    MatrixRecord,
    check_path,
    read_manifest,
    role_by_name,
)
from compot_deploy.models.compressed import CompressedModel

PLAIN_INT4: Final = Grid(bits=4, group=32)
"""What every size is compared with: the same matrix in plain 4-bit integers, groups of 32."""

_LIBRARIES: Final = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "onnx",
    "gguf",
    "onnxruntime",
    "onnxruntime-gpu",
    "xllamacpp",
    "bitsandbytes",
)


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from.

    Attributes:
        recipe: every option of the run, as JSON values.
        calibration: sha256 of the calibration tokens, or None if there were none.
        seed: of the run.
        why_dense: module path to the reason why it was not factorized.
        metadata: whatever else the run recorded and a reader should know, by name.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    seed: int | None = None
    why_dense: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def digest(matrix: Matrix) -> str:
    """sha256 of a matrix's exact numbers: structure, shapes, grids, integers, scales, floats as float32.

    It does not depend on the file format, nor on whether floats are kept in 16 or 32 bits: two matrices have
    the same digest if and only if they compute the same thing from the same numbers.
    """
    hasher = hashlib.sha256()
    for leaf in leaves(matrix):
        if isinstance(leaf, Quantized):
            hasher.update(f"{leaf.shape} {leaf.grid};".encode())
            _update(hasher, leaf.integers)
            _update(hasher, leaf.scales)
        else:
            hasher.update(f"{leaf.shape} float;".encode())
            _update(hasher, leaf.weight.float())
    return hasher.hexdigest()


def _update(hasher: Any, tensor: Tensor) -> None:
    if tensor.is_meta:
        return  # a stand-in, which has a size and no values
    # As bytes: numpy does not know every type, bfloat16 for one, that a file may hold.
    hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def describe_matrices(
    matrices: Mapping[str, Matrix],
    storage: Storage,
    why_dense: Mapping[str, str] | None = None,
    role: Callable[[str], str] = role_by_name,
) -> tuple[MatrixRecord, ...]:
    """Records of all matrices, read one at a time.

    Args:
        matrices: by module path, perhaps lazily read.
        storage: what the format needs for a leaf.
        why_dense: module path to the reason why it was not factorized.
        role: of a matrix, by module path.
    """
    reasons = why_dense or {}
    total = matrix_bytes(matrices, storage)
    records = []
    for name, matrix in matrices.items():
        plain: LeafRecord | None = None
        pairs: tuple[FactorPairRecord, ...] = ()
        if isinstance(matrix, Factorized):
            kind = "factorized"
            pairs = tuple(
                FactorPairRecord(
                    atoms=pair.atoms,
                    pattern=str(pair.pattern),
                    dictionary_name=pair.dictionary_name,
                    dictionary=_describe_leaf(
                        pair.dictionary, storage.leaf_bytes(*pair.dictionary.shape, _grid(pair.dictionary))
                    ),
                    codes=_describe_leaf(
                        pair.codes, storage.leaf_bytes(*pair.codes.shape, _grid(pair.codes), pair.pattern)
                    ),
                )
                for pair in matrix.pairs
            )
        else:
            kind = "quantized" if isinstance(matrix, Quantized) else "dense"
            plain = _describe_leaf(matrix, storage.leaf_bytes(*matrix.shape, _grid(matrix), DENSE))
        records.append(
            MatrixRecord(
                name=name,
                kind=kind,
                inputs=matrix.shape[0],
                outputs=matrix.shape[1],
                bytes=total[name],
                plain_int4_bytes=storage.leaf_bytes(*matrix.shape, PLAIN_INT4),
                digest=digest(matrix),
                plain=plain,
                pairs=pairs,
                why_dense=reasons.get(name),
                role=role(name),
            )
        )
    return tuple(records)


def _grid(leaf: Leaf) -> Grid | None:
    return leaf.grid if isinstance(leaf, Quantized) else None


def _describe_leaf(leaf: Leaf, size: int) -> LeafRecord:
    inputs, outputs = leaf.shape
    grid = _grid(leaf)
    values = leaf.integers if isinstance(leaf, Quantized) else leaf.weight
    return LeafRecord(
        inputs=inputs,
        outputs=outputs,
        bits=grid.bits if grid else size * 8 // (inputs * outputs),
        group=grid.group if grid else None,
        nonzeros=values.numel() if values.is_meta else int(torch.count_nonzero(values)),
        bytes=size,
        codebook=grid.codebook if grid else "integer",
    )


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that can influence an artifact; nothing is imported."""
    versions = {}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def describe(model: CompressedModel, exporter: str, storage: Storage, provenance: Provenance) -> Manifest:
    """The manifest of a model, its files still to be listed: hand it to `write_manifest`."""
    return Manifest(
        format=MANIFEST_FORMAT,
        exporter=exporter,
        package=__version__,
        model_type=model.model_type,
        tied=model.tied,
        recipe=dict(provenance.recipe),
        calibration=provenance.calibration,
        seed=provenance.seed,
        metadata=dict(provenance.metadata),
        versions=library_versions(),
        matrices=describe_matrices(model.matrices, storage, provenance.why_dense, model.role),
        files=(),
    )


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """List every file that lies in `folder` and write the manifest, atomically.

    Returns:
        The manifest as written.
    """
    files = tuple(file_record(folder, path) for path in list_files(folder))
    manifest = dataclasses.replace(manifest, files=files)
    _write(folder, manifest)
    return manifest


def seal(folder: Path, changed: Iterable[str]) -> Manifest:
    """Take files that were added, changed or removed since into the manifest.

    Only the named files are read again: damage to any other file stays visible.

    Args:
        folder: an artifact.
        changed: paths relative to it, such as ``report.json``.

    Returns:
        The manifest as written.
    """
    manifest = read_manifest(folder)
    records = {record.path: record for record in manifest.files}
    for name in changed:
        check_path(name, "the list of changed files")
        if name == MANIFEST:
            raise ValueError("The manifest does not list itself.")
        if (folder / name).is_file():
            records[name] = file_record(folder, name)
        else:
            records.pop(name, None)
    manifest = dataclasses.replace(manifest, files=tuple(records[path] for path in sorted(records)))
    _write(folder, manifest)
    return manifest


def verify(folder: Path) -> Manifest:
    """Compare every file with the manifest: presence, size, sha256.

    Files that the manifest does not list are allowed: see `unlisted_files`.

    Returns:
        The manifest.

    Raises:
        ArtifactError: the first file that differs, named with both numbers, and how many others do.
    """
    manifest = read_manifest(folder)
    root = Path(os.path.realpath(folder))
    complaints = [c for record in manifest.files if (c := _compare(root, record)) is not None]
    if complaints:
        others = f" {len(complaints) - 1} more do not match either." if len(complaints) > 1 else ""
        raise ArtifactError(f"{folder}/{complaints[0]}{others} Export the model again, or copy it again.")
    return manifest


def unlisted_files(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Whatever lies in the folder without being in the manifest, sorted: files of any kind, and links as such."""
    listed = {record.path for record in manifest.files} | {MANIFEST, SIGNATURE}
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        found += [(here / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return tuple(sorted(path for path in found if path not in listed))


def list_files(folder: Path) -> tuple[str, ...]:
    """Every file below `folder` but the manifest and its signature, as relative paths with forward slashes, sorted."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return tuple(sorted(path for path in paths if path not in (MANIFEST, SIGNATURE)))


def file_record(folder: Path, path: str) -> FileRecord:
    """Size and sha256 of one file, read in pieces."""
    hasher, size = hashlib.sha256(), 0
    with (folder / path).open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
            size += len(piece)
    return FileRecord(path=path, bytes=size, sha256=hasher.hexdigest())


def _compare(root: Path, record: FileRecord) -> str | None:
    """What is wrong with a file, or None."""
    path = root / record.path
    if not Path(os.path.realpath(path)).is_relative_to(root):
        return f"{record.path} is a link that leads out of the folder."
    try:
        status = path.stat()
    except OSError:
        return f"{record.path} is missing; the manifest lists it with {record.bytes:,} bytes."
    if not stat.S_ISREG(status.st_mode):
        return f"{record.path} is not a file."
    if status.st_size != record.bytes:
        return f"{record.path} has {status.st_size:,} bytes, and the manifest says {record.bytes:,}."
    try:
        found = file_record(root, record.path)
    except OSError as error:
        return f"{record.path} cannot be read: {error.strerror}."
    if found.sha256 != record.sha256:
        return (
            f"{record.path} is damaged: its sha256 is {found.sha256[:16]}…, "
            f"and the manifest says {record.sha256[:16]}…."
        )
    return None


def _write(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    text = json.dumps(as_object(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            # A file's name may hold bytes that are no UTF-8.
            with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
