"""Collect the text of, train and evaluate the small default model that ships with this project.

Three subcommands, each of which works from the files that lie beside this script:

    python train.py collect     # gathers text/train.txt.xz and text/heldout.txt from the running Python
    python train.py train       # trains the tokenizer and the model from text/train.txt.xz
    python train.py evaluate    # perplexity on text/heldout.txt, and greedy text for some prompts

The committed text is the input of record: `collect` gives other text under another Python version.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compot_deploy.embedded.documents import collect, read_documents

HERE = Path(__file__).resolve().parent

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
PROMPTS = (
    "The",
    "Return a",
    "A function is",
    "This module provides",
    "If the argument is",
    "When a class",
    "Note that",
    "The following",
)


# --------------------------------------------------------------------------------------------------
# train: the tokenizer and the model
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The shape of the decoder. Every linear layer's sides are multiples of 64."""

    vocab_size: int = 1792
    hidden_size: int = 192
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    positions: int = 512


# Most of the training is on short windows, which are cheaper; each phase runs until this share of the steps.
PHASES = ((0.6, 128), (0.85, 256), (1.0, 512))


def train_tokenizer(documents: list[str], vocab_size: int, folder: Path, positions: int) -> None:
    """Trains a byte-level BPE tokenizer and writes the files from which AutoTokenizer loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens and not {vocab_size}")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    settings = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Writes a JSON file in the layout that transformers uses."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def encode_documents(tokenizer, documents: list[str]) -> list[list[int]]:
    """Encodes each document with a begin token before it and an end token after it."""
    return [
        [
            tokenizer.bos_token_id,
            *tokenizer.encode(document, verbose=False),
            tokenizer.eos_token_id,
        ]
        for document in documents
    ]


def causal_attention(module, query, key, value, attention_mask, **options):
    """Attends within whole windows in float32, which a CPU does faster than transformers' own way."""
    import torch
    from torch.nn import functional as F

    with torch.autocast(query.device.type, enabled=False):
        output = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
        )
    return output.transpose(1, 2).contiguous(), None


def build_model(shape: Shape, seed: int):
    """Builds the untrained model."""
    import torch
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("causal_attention", causal_attention)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.03,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="causal_attention").float()


def add_dropout(model, rate: float) -> list:
    """Adds dropout after the embedding and after each attention and MLP block, while training only."""
    from torch.nn import functional as F

    def drop(module, _inputs, output):
        return F.dropout(output, rate, module.training)

    blocks = [model.model.embed_tokens]
    for layer in model.model.layers:
        blocks += [layer.self_attn.o_proj, layer.mlp.down_proj]
    return [block.register_forward_hook(drop) for block in blocks] if rate else []


def make_optimizers(model, args: argparse.Namespace) -> list:
    """Returns Muon for the matrices and AdamW for the rest, or AdamW for all."""
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embeddings, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = []
    if args.optimizer == "muon":
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=args.lr,
                weight_decay=args.weight_decay,
                adjust_lr_fn="match_rms_adamw",
                momentum=0.95,
            )
        )
    else:
        groups.append({"params": matrices, "weight_decay": args.weight_decay})
    optimizers.append(torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def rate_at(step: int, steps: int) -> float:
    """Returns the share of the learning rate: a short warm-up, a plateau, and a linear decay to zero."""
    warm = max(1, steps // 25)
    return min(1.0, (step + 1) / warm, (steps - step) / (0.6 * steps))


CONFIG_NAMES = """
    attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
    initializer_range intermediate_size max_position_embeddings mlp_bias model_type num_attention_heads
    num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps tie_word_embeddings use_cache vocab_size
    """.split()  # noqa: SIM905


def save_model(model, folder: Path) -> None:
    """Writes float16 weights, the configuration and the generation defaults."""
    import torch
    from safetensors.torch import save

    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding
            continue
        half = tensor.detach().cpu().to(torch.float16).contiguous()
        if not torch.isfinite(half).all():
            raise SystemExit(f"{name} does not fit float16")
        weights[name] = half
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    config = model.config
    content: dict[str, object] = {name: getattr(config, name) for name in CONFIG_NAMES}
    content |= {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0, "dtype": "float16"}
    write_json(folder / "config.json", content)
    generation = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**generation, "do_sample": False})


def windows(stream, length: int, batch: int, generator) -> Iterator:
    """Yields batches of windows for ever.

    Each pass over the stream cuts it into windows at a new random offset and shuffles them.
    """
    import torch

    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - length - 1, length)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in starts.split(batch):
            yield torch.stack([stream[i : i + length + 1] for i in chosen.tolist()])


