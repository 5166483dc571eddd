"""Run a program in a child process that tells every host it looked up, every connection, and every file in its home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOOK = """
import os, sys
def _tell(event, arguments):
    if event in {
        "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.connect", "socket.sendto",
        "socket.sendmsg", "webbrowser.open", "urllib.Request",
    }:
        line = f"python {event} {arguments[-1]!r}\\n".encode()
        file = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line)
        os.close(file)
sys.addaudithook(_tell)
"""

# What compiled libraries do is not seen by Python: the same calls of the C library, told before they are made.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static void tell(const char *what, const char *whom) {
  int file = open(getenv("WATCHED"), O_WRONLY | O_APPEND | O_CREAT, 0600);
  char line[300] = "native ";
  strncat(line, what, 20); strncat(line, " ", 2); strncat(line, whom ? whom : "", 250); strncat(line, "\\n", 2);
  if (write(file, line, strlen(line)) < 0) abort();
  close(file);
}
int getaddrinfo(const char *n, const char *s, const struct addrinfo *h, struct addrinfo **r) {
  tell("getaddrinfo", n);
  return ((int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))
          dlsym(RTLD_NEXT, "getaddrinfo"))(n, s, h, r);
}
int connect(int f, const struct sockaddr *a, socklen_t l) {
  if (a->sa_family == AF_INET || a->sa_family == AF_INET6) tell("connect", "");
  return ((int (*)(int, const struct sockaddr *, socklen_t)) dlsym(RTLD_NEXT, "connect"))(f, a, l);
}
"""


@dataclass(frozen=True)
class Watched:
    """What a program did.

    Attributes:
        code: how it ended.
        output: standard output and standard error.
        network: a line for each look-up and each connection.
        home: what lies in its home directory now.
    """

    code: int
    output: str
    network: tuple[str, ...]
    home: tuple[str, ...]


def watch(program: str, folder: Path, environment: Mapping[str, str] | None = None) -> Watched:
    """Run a Python program with a new home directory below `folder`, and nothing set that silences libraries.

    Compiled code is watched too where there is a C compiler and a loader that preloads.
    """
    home, log = folder / "home", folder / "network.txt"
    home.mkdir(parents=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "ORT_", "XDG_", "DO_NOT_")) and name != "HOME"
    }
    values = {**kept, "HOME": str(home), "USERPROFILE": str(home), "WATCHED": str(log), **(environment or {})}
    shim = _shim(folder)
    if shim is not None:
        values["LD_PRELOAD"] = str(shim)
    done = subprocess.run(
        [sys.executable, "-c", HOOK + program],
        env=values,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    network = log.read_text().splitlines() if log.exists() else []
    lying = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    return Watched(done.returncode, done.stdout, tuple(network), tuple(lying))


def _shim(folder: Path) -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
