"""``python -m compot_deploy.serving PATH``: serve until told to stop, by Ctrl-C or SIGTERM; then the exit code is 0."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from compot_deploy.errors import EXIT_OK, CompotDeployError
from compot_deploy.serving.engines import open_model
from compot_deploy.serving.generation import Service
from compot_deploy.serving.server import Server

_LOOK_SECONDS = 0.25  # between two looks at whether a signal has come


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns an exit code."""
    given = _parser().parse_args(arguments)
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # it warns of the process for templates otherwise
    signals: list[int] = []
    loading = True

    def told(number: int, frame: object) -> None:
        signals.append(number)
        if loading:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        opened = open_model(given.path, threads=given.threads, context=given.context)
        with contextlib.closing(Service(opened, given.name)) as service:
            with Server(service, given.host, given.port, given.allow_host) as server:
                sys.stdout.write(f"{service.name} on {server.url}\n")
                sys.stdout.flush()
                loading = False
                server.timeout = _LOOK_SECONDS
                while not signals:
                    server.handle_request()
            if not server.stop():
                os._exit(EXIT_OK)  # a thread is inside the runtime, whose memory cannot be freed under it
    except CompotDeployError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_OK
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compot_deploy.serving",
        description="Serve a GGUF file or an exported ONNX folder in the manner of OpenAI's API.",
    )
    parser.add_argument(
        "path", type=Path, help="a GGUF file of any layout, a folder with exactly one, or an ONNX folder"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8080, help="0 takes any free one (default: 8080)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="of the runtime (default: 1)")
    parser.add_argument("--context", type=int, default=None, help="positions to keep (default: up to 4096)")
    parser.add_argument("--name", default=None, help="id of the model (default: the name of its file)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name that clients use, besides addresses and localhost; may be repeated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
