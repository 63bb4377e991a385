"""Everything before the first step: cheap checks, agreement among the ranks, the engine with its states."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedModel

from ochat_train.conversations.described import read_template
from ochat_train.model.attention import BackendChoice
from ochat_train.model.checkpointing import check_policy, share_of, tile_mlps
from ochat_train.model.kernels import KernelChoice, choose_kernels, require_compiler, use_kernels
from ochat_train.model.lora import CHECKSUM, add_adapters, require_peft
from ochat_train.model.memory import ModelSize
from ochat_train.model.packed_lm import PackedCausalLM, attention_needs
from ochat_train.model.pretrained import (
    DTYPES,
    digest_base,
    fixed_to_buffers,
    load_config,
    load_model,
    max_positions_of,
)
from ochat_train.model.probe import Agreement, check_split, check_tiles, choose_attention
from ochat_train.model.quantised import require_quantising
from ochat_train.model.round_trip import check_round_trip
from ochat_train.model.router import RouterChoice, choose_router_loss
from ochat_train.model.text_part import text_part_of, untrained_of
from ochat_train.recipe import Recipe, to_json
from ochat_train.tokens.plan import PlanTable, RunPlan, digest_index
from ochat_train.tokens.store import SPLITS, Manifest, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer, require_model
from ochat_train.training.best_epoch import Criterion
from ochat_train.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    Damaged,
    TrainState,
    check_files,
    check_resume,
    find_candidates,
    find_incomplete,
    load_checkpoint,
    needs_conversion,
    newest_readable,
    origin_of,
    read_checkpoint,
    set_aside,
)
from ochat_train.training.convert import converted_states
from ochat_train.training.data import check_lengths, check_store, make_run_plan, trained_rows
from ochat_train.training.engine import (
    Refused,
    World,
    check_adam8bit,
    deepspeed_config,
    gather_objects,
    make_engine,
    make_optimizer,
    say,
    together,
)
from ochat_train.training.loading import load_once
from ochat_train.training.questions import Asked, encode_questions, read_checks
from ochat_train.training.resources import find_memory, kind_of, nearest_that_fits, plan_disk, plan_memory, size_of
from ochat_train.training.run_folder import RunFolder
from ochat_train.training.schedule import PeakRate, auto_learning_rate
from ochat_train.training.sequence_parallel import Group, join_group
from ochat_train.training.sinks import check_sinks


@dataclass(frozen=True, slots=True)
class CheckpointingChoice:
    """The activation checkpointing, and the reason and a warning for the log."""

    policy: str
    reason: str
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings that a recipe may leave to auto, as they are in this run."""

    peak_lr: PeakRate
    attention: BackendChoice
    agreement: Agreement
    kernels: KernelChoice
    checkpointing: CheckpointingChoice
    router: RouterChoice | None
    text_part: str | None

    def describe(self) -> str:
        """The choices with their reasons, a line each."""
        lines = [
            f"activation checkpointing {self.checkpointing.policy} ({self.checkpointing.reason})",
            *([f"WARNING: {self.checkpointing.warning}"] if self.checkpointing.warning else []),
            f"kernels {self.kernels.kernels} ({self.kernels.reason})",
            f"attention backend {self.attention.backend} ({self.attention.reason})",
            str(self.agreement),
            *([self.text_part] if self.text_part else []),
            *([str(self.router)] if self.router else []),
            f"peak learning rate {self.peak_lr.value:.3g} ({self.peak_lr.reason})",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Run:
    """All that is known before the model is loaded. asked: the questions of eval.checks."""

    recipe: Recipe
    store: TokenStore
    held_out: TokenStore
    asked: tuple[Asked, ...]
    tokenizer: ChatTokenizer
    plan: RunPlan
    resolved: Resolved
    resumed: Checkpoint | None

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.checkpoint.dir)

    @property
    def start(self) -> TrainState:
        """The position where the run starts or continues."""
        if self.resumed is not None:  # under the present recipe
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

    @property
    def began_from(self) -> dict[str, Any] | None:
        """The checkpoint at a path of checkpoint.resume from which the run began, see `origin_of`; None for none."""
        if self.resumed is None:
            return None
        if str(self.resumed.path) == str(Path(self.recipe.checkpoint.resume)):
            return origin_of(self.resumed)
        return self.resumed.run.get("began_from")

    @property
    def criterion(self) -> Criterion:
        """What makes an epoch's model better: checkpoint.best, under the condition of inference; else the loss."""
        return Criterion(self.recipe.checkpoint.best or "loss", self.store.manifest.inference_condition)

    def is_finished(self, state: TrainState) -> bool:
        """Whether nothing is left to train."""
        max_steps = self.recipe.train.max_steps
        is_stopped = max_steps is not None and state.step >= max_steps
        return is_stopped or state.examples_consumed >= self.plan.num_examples

    def is_epoch_end(self, state: TrainState) -> bool:
        """Whether an epoch ends at this position."""
        return state.step > 0 and self.plan.order.seek(state.examples_consumed)[1] == 0


