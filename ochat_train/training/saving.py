"""Saves that training does not wait for, and that exist whole or not at all.

A save first copies into host memory what is to be written. A thread of each rank then writes its files into a folder
beside the final one, flushes them to the disk and takes their checksums. When all ranks are done, the folder gets its
manifest and its final name, and older saves are removed. A failure on the way costs this save, but neither the run nor
an older save.
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
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from ochat_train.files import STEP_FOLDERS, flush, flush_tree, move_folder, remove_folder
from ochat_train.model.quantised import plain_weight
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
from ochat_train.training.engine import World, gather_objects
from ochat_train.training.resources import LEFTOVERS, free_bytes, free_host_bytes, show_bytes
from ochat_train.training.run_folder import RunFolder

Kind = Literal["checkpoint", "model", "best"]
# The share of the host's free memory that copies leave free.
_SPARE_MEMORY = 0.2


@dataclass(frozen=True, slots=True)
class _Job:
    """One file or folder of a save. write: called with its path. num_bytes: about how much it writes."""

    name: str
    write: Callable[[Path], Any]
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Save:
    """A folder that is being written. publish: gives it its manifest, from the marks of its files, and its name."""

    kind: Kind
    final: Path
    publish: Callable[[Path, dict[str, FileMark]], None]
    started: float = field(default_factory=time.perf_counter)
    jobs: list[_Job] = field(default_factory=list)
    marks: dict[str, FileMark] = field(default_factory=dict)
    error: str | None = None
    thread: threading.Thread | None = None

    @property
    def partial(self) -> Path:
        return self.final.with_name(f"{self.final.name}.partial")

    def write(self, job: _Job) -> None:
        """Write one job's files to the disk. An error is recorded, not raised: other ranks wait for this one."""
        path = self.partial / job.name  # "" is the folder itself
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            job.write(path)
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file():
                    flush(file)
                    self.marks[str(file.relative_to(self.partial))] = mark_file(file)
        except Exception as error:  # of any kind: a save that lacks a file must not be published
            self.error = self.error or f"{job.name}: {error if isinstance(error, OSError) else repr(error)}"

    def write_all(self) -> None:
        while self.jobs:
            self.write(self.jobs.pop(0))  # popped, so that its memory is freed once it is written


@dataclass(frozen=True, slots=True)
class SaveResult:
    """The result of a save. error: None when it succeeded. seconds: until it had its name. path: where it is."""

    kind: Kind
    path: Path
    seconds: float
    num_bytes: int
    error: str | None

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return int(self.path.name.removeprefix("step-"))


class Saver:
    """Makes the saves of a run. All ranks call its methods together; `is_writing` is this rank's own."""

    def __init__(self, engine: DeepSpeedEngine, folder: RunFolder, world: World, progress: Callable[[], None]) -> None:
        """progress: called while a save is waited for and has written more."""
        self._engine, self._folder, self._world, self._progress = engine, folder, world, progress
        self._copies = _HostCopies(world)
        engine.checkpoint_engine = self._copies
        engine._copy_recovery_script = lambda path: None  # not needed, and it would fail on a full disk
        self._saves: list[_Save] = []

    @property
    def is_writing(self) -> bool:
        """Whether files of this rank are still being written."""
        return any(save.thread is not None and save.thread.is_alive() for save in self._saves)

    def save_checkpoint(self, checkpoint: Checkpoint, tokenizer: ChatTokenizer, *, keep: int) -> list[SaveResult]:
        """Begin to save `checkpoint`, whose `files` are not known yet; once saved, only the newest `keep` stay.

        Returns the result of the save before, and of this one if it could not begin.
        """

        def publish(partial: Path, marks: dict[str, FileMark]) -> None:
            (partial / MANIFEST).write_bytes(manifest_of(replace(checkpoint, files=marks)))
            _publish(partial, checkpoint.path)
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

        return self._begin(_Save("checkpoint", checkpoint.path, publish), take)

    def save_model(
        self,
        path: Path,
        write: Callable[[Path, dict[str, Tensor]], None],
        *,
        keep: int | None,
        kind: Literal["model", "best"] = "model",
    ) -> list[SaveResult]:
        """Begin to save the model at `path`; once saved, only the newest `keep` beside it stay, all for None.

        write: called with the folder and the weights of `copy_weights`. Returns what `save_checkpoint` does.
        """

        def publish(partial: Path, marks: dict[str, FileMark]) -> None:
            if not marks:  # the main rank wrote it on another file system
                shutil.rmtree(partial)
                return
            checksums = {name: asdict(mark) for name, mark in marks.items()}
            (partial / "checksums.json").write_bytes(orjson.dumps(checksums, option=orjson.OPT_INDENT_2))
            _publish(partial, path)
            if keep is not None:
                _prune(sorted(path.parent.glob(STEP_FOLDERS))[:-keep])

        def take(save: _Save) -> None:
            weights = copy_weights(self._engine, self._world)
            if self._world.is_main:
                save.jobs.append(_Job("", lambda folder: write(folder, weights), _num_bytes(weights)))

        return self._begin(_Save(kind, path, publish), take)

    def _begin(self, save: _Save, take: Callable[[_Save], None]) -> list[SaveResult]:
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
            return [*results, SaveResult(save.kind, save.final, 0.0, 0, error)]
        save.thread = threading.Thread(target=save.write_all, name=f"save {save.final.name}")
        save.thread.start()
        self._saves.append(save)
        return results

    def finish(self, kind: Kind | None = None) -> list[SaveResult]:
        """Wait for the saves that have begun, of one kind or all, and publish them; returns their results."""
        ended = [save for save in self._saves if kind in (None, save.kind)]
        self._saves = [save for save in self._saves if save not in ended]
        return [self._finish(save) for save in ended]

    def _finish(self, save: _Save) -> SaveResult:
        self._await(save)
        node = self._world.rank - self._world.local_rank
        # Two nodes with their own file systems may have files of the same name: this node's come last, and count.
        parts = sorted(gather_objects((node, save.marks)), key=lambda part: part[0] == node)
        marks = {name: mark for _, part in parts for name, mark in part.items()}
        if not (error := self._agree(save.error)):
            here = {name: mark for name, mark in marks.items() if (save.partial / name).is_file()}
            error = self._agree(self._error_of(lambda: save.publish(save.partial, here)))
        if error:
            self._error_of(lambda: shutil.rmtree(save.partial, ignore_errors=True))
        num_bytes = sum(mark.size for mark in marks.values())
        return SaveResult(save.kind, save.final, time.perf_counter() - save.started, num_bytes, error)

    def _await(self, save: _Save) -> None:
        assert save.thread is not None
        before = 0
        while save.thread.is_alive():
            save.thread.join(timeout=1.0)
            with suppress(FileNotFoundError):  # some files are written under another name first
                written = sum(file.stat().st_size for file in save.partial.rglob("*"))
                if written != before:
                    self._progress()
                before = written

    def _error_of(self, action: Callable[[], Any]) -> str | None:
        """The error that the folder's writer meets in this action; None on other ranks."""
        try:
            if self._folder.is_writer:
                action()
        except OSError as error:
            return str(error)
        return None

    @staticmethod
    def _agree(error: str | None) -> str | None:
        """The first error of any rank, on every rank."""
        return next((one for one in gather_objects(error) if one is not None), None)


