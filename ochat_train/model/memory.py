"""The bytes that training a model takes: on a GPU, in host memory, and on disk.

What is kept of a model is counted on the model itself (`activations.py`). What DeepSpeed keeps beside it are formulas,
each checked against a real engine.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ochat_train.model.activations import Activations
from ochat_train.model.meta import meta_model
from ochat_train.model.pretrained import DTYPES

_FP32 = 4
# Bytes of an optimizer's states for each trained weight. adamw: two averages in fp32. adamw_8bit: two of a byte, and of
# each 256 weights two scales in fp32.
STATE_BYTES: dict[str, float] = {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "sgd": 0}
_REDUCED_AT_ONCE = 500_000_000  # elements, where DeepSpeed reduces gradients outside of its ZeRO optimizers
_GATHERED = 1_000_000_000  # elements, stage3_max_live_parameters
_SUB_GROUP = 1_000_000_000  # elements, sub_group_size
_BUCKET = 500_000_000  # elements, reduce_bucket_size
# Bytes that the optimizer's step has on top, for each weight of a group: on a GPU, on a CPU.
_STEP_BYTES = {"adamw": (4, 8), "adamw_8bit": (0, 20), "sgd": (0, 0)}
_SMALL_FILES = 32 * 2**20  # configuration, tokenizer, random states, names and shapes


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Elements of a model's parameters, a shared one once.

    num_trained: of those that get a gradient, adapters included. largest: of the largest of them. vocab_size and
    hidden_size are those of the head. num_rows: tokens whose rows are trained beside adapters.
    """

    num_weights: int
    num_trained: int
    largest: int
    vocab_size: int
    hidden_size: int
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class ZeroSetting:
    """How DeepSpeed spreads a run. bucket: elements of its reduce_bucket_size. algorithm, grad_accum: the recipe's."""

    stage: int
    offload: bool
    num_processes: int
    dtype: Literal["bfloat16", "float32"]
    algorithm: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    bucket: int = _BUCKET
    grad_accum: int = 1


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes of one process, by part; host: of its share of host memory with an offloaded optimizer.

    gradients: when the backward pass ends. held: those that are there when activations take the most. activations,
    layer and logits: see `Activations`. buffers: of communication in the backward pass, and weights that are gathered.
    reduction: what takes their place when gradients of all weights are reduced behind it. step: gradients, and what
    the optimizer's step takes beside them, when there are no activations. start: of the model, while the engine is
    made.
    """

    weights: int
    gradients: int
    held: int
    master: int
    optimizer: int
    activations: int
    layer: int
    logits: int
    buffers: int
    reduction: int
    step: int
    start: int
    host: int

    @property
    def fixed(self) -> int:
        """What is there all the time."""
        return self.weights + self.master + self.optimizer

    @property
    def states(self) -> int:
        """What is there when the backward pass ends."""
        return self.fixed + self.gradients

    @property
    def total(self) -> int:
        """The highest of five peaks: early and late in the backward pass, behind it, in the step, and at the start."""
        early = self.held + self.activations + max(self.layer, self.logits) + self.buffers
        late = self.gradients + self.layer + self.buffers  # of the first layer, when the others' are done
        return max(self.fixed + max(early, late, self.gradients + self.reduction, self.step), self.start)


# ---------------------------------------------------------------------------------------------------- the model


def measure_size(
    config: Any,
    *,
    lora_rank: int | None,
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear",
    num_rows: int = 0,
) -> ModelSize:
    """The size of a model of this transformers configuration, with adapters when `lora_rank` is given.

    An adapter of rank r beside a linear layer of shape [out, in] has r * (in + out) elements. Only adapters are
    trained, and `num_rows` rows of the embedding and, if it is not tied, of the head. Raises ValueError when no model
    can be made of it, or no layer is a target.
    """
    model = meta_model(config, torch.bfloat16)
    head = model.get_output_embeddings()
    sizes = [parameter.numel() for parameter in model.parameters()]
    embedding: Any = model.get_input_embeddings()
    vocab_size, hidden_size = embedding.weight.shape if head is None else head.weight.shape
    if lora_rank is None:
        return ModelSize(sum(sizes), sum(sizes), max(sizes), vocab_size, hidden_size)
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if lora_targets != "all-linear":
        linear = {name: module for name, module in linear.items() if name.endswith(lora_targets)}
        if not linear:
            raise ValueError(f"model.lora.targets {', '.join(lora_targets)}: no linear layer has such a name")
    parts = [lora_rank * size for module in linear.values() for size in module.weight.shape]
    tables = {id(table.weight): table.weight for table in (embedding, head) if table is not None}
    parts += [num_rows * weight.shape[1] for weight in tables.values()]
    return ModelSize(sum(sizes) + sum(parts), sum(parts), max(parts), vocab_size, hidden_size, num_rows)


# ---------------------------------------------------------------------------------------------------- DeepSpeed


def memory_needs(size: ModelSize, activations: Activations, setting: ZeroSetting, *, on_gpu: bool) -> MemoryNeeds:
    """The bytes of each of n processes, in DeepSpeed 0.19 with gradients added up in fp32.

    With P weights, Q of them trained, w bytes each (2 or 4), and every 1/n where that part is split:

        stage            0        1, bf16       1, fp32       2            3
        weights          w P      w P           w P           w P          w P / n
        gradients        4 Q      4 Q + 2 Q     4 Q + 4 Q/n   4 Q / n      4 Q / n
        fp32 master      -        4 Q / n       4 Q / n       4 Q / n      4 Q / n     (also of fp32 weights)
        Adam             8 Q      8 Q / n       8 Q / n       8 Q / n      8 Q / n     (8 bits: 2.03 Q)
        buffers          -        -             4 B           w B          w B + 2 w g
        reduction        4 b      (4 + 2) b     -             -            -

    B: reduce_bucket_size, made whole; two of them with overlap_comm. b: the least of Q and 5e8. g: gathered weights,
    the least of P and 1e9, none in one process; two processes had 1.7 to 1.9 of them. Where gradients of all weights
    are kept, in one micro-batch a step they come as the activations go; of several, the former ones' are there. In one
    process stage 2 then has the micro-batch's own beside them. In bfloat16, stage 1 is DeepSpeed's BF16_Optimizer: it
    keeps fp32 gradients of all weights for the whole run, and those in bf16 until the end of the backward pass. With
    stage 2 bf16 gradients go through the bucket into this rank's part in fp32; with stage 3, or of fp32 weights, the
    part is copied once in the step. An offloaded optimizer has in host memory 4 Q / n each for master, gradients and
    both averages, and the weights that it sends back; on the GPU stay the gradients, and room for the largest weight.

    The step of AdamW has one more average for a moment on a GPU, and two on a CPU; that of 8 bits works in place on a
    GPU, and on a CPU in fp32 copies, 20 bytes a weight. While the engine is made, stages 1
    and 2 have the weights twice; stage 3 has the whole model on each GPU.
    """
    n, stage, element = setting.num_processes, setting.stage, DTYPES[setting.dtype].itemsize
    all_weights, trained = element * size.num_weights, size.num_trained
    part = -(-trained // n)
    states = STATE_BYTES[setting.algorithm]
    is_bf16 = setting.dtype == "bfloat16"
    master, optimizer = (0 if stage == 0 else _FP32 * part), int(states * (trained if stage == 0 else part))
    reduction, accumulates = 0, setting.grad_accum > 1
    if stage == 0:
        gradients, buffers, reduction = _FP32 * trained, 0, _FP32 * min(trained, _REDUCED_AT_ONCE)
        held = gradients if accumulates else 0
    elif stage == 1 and is_bf16 and not setting.offload:
        gradients, buffers = (_FP32 + element) * trained, 0
        reduction, held = (_FP32 + element) * min(trained, _REDUCED_AT_ONCE), _FP32 * trained
    elif stage == 1:
        gradients, buffers = _FP32 * (trained + part), _FP32 * setting.bucket
        held = gradients if setting.offload else _FP32 * trained if accumulates else 0
    else:
        gradients = held = _FP32 * part
        buffers = element * setting.bucket
        if stage == 2 and n == 1 and accumulates:
            held += element * trained
        if stage == 3 and n > 1:
            buffers += 2 * element * min(size.num_weights, _GATHERED)
    # torch updates all tensors at once on a GPU, and one after the other on a CPU.
    updated = (trained if on_gpu else size.largest) if stage == 0 else min(part, _SUB_GROUP) if stage == 3 else part
    step = _STEP_BYTES[setting.algorithm][not on_gpu] * updated
    step += gradients if stage == 0 or (stage == 1 and is_bf16) else _FP32 * part
    if stage == 3 or (stage in (1, 2) and not is_bf16):
        step += _FP32 * min(part, _SUB_GROUP if stage == 3 else part)
    host = 0
    if setting.offload:
        host = master + 2 * _FP32 * part + optimizer if stage == 3 else master + (_FP32 + element) * part + optimizer
        host += 0 if stage == 3 else element * size.largest
        buffers += 0 if stage == 3 else element * size.largest
        master = optimizer = 0
        gradients, held = (0, 0) if stage == 3 else (gradients, held)
        step = gradients
    return MemoryNeeds(
        weights=-(-all_weights // n) if stage == 3 else all_weights,
        gradients=gradients,
        held=held,
        master=master,
        optimizer=optimizer,
        activations=activations.kept,
        layer=activations.layer,
        logits=activations.logits,
        buffers=buffers,
        reduction=reduction,
        step=step,
        start=all_weights * (2 if stage in (1, 2) else 1),
        host=host,
    )


# ---------------------------------------------------------------------------------------------------------- disk


def checkpoint_bytes(
    num_trained: int, *, stage: int, dtype: Literal["bfloat16", "float32"], algorithm: str = "adamw"
) -> int:
    """What one resumable checkpoint takes on disk, all processes together, whatever their number.

    Q trained weights of w bytes; frozen ones are not in it. Stage 0: (w + 8) Q; stages 1 and 2: (w + 4 + 8) Q, the fp32
    master and Adam's averages; stage 3 the latter alone. With 8 bits the averages are 2.03 Q, without Adam nothing.
    """
    weights = 0 if stage == 3 else DTYPES[dtype].itemsize
    master = 0 if stage == 0 else _FP32
    return int((weights + master + STATE_BYTES[algorithm]) * num_trained) + _SMALL_FILES


def run_bytes(checkpoint: int, model: int, light_model: int, *, keep: int, num_light: int) -> int:
    """What the folder of a run takes at most: bytes of checkpoints, of the exported model, and of light ones.

    A new checkpoint is complete before an old one goes, so there are keep + 1 of them; an export replaces one likewise.
    """
    return (keep + 1) * checkpoint + 2 * model + num_light * light_model
