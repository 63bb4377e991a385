"""How long a step takes, what memory it needs, how often the host waits for it; and what the device can do at best."""

import time
import warnings
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ochat_train.model.activations import live_bytes

# Operations after which the host would wait for a GPU: a value is read, or a size depends on values.
_WAITING_OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
_PRODUCTS = 10  # matrix products that are timed together, so that starting them does not count
_REPEATS = 7


def seconds_of(
    run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds on the clock until the device has done it."""
    _finish(device)
    started = clock()
    run()
    _finish(device)
    return clock() - started


def peak_bytes(run: Callable[[], object], device: torch.device, known: Iterable[Tensor]) -> int:
    """The most bytes of tensors at one time; `known` are all that were there before, whose bytes count."""
    known = list(known)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _finish(device)
        return torch.cuda.max_memory_allocated(device)
    with live_bytes(known) as live:
        run()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in known}
    return live.peak + sum(storages.values())


def find_waits(run: Callable[[], object], device: torch.device) -> list[str]:
    """Where the host waits for the device, file and line; on a CPU, operations after which it would wait for a GPU."""
    if device.type == "cuda":
        _finish(device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        synchronizing = (one for one in caught if "called a synchronizing CUDA operation" in str(one.message))
        return [f"{one.filename}:{one.lineno}" for one in synchronizing]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    found = [event for event in profiled.key_averages() if event.key in _WAITING_OPERATIONS]
    return [event.key for event in found for _ in range(event.count)]


def count_waits(run: Callable[[], object], device: torch.device) -> int:
    """How often the host waits; see `find_waits`."""
    return len(find_waits(run, device))


def product_peak(sizes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of these matrix products [m, k] @ [k, n], each the median of several."""
    found = []
    for m, k, n in sizes:
        a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)

        def run(a: Tensor = a, b: Tensor = b) -> None:
            for _ in range(_PRODUCTS):
                a @ b

        run()
        seconds = median(seconds_of(run, device) for _ in range(_REPEATS))
        found.append(_PRODUCTS * 2 * m * k * n / seconds)
    return max(found)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
