"""Runs with adapters: two processes against the naive loop, checkpoints without the base, resume, both exports."""

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ochat_train.conversations.template import TEMPLATES
from ochat_train.export import export, main
from ochat_train.model.pretrained import load_model
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.batch import PackedBatch
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import load_tokenizer
from ochat_train.train import export_model
from ochat_train.train import train as train_run
from ochat_train.training.checkpoint import find_checkpoints, load_checkpoint, manifest_of, read_checkpoint
from ochat_train.training.data import make_batch, make_batches, make_run_plan
from ochat_train.training.engine import World, join_process_group, train_step
from ochat_train.training.schedule import learning_rate
from ochat_train.training.setup import Run, build_engine, prepare
from ochat_train.training.stopping import Watchdog
from tests.e2e.harness import ROOT, events, preprocess, tiny_recipe, train, weights, write_dump

ALONE = World(0, 1, 0, torch.device("cpu"))
NUM_IDS = 1025
END_ID = 1024  # <|end_of_turn|>, which the base lacks
LORA = {"rank": 4, "alpha": 8.0}
# As in test_exactness.py: SGD, and a clip that acts in some steps and not in others.
SGD = {"algorithm": "sgd", "lr": 0.5, "weight_decay": 0.1, "grad_clip": 0.5, "warmup": 0.5}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    join_process_group(ALONE)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one epoch in three steps, beside a base with untied and one with tied embeddings."""
    folder = tmp_path_factory.mktemp("lora")
    write_dump(folder, 52)
    paths = {}
    for name in ("untied", "tied"):
        base = folder / name
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=END_ID,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=name == "tied",
        )
        LlamaForCausalLM(config).save_pretrained(base)
        model = {"base": str(base), "dtype": "float32", "checkpointing": "none", "lora": LORA}
        made = tiny_recipe(folder, optim=SGD, train={"epochs": 1, "seed": 5}, model=model)
        paths[name] = made.rename(folder / f"{name}.yaml")
    preprocess(paths["tied"])
    return paths


def load_base(recipe: Recipe) -> PreTrainedModel:
    dtype = recipe.model.dtype
    return load_model(recipe.model.base, None, dtype=dtype, num_ids=NUM_IDS, added_ids=[END_ID], seed=0)


def recipe_for(path: Path, run: Path, *overrides: str) -> Recipe:
    return load_recipe(path, [f"checkpoint.dir={run}", *overrides])


def train_here(recipe: Recipe) -> None:
    """What the command does, in this process."""
    run = prepare(recipe, ALONE)
    with Watchdog(ALONE) as watchdog:
        last = train_run(run, ALONE, watchdog)
    export_model(run, last.checkpoint)


def engine_of(run: Run) -> DeepSpeedEngine:
    """The engine as the last checkpoint left it."""
    assert run.resumed is not None
    engine = build_engine(run, ALONE)
    load_checkpoint(engine, run.resumed, ALONE)
    return engine


def whole(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Copies of all parameters; at ZeRO-3 put together."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


# ------------------------------------------------------------------------------------------------ exactness


def naive_loop(recipe: Recipe) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights, losses and gradient norms of peft's own model: one process, one sequence at a time, stock attention."""
    store, base = TokenStore(recipe.data.store), load_base(recipe)
    base.set_attn_implementation("eager")
    steps = list(make_run_plan(recipe, store, base.config, 2).steps())
    torch.manual_seed(recipe.train.seed)
    config = peft.LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": [END_ID], "lm_head": [END_ID]},
    )
    model = peft.get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, weight_decay=0.1)
    losses, norms, consumed = [], [], 0
    for step in steps:
        examples = [store[int(position)] for positions in step.bins for position in positions]
        consumed += len(examples)
        total = sum(float(example.loss_weights.sum()) for example in examples)
        optimizer.zero_grad()
        loss_sum = 0.0
        for example in examples:
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            nll = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            loss = (nll * torch.from_numpy(example.loss_weights.copy())[1:]).sum() / total
            loss.backward()
            loss_sum += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, SGD["grad_clip"])))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(consumed / len(store), peak=0.5, warmup=0.5, min_ratio=0.1)
        optimizer.step()
        losses.append(loss_sum)
    return dict(model.merge_and_unload().named_parameters()), losses, norms


