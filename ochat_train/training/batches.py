"""A rank's micro-batches of a step of the plan."""

from ochat_train.tokens.batch import CUDA_MULTIPLE, PackedBatch, collate
from ochat_train.tokens.order import Indices
from ochat_train.tokens.plan import StepPlan
from ochat_train.tokens.store import Examples
from ochat_train.training.engine import World


def make_batches(store: Examples, step: StepPlan, world: World) -> list[PackedBatch]:
    """This rank's micro-batches of a step, in memory from which the accelerator copies by itself."""
    multiple = CUDA_MULTIPLE if world.device.type == "cuda" else 1
    return [
        make_batch(store, positions, multiple=multiple).pin(world.device)
        for positions in step.bins[world.rank :: world.size]
    ]


def make_batch(store: Examples, positions: Indices, *, multiple: int = 1) -> PackedBatch:
    """The packed batch of some of the store's examples; `multiple` as for `collate`."""
    examples = [store[position] for position in positions.tolist()]
    return collate(examples, store.condition_ids[positions], multiple=multiple)
