"""What the frontiers share: points, jobs with a cache, the comparison at equal bytes, table, JSON and plot."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from compot_deploy.core.store import write_text

PLANNED: Final = "compot-deploy, planned"
MIXED: Final = "GPTQ, mixed grids, planned"


@dataclass(frozen=True)
class Point:
    """One method at one size.

    Attributes:
        family: methods of one line in a plot.
        method: one row of a table.
        bits: per weight of the linears, everything counted.
        scores: by name.
        samples: of some scores, by name: a figure per window of text, as far as the score is their mean.
        file_bits: as `bits`, of a file that can exist, where `bits` flatters the method.
    """

    family: str
    method: str
    bits: float
    scores: Mapping[str, float]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    file_bits: float | None = None


@dataclass(frozen=True)
class Figures:
    """What is measured of one method at one size; attributes as of `Point`."""

    bits: float
    scores: Mapping[str, float]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    file_bits: float | None = None


@dataclass(frozen=True)
class Score:
    """A figure of merit.

    Attributes:
        key: in `Point.scores`.
        title: with its unit.
        scheme: how a table prints it.
        higher: whether more is better.
        errors: a difference of so many of its standard errors, or fewer, is none.
        named: behind a claim, where there are claims about another score as well.
    """

    key: str
    title: str
    form: str = ".4f"
    higher: bool = True
    errors: float = 0.0
    named: str = ""

    def best(self, points: Iterable[Point]) -> Point:
        """The best of some points."""
        return (max if self.higher else min)(points, key=lambda point: point.scores[self.key])

    def at_least(self, one: Point, other: Point) -> bool:
        """Whether one is no worse than another, but for what chance in the choice of text may do."""
        behind = self.behind(one, other)
        return behind <= 0.0 or behind <= self.errors * self.standard_error(one, other)

    def behind(self, one: Point, other: Point) -> float:
        """By how much one is worse than another."""
        difference = other.scores[self.key] - one.scores[self.key]
        return difference if self.higher else -difference

    def standard_error(self, one: Point, other: Point) -> float:
        """Of the difference, paired by window; 0 where it is not known of both, so that nothing is excused."""
        first, second = one.samples.get(self.key, ()), other.samples.get(self.key, ())
        if len(first) != len(second) or len(first) < 2:
            return 0.0
        return statistics.stdev(a - b for a, b in zip(first, second, strict=True)) / math.sqrt(len(first))


@dataclass(frozen=True)
class Comparison:
    """The plan beside a baseline.

    Attributes:
        claim: what is claimed.
        bits: the plan's budget.
        holds: whether it is true.
        text: both figures.
    """

    claim: str
    bits: float
    holds: bool
    text: str


@dataclass
class Jobs:
    """Points from a cache, or made and put there; says how far the work is.

    Attributes:
        cache: folder; a file per point, named after what it was made from.
        total: seconds that everything will take, as guessed beforehand.
    """

    cache: Path
    total: float = 0.0
    _passed: float = 0.0
    _guessed: float = 0.0
    _spent: float = 0.0
    _seen: set[str] = field(default_factory=set)

    def point(
        self,
        family: str,
        method: str,
        key: object,
        make: Callable[[], Figures],
        seconds: float = 5.0,
    ) -> Point:
        """Bits and scores of a method.

        Args:
            family: of the point.
            method: of the point.
            key: everything that the figures depend on; its `repr` names the file.
            make: the figures, if they are not known.
            seconds: it will take about so long.
        """
        path = self.cache / f"point-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
        fresh = not path.exists()
        if fresh:
            started = time.perf_counter()
            figures = make()
            samples = {name: list(values) for name, values in figures.samples.items()}
            record = {
                "bits": figures.bits,
                "scores": dict(figures.scores),
                "samples": samples,
                "file_bits": figures.file_bits,
            }
            write_text(path, json.dumps(record))
            self._spent += time.perf_counter() - started
            self._guessed += seconds
        self._passed += seconds
        found = json.loads(path.read_text(encoding="utf-8"))
        more = {name: found[name] for name in ("samples", "file_bits") if name in found}
        point = Point(family, method, found["bits"], found["scores"], **more)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in point.scores.items())
        print(
            f"{method:44s} {point.bits:7.3f} bits  {shown}  {self._left() if fresh else '(known)'}",
            flush=True,
        )
        return point

    def _left(self) -> str:
        pace = self._spent / self._guessed if self._guessed else 1.0
        return f"about {max(0.0, self.total - self._passed) * pace / 60:.0f} min left"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A name for exactly these numbers."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def compare(
    points: Sequence[Point],
    score: Score,
    budgets: Sequence[float],
    floors: Mapping[float, float],
    *,
    beyond: bool = False,
) -> list[Comparison]:
    """The plan at every budget, against all baselines of the same or fewer bytes, and against its floor.

    Args:
        points: all of them.
        score: by which to evaluate.
        budgets: bits per weight.
        floors: least score by budget.
        beyond: whether the plan must also be no worse than the nearest baseline of no fewer bytes.
    """
    plans = [point for point in points if point.family == PLANNED]
    mixes = [point for point in points if point.family == MIXED]
    baselines = [point for point in points if point.family not in (PLANNED, MIXED)]
    found = []
    for budget in budgets:
        mine = [point for point in plans if point.bits <= budget + 1e-6]
        if not mine:
            found.append(Comparison("possible", budget, False, "no plan is that small"))
            continue
        plan = score.best(mine)
        value = format(plan.scores[score.key], score.form)
        if budget in floors:
            floor = Point("", "", budget, {score.key: floors[budget]})
            found.append(
                Comparison(
                    "reaches its floor", budget, score.at_least(plan, floor), f"{value}, {floors[budget]:g}"
                )
            )
        for kind, families in (("baseline", baselines), ("mix of plain grids", mixes)):
            below = [point for point in families if point.bits <= budget + 1e-6]
            if not below:
                continue
            baseline = score.best(below)
            found.append(
                Comparison(
                    f"no {kind} of the same or fewer bytes is better{score.named}",
                    budget,
                    all(score.at_least(plan, point) for point in below),
                    f"{value}; best of {len(below)}: {_named(baseline, score)}",
                )
            )
        above = next_larger(points, score, budget)
        if above is not None and beyond:
            claim = "no worse than the nearest baseline of no fewer bytes"
            text = f"{value}; {_named(above, score)}"
            found.append(Comparison(claim, budget, score.at_least(plan, above), text))
    return found


def compare_at_sizes(points: Sequence[Point], score: Score, largest: float) -> list[Comparison]:
    """At the size of every baseline: the plan of no more bytes is no worse.

    Args:
        points: all of them.
        score: by which to evaluate.
        largest: bits to look up to.
    """
    plans = [point for point in points if point.family == PLANNED]
    found = []
    for baseline in sorted(points, key=lambda point: point.bits):
        below = [plan for plan in plans if plan.bits <= baseline.bits + 1e-6]
        if baseline.family in (PLANNED, MIXED) or not below or baseline.bits > largest:
            continue
        plan = score.best(below)
        mine = format(plan.scores[score.key], score.form)
        found.append(
            Comparison(
                f"no worse than {baseline.method} at its size{score.named}",
                baseline.bits,
                score.at_least(plan, baseline),
                f"{mine} at {plan.bits:.3f}; {_named(baseline, score)}{_level(plan, baseline, score)}",
            )
        )
    return found


def unmatched(
    points: Sequence[Point], score: Score, largest: float, tried: Collection[float] = ()
) -> float | None:
    """Bits of the smallest baseline that no plan of no more bytes reaches, and where none was made yet.

    Args:
        points: of baselines and plans.
        score: by which to evaluate.
        largest: bits to look up to.
        tried: sizes at which a plan was made.
    """
    plans = [point for point in points if point.family == PLANNED]
    smallest = min(point.bits for point in plans)
    for baseline in sorted(points, key=lambda point: point.bits):
        if baseline.family in (PLANNED, MIXED) or not smallest <= baseline.bits <= largest:
            continue
        below = [plan for plan in plans if plan.bits <= baseline.bits + 1e-6]
        if not score.at_least(score.best(below), baseline) and baseline.bits not in tried:
            return baseline.bits
    return None


def distinct(points: Sequence[Point]) -> list[Point]:
    """Each method at each size once; of a family's equal points the first.

    Types of llama.cpp that fall back to one and the same are one point.
    """
    found: dict[object, Point] = {}
    for point in points:
        found.setdefault((point.family, round(point.bits, 6), tuple(point.scores.items())), point)
    return list(found.values())


def as_files(points: Sequence[Point]) -> list[Point]:
    """Every point at the size of a file that can exist."""
    return [point if point.file_bits is None else replace(point, bits=point.file_bits) for point in points]


def next_larger(points: Sequence[Point], score: Score, budget: float) -> Point | None:
    """The best of the baselines nearest to a budget with no fewer bytes; None if there is none."""
    above = [point for point in points if point.family not in (PLANNED, MIXED) and point.bits >= budget]
    if not above:
        return None
    nearest = min(point.bits for point in above)
    return score.best(point for point in above if point.bits <= nearest + 0.02)


def report(comparisons: Sequence[Comparison]) -> bool:
    """Print each comparison, failures marked; whether all hold."""
    for one in comparisons:
        mark = "holds" if one.holds else "FAILS"
        print(f"{mark}  {one.bits:6.3f} bits: {one.claim}: {one.text}", flush=True)
    return all(one.holds for one in comparisons)


def table(points: Sequence[Point], scores: Sequence[Score]) -> str:
    """Markdown, smallest first; the plan's rows are bold."""
    lines = [
        "| method | bits per weight | " + " | ".join(score.title for score in scores) + " |",
        "|---|---|" + "---|" * len(scores),
    ]
    for point in sorted(points, key=lambda point: (point.bits, point.method)):
        figures = " | ".join(format(point.scores[score.key], score.form) for score in scores)
        name = f"**{point.method}**" if point.family == PLANNED else point.method
        lines.append(f"| {name} | {point.bits:.3f} | {figures} |")
    return "\n".join(lines) + "\n"


