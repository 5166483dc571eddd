"""The encoder that the frontier is measured on, and every form of its matrices that was ever measured, on disk."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from encoder import Encoder
from frontier import digest
from torch import Tensor

from compot_deploy.core.grid import Grid
from compot_deploy.core.storage import PaperStorage
from compot_deploy.core.store import load_matrices, save_matrices, write_text
from compot_deploy.numerics.whiten import Whitening
from compot_deploy.planning.candidates import VERSION, Realized, Search, forms, realize
from compot_deploy.planning.curves import Curve, curve
from compot_deploy.planning.knapsack import Plan
from compot_deploy.planning.schemes import Form, GridChoice, Joint, Plain
from compot_deploy.quant import gptq

STORAGE = PaperStorage()
SEARCH = Search(GridChoice({2: (32, 64, 128), 3: (32, 64, 128), 4: (32, 64, 128), 8: (128,)}))

PROBE = Plain(Grid(2, 128))
QUANTIZER, QUANTIZER_NAME = partial(gptq, sweeps=2), "gptq, 2 sweeps"


class Laboratory:
    """The encoder, its shared inputs, and every candidate that was ever measured on it."""

    def __init__(self, encoder: Encoder, cache: Path, search: Search = SEARCH) -> None:
        self.encoder = encoder
        self.cache = cache
        self.search = search
        self.groups: dict[str, list[str]] = {}
        for name in encoder.weights:
            self.groups.setdefault(re.sub(r"\.(query|key|value)$", "", name), []).append(name)
        self.weights = encoder.weights
        self.numbers = sum(weight.numel() for weight in encoder.weights.values())
        factors = {name: whitening.factor for name, whitening in encoder.whitenings.items()}
        self.made_from = digest({**encoder.weights, "embeddings": encoder.original}) + digest(factors)

    def whitening_of(self, name: str) -> Whitening:
        """Of the input of a linear."""
        return self.encoder.whitenings[name]

    def whitening(self, names: Sequence[str]) -> Whitening:
        """Of the input that these matrices read."""
        return self.encoder.whitenings[names[0]]

    def realized(self, form: Form, names: Sequence[str]) -> Realized:
        """A form for some matrices of one input."""
        weights = {name: self.encoder.weights[name] for name in names}
        whitening = self.whitening(names)
        key = _content_key(form, weights, whitening, self.search)
        matrices, facts = self.cache / f"{key}.safetensors", self.cache / f"{key}.json"
        if not facts.exists():
            made = realize(
                form, weights, whitening, self.search, dictionary_name="+".join(names), quantizer=QUANTIZER
            )
            save_matrices(matrices, made.matrices)
            write_text(facts, json.dumps(dict(made.errors)))
        return _Stored(matrices, facts).realized

    def errors(self, form: Form, names: Sequence[str]) -> Mapping[str, float]:
        """Squared errors of a form, without its matrices where they are known."""
        weights = {name: self.encoder.weights[name] for name in names}
        key = _content_key(form, weights, self.whitening(names), self.search)
        facts = self.cache / f"{key}.json"
        return json.loads(facts.read_text()) if facts.exists() else self.realized(form, names).errors

    def forms(self, names: Sequence[str]) -> tuple[Form, ...]:
        """What is tried for some matrices of one input."""
        weight = torch.cat([self.encoder.weights[name] for name in names], dim=1)
        return forms(weight, self.whitening(names), STORAGE, self.search)

    def curves(self) -> list[Curve]:
        """Every input's candidates, measured."""
        curves = []
        for shared, names in self.groups.items():
            started = time.perf_counter()
            sizes = {name: tuple(self.encoder.weights[name].shape) for name in names}
            plain: dict[str, list[tuple[Form, float]]] = {name: [] for name in names}
            together: list[tuple[Form, Mapping[str, float]]] = []
            # Plain grids do not care who else reads the input: all matrices of it are done at once.
            for form in self.forms(names):
                errors = self.errors(form, names)
                if isinstance(form, Joint) and len(names) > 1:
                    together.append((form, errors))
                else:
                    for name in names:
                        plain[name].append((form, errors[name]))
            curves.append(curve(names, plain, together, sizes, STORAGE))  # type: ignore[arg-type]
            print(f"{shared}: {time.perf_counter() - started:.0f} s", flush=True)
        return curves

    def effects(self) -> dict[str, float]:
        """What a unit of squared error of each matrix costs the output, measured one matrix at a time."""
        result = {}
        for names in self.groups.values():
            probe = self.realized(PROBE, names)
            for name in names:
                weight = probe.matrices[name].dequantize()
                result[name] = self.remembered("effect", {name: weight}) / probe.errors[name]
        return result

    def remembered(self, label: str, weights: Mapping[str, Tensor]) -> float:
        """The encoder's effect of some weights, from the cache where it was measured before."""
        digest = hashlib.sha256(label.encode())
        for name, weight in weights.items():
            digest.update(name.encode())
            digest.update(weight.float().contiguous().numpy().tobytes())
        path = self.cache / f"effect-{digest.hexdigest()[:24]}.json"
        if not path.exists():
            write_text(path, json.dumps(self.encoder.effect(weights)))
        return float(json.loads(path.read_text()))

    def product(self, plan: Plan) -> dict[str, Tensor]:
        """Every matrix of a plan, multiplied out."""
        made: dict[str, Tensor] = {}
        for entry in plan.chosen:
            names = entry.names
            if isinstance(entry.candidate.form, Plain):
                names = next(tuple(group) for group in self.groups.values() if names[0] in group)
            matrices = self.realized(entry.candidate.form, names).matrices
            made |= {name: matrices[name].dequantize() for name in entry.names}
        return {name: made[name] for name in self.encoder.weights}

    def scores(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Judge on the test lines, or what was found before for exactly these weights."""
        path = self.cache / f"scores-{self.made_from[:6]}{self.made_from[24:30]}-{digest(weights)}.json"
        if not path.exists():
            write_text(path, json.dumps(asdict(self.encoder.evaluate(weights))))
        found: dict[str, float] = json.loads(path.read_text())
        return found


class _Stored:
    """Matrices and errors of a candidate on disk."""

    def __init__(self, matrices: Path, facts: Path) -> None:
        self.realized = Realized(load_matrices(matrices), json.loads(facts.read_text()))


def _content_key(form: Form, weights: Mapping[str, Tensor], whitening: Whitening, search: Search) -> str:
    """A name for the measurement of a form on exactly these numbers.

    Only what the form depends on is part of it: plain grids know no rounds, dense codes no alternation.
    """
    settings: tuple[object, ...] = (QUANTIZER_NAME,)
    if isinstance(form, Joint):
        sparse = not all(level.pattern.is_dense for level in form.levels)
        settings = (search.rounds, search.alternation if sparse else None)
    digest = hashlib.sha256()
    digest.update(repr((VERSION, form, tuple(weights), *settings)).encode())
    for value in (*weights.values(), whitening.factor):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]
