"""A runner as lm-eval asks it: log-likelihoods of answers, of whole texts, and greedy text up to a stop.

Imported only where lm-eval is there. Which tokens are asked about follows its model of transformers, so that scores are
those that others publish: special tokens as the tokenizer adds them, texts too long cut at their beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compot_deploy.errors import InputError

_BATCH: Final = 16
"""Windows of equal length that are read at once."""

_CHUNK: Final = 256
"""Positions whose logits are held at once."""

_CONTEXT: Final = 2048
"""Tokens, of a model that does not say."""

_NEW_TOKENS: Final = 256
"""Of an answer, where the task does not say."""

_PIECE: Final = 16
"""Tokens after which a stop is looked for."""

Answer: TypeAlias = "tuple[float, bool]"
"""Log-likelihood of an answer, and whether greedy text is that answer."""


class RunnerModel(TemplateLM):
    """A runner behind lm-eval's interface.

    Args:
        runner: the model, see `compot_deploy.accuracy.runner.Runner`.
        tokenizer: of transformers, of the same folder.
    """

    def __init__(self, runner: Any, tokenizer: Any) -> None:
        super().__init__()
        self._runner, self.tokenizer = runner, tokenizer
        self.max_length = int(runner.context or _CONTEXT)

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that begins: the begin token, where there is one."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """For caches of requests, which are not used."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, special ones as the tokenizer adds them; none twice."""
        if add_special_tokens is None:
            first = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        """Of each continuation after its context; several that share what is read are read once."""
        wanted: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            read = tuple(whole[:-1])
            wanted.append((read, tuple(whole[-min(len(continuation), len(read)) :])))
        asked: dict[tuple[int, ...], dict[tuple[int, ...], Answer]] = {}
        for read, answer in wanted:
            asked.setdefault(read, {})[answer] = (0.0, True)
        by_length = sorted(asked, key=len)
        for _length, same in itertools.groupby(by_length, key=len):
            for batch in _batches(same, _BATCH):
                self._read(batch, asked)
        return [asked[read][answer] for read, answer in wanted]

    def _read(
        self, batch: Sequence[tuple[int, ...]], asked: dict[tuple[int, ...], dict[tuple[int, ...], Answer]]
    ) -> None:
        """Read windows of one length, and sum up what is asked of each."""
        at, length = 0, len(batch[0])
        for piece in self._runner.logits(torch.tensor(batch), _CHUNK):
            last = at + piece.shape[1]
            for row, read in enumerate(batch):
                for answer, (sum_before, greedy) in list(asked[read].items()):
                    first = length - len(answer)
                    begin = max(at, first)
                    if begin >= last:
                        continue
                    logs = torch.log_softmax(piece[row, begin - at :].double(), dim=-1)
                    tokens = torch.tensor(answer[begin - first : last - first])
                    found = logs.gather(1, tokens[:, None]).sum()
                    same = greedy and bool((logs.argmax(dim=-1) == tokens).all())
                    asked[read][answer] = (sum_before + float(found), same)
            at = last

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token after as much as the context holds."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            answers = self._loglikelihood_tokens([(None, list(a), list(b)) for a, b in windows])
            found.append(sum(value for value, _ in answers))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each context, up to the first stop, which is no part of it.

        Raises:
            InputError: a task wants text that is drawn.
        """
        return [self._written(*request.args) for request in requests]

    def _written(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") and settings.get("temperature") != 0:
            raise InputError(
                "A task wants text that is drawn at random, and tasks are scored on greedy text here."
            )
        until = settings.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        most = min(int(settings.get("max_gen_toks", _NEW_TOKENS)), self.max_length - 1)
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        new: list[int] = []
        while len(new) < most:
            count = min(max(_PIECE, len(new)), most - len(new))
            new += self._runner.generate([*prompt, *new], count)
            ended = self.eot_token_id in new
            text = self._text(new[: new.index(self.eot_token_id)] if ended else new)
            cut = min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=None)
            if cut is not None:
                return text[:cut]
            if ended:
                return text
        return self._text(new)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _batches(items: Iterable[tuple[int, ...]], size: int) -> Iterable[list[tuple[int, ...]]]:
    every = iter(items)
    while batch := list(itertools.islice(every, size)):
        yield batch
