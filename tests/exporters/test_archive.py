"""Laws of the archive: everything comes back, the same files give the same bytes, nothing is overwritten."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from compot_deploy.errors import InputError
from compot_deploy.exporters.archive import archive_path, transport_bytes, write_archive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "onnx").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    codes = torch.randint(0, 16, (4096,), dtype=torch.uint8) * (torch.rand(4096) < 0.5)
    (made / "onnx" / "data").write_bytes(bytes(codes.tolist()))
    return made


def test_everything_comes_back(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(write_archive(folder)) as archive:
        archive.extractall(tmp_path / "again")
    for name in ("config.json", "onnx/data"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_same_files_give_the_same_bytes(folder: Path) -> None:
    first = write_archive(folder).read_bytes()
    (folder / "config.json").touch()
    assert write_archive(folder, force=True).read_bytes() == first


def test_the_predicted_size_is_the_size(folder: Path) -> None:
    predicted = transport_bytes(folder)
    written = write_archive(folder).stat().st_size
    assert written == predicted
    assert predicted < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_an_archive_is_not_overwritten_unasked(folder: Path) -> None:
    archive_path(folder).write_text("mine")
    with pytest.raises(InputError, match="--force"):
        write_archive(folder)
    assert archive_path(folder).read_text() == "mine"