def verdicts(comparisons: Sequence[Comparison]) -> str:
    """Markdown of what was compared."""
    lines = ["| bits per weight | claim | figures | |", "|---|---|---|---|"]
    lines += [
        f"| {one.bits:.3f} | {one.claim} | {one.text} | {'holds' if one.holds else '**fails**'} |"
        for one in comparisons
    ]
    return "\n".join(lines) + "\n"


def as_data(points: Sequence[Point], comparisons: Sequence[Comparison]) -> dict[str, object]:
    """For JSON."""
    fields = ("family", "method", "bits", "scores")
    return {
        "points": [
            {name: getattr(point, name) for name in fields}
            for point in sorted(points, key=lambda point: (point.bits, point.method))
        ],
        "comparisons": [vars(one) for one in comparisons],
    }


def replace_between(path: Path, label: str, text: str) -> None:
    """Put text between two comments of a Markdown file, ``<!-- label -->`` and ``<!-- /label -->``.

    Raises:
        SystemExit: the file has no such comments.
    """
    first, last = f"<!-- {label} -->\n", f"<!-- /{label} -->"
    content = path.read_text(encoding="utf-8")
    head, found, rest = content.partition(first)
    _, closed, tail = rest.partition(last)
    if not found or not closed:
        raise SystemExit(
            f"{path} has no lines {first.strip()} and {last}: add them where the table should be."
        )
    write_text(path, f"{head}{first}{text}{last}{tail}")


