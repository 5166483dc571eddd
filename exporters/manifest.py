"""The manifest, ``compot/manifest.json``: what is in a folder, as dataclasses, and read back with every type checked.

It names every file with its size and sha256, so damage is found before a runtime reads it; every matrix with its
scheme, bits, groups, bytes and a digest of its exact numbers; and where it all came from: recipe, calibration
text, seed, library versions.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

from compot_deploy.core.grid import Codebook, Grid, Pattern
from compot_deploy.core.json_files import key_of
from compot_deploy.core.parsing import UnreadableError, decoded, json_of
from compot_deploy.errors import ArtifactError, RecipeError

MANIFEST: Final = "compot/manifest.json"
"""Where the manifest lies inside an artifact; the mark by which a folder is known as ours."""

SIGNATURE: Final = MANIFEST + ".minisig"
"""Where its signature lies, if it has one; see `compot_deploy.exporters.signature`."""

MANIFEST_FORMAT: Final = 1

ROLES: Final = ("linear", "table", "other")
"""What a matrix may be, see `MatrixRecord`."""


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
        codebook: what an integer stands for, see `compot_deploy.core.grid.Codebook`.
    """

    inputs: int
    outputs: int
    bits: int
    group: int | None
    nonzeros: int
    bytes: int
    codebook: str = "integer"


@dataclass(frozen=True)
class FactorPairRecord:
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
        role: ``linear``: a matrix of a block, which is what a budget is spent on; ``table``: the token embedding or an
            output head; ``other``: any other matrix, a classifier's for example.
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
    pairs: tuple[FactorPairRecord, ...] = ()
    why_dense: str | None = None
    role: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about an artifact; see the attributes of its parts.

    Attributes:
        format: version of this layout.
        exporter: name of the exporter that wrote the files.
        package: version of compot-deploy.
        model_type: of the model's configuration.
        tied: the output head is the embedding.
        recipe: every option of the run.
        calibration: sha256 of the calibration tokens, or None.
        seed: of the run, or None.
        metadata: what else the run recorded.
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
    metadata: Mapping[str, Any]
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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, every field checked; the files themselves are not looked at.

    Raises:
        ArtifactError: there is none, it is not JSON, a field is missing or of a wrong type or has a value that nothing
            has, its format is newer than this version reads, or it names a path outside the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: give the folder that compot-deploy wrote.")
    try:
        raw = json_of(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {MANIFEST}: give a folder that compot-deploy wrote.") from None
    except (OSError, UnreadableError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Export the model again.") from error
    version = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > MANIFEST_FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, and this version of compot-deploy reads up to {MANIFEST_FORMAT}: "
            "update compot-deploy."
        )
    manifest = cast(Manifest, _decode(Manifest, raw, str(path)))
    manifest = dataclasses.replace(
        manifest, matrices=tuple(_with_role(record, str(path)) for record in manifest.matrices)
    )
    for record in manifest.files:
        check_path(record.path, str(path))
    _check_once([record.path for record in manifest.files], str(path))
    _check_once([matrix.name for matrix in manifest.matrices], str(path))
    _check_values(manifest, str(path))
    return manifest


def role_by_name(name: str) -> str:
    """What a matrix is, as far as its path tells: those of numbered blocks are linears, others are tables."""
    return "linear" if any(part.isdigit() for part in name.split(".")) else "table"


def _with_role(record: MatrixRecord, where: str) -> MatrixRecord:
    """The record with its role, which manifests of version 0.1 do not tell."""
    if not record.role:
        return dataclasses.replace(record, role=role_by_name(record.name))
    if record.role not in ROLES:
        raise ArtifactError(
            f"{where}: {record.name} has the role {record.role!r}, which does not exist. Export the model again."
        )
    return record


def check_path(path: str, where: str) -> None:
    """Refuse anything but a plain relative path with forward slashes."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    plain = path != "" and "\\" not in path and "\0" not in path and posix.as_posix() == path
    if not plain or posix.is_absolute() or windows.drive or ".." in posix.parts or path == ".":
        raise ArtifactError(f"{where} names the path {path!r}, which is not a plain path inside the folder.")


def _check_once(names: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ArtifactError(f"{where} lists {name} twice.")
        seen.add(name)


_LEAST: Final[Mapping[str, int]] = {
    "bytes": 0,
    "plain_int4_bytes": 0,
    "nonzeros": 0,
    "inputs": 1,
    "outputs": 1,
    "bits": 1,
    "group": 1,
    "atoms": 1,
}
"""Least value of every number of a record: sizes are added up, and held against limits."""

_HASH: Final = re.compile(r"[0-9a-f]{64}")


def _check_values(record: Any, where: str) -> None:
    """Refuse numbers that no size and no count has, and hashes that are none, in a record and those inside of it."""
    try:
        if isinstance(record, FactorPairRecord):
            Pattern.of_text(record.pattern)
        if isinstance(record, LeafRecord) and record.group is not None:
            Grid(record.bits, record.group, cast(Codebook, record.codebook))
    except RecipeError as error:
        raise ArtifactError(f"{where}: {str(error).rstrip('.')}. Export the model again.") from None
    for attribute in dataclasses.fields(record):
        value, name = getattr(record, attribute.name), f"{where}: {attribute.name}"
        least = _LEAST.get(attribute.name)
        if least is not None and value is not None and value < least:
            raise ArtifactError(f"{name} is {value}, which is less than {least}. Export the model again.")
        if attribute.name in ("sha256", "digest") and not _HASH.fullmatch(value):
            raise _wrong(name, value, "a sha256 in hexadecimal")
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                named = getattr(part, "path", None) or getattr(part, "name", None) or attribute.name
                _check_values(part, f"{where}: {named}")


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
            key = key_of(expected, attribute.name)
            if key in value:
                result[attribute.name] = _decode(hints[attribute.name], value[key], f"{where}: {key}")
            elif attribute.default is dataclasses.MISSING:
                raise ArtifactError(f"{where} lacks the field {key!r}. Export the model again.")
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