@pytest.mark.parametrize(("stage", "name"), [(2, "untied"), (3, "tied")])
def test_two_processes_equal_the_naive_loop(recipes: dict[str, Path], stage: int, name: str, tmp_path: Path) -> None:
    options = [f"zero.stage={stage}", f"checkpoint.dir={tmp_path}"]
    if stage == 3:  # with a stop between
        train(recipes[name], *options, "train.max_steps=1")
    output = train(recipes[name], *options)
    assert ("continuing" in output) == (stage == 3)
    recipe = load_recipe(recipes[name])
    expected, losses, norms = naive_loop(recipe)
    given = weights(tmp_path)
    assert given.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(given[key], value, rtol=0, atol=1e-6), key  # fp32 sums in another order
    steps = events(tmp_path, "step")
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-5)
    assert min(norms) < SGD["grad_clip"] < max(norms), norms
    before = load_base(recipe).state_dict()
    assert all(torch.equal(given[key], before[key]) == ("norm" in key) for key in given)
    assert torch.equal(given["model.embed_tokens.weight"][:END_ID], before["model.embed_tokens.weight"][:END_ID])


# ------------------------------------------------------------------------------------------------ one process

ADAMW = ["optim.algorithm=adamw", "optim.lr=0.02"]
KINDS = {
    "0-checkpointing": ["zero.stage=0", "model.checkpointing=full"],
    "1-offload": ["zero.stage=1", "zero.offload=optimizer"],
    "3-bfloat16": ["zero.stage=3", "model.dtype=bfloat16"],
}


