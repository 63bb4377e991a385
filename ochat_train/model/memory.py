"""The bytes that training a model takes: on a GPU, in host memory, and on disk.

Activations are counted on the model itself (`activations.py`). DeepSpeed's own memory is computed by formulas, each
checked against a real engine.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from ochat_train.model.activations import Activations
from ochat_train.model.lora import PLAIN, Kind, target_layers
from ochat_train.model.pretrained import DTYPES, meta_model
from ochat_train.model.quantised import bytes_of, quantise
from ochat_train.model.text_part import untrained_of

_FP32 = 4
# Bytes of an optimizer's states for each trained weight. adamw: two averages in fp32. adamw_8bit: two of one byte
# each, and for each 256 weights two scales in fp32.
STATE_BYTES: dict[str, float] = {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "sgd": 0}
_REDUCED_AT_ONCE = 500_000_000  # elements, that DeepSpeed reduces at once where no ZeRO optimizer is used
_GATHERED = 1_000_000_000  # elements, stage3_max_live_parameters
_SUB_GROUP = 1_000_000_000  # elements, sub_group_size
# Elements of reduce_bucket_size, where DeepSpeed has 5e8: the bucket and its copy take 1.2 GB less in bfloat16, and
# messages of 400 MB are still so long that their start does not count.
BUCKET = 200_000_000
_STEP_BYTES_8BIT = 20  # on a CPU, for each weight of a group, beside the states
_QUANTISE_BYTES = 20  # for each weight of a layer while it is quantised on a CPU: fp32 copies, and indices
_SMALL_FILES = 32 * 2**20  # configuration, tokenizer, random states, names and shapes


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Elements of a model's parameters; a shared one counts once.

    num_trained: of those that get a gradient, adapters included. largest: of the largest trained parameter;
    largest_weight: of all. num_rows: tokens whose rows are trained beside adapters. largest_module: of the parameters
    of one module itself, such as the experts of a layer, which are gathered together. num_quantised: of the base, which
    take quantised_bytes. num_untrained: weights beside the text part of a multimodal model, which are in none of the
    other numbers; one process of each node has them in host memory.
    """

    num_weights: int
    num_trained: int
    largest: int
    largest_weight: int
    num_rows: int = 0
    largest_module: int = 0
    num_quantised: int = 0
    quantised_bytes: int = 0
    num_untrained: int = 0

    def weight_bytes(self, element: int) -> int:
        """Bytes of all weights, where each that is not quantised takes `element`."""
        return element * (self.num_weights - self.num_quantised) + self.quantised_bytes


@dataclass(frozen=True, slots=True)
class ZeroSetting:
    """How DeepSpeed splits a run. algorithm, grad_accum: the recipe's.

    bucket: elements of its reduce_bucket_size; num_buckets: two in stages 1 and 2 with overlap_comm.
    """

    stage: int
    offload: bool
    num_processes: int
    dtype: Literal["bfloat16", "float32"]
    algorithm: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    bucket: int = BUCKET
    grad_accum: int = 1
    num_buckets: int = 1

    @property
    def all_reduces(self) -> bool:
        """Whether all ranks get the reduced gradients, of which each keeps its part; see `deepspeed_config`."""
        return self.stage == 0 or is_bf16_optimizer(self) or (self.stage < 3 and self.num_buckets > 1)


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes of one process, by part; host: of its share of host memory with an offloaded optimizer.

    gradients: when the backward pass ends. held: gradients held at the peak of activations. activations,
    layer, logits: see `Activations`. buffers: for communication in the backward pass, and gathered weights. reduction:
    further bytes while gradients of all weights are reduced after the backward pass. step: gradients, and what
    the optimizer's step takes beside them, when there are no activations. start: the peak while the engine is
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
        """Bytes held for the whole run: weights, master copy, optimizer states."""
        return self.weights + self.master + self.optimizer

    @property
    def backward(self) -> int:
        """The peak of the backward pass: early or late in it, or while gradients are reduced after it."""
        early = self.held + self.activations + max(self.layer, self.logits) + self.buffers
        late = self.gradients + self.layer + self.buffers  # in the first layer, when the others are done
        return self.fixed + max(early, late, self.gradients + self.reduction)

    @property
    def total(self) -> int:
        """The highest of the peaks: of the backward pass, in the optimizer's step, and at the start."""
        return max(self.backward, self.fixed + self.step, self.start)


