"""What is in an exported folder, layer by layer, from its manifest; files are verified first."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from compot_deploy.exporters.artifact import verify
from compot_deploy.exporters.huggingface.shards import account
from compot_deploy.exporters.manifest import LeafRecord, MatrixRecord


@dataclass(frozen=True)
class Overview:
    """A table for the terminal.

    Attributes:
        title: above it.
        columns: headings.
        rows: one per matrix, then the totals.
        lines: below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]


def overview(folder: Path) -> Overview:
    """Every matrix with its sizes, bits and bytes, beside the bytes of plain int4.

    Raises:
        ArtifactError: not a folder of ours, or damaged.
    """
    manifest = verify(folder)
    rows = [_row(record) for record in manifest.matrices]
    total = sum(record.bytes for record in manifest.matrices)
    plain = sum(record.plain_int4_bytes for record in manifest.matrices)
    rows.append(("all matrices", "", "", "", "", "", f"{total:,}", f"{plain:,}", f"{total / plain:.3f}"))
    dense = [record for record in manifest.matrices if record.why_dense]
    lines = [f"{record.name} stays dense: {record.why_dense}." for record in dense]
    if manifest.exporter == "huggingface":
        spent = account(folder, total)
        lines.append(
            f"The tensor files are {spent.matrices:,} bytes of matrices, {spent.others:,} of other tensors and "
            f"{spent.headers:,} of headers."
        )
    files = sum(record.bytes for record in manifest.files)
    lines.append(
        f"{len(manifest.files)} files, {files:,} bytes, all as the manifest says; written by compot-deploy "
        f"{manifest.package} ({manifest.exporter}), {manifest.model_type}."
    )
    return Overview(
        title=str(folder),
        columns=("matrix", "m", "n", "k", "s", "bits", "bytes", "plain int4", "ratio"),
        rows=tuple(rows),
        lines=tuple(lines),
    )


def as_json(folder: Path) -> str:
    """The manifest's matrices as a JSON list."""
    return json.dumps([asdict(record) for record in verify(folder).matrices])


def _row(record: MatrixRecord) -> tuple[str, ...]:
    size = (
        f"{record.bytes:,}",
        f"{record.plain_int4_bytes:,}",
        f"{record.bytes / record.plain_int4_bytes:.3f}",
    )
    head = (record.name.removeprefix("model."), str(record.inputs), str(record.outputs))
    if record.plain is not None:
        return (*head, "", "", _bits(record.plain), *size)
    atoms = " + ".join(str(pair.atoms) for pair in record.pairs)
    kept = " + ".join(
        str(pair.atoms) if pair.pattern == "dense" else _kept(pair.pattern, pair.atoms)
        for pair in record.pairs
    )
    bits = " + ".join(f"{_bits(pair.dictionary)}·{_bits(pair.codes)}" for pair in record.pairs)
    return (*head, atoms, kept, bits, *size)


def _kept(pattern: str, atoms: int) -> str:
    kept, of = pattern.split(":")
    return kept if int(of) == atoms else pattern


def _bits(leaf: LeafRecord) -> str:
    name = leaf.bits if leaf.codebook == "integer" else leaf.codebook
    return f"{name}/g{leaf.group}" if leaf.group else str(name)
