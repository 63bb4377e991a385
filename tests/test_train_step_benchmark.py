"""The benchmarks of a training step measure what they say: same tokens, same weights, and answers that agree."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cpu_step
import machine
import measure
import steps
import train_step

from ochat_train.model import loss
from ochat_train.model.attention import AttentionOptions
from ochat_train.tokens.encode import Example
from ochat_train.training.speed import Speed

CPU = torch.device("cpu")
TINY = ["--preset", "cpu", "--width", "32", "--heads", "2", "--mlp", "64", "--vocab", "128", "--max-tokens", "64"]
TINY += ["--capacities", "256", "--compared", "256"]
OPTIONS = train_step.parse(TINY)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that results are written to, instead of the committed one."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    return tmp_path / "benchmarks/results"


def written(results: Path) -> Any:
    (file,) = results.iterdir()
    return json.loads(file.read_text())


def model(dtype: torch.dtype = torch.float32) -> Any:
    return steps.make_lm(train_step.make_config(OPTIONS), dtype, CPU)


def micro_batch() -> list[Example]:
    return train_step.make_batches(train_step.make_config(OPTIONS), OPTIONS, 256)[0]


# ---- Whole scripts ----


def test_the_script_measures_every_way_and_writes_it_down(results: Path) -> None:
    train_step.main([*TINY, "--checkpointing", "full", "none", "--repeats", "2", "--batches", "2"])
    found = written(results)
    assert found["product_peak_tflops"] > 0 and found["versions"]["torch"]
    ran = [one for one in found["steps"] if not one["failure"]]
    assert [(one["name"], one["num_layers"]) for one in ran] == 2 * [
        ("ours", 2),
        ("ours", 1),
        ("padded", 2),
        ("transformers", 2),
        ("upstream", 2),
    ]
    for one in ran:
        assert len(one["seconds"]) == len(one["num_tokens"]) == 4
        assert one["tokens_per_s"] == pytest.approx(np.median(np.divide(one["num_tokens"], one["seconds"])))
        assert one["of_peak"] > 0 and one["peak_bytes"] > 0
        assert one["loss"] == pytest.approx(np.log(128), abs=0.3)  # of random weights
    assert all(one["failure"].startswith("not here: Liger") for one in found["steps"] if one["failure"])
    assert [one["padding_ratio"] > 1 for one in ran].count(True) == 2
    assert len(found["differences"]) == 8 and len(found["whole"]) == 2


def test_what_runs_out_of_memory_or_time_is_told_and_the_others_go_on(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room\nfor details")

    monkeypatch.setattr(train_step, "padded", too_large)
    train_step.main([*TINY, "--checkpointing", "none", "every_x", "--repeats", "1"])
    failures = {(one["name"], one["policy"]): one["failure"] for one in written(results)["steps"]}
    assert failures["padded", "none"] == "out of memory: no room"
    assert failures["upstream", "none"] == ""
    assert failures["upstream", "every_x"].startswith("not here: ")
    train_step.main([*TINY, "--minutes", "0", "--no-write"])
    assert capsys.readouterr().out.count("not run: no time left") == 3 * 6


def test_losses_that_do_not_agree_fail_the_run(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a conversation sees the one before it, or a loss leaves out some tokens."""
    attention = steps.varlen_attention

    def leaking(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, **others: Any) -> Tensor:
        whole = options._replace(cu_seqlens=options.cu_seqlens[[0, -1]], max_seqlen=len(q))
        return attention(q, k, v, whole, **others)

    monkeypatch.setattr(steps, "varlen_attention", leaking)
    with pytest.raises(SystemExit, match="2 of 3 do not agree with ours: transformers, upstream"):
        train_step.main([*TINY, "--checkpointing", "none", "--repeats", "1"])
    (wrong,) = (one for one in written(results)["differences"] if one["name"] == "upstream")
    # The mean loss of random weights hardly notices; the gradients do, far beyond what bfloat16 is allowed.
    assert wrong["loss"] < 0.01 and wrong["gradient"] > 2 * train_step.TOLERANCES[torch.bfloat16, True][1]


def test_the_way_that_is_compiled_and_has_other_kernels_is_asked_for_and_told_of(results: Path) -> None:
    train_step.main([*TINY, "--checkpointing", "none", "--repeats", "1", "--kernels", "none", "liger"])
    names = [one["name"] for one in written(results)["steps"]]
    assert names[:4] == ["ours", "ours", "ours+liger", "ours+liger"]


