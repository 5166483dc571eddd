"""argv → Recipe → pipeline → printed report. The only file that prints.

::

    compot-deploy [MODEL] --quant int4 --format onnx [--out DIR]    compress, export, check
    compot-deploy plan MODEL --bits 2.2                             what would be chosen, and what it costs
    compot-deploy check DIR                                         check an exported folder again
    compot-deploy report DIR                                        write its report.html again
    compot-deploy inspect DIR                                       what is in it, layer by layer
    compot-deploy run DIR -p "prompt"                               text from it, with tokens per second
    compot-deploy serve DIR                                         the same in a browser, which runs the model

Exit codes: 0 done and gate passed · 1 gate failed (the folder is kept, marked) · 2 bad usage or input ·
3 unsupported model · 4 missing runtime or extra · 75 interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from compot_deploy import __version__
from compot_deploy.cli.serve import DEFAULT_PORT, PageServer
from compot_deploy.errors import (
    EXIT_GATE_FAILED,
    EXIT_OK,
    CompotDeployError,
    InterruptedRunError,
    RecipeError,
)
from compot_deploy.pipeline.deploy import plan_only, run
from compot_deploy.pipeline.evaluation import HTML, Deployment, check_folder, write_check, write_report_again
from compot_deploy.pipeline.generate import generate
from compot_deploy.pipeline.traced import (
    TracedDeployment,
    check_traced,
    deploy_traced,
    is_traced,
    is_traced_folder,
)
from compot_deploy.pipeline.traced import overview as traced_overview
from compot_deploy.recipe import Recipe, default_of, knob_type, knobs, recipe_from_mapping
from compot_deploy.report import inspection
from compot_deploy.report import plan as plan_report
from compot_deploy.report.document import verdict
from compot_deploy.report.gate import Demands, GateFile, parse_growth, read_baseline, read_gate
from compot_deploy.report.summary import STEP_SUMMARY, to_summary, write_summary
from compot_deploy.report.tables import tables

_GROUPS: Final = {
    "model": "what and where",
    "size": "size",
    "method": "method",
    "calibration": "calibration",
    "output": "output",
    "gate": "check and gate",
}

_PROSE: Final = ("Greedy text", "Structure", "Gate")
"""Tables that are read, not compared down a column."""

_TRACED_LIMITS: Final = frozenset(("min_cosine", "max_export_nmse"))
"""Knobs of check for a model that was traced."""

_EXIT_CODES: Final = (
    "exit codes: 0 done and gate passed, 1 gate failed, 2 bad usage or input, 3 unsupported model, "
    "4 missing runtime or extra, 75 interrupted (the same command resumes)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    out, err = _console(sys.stdout), _console(sys.stderr)
    command: Callable[[list[str], Console, Console], int] = _deploy
    if arguments and arguments[0] in _COMMANDS:
        command = _COMMANDS[arguments.pop(0)]
    requests: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        requests.append(signum)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _quiet_libraries()
        return command(arguments, out, err)
    except CompotDeployError as error:
        err.print(Text(f"compot-deploy: {error}"), style="bold red" if err.is_terminal else "")
        return error.exit_code
    except KeyboardInterrupt:
        err.print("compot-deploy: Interrupted; the same command goes on with what is finished.")
        return InterruptedRunError.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception:
        # Libraries written in C may answer an interruption with an exception of their own.
        if not requests:
            raise
        err.print("compot-deploy: Interrupted; the same command goes on with what is finished.")
        return InterruptedRunError.exit_code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- commands ------------------------------------------------------------------------------------------


def _deploy(arguments: list[str], out: Console, err: Console) -> int:
    recipe = parse_recipe(arguments)
    if recipe.model is None:
        err.print(
            "No model given: using the small model that ships with compot-deploy (1.6M parameters, trained on "
            "Python's documentation)."
        )
    if is_traced(recipe):
        with _bars(err) as progress:
            deployment = deploy_traced(recipe, progress)
        return _show_traced(deployment, out)
    with _bars(err) as progress:
        deployments = run(recipe, progress)
    return max((_show(deployment, out) for deployment in deployments), default=EXIT_OK)


def _plan(arguments: list[str], out: Console, err: Console) -> int:
    parser = _recipe_parser(
        "compot-deploy plan", "Show what a budget would be spent on, layer by layer, and export nothing."
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--plot", type=Path, help="also draw predicted loss against bytes (needs matplotlib)")
    options = parser.parse_args(arguments)
    as_json, picture = options.json, options.plot
    del options.json, options.plot
    if options.allocation in (None, "auto"):
        options.allocation = "knapsack"
    recipe = _recipe_of(options)
    with _bars(err) as progress:
        planned = plan_report.Planned(recipe.model or "the model that ships", plan_only(recipe, progress))
    if picture is not None:
        plan_report.plot(planned, picture)
    if as_json:
        out.print_json(plan_report.as_json(planned))
        return EXIT_OK
    _print_overview(out, plan_report.overview(planned))
    return EXIT_OK


def _check(arguments: list[str], out: Console, err: Console) -> int:
    parser = _Parser(
        prog="compot-deploy check", description="Check an exported folder again.", epilog=_EXIT_CODES
    )
    parser.add_argument("folder", type=Path, help="a folder that compot-deploy wrote")
    parser.add_argument("--reference", help="original model, where it is no longer where the recipe says")
    parser.add_argument("--gate", type=Path, help="TOML file of limits; flags win over it")
    parser.add_argument(
        "--baseline", type=Path, help="report.json (or folder) of a good run, which may not be outgrown"
    )
    parser.add_argument(
        "--max-growth",
        help="growth of KL divergence and bytes over the baseline, 5%% or 0.05 (default: 10%% and 2%%)",
    )
    parser.add_argument(
        "--report-dir", type=Path, help="also write report.html, report.json and JUnit XML there"
    )
    parser.add_argument(
        "--summary",
        type=Path,
        help=f"write a Markdown summary there (default: add it to ${STEP_SUMMARY}, where that is set)",
    )
    _add_knobs(parser, only={"max_perplexity_ratio", "max_kl", "min_top1", "max_export_nmse", "min_cosine"})
    values = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    folder, reference = values.pop("folder"), values.pop("reference", None)
    traced = is_traced_folder(folder)
    alien = sorted(values.keys() - _TRACED_LIMITS if traced else values.keys() & {"min_cosine"})
    if alien:
        kind = "the cosine of its embeddings" if traced else "perplexity and KL divergence"
        raise RecipeError(
            f"--{alien[0].replace('_', '-')} does not apply to {folder}: it is judged by {kind}. Leave it out."
        )
    if traced:
        with _bars(err) as progress:
            return _show_traced(
                check_traced(folder, reference=reference, limits=values, progress=progress), out
            )
    report_dir, summary = values.pop("report_dir", None), values.pop("summary", None)
    demands = _demands(values.pop("gate", None), values.pop("baseline", None), values.pop("max_growth", None))
    with _bars(err) as progress:
        deployment = check_folder(
            folder, reference=reference, limits=values, demands=demands, progress=progress
        )
    if report_dir is not None:
        write_check(report_dir, deployment.report)
    if summary is not None:
        write_summary(to_summary(deployment.report, demands), summary, append=False)
    elif os.environ.get(STEP_SUMMARY):
        text = to_summary(deployment.report, demands)
        write_summary(text, Path(os.environ[STEP_SUMMARY]), append=True)
    return _show(deployment, out)


def _demands(gate: Path | None, baseline: Path | None, max_growth: str | None) -> Demands:
    return Demands(
        gate=GateFile() if gate is None else read_gate(gate),
        baseline=None if baseline is None else read_baseline(baseline),
        baseline_name=f"The baseline {baseline}",
        max_growth=None if max_growth is None else parse_growth(max_growth, "--max-growth"),
    )


def _report(arguments: list[str], out: Console, err: Console) -> int:
    parser = _Parser(
        prog="compot-deploy report",
        description="Write report.html, the model card and JUnit XML of an exported folder again, from the figures in "
        "its report.json; nothing is measured.",
    )
    parser.add_argument("folder", type=Path, help="a folder that compot-deploy wrote")
    folder = parser.parse_args(arguments).folder
    report = write_report_again(folder)
    out.print(Text(f"{folder / HTML}: {verdict(report)}"))
    return EXIT_OK


def _inspect(arguments: list[str], out: Console, err: Console) -> int:
    parser = _Parser(prog="compot-deploy inspect", description="Show what is in an exported folder.")
    parser.add_argument("folder", type=Path, help="a folder that compot-deploy wrote")
    parser.add_argument("--json", action="store_true", help="print the manifest's matrices as JSON")
    options = parser.parse_args(arguments)
    if options.json:
        out.print_json(inspection.as_json(options.folder))
        return EXIT_OK
    _print_overview(out, inspection.overview(options.folder))
    return EXIT_OK


def _run(arguments: list[str], out: Console, err: Console) -> int:
    parser = _Parser(
        prog="compot-deploy run", description="Generate text from an exported folder or GGUF file."
    )
    parser.add_argument("path", type=Path, help="a folder that compot-deploy wrote, or a GGUF file")
    parser.add_argument("-p", "--prompt", required=True, help="text to continue")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="most tokens to add (default: 64)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="of the runtime (default: 1)")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.threads < 1:
        raise RecipeError("--tokens and --threads: give at least 1.")
    generated = generate(options.path, options.prompt, tokens=options.tokens, threads=options.threads)
    out.print(Text(options.prompt + generated.text))
    err.print(f"{generated.tokens_per_second:.1f} tokens per second, {len(generated.tokens)} tokens")
    return EXIT_OK


def _serve(arguments: list[str], out: Console, err: Console) -> int:
    parser = _Parser(
        prog="compot-deploy serve",
        description="Open a page on this machine in which the browser itself runs an exported ONNX folder.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("folder", type=Path, help="an ONNX folder that compot-deploy wrote")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"0 takes any free one (default: {DEFAULT_PORT})"
    )
    parser.add_argument("--no-open", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)
    with PageServer(options.folder, options.port) as server:
        out.print(Text(f"{server.url} runs {options.folder} in the browser. Stop with Ctrl-C."))
        try:
            if not options.no_open:
                # In a thread, for a browser that runs in the terminal would keep this one.
                threading.Thread(target=webbrowser.open, args=[server.url], daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            out.print("Stopped.")
    return EXIT_OK


_COMMANDS: Final[Mapping[str, Callable[[list[str], Console, Console], int]]] = {
    "plan": _plan,
    "check": _check,
    "report": _report,
    "inspect": _inspect,
    "run": _run,
    "serve": _serve,
}


# -- arguments -----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are our errors."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message[0].upper()}{message[1:]}. See {self.prog} --help.")


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """A recipe from command-line arguments; flags win over the file given with --recipe.

    Raises:
        RecipeError: an unknown flag or a value outside its range.
    """
    return _recipe_of(
        _recipe_parser(
            "compot-deploy",
            "Compress a transformer with COMPOT and quantization, export it, and prove its accuracy. "
            f"Other commands: {', '.join(_COMMANDS)}; see compot-deploy COMMAND --help.",
        ).parse_args(arguments)
    )


def _recipe_parser(prog: str, description: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", default=None, metavar="MODEL", help=_help("model"))
    parser.add_argument("--recipe", type=Path, help="TOML file with the same knobs; flags win over it")
    parser.add_argument("--version", action="version", version=f"compot-deploy {__version__}")
    _add_knobs(parser, only={knob.name for knob in knobs()} - {"model"})
    return parser


def _recipe_of(options: argparse.Namespace) -> Recipe:
    values = {key: value for key, value in vars(options).items() if value is not None}
    path = values.pop("recipe", None)
    if path is not None:
        return Recipe.from_toml(path, **values)
    return recipe_from_mapping(values, origin="the command line")


def _add_knobs(parser: argparse.ArgumentParser, only: set[str]) -> None:
    groups: dict[str, Any] = {}
    for knob in knobs():
        if knob.name not in only:
            continue
        title = _GROUPS[knob.metadata["group"]]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        kind, choices, several = knob_type(knob.name)
        flag = "--" + knob.name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action="store_const", const=True, default=None, help=_help(knob.name))
        else:
            group.add_argument(
                flag,
                dest=knob.name,
                type=kind,
                choices=choices or None,
                action="append" if several else "store",
                default=None,
                metavar=None if choices else kind.__name__.upper(),
                help=_help(knob.name),
            )


def _help(name: str) -> str:
    knob = next(knob for knob in knobs() if knob.name == name)
    text = str(knob.metadata["help"]).replace("%", "%%")
    value = default_of(knob)
    shown = " ".join(value) if isinstance(value, tuple) else value
    unit = f" {knob.metadata['unit']}" if knob.metadata["unit"] else ""
    return text if value is None or value is False else f"{text} (default: {shown}{unit})"


# -- output --------------------------------------------------------------------------------------------


class _BarProgress:
    """Draws one bar per label."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _BarProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, done: int, total: int, label: str) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)


