"""Saves that training does not wait for, and that are there whole or not at all.

A save first copies what is to be written into host memory; a thread of each rank then writes its files beside their
place, puts them onto the disk and takes their checksums. When all ranks are done, the folder gets its manifest and its
name, and older ones go. Whatever fails on the way costs that save, and neither the run nor an older one.
"""

import copy
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import deepspeed
import orjson
import psutil
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from ochat_train.files import flush, flush_tree
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    FileMark,
    find_checkpoints,
    manifest_of,
    mark_file,
    random_states,
)
from ochat_train.training.disk import free_bytes, show_bytes
from ochat_train.training.engine import World, gather_objects
from ochat_train.training.run_folder import RunFolder

Kind = Literal["checkpoint", "model"]
# Beside a snapshot, the share of the host's free memory that stays free.
_SPARE_MEMORY = 0.2


@dataclass(frozen=True, slots=True)
class _Job:
    """What writes one file or folder of a save, at the path that it is given; num_bytes: about how much."""

    name: str
    write: Callable[[Path], Any]
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Save:
    """A folder that is being written. put: gives it its manifest and its place, from the marks of its files."""

    kind: Kind
    final: Path
    put: Callable[[Path, dict[str, FileMark]], None]
    started: float = field(default_factory=time.perf_counter)
    jobs: list[_Job] = field(default_factory=list)
    marks: dict[str, FileMark] = field(default_factory=dict)
    error: str | None = None
    thread: threading.Thread | None = None

    @property
    def partial(self) -> Path:
        return self.final.with_name(f"{self.final.name}.partial")

    def write(self, job: _Job) -> None:
        """Write one job's files to the disk. An error is kept: other ranks wait for this one."""
        path = self.partial / job.name  # "" is the folder itself
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            job.write(path)
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file():
                    flush(file)
                    self.marks[str(file.relative_to(self.partial))] = mark_file(file)
        except Exception as error:  # of whatever kind: a save with a file missing must not pass for one
            self.error = self.error or f"{job.name}: {error if isinstance(error, OSError) else repr(error)}"

    def write_all(self) -> None:
        while self.jobs:
            self.write(self.jobs.pop(0))  # popped, so that its memory is free when it is written


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a save. error: None when it is there."""

    kind: Kind
    path: Path
    seconds: float
    num_bytes: int
    error: str | None


class Saver:
    """The saves of a run. All ranks call its methods together, but for `is_writing`."""

    def __init__(self, engine: DeepSpeedEngine, folder: RunFolder, world: World, move: Callable[[], None]) -> None:
        """move: called now and then while a save is waited for, if it goes on."""
        self._engine, self._folder, self._world, self._move = engine, folder, world, move
        self._copies = _HostCopies(world)
        engine.checkpoint_engine = self._copies
        engine._copy_recovery_script = lambda path: None  # its converters are not needed, and a full disk would stop it
        self._saves: list[_Save] = []

    @property
    def is_writing(self) -> bool:
        """Whether files of this rank are still being written."""
        return any(save.thread is not None and save.thread.is_alive() for save in self._saves)

    def save_checkpoint(self, checkpoint: Checkpoint, tokenizer: ChatTokenizer, *, keep: int) -> list[Saved]:
        """Begin to save `checkpoint`, whose `files` are not known yet; all but the newest `keep` of the run go then.

        Returns what became of the save before, and of this one if it could not be begun.
        """

        def put(partial: Path, marks: dict[str, FileMark]) -> None:
            (partial / MANIFEST).write_bytes(manifest_of(replace(checkpoint, files=marks)))
            _put_in_place(partial, checkpoint.path)
            _prune(find_checkpoints(checkpoint.path.parent)[:-keep])

        def take(save: _Save) -> None:
            self._copies.take_for(save)
            self._engine.save_checkpoint(
                str(save.partial), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True
            )
            states = random_states()
            save.jobs.append(_Job(f"random-{self._world.rank:05d}.pt", lambda path: torch.save(states, path)))
            if self._folder.is_writer:
                lm = self._engine.module.lm
                save.jobs.append(_Job("model", lm.config.save_pretrained))
                save.jobs.append(_Job("model", lm.generation_config.save_pretrained))
                save.jobs.append(_Job("tokenizer", tokenizer.save))

        return self._begin(_Save("checkpoint", checkpoint.path, put), take)

    def save_model(
        self, path: Path, write: Callable[[Path, dict[str, Tensor]], None], *, keep: int | None
    ) -> list[Saved]:
        """Begin to save the model at `path`, for use; all but the newest `keep` beside it go then, None keeps all.

        write is given the folder and the weights of `copy_weights`. Returns as `save_checkpoint` does.
        """

        def put(partial: Path, marks: dict[str, FileMark]) -> None:
            if not marks:  # the main rank wrote it on a file system of its own
                shutil.rmtree(partial)
                return
            told = {name: asdict(mark) for name, mark in marks.items()}
            (partial / "checksums.json").write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
            _put_in_place(partial, path)
            if keep is not None:
                _prune(sorted(path.parent.glob("step-" + "[0-9]" * 8))[:-keep])

        def take(save: _Save) -> None:
            weights = copy_weights(self._engine, self._world)
            if self._world.is_main:
                save.jobs.append(_Job("", lambda folder: write(folder, weights), _num_bytes(weights)))

        return self._begin(_Save("model", path, put), take)

    def _begin(self, save: _Save, take: Callable[[_Save], None]) -> list[Saved]:
        results = self.finish(save.kind)
        if not (error := self._agree(self._error_of(lambda: _make_empty(save.partial)))):
            take(save)
            node = self._world.rank - self._world.local_rank
            parts = gather_objects((node, sum(job.num_bytes for job in save.jobs)))
            needed = sum(num_bytes for other, num_bytes in parts if self._folder.is_shared or other == node)
            free = free_bytes(self._folder.path)
            room = f"it takes {show_bytes(needed)}, and {show_bytes(free)} are free" if free < needed else None
            error = self._agree(room if self._folder.is_writer else None)
        if error:
            self._error_of(lambda: shutil.rmtree(save.partial, ignore_errors=True))
            return [*results, Saved(save.kind, save.final, 0.0, 0, error)]
        save.thread = threading.Thread(target=save.write_all, name=f"save {save.final.name}")
        save.thread.start()
        self._saves.append(save)
        return results

    def finish(self, kind: Kind | None = None) -> list[Saved]:
        """Wait for the saves that were begun, of one kind or all, and put them in place; returns what came of them."""
        ended = [save for save in self._saves if kind in (None, save.kind)]
        self._saves = [save for save in self._saves if save not in ended]
        return [self._finish(save) for save in ended]

    def _finish(self, save: _Save) -> Saved:
        self._await(save)
        node = self._world.rank - self._world.local_rank
        # On file systems of their own two nodes may have files of one name: this node's come last, and count.
        parts = sorted(gather_objects((node, save.marks)), key=lambda part: part[0] == node)
        marks = {name: mark for _, part in parts for name, mark in part.items()}
        if not (error := self._agree(save.error)):
            here = {name: mark for name, mark in marks.items() if (save.partial / name).is_file()}
            error = self._agree(self._error_of(lambda: save.put(save.partial, here)))
        if error:
            self._error_of(lambda: shutil.rmtree(save.partial, ignore_errors=True))
        num_bytes = sum(mark.size for mark in marks.values())
        return Saved(save.kind, save.final, time.perf_counter() - save.started, num_bytes, error)

    def _await(self, save: _Save) -> None:
        assert save.thread is not None
        before = 0
        while save.thread.is_alive():
            save.thread.join(timeout=1.0)
            with suppress(FileNotFoundError):  # some are written under another name first
                written = sum(file.stat().st_size for file in save.partial.rglob("*"))
                if written != before:
                    self._move()
                before = written

    def _error_of(self, action: Callable[[], Any]) -> str | None:
        """What goes wrong when a folder's writer does this."""
        try:
            if self._folder.is_writer:
                action()
        except OSError as error:
            return str(error)
        return None

    @staticmethod
    def _agree(error: str | None) -> str | None:
        """The first error of any rank, on every rank."""
        return next((told for told in gather_objects(error) if told is not None), None)


