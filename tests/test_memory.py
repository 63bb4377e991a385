"""What the planner of memory says, against real models, real engines and real files."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ochat_train.files import free_port
from ochat_train.model.activations import Activations, Alone, count_activations
from ochat_train.model.checkpointing import BY_TIME, period_of, share_of
from ochat_train.model.lora import add_adapters
from ochat_train.model.loss import CHUNK_TOKENS
from ochat_train.model.memory import (
    MemoryNeeds,
    ZeroSetting,
    checkpoint_bytes,
    measure_size,
    memory_needs,
    run_bytes,
)
from ochat_train.model.pretrained import DTYPES
from ochat_train.training.engine import World, join_process_group
from ochat_train.training.speed import bytes_exchanged, bytes_sent
from tests.activation_grid import (
    HEADS,
    KEYS,
    KINDS,
    LAYERS,
    MLP,
    NUM_TOKENS,
    POLICIES,
    WIDTH,
    Dtype,
    compare,
    full_batch,
    measure,
    real_model,
    small,
)
from tests.e2e.engine_bytes import NUM_TOKENS as NUM_EXCHANGED
from tests.e2e.engine_bytes import engine_bytes, small_config
from tests.e2e.harness import ROOT
from tests.waiting import HANG_S

EACH_DTYPE = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
NOTHING = Activations(0, 0, 0)


def llama(**changes: Any) -> Any:
    return small("llama", **changes)


def copies_on_cpu(dtype: Dtype, policy: str) -> int:
    """What `sdpa` keeps and flash attention does not: the outputs of each sequence, beside all of them in one."""
    num_kept = LAYERS if policy == "none" else LAYERS - len(range(0, LAYERS, period_of(policy) or 1))
    return num_kept * NUM_TOKENS * WIDTH * DTYPES[dtype].itemsize


# ---- Activations ----


@EACH_DTYPE
def test_what_the_forward_pass_saves_is_what_is_counted(dtype: Dtype) -> None:
    model, batch = real_model(llama(), dtype, "none"), full_batch(NUM_TOKENS)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(batch)
    counted = count_activations(llama(), num_tokens=NUM_TOKENS, dtype=dtype, checkpointing="none")
    assert hidden.requires_grad
    assert sum(saved.values()) == pytest.approx(counted.kept + copies_on_cpu(dtype, "none"), rel=0.01)


@pytest.mark.parametrize(("dtype", "policy"), [("bfloat16", "none"), ("float32", "every_2"), ("float32", "full")])
def test_the_peak_of_a_real_micro_batch_is_what_is_counted(dtype: Dtype, policy: str) -> None:
    measured = measure(real_model(llama(), dtype, policy), full_batch(NUM_TOKENS))
    counted = count_activations(llama(), num_tokens=NUM_TOKENS, dtype=dtype, checkpointing=policy)
    copies = copies_on_cpu(dtype, policy)
    # A layer that is computed again has such a copy, too, for a moment; and random states are kept.
    assert measured.kept == pytest.approx(counted.kept + copies, rel=0.05)
    assert measured.peak == pytest.approx(counted.peak + copies, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "lora_rank"),
    [(kind, None) for kind in KINDS] + [(kind, 8) for kind in ("llama, one head of keys", "qwen3", "gemma2", "phi3")],
)
def test_each_kind_of_model_has_the_counted_activations(kind: str, lora_rank: int | None) -> None:
    for policy in ("none", "every_2"):
        assert abs(compare(small(kind), "float32", policy, lora_rank=lora_rank).error) < 0.01, policy


@pytest.mark.parametrize("lora_rank", [None, 8], ids=["all weights", "adapters"])
def test_each_policy_has_the_counted_activations(lora_rank: int | None) -> None:
    for policy in POLICIES:
        assert abs(compare(llama(), "float32", policy, lora_rank=lora_rank).error) < 0.01, policy
    assert abs(compare(llama(), "bfloat16", "every_2", lora_rank=lora_rank, num_tokens=300).error) < 0.01


@pytest.mark.parametrize(("dtype", "policy"), [("float32", "none"), ("float32", "full"), ("bfloat16", "full")])
def test_mlps_in_tiles_have_the_counted_activations(dtype: Dtype, policy: str) -> None:
    config = llama(intermediate_size=8 * WIDTH)
    whole, tiled = (compare(config, dtype, policy, mlp_tiles=number, num_tokens=300) for number in (1, 4))
    assert tiled.counted < 0.8 * whole.counted
    assert abs(tiled.error) < 0.01


@EACH_DTYPE
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_mixture_has_the_counted_activations_with_those_of_its_routers(dtype: Dtype, policy: str) -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = AutoConfig.for_model("mixtral", vocab_size=512, num_key_value_heads=2, num_local_experts=8, **sizes)
    assert abs(compare(config, dtype, policy, num_tokens=300).error) < 0.01


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "phi3"])
def test_rows_that_are_trained_beside_adapters_are_counted(kind: str) -> None:
    for policy in ("none", "full"):
        assert abs(compare(small(kind), "float32", policy, lora_rank=8, num_rows=3).error) < 0.01, policy


def test_a_policy_that_computes_more_again_keeps_less() -> None:
    peaks = [
        count_activations(llama(num_hidden_layers=12), num_tokens=2048, dtype="bfloat16", checkpointing=policy).peak
        for policy in BY_TIME
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


@pytest.mark.parametrize(("policy", "num_bytes"), [("full", 2 * WIDTH), ("none", None)])
def test_a_layer_of_llama_keeps_what_the_formula_says(policy: str, num_bytes: int | None) -> None:
    one, two = (
        count_activations(
            llama(num_hidden_layers=layers), num_tokens=NUM_TOKENS, dtype="bfloat16", checkpointing=policy
        ).kept
        for layers in (1, 2)
    )
    norms, attention, mlp = 2 * (8 * WIDTH + 4), 4 * WIDTH + 4 * KEYS + 4 * HEADS, 8 * MLP
    assert two - one == NUM_TOKENS * (num_bytes or norms + attention + mlp)


def test_a_layer_with_adapters_keeps_their_inputs_and_low_rank_outputs() -> None:
    rank = 8
    one, two = (
        count_activations(
            llama(num_hidden_layers=layers),
            num_tokens=NUM_TOKENS,
            dtype="bfloat16",
            checkpointing="none",
            lora_rank=rank,
        ).kept
        for layers in (1, 2)
    )
    # Norms are frozen, so that their outputs before the weight are not kept; seven adapters keep `rank` numbers each.
    norms, attention, mlp = 2 * (6 * WIDTH + 4), 4 * WIDTH + 4 * KEYS + 4 * HEADS, 8 * MLP
    assert two - one == NUM_TOKENS * (norms + attention + mlp + 7 * 2 * rank)


def test_activations_grow_with_the_tokens_and_the_logits_with_the_vocabulary() -> None:
    num_tokens = 2 * CHUNK_TOKENS
    short, long = (
        count_activations(llama(), num_tokens=tokens, dtype="float32", checkpointing="none")
        for tokens in (num_tokens, 2 * num_tokens)
    )
    assert long.kept == pytest.approx(2 * short.kept, rel=0.01)
    wide = count_activations(llama(vocab_size=50_000), num_tokens=num_tokens, dtype="float32", checkpointing="none")
    # Twice the logits of a chunk in fp32, and the gradient by the weight.
    assert wide.logits - short.logits == pytest.approx((2 * CHUNK_TOKENS + WIDTH) * 4 * (50_000 - 512), rel=0.02)


def test_sequences_that_run_alone_keep_what_packed_ones_keep() -> None:
    """They are counted on sequences of 128 to 256 tokens, and are four of 768."""
    packed, alone = (
        count_activations(llama(), num_tokens=number, dtype="bfloat16", checkpointing="none")
        for number in (4 * 768, Alone(4 * 768, 768))
    )
    joined = 4 * 768 * WIDTH * 2  # the hidden states of all sequences, once more
    assert alone.kept == pytest.approx(packed.kept + joined, rel=0.01)
    assert alone.logits == pytest.approx(packed.logits, rel=0.01)
    assert alone.layer < packed.layer


def test_a_model_that_cannot_run_without_values_is_refused() -> None:
    config = AutoConfig.for_model("xlm", vocab_size=64, emb_dim=32, n_layers=1, n_heads=2)  # it looks at its ids
    with pytest.raises(ValueError, match="the activations of xlm cannot be counted"):
        count_activations(config, num_tokens=64, dtype="float32", checkpointing="none")


# ---- Sizes ----


def test_the_size_is_that_of_the_model_and_shared_weights_count_once() -> None:
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * MLP + 2 * WIDTH
    size = measure_size(llama(), lora_rank=None, lora_targets="all-linear")
    assert size.num_weights == size.num_trained == LAYERS * layer + WIDTH + 2 * 512 * WIDTH
    tied = measure_size(llama(tie_word_embeddings=True), lora_rank=None, lora_targets="all-linear")
    assert tied.num_weights == size.num_weights - 512 * WIDTH
    assert size.largest == 512 * WIDTH


def test_only_adapters_are_trained_with_lora() -> None:
    whole = measure_size(llama(), lora_rank=None, lora_targets="all-linear")
    size = measure_size(llama(), lora_rank=8, lora_targets=("q_proj", "v_proj"))
    adapters = LAYERS * 8 * ((WIDTH + WIDTH) + (WIDTH + KEYS))
    assert (size.num_trained, size.num_weights) == (adapters, whole.num_weights + adapters)
    everywhere = measure_size(llama(), lora_rank=8, lora_targets="all-linear")
    assert everywhere.num_trained == LAYERS * 8 * (4 * WIDTH + 2 * (WIDTH + KEYS) + 3 * (WIDTH + MLP))
    for is_tied in (False, True):
        rows, none = (
            measure_size(llama(tie_word_embeddings=is_tied), lora_rank=8, num_rows=number) for number in (3, 0)
        )
        assert rows.num_trained - none.num_trained == 3 * WIDTH * (1 if is_tied else 2)
        assert rows.num_weights - none.num_weights == rows.num_trained - none.num_trained


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "v_proj"), ("layers.1.mlp.up_proj",), ("self_attn.q_proj", "q_proj")]
)
def test_the_adapters_that_are_counted_are_those_that_training_adds(targets: Any) -> None:
    lm = AutoModelForCausalLM.from_config(llama())
    add_adapters(lm, rank=8, alpha=8, targets=targets, row_ids=(), seed=0)
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    assert measure_size(llama(), lora_rank=8, lora_targets=targets).num_trained == trained


@pytest.mark.parametrize("targets", [("query",), ("proj",), ("q_proj", "w_pack")])
def test_adapters_that_training_would_refuse_are_not_counted(targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"model\.lora\.targets '{targets[-1]}': no linear layer has this name"):
        measure_size(llama(), lora_rank=8, lora_targets=targets)


def test_of_a_multimodal_model_the_text_part_is_counted_and_the_rest_apart() -> None:
    whole = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 2})
    text, multimodal = (measure_size(config, lora_rank=None) for config in (whole.text_config, whole))
    assert replace(multimodal, num_untrained=0) == text
    with torch.device("meta"):
        lm = AutoModelForImageTextToText.from_config(whole)
    assert multimodal.num_untrained == sum(p.numel() for n, p in lm.named_parameters() if "language_model" not in n)
    of_text, of_whole = (
        count_activations(config, num_tokens=512, dtype="bfloat16", checkpointing="none")
        for config in (whole.text_config, whole)
    )
    assert of_whole == of_text


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
    states = needs.fixed + needs.gradients
    if (stage, dtype) == (1, "float32"):  # all gradients are there only until they are reduced
        states -= 4 * small_size()
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
    quarter, default = 500_000, 500_000_000  # elements: a quarter of the weights, DeepSpeed's own
    # stage, dtype, policy, grad_accum, bucket, lora_rank, algorithm
    peaks: list[tuple[int, Dtype, str, int, int, int | None, Any]] = [
        (2, "bfloat16", "full", 1, quarter, None, "sgd"),
        (2, "bfloat16", "none", 1, default, 16, "adamw"),
        (1, "bfloat16", "every_2", 1, quarter, None, "adamw"),
        (3, "bfloat16", "none", 2, 1000, None, "adamw"),
        (0, "float32", "none", 1, quarter, None, "adamw"),
        (1, "float32", "none", 2, quarter, None, "adamw"),
    ]
    kinds: list[dict[str, Any]] = [{"stage": stage, "dtype": dtype} for stage, dtype in engines]
    kinds += [
        {"stage": stage, "dtype": dtype, "policy": policy, "grad_accum": accum, "bucket": bucket}
        | {"lora_rank": rank, "algorithm": algorithm}
        for stage, dtype, policy, accum, bucket, rank, algorithm in peaks
    ]
    found = run_engines(kinds)
    for (stage, dtype), one in zip(engines, found, strict=False):
        check_engine(one, stage, dtype, 2)
    for (stage, dtype, policy, accum, bucket, rank, algorithm), one in zip(peaks, found[len(engines) :], strict=True):
        size = measure_size(small_config(2), lora_rank=rank)
        activations = count_activations(
            small_config(2), num_tokens=128, dtype=dtype, checkpointing=policy, lora_rank=rank
        )
        setting = ZeroSetting(stage, False, 2, dtype, algorithm=algorithm, bucket=bucket, grad_accum=accum)
        needs = memory_needs(size, activations, setting, on_gpu=False)
        assert max(one["backward"], one["step"]) == pytest.approx(needs.total, rel=0.05), (stage, dtype, policy, rank)


def test_two_processes_send_the_modelled_bytes_and_wait_for_the_device_at_most_once() -> None:
    size, adapters = (measure_size(small_config(), lora_rank=rank) for rank in (None, 4))
    # stage, dtype, grad_accum, overlap_comm, lora_rank
    engines: list[tuple[int, Dtype, int, bool | None, int | None]] = [
        (0, "float32", 2, None, None),
        (1, "float32", 2, None, None),
        (1, "bfloat16", 2, None, None),
        (2, "bfloat16", 2, None, None),
        (2, "bfloat16", 1, None, 4),
        (2, "bfloat16", 2, True, None),
        (3, "bfloat16", 2, None, None),
    ]
    keys = ("stage", "dtype", "grad_accum", "overlap_comm", "lora_rank")
    found = run_engines([dict(zip(keys, engine, strict=True)) for engine in engines])
    for (stage, dtype, grad_accum, overlap_comm, rank), one in zip(engines, found, strict=True):
        # DeepSpeed's own end of a step; its timers would wait twice a micro-batch.
        assert one.pop("waits", 0) <= 1
        # Out of each of two processes, a ring sends half of the tensor, and all of it to all-reduce it.
        sent = sum(num_bytes if kind == "all_reduce" else num_bytes / 2 for kind, num_bytes in one.items())
        setting = ZeroSetting(stage, False, 2, dtype, grad_accum=grad_accum, num_buckets=2 if overlap_comm else 1)
        part = size if rank is None else adapters
        assert sent == pytest.approx(bytes_sent(part.num_weights, part.num_trained, setting), rel=0.01), one
        assert ("reduce" in one) is (stage in (1, 2) and not setting.all_reduces)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_two_processes_that_share_a_batch_exchange_the_modelled_bytes(policy: str) -> None:
    engine = {"stage": 2, "dtype": "float32", "grad_accum": 2, "overlap_comm": None, "num_shares": 2, "policy": policy}
    (found,) = run_engines([engine])
    forward = bytes_exchanged(small_config(), 2, element=4) * 2 * NUM_EXCHANGED / 2  # two micro-batches, half of each
    # Half of what an exchange gets stays in the process.
    assert found["all_to_all_single"] / 2 == (2 + share_of(policy)) * forward


def run_engines(kinds: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What the first of two processes finds of each."""
    words = [orjson.dumps(kind).decode() for kind in kinds]
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
    first, second = (rank.communicate(timeout=HANG_S)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], first[-3000:] + second[-3000:]
    lines = [line.removeprefix("BYTES ") for line in first.splitlines() if line.startswith("BYTES ")]
    assert len(lines) == len(kinds)
    return [orjson.loads(line) for line in lines]


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
    activations = count_activations(config, num_tokens=32_768, dtype="bfloat16", checkpointing="full")
    # 40 inputs of layers, and that of the last norm; beside them the norm's and rotary angles.
    assert activations.kept == pytest.approx(40 * 32_768 * 5120 * 2, rel=0.15)
    needs = memory_needs(size, activations, ZeroSetting(2, False, 8, "bfloat16"), on_gpu=True)
    assert needs.weights == 26_031_728_640
    assert needs.gradients == needs.master == 6_507_932_160
    assert needs.optimizer == 13_015_864_320
    assert needs.buffers == 800_000_000  # a bucket, and its copy that is reduced
    assert needs.total == needs.fixed + needs.gradients + activations.peak + 800_000_000
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