def prepare(recipe: Recipe, world: World) -> Run:
    """Open and check everything that is cheap. Raises ValueError with the remedy."""
    store, held_out = (TokenStore(recipe.data.store, split, recipe.train.loss) for split in SPLITS)
    tokenizer = load_tokenizer(recipe.tokenizer_name, read_template(recipe.template_json))
    check_store(recipe, store.manifest, tokenizer)
    if recipe.model.base is not None:
        require_model(recipe.model.base)
    config = load_config(recipe.model.base, recipe.model.config, tokenizer.num_ids)
    plan = make_run_plan(recipe, store, config, world.size)
    check_lengths(held_out, recipe.packing.capacity)
    deepspeed_configuration(recipe)
    check_sinks(recipe)
    checks = read_checks(recipe.eval.checks)
    if not len(held_out) and (
        recipe.checkpoint.best == "loss" or (recipe.train.early_stop and not recipe.checkpoint.best)
    ):
        what = "checkpoint.best: loss" if recipe.checkpoint.best else "train.early_stop"
        raise ValueError(
            f"{what} needs a held-out loss, and {recipe.data.store} holds nothing out; set data.eval_fraction or "
            "data.eval_sources"
        )
    require_adapters(recipe, world.device)
    if recipe.model.compile:
        require_compiler(world.device.type, config)
    size = size_of(recipe, config, len(trained_rows(recipe, tokenizer)))
    check_options(recipe, config, size, world.size)
    resumed = newest_readable(find_candidates(Path(recipe.checkpoint.dir), recipe.checkpoint.resume))
    check_disk(recipe, size, plan, start=0 if resumed is None else resumed.state.step)
    attention, agreement = attention_of(recipe, config, world.device.type, is_exported=world.is_main)
    run = Run(
        recipe=recipe,
        store=store,
        held_out=held_out,
        asked=encode_questions(checks, tokenizer, store.manifest.conditions, max_positions=max_positions_of(config)),
        tokenizer=tokenizer,
        plan=plan,
        resolved=Resolved(
            peak_lr=peak_learning_rate(recipe, config, store.manifest, world.size),
            attention=attention,
            agreement=agreement,
            kernels=choose_kernels(
                recipe.model.kernels,
                config,
                device=world.device,
                dtype=DTYPES[recipe.model.dtype],
                is_compiled=recipe.model.compile,
            ),
            checkpointing=_choose_checkpointing(recipe, config, size, world, is_alone=attention.backend == "alone"),
            router=choose_router_loss(
                recipe.model.router_aux_loss_coef, config, is_frozen=recipe.model.lora is not None
            ),
            text_part=text_part_of(config),
        ),
        resumed=resumed,
    )
    check_continues(run, world)
    return run