def test_the_cpu_script_compares_and_agrees(results: Path) -> None:
    sizes = [
        "--width",
        "32",
        "--heads",
        "2",
        "--mlp",
        "64",
        "--vocab",
        "128",
        "--max-tokens",
        "64",
        "--capacity",
        "256",
    ]
    cpu_step.main([*sizes, "--head-tokens", "3000", "--head-vocab", "64", "--repeats", "2", "--batches", "1"])
    found = written(results)
    assert [one["name"] for one in found["comparisons"]] == ["whole", "layers", "head, half", "head, all"]
    for one in found["comparisons"]:
        assert len(one["ours"]) == len(one["others"]) == 2
        assert one["loss"] < 1e-5 and one["gradient"] < 1e-4
    assert found["padding_ratio"] > 1
    half, all_of_them = found["comparisons"][2:]
    assert half["our_bytes"] < all_of_them["our_bytes"] < all_of_them["other_bytes"]


# ---- Parts ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["full", "none"])
def test_all_ways_come_to_the_loss_and_the_gradients_of_one_conversation_after_the_other(
    policy: str, dtype: torch.dtype
) -> None:
    lm, examples = model(), micro_batch()
    assert len({len(example.input_ids) for example in examples}) > 3
    num_supervised = steps.count_supervised(examples)
    naive = torch.zeros(())
    plain = steps.twin(lm, attention="eager")
    for example in examples:
        ids, weights = torch.from_numpy(example.input_ids).long(), torch.from_numpy(example.loss_weights)
        nll = F.cross_entropy(plain(ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction="none")
        naive = naive + (nll * weights[1:]).sum() / num_supervised
    naive.backward()
    expected = {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}
    low = model(dtype)
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(lm.parameters(), low.parameters(), strict=True))
    ways = [
        steps.ours(low, num_layers=2, attention="sdpa", policy=policy, kernels="none", is_compiled=False),
        steps.padded(low, policy=policy, batch_size=4),
        steps.flattened(low, policy=policy, with_liger=False, attention="sdpa"),
        steps.upstream(low, policy=policy, attention="sdpa"),
    ]
    for way in ways:
        train_step.clear(low)
        loss_error, gradient_error = train_step.TOLERANCES[dtype, way.name == "upstream"]
        assert float(way.step(way.prepare(examples))) == pytest.approx(float(naive.detach()), rel=loss_error), way.name
        for name, parameter in low.named_parameters():
            error = (parameter.grad.float() - expected[name]).norm() / expected[name].norm()
            assert error < gradient_error, (way.name, name)


