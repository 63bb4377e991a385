"""Checkpoints from which a run continues: what one holds, whether it is whole, and which one to resume from.

RUN/step-00000100/checkpoint.json     TrainState, what export needs, size and SHA-256 of all files; written last
RUN/step-00000100/deepspeed/          DeepSpeed's weights and optimizer states, one file or more a rank
RUN/step-00000100/random-00000.pt     random states of rank 0, ...
RUN/step-00000100/model/, tokenizer/  the model's configuration; the tokenizer
RUN/step-00000120.partial             a save that was cut off; the next run removes it
RUN/step-00000120.damaged             a checkpoint that was found damaged; nothing removes it
"""

import hashlib
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ochat_train.conversations.described import Description
from ochat_train.files import STEP_FOLDERS, step_name
from ochat_train.recipe import differences
from ochat_train.training.engine import World

FORMAT_VERSION = 2
MANIFEST = "checkpoint.json"
# Keys that a resumed run may change: they decide neither the weight of an example nor the order of those left.
FREE_AT_RESUME = (
    "name",
    "data.store",
    "model.attention",
    "model.checkpointing",
    "model.kernels",
    "model.compile",
    "packing",
    "zero",
    "train.epochs",
    "train.max_steps",
    "train.max_skipped",
    "train.stall_timeout_s",
    "eval",
    "checkpoint",
    "log",
)


@dataclass(frozen=True, slots=True)
class TrainState:
    """The position of a run. Counts are over all epochs; recipe is in its JSON form.

    order: digest of the order in which examples are consumed. plan: digest of the steps that they make in this run.
    """

    step: int
    epoch: int
    examples_consumed: int
    tokens_seen: int
    store_fingerprint: str
    recipe: dict[str, Any]
    order: str
    plan: str


@dataclass(frozen=True, slots=True)
class FileMark:
    """The size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. files: all in its folder; on a node's own file system those of that node only.

    run: see `describe_run`.
    """

    path: Path
    state: TrainState
    world_size: int
    template: Description
    inference_condition: str
    conditions: list[str]
    run: dict[str, Any]
    files: dict[str, FileMark]


class Damaged(ValueError):
    """A checkpoint that differs from what was written."""


def mark_file(file: Path) -> FileMark:
    """The FileMark of a file, all of which is read."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return FileMark(file.stat().st_size, digest)


def manifest_of(checkpoint: Checkpoint) -> bytes:
    """The content of checkpoint.json. It includes a digest of its fields, because this file may be damaged, too."""
    fields = asdict(checkpoint) | {"format_version": FORMAT_VERSION}
    del fields["path"]
    return orjson.dumps(fields | {"digest": _digest(fields)}, option=orjson.OPT_INDENT_2)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in the folder `path`; only its checkpoint.json is read.

    Raises Damaged when that file differs from what was written, ValueError when it is missing or of another format.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path} is not a complete checkpoint (it has no {MANIFEST}); name a RUN/step-NNNNNNNN")
    try:
        fields = orjson.loads(file.read_bytes())
        version, digest = fields.pop("format_version"), fields.pop("digest", None)
    except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error!r})") from None
    if version != FORMAT_VERSION and (digest is None or digest == _digest(fields | {"format_version": version})):
        raise ValueError(f"{path} has checkpoint format {version}, this version reads {FORMAT_VERSION}")
    if digest != _digest(fields | {"format_version": version}):
        raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} does not agree with its own digest")
    state = TrainState(**fields.pop("state"))
    if lora := state.recipe["model"].get("lora"):  # before this key existed: rows of added tokens only
        lora.setdefault("train_template_tokens", False)
    files = {name: FileMark(**mark) for name, mark in fields.pop("files").items()}
    return Checkpoint(path=Path(path), state=state, files=files, **fields)


def check_files(checkpoint: Checkpoint, *, part: int = 0, parts: int = 1) -> None:
    """Read the `part`-th of `parts` shares of a checkpoint's files. Raises Damaged, naming a file that differs."""
    by_size = sorted(checkpoint.files, key=lambda name: (-checkpoint.files[name].size, name))
    for name in by_size[part::parts]:
        file, expected = checkpoint.path / name, checkpoint.files[name]
        size = file.stat().st_size if file.is_file() else None
        if size != expected.size:
            what = "is not there" if size is None else f"has {size:,} bytes, not {expected.size:,}"
        elif mark_file(file) != expected:
            what = "has other bytes than were written"
        else:
            continue
        raise Damaged(f"checkpoint {checkpoint.path} is damaged: {name} {what}")


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob(STEP_FOLDERS) if (path / MANIFEST).is_file())


