"""Laws of signatures: what the key signed passes, what was changed since does not; minisign has the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from signing import sign_again

from compot_deploy import check, deploy
from compot_deploy.cli import main
from compot_deploy.errors import ArtifactError, InputError, MissingDependencyError
from compot_deploy.exporters import signature
from compot_deploy.exporters.artifact import verify
from compot_deploy.exporters.manifest import MANIFEST, SIGNATURE
from compot_deploy.exporters.signature import (
    PASSWORD,
    check_signature,
    read_signing_key,
    read_trusted_key,
    sign,
    signed_by,
    write_keys,
)
from compot_deploy.pipeline.check import write_report_again
from compot_deploy.pipeline.integrity import check_signed
from compot_deploy.report.junit import to_junit

SECRET = (
    "RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA5vf9E7PdpTU8DMmnigF5Jfj0ZqWs3Uie4wBZ+sEC"
    "IDv792v3cFouWWI1Mt4J/RuTpP1g7qkmjjOPYUQkFonJm/m0W+9i/lstAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)
"""Of a pair that minisign 0.11 made for this test, without a password."""

PUBLIC = "RWTm9/0Ts92lNWI1Mt4J/RuTpP1g7qkmjjOPYUQkFonJm/m0W+9i/lst"
NAME = "35A5DDB313FDF7E6"
OURS = """\
untrusted comment: signature from the key 35A5DDB313FDF7E6
RUTm9/0Ts92lNYQlyANDgkVADDsB5DVg7aEJwikQWh52i08ZaYRQez+izIhtcY5oFWh+YG1uF4bKPRqGThWyQqqu3R9fv1iwDgg=
trusted comment: file:manifest.json\thashed
c6UVgh3Q10+plWMWDJWEaY9YLvn1d9fEQP18ShFovsrxVI9GtHuxm+zabU9D7UAE2pRvmlE1YN69Kwi0FIF6Cg==
"""
"""What minisign 0.11 found to be the signature of the file below."""

WITH_PASSWORD = (
    "RWRTY0Iy8F8c4hm+023EYw/338r9FkcEd32UOIBQjW//3diabTMAAAACAAAAAAAAAEAAAAAAp0iRBiQS9ECdVzVkeSs8vR1Qvw1xgnv11lTbG+TFPo0t"
    "fusrtGmIqQ+baDC1R58qDk3rluUqeKkzre58FImlRcJnq3fEJOlKLwxil+hGCafkyjCiaCW2dKf7duq8Uo2PqtvzCk/c/ZY="
)
"""A secret key of minisign whose password is "secret"."""

OTHER = "RWSE5UNnk7T52YoMQoDkyRpBOnIAOQvPKg7ZqTaIXzG0PgRwMPbWd14g"
THEIRS = """\
untrusted comment: signature from minisign secret key
RUSE5UNnk7T52aLJFBGxTUo8rC/UF+l5Bhh5nJBmklzaisKFqGS8gdMqPXh4DoE+28gSD5HQFA1XHa0dTUGfKr7BKKoAiDMqMAU=
trusted comment: timestamp:1796061124\tfile:x\thashed
FXkoOY7KRIxHy5PTlQ8KCrOZg731ObLkijhsHnRfghmS9kFuUQHbvnYWQpUPNMVNxzQ7TWBw50pdZMQ7WI+uBQ==
"""
"""By minisign, of the same file, with another key."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A manifest, and no more."""
    pytest.importorskip("cryptography", reason="the extra sign is not installed")
    (tmp_path / "out" / "compot").mkdir(parents=True)
    (tmp_path / "out" / MANIFEST).write_bytes(b'{"a":1}\n')
    return tmp_path / "out"


def key_file(path: Path, line: str) -> Path:
    path.write_text(f"untrusted comment: a key\n{line}\n")
    return path


def test_keys_and_signatures_are_those_of_minisign(folder: Path, tmp_path: Path) -> None:
    sign(folder, read_signing_key(key_file(tmp_path / "plain.key", SECRET)))
    assert (folder / SIGNATURE).read_text() == OURS
    assert signed_by(folder) == NAME
    for given in (PUBLIC, str(key_file(tmp_path / "plain.pub", PUBLIC))):
        assert read_trusted_key(given).name == NAME
        check_signature(folder, read_trusted_key(given))
    (folder / SIGNATURE).write_text(THEIRS)
    check_signature(folder, read_trusted_key(OTHER))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_key_with_a_password_is_read_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_file(tmp_path / "password.key", WITH_PASSWORD)
    monkeypatch.setenv(PASSWORD, "secret")
    sign(folder, read_signing_key(path))
    assert signed_by(folder) == "45A60DC6777607CE"
    monkeypatch.setenv(PASSWORD, "guessed")
    with pytest.raises(InputError, match="is not its own"):
        read_signing_key(path)


