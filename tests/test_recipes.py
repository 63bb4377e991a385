"""The recipes for known bases: memory, plan and time at the base's own sizes, and two steps of its small copy."""

import copy
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from ochat_train.doctor.case import Case
from ochat_train.doctor.checks import examine
from ochat_train.model.pretrained import load_config, max_positions_of, quadratic_length_of
from ochat_train.model.small import small_model
from ochat_train.model.text_part import auto_class
from ochat_train.preprocess.run import preprocess
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, RunPlan, make_table
from ochat_train.train import train as train_run
from ochat_train.training.engine import World, join_process_group
from ochat_train.training.resources import AvailableMemory, MemoryPlan, plan_memory, show_bytes, size_of
from ochat_train.training.schedule import auto_learning_rate
from ochat_train.training.setup import check_options, prepare
from ochat_train.training.speed import H100, Machine, Work, find_utilisation, predict
from ochat_train.training.stopping import Watchdog
from tests.base_templates import DEFAULT_SYSTEM, SYSTEM_IN_TURN, TRIMMED
from tests.e2e.harness import ROOT, events, write_dump
from tests.small_tokenizers import write_base

ALONE = World(0, 1, 0, torch.device("cpu"))
GPU_GIB = {"80": 79.1}  # as torch has it, of what is sold as so many GB
DEVICES = {"80": H100}
TOKENS_PER_STEP = 8 * 32_768  # of the published run
# Of that run: conversations, tokens in each, and the mean length that a token's sequence has; see training/speed.py.
NUM_CONVERSATIONS, LENGTH, PAIRS_PER_TOKEN = 80_000, 1825, 2102


def sizes(model_type: str, width: int, inner: int, layers: int, heads: int, keys: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    } | others


