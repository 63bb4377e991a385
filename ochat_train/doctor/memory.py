"""What doctor says about memory: the needs of each process against what is there."""

from ochat_train.doctor.finding import GIB, Finding
from ochat_train.model.memory import MemoryNeeds
from ochat_train.report.tables import align, percent
from ochat_train.training.disk import show_bytes
from ochat_train.training.memory_plan import RESERVED, MemoryPlan, nearest_that_fits


def check_memory(plan: MemoryPlan, *, is_quick: bool) -> Finding:
    """The memory of each process against what is there; with a table of all stages and numbers of GPUs."""
    own, machine = plan.own, plan.machine
    needs = plan.needs(own)
    there = (
        f"{show_bytes(machine.gpu_bytes)} of a GPU, of which {percent(RESERVED, 1, 0)} are left to CUDA"
        if machine.gpu_bytes is not None
        else f"{show_bytes(machine.host_bytes)} of host memory for {plan.num_processes} processes"
    )
    lines = [f"{show_bytes(plan.total(own))} a process, {there}"]
    if plan.recipe.model.checkpointing == "auto":
        lines.append(f"model.checkpointing auto is {plan.policy} here")
    if not is_quick:
        lines += _parts(plan, needs)
        lines += _memory_table(plan)
    detail = "\n".join(lines)
    if plan.fits(own):
        return Finding("memory", "ok", detail)
    return Finding("memory", "problem", detail, nearest_that_fits(plan))


def _parts(plan: MemoryPlan, needs: MemoryNeeds) -> list[str]:
    setting = plan.own
    names = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "fp32 master": needs.master,
        "optimizer": needs.optimizer,
        f"activations of {plan.recipe.packing.tokens_per_gpu:,} tokens": needs.activations,
        "a layer's backward": needs.layer,
        "logits chunk": needs.logits,
        "buffers": needs.buffers,
        "optimizer step": needs.step,
    }
    lines = [f"{plan.size.num_weights:,} weights, {plan.size.num_trained:,} of them trained; by part:"]
    lines += [f"  {line}" for line in align([(name, show_bytes(size)) for name, size in names.items()])]
    lines.append("the larger of layer and logits counts; with one micro-batch a step gradients come as activations go")
    if setting.offload or plan.is_on_gpu:
        is_offloaded = f", offloaded {show_bytes(needs.host)} a process" if setting.offload else ""
        lines.append(
            f"host memory: {show_bytes(plan.host_needs(setting))}, the model loaded by each process{is_offloaded}"
        )
    return lines


def _memory_table(plan: MemoryPlan) -> list[str]:
    """GiB a process for each number of GPUs and stage; + fits, the recipe's own in brackets."""
    numbers = sorted({1, 2, 4, 8, plan.num_processes} | {2**power for power in range(plan.num_processes.bit_length())})
    columns = [(stage, offload) for offload in (False, True) for stage in range(4) if stage or not offload]
    header = [("GPUs", *(f"stage {stage}{' offload' if offload else ''}" for stage, offload in columns))]
    rows = []
    for number in numbers:
        cells = [f"{number:,}"]
        for stage, offload in columns:
            if stage == 0 and plan.recipe.model.dtype == "bfloat16":  # the recipe refuses it
                cells.append("- ")
                continue
            setting = plan.setting(stage, offload=offload, num_processes=number)
            cell = f"{plan.total(setting) / GIB:,.1f}"
            cell += "+" if plan.fits(setting) else " "
            cells.append(f"[{cell}]" if setting == plan.own else f" {cell} ")
        rows.append(tuple(cells))
    return ["GiB a process; + fits, [] the recipe's:", *(f"  {line}" for line in align([*header, *rows]))]