@pytest.fixture(scope="module", params=KINDS)
def finished(
    request: pytest.FixtureRequest, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Recipe:
    """A run of each kind."""
    options = [*ADAMW, *KINDS[request.param], "train.max_steps=3"]
    recipe = recipe_for(recipes["untied"], tmp_path_factory.mktemp("finished"), *options)
    train_here(recipe)
    return recipe


def last_checkpoint(recipe: Recipe) -> Path:
    return find_checkpoints(Path(recipe.checkpoint.dir))[-1]


def test_a_resumed_run_is_bitwise_the_run_in_one_go(finished: Recipe, tmp_path: Path) -> None:
    in_parts = finished.model_copy(update={"checkpoint": finished.checkpoint.model_copy(update={"dir": str(tmp_path)})})
    train_here(in_parts.model_copy(update={"train": finished.train.model_copy(update={"max_steps": 1})}))
    train_here(in_parts)
    run = Path(finished.checkpoint.dir)
    ours, theirs = weights(tmp_path), weights(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    keys = ("step", "loss", "grad_norm", "lr")
    last = [[event[key] for key in keys] for event in events(run, "step")]
    assert last == [[event[key] for key in keys] for event in events(tmp_path, "step")]
    assert last[-1][1] < last[0][1]  # it learns


def test_a_checkpoint_holds_nothing_of_the_base(finished: Recipe) -> None:
    checkpoint = last_checkpoint(finished)
    size = sum(file.stat().st_size for file in (checkpoint / "deepspeed").iterdir())
    base = (Path(str(finished.model.base)) / "model.safetensors").stat().st_size
    # 28 adapters of rank 4 in fp32, their two moments, and their copy in the model: a third of this tiny base.
    assert size < base / 2
    for file in (checkpoint / "deepspeed").glob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        names = {*state["module"], *(state["frozen_param_fragments"] or {})}
        assert {name.rpartition(".")[2] for name in names if ".default." not in name} == {
            "rows",
            "row_ids",
            "frozen_checksum",
        }


def test_a_step_moves_all_that_is_trained_and_no_bit_of_the_rest(finished: Recipe) -> None:
    run = prepare(finished, ALONE)
    engine = engine_of(run)
    before = whole(engine)
    step = next(run.plan.steps())
    train_step(
        engine,
        make_batches(run.store, step, ALONE),
        weight_sum=step.weight_sum,
        num_tokens=step.num_tokens,
        world_size=1,
        lr=0.02,
        mark=lambda doing: None,
    )
    after = whole(engine)
    frozen = dict(load_base(finished).named_parameters())
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(before[name], after[name]) is not parameter.requires_grad, name
        if not parameter.requires_grad:
            base = frozen[name.removeprefix("lm.").replace(".base_layer.", ".")]
            assert torch.equal(after[name], base), name


def nll_of(model: Any, batch: PackedBatch) -> float:
    """The weighted loss sum of a stock model, one sequence at a time."""
    nll = 0.0
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        with torch.no_grad():
            logits = model.eval()(batch.input_ids[None, start:end]).logits[0].float()
        losses = F.cross_entropy(logits, batch.labels[start:end], reduction="none")
        nll += float((losses * batch.loss_weights[start:end]).sum())
    return nll


def test_merged_model_and_adapter_compute_as_the_engine(finished: Recipe, tmp_path: Path) -> None:
    run = prepare(finished, ALONE)
    engine = engine_of(run)
    engine.eval()
    batch = make_batch(run.store, np.arange(3))
    with torch.no_grad():
        expected = float(engine(batch).nll)
    export(last_checkpoint(finished), tmp_path, adapter=True)
    models = {
        "merged": AutoModelForCausalLM.from_pretrained(run.dir / "model"),
        "adapter": peft.PeftModel.from_pretrained(load_base(finished), str(tmp_path)),
    }
    # The product with the merged matrix sums in another order; in bfloat16 that matrix is rounded once more.
    tolerance = 1e-6 if finished.model.dtype == "float32" else 2**-8
    for kind, model in models.items():
        assert nll_of(model, batch) == pytest.approx(expected, rel=tolerance), kind


# --------------------------------------------------------------------------- tokens that the base has, but never saw

IM_END, IM_START = 1024, 1025


@pytest.fixture(scope="module", params=["untied", "tied"])
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside a base that has ChatML's tokens, with rows of zeros for the end and a copy for the header."""
    folder = tmp_path_factory.mktemp(request.param)
    write_dump(folder, 40)
    tokenizer = load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["chatml"])
    tokenizer.save(folder / "base")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=IM_START + 10,  # with rows beyond the tokenizer
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=request.param == "tied",
    )
    lm = LlamaForCausalLM(config)
    ids = [tokenizer.special_ids[token] for token in ("<|im_end|>", "<|im_start|>")]
    assert sorted(ids) == [IM_END, IM_START]
    with torch.no_grad():
        for weight in (lm.model.embed_tokens.weight, lm.lm_head.weight):
            weight[ids[0]] = 0
            weight[ids[1]] = weight[7]
    lm.save_pretrained(folder / "base")
    model = {"base": str(folder / "base"), "dtype": "float32", "checkpointing": "none", "lora": LORA}
    path = tiny_recipe(folder, tokenizer=None, template="chatml", train={"epochs": 1, "seed": 5}, model=model)
    preprocess(path)
    return path


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def test_rows_of_the_templates_own_tokens_learn_and_no_bit_of_other_rows_changes(
    untrained: Path, tmp_path: Path
) -> None:
    options = [*ADAMW, *KINDS["1-offload" if untrained.parent.name.startswith("tied") else "3-bfloat16"]]
    train_here(recipe_for(untrained, tmp_path / "run", *options, "train.max_steps=1"))
    recipe = recipe_for(untrained, tmp_path / "run", *options, "train.max_steps=3")
    train_here(recipe)
    ours = weights(tmp_path / "run")
    before = load_model(recipe.model.base, None, dtype=recipe.model.dtype, num_ids=1026, added_ids=[], seed=0)
    others = [row for row in range(IM_START + 10) if row not in (IM_END, IM_START)]
    for name in TABLES:
        if name in ours:  # a tied head has no weights of its own
            was = before.state_dict()[name]
            assert torch.equal(ours[name][others], was[others])
            assert all(not torch.equal(ours[name][row], was[row]) for row in (IM_END, IM_START)), name
    run = prepare(recipe, ALONE)
    engine = engine_of(run)
    engine.eval()
    batch = make_batch(run.store, np.arange(3))
    with torch.no_grad():
        expected = float(engine(batch).nll)
    export(last_checkpoint(recipe), tmp_path / "adapter", adapter=True)
    assert expected == pytest.approx(nll_of(AutoModelForCausalLM.from_pretrained(run.dir / "model"), batch), rel=2**-8)
    base = AutoModelForCausalLM.from_pretrained(str(recipe.model.base), dtype=before.dtype)  # needs no more rows
    adapter = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert expected == pytest.approx(nll_of(adapter, batch), rel=1e-6 if before.dtype == torch.float32 else 2**-8)


def test_without_the_key_rows_that_the_base_has_stay_as_they_are(untrained: Path, tmp_path: Path) -> None:
    recipe = recipe_for(untrained, tmp_path, "model.lora.train_template_tokens=false", "train.max_steps=2", *ADAMW)
    train_here(recipe)
    before = load_file(Path(str(recipe.model.base)) / "model.safetensors")
    for name in TABLES:
        assert name not in before or torch.equal(weights(tmp_path)[name], before[name])