def find_resume(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to continue from. resume: auto (the newest that can be read, if any), never, or a path.

    Raises ValueError for never when the folder already holds checkpoints, and for a path when the folder holds newer
    ones, so that two runs never mix and neither removes the other's.
    """
    found = find_checkpoints(run)
    if resume not in ("auto", "never"):
        chosen = read_checkpoint(resume)
        if found and found[-1].name > step_name(chosen.state.step):
            raise ValueError(
                f"checkpoint.resume {resume}, but checkpoint.dir {run} holds the newer {found[-1].name}; continue in "
                "another folder, or from the newest with checkpoint.resume=auto"
            )
        return chosen
    if found and resume == "never":
        raise ValueError(
            f"checkpoint.dir {run} already holds {found[-1].name}, and checkpoint.resume is never; "
            "name another folder, or remove that one"
        )
    for path in reversed(found):
        try:
            return read_checkpoint(path)
        except Damaged:  # reported once all files have been read
            continue
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to NAME.damaged, so that it is kept and no longer taken for a checkpoint."""
    names = (f"{path.name}.damaged{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    path.rename(next(path.with_name(name) for name in names if not path.with_name(name).exists()))


def check_resume(
    checkpoint: Checkpoint, *, recipe: dict[str, Any], store_fingerprint: str, order: str, world_size: int
) -> None:
    """Raise ValueError with every difference when continuing would not be the same run."""
    state, wrong = checkpoint.state, []
    for line in differences(state.recipe, recipe):
        key = line.partition(":")[0]
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_AT_RESUME):
            wrong.append(line)
    if state.store_fingerprint != store_fingerprint:
        wrong.append(f"token store: fingerprint {state.store_fingerprint[:12]} -> {store_fingerprint[:12]}")
    elif state.order != order:  # it follows from store and recipe, so the code differs
        wrong.append("order of the examples: another version of ochat_train began this run")
    was, stage = state.recipe["zero"]["stage"], recipe["zero"]["stage"]
    if (was == 0) != (stage == 0):
        wrong.append(f"zero.stage: {was} -> {stage}; from and to 0 its states cannot be converted")
    elif needs_conversion(checkpoint, recipe, world_size) and recipe["optim"]["algorithm"] != "adamw":
        wrong.append(
            f"number of processes or zero.stage: {checkpoint.world_size}, {was} -> {world_size}, {stage}; "
            "DeepSpeed converts only the states of adamw"
        )
    if wrong:
        raise ValueError(
            f"cannot continue {checkpoint.path}, because this differs (was -> is):\n  "
            + "\n  ".join(wrong)
            + "\nGo back to the old values, or start a new run in another checkpoint.dir. A resume may change the "
            f"number of processes and, of the recipe, {', '.join(FREE_AT_RESUME)}. It may change nothing else, such as "
            "the template, the tokenizer, what the token store holds, the model or the optimizer."
        )


def needs_conversion(checkpoint: Checkpoint, recipe: dict[str, Any], world_size: int) -> bool:
    """Whether this run splits the states differently. Plain replicas, zero.stage 0, fit any number of ranks."""
    was, stage = checkpoint.state.recipe["zero"]["stage"], recipe["zero"]["stage"]
    return bool(stage and was and (was, checkpoint.world_size) != (stage, world_size))


def load_checkpoint(
    engine: DeepSpeedEngine, checkpoint: Checkpoint, world: World, *, states: Path | None = None
) -> None:
    """Load weights and optimizer states of `checkpoint` into the engine, and random states into this process.

    states: the folder of converted DeepSpeed states; None takes the checkpoint's own.
    """
    folder = checkpoint.path / "deepspeed" if states is None else states
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed did not find its files in {folder}")
    # From converted states, stage 3 gives every group the weight decay of the first, and all states one shared step
    # count, which each of them would then increment.
    for group, values in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(values)
    for state in engine.basic_optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    file = checkpoint.path / f"random-{world.rank:05d}.pt"
    if not file.is_file():  # there were fewer ranks
        return
    random_states = torch.load(file, weights_only=False)
    random.setstate(random_states["python"])
    np.random.set_state(random_states["numpy"])
    torch.set_rng_state(random_states["torch"])
    if torch.cuda.is_available() and random_states["cuda"] is not None:
        torch.cuda.set_rng_state(random_states["cuda"])


def random_states() -> dict[str, Any]:
    """The states of this process's random number generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
