"""Laws of memory: what a machine has no room for is refused before any work, with the option that lowers it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from compot_deploy.core.memory import free_memory
from compot_deploy.errors import InputError
from compot_deploy.models.source import open_source
from compot_deploy.pipeline import memory
from compot_deploy.pipeline.memory import check_memory, need_of
from compot_deploy.planning.settings import resolve
from compot_deploy.recipe import Recipe


def test_a_model_as_deep_as_another_needs_as_much_and_a_wider_one_more(tmp_path: Path) -> None:
    needs = [
        need_of(open_source(tiny.save(tmp_path / name, "llama", **changes)))
        for name, changes in (
            ("small", {"num_hidden_layers": 1}),
            ("deep", {"num_hidden_layers": 4}),
            ("wide", {"num_hidden_layers": 1, "intermediate_size": 4096}),
        )
    ]
    assert needs[0].fixed == needs[1].fixed and needs[2].fixed > needs[0].fixed + 8 * 4 * 4096**2
    hidden = open_source(tmp_path / "small").settings.hidden_size
    assert 4 * hidden <= needs[0].per_token <= 5 * hidden


def test_what_does_not_fit_says_what_it_needs_and_what_lowers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny.save(tmp_path / "model", "llama", num_hidden_layers=1))
    settings = resolve(Recipe(method="plain", samples=10_000, length=256), source)
    need = replace(need_of(source), checking=0)
    monkeypatch.setattr(memory, "need_of", lambda _: need)
    for there in (None, need.of(2_560_000)):
        monkeypatch.setattr(memory, "free_memory", lambda there=there: there)
        check_memory(settings)
    monkeypatch.setattr(memory, "free_memory", lambda: need.fixed + 256_001 * need.per_token)
    with pytest.raises(InputError, match=r"model needs about .* GiB of memory here, .* tokens, and") as error:
        check_memory(settings)
    assert "--samples 1000 or less" in str(error.value)
    lower = resolve(Recipe(method="plain", samples=1000, length=256), source)
    check_memory(lower)
    monkeypatch.setattr(memory, "free_memory", lambda: need.fixed // 2)
    with pytest.raises(InputError, match="a machine with more memory"):
        check_memory(lower)


def test_containers_limits_and_systems_that_do_not_say_are_known(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert free_memory(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5000 kB\nSwapFree: 1000 kB\n")
    assert free_memory(tmp_path) == 6000 * 1024
    limits = tmp_path / "sys/fs/cgroup"
    (limits / "memory").mkdir(parents=True)
    (limits / "memory.max").write_text("max\n")
    (limits / "memory/memory.limit_in_bytes").write_text("4096\n")
    assert free_memory(tmp_path) == 4096
    (tmp_path / "proc/meminfo").write_text("nothing")
    assert free_memory(tmp_path) is None
    here = free_memory()
    assert here is None or here > 2**20
    assert re.match(r"0\.5 GiB", memory._size(2**29))
