"""Laws of the locks: what the package asks for, once, by hash, for every Python and system; no address."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

EXTRAS = {
    "demo": ("onnx", "report"),
    "dev": ("dev",),
    "docs": ("dev", "docs"),
    "compatibility": ("onnx",),
}
"""Lock to the extras of the package that it installs."""

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
OUTSIDE = ("torch", "triton", "nvidia-", "cuda-")
"""What no lock holds: builds of torch differ by index, and an installed one is left alone."""


@dataclass(frozen=True)
class Pin:
    """One release of a lock.

    Attributes:
        name: in its canonical form.
        version: exactly one.
        marker: where it is installed; None for everywhere.
        hashes: of its files.
    """

    name: str
    version: str
    marker: Marker | None
    hashes: tuple[str, ...]


def pins(lock: str) -> list[Pin]:
    text = (ROOT / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        whole, *hashes = line.split("--hash=sha256:")
        match = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)(?: ; (.*))?", whole.strip())
        assert match is not None, line[:120]
        found.append(
            Pin(match[1], match[2], Marker(match[3]) if match[3] else None, tuple(h.strip() for h in hashes))
        )
    return found


def environments() -> Iterator[dict[str, str]]:
    for python, (system, name) in itertools.product(PYTHONS, SYSTEMS.items()):
        yield {
            "python_version": python,
            "python_full_version": f"{python}.9",
            "sys_platform": system,
            "platform_system": name,
            "platform_machine": {"linux": "x86_64", "darwin": "arm64", "win32": "AMD64"}[system],
            "platform_python_implementation": "CPython",
            "implementation_name": "cpython",
            "os_name": "nt" if system == "win32" else "posix",
        }


def wanted(extras: tuple[str, ...]) -> Iterator[Requirement]:
    """Requirements of the package with some of its extras, extras of extras included."""
    project = PROJECT["project"]
    lines = [
        *project["dependencies"],
        *(line for e in extras for line in project["optional-dependencies"][e]),
    ]
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            yield from wanted(tuple(sorted(requirement.extras)))
        else:
            yield requirement


def installed(lock: str, environment: Mapping[str, str]) -> dict[str, list[Pin]]:
    result: dict[str, list[Pin]] = {}
    for pin in pins(lock):
        if pin.marker is None or pin.marker.evaluate(dict(environment)):
            result.setdefault(pin.name, []).append(pin)
    return result


def unmet(lock: str, extras: tuple[str, ...], environment: dict[str, str]) -> list[str]:
    """Requirements that the releases of a lock do not meet there, and releases that are there twice."""
    there = installed(lock, environment)
    wrong = [f"{name} twice" for name, found in there.items() if len(found) > 1]
    for requirement in wanted(extras):
        name = canonicalize_name(requirement.name)
        if name in OUTSIDE or (requirement.marker and not requirement.marker.evaluate(environment)):
            continue
        found = there.get(name, [])
        if not found or not requirement.specifier.contains(found[0].version, prereleases=True):
            wrong.append(f"{requirement} is not met by {found[0].version if found else 'anything'}")
    return wrong


@pytest.mark.parametrize("lock", [*EXTRAS, "genai"])
def test_every_release_is_named_with_its_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    for address in ("://", "index-url", "find-links", "trusted-host", " @ ", "/"):
        assert address not in text, address
    for pin in pins(lock):
        assert pin.hashes and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in pin.hashes), pin.name
        assert not pin.name.startswith(OUTSIDE), f"{pin.name} comes with torch: add it to no-emit-package"
        assert pin.name != PROJECT["project"]["name"]


@pytest.mark.parametrize(("lock", "extras"), EXTRAS.items(), ids=EXTRAS)
def test_a_lock_meets_the_package_on_every_python_and_system(lock: str, extras: tuple[str, ...]) -> None:
    assert {str(e): found for e in environments() if (found := unmet(lock, extras, e))} == {}
    for environment in environments():
        assert "setuptools" in installed(lock, environment)  # it is built without asking for more


def test_an_outdated_lock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `unmet` says when pyproject.toml has moved on and nobody ran `make lock`."""
    monkeypatch.setitem(PROJECT["project"], "dependencies", ["numpy>=99", "not-locked", "rich>=13"])
    found = unmet("demo", (), next(environments()))
    assert (
        len(found) == 2
        and "numpy>=99 is not met by" in found[0]
        and "not-locked is not met by anything" in found[1]
    )


def test_locks_of_one_environment_agree() -> None:
    for environment in environments():
        most = installed("docs", environment)
        for lock in ("demo", "dev"):
            assert {n: f[0].version for n, f in installed(lock, environment).items()}.items() <= {
                n: f[0].version for n, f in most.items()
            }.items()


def test_one_release_of_torch_is_named_everywhere() -> None:
    (constraint,) = PROJECT["tool"]["uv"]["constraint-dependencies"]
    version = constraint.removeprefix("torch==")
    assert re.search(rf"^TORCH = {re.escape(version)}$", MAKEFILE, re.MULTILINE)
    action: Any = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    assert set(re.findall(r"torch==([\d.]+)", str(action))) == {version}
    assert all(
        requirement.specifier.contains(version)
        for requirement in wanted(("dev",))
        if requirement.name == "torch"
    )


def test_next_majors_of_what_changes_most_are_kept_out() -> None:
    for extras in PROJECT["project"]["optional-dependencies"]:
        for requirement in wanted((extras,)):
            for name, major in {
                "transformers": 6,
                "torch": 3,
                "onnx": 2,
                "onnxruntime": 2,
                "onnxruntime-gpu": 2,
            }.items():
                if requirement.name == name:
                    assert not requirement.specifier.contains(f"{major}.0.0"), requirement


def test_every_lock_is_written_by_make_lock_and_installed_by_hash() -> None:
    recipe = re.search(r"^lock:\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    written = set(re.findall(r"-o locks/(\w+)\.txt", recipe[1]))
    assert written == {path.stem for path in (ROOT / "locks").glob("*.txt")} == {*EXTRAS, "genai"}
    for line in MAKEFILE.splitlines():
        if re.search(r"pip install .*(locks/|\$<)", line):
            assert "--no-deps --require-hashes" in line
