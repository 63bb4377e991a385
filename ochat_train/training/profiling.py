"""A profiler's trace of a few steps, which shows where the time goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from ochat_train.training.engine import World, say

# The first steps are slow: memory is allocated, kernels are compiled and chosen. Then the profiler warms up too.
SKIPPED_STEPS, WARM_UP_STEPS, TRACED_STEPS = 2, 1, 3
# CUDA's names of the host's waits. A copy to pageable memory waits too, in cudaStreamSynchronize.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@contextmanager
def profile_steps(folder: Path, world: World, *, step: int, is_on: bool) -> Iterator[Callable[[], None]]:
    """Trace the main rank's first steady steps into folder/steps-A-B.json.gz; call the result after each step.

    step: the last step that is done. A run that ends early leaves a trace of the steps that it had.
    """
    if not (is_on and world.is_main):
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
    with profile(
        activities=activities,
        schedule=schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=WARM_UP_STEPS, active=TRACED_STEPS, repeat=1),
        on_trace_ready=partial(_write, folder, world, step),
    ) as profiler:
        yield profiler.step


def _write(folder: Path, world: World, step: int, profiler: profile) -> None:
    num_before = SKIPPED_STEPS + WARM_UP_STEPS
    file = folder / f"steps-{step + num_before + 1}-{step + profiler.step_num}.json.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
    except Exception as error:  # of many kinds, such as on a full disk; training continues
        say(world, f"WARNING: the profile {file} was not written: {error}")
        return
    say(world, f"profile written to {file}: open it at https://ui.perfetto.dev or in chrome://tracing")
    if world.device.type == "cuda":
        waits = sum(event.count for event in profiler.key_averages() if event.key in _WAITS)
        say(world, f"the host waited for the GPU {waits / (profiler.step_num - num_before):.1f} times a step")
