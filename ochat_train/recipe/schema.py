"""The sections and keys of a recipe: frozen, fully checked models. Every key is documented on its field."""

import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Scalar = str | int | float | bool | None
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def check_encoding(encoding: str | None) -> str | None:
    """The name of an encoding of text, as it is. Raises ValueError for another."""
    try:
        "".encode(encoding or "utf-8")
    except LookupError:
        raise ValueError(f"{encoding!r} is no encoding that Python knows, such as gb18030 or cp1252") from None
    return encoding


class Section(BaseModel):
    """A part of a recipe: frozen, without unknown keys, and without silent conversions ("3" is not 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class FieldsSection(Section):
    """What the parts of a source's records are called there, where they have other names than the usual ones."""

    turns: str | None = Field(None, description="Field that holds the list of turns.")
    role: str | None = Field(None, description="Of a turn: the field that says whose it is.")
    text: str | None = Field(None, description="Of a turn: the field that holds its text.")
    question: str | tuple[str, ...] | None = Field(
        None, description="Field of the record that holds the user's text; of several, a blank line between."
    )
    answer: str | None = Field(None, description="Field of the record that holds the answer; the record has no turns.")
    system: str | None = Field(None, description="Field of the record that holds the system text.")

    @model_validator(mode="after")
    def _turns_or_an_answer(self) -> Self:
        if self.question and not self.answer:
            raise ValueError("question needs answer: the field that holds what is trained")
        if self.answer and (self.turns or self.role or self.text):
            raise ValueError("give either turns, role and text (a list of turns) or question and answer, not both")
        return self


class SourceSection(Section):
    """Where conversations come from, and what they are worth."""

    name: str = Field(min_length=1, description="Name in tables and the ledger.")
    path: str | tuple[str, ...] = Field(min_length=1, description="File, folder, glob, or a list of them.")
    condition: str | None = Field(None, description="Text of the condition; null: the record's own.")
    weight: Weight = Field(1.0, description="Loss weight of this source's answers.")
    epochs: float = Field(
        1.0, gt=0, le=1000, description="Passes over this source in an epoch of the run, such as 2 or 0.25."
    )
    where: dict[str, Scalar | tuple[Scalar, ...]] = Field(
        default_factory=dict, description="Record fields that must equal the value (or one of the list)."
    )
    where_not: dict[str, Scalar | tuple[Scalar, ...]] = Field(
        default_factory=dict, description="Record fields that must not equal the value (or any of the list)."
    )

    html: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Convert HTML to markdown; auto: saved pages, and records whose answers are ChatGPT's own HTML.",
    )
    encoding: str | None = Field(None, description="Of its JSON files and pages, as Python names it; null: UTF-8.")
    fields: FieldsSection = Field(FieldsSection(), description="Other names of the parts of a record.")
    roles: dict[str, Literal["user", "assistant", "system", "tool"]] = Field(
        default_factory=dict, description="Names of roles besides those that are known: {agent: assistant}."
    )
    weight_field: str | None = Field(
        "weight", description="Record field that holds the record's own weight, which multiplies; null: none."
    )

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, encoding: str | None) -> str | None:
        return check_encoding(encoding)

    @property
    def paths(self) -> tuple[str, ...]:
        """The source's paths and globs, as written."""
        return (self.path,) if isinstance(self.path, str) else self.path


class DedupeSection(Section):
    """Which copies of a conversation are left out."""

    exact: bool = Field(True, description="Equal texts: the copy of the largest weight stays.")
    prefix: bool = Field(True, description="Earlier snapshots of a longer conversation: the longest stays.")
    near: float | None = Field(
        None, ge=0.5, le=1, description="Estimated Jaccard similarity above which one of two stays; null: keep both."
    )


