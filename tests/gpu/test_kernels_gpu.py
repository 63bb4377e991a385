"""Liger's kernels and compiled layers on a GPU. Needs a GPU: pytest -m gpu tests/gpu."""

import copy
import importlib.util

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from ochat_train.model.kernels import Kernels, choose_kernels, compile_layers, use_kernels
from ochat_train.model.packed_lm import PackedCausalLM
from tests.kernels_in_interpreter import ARCHITECTURES, config_of
from tests.test_kernels import batches_of_many_lengths
from tests.test_packed_lm import make_batch, make_examples, make_model, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
]
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="the package liger-kernel is not installed"
)
DEVICE = torch.device("cuda", 0)
BOTH = [pytest.param("liger", marks=needs_liger), "none"]


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_auto_takes_kernels_that_agree(model_type: str, dtype: torch.dtype) -> None:
    choice = choose_kernels("auto", config_of(model_type), device=DEVICE, dtype=dtype, is_compiled=False)
    assert choice.kernels == "liger", choice.reason


def on_gpu(lm: PreTrainedModel, *, kernels: Kernels, is_compiled: bool, checkpointing: str) -> PackedCausalLM:
    lm = copy.deepcopy(lm).to(DEVICE)
    use_kernels(lm, kernels)
    packed = PackedCausalLM(lm, attention="sdpa", device_type="cuda", checkpointing=checkpointing, num_conditions=2)
    if is_compiled:
        compile_layers(lm)
    return packed.train()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_each_combination_gives_the_sums_and_gradients_of_the_cpu(
    model_type: str, kernels: Kernels, is_compiled: bool, checkpointing: str
) -> None:
    torch._dynamo.reset()
    lm = make_model(model_type)
    packed = on_gpu(lm, kernels=kernels, is_compiled=is_compiled, checkpointing=checkpointing)
    reference = PackedCausalLM(lm, attention="sdpa", device_type="cpu", checkpointing="none", num_conditions=2).train()
    for examples in (make_examples(), []):  # and a micro-batch of nothing, as a rank may have it
        packed.zero_grad()
        reference.zero_grad()
        batch = make_batch(examples)
        sums, expected = packed(batch.to(DEVICE)), reference(batch)
        sums.nll.backward()
        expected.nll.backward()
        # fp32 on another device: other orders of the same sums, two layers deep.
        assert float(abs(sums.nll.cpu() - expected.nll)) <= 1e-5 * float(expected.nll)
        gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
        for name, parameter in packed.named_parameters():
            assert parameter.grad is not None, name
            if examples:
                assert relative_error(parameter.grad.cpu(), gradients[name]) < 1e-4, name
            else:
                assert torch.count_nonzero(parameter.grad) == 0, name


@pytest.mark.parametrize("kernels", BOTH)
def test_other_numbers_of_tokens_compile_nothing_anew(kernels: Kernels) -> None:
    torch._dynamo.reset()
    packed = on_gpu(make_model("llama"), kernels=kernels, is_compiled=True, checkpointing="full")
    first, *others = batches_of_many_lengths()
    packed(first.to(DEVICE)).nll.backward()
    made = counters["stats"]["unique_graphs"]
    assert made > 0
    for batch in others:
        packed(batch.to(DEVICE)).nll.backward()
    assert counters["stats"]["unique_graphs"] == made