@torch.no_grad()
def copy_weights(engine: DeepSpeedEngine, world: World) -> dict[str, Tensor]:
    """The language model's weights and buffers by their names in training, in host memory of the main rank only.

    All ranks call it together: under ZeRO-3 each weight is gathered from all of them, one at a time.
    """
    lm, copies = engine.module.lm, {}
    for name, parameter in lm.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if world.is_main:
                copies[name] = plain_weight(parameter).to("cpu", copy=True)
    if world.is_main:
        saved, buffers = lm.state_dict().keys(), lm.named_buffers(remove_duplicate=False)
        copies |= {name: buffer.to("cpu", copy=True) for name, buffer in buffers if name in saved}
    return copies


class _HostCopies(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Keeps DeepSpeed's states as copies in host memory; writes at once what does not fit into it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._ranks_per_host = world.local_size

    def take_for(self, save: _Save) -> None:
        """From now on, states belong to this save."""
        self._save = save

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: jobs make their folders, and record their errors."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the states of one file, for a job to write."""
        name, num_bytes = str(Path(path).relative_to(self._save.partial)), _num_bytes(state_dict)
        if num_bytes > (1 - _SPARE_MEMORY) * free_host_bytes() / self._ranks_per_host:
            self._save.write(_Job(name, lambda file: torch.save(state_dict, file)))
            return
        copied = _copied(state_dict, {})
        self._save.jobs.append(_Job(name, lambda file: torch.save(copied, file), num_bytes))


def _copied(value: Any, known: dict[Any, Tensor]) -> Any:
    """The value with its tensors copied to the host; a tensor that occurs twice is copied once."""
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


def _publish(partial: Path, final: Path) -> None:
    """Flush all of it to the disk before it gets its name."""
    flush_tree(partial)
    move_folder(partial, final)


def _prune(saves: list[Path]) -> None:
    """Remove older saves. One that cannot be removed takes room, but does not undo the newer one."""
    for old in saves:
        # What a crash leaves under this name is no checkpoint, and the next run removes it.
        pruned = old.with_name(f"{old.name}.pruned")
        try:
            remove_folder(pruned)
            old.rename(pruned)
            remove_folder(pruned)
            if pruned.exists():
                raise OSError(f"{pruned.name} is left")
        except OSError as error:
            print(f"WARNING: the older {old} was not removed: {error}", flush=True)


def prune_best(run_dir: Path, newest: str) -> None:
    """Remove the models in `best` that a better one replaces, which is no newer than the newest checkpoint, by name.

    Before, the run might go on from an older checkpoint, after which the older one would be the best again.
    """
    _prune([path for path in sorted((run_dir / "best").glob(STEP_FOLDERS)) if path.name <= newest][:-1])


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def remove_leftovers(run_dir: Path) -> list[str]:
    """Remove what a crash left of saves and conversions; returns the names."""
    leftovers = sorted(path for kind in LEFTOVERS for path in run_dir.glob(kind))
    for leftover in leftovers:
        remove_folder(leftover)
    return [leftover.name for leftover in leftovers]
