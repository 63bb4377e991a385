"""Kernels and compiled layers against transformers' own layers."""

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from ochat_train.model import kernels
from ochat_train.model.kernels import choose_kernels, compile_layers, require_compiler
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from tests.kernels_in_interpreter import ARCHITECTURES, adapted, config_of
from tests.test_packed_lm import VOCABULARY, make_batch, make_examples, make_model, make_packed, relative_error

ROOT = Path(__file__).resolve().parents[1]


def choose(wanted: Any, model_type: str = "llama", *, device: str = "cuda", is_compiled: bool = False) -> Any:
    return choose_kernels(
        wanted, config_of(model_type), device=torch.device(device), dtype=torch.float32, is_compiled=is_compiled
    )


# ---- The choice ----


def test_auto_takes_no_kernels_where_there_is_no_gpu_and_liger_is_refused_there() -> None:
    assert choose("none").kernels == "none"
    auto = choose("auto", device="cpu")
    assert auto.kernels == "none" and auto.reason == "liger: needs a CUDA device"
    with pytest.raises(ValueError, match=r"model\.kernels liger cannot be used here: needs a CUDA.*; set model\.kern"):
        choose("liger", device="cpu")


def test_auto_leaves_layers_that_are_compiled_alone() -> None:
    assert "model.compile" in choose("auto", is_compiled=True).reason


