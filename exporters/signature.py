"""Signatures of manifests: who can change a folder can write its hashes anew, and cannot sign them.

The format is minisign's (https://jedisct1.github.io/minisign/), so that anybody can make keys and verify without this
package: ``minisign -Vm compot/manifest.json -P KEY``. Keys and signatures are a comment and a line of base64::

    public key   "Ed" | id, 8 | key, 32
    secret key   "Ed" | "Sc" or two zeros | "B2" | salt, 32 | operations, 8 | memory, 8 |
                 (id, 8 | seed, 32 | key, 32 | sum, 32)
    signature    "ED" | id, 8 | Ed25519 of the BLAKE2b-512 hash of the file, 64
                 and of that signature with the trusted comment, 64

The bracket of a secret key is XORed with what scrypt makes of a password, where it has one ("Sc"); its sum, the
BLAKE2b-256 hash of "Ed", id, seed and key, is zeros in keys of minisign without a password, so that the key itself is
held against the seed. Signatures are of the manifest, which has the hash of every other file. They
hold no time: the same folder and key give the same bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compot_deploy.core.disk import disk_errors
from compot_deploy.core.store import write_text
from compot_deploy.errors import ArtifactError, InputError, MissingDependencyError
from compot_deploy.exporters.manifest import MANIFEST, SIGNATURE

PASSWORD: Final = "COMPOT_DEPLOY_SIGN_PASSWORD"
"""Environment variable with the password of a secret key that has one."""

_COMMENT: Final = "untrusted comment: "
_TRUSTED: Final = "trusted comment: "
_LARGEST: Final = 1 << 14
"""Bytes: keys and signatures have less than 400."""

_MOST_MEMORY: Final = 1 << 31
"""Bytes that scrypt may take; minisign's keys ask for half of it."""


@dataclass(frozen=True)
class TrustedKey:
    """A public key whose signatures are believed.

    Attributes:
        id: eight bytes by which a signature names it.
        public: the key, 32 bytes.
    """

    id: bytes
    public: bytes

    @property
    def name(self) -> str:
        """Its id as minisign prints it."""
        return _name(self.id)


@dataclass(frozen=True)
class SigningKey:
    """A secret key.

    Attributes:
        id: eight bytes by which signatures name it.
        seed: the key, 32 bytes.
    """

    id: bytes
    seed: bytes


def read_trusted_key(given: str) -> TrustedKey:
    """A public key, from a file or as minisign prints it on the line.

    Raises:
        InputError: neither.
        MissingDependencyError: signatures cannot be checked here.
    """
    _ed25519()
    text = given
    if Path(given).is_file() or not _is_base64(given):
        text = _key_line(Path(given), "--trusted-key")
    raw = _decoded(text, 42)
    if raw is None or raw[:2] != b"Ed":
        raise InputError(
            f"--trusted-key {given}: this is no public key of minisign. Give its file (NAME.pub), or its line that "
            "begins with RW."
        )
    return TrustedKey(raw[2:10], raw[10:])


def read_signing_key(path: Path) -> SigningKey:
    """A secret key from its file; the password of one that has it is in the environment.

    Raises:
        InputError: not a secret key, or the password is missing or wrong.
        MissingDependencyError: nothing can be signed here.
    """
    private, _ = _ed25519()
    raw = _decoded(_key_line(path, "--sign"), 158)
    if raw is None or raw[:2] != b"Ed" or raw[4:6] != b"B2" or raw[2:4] not in (b"Sc", b"\0\0"):
        raise InputError(
            f"--sign {path}: this is no secret key of minisign. Make one with: compot-deploy keygen NAME"
        )
    secret = raw[54:]
    if raw[2:4] == b"Sc":
        stream = _stream(path, raw[6:38], *(int.from_bytes(raw[i : i + 8], "little") for i in (38, 46)))
        secret = bytes(one ^ other for one, other in zip(secret, stream, strict=True))
    key_id, seed, public = secret[:8], secret[8:40], secret[40:72]
    if private.from_private_bytes(seed).public_key().public_bytes_raw() != public:
        reason = f"the password in {PASSWORD} is not its own" if raw[2:4] == b"Sc" else "the file is damaged"
        raise InputError(f"--sign {path}: the key cannot be read; {reason}.")
    return SigningKey(key_id, seed)


def write_keys(path: Path) -> TrustedKey:
    """Make a new pair: `path` with ``.key`` behind it, which is secret, and with ``.pub``, which is for everybody.

    The secret key has no password, so that machines can use it: keep it where secrets are kept.

    Raises:
        InputError: one of the files is there, or cannot be written.
        MissingDependencyError: nothing can be signed here.
    """
    private, _ = _ed25519()
    secret, public = (path.with_name(path.name + ending) for ending in (".key", ".pub"))
    there = next((one for one in (secret, public) if one.exists()), None)
    if there is not None:
        raise InputError(
            f"{there} is there already: a key that signed something is not replaced. Choose another name."
        )
    key_id, seed = os.urandom(8), os.urandom(32)
    key = TrustedKey(key_id, private.from_private_bytes(seed).public_key().public_bytes_raw())
    plain = b"Ed\0\0B2" + bytes(48) + key_id + seed + key.public + _sum(key_id, seed, key.public)
    with disk_errors(secret):
        secret.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{_COMMENT}minisign secret key {key.name}\n{_encoded(plain)}\n")
        write_text(public, f"{_COMMENT}minisign public key {key.name}\n{_encoded(_line(key))}\n")
    return key


