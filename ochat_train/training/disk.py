"""The room on the disk: what a run takes at most, and what is free."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ochat_train.model.memory import ModelSize, checkpoint_bytes, run_bytes
from ochat_train.model.pretrained import DTYPES
from ochat_train.recipe import Recipe


def show_bytes(num_bytes: float) -> str:
    """In GiB, or in MiB what is below a tenth of one."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there, or itself."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def free_bytes(path: Path) -> int:
    """How much may still be written below `path`, which need not be there yet."""
    return shutil.disk_usage(existing_parent(path)).free


# A full disk, a full quota, a limit on the size of files.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def room_for(num_bytes: int, folder: Path) -> Iterator[None]:
    """Around what writes about `num_bytes` into `folder`: raises ValueError, with the remedy, when there is no room."""
    free = free_bytes(folder)
    try:
        if free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except Exception as error:
        # Libraries in Rust raise kinds of their own, with the number in their text.
        number = error.errno if isinstance(error, OSError) else None
        number = number or next((code for code in _NO_ROOM if f"(os error {code})" in str(error)), None)
        if number not in _NO_ROOM:
            raise
        raise ValueError(
            f"{os.strerror(number)}: {folder} takes {show_bytes(num_bytes)}, and {show_bytes(free)} are free at "
            f"{existing_parent(folder)}; make room there, or raise the limit, and run the same command again"
        ) from error


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes of one checkpoint, of the exported model, of one light checkpoint; of what is there already and is free.

    num_kept, num_light: checkpoints and light ones that stay.
    """

    folder: Path
    checkpoint: int
    model: int
    light: int
    num_kept: int
    num_light: int
    taken: int
    free: int

    @property
    def needed(self) -> int:
        """What the folder takes at most."""
        return run_bytes(self.checkpoint, self.model, self.light, keep=self.num_kept, num_light=self.num_light)

    @property
    def missing(self) -> int:
        """What is lacking; 0 when all is well."""
        return max(0, self.needed - self.taken - self.free)

    def describe(self) -> str:
        """One line that says all of it."""
        return (
            f"{show_bytes(self.needed)} for {self.folder}: {self.num_kept + 1} checkpoints of "
            f"{show_bytes(self.checkpoint)}, the model of {show_bytes(self.model)} twice while it is replaced"
            + (f", {self.num_light} light ones of {show_bytes(self.light)}" if self.num_light else "")
            + (f"; {show_bytes(self.taken)} of it are there" if self.taken else "")
            + f"; {show_bytes(self.free)} are free at {existing_parent(self.folder)}"
        )

    @property
    def remedy(self) -> str:
        """What to do when something is missing."""
        return f"free {show_bytes(self.missing)}, lower checkpoint.keep, or name another disk in checkpoint.dir"


def plan_disk(recipe: Recipe, size: ModelSize, num_steps: int) -> DiskPlan:
    """What the recipe's run of about `num_steps` steps takes on the disk of checkpoint.dir."""
    folder = Path(recipe.checkpoint.dir)
    return DiskPlan(
        folder=folder,
        checkpoint=checkpoint_bytes(
            size.num_trained,
            stage=recipe.zero.stage,
            dtype=recipe.model.dtype,
            algorithm=recipe.optim.algorithm,
        ),
        model=DTYPES[recipe.model.dtype].itemsize * size.num_weights,
        light=DTYPES["bfloat16"].itemsize * size.num_weights,
        num_kept=recipe.checkpoint.keep,
        num_light=_num_light(recipe, num_steps),
        taken=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        free=free_bytes(folder),
    )


def _num_light(recipe: Recipe, num_steps: int) -> int:
    """Light checkpoints that are there at once, at most."""
    policy = recipe.checkpoint.models
    if policy.every_epochs is None and policy.every_steps is None:
        return 0
    if policy.keep is not None:
        return policy.keep + 1
    of_epochs = recipe.train.epochs // policy.every_epochs if policy.every_epochs else 0
    return of_epochs + (num_steps // policy.every_steps if policy.every_steps else 0)
