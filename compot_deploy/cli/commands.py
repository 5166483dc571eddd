"""The commands: parse, call, print."""

from __future__ import annotations

import os
import threading
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from compot_deploy.accuracy.gate import LOSS_LIMITS
from compot_deploy.cli.arguments import Parser, add_options, recipe_of, recipe_parser
from compot_deploy.cli.demo import demo_command
from compot_deploy.cli.output import progress_on
from compot_deploy.cli.results import print_overview, show
from compot_deploy.cli.serve import DEFAULT_PORT, PageServer
from compot_deploy.cluster.connection import advice
from compot_deploy.errors import EXIT_CODES, EXIT_OK, RecipeError, UnsupportedModelError
from compot_deploy.exporters.signature import read_signing_key, write_keys
from compot_deploy.pipeline.check import check, write_check, write_report_again
from compot_deploy.pipeline.deploy import plan_only, run
from compot_deploy.pipeline.evaluation import HTML
from compot_deploy.pipeline.generate import generate
from compot_deploy.pipeline.healing import expected
from compot_deploy.pipeline.limits import FEWEST_POSITIONS
from compot_deploy.pipeline.supported import as_data, overview_of, supported
from compot_deploy.recipe import Recipe, separated
from compot_deploy.report import inspection
from compot_deploy.report import plan as plan_report
from compot_deploy.report.document import verdict
from compot_deploy.report.gate import (
    GateFile,
    GateRequirements,
    parse_growth,
    read_baseline,
    read_gate,
)
from compot_deploy.report.summary import STEP_SUMMARY, to_summary, write_summary


def deploy_command(recipe: Recipe, out: Console, err: Console) -> int:
    """What runs without a command: compress, export, check."""
    if recipe.model is None:
        err.print(
            "No model given: using the small model that ships with compot-deploy (1.6M parameters, trained on "
            "Python's documentation)."
        )
    _advise(recipe, err)
    with progress_on(err) as progress:
        deployments = run(recipe, progress)
    return max((show(deployment, out) for deployment in deployments), default=EXIT_OK)


def _advise(recipe: Recipe, err: Console) -> None:
    told = advice(recipe.cluster)
    if told:
        err.print(Text(told))


def _plan(arguments: list[str], out: Console, err: Console) -> int:
    parser = recipe_parser(
        "compot-deploy plan", "Show what a budget would be spent on, layer by layer, and export nothing."
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--plot", type=Path, help="also draw predicted loss against bytes (needs matplotlib)")
    options = parser.parse_args(arguments)
    as_json, picture = options.json, options.plot
    del options.json, options.plot
    if options.allocation in (None, "auto"):
        options.allocation = "knapsack"
    recipe = recipe_of(options)
    if picture is not None:
        plan_report.check_plot(picture)
    _advise(recipe, err)
    with progress_on(err) as progress:
        draft = plan_only(recipe, progress)
    model = recipe.model or "the model that ships"
    planned = plan_report.Planned(model, draft, expected(recipe, draft.context))
    if picture is not None:
        plan_report.plot(planned, picture)
    if as_json:
        out.print_json(plan_report.as_json(planned))
        return EXIT_OK
    print_overview(out, plan_report.overview(planned))
    return EXIT_OK


def _check(arguments: list[str], out: Console, err: Console) -> int:
    parser = Parser(
        prog="compot-deploy check", description="Check an exported folder again.", epilog=EXIT_CODES
    )
    parser.add_argument("folder", type=Path, help="a folder that compot-deploy wrote")
    parser.add_argument(
        "--reference",
        help="original model, where it is not under its name here or beside the folder; or a reference file, the "
        "answers of the original that every export keeps in compot/reference.safetensors",
    )
    parser.add_argument("--text", type=Path, help="evaluate on this text, not on the folder's own")
    parser.add_argument(
        "--min-positions",
        type=int,
        help="tokens that the text has, at least; a text that is read as a whole counts as 16 "
        f"(default: {FEWEST_POSITIONS})",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail for files that lie in the folder and not in its manifest"
    )
    parser.add_argument(
        "--trusted-key",
        metavar="KEY",
        help="public key of minisign that must have signed the manifest: its file, or its line (see --sign and keygen)",
    )
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="be content with structure and export loss where the original model is not there",
    )
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
    add_options(parser, only={*LOSS_LIMITS, "tasks", "task_samples"})
    values = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    folder, reference = values.pop("folder"), values.pop("reference", None)
    export_only, strict = values.pop("export_only"), values.pop("strict")
    trusted_key = values.pop("trusted_key", None)
    tasks, task_samples = separated(values.pop("tasks", ())), values.pop("task_samples", None)
    text, min_positions = values.pop("text", None), values.pop("min_positions", FEWEST_POSITIONS)
    report_dir, summary = values.pop("report_dir", None), values.pop("summary", None)
    requirements = _requirements(
        values.pop("gate", None), values.pop("baseline", None), values.pop("max_growth", None)
    )
    with progress_on(err) as progress:
        deployment = check(
            folder,
            reference=reference,
            export_only=export_only,
            limits=values,
            requirements=requirements,
            text=text,
            min_positions=min_positions,
            strict=strict,
            trusted_key=trusted_key,
            tasks=tasks,
            task_samples=task_samples,
            progress=progress,
        )
    if report_dir is not None:
        write_check(report_dir, deployment.report)
    if summary is not None:
        write_summary(to_summary(deployment.report, requirements), summary, append=False)
    elif os.environ.get(STEP_SUMMARY):
        text = to_summary(deployment.report, requirements)
        write_summary(text, Path(os.environ[STEP_SUMMARY]), append=True)
    return show(deployment, out)