def test_a_new_pair_signs_and_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    key = write_keys(tmp_path / "mine")
    assert (tmp_path / "mine.key").stat().st_mode & 0o077 == 0, "nobody else reads the secret"
    sign(folder, read_signing_key(tmp_path / "mine.key"))
    check_signature(folder, read_trusted_key(str(tmp_path / "mine.pub")))
    assert signed_by(folder) == key.name
    assert write_keys(tmp_path / "other") != key
    with pytest.raises(InputError, match="is not replaced"):
        write_keys(tmp_path / "mine")


def changed_by(text: bytes, other: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / SIGNATURE
        assert text in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(text, other))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / MANIFEST).write_bytes(b'{"a":2}\n'), "it was changed since"),
        (lambda folder: (folder / SIGNATURE).unlink(), "nobody signed it"),
        (lambda folder: (folder / SIGNATURE).write_text(THEIRS), "signed with the key D9F9B4936743E584"),
        (changed_by(b"tcY5", b"tcY6"), "it was changed since"),
        (changed_by(b"file:manifest", b"file:nonsense"), "it was changed since"),
        (changed_by(b"GtHuxm", b"GtHuxn"), "it was changed since"),
        (changed_by(b"RUTm9", b"RWTm9"), "no signature of minisign"),
        (changed_by(b"trusted comment: file", b""), "no signature of minisign"),
        (lambda folder: (folder / SIGNATURE).write_bytes(b"\n" * 100), "no signature of minisign"),
        (lambda folder: (folder / SIGNATURE).write_bytes(b""), "no signature of minisign"),
    ],
)
def test_whatever_was_changed_since_is_refused(
    folder: Path, change: Callable[[Path], None], said: str
) -> None:
    (folder / SIGNATURE).write_text(OURS)
    check_signature(folder, read_trusted_key(PUBLIC))
    change(folder)
    with pytest.raises(ArtifactError, match=said):
        check_signature(folder, read_trusted_key(PUBLIC))


@pytest.mark.parametrize(
    "line", ["", "nonsense", PUBLIC, SECRET[:-8] + "AAAA", SECRET.replace("v3cFo", "v3cFp")]
)
def test_what_is_no_secret_key_is_one_sentence(folder: Path, tmp_path: Path, line: str) -> None:
    path = key_file(tmp_path / "a.key", line)
    with pytest.raises(InputError, match=r"a\.key"):
        read_signing_key(path)
    with pytest.raises(InputError, match="no such file"):
        read_signing_key(tmp_path / "none")
    with pytest.raises(InputError, match=r"no public key|no such file|no key"):
        read_trusted_key(line if line == "nonsense" else str(key_file(tmp_path / "b.pub", SECRET)))


def test_without_the_extra_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(MissingDependencyError, match=r"compot-deploy\[sign\]"):
        signature.read_trusted_key(PUBLIC)


def test_an_export_is_signed_and_a_manifest_that_was_written_anew_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cryptography", reason="the extra sign is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    model, out = tiny.save(tmp_path / "tiny", num_hidden_layers=1), tmp_path / "out"
    assert main(["keygen", str(tmp_path / "mine")]) == 0
    key, name = str(tmp_path / "mine.pub"), read_trusted_key(str(tmp_path / "mine.pub")).name
    assert name in capsys.readouterr().out
    deploy(
        str(model),
        method="plain",
        quant="int8",
        samples=2,
        length=32,
        evaluation_tokens=256,
        out=str(out),
        sign=str(tmp_path / "mine.key"),
    )
    assert b"mine" not in (out / MANIFEST).read_bytes(), "where the key lies is nobody's business"

    found = check(out, reference=str(model), trusted_key=key, strict=True)
    assert found.passed and f"The trusted key {name} signed" in to_junit(found.report)
    (unchecked,) = check_signed(out, None)
    assert name in unchecked.sentence and "was not checked" in unchecked.sentence
    # Its report cannot be written again unsigned, and can be with the key.
    with pytest.raises(InputError, match="--sign KEY"):
        write_report_again(out)
    assert main(["report", str(out), "--sign", str(tmp_path / "mine.key")]) == 0
    check_signature(out, read_trusted_key(key))

    manifest = json.loads((out / MANIFEST).read_text())
    sign_again(out, seed=manifest["seed"] + 1)
    verify(out)  # every hash fits
    assert main(["check", str(out), "--reference", str(model), "--trusted-key", key]) == 2
    assert "it was changed since" in capsys.readouterr().err
