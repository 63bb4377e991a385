"""Checkpoints: written beside their place, moved into it when complete, the last few kept.

RUN/step-00000100/checkpoint.json     TrainState and what export needs; written last
RUN/step-00000100/deepspeed/          DeepSpeed's weights and optimizer states, one file or more a rank
RUN/step-00000100/random-00000.pt     random states of rank 0, ...
RUN/step-00000100/model/, tokenizer/  the model's configuration; the tokenizer
RUN/step-00000120.partial             a save that a crash cut off; the next run removes it
"""

import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ochat_train.files import flush, flush_tree
from ochat_train.recipe import differences
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.engine import World

FORMAT_VERSION = 1
# Keys that a resumed run may change: they decide neither which examples are left nor what they count.
FREE_AT_RESUME = ("name", "checkpoint", "log", "train.max_steps", "data.store", "packing.tokens_per_gpu")


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run is. examples_consumed and tokens_seen count over all epochs; recipe is its JSON form.

    order: the digest of the order in which examples are consumed; empty in checkpoints of a version that had another.
    """

    step: int
    epoch: int
    examples_consumed: int
    tokens_seen: int
    store_fingerprint: str
    recipe: dict[str, Any]
    order: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainState
    world_size: int
    template: str
    inference_condition: str
    conditions: list[str]
    run: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in the folder `path`. Raises ValueError when it is not a complete one, naming what is missing."""
    file = Path(path) / "checkpoint.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a complete checkpoint (it has no checkpoint.json)")
    fields = orjson.loads(file.read_bytes())
    if (version := fields.pop("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{path} has checkpoint format {version}, this version reads {FORMAT_VERSION}")
    for name, size in fields.pop("files").items():
        found = (Path(path) / name).stat().st_size if (Path(path) / name).is_file() else None
        if found != size:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {'no file' if found is None else f'{found:,} bytes'}, "
                f"not {size:,} bytes; remove the folder, or name an older one in checkpoint.resume"
            )
    return Checkpoint(path=Path(path), state=TrainState(**fields.pop("state")), **fields)


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("step-" + "[0-9]" * 8) if (path / "checkpoint.json").is_file())


def find_resume(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to continue from: `resume` is auto (the newest, if any), never, or a checkpoint's path.

    Raises ValueError for never in a folder that already holds checkpoints, and for a path when the folder holds newer
    ones, so that two runs never mix and none prunes the other's.
    """
    found = find_checkpoints(run)
    if resume not in ("auto", "never"):
        chosen = read_checkpoint(resume)
        if found and found[-1].name > f"step-{chosen.state.step:08d}":
            raise ValueError(
                f"checkpoint.resume {resume}, but checkpoint.dir {run} holds the newer {found[-1].name}; continue in "
                "another folder, or from the newest with checkpoint.resume=auto"
            )
        return chosen
    if not found:
        return None
    if resume == "never":
        raise ValueError(
            f"checkpoint.dir {run} already holds {found[-1].name}, and checkpoint.resume is never; "
            "name another folder, or remove that one"
        )
    return read_checkpoint(found[-1])


def check_resume(
    checkpoint: Checkpoint, *, recipe: dict[str, Any], store_fingerprint: str, order: str, world_size: int
) -> None:
    """Raise ValueError, with every difference, when continuing would not be the same run."""
    state, wrong = checkpoint.state, []
    for line in differences(state.recipe, recipe):
        key = line.partition(":")[0]
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_AT_RESUME):
            wrong.append(line)
    if state.store_fingerprint != store_fingerprint:
        wrong.append(f"token store: fingerprint {state.store_fingerprint[:12]} -> {store_fingerprint[:12]}")
    elif state.order != order:  # it follows from store and recipe, so the code must be another
        wrong.append("order of the examples: another version of ochat_train began this run")
    if checkpoint.world_size != world_size:
        wrong.append(f"number of processes: {checkpoint.world_size} -> {world_size}")
    if wrong:
        raise ValueError(
            f"cannot continue {checkpoint.path}, because this differs (was -> is):\n  "
            + "\n  ".join(wrong)
            + "\nGo back to the old values, or start a new run in another checkpoint.dir."
        )


def save_checkpoint(
    engine: DeepSpeedEngine, checkpoint: Checkpoint, world: World, tokenizer: ChatTokenizer, *, keep: int
) -> None:
    """Write `checkpoint.path` with all ranks together, then remove all but the newest `keep` of the run.

    Everything is flushed to disk before the folder gets its name, so a crash at any moment leaves the older ones.
    """
    partial = checkpoint.path.with_name(f"{checkpoint.path.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag="deepspeed", save_latest=False)
    torch.save(_random_states(), partial / f"random-{world.rank:05d}.pt")
    if world.is_main:
        engine.module.lm.config.save_pretrained(partial / "model")
        engine.module.lm.generation_config.save_pretrained(partial / "model")
        tokenizer.save(partial / "tokenizer")
    dist.barrier()
    if world.is_main:
        fields = asdict(checkpoint) | {"format_version": FORMAT_VERSION}
        del fields["path"]
        fields["files"] = {str(f.relative_to(partial)): f.stat().st_size for f in partial.rglob("*") if f.is_file()}
        (partial / "checkpoint.json").write_bytes(orjson.dumps(fields, option=orjson.OPT_INDENT_2))
        flush_tree(partial)
        _remove(checkpoint.path)
        partial.rename(checkpoint.path)
        flush(checkpoint.path.parent)
        for old in find_checkpoints(checkpoint.path.parent)[:-keep]:
            _remove(old)
    dist.barrier()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; cut off by a crash, what is left of it does not look complete."""
    (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Checkpoint, world: World) -> None:
    """Put weights, optimizer and random states of `checkpoint` into the engine and this process."""
    loaded, _ = engine.load_checkpoint(str(checkpoint.path), tag="deepspeed")
    if loaded is None:
        raise RuntimeError(f"DeepSpeed did not find its files in {checkpoint.path}")
    states = torch.load(checkpoint.path / f"random-{world.rank:05d}.pt", weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def remove_leftovers(run_dir: Path) -> list[str]:
    """Remove saves that a crash cut off; returns their names."""
    leftovers = sorted(run_dir.glob("step-*.partial"))
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [leftover.name for leftover in leftovers]


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