def test_a_checkpoint_from_before_the_key_goes_on_without_it_and_says_so(untrained: Path, tmp_path: Path) -> None:
    run, off = tmp_path / "run", "model.lora.train_template_tokens=false"
    train_here(recipe_for(untrained, run, off, "train.max_steps=1"))
    (checkpoint,) = find_checkpoints(run)
    known = read_checkpoint(checkpoint)
    del known.state.recipe["model"]["lora"]["train_template_tokens"]
    (checkpoint / "checkpoint.json").write_bytes(manifest_of(known))
    with pytest.raises(ValueError, match=r"model\.lora\.train_template_tokens: False -> True"):
        train_here(recipe_for(untrained, run, "train.max_steps=2"))
    train_here(recipe_for(untrained, run, off, "train.max_steps=2"))
    assert find_checkpoints(run)[-1].name == "step-00000002"


# ------------------------------------------------------------------------------------------------ exports


def test_the_adapter_command_writes_what_a_chat_with_peft_needs(recipes: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(recipes["tied"], tmp_path / "run", "train.max_steps=1")
    train_here(recipe)
    out = tmp_path / "adapter"
    main(["--adapter", str(last_checkpoint(recipe)), str(out)])
    names = {file.name for file in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "ochat_train.json", "generation_config.json"} <= names
    assert "model.safetensors" not in names and "config.json" not in names
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == END_ID and tokenizer.chat_template
    # As the documentation says, from the base as it was published.
    base = AutoModelForCausalLM.from_pretrained(str(recipe.model.base))
    base.resize_token_embeddings(len(tokenizer))
    adapter = peft.PeftModel.from_pretrained(base, str(out)).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    ids = torch.tensor([[1, 17, 300, END_ID, 8, END_ID]])
    with torch.no_grad():
        assert torch.allclose(adapter(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)


def test_an_export_beside_another_base_is_refused(recipes: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(load_recipe(recipes["tied"]))
    base.save_pretrained(tmp_path / "base")
    recipe = recipe_for(recipes["tied"], tmp_path / "run", f"model.base={tmp_path / 'base'}", "train.max_steps=1")
    train_here(recipe)
    base.get_submodule("model.norm").weight.data[3] = 7
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"model\.base .*/base holds other weights than those beside which .* trained"):
        export(last_checkpoint(recipe), tmp_path / "model")
    with pytest.raises(ValueError, match=r"trained beside other weights than those of model\.base now"):
        engine_of(prepare(recipe, ALONE))


def test_a_checkpoint_without_adapters_has_none_to_export(recipes: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_for(recipes["tied"], tmp_path / "run", "model.lora=null", "train.max_steps=1")
    train_here(recipe)
    with pytest.raises(ValueError, match=r"has no adapters, since its model\.lora was null; leave --adapter out"):
        export(last_checkpoint(recipe), tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()


def test_without_peft_a_run_ends_before_it_loads_the_base(
    recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("ochat_train.training.setup.load_model", refuse)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ValueError, match=r"model\.lora needs the package peft: pip install 'ochat_train\[lora\]'"):
        train_here(recipe_for(recipes["tied"], tmp_path))


def test_light_checkpoints_and_other_zero_stages_know_adapters(recipes: dict[str, Path], tmp_path: Path) -> None:
    """The states of adapters are converted, and each light checkpoint is the merged model of its step."""
    options = ["optim.algorithm=adamw", "optim.lr=0.01", "checkpoint.models.every_steps=1"]
    train_here(recipe_for(recipes["untied"], tmp_path / "whole", "zero.stage=2", *options))
    parts = tmp_path / "parts"
    train_here(recipe_for(recipes["untied"], parts, "zero.stage=3", *options, "train.max_steps=1"))
    train_here(recipe_for(recipes["untied"], parts, "zero.stage=1", *options))
    ours, theirs = weights(parts), weights(tmp_path / "whole")
    # As in test_resume.py: fp32 sums in another order, and Adam's updates of about the learning rate.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 5e-6
    for run, merged in ((parts, ours), (tmp_path / "whole", theirs)):
        first, *_, last = sorted((run / "models").iterdir())
        light, before = load_file(last / "model.safetensors"), load_file(first / "model.safetensors")
        assert light.keys() == merged.keys()
        assert all(torch.equal(light[name], tensor.bfloat16()) for name, tensor in merged.items())
        assert any(not torch.equal(light[name], before[name]) for name in light)
