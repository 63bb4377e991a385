"""The recipe's plan, whether its store fits and is whole, and this rank's micro-batches of each step."""

import secrets
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.described import Description, describe_template
from ochat_train.model.pretrained import max_positions_of, quadratic_length_of, rows_to_train
from ochat_train.recipe import Recipe, refused_differences
from ochat_train.tokens.batch import CUDA_MULTIPLE, PackedBatch, collate
from ochat_train.tokens.order import DataOrder, Indices, SourceShare
from ochat_train.tokens.plan import PlanShape, RunPlan, StepPlan
from ochat_train.tokens.store import Examples, Manifest, TokenStore, read_manifest
from ochat_train.tokens.store_files import check_blocks
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.engine import World, gather_objects, together


def check_store(recipe: Recipe, manifest: Manifest, tokenizer: ChatTokenizer) -> None:
    """Raise ValueError with every difference when the store was made for another recipe or tokenizer.

    Paths of dumps are no difference; `preprocess.job.check_moved` compares what is at new ones.
    """
    wrong = refused_differences(
        {"template": _without_source(manifest.template), "data": manifest.made_from["data"]},
        {"template": _without_source(describe_template(tokenizer.template)), "data": recipe.data.of_store()},
    )
    if (made_with := manifest.made_from["tokenizer"]) != tokenizer.digest:
        wrong.append(f"tokenizer {recipe.tokenizer_name}: digest {made_with[:12]} -> {tokenizer.digest[:12]}")
    if wrong:
        raise ValueError(
            f"token store {recipe.data.store} was made for another recipe (was -> is):\n  "
            + "\n  ".join(wrong)
            + "\nRun ochat preprocess with this recipe first."
        )


def _without_source(description: Description) -> Description:
    """The description with a digest for the long source of a base's own template."""
    if isinstance(description, str) or "source" not in description:
        return description
    return description | {"source": sha256(description["source"].encode()).hexdigest()[:12]}


def verify_store(recipe: Recipe, world: World, progress: Callable[[], None]) -> None:
    """Compare the store's files with their checksums; ranks that share a disk share the reading. All ranks call it.

    Nothing is read of a store that is not there, or where data.verify is false. progress: called after each block.
    Raises Refused with the name of a damaged file, on whichever rank it was found.
    """
    store = Path(recipe.data.store)
    part, parts = _share_of(store, world)

    def check() -> None:
        manifest = read_manifest(store) if recipe.data.verify else None
        if manifest is not None:
            check_blocks(store, manifest.files, part=part, parts=parts, progress=progress)

    together(check)


def _share_of(store: Path, world: World) -> tuple[int, int]:
    """This rank's share of the store that it sees, and how many there are: of the main rank's store, or its node's.

    A mark in the store shows who sees the main rank's; where none can be written, each node reads all.
    """
    mine = world.local_rank, world.local_size
    if world.size == world.local_size:
        return mine
    name = f".seen-{secrets.token_hex(8)}"
    with suppress(OSError):
        if world.is_main:
            (store / name).touch()
    mark = store / gather_objects(name)[0]  # the main rank's is there before any rank looks for it
    sees: list[bool] = gather_objects(mark.exists())
    with suppress(OSError):
        if world.is_main:
            mark.unlink()
    return (sum(sees[: world.rank]), sum(sees)) if sees[world.rank] else mine


def trained_rows(recipe: Recipe, tokenizer: ChatTokenizer) -> list[int]:
    """The ids whose rows of embedding and head are trained beside the adapters, ascending; empty without adapters."""
    model = recipe.model
    if model.lora is None:
        return []
    assert model.base is not None
    return rows_to_train(model.base, tokenizer, with_template=model.lora.train_template_tokens)


def groups_of(recipe: Recipe, num_processes: int) -> int:
    """How many groups of processes share micro-batches. Raises ValueError when the processes cannot be grouped so."""
    shared = recipe.packing.sequence_parallel
    if num_processes % shared:
        raise ValueError(
            f"packing.sequence_parallel {shared} does not divide {num_processes:,} processes; set it to one of their "
            "divisors, or start another number"
        )
    return num_processes // shared


