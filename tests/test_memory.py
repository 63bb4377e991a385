"""What the planner of memory says, against real models, real engines and real files."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ochat_train.model.loss import CHUNK_TOKENS
from ochat_train.model.memory import (
    Activations,
    MemoryNeeds,
    ZeroSetting,
    checkpoint_bytes,
    count_activations,
    live_bytes,
    measure_size,
    memory_needs,
    run_bytes,
)
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from ochat_train.training.engine import World, join_process_group
from tests.e2e.engine_bytes import engine_bytes, small_config
from tests.e2e.harness import ROOT, free_port

Dtype = Literal["bfloat16", "float32"]
NUM_TOKENS, WIDTH, MLP, KEYS, HEADS, LAYERS = 1200, 128, 352, 64, 4, 2
EACH_DTYPE = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
EACH_CHECKPOINTING = pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
NOTHING = Activations(0, 0, 0)


def llama(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 512,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": NUM_TOKENS,
    }
    return AutoConfig.for_model("llama", **{**sizes, **changes})


def real(config: Any, dtype: Dtype, *, checkpointing: bool) -> tuple[PackedCausalLM, PackedBatch]:
    lm = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model = PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing=checkpointing, num_conditions=1)
    length = NUM_TOKENS // 2
    example = Example(np.arange(length, dtype=np.int32) % 512, np.ones(length, np.float32))
    return model.train(), collate([example, example], [0, 0])


def copies_on_cpu(dtype: Dtype, *, checkpointing: bool) -> int:
    """What `sdpa` keeps and flash attention does not: the outputs of each sequence, beside all of them in one."""
    return 0 if checkpointing else LAYERS * NUM_TOKENS * WIDTH * DTYPES[dtype].itemsize


# ---- Activations ----


@EACH_DTYPE
def test_what_the_forward_pass_saves_is_what_is_counted(dtype: Dtype) -> None:
    model, batch = real(llama(), dtype, checkpointing=False)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(batch)
    counted = count_activations(llama(), num_tokens=NUM_TOKENS, dtype=dtype, checkpointing=False)
    expected = counted.kept + copies_on_cpu(dtype, checkpointing=False)
    assert hidden.requires_grad
    assert sum(saved.values()) == pytest.approx(expected, rel=0.05)


@EACH_DTYPE
@EACH_CHECKPOINTING
def test_the_peak_of_a_real_micro_batch_is_what_is_counted(dtype: Dtype, checkpointing: bool) -> None:
    model, batch = real(llama(), dtype, checkpointing=checkpointing)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with live_bytes([*model.parameters(), *model.buffers()]) as live:
        hidden = model.hidden(batch)
        kept = live.now
        sums = model.loss_head(hidden, batch.labels, batch.loss_weights, batch.condition_ids, batch.loss_positions)
        del hidden
        sums.nll.backward()
    counted = count_activations(llama(), num_tokens=NUM_TOKENS, dtype=dtype, checkpointing=checkpointing)
    copies = copies_on_cpu(dtype, checkpointing=checkpointing)
    assert kept == pytest.approx(counted.kept + copies, rel=0.05)
    assert live.peak == pytest.approx(counted.peak + copies, rel=0.05)


@pytest.mark.parametrize(("checkpointing", "num_bytes"), [(True, 2 * WIDTH), (False, None)])
def test_a_layer_of_llama_keeps_what_the_formula_says(checkpointing: bool, num_bytes: int | None) -> None:
    one, two = (
        count_activations(
            llama(num_hidden_layers=layers), num_tokens=NUM_TOKENS, dtype="bfloat16", checkpointing=checkpointing
        ).kept
        for layers in (1, 2)
    )
    norms, attention, mlp = 2 * (8 * WIDTH + 4), 4 * WIDTH + 4 * KEYS + 4 * HEADS, 8 * MLP
    assert two - one == NUM_TOKENS * (num_bytes or norms + attention + mlp)


def test_activations_grow_with_the_tokens_and_the_logits_with_the_vocabulary() -> None:
    num_tokens = 2 * CHUNK_TOKENS
    short, long = (
        count_activations(llama(), num_tokens=tokens, dtype="float32", checkpointing=False)
        for tokens in (num_tokens, 2 * num_tokens)
    )
    assert long.kept == pytest.approx(2 * short.kept, rel=0.01)
    wide = count_activations(llama(vocab_size=50_000), num_tokens=num_tokens, dtype="float32", checkpointing=False)
    # Twice the logits of a chunk in fp32, and the gradient by the weight.
    assert wide.logits - short.logits == pytest.approx((2 * CHUNK_TOKENS + WIDTH) * 4 * (50_000 - 512), rel=0.02)


def test_a_model_that_cannot_run_without_values_is_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        count_activations(config, num_tokens=64, dtype="float32", checkpointing=False)


# ---- Sizes ----


def test_the_size_is_that_of_the_model_and_shared_weights_count_once() -> None:
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * MLP + 2 * WIDTH
    size = measure_size(llama(), lora_rank=None, lora_targets="all-linear")
    assert size.num_weights == size.num_trained == LAYERS * layer + WIDTH + 2 * 512 * WIDTH
    tied = measure_size(llama(tie_word_embeddings=True), lora_rank=None, lora_targets="all-linear")
    assert tied.num_weights == size.num_weights - 512 * WIDTH
    assert (size.largest, size.vocab_size, size.hidden_size) == (512 * WIDTH, 512, WIDTH)


def test_only_adapters_are_trained_with_lora() -> None:
    whole = measure_size(llama(), lora_rank=None, lora_targets="all-linear")
    size = measure_size(llama(), lora_rank=8, lora_targets=("q_proj", "v_proj"))
    adapters = LAYERS * 8 * ((WIDTH + WIDTH) + (WIDTH + KEYS))
    assert (size.num_trained, size.num_weights) == (adapters, whole.num_weights + adapters)
    everywhere = measure_size(llama(), lora_rank=8, lora_targets="all-linear")
    assert everywhere.num_trained == LAYERS * 8 * (4 * WIDTH + 2 * (WIDTH + KEYS) + 3 * (WIDTH + MLP))
    with pytest.raises(ValueError, match=r"model\.lora\.targets query: no linear layer has such a name"):
        measure_size(llama(), lora_rank=8, lora_targets=("query",))


# ---- DeepSpeed ----


def needs_of(stage: int, dtype: Dtype, num_processes: int) -> MemoryNeeds:
    size = measure_size(small_config(), lora_rank=None, lora_targets="all-linear")
    setting = ZeroSetting(stage, False, num_processes, dtype, bucket=1000)
    return memory_needs(size, NOTHING, setting, on_gpu=False)


def check_engine(found: dict[str, int], stage: int, dtype: Dtype, num_processes: int) -> None:
    needs = needs_of(stage, dtype, num_processes)
    assert found["weights"] == pytest.approx(needs.weights, rel=0.05)
    assert found["master"] == pytest.approx(needs.master, rel=0.05)
    assert found["optimizer"] == pytest.approx(needs.optimizer, rel=0.05)
    states = needs.states
    if (stage, dtype) == (1, "float32"):  # all gradients are there only until they are reduced
        states = needs.states - 4 * small_size()
    if stage == 3:
        assert found["behind_backward"] >= 0.95 * states  # and what it keeps gathered
    else:
        assert found["behind_backward"] == pytest.approx(states, rel=0.05)


def small_size() -> int:
    return measure_size(small_config(), lora_rank=None, lora_targets="all-linear").num_trained


@pytest.fixture(scope="module")
def process_group() -> None:
    join_process_group(World(0, 1, 0, torch.device("cpu")))


STAGES: list[tuple[int, Dtype]] = [
    (0, "float32"),
    (1, "float32"),
    (2, "float32"),
    (3, "float32"),
    (1, "bfloat16"),
    (2, "bfloat16"),
    (3, "bfloat16"),
]


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_an_engine_has_the_planned_bytes_in_memory_and_in_its_checkpoint(
    stage: int, dtype: Dtype, tmp_path: Path, process_group: None
) -> None:
    check_engine(engine_bytes(stage, dtype, save_to=tmp_path), stage, dtype, 1)
    size = small_size()
    small_files = checkpoint_bytes(0, stage=stage, dtype=dtype)
    planned = checkpoint_bytes(size, stage=stage, dtype=dtype) - small_files
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.pt"))
    assert written == pytest.approx(planned, rel=0.05)


def test_two_processes_have_the_planned_bytes_each() -> None:
    engines: list[tuple[int, Dtype]] = [(2, "bfloat16"), (3, "float32")]
    words = [word for stage, dtype in engines for word in (str(stage), dtype)]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.engine_bytes", *words],
            cwd=ROOT,
            env=os.environ
            | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
            | group,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    first, second = (rank.communicate(timeout=150)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], first[-3000:] + second[-3000:]
    lines = [line.removeprefix("BYTES ") for line in first.splitlines() if line.startswith("BYTES ")]
    for (stage, dtype), line in zip(engines, lines, strict=True):
        check_engine(orjson.loads(line), stage, dtype, 2)


def test_llama_2_13b_with_zero_2_on_eight_gpus_is_what_a_hand_computes() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32_000,
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        max_position_embeddings=4096,
    )
    size = measure_size(config, lora_rank=None, lora_targets="all-linear")
    weights = 40 * (4 * 5120**2 + 3 * 5120 * 13_824 + 2 * 5120) + 5120 + 2 * 32_000 * 5120
    assert size.num_weights == weights == 13_015_864_320
    activations = count_activations(config, num_tokens=32_768, dtype="bfloat16", checkpointing=True)
    # 40 inputs of layers, and that of the last norm; beside them the norm's and rotary angles.
    assert activations.kept == pytest.approx(40 * 32_768 * 5120 * 2, rel=0.15)
    needs = memory_needs(size, activations, ZeroSetting(2, False, 8, "bfloat16"), on_gpu=True)
    assert needs.weights == 26_031_728_640
    assert needs.gradients == needs.master == 6_507_932_160
    assert needs.optimizer == 13_015_864_320
    assert needs.buffers == 1_000_000_000
    assert needs.total == needs.states + activations.peak + 1_000_000_000
    # The published run had 80 GB each.
    assert 70e9 < needs.total < 80e9
    assert memory_needs(size, activations, ZeroSetting(2, False, 1, "bfloat16"), on_gpu=True).total > 200e9


def test_an_offloaded_optimizer_is_in_host_memory() -> None:
    size = measure_size(llama(), lora_rank=None, lora_targets="all-linear")
    on_gpu, offloaded = (
        memory_needs(size, NOTHING, ZeroSetting(2, offload, 2, "bfloat16", bucket=1000), on_gpu=True)
        for offload in (False, True)
    )
    part = size.num_weights // 2
    assert (offloaded.master, offloaded.optimizer, on_gpu.host) == (0, 0, 0)
    assert offloaded.host == pytest.approx((4 + 4 + 8 + 2) * part + 2 * size.largest, rel=1e-3)
    assert offloaded.total < on_gpu.total


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    size = measure_size(llama(), lora_rank=1, lora_targets=("q_proj",))
    needs = memory_needs(size, NOTHING, ZeroSetting(2, False, 1, "bfloat16", bucket=1000), on_gpu=True)
    assert needs.weights == 2 * size.num_weights
    assert needs.gradients + needs.master + needs.optimizer == 16 * size.num_trained < needs.weights / 10


def test_the_folder_of_a_run_has_one_checkpoint_more_than_it_keeps() -> None:
    assert run_bytes(100, 10, 5, keep=2, num_light=3) == 3 * 100 + 2 * 10 + 3 * 5
    without, with_adam = (checkpoint_bytes(1000, stage=2, dtype="float32", has_adam=adam) for adam in (0, 1))
    assert with_adam - without == 8 * 1000
