"""Runs beside a base in 4 bits: two processes against the naive loop, resume, both exports; DoRA and rsLoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import peft
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ochat_train.export import export
from ochat_train.model.exported import METADATA_FILE
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.store import TokenStore
from ochat_train.training.data import make_batch, make_run_plan
from ochat_train.training.schedule import learning_rate
from ochat_train.training.setup import prepare
from tests.e2e.harness import events, train, weights
from tests.e2e.test_lora import (
    ADAMW,
    ALONE,
    END_ID,
    LORA,
    SGD,
    engine_of,
    last_checkpoint,
    load_base,
    nll_of,
    process_group,
    recipe_for,
    recipes,
    train_here,
)

__all__ = ["process_group", "recipes"]  # fixtures
BITS = "model.lora.base_bits=4"


def base_in_4_bits(recipe: Recipe, **options: Any) -> Any:
    """The base as transformers loads it in 4 bits, with the tokens of the template."""
    folder = Path(recipe.checkpoint.dir) / "resized"
    load_base(recipe).save_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=recipe.model.dtype)
    for module in base.modules():
        if isinstance(module, Linear4bit):  # else some CPUs compute in bfloat16 where there are no gradients
            module.support_avx512bf16_for_cpu = False
    return base


def test_two_processes_equal_the_naive_loop_beside_the_base_of_transformers(
    recipes: dict[str, Path], tmp_path: Path
) -> None:
    """peft's own layers for 4 bits, stock attention, one sequence at a time, fp32; the run stops once between."""
    options = ["zero.stage=2", f"checkpoint.dir={tmp_path}", BITS]
    train(recipes["untied"], *options, "train.max_steps=1")
    assert "continuing" in train(recipes["untied"], *options)
    recipe = recipe_for(recipes["untied"], tmp_path, BITS)
    base = base_in_4_bits(recipe, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base.set_attn_implementation("eager")
    store = TokenStore(recipe.data.store)
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
        losses.append(0.0)
        for example in examples:
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            nll = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            loss = (nll * torch.from_numpy(example.loss_weights.copy())[1:]).sum() / total
            loss.backward()
            losses[-1] += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, SGD["grad_clip"])))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(consumed / len(store), peak=0.5, warmup=0.5, min_ratio=0.1)
        optimizer.step()
    found = events(tmp_path, "step")
    assert [step["loss"] for step in found] == pytest.approx(losses, rel=1e-5)
    assert [step["grad_norm"] for step in found] == pytest.approx(norms, rel=1e-5)
    expected = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    export(last_checkpoint(recipe), tmp_path / "adapter", adapter=True)
    ours = peft.load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    assert len(expected) == 28
    for name, value in expected.items():
        assert torch.allclose(ours[name.replace(".default", "")], value, rtol=0, atol=1e-6), name


KINDS = {
    "0-full": [BITS, "zero.stage=0", "model.checkpointing=full", "model.kernels=none"],
    "1-dora-rslora": [BITS, "model.lora.dora=true", "model.lora.rslora=true", "zero.stage=1"],
    "2-bfloat16": [BITS, "zero.stage=2", "model.dtype=bfloat16", "checkpoint.models.every_steps=1"],
    "dora": ["model.lora.dora=true", "model.lora.rslora=true", "zero.stage=2"],
}


@pytest.fixture(scope="module", params=KINDS)
def finished(
    request: pytest.FixtureRequest, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Recipe:
    """A run of each kind."""
    options = [*ADAMW, *KINDS[request.param], "train.max_steps=2"]
    recipe = recipe_for(recipes["tied"], tmp_path_factory.mktemp("finished"), *options)
    train_here(recipe)
    return recipe


def test_a_resumed_run_is_bitwise_the_run_in_one_go(finished: Recipe, tmp_path: Path) -> None:
    in_parts = finished.model_copy(update={"checkpoint": finished.checkpoint.model_copy(update={"dir": str(tmp_path)})})
    train_here(in_parts.model_copy(update={"train": finished.train.model_copy(update={"max_steps": 1})}))
    train_here(in_parts)
    ours, theirs = weights(tmp_path), weights(Path(finished.checkpoint.dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, last = (event["loss"] for event in events(tmp_path, "step"))
    assert last < first
    light = tmp_path / "models/step-00000002"  # the weights of the engine, not of the base that is loaded again
    if light.exists():
        model = AutoModelForCausalLM.from_pretrained(light).state_dict()
        assert all(torch.equal(model[name], value) for name, value in theirs.items())


def test_merged_model_and_adapter_compute_as_the_engine(finished: Recipe, tmp_path: Path) -> None:
    """In bfloat16 the merged matrix is rounded once more than base and adapters are."""
    run = prepare(finished, ALONE)
    engine = engine_of(run)
    state = engine.module.state_dict()
    assert not [name for name in state if "base_layer" in name or "absmax" in name]
    engine.eval()
    batch = make_batch(run.store, np.arange(3))
    with torch.no_grad():
        expected = float(engine(batch).nll)
    export(last_checkpoint(finished), tmp_path / "adapter", adapter=True)
    said = orjson.loads((tmp_path / "adapter" / METADATA_FILE).read_bytes())["base"]
    assert said["name"] == finished.model.base
    quantisation = said["quantization"]
    base = load_base(finished) if quantisation is None else base_in_4_bits(finished, **quantisation)
    models = {
        "merged": AutoModelForCausalLM.from_pretrained(run.dir / "model"),
        "adapter": peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")),
    }
    tolerance = 1e-6 if finished.model.dtype == "float32" else 2**-8
    for kind, model in models.items():
        assert nll_of(model, batch) == pytest.approx(expected, rel=tolerance), kind


def test_what_cannot_be_quantised_is_refused_in_a_line(recipes: dict[str, Path], tmp_path: Path) -> None:
    for option, key in ((BITS, "base_bits"), ("model.lora.dora=true", "dora")):
        with pytest.raises(ValueError, match=rf"model\.lora\.{key} cannot be used with zero\.stage 3"):
            load_recipe(recipes["tied"], [option, "zero.stage=3"])