def make_run_plan(recipe: Recipe, store: TokenStore, config: Any, world_size: int) -> RunPlan:
    """The plan of the recipe's run on `world_size` processes; config: the model's transformers configuration.

    Raises ValueError when data.max_tokens is above the model's positions, an example is longer than a micro-batch, no
    example has a loss weight above 0, or processes cannot share micro-batches as the recipe says.
    """
    packing = recipe.packing
    num_groups = groups_of(recipe, world_size)
    if recipe.data.max_tokens > (most := max_positions_of(config)):
        raise ValueError(
            f"data.max_tokens {recipe.data.max_tokens:,} is above the model's {most:,} positions; lower it"
        )
    check_lengths(store, packing.capacity)
    if not np.any(store.weight_sums):
        raise ValueError(
            f"none of the {len(store):,} examples of token store {recipe.data.store} has a loss weight above 0, so "
            "nothing would be learned; look at the weights of data.sources and of the messages, and preprocess again"
        )
    shape = PlanShape(
        capacity=packing.capacity,
        world_size=num_groups,
        grad_accum=packing.grad_accum,
        quadratic_length=quadratic_length_of(config, max_tokens=recipe.data.max_tokens),
    )
    return RunPlan(store.lengths, store.weight_sums, shape, data_order(recipe, store), recipe.train.epochs)


def data_order(recipe: Recipe, store: TokenStore) -> DataOrder:
    """The order in which examples are trained. Raises ValueError for a source of which none would be."""
    num_epochs = recipe.train.epochs
    shares = [
        SourceShare(source.name, store.members(id), source.epochs) for id, source in enumerate(recipe.data.sources)
    ]
    for number, share in enumerate(shares):
        if len(share.members) and not share.num_drawn(num_epochs):
            raise ValueError(
                f"data.sources.{number}.epochs {share.epochs:g} of the {len(share.members):,} examples of "
                f"{share.name} is none at all in train.epochs {num_epochs}; raise it, or leave the source out"
            )
    is_plain = all(share.epochs == 1 for share in shares)
    return DataOrder(len(store), recipe.train.seed, () if is_plain else shares)


def source_weights(store: TokenStore, step: StepPlan) -> npt.NDArray[np.float64]:
    """f64[S], the sum of the loss weights of each source that is trained in a step."""
    positions, num_sources = np.concatenate(step.bins), len(store.manifest.trained_sources)
    weights = np.bincount(store.source_ids[positions], store.weight_sums[positions], num_sources)
    return weights.astype(np.float64)


def check_lengths(
    store: TokenStore, capacity: int, *, raised_by: str = "packing.tokens_per_gpu or packing.sequence_parallel"
) -> None:
    """Raise ValueError, with its name, when an example of the store is longer than `capacity` tokens."""
    if not len(store) or (longest := int(store.lengths.max())) <= capacity:
        return
    name = store.name(int(store.lengths.argmax()))
    raise ValueError(
        f"conversation {name} has {longest:,} tokens, above the {capacity:,} of a micro-batch; raise {raised_by}, or "
        "lower data.max_tokens and preprocess again"
    )


def make_batches(store: Examples, step: StepPlan, world: World, *, by_example: bool = False) -> list[PackedBatch]:
    """This rank's micro-batches of a step, or shares of them, in pinned memory where the device is an accelerator.

    by_example: each example has a condition id of its own, its place in the micro-batch.
    """
    multiple = world.sequence_parallel * (CUDA_MULTIPLE if world.device.type == "cuda" else 1)
    batches = (
        make_batch(store, positions, multiple=multiple, by_example=by_example)
        for positions in step.bins[world.own_bins]
    )
    place = world.rank % world.sequence_parallel
    return [batch.share(place, world.sequence_parallel).pin(world.device) for batch in batches]


def make_batch(store: Examples, positions: Indices, *, multiple: int = 1, by_example: bool = False) -> PackedBatch:
    """The packed batch of the store's examples at `positions` i64[n]; multiple: see `collate`."""
    examples = [store[position] for position in positions.tolist()]
    condition_ids = np.arange(len(positions)) if by_example else store.condition_ids[positions]
    return collate(examples, condition_ids, multiple=multiple)
