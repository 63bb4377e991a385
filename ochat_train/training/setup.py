"""All that comes before the first step: what is cheap is checked, the ranks agree, the model stands ready."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from ochat_train.conversations.template import TEMPLATES
from ochat_train.model.checkpointing import check_policy
from ochat_train.model.kernels import choose_kernels, require_compiler, use_kernels
from ochat_train.model.lora import add_adapters, require_peft
from ochat_train.model.memory import ModelSize
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES, load_config, load_model
from ochat_train.recipe import Recipe, to_json
from ochat_train.tokens.plan import PlanTable, RunPlan, digest_index
from ochat_train.tokens.store import Manifest, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer, require_model
from ochat_train.training.adam8bit import check_adam8bit
from ochat_train.training.checkpoint import (
    Checkpoint,
    Damaged,
    TrainState,
    check_files,
    check_resume,
    find_checkpoints,
    find_resume,
    load_checkpoint,
    needs_conversion,
    read_checkpoint,
    set_aside,
)
from ochat_train.training.convert import converted_states
from ochat_train.training.disk import plan_disk
from ochat_train.training.engine import (
    Refused,
    World,
    deepspeed_config,
    gather_objects,
    make_engine,
    make_optimizer,
    say,
    together,
)
from ochat_train.training.memory_plan import find_machine, nearest_that_fits, plan_memory, size_of, smallest
from ochat_train.training.planning import check_lengths, check_store, make_run_plan, trained_rows
from ochat_train.training.run_folder import RunFolder
from ochat_train.training.schedule import auto_learning_rate
from ochat_train.training.sinks import check_sinks


@dataclass(frozen=True, slots=True)
class Run:
    """All that is known before the model is loaded."""

    recipe: Recipe
    store: TokenStore
    held_out: TokenStore
    tokenizer: ChatTokenizer
    plan: RunPlan
    peak_lr: float
    resumed: Checkpoint | None

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.checkpoint.dir)

    @property
    def start(self) -> TrainState:
        """Where the run begins, or goes on."""
        if self.resumed is not None:  # under the recipe of now
            return replace(self.resumed.state, recipe=to_json(self.recipe), plan=self.plan.digest)
        return TrainState(
            step=0,
            epoch=0,
            examples_consumed=0,
            tokens_seen=0,
            store_fingerprint=self.store.fingerprint,
            recipe=to_json(self.recipe),
            order=self.plan.order.digest,
            plan=self.plan.digest,
        )

    def is_finished(self, state: TrainState) -> bool:
        """Whether nothing is left to train."""
        max_steps = self.recipe.train.max_steps
        is_stopped = max_steps is not None and state.step >= max_steps
        return is_stopped or state.examples_consumed >= self.plan.num_examples


def prepare(recipe: Recipe, world: World) -> Run:
    """Open and check everything that is cheap. Raises ValueError with the remedy."""
    store, held_out = TokenStore(recipe.data.store, "train"), TokenStore(recipe.data.store, "eval")
    tokenizer = load_tokenizer(recipe.tokenizer_name, TEMPLATES[recipe.template])
    check_store(recipe, store.manifest, tokenizer)
    if recipe.model.base is not None:
        require_model(recipe.model.base)
    config = load_config(recipe.model.base, recipe.model.config, tokenizer.num_ids).get_text_config()
    run = Run(
        recipe=recipe,
        store=store,
        held_out=held_out,
        tokenizer=tokenizer,
        plan=make_run_plan(recipe, store, config, world.size),
        peak_lr=peak_learning_rate(recipe, config, store.manifest, world.size),
        resumed=find_resume(Path(recipe.checkpoint.dir), recipe.checkpoint.resume),
    )
    check_lengths(held_out, recipe.packing.tokens_per_gpu)
    deepspeed_configuration(recipe)
    check_sinks(recipe)
    if recipe.model.lora is not None:
        require_peft()
    if recipe.model.compile:
        require_compiler(world.device.type)
    size = size_of(recipe, config, len(trained_rows(recipe, tokenizer)))
    check_options(recipe, config, size, world.size)
    check_disk(recipe, size, run.plan)
    check_continues(run, world)
    return run


def check_options(recipe: Recipe, config: Any, size: ModelSize, num_processes: int) -> None:
    """Raise ValueError when the recipe's checkpointing or optimizer is none for a model of this size."""
    if recipe.model.checkpointing != "auto":
        check_policy(recipe.model.checkpointing, getattr(config, "num_hidden_layers", 1))
    if recipe.optim.algorithm == "adamw_8bit":
        check_adam8bit(size, stage=recipe.zero.stage, num_processes=num_processes)


def check_disk(recipe: Recipe, size: ModelSize, plan: RunPlan) -> None:
    """Raise ValueError, with what is needed and what is there, when the run's folder will not fit its disk."""
    num_steps = int(plan.lengths.sum(dtype=int)) * recipe.train.epochs // plan.shape.room
    if (disk := plan_disk(recipe, size, num_steps)).missing:
        raise ValueError(f"checkpoint.dir lacks room: {disk.describe()}; {disk.remedy}")