def test_making_the_engine_takes_the_weights_once_and_under_stage_3_a_part_and_the_largest() -> None:
    """DeepSpeed flattens the trained weights on the GPU if there is room for both, else through host memory."""
    whole, adapters = (measure_size(llama(), lora_rank=rank) for rank in (None, 8))

    def start(size: Any, stage: int, dtype: Dtype = "bfloat16") -> int:
        return memory_needs(size, NOTHING, ZeroSetting(stage, False, 4, dtype, bucket=1000), on_gpu=True).start

    assert start(adapters, 2) == 2 * adapters.num_weights and start(whole, 2) == 2 * whole.num_weights
    assert start(whole, 1) == 4 * whole.num_weights  # BF16_Optimizer always flattens on the GPU
    assert start(adapters, 3) == 2 * (-(-adapters.num_weights // 4) + 512 * WIDTH)


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    size = measure_size(llama(), lora_rank=1, lora_targets=("q_proj",))
    needs = memory_needs(size, NOTHING, ZeroSetting(2, False, 1, "bfloat16", bucket=1000), on_gpu=True)
    assert needs.weights == 2 * size.num_weights
    assert needs.gradients + needs.master + needs.optimizer == 16 * size.num_trained < needs.weights / 10


def test_the_folder_of_a_run_has_one_checkpoint_more_than_it_keeps() -> None:
    assert run_bytes(100, 10, 5, keep=2, num_light=3) == 3 * 100 + 2 * 10 + 3 * 5
    sgd, adamw, adamw_8bit = (
        checkpoint_bytes(1000, stage=2, dtype="float32", algorithm=name) for name in ("sgd", "adamw", "adamw_8bit")
    )
    assert (adamw - sgd, adamw_8bit - sgd) == (8 * 1000, 2031)
