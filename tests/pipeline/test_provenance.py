"""Laws of what published files say about the machine that made them: names and hashes, no path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from cases import nightly
from folders import differences

from compot_deploy import Recipe, check, deploy
from compot_deploy.pipeline.provenance import public_name, published, stamp

SETTINGS = {"method": "plain", "samples": 4, "length": 32, "evaluation_tokens": 64}


@pytest.mark.slow
@pytest.mark.parametrize("given", ["words.txt", *nightly("words.jsonl")])
@pytest.mark.parametrize("format", ["gguf", *nightly("onnx", "huggingface")])
def test_no_published_file_names_a_folder_of_this_machine(format: str, given: str, tmp_path: Path) -> None:
    private = tmp_path / "private-place"
    model = tiny.save(private / "made" / "tiny", num_hidden_layers=1)
    text = private / given
    lines = [f"{number} {tiny.WORDS}" for number in range(60)]
    text.write_text(
        "".join(f'{{"text": "{line}"}}\n' if given.endswith("l") else f"{line}\n" for line in lines)
    )
    out = private / "results" / "small"
    (done,) = deploy(
        model=str(model),
        calibration=str(text),
        evaluation=str(text) if given.endswith("l") else None,
        out=str(out),
        format=(format,),
        max_perplexity_ratio=1e9,
        archive=True,
        **SETTINGS,
    )
    assert done.folder == out
    files = [path for path in out.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".zip" for path in files) and len(files) > 8
    for path in files:
        assert b"private-place" not in path.read_bytes(), path
    card = (out / "README.md").read_text()
    assert "tiny" in card and given in card

    moved = tmp_path / "elsewhere" / "small"
    shutil.copytree(out, moved)
    assert check(moved, export_only=True).report.accuracy.reference_absent
    shutil.copytree(model, moved.parent / "tiny")
    again = check(moved).report.accuracy
    assert again.method == done.report.accuracy.method, "the original is found beside the folder"


@pytest.mark.slow
def test_published_bytes_do_not_depend_on_where_they_are_written(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "tiny", num_hidden_layers=1)
    outs = [tmp_path / "a", tmp_path / "a-long-name" / ("and-a-longer-one" * 5)]
    for out in outs:
        deploy(
            model=str(model),
            out=str(out),
            format=("onnx", "gguf", "huggingface"),
            max_perplexity_ratio=1e9,
            archive=True,
            **SETTINGS,
        )
    for kind in ("onnx", "gguf", "huggingface"):
        assert list(differences(outs[0] / kind, outs[1] / kind)) == []


def test_local_paths_are_kept_by_their_last_part_and_names_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert public_name("a/b") == public_name(str(tmp_path / "a" / "b")) == "b"
    assert public_name(".") == tmp_path.name
    assert public_name("owner/name") == "owner/name" and public_name(None) is None
    assert public_name("/of/another/machine") == "machine"
    recipe = published(Recipe(model="a/b", calibration="self", out="somewhere", force=True))
    assert recipe == Recipe(model="b", calibration="self")
    assert str(tmp_path) not in "".join(stamp(Recipe(model=str(tmp_path / "a")), "0").values())
