"""Text to windows of token ids: what a model is calibrated and evaluated on, and where it came from.

Sources: a file (see `text_files`), a data set by name (where the hub answers), or text sampled from the model itself.
Windows are drawn with a seed, so the same inputs give the same windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Int64
from torch import Tensor

from compot_deploy.errors import InputError, MissingDependencyError, first_line
from compot_deploy.models.audio import Recording
from compot_deploy.models.cache import cache_argument, cache_of
from compot_deploy.models.tasks import Utterance, Window
from compot_deploy.models.templates import TemplateError, TemplateProcess
from compot_deploy.models.text_files import Record
from compot_deploy.progress import Progress, silent

SELF: Final = "self"
HELD_OUT_SHARE: Final = 0.1
"""Share at the end of a calibration text that is kept for evaluation when no other text is given."""

_SHORTEST_LINE: Final = 20
"""Characters of a line that is worth reading."""

_CHARACTERS_PER_TOKEN: Final = 32  # more than any tokenizer needs; bounds how much of a long file is read


@dataclass(frozen=True)
class TokenWindows:
    """Windows of token ids with their origin.

    Attributes:
        windows: each of shape (tokens,), int64; lengths may differ.
        source: where the text came from, in words.
        digest: sha256 of the token ids, window boundaries included.
        notes: facts that a report must state (fewer windows than asked for, text shared with calibration …).
        recordings: what is heard, of a speech model; the windows are its transcripts.
        utterances: the same as the model reads it.
    """

    windows: tuple[Int64[Tensor, "..."], ...]  # noqa: UP037
    source: str
    digest: str
    notes: tuple[str, ...] = ()
    recordings: tuple[Recording, ...] = ()
    utterances: tuple[Utterance, ...] = ()

    @property
    def inputs(self) -> Sequence[Window]:
        """What a task makes batches of."""
        return self.utterances or self.windows

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(len(window) for window in self.windows)


def make_windows(
    windows: Sequence[Sequence[int] | Tensor], source: str, vocabulary: int, notes: Sequence[str] = ()
) -> TokenWindows:
    """Bundle windows, checking that every id is one the model knows.

    Raises:
        InputError: a token id is negative or not below `vocabulary`.
    """
    tensors = tuple(torch.as_tensor(window, dtype=torch.int64).clone() for window in windows)
    digest = hashlib.sha256()
    for number, window in enumerate(tensors):
        if len(window) and not 0 <= int(window.min()) <= int(window.max()) < vocabulary:
            bad = int(window.max()) if int(window.max()) >= vocabulary else int(window.min())
            raise InputError(
                f"{source}: window {number} holds the token id {bad}, but the model knows ids 0 to "
                f"{vocabulary - 1}. The tokenizer does not belong to this model."
            )
        digest.update(len(window).to_bytes(8, "little"))
        digest.update(window.numpy().tobytes())
    return TokenWindows(tensors, source, digest.hexdigest(), tuple(notes))


@dataclass(frozen=True)
class Tokenizer:
    """The few things that are needed of a transformers tokenizer.

    Attributes:
        encode: text to ids, without special tokens.
        decode: ids to text, special tokens kept out.
        first: ids put before every window (the begin-of-sequence token, where the tokenizer adds one).
        chat: a conversation to text, special tokens written out; None where the tokenizer has no chat template.
        whole: a text to at most so many ids, special tokens included, as an encoder reads it.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    first: tuple[int, ...]
    chat: Callable[[Record], str] | None
    whole: Callable[[str, int], list[int]]


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder as transformers' own object; code of its own is not run.

    Raises:
        InputError: the folder has none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a")
    except BaseException as error:  # what a library in Rust throws is no `Exception`
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(
            f"{folder} holds no tokenizer that can be read ({type(error).__name__}: {first_line(error)}). "
            "Save one with tokenizer.save_pretrained(folder)."
        ) from None
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The few things that are needed of the tokenizer in a model folder.

    Raises:
        InputError: see `open_tokenizer`.
    """
    tokenizer = open_tokenizer(folder)
    bare, special = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    prefix = tuple(special[: len(special) - len(bare)]) if special[-len(bare) :] == bare else ()
    if not prefix and tokenizer.bos_token_id is not None and special[:1] == [tokenizer.bos_token_id]:
        prefix = (tokenizer.bos_token_id,)
    return Tokenizer(
        encode=lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        first=prefix,
        chat=_Chat(tokenizer) if getattr(tokenizer, "chat_template", None) else None,
        whole=lambda text, length: list(tokenizer(text, truncation=True, max_length=length).input_ids),
    )


class _Chat:
    """A tokenizer's chat template, whose process starts with the first conversation."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._processes: dict[str, TemplateProcess] = {}

    def __call__(self, record: Record) -> str:
        source = self._template(record)
        if source not in self._processes:
            words = {name: str(word) for name, word in self._tokenizer.special_tokens_map.items()}
            self._processes[source] = TemplateProcess(source, words)
        return self._processes[source].render(record.messages, tools=record.tools)

    def __del__(self) -> None:
        for process in self._processes.values():
            process.close()

    def _template(self, record: Record) -> str:
        """The template, or of several the one that transformers would take."""
        found = self._tokenizer.chat_template
        if not isinstance(found, Mapping):
            return str(found)
        name = "tool_use" if record.tools and "tool_use" in found else "default"
        if name not in found:
            raise InputError(
                f"{record.where} has messages, and the tokenizer has the chat templates {', '.join(found)} and none "
                "called default: nobody can tell which one is meant. Call one of them default, or give text instead."
            )
        return str(found[name])