def check_continues(run: Run, world: World) -> None:
    """Raise ValueError unless the run may go on from its checkpoint, if it has one."""
    if run.resumed is None:
        return
    check_resume(
        run.resumed,
        recipe=to_json(run.recipe),
        store_fingerprint=run.store.fingerprint,
        order=run.plan.order.digest,
        world_size=world.size,
    )
    consumed, total = run.resumed.state.examples_consumed, run.plan.num_examples
    if consumed > total:
        raise ValueError(
            f"{run.resumed.path} has consumed {consumed:,} examples, more than the {total:,} of train.epochs "
            f"{run.recipe.train.epochs}; raise it"
        )


def peak_learning_rate(recipe: Recipe, config: object, manifest: Manifest, world_size: int) -> float:
    """The recipe's learning rate, or the published rule's for `auto`."""
    if recipe.optim.lr != "auto":
        return recipe.optim.lr
    train = manifest.splits["train"]
    tokens_per_step = recipe.packing.tokens_per_gpu * world_size * recipe.packing.grad_accum
    return auto_learning_rate(config, tokens_per_step * train["num_supervised_tokens"] / train["num_tokens"])


def deepspeed_configuration(
    recipe: Recipe, *, is_shared: bool = True, loads_universal: bool = False
) -> dict[str, object]:
    """The DeepSpeed configuration that the recipe means; see `deepspeed_config` for what it does not say."""
    return deepspeed_config(
        stage=recipe.zero.stage,
        offload=recipe.zero.offload,
        dtype=recipe.model.dtype,
        grad_accum=recipe.packing.grad_accum,
        grad_clip=recipe.optim.grad_clip,
        extra=recipe.deepspeed,
        is_shared=is_shared,
        loads_universal=loads_universal,
    )


def settle_resume(run: Run, folder: RunFolder, world: World) -> Run:
    """The run with the newest checkpoint that all ranks have, and have whole. Damaged ones are told of and set aside.

    All ranks call it together. Raises Refused when there are checkpoints, but none that is whole.
    """
    if run.recipe.checkpoint.resume != "auto":
        if run.resumed is not None and (told := _damage(run.resumed.path, folder, world)):
            raise Refused(f"{told}; name an older one in checkpoint.resume")
        if len({str(resumed) for resumed in gather_objects(run.resumed and run.resumed.state)}) > 1:
            raise Refused(f"checkpoint.resume {run.recipe.checkpoint.resume} is another checkpoint on another node")
        return run
    of_ranks = gather_objects({path.name for path in find_checkpoints(run.dir)})
    names = set.intersection(*of_ranks)
    if alone := max(set.union(*of_ranks) - names, default=""):  # a crash came between the nodes' renaming of a save
        say(world, f"{alone} is not on every node and is passed over")
    damaged: dict[str, str] = {}
    for name in sorted(names, reverse=True):
        if told := _damage(run.dir / name, folder, world):
            say(world, f"WARNING: {told}")
            damaged[name] = told
            continue
        settled = replace(run, resumed=together(partial(read_checkpoint, run.dir / name)))
        together(partial(check_continues, settled, world))
        for old in damaged if folder.is_writer else ():
            set_aside(run.dir / old)
        if damaged:
            say(world, f"WARNING: falling back to {name}; the damaged ones are kept as *.damaged")
        return settled
    if damaged:
        raise Refused(
            "no checkpoint is whole, and nothing was begun anew over them:\n  "
            + "\n  ".join(damaged.values())
            + "\nRestore one, or train in another checkpoint.dir."
        )
    return replace(run, resumed=None)


def _damage(path: Path, folder: RunFolder, world: World) -> str | None:
    """What is wrong with the checkpoint's files, which the ranks that see them read together."""

    def look() -> str | None:
        part, parts = (world.rank, world.size) if folder.is_shared else (world.local_rank, world.local_size)
        try:
            check_files(read_checkpoint(path), part=part, parts=parts)
        except Damaged as error:
            return str(error)
        return None

    return next((told for told in gather_objects(together(look)) if told is not None), None)


def ready_engine(run: Run, folder: RunFolder, world: World) -> DeepSpeedEngine:
    """The engine, with the states of the checkpoint from which the run goes on. All ranks call it together."""
    resumed, recipe = run.resumed, to_json(run.recipe)
    if resumed is None:
        return build_engine(run, world, is_shared=folder.is_shared)
    if not needs_conversion(resumed, recipe, world.size):
        engine = build_engine(run, world, is_shared=folder.is_shared)
        _load(engine, resumed, world)
        return engine
    was = resumed.state.recipe["zero"]["stage"]
    say(
        world,
        f"converting the states of {resumed.path}: from {resumed.world_size} processes at zero.stage {was} "
        f"to {world.size} at {run.recipe.zero.stage}",
    )
    with converted_states(resumed, run.recipe.zero.stage, folder, world) as states:
        engine = build_engine(run, world, is_shared=folder.is_shared, loads_universal=True)
        _load(engine, resumed, world, states)
    return engine