def sign(folder: Path, key: SigningKey) -> None:
    """Sign the manifest of a folder as it is now."""
    private, _ = _ed25519()
    secret = private.from_private_bytes(key.seed)
    signature = secret.sign(_hash(folder / MANIFEST))
    comment = f"file:{Path(MANIFEST).name}\thashed"
    lines = (
        f"{_COMMENT}signature from the key {_name(key.id)}",
        _encoded(b"ED" + key.id + signature),
        _TRUSTED + comment,
        _encoded(secret.sign(signature + comment.encode())),
    )
    write_text(folder / SIGNATURE, "".join(f"{line}\n" for line in lines))


def signed_by(folder: Path) -> str | None:
    """The name of the key that a folder says it is signed with, which anybody may write; None where it says nothing."""
    try:
        parts = _parts(folder / SIGNATURE)
    except FileNotFoundError:
        return None
    return None if parts is None else _name(parts.id)


def check_signature(folder: Path, key: TrustedKey) -> None:
    """Refuse a folder whose manifest the key has not signed as it stands.

    Raises:
        ArtifactError: there is no signature, it is of another key, or of another manifest.
        MissingDependencyError: signatures cannot be checked here.
    """
    _, public = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        parts = _parts(folder / SIGNATURE)
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} has no {SIGNATURE}: nobody signed it, and --trusted-key asks for the signature of {key.name}."
        ) from None
    if parts is None:
        raise ArtifactError(
            f"{folder / SIGNATURE} is no signature of minisign, or damaged. Get the folder again."
        )
    if parts.id != key.id:
        raise ArtifactError(
            f"{folder} is signed with the key {_name(parts.id)}, and --trusted-key asks for {key.name}: do not use it, "
            "unless you know that other key."
        )
    trusted = public.from_public_bytes(key.public)
    try:
        trusted.verify(parts.signature, _hash(folder / MANIFEST))
        trusted.verify(parts.of_comment, parts.signature + parts.comment)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {MANIFEST}: give a folder that compot-deploy wrote.") from None
    except InvalidSignature:
        raise ArtifactError(
            f"{folder / MANIFEST} is not what the key {key.name} signed: it was changed since. Do not use the folder; "
            "get it again from whoever signed it."
        ) from None


@dataclass(frozen=True)
class _Signature:
    """The parts of a signature, unchecked."""

    id: bytes
    signature: bytes
    comment: bytes
    of_comment: bytes


def _parts(path: Path) -> _Signature | None:
    """A signature's parts; None for what is none.

    Raises:
        FileNotFoundError: there is no such file.
    """
    lines = _lines(path)
    if lines is None or len(lines) < 4 or not lines[2].startswith(_TRUSTED.encode()):
        return None
    first, second = (_decoded(lines[i].decode("ascii", "replace"), size) for i, size in ((1, 74), (3, 64)))
    if first is None or second is None or first[:2] != b"ED":
        return None
    return _Signature(first[2:10], first[10:], lines[2][len(_TRUSTED) :], second)


def _key_line(path: Path, flag: str) -> str:
    """The line of base64 in the file of a key.

    Raises:
        InputError: there is no such file, or it has no second line.
    """
    try:
        lines = _lines(path)
    except FileNotFoundError:
        raise InputError(f"{flag} {path}: there is no such file.") from None
    if lines is None or len(lines) < 2:
        raise InputError(f"{flag} {path}: this is no key of minisign.")
    return lines[1].decode("ascii", "replace")


def _lines(path: Path) -> list[bytes] | None:
    """Lines of a small file; None where it cannot be read.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            return [line.rstrip(b"\r") for line in file.read(_LARGEST).split(b"\n")]
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        return None


def _stream(path: Path, salt: bytes, operations: int, memory: int) -> bytes:
    """What the bracket of a secret key is XORed with; costs as libsodium chooses them for scrypt."""
    password = os.environ.get(PASSWORD)
    if password is None:
        raise InputError(f"--sign {path}: the key has a password. Put it into the variable {PASSWORD}.")
    operations, block = max(operations, 1 << 15), 8
    by_operations = operations < memory // 32
    most = operations // (4 * block) if by_operations else memory // (128 * block)
    n = 1 << max(1, (most // 2).bit_length())
    parallel = 1 if by_operations else max(1, min(operations // 4 // n, 0x3FFFFFFF) // block)
    try:
        return hashlib.scrypt(
            password.encode(), salt=salt, n=n, r=block, p=parallel, maxmem=_MOST_MEMORY - 1, dklen=104
        )
    except (ValueError, MemoryError, OverflowError):
        raise InputError(
            f"--sign {path}: its password costs more than {_MOST_MEMORY >> 30} GiB to try. Make a key without one: "
            "minisign -G -W, or compot-deploy keygen NAME."
        ) from None


def _ed25519() -> tuple[Any, Any]:
    """Classes of secret and of public keys.

    Raises:
        MissingDependencyError: the extra is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    except ImportError:
        raise MissingDependencyError("cryptography", "sign", "A signature") from None
    return Ed25519PrivateKey, Ed25519PublicKey


def _hash(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes()).digest()


def _sum(key_id: bytes, seed: bytes, public: bytes) -> bytes:
    return hashlib.blake2b(b"Ed" + key_id + seed + public, digest_size=32).digest()


def _line(key: TrustedKey) -> bytes:
    return b"Ed" + key.id + key.public


def _name(key_id: bytes) -> str:
    return f"{int.from_bytes(key_id, 'little'):016X}"


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decoded(line: str, size: int) -> bytes | None:
    """Base64 of so many bytes; None for anything else."""
    try:
        raw = base64.b64decode(line, validate=True)
    except (ValueError, binascii.Error):
        return None
    return raw if len(raw) == size else None


def _is_base64(text: str) -> bool:
    return _decoded(text, 42) is not None