# ---------------------------------------------------------------------------------------------------- the model


def measure_size(
    config: Any,
    *,
    lora_rank: int | None,
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear",
    kind: Kind = PLAIN,
    num_rows: int = 0,
) -> ModelSize:
    """The size of a model of this transformers configuration, with adapters when `lora_rank` is given.

    An adapter of rank r on a linear layer of shape [out, in] has r * (in + out) elements, with DoRA `out` more. Only
    adapters are trained, and `num_rows` rows of the embedding and, if it is not tied, of the head. lora_targets: see
    `target_layers`. Raises ValueError when no model can be made of the configuration, a
    target is no linear layer, or there is little to quantise.
    """
    model = meta_model(config, torch.bfloat16)
    untrained = untrained_of(model)
    beside = sum(weight.numel() for weight in untrained.weights.values()) if untrained else 0
    sizes = [parameter.numel() for parameter in model.parameters()]
    module = max(sum(weight.numel() for weight in part.parameters(recurse=False)) for part in model.modules())
    if lora_rank is None:
        return ModelSize(sum(sizes), sum(sizes), max(sizes), max(sizes), largest_module=module, num_untrained=beside)
    layers = target_layers(model, lora_targets).values()
    parts = [lora_rank * size for layer in layers for size in layer.weight.shape]
    parts += [layer.out_features for layer in layers if kind.dora]
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(table.weight): table.weight for table in tables if table is not None}
    parts += [num_rows * weight.shape[1] for weight in weights.values()]
    if kind.quantise_on is not None:
        quantise(model, model.device)
    total = sum(sizes) + sum(parts)
    return ModelSize(total, sum(parts), max(parts), max(sizes), num_rows, module, *bytes_of(model), beside)


# ---------------------------------------------------------------------------------------------------- DeepSpeed