def test_a_missing_package_and_an_unknown_architecture_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(kernels.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'ochat_train[gpu]'" in choose("auto").reason
    known: Any = type("Module", (), {"MODEL_TYPE_TO_APPLY_LIGER_FN": {"llama": None}})
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    assert choose("auto", "gpt2").reason == "liger: it has no kernels for gpt2"
    monkeypatch.setattr(kernels, "measure_kernel_errors", lambda *_, **__: 1 / 0)
    assert "fail in a small llama: ZeroDivisionError" in choose("auto").reason


# ---- Liger's kernels, in Triton's interpreter ----


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What tests/kernels_in_interpreter.py finds, by case."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels_in_interpreter"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
    )
    return dict(map(orjson.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("case", [*ARCHITECTURES, "rounded", "part of a head rotated"])
def test_kernels_agree_with_the_layers_of_transformers(found: dict[str, Any], case: str) -> None:
    assert len(found[case]) == (2 if case == "rounded" else 1)
    for error, limit in found[case]:
        assert 0 < error <= limit


def test_kernels_of_another_activation_disagree(found: dict[str, Any]) -> None:
    ((error, limit),) = found["another activation"]
    assert error > 1000 * limit


@pytest.mark.parametrize("case", ["packed", "adapters"])
def test_packed_models_with_kernels_give_the_same_sums_and_gradients(found: dict[str, Any], case: str) -> None:
    sums, gradients = found[case]
    assert sums < 1e-6 and 0 < gradients < 5e-6  # f32, two layers deep, as in test_packed_lm.py


def test_a_batch_without_examples_goes_through_the_kernels(found: dict[str, Any]) -> None:
    assert found["no examples"] == [0, 0]


def test_kernels_are_in_the_model_and_nowhere_else(found: dict[str, Any]) -> None:
    assert found["kernels are from"] == ["liger_kernel"] * 3
    assert found["replaced"] == []


@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
def test_the_kernels_of_a_13b_layer_build_for_gpus_that_are_not_here(capability: int) -> None:
    from liger_kernel.ops import rms_norm, rope, swiglu
    from triton import compile as build
    from triton import language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    norm = {"casting_mode": 0, "elementwise_affine": True, "BLOCK_SIZE": 8192}
    gate = {"n_cols": 13_824, "BLOCK_SIZE": 16_384}
    heads = {"n_qh": 40, "n_kh": 40, "hd": 128, "pad_n_qh": 64, "pad_n_kh": 64, "pad_hd": 128, "pad_rd": 128, "rd": 128}
    rotate = {"bs": 1, "cos_bs": 1, **heads, "BLOCK_SIZE": 64}
    for kernel, constants in (
        (rms_norm._rms_norm_forward_kernel, norm),
        (rms_norm._rms_norm_backward_kernel, {**norm, "X_dtype": language.bfloat16, "COMPUTE_DW": True}),
        (swiglu._swiglu_forward_kernel, gate),
        (swiglu._swiglu_backward_kernel, gate),
        (rope._triton_rope, {**rotate, "BACKWARD_PASS": False}),
        (rope._triton_rope, {**rotate, "BACKWARD_PASS": True}),
    ):
        signature = {name: type_of_argument(name) for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = build(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
        assert built.asm["cubin"]


def type_of_argument(name: str) -> str:
    """Of a kernel's argument by its name in Liger."""
    if name in ("RSTD_ptr", "dW_ptr"):
        return "*fp32"
    if name.endswith("_ptr") or name in ("cos", "sin"):
        return "*bf16"
    return "fp32" if name in ("eps", "offset", "gate_multiplier") else "i32"


# ---- Compiled layers ----


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile up to the graphs, forward and backward, without the seconds in which they become code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()
    counters.clear()


def compiled(lm: PreTrainedModel, *, checkpointing: str) -> PackedCausalLM:
    packed = make_packed(lm, checkpointing=checkpointing).train()
    compile_layers(packed.lm)
    return packed


def batches_of_many_lengths() -> list[PackedBatch]:
    """Ten numbers of tokens, and of sequences."""
    random = np.random.default_rng(0)
    batches = []
    for number in range(1, 11):
        ids = [random.integers(0, VOCABULARY, 3 + 11 * number + part).astype(np.int32) for part in range(number)]
        examples = [Example(each, np.ones(len(each), np.float32)) for each in ids]
        batches.append(collate(examples, [0] * number))
    assert len({len(batch.input_ids) for batch in batches}) == 10
    return batches


@pytest.mark.parametrize(
    ("model_type", "change", "checkpointing", "most_graphs"),
    [
        ("llama", lambda model_type: adapted(make_model(model_type)), "full", 4),
        ("gemma2", make_model, "none", 8),  # layers of two kinds
    ],
    ids=["adapters", "gemma2"],
)
def test_compiled_layers_give_the_same_for_every_number_of_tokens_and_are_compiled_once(
    model_type: str, change: Callable[[str], PreTrainedModel], checkpointing: str, most_graphs: int
) -> None:
    lm = change(model_type)
    eager = make_packed(copy.deepcopy(lm), checkpointing=checkpointing).train()
    packed = compiled(lm, checkpointing=checkpointing)
    for batch in batches_of_many_lengths():
        check_equal(packed, eager, batch)
        # A layer is four graphs: to its attention, the projections, behind attention, the rest.
        assert 0 < counters["stats"]["unique_graphs"] <= most_graphs


@pytest.mark.parametrize(("model_type", "attention"), [("mixtral", "sdpa"), ("llama", "alone")])
def test_compiled_layers_of_a_mixture_and_of_sequences_that_run_alone_give_the_same(
    model_type: str, attention: str
) -> None:
    lm = make_model(model_type)
    options: dict[str, Any] = {"attention": attention, "device_type": "cpu", "checkpointing": "full"}
    eager, packed = (
        PackedCausalLM(model, **options, num_conditions=1, router_coefficient=1.0).train()
        for model in (copy.deepcopy(lm), lm)
    )
    compile_layers(packed.lm)
    for batch in batches_of_many_lengths()[1:3]:
        check_equal(packed, eager, batch)
    assert counters["stats"]["unique_graphs"]


def test_compiled_layers_take_a_batch_without_examples_and_evaluate() -> None:
    lm = make_model("llama")
    eager, packed = make_packed(copy.deepcopy(lm)).train(), compiled(lm, checkpointing="none")
    check_equal(packed, eager, make_batch([]))
    batch = make_batch(make_examples())
    with torch.no_grad():
        assert relative_error(packed.eval()(batch).nll, eager.eval()(batch).nll) < 1e-6


def check_equal(packed: PackedCausalLM, eager: PackedCausalLM, batch: PackedBatch) -> None:
    """The same sum and gradients. Tolerance: f32 sums in another order, two layers deep."""
    sums = []
    for model in (packed, eager):
        model.zero_grad()
        out = model(batch)
        loss = out.nll if out.router is None else out.nll + out.router.loss
        loss.backward()
        sums.append(float(loss.detach()))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in eager.named_parameters()}
    for name, parameter in packed.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        if parameter.grad is not None and expected is not None:
            assert float((parameter.grad - expected).norm()) <= 1e-6 * float(expected.norm()), name


def test_layers_are_compiled_with_the_functions_that_kernels_put_into_them() -> None:
    plain, changed = make_packed(make_model("llama")), make_packed(make_model("llama"))
    calls = []

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(torch.compiler.is_compiling())
        return q * cos[:, None], k * cos[:, None]

    kernels._call_instead(changed.lm, {"apply_rotary_pos_emb": rotate}, vars(modeling_llama))
    batch = make_batch(make_examples())
    with torch.no_grad():
        expected = changed(batch).nll
        compile_layers(plain.lm)
        compile_layers(changed.lm)
        of_plain = plain(batch).nll
        assert calls == [False, False]
        assert relative_error(changed(batch).nll, expected) < 1e-6
        assert relative_error(of_plain, expected) > 1e-4
        assert calls[2:] and all(calls[2:])


def double(x: Tensor) -> Tensor:
    return 2 * x


def call_double(x: Tensor) -> Tensor:
    return double(x)


def test_a_function_with_other_globals_keeps_them_where_it_is_compiled_into_another() -> None:
    changed = kernels._with_globals(call_double, {"double": lambda x: 3 * x})  # type: ignore[arg-type]  # a def is a FunctionType

    def outer(x: Tensor) -> tuple[Tensor, Tensor]:
        return call_double(x), changed(x)

    assert [int(value) for value in torch.compile(outer)(torch.ones(()))] == [2, 3]


def test_functions_that_no_layer_calls_are_told() -> None:
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM calls rotate_all"):
        kernels._call_instead(make_model("llama"), {"rotate_all": print}, vars(modeling_llama))


def test_a_model_that_has_no_layers_of_transformers_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"model\.compile: OpenAIGPTLMHeadModel has no layers"):
        require_compiler("cpu", config_of("openai-gpt"))


def test_a_missing_compiler_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama")
    require_compiler("cpu", config)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"there is no no-such-compiler; install g\+\+"):
        require_compiler("cpu", config)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="there is no no-such-compiler"):
        require_compiler("cuda", config)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package triton"):
        require_compiler("cuda", config)