def require_adapters(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError, with the remedy, when what the recipe's adapters need is not installed for this device."""
    if recipe.model.lora is not None:
        require_peft()
        if recipe.model.lora.base_bits is not None:
            require_quantising(device)


def attention_of(
    recipe: Recipe, config: Any, device_type: str, *, is_exported: bool = True
) -> tuple[BackendChoice, Agreement]:
    """The attention of the recipe's run, and how exact the model is with it and, is_exported, after its export.

    See `choose_attention` and `check_round_trip`. Raises ValueError as they do.
    """
    longest, lora, base = recipe.data.max_tokens, recipe.model.lora, recipe.model.base
    text_config = config.get_text_config()
    attention, agreement = choose_attention(
        recipe.model.attention,
        config,
        attention_needs(text_config, DTYPES[recipe.model.dtype], device_type),
        longest=longest,
        checkpointing=recipe.model.checkpointing,
    )
    check_split(config, attention, recipe.packing.sequence_parallel, longest=longest)
    check_tiles(config, attention, recipe.model.mlp_tiles, longest=longest)
    if is_exported:
        own_size = text_config.vocab_size if base is None else load_config(base, None, 0).get_text_config().vocab_size
        exported = check_round_trip(
            config,
            longest=longest,
            is_alone=attention.backend == "alone",
            is_extended=text_config.vocab_size > own_size,
            lora_targets=lora.targets if lora else None,
        )
        agreement = agreement._replace(exported=exported)
    return attention, agreement


def check_options(recipe: Recipe, config: Any, size: ModelSize, num_processes: int) -> None:
    """Raise ValueError when a model of this size cannot have the recipe's checkpointing or optimizer."""
    if recipe.model.checkpointing != "auto":
        check_policy(recipe.model.checkpointing, getattr(config.get_text_config(), "num_hidden_layers", 1))
    if recipe.optim.algorithm == "adamw_8bit":
        check_adam8bit(size, stage=recipe.zero.stage, num_processes=num_processes)


def check_disk(recipe: Recipe, size: ModelSize, plan: RunPlan, *, start: int) -> None:
    """Raise ValueError, with the bytes needed and free, when the run's folder will not fit its disk.

    start: the step from which the run goes on.
    """
    num_steps = int(plan.lengths.sum(dtype=int)) * recipe.train.epochs // plan.shape.room
    if (disk := plan_disk(recipe, size, num_steps, start=start)).missing:
        raise ValueError(f"checkpoint.dir lacks room: {disk.describe()}; {disk.remedy}")


def check_continues(run: Run, world: World) -> None:
    """Raise ValueError unless the run may continue from its checkpoint, if it has one."""
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


def peak_learning_rate(recipe: Recipe, config: Any, manifest: Manifest, world_size: int) -> PeakRate:
    """The recipe's learning rate; for `auto` that of the published rule."""
    if recipe.optim.lr != "auto":
        return PeakRate(recipe.optim.lr, "asked for by the recipe")
    train = manifest.splits["train"]
    tokens_per_step = recipe.packing.tokens_per_gpu * world_size * recipe.packing.grad_accum
    return auto_learning_rate(
        config.get_text_config(), tokens_per_step * train["num_supervised_tokens"] / train["num_tokens"]
    )


def _choose_checkpointing(
    recipe: Recipe, config: Any, size: ModelSize, world: World, *, is_alone: bool
) -> CheckpointingChoice:
    """The recipe's checkpointing; for auto the policy that recomputes least among those that fit this rank."""
    if recipe.model.checkpointing != "auto":
        return CheckpointingChoice(recipe.model.checkpointing, "asked for by the recipe")
    available = find_memory()
    if world.device.type == "cpu":
        available = replace(available, gpu_bytes=None)
    try:
        plan = plan_memory(recipe, available, config, size, world.size, num_local=world.local_size, is_alone=is_alone)
    except ValueError as error:
        return CheckpointingChoice("full", str(error))
    warning = None
    if not plan.fits_device(plan.own):
        warning = f"this is too much even with full checkpointing; {nearest_that_fits(plan)}"
    return CheckpointingChoice(plan.policy, plan.describe(), warning)


def deepspeed_configuration(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed configuration for the recipe; see `deepspeed_config` for what a recipe leaves open."""
    return deepspeed_config(
        stage=recipe.zero.stage,
        offload=recipe.zero.offload,
        dtype=recipe.model.dtype,
        grad_accum=recipe.packing.grad_accum,
        grad_clip=recipe.optim.grad_clip,
        extra=recipe.deepspeed,
    )


# ------------------------------------------------------------------------------------------------------ agreement


def agree(run: Run) -> Run:
    """The run with the checkpointing that fits every rank. All ranks call it together.

    Raises Refused unless all ranks have the same plan, store and recipe.
    """
    held_out = digest_index(run.held_out.lengths, run.held_out.weight_sums)
    views = gather_objects((run.plan.digest, held_out, run.store.fingerprint, repr(to_json(run.recipe))))
    if len(set(views)) > 1:
        raise Refused(
            "the processes disagree on the plan: give every node the same recipe, store and versions of all packages"
        )
    choices = gather_objects(run.resolved.checkpointing)
    tightest = max(choices, key=lambda choice: share_of(choice.policy))
    return replace(run, resolved=replace(run.resolved, checkpointing=tightest))


def agree_on_steps(planned: Future[PlanTable]) -> PlanTable:
    """The table of all steps that are left. Raises Refused unless it is the same, bit for bit, on all ranks."""
    table = together(planned.result)
    if len(set(gather_objects(table.digest))) > 1:
        raise Refused(
            "the processes planned different steps from the same store: give every node the same version of "
            "ochat_train and of its packages"
        )
    return table


def agree_on_resume(run: Run, folder: RunFolder, world: World) -> Run:
    """The run with the best checkpoint that all ranks have, and have whole; damaged ones are reported and set aside.

    All ranks call it together. Raises Refused when there are checkpoints, but none that is whole.
    """
    candidates = together(partial(find_candidates, run.dir, run.recipe.checkpoint.resume))
    of_ranks = gather_objects({str(path) for path in candidates})
    everywhere = set.intersection(*of_ranks)
    if alone := sorted(set.union(*of_ranks) - everywhere):  # a crash came between the nodes' renaming of a save
        say(world, f"{Path(alone[-1]).name} is not on every node and is passed over")
    if incomplete := find_incomplete(run.dir):
        names = ", ".join(path.name for path in incomplete)
        say(world, f"WARNING: {names} in {run.dir}: no checkpoint, without {MANIFEST}, and passed over")
    damaged: dict[Path, str] = {}
    for path in candidates:
        if str(path) not in everywhere:
            continue
        if damage := _find_damage(path, folder, world):
            say(world, f"WARNING: {damage}")
            damaged[path] = damage
            continue
        settled = replace(run, resumed=together(partial(read_checkpoint, path)))
        if len({str(resumed) for resumed in gather_objects(settled.resumed and settled.resumed.state)}) > 1:
            raise Refused(f"{path} is another checkpoint on another node")
        together(partial(check_continues, settled, world))
        for old in damaged if folder.is_writer else ():
            set_aside(old, "damaged")
        if damaged:
            say(world, f"WARNING: falling back to {path.name}; the damaged ones are kept as *.damaged")
        return settled
    if damaged:
        raise Refused(
            "no checkpoint is whole, and no new run was started over them:\n  "
            + "\n  ".join(damaged.values())
            + "\nRestore one, name an older one in checkpoint.resume, or train in another checkpoint.dir."
        )
    return replace(run, resumed=None)


def _find_damage(path: Path, folder: RunFolder, world: World) -> str | None:
    """How the checkpoint's files are damaged, None if they are whole; the ranks that see them share the reading."""

    def check() -> str | None:
        part, parts = (world.rank, world.size) if folder.is_shared else (world.local_rank, world.local_size)
        try:
            check_files(read_checkpoint(path), part=part, parts=parts)
        except Damaged as error:
            return str(error)
        return None

    return next((damage for damage in gather_objects(together(check)) if damage is not None), None)


# --------------------------------------------------------------------------------------------------------- engine


def ready_engine(run: Run, folder: RunFolder, world: World) -> DeepSpeedEngine:
    """The engine, with the states of the checkpoint if the run continues from one. All ranks call it together."""
    resumed, recipe = run.resumed, to_json(run.recipe)
    if resumed is None or not needs_conversion(resumed, recipe, world.size):
        engine = build_engine(run, world, is_shared=folder.is_shared)
        if resumed is not None:
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
    except ValueError as error:  # the base is not that of the adapters, on every rank
        raise Refused(str(error)) from None


def build_engine(run: Run, world: World, *, is_shared: bool = True, loads_universal: bool = False) -> DeepSpeedEngine:
    """The recipe's model in a DeepSpeed engine, ready to train. Raises Refused when the model cannot be used.

    is_shared: whether all nodes see the checkpoints. loads_universal: whether the run begins with converted states.
    """
    recipe = run.recipe
    lm = load_once(partial(load_base, run), world)
    group = join_group(world)
    model = together(lambda: build_model(run, world, lm, group))
    torch.manual_seed(recipe.train.seed + world.rank)  # for dropout, if the model has any
    optimizer = make_optimizer(model, recipe.optim, lr=run.resolved.peak_lr.value)
    configuration = deepspeed_configuration(recipe)
    configuration["checkpoint"] |= {"use_node_local_storage": not is_shared, "load_universal": loads_universal}
    return make_engine(model, optimizer, configuration)


def load_base(run: Run) -> PreTrainedModel:
    """The model that the recipe starts from, on the CPU. Raises ValueError when it cannot be loaded."""
    recipe = run.recipe
    return load_model(
        recipe.model.base,
        recipe.model.config,
        dtype=recipe.model.dtype,
        num_ids=run.tokenizer.num_ids,
        added_ids=run.store.manifest.added_tokens.values(),
        seed=recipe.train.seed,
    )


def build_model(run: Run, world: World, lm: PreTrainedModel, group: Group | None = None) -> PackedCausalLM:
    """The recipe's model on the CPU, made of its base. Raises ValueError when it cannot take packed batches.

    group: of `join_group`.
    """
    recipe, lora = run.recipe, run.recipe.model.lora
    base_digest = _digest_base(run, lm) if world.local_rank == 0 else None
    if lora is not None:
        add_adapters(
            lm,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            row_ids=trained_rows(recipe, run.tokenizer),
            seed=recipe.train.seed,
            kind=kind_of(lora, world.device),
        )
    else:
        if untrained := untrained_of(lm):
            lm.register_buffer(CHECKSUM, torch.tensor(untrained.checksum))
        fixed_to_buffers(lm)
    use_kernels(lm, run.resolved.kernels.kernels)
    tile_mlps(lm, recipe.model.mlp_tiles)
    packed = PackedCausalLM(
        lm,
        attention=run.resolved.attention.backend,
        device_type=world.device.type,
        checkpointing=run.resolved.checkpointing.policy,
        num_conditions=len(run.store.manifest.conditions),
        router_coefficient=run.resolved.router.coefficient if run.resolved.router else 0.0,
        exchange=group,
    )
    packed.base_digest = base_digest
    if recipe.model.compile:
        packed.compile_parts()
    return packed


def _digest_base(run: Run, lm: PreTrainedModel) -> str | None:
    """What the base in `lm` holds. Raises ValueError if it is another than that of a checkpoint made elsewhere."""
    base, resumed = run.recipe.model.base, run.resumed
    if base is None:
        return None
    num_rows = load_config(base, None, 0).get_text_config().vocab_size
    digest = digest_base(lm, min([num_rows, *run.store.manifest.added_tokens.values()]))
    was = base if resumed is None else resumed.state.recipe["model"]["base"]
    if resumed is not None and base != was and digest != resumed.run["base_digest"]:
        raise ValueError(
            f"cannot continue {resumed.path}: model.base {base} holds other weights, or another configuration, than "
            f"{was}, with which it was begun; name the same base"
        )
    return digest