_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3 = {
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": _LLAMA_3_ROPE,
}
QWEN_3 = {
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
QWEN_3_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
GEMMA_3_TEXT = {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
GEMMA_3 = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 256,
    "image_token_index": 262_144,
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
# What the makers publish in config.json, by recipe.
BASES = {
    "llama_3.1_8b_8x80gb": sizes("llama", 4096, 14_336, 32, 32, 8, **LLAMA_3),
    "llama_3.1_8b_128k_8x80gb": sizes("llama", 4096, 14_336, 32, 32, 8, **LLAMA_3),
    "llama_3.3_70b_lora_8x80gb": sizes("llama", 8192, 28_672, 80, 64, 8, **LLAMA_3),
    "qwen3_8b_8x80gb": sizes("qwen3", 4096, 12_288, 36, 32, 8, **QWEN_3),
    "qwen3_30b_a3b_8x80gb": sizes("qwen3_moe", 2048, 6144, 48, 32, 4, **QWEN_3, **QWEN_3_EXPERTS),
    "mistral_7b_8x80gb": sizes(
        *("mistral", 4096, 14_336, 32, 32, 8),
        vocab_size=32_000,
        max_position_embeddings=32_768,
        sliding_window=4096,
        rope_theta=10_000.0,
    ),
    "gemma3_4b_2x80gb": GEMMA_3 | {"text_config": sizes("gemma3_text", 2560, 10_240, 34, 8, 4, **GEMMA_3_TEXT)},
    "gemma3_12b_8x80gb": GEMMA_3 | {"text_config": sizes("gemma3_text", 3840, 15_360, 48, 16, 8, **GEMMA_3_TEXT)},
    "phi_4_8x80gb": sizes(
        *("phi3", 5120, 17_920, 40, 40, 10),
        vocab_size=100_352,
        max_position_embeddings=16_384,
        original_max_position_embeddings=16_384,
        rope_theta=250_000.0,
        pad_token_id=100_351,
    ),
    "smollm3_3b_1x80gb": sizes(
        *("smollm3", 2048, 11_008, 36, 16, 4),
        vocab_size=128_256,
        max_position_embeddings=65_536,
        no_rope_layer_interval=4,
        rope_theta=5e6,
        tie_word_embeddings=True,
    ),
    "olmo2_7b_4x80gb": sizes(
        "olmo2", 4096, 11_008, 32, 32, 32, vocab_size=100_352, max_position_embeddings=4096, rope_theta=500_000.0
    ),
    "gpt_oss_20b_8x80gb": sizes(
        *("gpt_oss", 2880, 2880, 24, 64, 8),
        vocab_size=201_088,
        max_position_embeddings=131_072,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        rope_theta=150_000.0,
        rope_scaling=GPT_OSS_ROPE,
    ),
}
# Stand-ins for the bases' own templates.
OWN_TEMPLATES = {
    "llama_3.3_70b_lora_8x80gb": TRIMMED,
    "gemma3_12b_8x80gb": SYSTEM_IN_TURN,
    "phi_4_8x80gb": DEFAULT_SYSTEM,
    "gpt_oss_20b_8x80gb": DEFAULT_SYSTEM,
}
each_recipe = pytest.mark.parametrize("name", BASES)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    """A group of one, for the whole module."""
    join_process_group(ALONE)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    write_dump(folder, 26)
    return folder / "dump.json"


@cache
def config_of(name: str) -> Any:
    """The base's configuration, as it is loaded from its config.json."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(BASES[name]))
        return load_config(folder, None, 0)


@cache
def memory_of(name: str) -> MemoryPlan:
    """The memory plan on the GPUs in the name.

    Activations are counted on four layers, and each further one adds as much as the last two did: the whole model would
    take seconds.
    """
    recipe, config, short = load_recipe(ROOT / f"recipes/{name}.yaml"), config_of(name), {}
    for number in (2, 4):
        short[number] = plan_of(name, recipe, copy.deepcopy(config), num_layers=number)
    kept = {number: plan.activations.kept for number, plan in short.items()}
    kept_by_all = kept[4] + (kept[4] - kept[2]) // 2 * (config.get_text_config().num_hidden_layers - 4)
    return replace(short[4], config=config, activations=replace(short[4].activations, kept=kept_by_all))


def plan_of(name: str, recipe: Recipe, config: Any, *, num_layers: int | None = None) -> MemoryPlan:
    """The memory plan whose activations are those of a model with so many layers; None: all."""
    num_gpus, gigabytes = gpus_of(name)
    size = size_of(recipe, config, 0 if recipe.model.lora is None else 3)
    check_options(recipe, config, size, num_gpus)
    if num_layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = (list(dict.fromkeys(text.layer_types)) * num_layers)[:num_layers]
    gpus = AvailableMemory(int(GPU_GIB[gigabytes] * 2**30), 2**50, is_here=False)
    return plan_memory(recipe, gpus, config, size, num_gpus)


def gpus_of(name: str) -> tuple[int, str]:
    """How many GPUs the name has, and of how many GB."""
    found = re.search(r"_(\d+)x(\d+)gb$", name)
    assert found is not None
    return int(found[1]), found[2]


def test_every_recipe_whose_name_has_gpus_is_here() -> None:
    assert sorted(BASES) == sorted(path.stem for path in (ROOT / "recipes").glob("*_*x*gb.yaml"))


@each_recipe
def test_its_memory_fits_its_gpus_as_the_table_says(name: str) -> None:
    plan = memory_of(name)
    assert plan.fits(plan.own)
    assert row_of(name) in (ROOT / "docs/gpus.md").read_text().splitlines()


def test_four_layers_plan_what_all_do() -> None:
    name = "smollm3_3b_1x80gb"
    whole = plan_of(name, load_recipe(ROOT / f"recipes/{name}.yaml"), config_of(name))
    assert memory_of(name).activations == whole.activations


def row_of(name: str) -> str:
    """The recipe's row in docs/gpus.md."""
    plan = memory_of(name)
    recipe, (num_gpus, gigabytes) = plan.recipe, gpus_of(name)
    template = f"`{recipe.template}`" + (f", condition in `{recipe.condition_in}`" if recipe.condition_in else "")
    cells = (f"`{name}`", f"`{recipe.model.base}`", template, f"{num_gpus} x {gigabytes} GB")
    return f"| {' | '.join((*cells, show_bytes(plan.total(plan.own)), *time_of(recipe, plan)))} |"


def time_of(recipe: Recipe, plan: MemoryPlan) -> tuple[str, str]:
    """Tokens/s of a GPU and hours, as modelled."""
    name, num_gpus = recipe.name, plan.num_processes
    device = DEVICES[gpus_of(name)[1]]
    length = quadratic_length_of(plan.config, max_tokens=recipe.data.max_tokens)
    utilisation = find_utilisation(
        plan.config,
        quadratic_length=length,
        is_frozen=recipe.model.lora is not None,
        dtype=recipe.model.dtype,
        device_name=device,
    )
    if utilisation is None:
        return "not known", "not known"
    num_tokens = NUM_CONVERSATIONS * LENGTH * recipe.train.epochs
    work = Work(
        utilisation=utilisation,
        checkpointing=plan.policy,
        num_tokens=num_tokens,
        cost=num_tokens * (length + PAIRS_PER_TOKEN),
        efficiency=1.0,
        num_micro_batches=num_tokens // recipe.packing.tokens_per_gpu,
        grad_accum=recipe.packing.grad_accum,
        stage=recipe.zero.stage,
    )
    nearest = predict(work, Machine(device, device, num_gpus))[0]
    return f"{nearest.tokens_per_s:,.0f}", f"{nearest.seconds / 3600:.1f}"


@each_recipe
def test_its_plan_fills_steps_as_large_as_the_published_ones(name: str) -> None:
    recipe, config = load_recipe(ROOT / f"recipes/{name}.yaml"), config_of(name)
    most = recipe.data.max_tokens
    assert most <= max_positions_of(config)
    shape = PlanShape(
        capacity=recipe.packing.capacity,
        world_size=gpus_of(name)[0] // recipe.packing.sequence_parallel,
        grad_accum=recipe.packing.grad_accum,
        quadratic_length=quadratic_length_of(config, max_tokens=most),
    )
    assert shape.room == TOKENS_PER_STEP
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(7.0, 1.0, 3000), 16, most).astype(np.int32)
    lengths[::300] = most
    planned = make_table(RunPlan(lengths, np.ones(len(lengths)), shape, DataOrder(len(lengths), 0), 1))
    assert planned.num_tokens == lengths.sum() and planned.fill > 0.85


@each_recipe
def test_its_learning_rate_is_known(name: str) -> None:
    rate = load_recipe(ROOT / f"recipes/{name}.yaml").optim.lr
    if rate == "auto":
        rate = auto_learning_rate(config_of(name).get_text_config(), 0.6 * TOKENS_PER_STEP).value
    assert 1e-6 <= rate <= 3e-4
    comment = (ROOT / f"recipes/{name}.yaml").read_text().partition("name:")[0]
    assert "Learning rate:" in comment


@each_recipe
def test_two_steps_of_its_small_copy_are_trained(name: str, dump: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt4", chat_template=OWN_TEMPLATES.get(name))
    small = small_model(config_of(name), longest=256).config
    small.get_text_config().vocab_size = 1024
    auto_class(small).from_config(small).save_pretrained(base)
    recipe = load_recipe(
        ROOT / f"recipes/{name}.yaml",
        [
            f"model.base={base}",
            "model.dtype=float32",
            f"data.store={tmp_path / 'store'}",
            *(f"data.sources.{number}.path={dump}" for number in (0, 1)),
            "data.sources.0.where={model: careful}",
            "data.sources.1.where_not={model: careful}",
            "data.max_tokens=256",
            "packing.tokens_per_gpu=256",
            "packing.grad_accum=2",
            "packing.sequence_parallel=1",
            "optim.lr=1e-3",
            "train.max_steps=2",
            f"checkpoint.dir={tmp_path / 'run'}",
        ],
    )
    preprocess(recipe, num_workers=1)
    run = prepare(recipe, ALONE)
    with Watchdog(ALONE) as watchdog:
        train_run(run, ALONE, watchdog)
    steps = events(run.dir, "step")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["loss"] > 0 and step["grad_norm"] > 0 and not step["skipped"] for step in steps)
    assert all(loss is not None for loss in steps[0]["loss_by_condition"].values())
    assert json.loads((base / "config.json").read_text())["model_type"] == BASES[name]["model_type"]


def test_a_base_without_its_weights_is_planned_all_the_same(tmp_path: Path) -> None:
    """Before they are fetched: configuration and tokenizer are small."""
    name = "olmo2_7b_4x80gb"
    base = write_base(tmp_path / "base", "gpt4")
    (base / "config.json").write_text(json.dumps(BASES[name]))
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml", [f"model.base={base}"])
    found = {each.name: each for each in examine(Case(recipe, f"recipes/{name}.yaml", True, 4, GPU_GIB["80"]))}
    assert found["model"].state == "problem" and "holds no weights" in found["model"].detail
    assert "holds no weights" in found["template rows"].detail
    assert found["memory"].detail.startswith(show_bytes(memory_of(name).total(memory_of(name).own)))
    assert found["attention"].state == found["settings"].state == "ok"