@torch.no_grad()
def copy_weights(engine: DeepSpeedEngine, world: World) -> dict[str, Tensor]:
    """The language model's weights and buffers by their names in training, in host memory, on the main rank alone.

    All ranks call it together: under ZeRO-3 each weight is put together from all of them, one at a time.
    """
    lm, copies = engine.module.lm, {}
    for name, parameter in lm.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if world.is_main:
                copies[name] = parameter.detach().to("cpu", copy=True)
    if world.is_main:
        saved, buffers = lm.state_dict().keys(), lm.named_buffers(remove_duplicate=False)
        copies |= {name: buffer.to("cpu", copy=True) for name, buffer in buffers if name in saved}
    return copies


class _HostCopies(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Takes DeepSpeed's states as copies in host memory; writes at once what there is no memory for."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._ranks_per_host = world.local_size

    def take_for(self, save: _Save) -> None:
        """The states that come now belong to this save."""
        self._save = save

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: jobs make their folders, and keep their errors."""

    def save(self, state_dict: Any, path: str) -> None:
        """Take the states of one file."""
        name, num_bytes = str(Path(path).relative_to(self._save.partial)), _num_bytes(state_dict)
        if num_bytes > (1 - _SPARE_MEMORY) * psutil.virtual_memory().available / self._ranks_per_host:
            self._save.write(_Job(name, lambda file: torch.save(state_dict, file)))
            return
        copied = _copied(state_dict, {})
        self._save.jobs.append(_Job(name, lambda file: torch.save(copied, file), num_bytes))


def _copied(value: Any, known: dict[Any, Tensor]) -> Any:
    """The value with its tensors copied to the host; tensors that are the same one stay that."""
    if isinstance(value, Tensor):
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
        if key not in known:
            known[key] = value.detach().to("cpu", copy=True)
        return known[key]
    if isinstance(value, dict):
        return type(value)((key, _copied(inner, known)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copied(inner, known) for inner in value)
    return copy.deepcopy(value)


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_bytes, inner))


def _put_in_place(partial: Path, final: Path) -> None:
    """All of it is on the disk before it gets its name."""
    flush_tree(partial)
    _remove(final)
    partial.rename(final)
    flush(final.parent)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; cut off by a crash, what is left of it does not look complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _prune(saves: list[Path]) -> None:
    """Remove older saves. One that stays takes room, and the newer one is there all the same."""
    for old in saves:
        try:
            _remove(old)
        except OSError as error:
            print(f"WARNING: the older {old} was not removed: {error}", flush=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def remove_leftovers(run_dir: Path) -> list[str]:
    """Remove saves and conversions that a crash cut off; returns their names."""
    leftovers = sorted(
        path for kind in ("step-*.partial", "step-*.universal", "models/step-*.partial") for path in run_dir.glob(kind)
    )
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [leftover.name for leftover in leftovers]
