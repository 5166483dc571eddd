"""A folder before anything of it is run: what its manifest does not know, and whether its matrices are as described.

Hashes of files say that nothing happened to a folder on its way. They do not say that what is inside belongs together:
whoever changes a file can write its hash anew. So numbers are compared as well, and nothing that a runtime would read
may lie there unlisted.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Final

from compot_deploy.core.diagnostics import Diagnostic
from compot_deploy.errors import ArtifactError, a_few
from compot_deploy.exporters.artifact import digest, unlisted_files
from compot_deploy.exporters.manifest import SIGNATURE, Manifest
from compot_deploy.exporters.signature import check_signature, read_trusted_key, signed_by
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.pipeline.texts import EVALUATION

_READ: Final = frozenset((".onnx", ".onnx_data", ".gguf", ".safetensors"))
_READ_AT_THE_TOP: Final = frozenset((".json", ".jinja", ".model", ".txt"))
"""Endings of files that runtimes and tokenizers look for, whoever lists them."""

_CODE: Final = frozenset((".py", ".pyc", ".so", ".dll", ".dylib", ".pyd", ".sh", ".bat", ".ps1", ".exe"))
_PICKLES: Final = frozenset((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"))


def check_signed(folder: Path, trusted: str | None) -> tuple[Diagnostic, ...]:
    """Who signed the manifest, before anything in it is believed.

    Args:
        folder: an artifact.
        trusted: public key that must have signed it; None asks for none.

    Raises:
        ArtifactError: it did not, or something was changed since.
        InputError: no public key.
    """
    if trusted is not None:
        key = read_trusted_key(trusted)
        check_signature(folder, key)
        return (Diagnostic("note", SIGNATURE, f"The trusted key {key.name} signed the manifest as it is."),)
    name = signed_by(folder)
    if name is None:
        return ()
    told = f"The folder says that the key {name} signed it, which was not checked: give --trusted-key."
    return (Diagnostic("note", SIGNATURE, told),)


def unlisted(folder: Path, manifest: Manifest, *, strict: bool = False) -> tuple[Diagnostic, ...]:
    """What lies in a folder and is not in its manifest.

    Args:
        folder: an artifact.
        manifest: its own.
        strict: fail for any of it.

    Raises:
        ArtifactError: a file that a runtime would read is not listed.
    """
    found = unlisted_files(folder, manifest)
    read = [name for name in found if _is_read(name)]
    if read:
        raise ArtifactError(
            f"{folder} holds {a_few(read)}, which the manifest does not list and a runtime would read. Remove what "
            "does not belong there, or export the model again."
        )
    return tuple(
        Diagnostic(
            "error" if strict else "warning",
            name,
            f"it lies in the folder, and the manifest does not list it{_kind(folder / name)}. Whoever takes the folder "
            "takes it along; remove it.",
        )
        for name in found
    )


def check_matrices(folder: Path, manifest: Manifest, model: CompressedModel) -> None:
    """Compare the numbers of every matrix with what the manifest says of them.

    Raises:
        ArtifactError: a matrix has other numbers; the manifest describes one that the files do not hold, or none.
    """
    for what, records in (("files", manifest.files), ("matrices", manifest.matrices)):
        if not records:
            raise ArtifactError(
                f"{folder}: its manifest lists no {what}, so nothing is known of it. Export the model again."
            )
    missing = [record.name for record in manifest.matrices if record.name not in model.matrices]
    if missing:
        raise ArtifactError(
            f"{folder}: its manifest describes {a_few(missing)}, and the files hold no such matrix. Export again."
        )
    undescribed = [
        name
        for name in model.matrices
        if name not in {record.name for record in manifest.matrices} and model.role(name) == "linear"
    ]
    if undescribed:
        raise ArtifactError(
            f"{folder}: its files hold {a_few(undescribed)}, and the manifest describes no such matrix. Export again."
        )
    wrong = [
        record.name for record in manifest.matrices if digest(model.matrices[record.name]) != record.digest
    ]
    if wrong:
        raise ArtifactError(
            f"{folder}: the numbers of {a_few(wrong)} are not those that the manifest describes, though the files are: "
            "they were changed, and their hashes written anew. Export the model again."
        )


def _is_read(name: str) -> bool:
    path = PurePosixPath(name)
    at_the_top = len(path.parts) == 1 and path.suffix in _READ_AT_THE_TOP
    return at_the_top or path.parts[0] == "onnx" or path.suffix in _READ or name == EVALUATION


def _kind(path: Path) -> str:
    """What it is, where that matters."""
    if path.is_symlink():
        inside = path.resolve().is_relative_to(path.parent.resolve())
        return "" if inside else "; it is a link that leads out of the folder"
    if path.suffix in _PICKLES:
        return "; it may be a pickle, which runs code when it is read"
    return "; it is a program" if path.suffix in _CODE else ""