def windows_of_text(
    text: str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    source: str,
    vocabulary: int,
    notes: Sequence[str] = (),
) -> TokenWindows:
    """Up to `samples` windows of `length` tokens, drawn without overlap.

    Raises:
        InputError: the text is shorter than one window.
    """
    body = length - len(tokenizer.first)
    generator = torch.Generator().manual_seed(seed)
    budget = samples * length * _CHARACTERS_PER_TOKEN
    if len(text) > budget:
        # A long text: read one slice from each of `samples` equal parts rather than tokenizing everything.
        part, size = len(text) // samples, length * _CHARACTERS_PER_TOKEN
        offsets = torch.randint(max(1, part - size), (samples,), generator=generator).tolist()
        slices = [text[i * part + offset :][:size] for i, offset in enumerate(offsets)]
        starts = [ids[:body] for ids in map(tokenizer.encode, slices) if len(ids) >= body]
    else:
        ids = tokenizer.encode(text)
        starts = [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
        if not starts:
            raise InputError(
                f"{source} has {len(ids)} tokens, fewer than one window of {length}. "
                "Give a longer text or a smaller --length."
            )
    order = torch.randperm(len(starts), generator=generator)[:samples].sort().values.tolist()
    found = list(notes)
    if len(starts) < samples:
        found.append(f"{source} holds {len(starts)} windows of {length} tokens; {samples} were asked for")
    return make_windows([[*tokenizer.first, *starts[i]] for i in order], source, vocabulary, found)


def windows_of_lines(
    text: str, tokenizer: Tokenizer, *, samples: int, length: int, seed: int, source: str, vocabulary: int
) -> TokenWindows:
    """One window a line, as an encoder reads a text: special tokens included, cut to `length` tokens.

    Lines of fewer than 20 characters, and lines that were there before, are left out.

    Raises:
        InputError: no line is long enough.
    """
    lines = [line.strip() for line in text.split("\n")]
    lines = list(dict.fromkeys(line for line in lines if len(line) >= _SHORTEST_LINE))
    if not lines:
        raise InputError(f"{source} has no line of at least {_SHORTEST_LINE} characters. Give more text.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lines), generator=generator)[:samples].sort().values.tolist()
    notes = (
        [f"{source} holds {len(lines)} lines of text; {samples} were asked for"]
        if len(lines) < samples
        else []
    )
    return make_windows([tokenizer.whole(lines[i], length) for i in order], source, vocabulary, notes)


def windows_of_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    source: str,
    vocabulary: int,
    whole: bool = False,
) -> TokenWindows:
    """One window a record, cut to `length` tokens: of texts as text, of conversations as the chat template has them.

    A template writes the begin token itself, or leaves it out: nothing is put before it. With `whole`, each text is
    read as an encoder reads it: special tokens stand at both ends.

    Raises:
        InputError: a conversation that the template refuses, or no record of two tokens.
    """
    found: list[list[int]] = []
    for record in records:
        if record.text is None:
            own = tokenizer.encode(_rendered(record, tokenizer))
        elif whole:
            own = tokenizer.whole(record.text, length)
        else:
            own = [*tokenizer.first, *tokenizer.encode(record.text)]
        if len(own[:length]) >= 2:
            found.append(own[:length])
    if not found:
        raise InputError(f"{source} holds no sample of two tokens or more.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found), generator=generator)[:samples].sort().values.tolist()
    notes = [f"{source} holds {len(found)} samples; {samples} were asked for"] if len(found) < samples else []
    return make_windows([found[i] for i in order], source, vocabulary, notes)


def _rendered(record: Record, tokenizer: Tokenizer) -> str:
    if tokenizer.chat is None:
        raise InputError(
            f"{record.where} has messages, but the model has no chat template. Give text instead."
        )
    try:
        return tokenizer.chat(record)
    except TemplateError as error:
        raise InputError(
            f"{record.where}: the chat template refuses these messages: {str(error).rstrip('.')}."
        ) from None


def text_of_dataset(name: str) -> str:
    """Text of a data set given as ``name``, ``name:configuration`` or ``name:configuration:split``.

    Raises:
        MissingDependencyError: the package datasets is not installed.
        InputError: no such data set, or no hub.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingDependencyError("datasets", "datasets", f"Calibrating on the data set {name}") from None
    parts = name.split(":")
    try:
        rows = datasets.load_dataset(
            parts[0], parts[1] if len(parts) > 1 else None, split=parts[2] if len(parts) > 2 else "train"
        )
        return "\n".join(str(row["text"]) for row in rows.select(range(min(len(rows), 20_000))))
    except Exception as error:
        raise InputError(
            f"{name} is neither a file nor a data set with a text column that can be had here ({first_line(error)})."
        ) from None


SAMPLING: Final = "Sample text from the model"


def sample_from_model(
    model: Any,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    vocabulary: int,
    batch: int = 16,
    progress: Progress = silent,
) -> TokenWindows:
    """Windows that the model writes itself, by sampling at temperature 1 from its own distribution.

    Args:
        model: a transformers causal language model.
        tokenizer: for the first token; without one, first tokens are drawn at random.
        samples: windows.
        length: tokens of a window.
        seed: of every draw; the global generator is left as it was.
        vocabulary: number of ids.
        batch: windows sampled at once.
        progress: told after every token of a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    windows: list[Tensor] = []
    with torch.no_grad():
        while len(windows) < samples:
            rows = min(batch, samples - len(windows))
            if tokenizer.first:
                ids = torch.tensor([list(tokenizer.first)] * rows)
            else:
                ids = torch.randint(vocabulary, (rows, 1), generator=generator)
            ids = ids.to(model.device)
            step, cache = ids, None
            while ids.shape[1] < length:
                out = model(input_ids=step, use_cache=True, **{cache_argument(model): cache})
                cache = cache_of(out)
                probabilities = torch.softmax(out.logits[:, -1].double().cpu(), dim=-1)
                step = torch.multinomial(probabilities, 1, generator=generator).to(model.device)
                ids = torch.cat([ids, step], dim=1)
                written = len(windows) // batch * length + ids.shape[1]
                progress(written, -(-samples // batch) * length, SAMPLING)
            windows += list(ids[:, :length].cpu())
    return make_windows(windows, "text sampled from the model itself", vocabulary)
