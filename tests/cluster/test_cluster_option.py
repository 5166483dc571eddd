"""Bad values of ``--cluster``: one sentence that says what to do, before anything is computed."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

from compot_deploy.cli import main
from compot_deploy.cluster import connection
from compot_deploy.errors import RecipeError
from compot_deploy.recipe import Recipe


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("cluster", ["", "everything", "host:", ":1", "host:0", "host:99999", "ray://host:1"])
def test_what_is_no_cluster_is_refused(cluster: str) -> None:
    with pytest.raises(RecipeError, match=r"give local, auto, or the address"):
        Recipe(cluster=cluster)


def test_without_ray_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, error = said(capsys, "--cluster", "local", "--bits", "2.5", "--out", str(tmp_path / "out"))
    assert code == 4
    assert "--cluster local needs the package ray, which is not installed" in error
    assert error.endswith('pip install "compot-deploy[ray]"')
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_nobody_answers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code, error = said(capsys, "--cluster", address, "--bits", "2.5", "--out", str(tmp_path / "out"))
    assert code == 2 and f"--cluster {address}: nobody answers there" in error
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_something_else_answers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        code, error = said(capsys, "--cluster", address, "--bits", "2.5", "--out", str(tmp_path / "out"))
    assert code == 2 and f"--cluster {address}: what answers there is not Ray" in error


def test_a_cluster_does_not_compute_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from compot_deploy.embedded import MODEL
    from compot_deploy.models.source import open_source
    from compot_deploy.planning.settings import resolve

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match=r"--cluster local computes on processors.*add --device cpu"):
        resolve(Recipe(cluster="local", bits=2.5), open_source(MODEL))
    resolve(Recipe(cluster="local", bits=2.5, device="cpu"), open_source(MODEL))


@pytest.mark.parametrize(
    ("threads", "processors", "told"), [(1, 4, False), (2, 4, False), (4, 4, True), (1, 1, False)]
)
def test_who_gets_one_task_at_a_time_is_told_how_to_get_more(
    monkeypatch: pytest.MonkeyPatch, threads: int, processors: int, told: bool
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(connection, "_processors", lambda: processors)
    assert ("OMP_NUM_THREADS=1" in connection.advice("local")) == told
    assert connection.advice("auto") == connection.advice(None) == ""