def memory_needs(size: ModelSize, activations: Activations, setting: ZeroSetting, *, on_gpu: bool) -> MemoryNeeds:
    """The bytes of each of n processes, in DeepSpeed 0.19 with gradients added up in fp32.

    With P weights, Q of them trained, w bytes each (2 or 4), and 1/n where that part is split:

        stage            0        1, bf16       1, fp32       2            3
        weights          w P      w P           w P           w P          w P / n
        gradients        4 Q      4 Q + 2 Q     4 Q + 4 Q/n   4 Q / n      4 Q / n
        fp32 master      -        4 Q / n       4 Q / n       4 Q / n      4 Q / n     (also of fp32 weights)
        Adam             8 Q      8 Q / n       8 Q / n       8 Q / n      8 Q / n     (8 bits: 2.03 Q)
        buffers          -        -             4 B           w B + w c    w B + 2 w g
        reduction        4 b      (4 + 2) b     4 B + 4 c     -            -

    B: reduce_bucket_size, allocated whole; two of them with overlap_comm. c: what is in a bucket, the smaller of Q and
    B, which is copied to be reduced. b: the smaller of Q and 5e8. g: gathered weights, the smaller of P and 1e9, or
    those of the largest module if they are more, none in one process; two processes were measured to have 1.7 to 1.9
    times w g. While the engine is made, stage 1 in bf16 has the trained weights twice; stages 1 and 2 else take them
    through host memory where a GPU lacks room for that. Stage 3 has one whole weight at a time beside its part.
    Quantised weights are in no stage split, and take about 0.52 bytes each; so they do while the engine is made, except
    on a CPU, whose memory the model that is loaded is in.
    """
    n, stage, element = setting.num_processes, setting.stage, DTYPES[setting.dtype].itemsize
    all_weights, trained = size.weight_bytes(element), size.num_trained
    part = -(-trained // n)
    gradients = _gradient_needs(size, setting, part)
    needs = MemoryNeeds(
        weights=-(-all_weights // n) if stage == 3 else all_weights,
        gradients=gradients.total,
        held=gradients.held,
        master=0 if stage == 0 else _FP32 * part,
        optimizer=int(STATE_BYTES[setting.algorithm] * (trained if stage == 0 else part)),
        activations=activations.kept,
        layer=activations.layer,
        logits=activations.logits,
        buffers=gradients.buffers,
        reduction=gradients.reduction,
        step=_step_needs(size, setting, part, gradients.total, on_gpu=on_gpu),
        start=_start_needs(size, setting, on_gpu=on_gpu),
        host=0,
    )
    return _offload(needs, size, setting, part) if setting.offload else needs


def is_bf16_optimizer(setting: ZeroSetting) -> bool:
    """Whether DeepSpeed runs it by its BF16_Optimizer, which is not that of the other stages."""
    return setting.stage == 1 and setting.dtype == "bfloat16" and not setting.offload


def flat_copies(size: ModelSize, setting: ZeroSetting) -> int:
    """Bytes of host memory in which a process copies its trained weights, twice, where its GPU lacks room for once.

    See stage_1_and_2.py of DeepSpeed: while the engine is made, they become one flat tensor.
    """
    is_flat = setting.stage in (1, 2) and not is_bf16_optimizer(setting)
    return 2 * DTYPES[setting.dtype].itemsize * size.num_trained if is_flat else 0


def _start_needs(size: ModelSize, setting: ZeroSetting, *, on_gpu: bool) -> int:
    """The bytes at the peak while the engine is made. On a CPU the model that is loaded is in the same memory."""
    element = DTYPES[setting.dtype].itemsize
    if setting.stage == 3 and on_gpu:
        return element * (-(-size.num_weights // setting.num_processes) + size.largest_weight)
    is_twice = setting.stage in (1, 2) and not (on_gpu and flat_copies(size, setting))
    start = size.weight_bytes(element) + (element * size.num_trained if is_twice else 0)
    if size.num_quantised and not on_gpu:
        return max(start, element * size.num_weights + _QUANTISE_BYTES * size.largest_weight)
    return start


class _GradientNeeds(NamedTuple):
    """Bytes for gradients and their reduction. total: MemoryNeeds.gradients; the others as in MemoryNeeds."""

    total: int
    held: int
    buffers: int
    reduction: int


def _gradient_needs(size: ModelSize, setting: ZeroSetting, part: int) -> _GradientNeeds:
    """The bytes of gradients in one process; part: its trained weights.

    Where gradients of all weights are kept, they grow as the activations shrink if a step has one micro-batch; if it
    has several, those of the earlier ones are already held. In one process stage 2 then also has the micro-batch's own.
    In bfloat16, stage 1 is DeepSpeed's BF16_Optimizer: it keeps fp32 gradients of all weights for the whole run, and
    those in bf16 until the end of the backward pass. In stage 2 bf16 gradients go through the bucket into this rank's
    part in fp32.
    """
    stage, trained, element = setting.stage, size.num_trained, DTYPES[setting.dtype].itemsize
    at_once, accumulates = min(trained, _REDUCED_AT_ONCE), setting.grad_accum > 1
    if stage == 0:
        total = _FP32 * trained
        return _GradientNeeds(total, held=total if accumulates else 0, buffers=0, reduction=_FP32 * at_once)
    copied = min(max(setting.bucket, size.largest), trained)
    if is_bf16_optimizer(setting):
        both = _FP32 + element
        return _GradientNeeds(both * trained, held=_FP32 * trained, buffers=0, reduction=both * at_once)
    if stage == 1:
        total = _FP32 * (trained + part)
        held = total if setting.offload else _FP32 * trained if accumulates else 0
        # The bucket is reduced after the backward pass; its copy in the weights' dtype.
        buffers = _FP32 * setting.num_buckets * setting.bucket
        copies = (_FP32 + (element if element < _FP32 else 0)) * copied
        return _GradientNeeds(total, held, buffers, reduction=buffers + copies)
    total = held = _FP32 * part
    buffers = element * (setting.num_buckets * setting.bucket + (copied if stage == 2 else 0))
    if stage == 2 and setting.num_processes == 1 and accumulates:
        held += element * trained
    if stage == 3 and setting.num_processes > 1:
        buffers += 2 * element * min(size.num_weights, max(_GATHERED, size.largest_module))
    return _GradientNeeds(total, held, buffers, reduction=0)


def _step_needs(size: ModelSize, setting: ZeroSetting, part: int, gradients: int, *, on_gpu: bool) -> int:
    """Bytes in the optimizer's step beside what is there all the time. part: as in `_gradient_needs`.

    The steps of AdamW and SGD work in place; that of 8 bits on a GPU too, and on a CPU in fp32 copies, 20 bytes a
    weight. In stage 3, or with fp32 weights, the part of the gradients is copied once.
    """
    stage, is_bf16 = setting.stage, setting.dtype == "bfloat16"
    group = min(part, _SUB_GROUP) if stage == 3 else part
    step = gradients if stage == 0 or (stage == 1 and is_bf16) else _FP32 * part
    if setting.algorithm == "adamw_8bit" and not on_gpu:
        step += _STEP_BYTES_8BIT * (group if stage else size.largest)
    if stage == 3 or (stage in (1, 2) and not is_bf16):
        step += _FP32 * group
    return step


def _offload(needs: MemoryNeeds, size: ModelSize, setting: ZeroSetting, part: int) -> MemoryNeeds:
    """The needs with the optimizer in host memory. part: as in `_gradient_needs`.

    The host has 4 Q / n bytes each for the master, the gradients and both averages, and the weights that it sends
    back. The gradients stay on the GPU, with room for the largest weight; in stage 3 they do not.
    """
    moved = needs.master + needs.optimizer
    if setting.stage == 3:
        host = moved + 2 * _FP32 * part
        return replace(needs, master=0, optimizer=0, gradients=0, held=0, step=0, host=host)
    element = DTYPES[setting.dtype].itemsize
    largest = element * size.largest
    return replace(
        needs,
        master=0,
        optimizer=0,
        buffers=needs.buffers + largest,
        step=needs.gradients,
        host=moved + (_FP32 + element) * part + largest,
    )


# ---------------------------------------------------------------------------------------------------------- disk


def checkpoint_bytes(
    num_trained: int, *, stage: int, dtype: Literal["bfloat16", "float32"], algorithm: str = "adamw"
) -> int:
    """Bytes on disk of one resumable checkpoint, of all processes together, whatever their number.

    For Q trained weights of w bytes; frozen ones are not in it. Stage 0: (w + 8) Q; stages 1 and 2: (w + 4 + 8) Q, with
    the fp32 master and Adam's averages; stage 3: only these two. With 8 bits the averages are 2.03 Q, with SGD none.
    """
    weights = 0 if stage == 3 else DTYPES[dtype].itemsize
    master = 0 if stage == 0 else _FP32
    return int((weights + master + STATE_BYTES[algorithm]) * num_trained) + _SMALL_FILES


def run_bytes(checkpoint: int, model: int, light_model: int, *, keep: int, num_light: int) -> int:
    """Bytes that the folder of a run takes at most, from those of a checkpoint, the exported model, and a light one.

    A new checkpoint is complete before an old one is removed, so there are keep + 1 of them, and two exported models.
    """
    return (keep + 1) * checkpoint + 2 * model + num_light * light_model