def _console(stream: Any) -> Console:
    # A file or pipe has no width: leave room for the tables rather than folding them at 80.
    return Console(file=stream, width=None if stream.isatty() else 140, highlight=False)


def _bars(console: Console) -> _BarProgress:
    return _BarProgress(
        Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
    )


def _show(deployment: Deployment, out: Console) -> int:
    for table in tables(deployment.report):
        _print_table(out, table.title, table.columns, table.rows)
        for note in table.notes:
            out.print(Text(f"  {note}"), style="dim")
    out.print(Text(f"{deployment.folder}: {verdict(deployment.report)}"), style="bold")
    return EXIT_OK if deployment.passed else EXIT_GATE_FAILED


def _show_traced(deployment: TracedDeployment, out: Console) -> int:
    _print_overview(out, traced_overview(deployment))
    return EXIT_OK if deployment.passed else EXIT_GATE_FAILED


def _print_overview(out: Console, overview: inspection.Overview) -> None:
    _print_table(out, overview.title, overview.columns, overview.rows)
    for line in overview.lines:
        out.print(Text(line))


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=title in _PROSE)
    for number, column in enumerate(columns):
        left = number == 0 or title in _PROSE
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(re.sub(r"\s*\n\s*", " ⏎ ", cell.strip())) for cell in row))
    console.print(table)


def _quiet_libraries() -> None:
    """Keep the progress bars and advice of libraries out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # It misses an optional kernel, aloud, whenever it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