def _load(engine: DeepSpeedEngine, checkpoint: Checkpoint, world: World, states: Path | None = None) -> None:
    try:
        load_checkpoint(engine, checkpoint, world, states=states)
    except ValueError as error:  # the base is not the one of the adapters, which every rank sees
        raise Refused(str(error)) from None


def build_engine(run: Run, world: World, *, is_shared: bool = True, loads_universal: bool = False) -> DeepSpeedEngine:
    """The recipe's model in a DeepSpeed engine, ready to train. Raises Refused when the model cannot be used.

    is_shared, loads_universal: see `deepspeed_config`.
    """
    recipe, policy = run.recipe, settle_checkpointing(run, world)
    model = together(lambda: build_model(run, world, policy))
    torch.manual_seed(recipe.train.seed + world.rank)  # of dropout, if the model has any
    optimizer = make_optimizer(
        model,
        algorithm=recipe.optim.algorithm,
        lr=run.peak_lr,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        weight_decay=recipe.optim.weight_decay,
    )
    configuration = deepspeed_configuration(recipe, is_shared=is_shared, loads_universal=loads_universal)
    return make_engine(model, optimizer, configuration)


def settle_checkpointing(run: Run, world: World) -> str:
    """The recipe's checkpointing policy; for auto what fits the rank with the least memory. All ranks call it together.

    What auto chose, and why, is printed.
    """
    recipe = run.recipe
    if recipe.model.checkpointing != "auto":
        return recipe.model.checkpointing
    here = find_machine()
    machine = smallest(gather_objects(here if world.device.type != "cpu" else replace(here, gpu_bytes=None)))
    config = load_config(recipe.model.base, recipe.model.config, run.tokenizer.num_ids).get_text_config()
    num_local = max(gather_objects(world.local_size))
    try:
        size = size_of(recipe, config, len(trained_rows(recipe, run.tokenizer)))
        plan = plan_memory(recipe, machine, config, size, world.size, num_local=num_local)
    except ValueError as error:  # on every rank, for it follows from the recipe
        say(world, f"model.checkpointing auto: full, since {error}")
        return "full"
    say(world, f"model.checkpointing auto: {plan.policy}, {plan.describe()}")
    if not plan.fits_device(plan.own):
        say(world, f"WARNING: this is too much for full checkpointing; {nearest_that_fits(plan)}")
    return gather_objects(plan.policy)[0]


def build_model(run: Run, world: World, checkpointing: str) -> PackedCausalLM:
    """The recipe's model on the CPU. Raises ValueError when it cannot be loaded or not be used on packed batches."""
    recipe, lora = run.recipe, run.recipe.model.lora
    num_ids, added_ids = run.tokenizer.num_ids, run.store.manifest.added_tokens.values()
    config = load_config(recipe.model.base, recipe.model.config, num_ids)
    kernels = choose_kernels(
        recipe.model.kernels,
        config,
        device=world.device,
        dtype=DTYPES[recipe.model.dtype],
        is_compiled=recipe.model.compile,
    )
    say(world, f"kernels {kernels.kernels} ({kernels.reason})")
    lm = load_model(
        recipe.model.base,
        recipe.model.config,
        dtype=recipe.model.dtype,
        num_ids=num_ids,
        added_ids=added_ids,
        seed=recipe.train.seed,
    )
    if lora is not None:
        add_adapters(
            lm,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            row_ids=trained_rows(recipe, run.tokenizer),
            seed=recipe.train.seed,
        )
    use_kernels(lm, kernels.kernels)
    packed = PackedCausalLM(
        lm,
        attention=recipe.model.attention,
        device_type=world.device.type,
        checkpointing=checkpointing,
        num_conditions=len(run.store.manifest.conditions),
    )
    if recipe.model.compile:
        packed.compile_parts()
    return packed


def check_agreement(run: Run) -> None:
    """Raise Refused unless all ranks have the same plan, store and recipe."""
    held_out = digest_index(run.held_out.lengths, run.held_out.weight_sums)
    view = (run.plan.digest, held_out, run.store.fingerprint, repr(to_json(run.recipe)))
    views = set(gather_objects(view))
    if len(views) > 1:
        raise Refused(
            "the processes disagree on the plan: give every node the same recipe, store and versions of all packages"
        )


def agree_on_steps(ahead: Future[PlanTable]) -> PlanTable:
    """The table of all steps that are left. Raises Refused unless it is the same, bit for bit, on all ranks."""
    table = together(ahead.result)
    if len(set(gather_objects(table.digest))) > 1:
        raise Refused(
            "the processes planned different steps from the same store: give every node the same version of "
            "ochat_train and of its packages"
        )
    return table
