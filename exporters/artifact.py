"""Files on disk: a folder that appears whole or not at all, and the manifest that says what is in it.

Two ideas, shared by every exporter:

* **Staging.** Files are written into a hidden sibling of the target and moved there by one rename. Whatever
  stops the run (an error, Ctrl-C, a full disk), the target is as it was before.
* **The manifest**, ``compot/manifest.json``. It names every file with its size and sha256, so damage is
  found before a runtime reads it; every matrix with its form, bits, groups, bytes and a digest of its exact
  numbers; and where it all came from: recipe, calibration text, seed, library versions. It holds no time and
  no path of the machine that wrote it: the same run writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from compot_deploy import __version__
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.weights import (
    DENSE,
    CompressedModel,
    Factorized,
    Grid,
    Leaf,
    Matrix,
    Quantized,
    Storage,
    leaves,
    matrix_bytes,
)

MANIFEST: Final = "compot/manifest.json"
"""Where the manifest lies inside an artifact; the mark by which a folder is known as ours."""

MANIFEST_FORMAT: Final = 1

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

_DISK_ERRORS: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would grow beyond the largest size allowed here",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the path is too long",
}


# --- staging ---------------------------------------------------------------------------------------------


def check_target(target: Path, force: bool) -> None:
    """Refuse a target folder that may not be written, before any work is done for it.

    Raises:
        InputError: it exists and `force` is not given; or it exists, `force` is given, and it is neither an
            artifact of this package nor an empty folder; or it is not a folder.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} exists and is not a folder: choose another name for the output.")
    if not force:
        raise InputError(f"{target} exists already: choose another folder, or use --force to replace it.")
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise InputError(
            f"{target} has no {MANIFEST}, so compot-deploy did not write it, and --force does not remove it: "
            "choose another folder, or remove this one yourself."
        )


@contextmanager
def staged_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends well and vanishes when it does not.

    The staging folder is a hidden sibling of the target, so the last step is one rename on one file system;
    before it, every file is flushed to the disk. With `force`, an artifact that stands at the target is moved
    aside, and removed only after the new one has taken its place.

    Args:
        target: the folder to make. Missing parents are made, and removed again on failure.
        force: replace an artifact of ours; a folder of anyone else's is never removed.

    Yields:
        The empty staging folder.

    Raises:
        InputError: see `check_target`; or the disk is full or may not be written. Nothing is left behind.
    """
    target = Path(os.path.realpath(target))
    check_target(target, force)
    made = [parent for parent in target.parents if not parent.exists()]
    staging = target.parent / f".{target.name}.staging-{uuid.uuid4().hex[:8]}"
    try:
        with _disk_errors(target):
            staging.mkdir(parents=True)
            yield staging
            _flush(staging)
            _publish(staging, target, force)
    except BaseException:
        _remove(staging)
        with suppress(OSError):  # somebody else may have put something there
            for parent in made:
                parent.rmdir()
        raise


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence; leave every other error alone."""
    try:
        yield
    except OSError as error:
        reason = _DISK_ERRORS.get(error.errno or 0)
        # numpy's tofile reports a short write without an error number.
        if reason is None and error.errno is None and "written" in str(error):
            reason = _DISK_ERRORS[errno.ENOSPC]
        if reason is None:
            raise
        place = next((p for p in target.parents if p.exists()), target.parent)
        free = shutil.disk_usage(place).free
        raise InputError(
            f"{target} could not be written: {reason} ({free:,} bytes are free there). "
            "Nothing was left behind; choose another folder, or make room, and run again."
        ) from error


