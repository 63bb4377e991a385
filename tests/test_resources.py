"""What a recipe takes of a machine's memory, and which checkpointing auto chooses by it."""

from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoConfig

from ochat_train.model.activations import Share, count_activations
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.training import resources
from ochat_train.training.resources import (
    RESERVED,
    AvailableMemory,
    MemoryPlan,
    free_host_bytes,
    nearest_that_fits,
    plan_disk,
    plan_memory,
    size_of,
)
from tests.e2e.harness import ROOT

GIB = 2**30
POLICIES = ("none", "every_4", "every_3", "every_2", "full")


def published(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/openchat_v3.2_super_13b.yaml", ["packing.tokens_per_gpu=8192", *overrides])


def llama(num_layers: int = 8) -> Any:
    return AutoConfig.for_model(
        "llama",
        vocab_size=32_002,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def plan(recipe: Recipe, gpu_bytes: int | None, config: Any, **others: Any) -> MemoryPlan:
    machine = AvailableMemory(gpu_bytes, others.pop("host_bytes", 1000 * GIB), is_here=False)
    return plan_memory(recipe, machine, config, size_of(recipe, config, 0), others.pop("num_processes", 8), **others)


def test_auto_takes_the_first_policy_that_fits() -> None:
    recipe, config = published("model.checkpointing=auto"), llama()
    totals = {}
    for policy in POLICIES:
        fixed = plan(published(f"model.checkpointing={policy}"), 80 * GIB, config)
        totals[policy] = fixed.total(fixed.own)
    assert list(totals.values()) == sorted(totals.values(), reverse=True)
    for policy, total in totals.items():  # and the one before it, which needs more, does not fit
        found = plan(recipe, int(total / (1 - RESERVED)) + 2, config)
        assert (found.policy, found.fits_device(found.own)) == (policy, True)
    too_small = plan(recipe, totals["full"] // 2, config)
    assert too_small.policy == "full" and not too_small.fits_device(too_small.own)


def test_a_host_has_what_a_multimodal_model_has_beside_its_text_part_and_a_gpu_has_not() -> None:
    whole = AutoConfig.for_model("llava", text_config=llama(2))
    of_text, of_whole = (plan(published(), 80 * GIB, config) for config in (whole.text_config, whole))
    assert of_whole.needs(of_whole.own) == of_text.needs(of_text.own)
    more = 2 * of_whole.size.num_untrained  # bytes, in bfloat16
    assert more > 0 and of_whole.host_needs(of_whole.own) == of_text.host_needs(of_text.own) + more
    on_cpu = plan(published(), None, whole)
    assert on_cpu.total(on_cpu.own) == plan(published(), None, whole.text_config).total(on_cpu.own) + more


def test_auto_tries_no_policy_of_more_layers_than_there_are() -> None:
    recipe, config = published("model.checkpointing=auto"), llama(2)
    none, full = (plan(published(f"model.checkpointing={name}"), 80 * GIB, config) for name in ("none", "full"))
    between = (full.total(full.own) + none.total(none.own)) // 2
    found = {plan(recipe, int(total / (1 - RESERVED)), config).policy for total in (0, between, none.total(none.own))}
    assert found <= {"none", "every_2", "full"}


def test_on_a_cpu_the_processes_of_a_host_share_its_memory() -> None:
    recipe, config = published("model.checkpointing=full", "model.dtype=float32"), llama(2)
    found = plan(recipe, None, config, num_processes=4, num_local=2)
    total = found.total(found.own)
    for host, fits in ((2 * total, True), (2 * total - 2, False)):
        found = plan(recipe, None, config, num_processes=4, num_local=2, host_bytes=host)
        assert found.fits_device(found.own) is fits


def test_an_offloaded_optimizer_leaves_room_for_activations_on_a_gpu_and_none_on_a_cpu() -> None:
    recipe, offloaded = published(), published("zero.offload=optimizer")
    config = llama()
    own, other = plan(recipe, 80 * GIB, config), plan(offloaded, 80 * GIB, config)
    assert other.total(other.own) < own.total(own.own)
    auto = [published("model.checkpointing=auto", *words) for words in ([], ["zero.offload=optimizer"])]
    between = int((own.total(own.own) - GIB / 1024) / (1 - RESERVED))
    kept, chosen = (plan(each, between, config) for each in auto)
    assert not kept.fits_device(kept.own) and chosen.fits_device(chosen.own)
    on_cpu = plan(offloaded, None, config)
    needs = on_cpu.needs(on_cpu.own)
    assert on_cpu.total(on_cpu.own) == needs.total + needs.host > needs.total


def test_8_bits_are_planned_and_advised() -> None:
    config = llama()
    own = plan(published(), 80 * GIB, config, num_processes=1)
    other = plan(published("optim.algorithm=adamw_8bit"), 80 * GIB, config, num_processes=1)
    saved = own.needs(own.own).optimizer - other.needs(other.own).optimizer
    assert saved == pytest.approx((8 - 2 - 8 / 256) * own.size.num_trained, rel=1e-6)
    # Without host memory for an offloaded optimizer, and already at the least of everything else.
    enough = int(other.total(other.own) / (1 - RESERVED)) + 2
    tight = published("packing.tokens_per_gpu=4096", "zero.stage=3")
    small = plan_memory(tight, AvailableMemory(enough, 2 * GIB, is_here=True), config, size_of(tight, config, 0), 1)
    assert not small.fits(small.own)
    assert nearest_that_fits(small).startswith("set zero.stage: 2, zero.offload: none and optim.algorithm: adamw_8bit")


@pytest.mark.parametrize(
    ("line", "folder", "limit", "use", "reclaimable"),
    [
        ("0::/jobs/7/step", "jobs/7", "memory.max", "memory.current", "inactive_file"),
        (
            "9:cpuset,memory:/jobs/7",
            "memory/jobs/7",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_the_memory_of_a_control_group_is_all_that_its_processes_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str, limit: str, use: str, reclaimable: str
) -> None:
    """As Slurm and containers set it, on a group or one above it; the files are the kernel's."""
    (tmp_path / "cgroup").write_text(f"12:pids:/\n{line}\n1:name=systemd:/\n")
    group = tmp_path / folder
    group.mkdir(parents=True)
    monkeypatch.setattr(resources, "_CGROUP_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path)
    assert free_host_bytes() > 2**20
    (group / use).write_text("700000\n")
    (group / "memory.stat").write_text(f"anon 1\n{reclaimable} 200000\n")
    (group / limit).write_text("1000000\n")
    assert free_host_bytes() == 500000
    (group / limit).write_text("max\n")
    assert 0.5 < free_host_bytes() / psutil.virtual_memory().available < 2


def test_only_what_a_run_replaces_is_room_that_it_has_already(tmp_path: Path) -> None:
    for name in ("step-00000005", "step-00000009", "model", "models/step-00000005", "step-00000011.pruned"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_bytes(bytes(1000))
    for name in ("step-00000007.damaged", "step-00000010.undone", "models/step-00000007.undone", "tensorboard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(10**6))
    (tmp_path / "step-00000006").symlink_to(tmp_path / "tensorboard")
    recipe = published(f"checkpoint.dir={tmp_path}")
    size = size_of(recipe, llama(), 0)
    assert plan_disk(recipe, size, 100).taken == 5000
    assert plan_disk(recipe, size, 100, start=5).taken == 4000  # the newer one is set aside


def test_a_sequence_that_fits_no_gpu_is_shared() -> None:
    config = llama(2)
    whole, halves, eighths = (
        published(f"packing.tokens_per_gpu={tokens}", f"packing.sequence_parallel={shared}", "data.max_tokens=131072")
        for tokens, shared in ((131_072, 1), (65_536, 2), (16_384, 8))
    )
    totals = [
        found.total(found.own) for found in (plan(recipe, 80 * GIB, config) for recipe in (whole, halves, eighths))
    ]
    assert totals == sorted(totals, reverse=True)
    tight = plan(whole, int(totals[1] / (1 - RESERVED)) + 2, config)
    assert nearest_that_fits(tight) == "set packing.sequence_parallel: 2 and packing.tokens_per_gpu: 65536"
    tighter = plan(halves, int(totals[2] / (1 - RESERVED)) + 2, config)
    assert nearest_that_fits(tighter) == "set packing.sequence_parallel: 8 and packing.tokens_per_gpu: 16384"


def test_shares_keep_a_copy_of_the_attention_and_repeated_keys() -> None:
    """Before and after the exchange the output is another tensor."""
    config, tokens = llama(2), 1024
    config.num_key_value_heads = 2
    whole, halves, quarters = (
        count_activations(config, num_tokens=num_tokens, dtype="bfloat16", checkpointing="none").kept
        for num_tokens in (tokens, Share(tokens, 2), Share(tokens, 4))
    )
    width, of_head = config.hidden_size, config.hidden_size // config.num_attention_heads
    assert halves - whole == 2 * tokens * 2 * width
    assert quarters - halves == 2 * tokens * 2 * 2 * 2 * of_head  # each of two heads twice, of keys and of values
