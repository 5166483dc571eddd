"""The encoder that the frontier is measured on, and every scheme of its matrices that was ever measured, on disk."""

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
from compot_deploy.planning.candidates import VERSION, Realized, Search, realize, schemes
from compot_deploy.planning.knapsack import Plan
from compot_deploy.planning.rate_points import RatePoints, price_candidates
from compot_deploy.planning.schemes import GridChoice, Joint, Plain, Scheme
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

    def realized(self, scheme: Scheme, names: Sequence[str]) -> Realized:
        """A scheme for some matrices of one input."""
        weights = {name: self.encoder.weights[name] for name in names}
        whitening = self.whitening(names)
        key = _content_key(scheme, weights, whitening, self.search)
        matrices, errors = self.cache / f"{key}.safetensors", self.cache / f"{key}.json"
        if not errors.exists():
            made = realize(
                scheme, weights, whitening, self.search, dictionary_name="+".join(names), quantizer=QUANTIZER
            )
            save_matrices(matrices, made.matrices)
            write_text(errors, json.dumps(dict(made.errors)))
        return _Stored(matrices, errors).realized

    def errors(self, scheme: Scheme, names: Sequence[str]) -> Mapping[str, float]:
        """Squared errors of a scheme, without its matrices where they are known."""
        weights = {name: self.encoder.weights[name] for name in names}
        key = _content_key(scheme, weights, self.whitening(names), self.search)
        errors = self.cache / f"{key}.json"
        return json.loads(errors.read_text()) if errors.exists() else self.realized(scheme, names).errors

    def schemes(self, names: Sequence[str]) -> tuple[Scheme, ...]:
        """What is tried for some matrices of one input."""
        weight = torch.cat([self.encoder.weights[name] for name in names], dim=1)
        return schemes(weight, self.whitening(names), STORAGE, self.search)

    def rate_points(self) -> list[RatePoints]:
        """Every input's candidates, measured."""
        rate_points = []
        for input_name, names in self.groups.items():
            started = time.perf_counter()
            sizes = {name: tuple(self.encoder.weights[name].shape) for name in names}
            plain: dict[str, list[tuple[Scheme, float]]] = {name: [] for name in names}
            shared: list[tuple[Scheme, Mapping[str, float]]] = []
            # Plain grids do not care who else reads the input: all matrices of it are done at once.
            for scheme in self.schemes(names):
                errors = self.errors(scheme, names)
                if isinstance(scheme, Joint) and len(names) > 1:
                    shared.append((scheme, errors))
                else:
                    for name in names:
                        plain[name].append((scheme, errors[name]))
            rate_points.append(price_candidates(names, plain, shared, sizes, STORAGE))  # type: ignore[arg-type]
            print(f"{input_name}: {time.perf_counter() - started:.0f} s", flush=True)
        return rate_points

    def sensitivities(self) -> dict[str, float]:
        """What a unit of squared error of each matrix costs the output, measured one matrix at a time."""
        result = {}
        for names in self.groups.values():
            probe = self.realized(PROBE, names)
            for name in names:
                weight = probe.matrices[name].dequantize()
                result[name] = self.remembered("loss", {name: weight}) / probe.errors[name]
        return result

    def remembered(self, label: str, weights: Mapping[str, Tensor]) -> float:
        """The encoder's loss with some weights, from the cache where it was measured before."""
        digest = hashlib.sha256(label.encode())
        for name, weight in weights.items():
            digest.update(name.encode())
            digest.update(weight.float().contiguous().numpy().tobytes())
        path = self.cache / f"loss-{digest.hexdigest()[:24]}.json"
        if not path.exists():
            write_text(path, json.dumps(self.encoder.loss(weights)))
        return float(json.loads(path.read_text()))

    def product(self, plan: Plan) -> dict[str, Tensor]:
        """Every matrix of a plan, multiplied out."""
        made: dict[str, Tensor] = {}
        for entry in plan.chosen:
            names = entry.names
            if isinstance(entry.candidate.scheme, Plain):
                names = next(tuple(group) for group in self.groups.values() if names[0] in group)
            matrices = self.realized(entry.candidate.scheme, names).matrices
            made |= {name: matrices[name].dequantize() for name in entry.names}
        return {name: made[name] for name in self.encoder.weights}

    def scores(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Evaluate on the test lines, or what was found before for exactly these weights."""
        path = self.cache / f"scores-{self.made_from[:6]}{self.made_from[24:30]}-{digest(weights)}.json"
        if not path.exists():
            write_text(path, json.dumps(asdict(self.encoder.evaluate(weights))))
        found: dict[str, float] = json.loads(path.read_text())
        return found


class _Stored:
    """Matrices and errors of a candidate on disk."""

    def __init__(self, matrices: Path, errors: Path) -> None:
        self.realized = Realized(load_matrices(matrices), json.loads(errors.read_text()))


def _content_key(scheme: Scheme, weights: Mapping[str, Tensor], whitening: Whitening, search: Search) -> str:
    """A name for the measurement of a scheme on exactly these numbers.

    Only what the scheme depends on is part of it: plain grids know no rounds, dense codes no alternation.
    """
    settings: tuple[object, ...] = (QUANTIZER_NAME,)
    if isinstance(scheme, Joint):
        sparse = not all(tier.pattern.is_dense for tier in scheme.tiers)
        settings = (search.rounds, search.alternation if sparse else None)
    digest = hashlib.sha256()
    digest.update(repr((VERSION, scheme, tuple(weights), *settings)).encode())
    for value in (*weights.values(), whitening.factor):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]
