"""A gate for CI: the exit code says whether the exported model may be deployed.

The same command is run with a limit that holds and with one that does not. A CI job needs nothing else than the exit
code; ``compot/report.junit.xml`` is what it can show.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from compot_deploy.cli import main as compot_deploy


def quietly(*arguments: str) -> int:
    """Exit code of the command line, its tables kept to itself."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return compot_deploy(arguments)


def main() -> None:
    """One gate that holds, one that does not."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        small = ["--samples", "8", "--length", "128", "--rounds", "5", "--evaluation-tokens", "512"]
        code = quietly("--quant", "int8", "--out", str(folder), *small, "--max-perplexity-ratio", "1.5")
        print(f"int8, at most x 1.5 in perplexity: exit code {code}")
        code_of_check = quietly("check", str(folder), "--min-top1", "0.999")
        print(f"the same folder, 99.9 % of the tokens the same: exit code {code_of_check}")
        print("criteria in compot/report.junit.xml of the export:")
        suite = ElementTree.parse(folder / "compot" / "report.junit.xml").getroot()
        for case in suite.iter("testcase"):
            failed = case.find("failure") is not None
            print(f"  {case.get('name')}: {'failed' if failed else 'passed'}")
        if (code, code_of_check) != (0, 1):
            raise SystemExit(f"expected 0 and 1, got {code} and {code_of_check}")


if __name__ == "__main__":
    main()