def _flush(folder: Path) -> None:
    """Hand every file and directory entry below `folder` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _flush_entries(path)
    _flush_entries(folder)


def _flush_entries(folder: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staging: Path, target: Path, force: bool) -> None:
    """Put `staging` in the place of `target`; the old folder is removed only after that."""
    check_target(target, force)  # someone may have made it meanwhile
    aside: Path | None = None
    if target.exists():
        aside = target.parent / f".{target.name}.replaced-{uuid.uuid4().hex[:8]}"
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    _flush_entries(target.parent)
    if aside is not None:
        _remove(aside)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


# --- the manifest ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """One file of the artifact.

    Attributes:
        path: relative to the folder, with forward slashes.
        bytes: its size.
        sha256: of its contents, in hexadecimal.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LeafRecord:
    """One stored matrix.

    Attributes:
        inputs: rows.
        outputs: columns.
        bits: of one integer, or of one floating-point number.
        group: inputs that share a scale; None for floating point.
        nonzeros: entries that are not zero.
        bytes: what it takes in the file, its scales included.
        codebook: what an integer stands for, see `compot_deploy.weights.Codebook`.
    """

    inputs: int
    outputs: int
    bits: int
    group: int | None
    nonzeros: int
    bytes: int
    codebook: str = "integer"


@dataclass(frozen=True)
class PairRecord:
    """A dictionary and its codes.

    Attributes:
        atoms: k.
        pattern: which codes may be non-zero, ``dense`` or ``kept:of``.
        dictionary_name: pairs of one name share the dictionary.
        dictionary: the stored dictionary.
        codes: the stored codes.
    """

    atoms: int
    pattern: str
    dictionary_name: str
    dictionary: LeafRecord
    codes: LeafRecord


@dataclass(frozen=True)
class MatrixRecord:
    """One matrix of the model.

    Attributes:
        name: module path.
        kind: ``dense``, ``quantized`` or ``factorized``.
        inputs: m.
        outputs: n.
        bytes: what it takes in the file; a shared dictionary counts with the first matrix that uses it.
        plain_int4_bytes: what it would take as plain 4-bit integers in groups of 32, in the same format.
        digest: sha256 of its exact numbers, whatever the file format.
        plain: the stored matrix, unless it is factorized.
        pairs: dictionaries and codes, if it is factorized.
        why_dense: why it was not factorized although that was asked for; None otherwise.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    bytes: int
    plain_int4_bytes: int
    digest: str
    plain: LeafRecord | None = None
    pairs: tuple[PairRecord, ...] = ()
    why_dense: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from.

    Attributes:
        recipe: every knob of the run, as JSON values.
        calibration: sha256 of the calibration tokens, or None if there were none.
        seed: of the run.
        why_dense: module path to the reason why it was not factorized.
        facts: whatever else the run recorded and a reader should know, by name.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    seed: int | None = None
    why_dense: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about an artifact; see the attributes of its parts.

    Attributes:
        format: version of this layout.
        exporter: name of the exporter that wrote the files.
        package: version of compot-deploy.
        model_type: of the model's configuration.
        tied: the output head is the embedding.
        recipe: every knob of the run.
        calibration: sha256 of the calibration tokens, or None.
        seed: of the run, or None.
        facts: what else the run recorded.
        versions: of the libraries that took part.
        matrices: in block order.
        files: sorted by path; the manifest itself is not among them.
    """

    format: int
    exporter: str
    package: str
    model_type: str
    tied: bool
    recipe: Mapping[str, Any]
    calibration: str | None
    seed: int | None
    facts: Mapping[str, Any]
    versions: Mapping[str, str]
    matrices: tuple[MatrixRecord, ...]
    files: tuple[FileRecord, ...]

    def matrix(self, name: str) -> MatrixRecord:
        """The record of one matrix.

        Raises:
            ArtifactError: there is none of this name.
        """
        for record in self.matrices:
            if record.name == name:
                return record
        raise ArtifactError(f"The manifest has no matrix {name}; it has {len(self.matrices)} others.")


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
    hasher.update(tensor.detach().cpu().contiguous().view(-1).numpy())