class FiltersSection(Section):
    """Which conversations and answers are not trained on."""

    languages: tuple[str, ...] | None = Field(
        None, min_length=1, description="ISO codes, such as [en]; conversations in others are dropped. null: all."
    )
    language_confidence: float = Field(
        0.7, gt=0, le=1, description="A language is believed from this probability on; below it nothing is dropped."
    )
    refusals: Literal["mask", "drop", "keep"] = Field(
        "mask", description="Refusing answers: keep as context without loss, drop the conversation, or train on them."
    )
    repeated_answers: Literal["mask", "drop", "keep"] = Field(
        "mask", description="Answers that say again what one before said; as refusals."
    )
    min_answers: int = Field(1, ge=1, description="Conversations with fewer answers are dropped.")


class DataSection(Section):
    """What preprocessing reads and writes."""

    store: str = Field(description="Folder of the token store: preprocess writes it, training reads it.")
    sources: tuple[SourceSection, ...] = Field(min_length=1, description="Each record matches exactly one.")
    max_tokens: int = Field(4096, ge=8, description="Longest example, in tokens.")
    overlong: Literal["split", "truncate", "drop"] = Field(
        "split",
        description="Conversations above max_tokens: several examples, or cut after the last whole answer, or drop.",
    )
    overlong_context: int = Field(
        512, ge=0, description="Most tokens of earlier turns that each part of a split conversation repeats."
    )
    dedupe: DedupeSection = DedupeSection()
    filters: FiltersSection = FiltersSection()
    leading_answers: Literal["context", "train", "drop"] = Field(
        "context",
        description="Answers before the first user turn that have no weight of their own: kept without a loss, trained "
        "as all others, or removed.",
    )
    reasoning: Literal["drop", "keep"] = Field(
        "drop", description="Reasoning that stands beside an answer's text: left out, or written before it and trained."
    )
    tool_calls: Literal["context", "train"] = Field(
        "context", description="Calls of tools without a weight of their own: kept without a loss, or trained."
    )
    media: Literal["drop", "text"] = Field(
        "drop", description="Records with pictures, sound or video: dropped, or trained on their text alone."
    )
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="Share of conversations held out of training.")

    @model_validator(mode="after")
    def _names_are_unique_and_something_is_trained(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are named {twice[0]!r}; give each its own name")
        if all(source.weight == 0 for source in self.sources):
            raise ValueError("every source has weight 0, so nothing would be trained; give one a weight above 0")
        return self

    def of_store(self) -> dict[str, Any]:
        """What decides a store's content, as JSON: all but where it lies and how often its sources are trained."""
        section = to_json(self)
        del section["store"]
        for source in section["sources"]:
            del source["epochs"]
        return section


class LoraSection(Section):
    """Low-rank adapters: only they are trained, beside the frozen weights of the base."""

    rank: int = Field(16, ge=1, description="Of each adapter.")
    alpha: float = Field(32.0, gt=0, description="The adapters' output counts alpha / rank times.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        min_length=1,
        description="Linear layers that get one, by the ends of their names, or all but the head.",
    )
    train_template_tokens: bool = Field(
        True,
        description="Train the rows of the template's end and header tokens in embedding and head, added or not.",
    )


class ModelSection(Section):
    """The model: a pretrained `base`, or a `config` to train from scratch."""

    base: str | None = Field(
        None, description="Hugging Face id, folder, .gguf file, or package:NAME/FILE for a file in a package."
    )
    config: dict[str, Any] | None = Field(
        None, description="transformers configuration (with model_type) of a model trained from scratch."
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of weights in forward and backward.")
    attention: Literal["auto", "flash_attn_4", "flash_attn_3", "flash_attn", "torch", "torch_fa3", "sdpa", "eager"] = (
        Field("auto", description="Varlen backend.")
    )
    checkpointing: str = Field(
        "full", description="Layers computed again in the backward pass: full, none, every_N, or auto by memory."
    )
    kernels: Literal["auto", "liger", "none"] = Field("auto", description="Fused kernels of a layer.")
    compile: bool = Field(False, description="Compile the layers with torch.compile.")
    lora: LoraSection | None = Field(None, description="null: all weights are trained.")

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _checkpointing_is_a_policy(cls, policy: Any) -> Any:
        if not re.fullmatch(r"auto|full|none|every_([2-9]|[1-9]\d+)", str(policy)):
            raise ValueError("must be auto, full, none or every_N of N from 2, such as every_2")
        return policy

    @model_validator(mode="after")
    def _exactly_one_origin(self) -> Self:
        if (self.base is None) == (self.config is None):
            given = "" if self.base is None else ", not both"
            raise ValueError(f"give either base (a pretrained model) or config (a model from scratch){given}")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, such as llama")
        if self.lora is not None and self.base is None:
            raise ValueError("lora trains beside a base; give base, or leave lora out")
        return self


class PackingSection(Section):
    """How examples fill micro-batches."""

    tokens_per_gpu: int = Field(ge=8, description="Capacity of one micro-batch, in tokens.")
    grad_accum: int = Field(1, ge=1, description="Micro-batches a step on each GPU.")


class OptimSection(Section):
    """The optimizer and its schedule; the defaults are OpenChat's published ones."""

    algorithm: Literal["adamw", "adamw_8bit", "sgd"] = Field(
        "adamw", description="adamw, or with averages of 8 bits; sgd for exactness tests."
    )
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto", description="Peak learning rate; auto: OpenChat's published rule."
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's.")
    eps: float = Field(1e-5, gt=0, description="AdamW's.")
    weight_decay: float = Field(0.1, ge=0, description="On matrices; vectors (norms, biases) have none.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the examples of the run with linear warm-up.")
    min_lr: float = Field(0.1, ge=0, le=1, description="Where the cosine ends, as a share of lr.")
    grad_clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null: no clipping.")

    @field_validator("betas")
    @classmethod
    def _betas_are_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each beta must be at least 0 and below 1")
        return betas


class ZeroSection(Section):
    """DeepSpeed's ZeRO."""

    stage: int = Field(2, ge=0, le=3, description="0: replicas; 1, 2, 3: optimizer, gradients, weights split.")
    offload: Literal["none", "optimizer"] = Field("none", description="Keep optimizer states in host memory.")

    @model_validator(mode="after")
    def _offload_needs_a_split_optimizer(self) -> Self:
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3")
        return self


class TrainSection(Section):
    """How long."""

    epochs: int = Field(ge=1, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many steps; the schedule still runs over all epochs."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the data order, of weights made from scratch and of adapters.")
    max_skipped: int = Field(
        5, ge=1, description="Stop after this many steps in a row without an update: their gradient was not finite."
    )
    stall_timeout_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Stop when a process got no further for this many seconds."
    )


class EvalSection(Section):
    """When the held-out split is evaluated, besides before the first step, after each epoch and at the end."""

    every_steps: int | None = Field(None, ge=1, description="Also every N steps.")


class ModelsSection(Section):
    """Light checkpoints: the model in bfloat16, for use. A run cannot continue from them."""

    every_epochs: int | None = Field(None, ge=1, description="Save at the end of every N-th epoch.")
    every_steps: int | None = Field(None, ge=1, description="Save every N steps.")
    keep: int | None = Field(None, ge=1, description="How many newest ones stay; null: all.")


class CheckpointSection(Section):
    """What is saved, and what a new run begins with."""

    dir: str = Field(description="Folder of the run: checkpoints, metrics, the exported model.")
    every_epochs: int | None = Field(1, ge=1, description="Save at the end of every N-th epoch; null: only at the end.")
    every_steps: int | None = Field(None, ge=1, description="Also save every N steps.")
    keep: int = Field(2, ge=1, description="How many newest checkpoints stay.")
    models: ModelsSection = ModelsSection()
    resume: str = Field("auto", description="auto: from the newest complete one; never; or a checkpoint's path.")


class WandbSection(Section):
    """Weights & Biases, when asked."""

    project: str = Field(description="wandb project.")
    entity: str | None = Field(None, description="wandb team or user.")
    mode: Literal["online", "offline"] = Field("online", description="offline writes files for `wandb sync`.")


class LogSection(Section):
    """What a run reports. JSON lines are always written to checkpoint.dir/metrics.jsonl."""

    wandb: WandbSection | None = Field(None, description="null: no wandb.")
    tensorboard: bool = Field(False, description="Also write event files to checkpoint.dir/tensorboard.")
    profile: bool = Field(False, description="Also write a profiler's trace of a few steps to checkpoint.dir/profile.")
    question: str = Field(
        "Who are you, and what can you help me with?",
        min_length=1,
        description="Asked of the exported model under each condition when the run ends.",
    )


class Recipe(Section):
    """A whole run."""

    name: str = Field(min_length=1, description="Name of the run, in wandb and in the exported model's metadata.")
    data: DataSection
    template: Literal["openchat_v3.2", "openchat_v3.1", "openchat_v3.2_mistral", "openchat_3.6", "chatml"] = Field(
        description="Chat template."
    )
    tokenizer: str | None = Field(None, description="As model.base; null: the base model's.")
    model: ModelSection
    packing: PackingSection
    optim: OptimSection = OptimSection()
    zero: ZeroSection = ZeroSection()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Extra DeepSpeed configuration, passed through as it is."
    )
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection
    log: LogSection = LogSection()

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer comes from: its own key, or the base model."""
        name = self.tokenizer or self.model.base
        assert name is not None  # _parts_agree
        return name

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.data.max_tokens > self.packing.tokens_per_gpu:
            raise ValueError(
                f"data.max_tokens {self.data.max_tokens:,} is above packing.tokens_per_gpu "
                f"{self.packing.tokens_per_gpu:,}: an example would fit no micro-batch; raise the second or lower "
                "the first"
            )
        if self.zero.stage == 0 and self.model.dtype == "bfloat16":
            # There DeepSpeed adds gradients up in bf16 and its gradient norm was off by up to 6 times in tests.
            raise ValueError("zero.stage 0 trains bfloat16 inexactly in DeepSpeed; use zero.stage 1, or dtype float32")
        if self.zero.stage == 3 and self.model.compile:
            # Its hooks on each module, which gather weights, are not compiled: between two of them little is left.
            raise ValueError("model.compile cannot be used with zero.stage 3; use zero.stage 2, or model.compile=false")
        if self.optim.algorithm == "adamw_8bit" and self.zero.offload == "optimizer":
            # On a CPU bitsandbytes makes fp32 copies of all averages in each step: 20 bytes a weight, AdamW has 8 + 8.
            raise ValueError(
                "optim.algorithm adamw_8bit saves nothing with zero.offload: optimizer, whose updates on the CPU are "
                "made in fp32 copies; use adamw, or zero.offload: none"
            )
        if self.model.lora is not None and self.optim.lr == "auto":
            raise ValueError(
                "optim.lr auto is the published rule for training all weights; with model.lora give a number, such as "
                "optim.lr=2e-4"
            )
        if self.model.config is not None and self.tokenizer is None:
            raise ValueError("model.config has no tokenizer of its own; name one in tokenizer")
        return self


def to_json(section: BaseModel) -> dict[str, Any]:
    """The section as plain JSON values; equal sections give equal values."""
    plain: dict[str, Any] = orjson.loads(section.model_dump_json())
    return plain


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for every leaf that differs between two recipes as JSON: `optim.lr: 0.1 -> 0.2`."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def known_keys() -> Iterator[str]:
    """Every dotted key of a recipe, list positions written as N: `data.sources.N.weight`."""
    return (key for key, _ in fields())


def fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its annotation."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field.annotation
        for section, is_list in _sections_in(field.annotation):
            yield from fields(section, f"{key}.N." if is_list else f"{key}.")


def _sections_in(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    elif typing.get_origin(annotation) in (tuple, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            for section, _ in _sections_in(inner):
                yield section, typing.get_origin(annotation) is tuple


def required_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """The keys that a recipe must give, down to those that are no sections, or sections without such keys."""
    for name, field in model.model_fields.items():
        if field.is_required():
            section: Any = field.annotation
            is_section = isinstance(section, type) and issubclass(section, BaseModel)
            below = list(required_keys(section, f"{prefix}{name}.")) if is_section else []
            yield from below or [f"{prefix}{name}"]