def train(args: argparse.Namespace) -> None:
    """Trains the tokenizer and the model from the committed text."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoTokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape()
    partial = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    documents = read_documents(args.text / "train.txt.xz")
    random.Random(args.seed).shuffle(documents)
    train_tokenizer(sorted(documents), shape.vocab_size, partial, shape.positions)
    tokenizer = AutoTokenizer.from_pretrained(partial)
    count = round(len(documents) * args.valid_fraction)
    validation = encode_documents(tokenizer, documents[:count])
    stream = torch.tensor(
        [i for ids in encode_documents(tokenizer, documents[count:]) for i in ids], device=device
    )
    model = build_model(shape, args.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(stream)} training tokens")

    hooks = add_dropout(model, args.dropout)
    optimizers = make_optimizers(model, args)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.monotonic()
    phases = [
        (until, windows(stream, length, max(1, args.batch_tokens // length), generator))
        for until, length in PHASES
    ]
    seen = 0
    model.train()
    for step in range(args.steps):
        batch = next(next(source for until, source in phases if step < until * args.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate_at(step, args.steps)
        with torch.autocast(device, torch.bfloat16, enabled=args.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.numel() - len(batch)
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            valid, _ = mean_loss(model, validation, batch.shape[1] - 1)
            spent = time.monotonic() - start
            print(
                f"step {step + 1} loss {loss.item():.3f} valid {valid:.4f} tokens {seen} seconds {spent:.0f}",
                flush=True,
            )
    for hook in hooks:
        hook.remove()
    save_model(model, partial)
    shutil.rmtree(args.output, ignore_errors=True)
    partial.rename(args.output)
    print(f"wrote {args.output.name}: {seen} tokens seen in {time.monotonic() - start:.0f} s on {device}")


# --------------------------------------------------------------------------------------------------
# evaluate: perplexity on the held-out text, and greedy text
# --------------------------------------------------------------------------------------------------


def score(model, documents: list[list[int]], context: int) -> Iterator[tuple[float, int]]:
    """Yields the summed loss and the token count of each window of each document.

    The windows of a document overlap by half, and each token is scored once, in the first window that holds
    it, so that all but a document's first tokens are predicted from at least half a context.
    """
    import torch
    from torch.nn import functional as F

    device = next(model.parameters()).device
    for ids in documents:
        done = 1
        for start in range(0, max(1, len(ids) - context // 2), context // 2):
            window = torch.tensor([ids[start : start + context]], device=device)
            with torch.no_grad():
                logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            losses = F.cross_entropy(logits, window[0, 1:], reduction="none")[done - 1 - start :]
            done = start + window.shape[1]
            if len(losses):
                yield float(losses.sum()), len(losses)


def mean_loss(model, documents: list[list[int]], context: int) -> tuple[float, float]:
    """Returns the mean loss per token and its standard error, taking each window as one draw."""
    training = model.training
    model.eval()
    windows = list(score(model, documents, context))
    model.train(training)
    tokens = sum(count for _, count in windows)
    mean = sum(loss for loss, _ in windows) / tokens
    spread = sum((loss - mean * count) ** 2 for loss, count in windows)
    n = len(windows)
    return mean, math.sqrt(spread * n / max(1, n - 1)) / tokens


def greedy(model, tokenizer, prompt: str, tokens: int) -> str:
    """Returns a prompt with the model's greedy continuation."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    encoded = encoded.to(next(model.parameters()).device)
    output = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def evaluate(args: argparse.Namespace) -> None:
    """Prints the perplexity on the held-out text, greedy text, and checks the tokenizer's round trip."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).float().to(device).eval()
    path = args.text / "heldout.txt"
    documents = read_documents(path)
    for line in path.read_text(encoding="utf-8").splitlines():
        if tokenizer.decode(tokenizer.encode(line)) != line:
            raise SystemExit(f"the tokenizer does not give this line back: {line!r}")
    encoded = encode_documents(tokenizer, documents)
    tokens = sum(len(ids) - 1 for ids in encoded)
    size = sum(len(document.encode()) for document in documents)
    mean, error = mean_loss(model, encoded, model.config.max_position_embeddings)
    bits = mean * tokens / math.log(2) / size
    print(f"held-out: {len(documents)} documents, {size} bytes, {tokens} tokens")
    print(f"loss {mean:.4f} +- {error:.4f} nats per token")
    print(f"perplexity {math.exp(mean):.3f} +- {math.exp(mean) * error:.3f} per token")
    print(f"{bits:.4f} +- {bits * error / mean:.4f} bits per byte; perplexity {2**bits:.4f} per byte")
    for prompt in args.prompt or PROMPTS:
        print(f"\n--- {prompt!r}\n{greedy(model, tokenizer, prompt, args.tokens)}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("collect", help=collect.__doc__)
    command.add_argument("--text", type=Path, default=HERE / "text")
    command.add_argument("--seed", type=int, default=20)
    command.add_argument("--heldout-bytes", type=int, default=90_000)
    command.set_defaults(run=collect)

    command = commands.add_parser("train", help=train.__doc__)
    command.add_argument("--text", type=Path, default=HERE / "text")
    command.add_argument("--output", type=Path, default=HERE / "model")
    command.add_argument("--steps", type=int, default=1200)
    command.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    command.add_argument("--lr", type=float, default=8e-3)
    command.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    command.add_argument("--weight-decay", type=float, default=0.1)
    command.add_argument("--dropout", type=float, default=0.15)
    command.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where that is safe")
    command.add_argument(
        "--valid-fraction", type=float, default=0.04, help="share of documents to validate on"
    )
    command.add_argument("--report", type=int, default=150, help="steps between validations")
    command.add_argument("--seed", type=int, default=20)
    command.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    command.add_argument("--device", default="", help="cuda or cpu; cuda where there is one if not given")
    command.set_defaults(run=train)

    command = commands.add_parser("evaluate", help=evaluate.__doc__)
    command.add_argument("--text", type=Path, default=HERE / "text")
    command.add_argument("--model", type=Path, default=HERE / "model")
    command.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    command.add_argument("--tokens", type=int, default=80, help="new tokens per prompt")
    command.add_argument("--threads", type=int, default=0)
    command.add_argument("--device", default="")
    command.set_defaults(run=evaluate)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
