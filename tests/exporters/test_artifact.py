"""Laws of the artifact: it appears whole or not at all, and no damage to it stays unseen."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compot_deploy.core.grid import Grid, Pattern
from compot_deploy.core.matrix import Dense, Factorized, FactorPair, Matrix, Quantized
from compot_deploy.core.storage import matrix_bytes
from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.exporters.artifact import (
    Provenance,
    describe,
    digest,
    seal,
    unlisted_files,
    verify,
    write_manifest,
)
from compot_deploy.exporters.manifest import MANIFEST, read_manifest
from compot_deploy.exporters.staging import check_target, staged_folder
from compot_deploy.models.compressed import CompressedModel, Tables
from compot_deploy.models.hints import ARCHITECTURES


class PackedStorage:
    """Four bytes a float; integers without padding; two bytes a scale."""

    def leaf_bytes(self, rows: int, columns: int, grid: Grid | None, pattern: Pattern = Pattern()) -> int:  # noqa: B008
        if grid is None:
            return 4 * rows * columns
        return rows * columns * grid.bits // 8 + 2 * grid.groups(rows) * columns


def quantized(rows: int, columns: int, bits: int = 4, group: int = 16) -> Quantized:
    grid = Grid(bits, group)
    return Quantized(
        torch.randint(grid.lowest, grid.highest + 1, (rows, columns), dtype=torch.int8),
        torch.rand(grid.groups(rows), columns).half(),
        grid,
    )


def sample_model() -> CompressedModel:
    shared = quantized(32, 16)
    matrices: dict[str, Matrix] = {
        "model.embed_tokens": quantized(32, 40, 8),
        "model.layers.0.self_attn.q_proj": Factorized(
            (FactorPair(shared, quantized(16, 32), "attention_input"),)
        ),
        "model.layers.0.self_attn.k_proj": Factorized(
            (FactorPair(shared, quantized(16, 24), "attention_input"),)
        ),
        "model.layers.0.mlp.down_proj": Dense(torch.randn(48, 32)),
    }
    return CompressedModel(
        architecture=ARCHITECTURES["llama"],
        config={"model_type": "llama", "num_hidden_layers": 1},
        matrices=matrices,
        tensors={},
        tied=True,
        source="",
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "onnx/model.onnx_data").write_bytes(bytes(range(256)) * 8)
    provenance = Provenance(
        recipe={"ratio": 0.2, "bits": {"codes": 4}},
        calibration="ab" * 32,
        seed=7,
        why_dense={"model.layers.0.mlp.down_proj": "k would be 12, less than a group of 32"},
        metadata={"ridge": [1e-6]},
    )
    write_manifest(folder, describe(sample_model(), "onnx", PackedStorage(), provenance))
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- staging


def test_a_folder_appears_only_at_the_end_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with staged_folder(target) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx/model.onnx").write_bytes(b"12")
        assert not target.exists()
        assert folder.parent == target.parent  # one file system, so the rename is atomic
    assert listing(tmp_path) == ["a", "a/b", "a/b/onnx", "a/b/onnx/model.onnx"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_behind_when_a_run_stops(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), staged_folder(tmp_path / "a" / "b") as folder:
        (folder / "half").write_bytes(b"1")
        raise failure
    assert listing(tmp_path) == []


def test_a_folder_that_is_there_is_refused_before_work_begins(artifact: Path) -> None:
    before = listing(artifact.parent)
    with pytest.raises(InputError, match="--force"), staged_folder(artifact):
        raise AssertionError("the block must not run")
    assert listing(artifact.parent) == before


def test_force_swaps_the_old_artifact_only_after_success(artifact: Path) -> None:
    before = listing(artifact)
    with pytest.raises(RuntimeError), staged_folder(artifact, force=True) as folder:
        (folder / "new").write_bytes(b"1")
        raise RuntimeError
    assert listing(artifact) == before
    with staged_folder(artifact, force=True) as folder:
        (folder / "new").write_bytes(b"1")
        assert listing(artifact) == before
    assert listing(artifact.parent) == ["model", "model/new"]


def test_force_brings_the_old_artifact_back_when_the_swap_fails(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(artifact.parent)
    rename = Path.rename

    def fail_for_staging(self: Path, to: Path) -> Path:
        if ".staging-" in self.name:
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_staging)
    with pytest.raises(InputError, match="not permitted"), staged_folder(artifact, force=True) as folder:
        (folder / "new").write_bytes(b"1")
    assert listing(artifact.parent) == before


def test_force_never_removes_a_folder_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("…")
    with pytest.raises(InputError, match=r"compot/manifest\.json"):
        check_target(tmp_path / "thesis", force=True)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", force=True)  # there is nothing to lose in it
    (tmp_path / "file").write_text("…")
    with pytest.raises(InputError, match="not a folder"):
        check_target(tmp_path / "file", force=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"the disk is full \([\d,]+ bytes are free"),
        staged_folder(tmp_path / "model") as folder,
        Path("/dev/full").open("wb") as disk,
    ):
        (folder / "config.json").write_text("{}")
        disk.write(b"x" * 100_000)
    assert listing(tmp_path) == []


def test_a_file_that_cannot_grow_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    # In a process of its own: the limit would also hold for the file that this one's output may go to.
    pytest.importorskip("resource")
    program = """