def draw(axes, points: Sequence[Point], score: Score) -> None:  # type: ignore[no-untyped-def]
    """One line per family; families of a single point as a mark."""
    families: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.bits):
        families.setdefault(point.family, []).append(point)
    marks = "s^vD<>PX*hdp"
    for number, (family, series) in enumerate(sorted(families.items(), key=lambda item: item[0] != PLANNED)):
        ours = family == PLANNED
        axes.plot(
            [point.bits for point in series],
            [point.scores[score.key] for point in series],
            "o-" if ours else marks[number % len(marks)] + (":" if len(series) > 1 else ""),
            color="black" if ours else None,
            label=family,
            linewidth=2 if ours else 0.8,
            markersize=4,
            zorder=3 if ours else 2,
        )
    axes.grid(alpha=0.3)
    axes.set(xlabel="bits per weight, scales and masks counted", ylabel=score.title)


def _level(plan: Point, baseline: Point, score: Score) -> str:
    """By how much a plan is behind, and how far chance may have moved that; nothing where it is not behind."""
    behind, error = score.behind(plan, baseline), score.standard_error(plan, baseline)
    if behind <= 0.0:
        return ""
    verdict = (
        f", not told apart at {score.errors:g} standard errors" if score.at_least(plan, baseline) else ""
    )
    chance = f" ± {error:{score.form}}" if error else ", its error not measured"
    return f"; behind by {behind:{score.form}}{chance}{verdict}"


def _named(point: Point, score: Score) -> str:
    return f"{format(point.scores[score.key], score.form)} ({point.method}, {point.bits:.3f})"
