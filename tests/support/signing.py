"""What whoever changes a folder can do as well: write every hash anew, so that everything fits together again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compot_deploy.errors import CompotDeployError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import describe_matrices, file_record, list_files
from compot_deploy.exporters.manifest import MANIFEST


def manifest_of(folder: Path) -> dict[str, Any]:
    """As it stands, unchecked."""
    return dict(json.loads((folder / MANIFEST).read_text()))


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Put another in its place."""
    (folder / MANIFEST).write_text(json.dumps(manifest))


def sign_again(folder: Path, **changes: Any) -> None:
    """List the files as they are, and describe the matrices that they hold.

    Args:
        folder: of an export.
        **changes: other values of the manifest.
    """
    manifest = manifest_of(folder)
    manifest["files"] = [asdict(file_record(folder, name)) for name in list_files(folder)]
    exporter = EXPORTERS[manifest["exporter"]]
    described = {record["name"] for record in manifest["matrices"]}
    try:
        model = exporter.read_model(folder)
        matrices = {name: model.matrices[name] for name in model.matrices if name in described}
        storage = exporter.storage(exporter.options(manifest["recipe"]))
        records = describe_matrices(matrices, storage, role=model.role)
        manifest["matrices"] = json.loads(json.dumps([asdict(record) for record in records]))
    except CompotDeployError:
        pass  # what cannot be read cannot be described either
    write_manifest(folder, {**manifest, **changes})
