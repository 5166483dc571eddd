"""Recordings of a folder: WAV by the standard library, FLAC by soundfile, brought to the rate that a model hears.

::

    speech/a.wav   sound, of any rate and any number of channels
    speech/a.txt   what is said in it, where that is known
"""

from __future__ import annotations

import hashlib
import math
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from compot_deploy.errors import InputError, first_line

KINDS: Final = (".wav", ".flac")

_SHORTEST: Final = 0.1
"""Seconds."""

_AROUND: Final = 4096
"""Samples of silence around a recording that is resampled: its end must not ring into its beginning."""


@dataclass(frozen=True)
class Recording:
    """Some seconds of one voice.

    Attributes:
        name: of its file.
        samples: shape (samples,), int16, at the rate that the model hears.
        reference: what is said; None where that is not known.
    """

    name: str
    samples: Int16[Tensor, " samples"]
    reference: str | None = None


@dataclass(frozen=True)
class Recordings:
    """The recordings of a folder.

    Attributes:
        found: in the order of their names.
        notes: facts that a report must state: other rates, what was cut off.
    """

    found: tuple[Recording, ...]
    notes: tuple[str, ...]


def files_of(folder: Path) -> tuple[Path, ...]:
    """The sound files of a folder and of those inside it, by name.

    Raises:
        InputError: no folder, or no sound in it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}: give a folder of WAV or FLAC files with speech in them.")
    files = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS))
    if not files:
        raise InputError(f"{folder} has no WAV or FLAC file: give a folder of recordings of speech.")
    return files


def read_recordings(files: Sequence[Path], rate: int, seconds: float) -> Recordings:
    """Read sound files, each brought to one rate.

    Args:
        files: of `files_of`.
        rate: samples per second that the model hears.
        seconds: that it hears at once; what comes after them is not read.

    Raises:
        InputError: a file that is damaged, too short, or silent; a FLAC file, and no soundfile to read it.
    """
    found, rates, cut = [], set(), []
    for path in files:
        values, own = _read(path)
        if own != rate:
            rates.add(own)
            values = resampled(values, own, rate)
        if len(values) > seconds * rate:
            cut.append(path.name)
            values = values[: int(seconds * rate)]
        if len(values) < _SHORTEST * rate:
            raise InputError(f"{path} is shorter than {_SHORTEST} s: leave it out.")
        samples = (values * 32768).round().clamp(-32768, 32767).to(torch.int16)
        if not bool(samples.any()):
            raise InputError(f"{path} is silent: leave it out.")
        found.append(Recording(path.name, samples, _reference(path)))
    notes = []
    if rates:
        notes.append(f"recordings of {', '.join(map(str, sorted(rates)))} Hz were resampled to {rate} Hz")
    if cut:
        notes.append(
            f"{len(cut)} recordings are longer than {seconds:g} s and were cut there (first: {cut[0]})"
        )
    return Recordings(tuple(found), tuple(notes))


def digest_of(recordings: Sequence[Recording]) -> str:
    """sha256 of all samples."""
    digest = hashlib.sha256()
    for recording in recordings:
        digest.update(len(recording.samples).to_bytes(8, "little"))
        digest.update(recording.samples.numpy().tobytes())
    return digest.hexdigest()


def resampled(values: Float[Tensor, " before"], own: int, rate: int) -> Float[Tensor, " after"]:
    """The same sound at another rate: its spectrum cut off or filled up, which is exact for what both rates hold."""
    shared = math.gcd(own, rate)
    unit, made_of_unit = own // shared, rate // shared  # so many samples become so many
    around = math.ceil(_AROUND / unit) * unit
    behind = around + -len(values) % unit
    padded = torch.nn.functional.pad(values.double(), (around, behind))
    length = len(padded) // unit * made_of_unit
    spectrum = torch.fft.rfft(padded)[: length // 2 + 1]
    made = torch.fft.irfft(spectrum, n=length) * (length / len(padded))
    start = around // unit * made_of_unit
    return made[start : start + round(len(values) * rate / own)].float()


def _reference(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8").strip() or None if text.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} cannot be read as text ({error}).") from None


def _read(path: Path) -> tuple[Float[Tensor, " samples"], int]:
    """Samples between -1 and 1, channels averaged, and their rate."""
    values, rate = _with_soundfile(path) if path.suffix.lower() == ".flac" else _wave(path)
    return torch.from_numpy(values.mean(axis=1, dtype=np.float64)).float(), rate


def _wave(path: Path) -> tuple[np.ndarray, int]:
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as WAV ({first_line(error)}). Save it as 16-bit PCM, for example with "
            "sox or ffmpeg."
        ) from None
    whole = raw[: len(raw) // (width * channels) * width * channels]
    if width == 1:
        numbers = np.frombuffer(whole, np.uint8).astype(np.float32) - 128
    elif width == 3:
        parts = np.frombuffer(whole, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(parts), 4), np.uint8)
        wide[:, 1:] = parts
        numbers = (wide.view("<i4")[:, 0] >> 8).astype(np.float32)
    else:
        numbers = np.frombuffer(whole, f"<i{width}").astype(np.float32)
    return numbers.reshape(-1, channels) / float(1 << (8 * width - 1)), rate


def _with_soundfile(path: Path) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        raise InputError(
            f"{path} is FLAC, which needs the package soundfile: pip install soundfile, or convert it to WAV."
        ) from None
    try:
        values, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except Exception as error:  # soundfile's errors are RuntimeErrors of libsndfile
        raise InputError(f"{path} cannot be read as FLAC ({first_line(error)}).") from None
    return values, int(rate)