def test_twins_share_parameters_gradients_and_frequencies() -> None:
    lm = model()
    other = steps.twin(lm, num_layers=1)
    names = dict(lm.named_parameters())
    assert {name: id(parameter) for name, parameter in other.named_parameters()} == {
        name: id(parameter) for name, parameter in names.items() if "layers.1." not in name
    }
    assert all(buffer.device == CPU for buffer in other.buffers())
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_kernels_that_are_replaced_for_all_models_reach_only_the_way_that_asked() -> None:
    original = modeling_llama.apply_rotary_pos_emb

    def theirs(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    with steps._replacements_undone() as rotary:
        modeling_llama.apply_rotary_pos_emb = theirs
    assert rotary == [theirs] and modeling_llama.apply_rotary_pos_emb is original
    lm = model()
    for policy in ("full", "none"):
        way = steps.flattened(lm, policy=policy, with_liger=False, attention="sdpa")
        with pytest.raises(NotImplementedError):
            steps.Way("theirs", 2, way.prepare, way.loss, theirs).step(way.prepare(micro_batch()))
        assert modeling_llama.apply_rotary_pos_emb is original


def test_tokens_have_turns_about_half_of_which_have_a_loss() -> None:
    rng = np.random.default_rng(0)
    examples = [train_step.make_example(rng, length, 100) for length in [2, 30, *[2000] * 50]]
    assert all(steps.count_supervised([example]) for example in examples)
    assert all(example.loss_weights[0] == 0 for example in examples)
    share = steps.count_supervised(examples) / sum(len(example.input_ids) for example in examples)
    assert 0.45 < share < 0.55
    changes = np.mean([np.count_nonzero(np.diff(example.loss_weights)) for example in examples[2:]])
    assert 7 < changes < 13  # of 2,000 tokens in turns of 200


def test_micro_batches_are_full_and_those_of_longer_lengths_at_4096() -> None:
    options = train_step.parse([*TINY, "--max-tokens", "4096", "--batches", "5"])
    batches = train_step.make_batches(train_step.make_config(options), options, 32_768)
    lengths = [[len(example.input_ids) for example in examples] for examples in batches]
    num_tokens = [sum(of_batch) for of_batch in lengths]
    assert max(num_tokens) <= 32_768 and np.mean(num_tokens) > 0.985 * 32_768  # the plan's fill is 0.9946
    assert 1000 < np.mean([length for of_batch in lengths for length in of_batch]) < 1500
    assert max(max(of_batch) for of_batch in lengths) == 4096


def test_padding_is_counted_by_the_longest_of_each_batch() -> None:
    examples = [Example(np.zeros(length, np.int32), np.ones(length, np.float32)) for length in (5, 2, 3, 7, 1)]
    assert steps.count_padded(examples, 2) == 2 * 5 + 2 * 7 + 1
    assert train_step.padding_ratio([examples], 2) == 25 / 18
    parts = steps.padded(model(), policy="none", batch_size=2).prepare(examples)
    assert sum(part["input_ids"].numel() for part in parts) == 25
    assert sum(int(part["attention_mask"].sum()) for part in parts) == 18
    assert {part["num_items_in_batch"] for part in parts} == {18 - 5}  # nothing predicts a first token


def test_a_layer_is_told_apart_from_the_rest() -> None:
    """Steps of 100 tokens: 2 s a layer, 1 s for embedding and head."""
    few, more = (
        train_step.Measured("ours", 100, "none", layers, seconds=[1 + 2 * layers] * 3, num_tokens=[100] * 3)
        for layers in (2, 4)
    )
    more.tokens_per_s = 100 / 9
    config = train_step.make_config(OPTIONS)
    train_step.tell_layers_apart(few, more, config, peak=1e6)
    assert more.layer_tokens_per_s == pytest.approx(50)
    assert more.rest_share == pytest.approx(1 / 9)
    weights = 4 * 32**2 + 3 * 32 * 64
    assert more.layer_of_peak == pytest.approx(6 * weights * 50 / 1e6)
    more.pairs_per_token = 40.0
    h100 = "NVIDIA H100 80GB HBM3"
    engine = train_step.EngineTime(optimizer=1e-6, copies=1e-7)
    (whole,) = train_step.extrapolate([few, more], config, engine, h100, "file.json")
    num_weights = 40 * weights + 2 * 128 * 32
    assert (whole.layers_s, whole.rest_s) == pytest.approx((80, 1))
    assert whole.optimizer_s == pytest.approx(1e-6 * num_weights / 8)
    assert whole.communication_s == pytest.approx(2 * 2 * num_weights * 7 / 8 / (0.8 * 450e9))
    assert whole.copies_s == pytest.approx(1e-7 * num_weights)
    assert whole.tokens_per_s == pytest.approx(100 / (81 + whole.optimizer_s + whole.copies_s + whole.communication_s))
    assert whole.error == pytest.approx(0)
    assert whole.speed is not None
    speed = eval(whole.speed, {"Speed": Speed})  # as it would be pasted
    assert (speed.device, speed.num_devices, speed.origin, speed.source) == (h100, 1, "measured", "file.json")
    assert speed.num_weights == 40 * weights + 128 * 32
    assert train_step.extrapolate([few, more], config, engine, None, "")[0].speed is None
    more.seconds = [9, 8, 10]  # a layer takes 2 s, 1.5 s, 2.5 s; its quarters are these ends
    train_step.tell_layers_apart(few, more, config, peak=1e6)
    (whole,) = train_step.extrapolate([few, more], config, engine, None, "")
    assert whole.error == pytest.approx((40 - 4) * 0.5 / 81)


def test_the_planner_predicts_the_memory_that_a_step_takes(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %, of activations large enough that the planner's parts are visible beside the weights."""
    # A chunk of logits that is full, as those of large batches are: the planner counts every token with a loss.
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 256)
    sizes = ["--width", "64", "--heads", "2", "--mlp", "160", "--vocab", "512", "--capacities", "2048"]
    train_step.main([*TINY, *sizes, "--max-tokens", "512", "--checkpointing", "full", "none", "--repeats", "1"])
    ran = [one for one in written(results)["steps"] if one["planned_bytes"]]
    assert [one["policy"] for one in ran] == ["full", "none"]
    for one in ran:
        assert one["planned_bytes"] == pytest.approx(one["peak_bytes"], rel=0.05)
    assert ran[1]["peak_bytes"] > 1.5 * ran[0]["peak_bytes"]


# ---- Measuring ----


def test_waits_are_the_operations_whose_result_the_host_reads() -> None:
    values = torch.arange(4.0)

    def waits_three_times() -> None:
        values.nonzero()
        float(values.sum())
        bool(values.max() > 2)

    assert measure.count_waits(waits_three_times, CPU) == 3
    assert measure.count_waits(lambda: values * 2, CPU) == 0


def test_the_peak_of_memory_is_that_of_all_tensors_that_were_alive_together() -> None:
    known = torch.zeros(1000)

    def run() -> None:
        first = known * 2
        del first
        second, third = known * 3, known * 4
        del second, third

    assert measure.peak_bytes(run, CPU, [known, known[:10]]) == 3 * 4000


def test_a_clock_is_read_around_the_run() -> None:
    times = iter([10.0, 12.5])
    assert measure.seconds_of(lambda: None, CPU, lambda: next(times)) == 2.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "2", "2"], "--layers 2 2: the second number must be the larger"),
        (["--device", "cuda"], "no CUDA device is here; --preset cpu tries the same"),
    ],
)
def test_options_that_cannot_be_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train_step.parse([*TINY, *words])
    assert message in capsys.readouterr().err