import resource, sys
from pathlib import Path
from compot_deploy.errors import InputError
from compot_deploy.exporters.staging import staged_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    with staged_folder(Path(sys.argv[1])) as folder:
        (folder / "data").write_bytes(b"x" * 100_000)
except InputError as error:
    sys.exit(str(error))
"""
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path / "m")], capture_output=True, text=True)
    assert "beyond the largest size" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert listing(tmp_path) == []


def test_no_write_permission_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the refusal of the operating system is played.
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="writing is not permitted"), staged_folder(tmp_path / "model"):
        raise AssertionError("the block must not run")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "model"):
        (tmp_path / "nowhere").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_the_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with staged_folder(tmp_path / "model"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "model")]
    assert modes[0] == modes[1]


# --- the manifest


def test_a_manifest_reads_back_as_it_was_written(artifact: Path) -> None:
    manifest = describe(sample_model(), "onnx", PackedStorage(), Provenance())
    written = write_manifest(artifact, manifest)
    assert read_manifest(artifact) == written
    assert dataclasses.replace(written, files=()) == manifest


def test_the_same_run_writes_the_same_manifest(artifact: Path) -> None:
    first = (artifact / MANIFEST).read_bytes()
    write_manifest(artifact, read_manifest(artifact))
    assert (artifact / MANIFEST).read_bytes() == first


def test_an_untouched_artifact_verifies_and_extra_files_are_told(artifact: Path) -> None:
    (artifact / "notes.txt").write_text("mine")
    manifest = verify(artifact)
    assert [f.path for f in manifest.files] == ["config.json", "onnx/model.onnx_data"]
    assert unlisted_files(artifact, manifest) == ("notes.txt",)


def test_any_changed_byte_is_found(artifact: Path) -> None:
    data = artifact / "onnx/model.onnx_data"
    whole = data.read_bytes()
    for position in (0, 1000, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        data.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match=r"model\.onnx_data is damaged: its sha256 is"):
            verify(artifact)
    data.write_bytes(whole)
    verify(artifact)


def test_a_truncated_file_is_named_with_both_sizes(artifact: Path) -> None:
    data = artifact / "onnx/model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.onnx_data has 2,047 bytes, and the manifest says 2,048"):
        verify(artifact)


def test_missing_files_are_named_and_counted(artifact: Path) -> None:
    (artifact / "config.json").unlink()
    (artifact / "onnx/model.onnx_data").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json is missing.*2 bytes.* 1 more"):
        verify(artifact)


def test_a_link_out_of_the_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    data = artifact / "config.json"
    outside = tmp_path / "outside"
    outside.write_bytes(data.read_bytes())
    data.unlink()
    data.symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        verify(artifact)


def test_seal_takes_in_named_files_and_hides_no_damage(artifact: Path) -> None:
    (artifact / "report.json").write_text('{"passed": true}')
    seal(artifact, ["report.json"])
    assert "report.json" in [f.path for f in verify(artifact).files]
    (artifact / "onnx/model.onnx_data").write_bytes(b"damaged")
    (artifact / "report.json").write_text('{"passed": false}')
    seal(artifact, ["report.json"])
    with pytest.raises(ArtifactError, match=r"model\.onnx_data has 7 bytes"):
        verify(artifact)
    (artifact / "report.json").unlink()
    assert "report.json" not in [f.path for f in seal(artifact, ["report.json"]).files]


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/passwd", "a/../../b", "C:/x", "a\\..\\b", "", ".", "a//b", "./a", "nul\0byte"],
)
def test_a_manifest_cannot_name_a_path_outside(artifact: Path, path: str) -> None:
    raw = json.loads((artifact / MANIFEST).read_text())
    raw["files"][0]["path"] = path
    (artifact / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="not a plain path inside the folder"):
        verify(artifact)
    with pytest.raises(ArtifactError):
        seal(artifact, [path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": 3}, "files is 3, and should be a list"),
        (
            {"files": [{"path": "a", "bytes": "2", "sha256": ""}]},
            r'files\[0\]: bytes is "2", and should be a w',
        ),
        ({"files": [{"path": "a", "bytes": True, "sha256": ""}]}, "bytes is true, and should be a whole"),
        ({"files": [{"path": "a", "bytes": 1}]}, "lacks the field 'sha256'"),
        ({"files": [{"path": "a", "bytes": 1, "sha256": ""}] * 2}, "lists a twice"),
        ({"matrices": [7]}, r"matrices\[0\] is 7, and should be an object"),
        ({"seed": "7"}, 'seed is "7", and should be a whole number'),
        ({"format": 2}, "format 2, and this version of compot-deploy reads up to 1"),
        ({"tied": None}, "tied is null, and should be true or false"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(artifact: Path, change: dict[str, object], message: str) -> None:
    raw = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).write_text(json.dumps(raw | change))
    with pytest.raises(ArtifactError, match=message):
        read_manifest(artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ud800", "[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(artifact: Path, text: str) -> None:
    (artifact / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(artifact)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no compot/manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        read_manifest(tmp_path / "nowhere")


# --- matrix records


def test_records_count_the_same_bytes_as_the_plan(artifact: Path) -> None:
    model = sample_model()
    manifest = read_manifest(artifact)
    assert {m.name: m.bytes for m in manifest.matrices} == matrix_bytes(model.matrices, PackedStorage())


def test_records_say_what_each_matrix_is(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    down = manifest.matrix("model.layers.0.mlp.down_proj")
    assert (down.kind, down.inputs, down.outputs) == ("dense", 48, 32)
    assert down.why_dense == "k would be 12, less than a group of 32"
    assert down.plain is not None and (down.plain.bits, down.plain.group) == (32, None)
    assert down.plain_int4_bytes == 48 * 32 // 2 + 2 * 2 * 32
    key = manifest.matrix("model.layers.0.self_attn.k_proj")
    assert (key.kind, key.pairs[0].atoms, key.pairs[0].dictionary_name) == (
        "factorized",
        16,
        "attention_input",
    )
    assert key.bytes == key.pairs[0].codes.bytes  # the dictionary is counted with q_proj
    with pytest.raises(ArtifactError, match=r"no matrix model\.layers\.9"):
        manifest.matrix("model.layers.9")


def test_records_say_what_a_budget_is_spent_on(artifact: Path) -> None:
    model = dataclasses.replace(
        sample_model(),
        architecture=None,
        tables=Tables("model.embed_tokens", None),
        outside=frozenset({"model.layers.0.mlp.down_proj"}),
    )
    storage = PackedStorage()
    roles = [record.role for record in describe(model, "onnx", storage, Provenance()).matrices]
    assert roles == ["table", "linear", "linear", "other"]
    assert [record.role for record in read_manifest(artifact).matrices] == [
        "table",
        "linear",
        "linear",
        "linear",
    ]


def test_manifests_that_do_not_tell_roles_are_read_by_the_numbers_of_blocks(artifact: Path) -> None:
    manifest = json.loads((artifact / MANIFEST).read_text())
    for record in manifest["matrices"]:
        del record["role"]
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    assert [record.role for record in read_manifest(artifact).matrices] == [
        "table",
        "linear",
        "linear",
        "linear",
    ]
    manifest["matrices"][0]["role"] = "hero"
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="has the role 'hero', which does not exist"):
        read_manifest(artifact)


def test_a_digest_is_of_the_numbers_alone() -> None:
    one = quantized(32, 8)
    changed = one.integers.clone()
    changed[3, 4] += 1 if changed[3, 4] < 7 else -1
    scaled = one.scales.clone()
    scaled[0, 0] += 0.5
    others: list[Matrix] = [
        Quantized(changed, one.scales, one.grid),
        Quantized(one.integers, scaled, one.grid),
        Quantized(one.integers, one.scales, Grid(8, 16)),
        Dense(one.dequantize()),
        Quantized(one.integers.T.contiguous().T, one.scales, one.grid),
    ]
    digests = [digest(other) for other in others]
    assert digest(one) not in digests[:-1]
    assert digest(one) == digests[-1]  # the layout in memory does not matter
    half = torch.randn(4, 4).half()
    assert digest(Dense(half)) == digest(Dense(half.float()))


def test_writing_a_manifest_is_atomic(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (artifact / MANIFEST).read_bytes()
    names = listing(artifact)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        seal(artifact, ["config.json"])
    assert (artifact / MANIFEST).read_bytes() == before
    assert listing(artifact) == names
