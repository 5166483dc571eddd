"""Laws of recordings: every way of storing sound is the same sound, so is another rate; bad files are named."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import spoken
import torch

from compot_deploy.errors import InputError
from compot_deploy.models.audio import files_of, read_recordings, resampled

RATE = spoken.RATE


def tone(rate: int, seconds: float = 0.5, pitch: float = 700.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("own", [8000, 22050, 44100, 48000])
def test_a_resampled_tone_is_the_tone_at_the_other_rate(own: int) -> None:
    made = resampled(torch.from_numpy(tone(own)).float(), own, RATE)
    expected = torch.from_numpy(tone(RATE)).float()
    assert abs(len(made) - len(expected)) <= 1
    inner = slice(800, len(expected) - 800)  # the tone begins and ends at once, which no rate holds
    assert float((made[inner] - expected[inner]).abs().max()) < 5e-3


def test_pitches_that_the_lower_rate_cannot_hold_are_gone() -> None:
    made = resampled(torch.from_numpy(tone(44100, pitch=12_000)).float(), 44100, RATE)
    assert float(made[800:-800].abs().max()) < 5e-3


def _stored(path: Path, width: int, channels: int) -> Path:
    values = (tone(RATE) * 0.9).repeat(channels)
    largest = (1 << (8 * width - 1)) - 1
    numbers = np.round(values * largest).astype(np.int64)
    if width == 1:
        raw = (numbers + 128).astype(np.uint8).tobytes()
    elif width == 3:
        raw = b"".join(struct.pack("<i", int(number))[:3] for number in numbers)
    else:
        raw = numbers.astype(f"<i{width}").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(RATE)
        file.writeframes(raw)
    return path


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 2), (3, 1), (3, 2), (4, 1)])
def test_every_width_and_number_of_channels_holds_the_same_sound(
    width: int, channels: int, tmp_path: Path
) -> None:
    paths = [_stored(tmp_path / "a.wav", 2, 1), _stored(tmp_path / "b.wav", width, channels)]
    first, second = read_recordings(paths, RATE, 30.0).found
    assert len(first.samples) == len(second.samples)
    difference = (first.samples.int() - second.samples.int()).abs().max()
    assert int(difference) <= (300 if width == 1 else 2)


def test_a_recording_comes_with_what_is_said_and_notes_of_what_was_done(tmp_path: Path) -> None:
    spoken.record(tmp_path, 2, rate=8000)
    (tmp_path / "1.txt").unlink()
    read = read_recordings(files_of(tmp_path), RATE, 0.6)
    assert [one.reference is None for one in read.found] == [False, True]
    assert all(len(one.samples) <= 0.6 * RATE for one in read.found)
    assert any("8000 Hz were resampled to 16000 Hz" in note for note in read.notes)
    assert any("longer than 0.6 s" in note for note in read.notes)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"RIFF no wave", "cannot be read as WAV"),
        (b"", "cannot be read as WAV"),
        (None, "is silent"),
        (0.01, "is shorter than"),
    ],
)
def test_what_is_no_recording_is_refused_by_name(
    content: bytes | float | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        spoken.write_wave(path, np.zeros(RATE) if content is None else tone(RATE, content), RATE)
    with pytest.raises(InputError, match=f"odd.wav .*{sentence}"):
        read_recordings([path], RATE, 30.0)


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no WAV or FLAC"):
        files_of(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        files_of(tmp_path / "nowhere")
