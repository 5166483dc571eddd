"""What came of a command, in the terminal: a report as tables, an overview as one."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from compot_deploy.cli.output import print_table
from compot_deploy.errors import EXIT_GATE_FAILED, EXIT_OK
from compot_deploy.pipeline.check import Deployment
from compot_deploy.report import inspection
from compot_deploy.report.document import verdict
from compot_deploy.report.tables import tables


def show(deployment: Deployment, out: Console) -> int:
    """Print a report; returns the exit code."""
    for table in tables(deployment.report):
        print_table(out, table.title, table.columns, table.rows)
        for note in table.notes:
            out.print(Text(f"  {note}"), style="dim")
    out.print(Text(f"{deployment.folder}: {verdict(deployment.report)}"), style="bold")
    return EXIT_OK if deployment.passed else EXIT_GATE_FAILED


def print_overview(out: Console, overview: inspection.Overview) -> None:
    """Print a table with lines below it."""
    print_table(out, overview.title, overview.columns, overview.rows)
    for line in overview.lines:
        out.print(Text(line))