def _requirements(gate: Path | None, baseline: Path | None, max_growth: str | None) -> GateRequirements:
    return GateRequirements(
        gate=GateFile() if gate is None else read_gate(gate),
        baseline=None if baseline is None else read_baseline(baseline),
        baseline_name=f"The baseline {baseline}",
        max_growth=None if max_growth is None else parse_growth(max_growth, "--max-growth"),
    )


def _report(arguments: list[str], out: Console, err: Console) -> int:
    parser = Parser(
        prog="compot-deploy report",
        description="Write report.html, the model card and JUnit XML of an exported folder again, from the figures in "
        "its report.json; nothing is measured.",
    )
    parser.add_argument("folder", type=Path, help="a folder that compot-deploy wrote")
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="secret key of minisign that signs a signed folder again"
    )
    options = parser.parse_args(arguments)
    folder = options.folder
    key = None if options.sign is None else read_signing_key(options.sign)
    report = write_report_again(folder, key)
    out.print(Text(f"{folder / HTML}: {verdict(report)}"))
    return EXIT_OK


def _inspect(arguments: list[str], out: Console, err: Console) -> int:
    parser = Parser(prog="compot-deploy inspect", description="Show what is in an exported folder.")
    parser.add_argument("folder", type=Path, help="a folder that compot-deploy wrote")
    parser.add_argument("--json", action="store_true", help="print the manifest's matrices as JSON")
    options = parser.parse_args(arguments)
    if options.json:
        out.print_json(inspection.as_json(options.folder))
        return EXIT_OK
    print_overview(out, inspection.overview(options.folder))
    return EXIT_OK


def _run(arguments: list[str], out: Console, err: Console) -> int:
    parser = Parser(
        prog="compot-deploy run", description="Generate text from an exported folder or GGUF file."
    )
    parser.add_argument("path", type=Path, help="a folder that compot-deploy wrote, or a GGUF file")
    parser.add_argument("-p", "--prompt", required=True, help="text to continue")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="most tokens to add (default: 64)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="of the runtime (default: 1)")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.threads < 1:
        raise RecipeError("--tokens and --threads: give at least 1.")
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise RecipeError(
            "--prompt: it is not text in the encoding of this terminal, UTF-8 for example."
        ) from None
    generated = generate(options.path, options.prompt, tokens=options.tokens, threads=options.threads)
    out.print(Text(options.prompt + generated.text))
    err.print(f"{generated.tokens_per_second:.1f} tokens per second, {len(generated.tokens)} tokens")
    return EXIT_OK


def _supports(arguments: list[str], out: Console, err: Console) -> int:
    parser = Parser(
        prog="compot-deploy supports",
        description="Say what a model is, how it can be compressed and where it can go, from its configuration alone.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "model", help="a folder with config.json, or a hub id, of which only small files are fetched"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    options = parser.parse_args(arguments)
    found = supported(options.model)
    if options.json:
        out.print_json(data=as_data(found))
    else:
        print_overview(out, overview_of(found))
    return EXIT_OK if found.objection is None else UnsupportedModelError.exit_code


def _keygen(arguments: list[str], out: Console, err: Console) -> int:
    parser = Parser(
        prog="compot-deploy keygen",
        description="Make a pair of keys in minisign's format: NAME.key signs what is exported (--sign), and NAME.pub "
        "tells others that it did (check --trusted-key).",
        epilog=EXIT_CODES,
    )
    parser.add_argument("name", type=Path, metavar="NAME", help="path of both files without their endings")
    name = parser.parse_args(arguments).name
    key = write_keys(name)
    out.print(
        Text(
            f"{name}.key is secret and has no password; {name}.pub is for everybody. The key's id is {key.name}."
        )
    )
    return EXIT_OK


def _serve(arguments: list[str], out: Console, err: Console) -> int:
    parser = Parser(
        prog="compot-deploy serve",
        description="Open a page on this machine in which the browser itself runs an exported ONNX folder.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("folder", type=Path, help="an ONNX folder that compot-deploy wrote")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"0 takes any free one (default: {DEFAULT_PORT})"
    )
    parser.add_argument("--no-open", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)
    with PageServer(options.folder, options.port) as server:
        try:
            out.print(Text(f"{server.url} runs {options.folder} in the browser. Stop with Ctrl-C."))
            if not options.no_open:
                # In a thread, for a browser that runs in the terminal would keep this one.
                threading.Thread(target=webbrowser.open, args=[server.url], daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            out.print("Stopped.")
    return EXIT_OK


COMMANDS: Final[Mapping[str, Callable[[list[str], Console, Console], int]]] = {
    "plan": _plan,
    "supports": _supports,
    "check": _check,
    "report": _report,
    "inspect": _inspect,
    "run": _run,
    "keygen": _keygen,
    "serve": _serve,
    "demo": demo_command,
}