def describe_matrices(
    matrices: Mapping[str, Matrix], storage: Storage, why_dense: Mapping[str, str] | None = None
) -> tuple[MatrixRecord, ...]:
    """Records of all matrices, read one at a time.

    Args:
        matrices: by module path, perhaps lazily read.
        storage: what the format needs for a leaf.
        why_dense: module path to the reason why it was not factorized.
    """
    reasons = why_dense or {}
    total = matrix_bytes(matrices, storage)
    records = []
    for name, matrix in matrices.items():
        plain: LeafRecord | None = None
        pairs: tuple[PairRecord, ...] = ()
        if isinstance(matrix, Factorized):
            kind = "factorized"
            pairs = tuple(
                PairRecord(
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
        nonzeros=int(torch.count_nonzero(values)),
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
        model_type=model.architecture.model_type,
        tied=model.tied,
        recipe=dict(provenance.recipe),
        calibration=provenance.calibration,
        seed=provenance.seed,
        facts=dict(provenance.facts),
        versions=library_versions(),
        matrices=describe_matrices(model.matrices, storage, provenance.why_dense),
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
        _check_path(name, "the list of changed files")
        if name == MANIFEST:
            raise ValueError("The manifest does not list itself.")
        if (folder / name).is_file():
            records[name] = file_record(folder, name)
        else:
            records.pop(name, None)
    manifest = dataclasses.replace(manifest, files=tuple(records[path] for path in sorted(records)))
    _write(folder, manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, every field checked; the files themselves are not looked at.

    Raises:
        ArtifactError: there is none, it is not JSON, a field is missing or of a wrong type, its format is
            newer than this version reads, or it names a path outside the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: give the folder that compot-deploy wrote.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {MANIFEST}: give a folder that compot-deploy wrote.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}. Export the model again.") from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > MANIFEST_FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, and this version of compot-deploy reads up to {MANIFEST_FORMAT}: "
            "update compot-deploy."
        )
    manifest = cast(Manifest, _decode(Manifest, raw, str(path)))
    seen: set[str] = set()
    for record in manifest.files:
        _check_path(record.path, str(path))
        if record.path in seen:
            raise ArtifactError(f"{path} lists {record.path} twice.")
        seen.add(record.path)
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
    """Files that lie in the folder without being in the manifest, sorted."""
    listed = {record.path for record in manifest.files}
    return tuple(path for path in list_files(folder) if path not in listed)


def list_files(folder: Path) -> tuple[str, ...]:
    """Every file below `folder` but the manifest, as relative paths with forward slashes, sorted."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return tuple(sorted(path for path in paths if path != MANIFEST))


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


def _check_path(path: str, where: str) -> None:
    """Refuse anything but a plain relative path with forward slashes."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    plain = path != "" and "\\" not in path and "\0" not in path and posix.as_posix() == path
    if not plain or posix.is_absolute() or windows.drive or ".." in posix.parts or path == ".":
        raise ArtifactError(f"{where} names the path {path!r}, which is not a plain path inside the folder.")


def _write(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with _disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


# --- JSON to dataclasses, types checked ------------------------------------------------------------------

_Type: TypeAlias = Any


def _decode(expected: _Type, value: Any, where: str) -> Any:
    """`value`, decoded from JSON, as `expected`: a dataclass, a scalar, a union, a tuple or a mapping.

    Raises:
        ArtifactError: naming the field, its type, and the type that was expected.
    """
    origin: Any = get_origin(expected)
    arguments = get_args(expected)
    if expected is Any:
        return value
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        hints = get_type_hints(expected)
        result = {}
        for attribute in dataclasses.fields(expected):
            if attribute.name in value:
                result[attribute.name] = _decode(
                    hints[attribute.name], value[attribute.name], f"{where}: {attribute.name}"
                )
            elif attribute.default is dataclasses.MISSING:
                raise ArtifactError(f"{where} lacks the field {attribute.name!r}. Export the model again.")
        return expected(**result)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (only,) = (argument for argument in arguments if argument is not type(None))
        return _decode(only, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    # A bool is an int in Python, and not in a manifest.
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise _wrong(where, value, {int: "a whole number", str: "a text", bool: "true or false"}[expected])
    return value


def _wrong(where: str, value: Any, expected: str) -> ArtifactError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "…"
    return ArtifactError(f"{where} is {shown}, and should be {expected}. Export the model again.")
