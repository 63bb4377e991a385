"""The sections and keys of a recipe: frozen, fully checked models. Every key is documented on its field."""

import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

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
    answers: str | tuple[str, ...] | None = Field(
        None, description="Field of the record that holds a list of answers, or several that hold one each."
    )
    chosen: str | None = Field(None, description="Field of the record that holds the better one of two answers.")
    rejected: str | None = Field(None, description="Field of the record that holds the worse one of two answers.")
    history: str | None = Field(None, description="Field of the record that holds the turns before the question.")
    system: str | None = Field(None, description="Field of the record that holds the system text.")

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        answers = [name for name in ("answer", "answers", "chosen", "rejected") if getattr(self, name)]
        if (self.question or self.history) and not answers:
            raise ValueError("question needs answer (or answers, or chosen and rejected): what is trained")
        if len(answers) > 1 and answers != ["chosen", "rejected"]:
            raise ValueError(f"give only one of {' and '.join(answers)}: a record has one answer, a list or a pair")
        if self.answer and (self.turns or self.role or self.text):
            raise ValueError("give either turns, role and text (a list of turns) or question and answer, not both")
        if self.question and self.turns:
            raise ValueError("give either turns or question: what stands before the answers")
        return self


class RangeSection(Section):
    """Numbers from `min` on and below `max`."""

    min: float | None = Field(None, allow_inf_nan=False, description="The least number.")
    max: float | None = Field(None, allow_inf_nan=False, description="The number below which they are.")

    @model_validator(mode="before")
    @classmethod
    def _has_only_bounds(cls, bounds: dict[str, Any]) -> dict[str, Any]:
        if not bounds or bounds.keys() - {"min", "max"}:
            raise ValueError(f"a range has min, max or both, as in {{min: 0.8}} (value {bounds})")
        return bounds

    @model_validator(mode="after")
    def _holds_a_number(self) -> Self:
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(f"no number is at least min {self.min:g} and below max {self.max:g}; max is not included")
        if self.min is None and self.max is None:
            raise ValueError("a range has min, max or both, as in {min: 0.8}; an empty value is null")
        return self


# What a field of a record is compared with: a value, any of several, or a range.
Wanted = Annotated[
    Annotated[Scalar | tuple[Scalar, ...], Tag("value")] | Annotated[RangeSection, Tag("range")],
    Discriminator(lambda wanted: "range" if isinstance(wanted, dict | RangeSection) else "value"),
]


class SourceSection(Section):
    """Where conversations come from, and what they are worth."""

    name: str = Field(min_length=1, description="Name in tables and the ledger.")
    path: str | tuple[str, ...] = Field(min_length=1, description="File, folder, glob, URL, or a list of them.")
    condition: str | None = Field(None, description="Text of the condition; null: the record's own.")
    weight: Weight = Field(1.0, description="Loss weight of this source's answers.")
    epochs: float = Field(
        1.0, gt=0, le=1000, description="Passes over this source in an epoch of the run, such as 2 or 0.25."
    )
    where: dict[str, Wanted] = Field(
        default_factory=dict,
        description="Record fields that must equal the value (or one of the list), or be in the range {min:, max:}.",
    )
    where_not: dict[str, Wanted] = Field(
        default_factory=dict,
        description="Record fields that must not equal the value (or any of the list), nor be in the range.",
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
    tree: Literal["best", "all"] = Field(
        "best", description="A tree of messages is one conversation, its best path; or each of its answers is one."
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
    last_answer_only: bool = Field(
        False, description="Only the last answer of a conversation has a loss; those before it are context."
    )


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
    verify: bool = Field(
        True, description="Compare the store's files with their checksums before it is used; false: only their sizes."
    )

    @model_validator(mode="after")
    def _names_are_unique_and_something_is_trained(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are named {twice[0]!r}; give each its own name")
        if all(source.weight == 0 for source in self.sources):
            raise ValueError("every source has weight 0, so nothing would be trained; give one a weight above 0")
        return self

    def of_store(self) -> dict[str, Any]:
        """What decides a store's content, as JSON: all but where it lies and how its files and sources are used."""
        section = to_json(self)
        del section["store"], section["verify"]
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
    base_bits: Literal[4] | None = Field(
        None, description="4: the base's linear layers but the head are quantised, by bitsandbytes' nf4."
    )
    dora: bool = Field(False, description="DoRA: the norms of the adapted weights' rows are trained, too.")
    rslora: bool = Field(False, description="rsLoRA: alpha / sqrt(rank) in place of alpha / rank.")

    @property
    def scaling(self) -> float:
        """How many times the adapters' output counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ModelSection(Section):
    """The model: a pretrained `base`, or a `config` to train from scratch."""

    base: str | None = Field(
        None, description="Hugging Face id, folder, .gguf file, or package:NAME/FILE for a file in a package."
    )
    config: dict[str, Any] | None = Field(
        None, description="transformers configuration (with model_type) of a model trained from scratch."
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of weights in forward and backward.")
    attention: Literal["auto", "flash_attn_4", "flash_attn_3", "flash_attn", "torch", "torch_fa3", "sdpa", "alone"] = (
        Field("auto", description="Varlen backend.")
    )
    checkpointing: str = Field(
        "full", description="Layers computed again in the backward pass: full, none, every_N, or auto by memory."
    )
    mlp_tiles: int = Field(
        1, ge=1, description="Parts of a micro-batch whose MLPs run one after the other, computed again backward."
    )
    kernels: Literal["auto", "liger", "none"] = Field("auto", description="Fused kernels of a layer.")
    compile: bool = Field(False, description="Compile the layers with torch.compile.")
    router_aux_loss_coef: Weight | Literal["auto"] = Field(
        "auto", description="Coefficient of a mixture's balancing loss; auto: the configuration's."
    )
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

    tokens_per_gpu: int = Field(ge=8, description="Capacity of one micro-batch on each GPU, in tokens.")
    grad_accum: int = Field(1, ge=1, description="Micro-batches a step on each GPU.")
    sequence_parallel: int = Field(
        1, ge=1, description="GPUs that share each micro-batch, tokens_per_gpu tokens on each: for long sequences."
    )

    @property
    def capacity(self) -> int:
        """Tokens of one micro-batch, on all GPUs that share it."""
        return self.tokens_per_gpu * self.sequence_parallel

    @property
    def capacity_in_words(self) -> str:
        """The capacity with the keys that decide it."""
        shared = f" x packing.sequence_parallel {self.sequence_parallel}" if self.sequence_parallel > 1 else ""
        return f"packing.tokens_per_gpu {self.tokens_per_gpu:,}{shared}"


class OptimSection(Section):
    """The optimizer and its schedule; the defaults are OpenChat's published ones, but for decay_vectors."""

    algorithm: Literal["adamw", "adamw_8bit", "sgd"] = Field(
        "adamw", description="adamw, or with averages of 8 bits; sgd for exactness tests."
    )
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto", description="Peak learning rate; auto: OpenChat's published rule."
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's.")
    eps: float = Field(1e-5, gt=0, description="AdamW's.")
    weight_decay: float = Field(0.1, ge=0, description="On matrices; on vectors too with decay_vectors.")
    decay_vectors: bool = Field(
        False, description="Weight decay on vectors (norms, biases), too: as OpenChat trained, unlike most others."
    )
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


class EarlyStopSection(Section):
    """When a run ends before its last epoch."""

    epochs: int = Field(ge=1, description="Stop after this many epochs in a row without a better model.")


class TrainSection(Section):
    """What is minimised, and how long."""

    epochs: int = Field(ge=1, description="Passes over the data.")
    loss: Literal["token", "answer"] = Field(
        "token", description="Each token of an answer has the answer's weight, or all of them together have it."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many steps; the schedule still runs over all epochs."
    )
    early_stop: EarlyStopSection | None = Field(
        None, description="Stop when the model gets no better, by checkpoint.best or else the held-out loss."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the data order, of weights made from scratch and of adapters.")
    max_skipped: int = Field(
        5, ge=1, description="Stop after this many steps in a row without an update: their gradient was not finite."
    )
    stall_timeout_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Stop when a process got no further for this many seconds."
    )


class CheckSection(Section):
    """Questions that the model answers in training, and what scores its answers."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="Name in metrics and reports.")
    questions: str = Field(min_length=1, description="JSON lines with question (or messages) and answer.")
    check: str = Field(
        description="exact_match, regex, math, or a Python function, as module:function or path/to/file.py:function."
    )
    pattern: str | None = Field(None, description="Of regex, for records that have none of their own.")
    max_new_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
    num: int | None = Field(None, ge=1, description="Only the first N questions; null: all.")

    @model_validator(mode="after")
    def _check_is_known(self) -> Self:
        if self.check not in ("exact_match", "regex", "math") and not re.fullmatch(r".+:[^\W\d]\w*", self.check):
            raise ValueError(
                f"check is exact_match, regex, math, or a function as module:function or path/to/file.py:function "
                f"(value {self.check!r})"
            )
        if self.pattern is not None and self.check != "regex":
            raise ValueError(f"pattern belongs to check: regex, not to {self.check}; leave it out")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error} (value {self.pattern!r})") from None
        return self


class EvalSection(Section):
    """What is measured in training: the held-out split before the first step, after each epoch and at the end."""

    every_steps: int | None = Field(None, ge=1, description="The held-out split also every N steps.")
    checks: tuple[CheckSection, ...] = Field(
        (), description="Questions answered under each condition, after each epoch and at the end."
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [check.name for check in self.checks]
        if "loss" in names:
            raise ValueError("a check cannot be named loss, which means the held-out loss in checkpoint.best")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two checks are named {twice[0]!r}; give each its own name")
        return self


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
    best: str | None = Field(
        None,
        min_length=1,
        description="Keep the best epoch's model: by the held-out loss (loss), or by a check's name.",
    )
    export: Literal["last", "best"] = Field("last", description="Which model is exported when the run ends.")
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


ConditionPlace = Literal["header", "system", "user_prefix", "assistant_prefix"]


class PiecesSection(Section):
    """A chat template of pieces, for `template: pieces`: what stands around the text of each turn."""

    bos: str = Field("", description="Special token at the beginning; empty: none.")
    header: tuple[str, ...] = Field(
        min_length=1, description="Pieces before the text of a turn; {role} is the role's name."
    )
    system_header: tuple[str, ...] | None = Field(None, description="The same before a system text; null: as header.")
    end: str = Field(min_length=1, description="Special token that ends each turn.")
    after_end: tuple[str, ...] = Field((), description="Pieces after the end token.")
    special: tuple[str, ...] = Field((), description="Which of the pieces are special tokens; others are text.")
    add: tuple[str, ...] = Field(
        (), description="Special tokens that are added to a tokenizer that lacks them; it must have the others."
    )
    roles: dict[Literal["user", "assistant", "system", "tool"], str] = Field(
        default_factory=dict, description="Names of the roles; one that is not given has its own name."
    )
    inference_condition: str = Field("", description="The condition of inference, where it was trained.")

    @model_validator(mode="after")
    def _pieces_fit(self) -> Self:
        pieces = (*self.header, *(self.system_header or ()), *self.after_end)
        texts = [piece for piece in self.header if piece not in self.special]
        if "".join(self.header).count("{role}") != 1 or "{role}" not in "".join(texts):
            raise ValueError("header must hold {role} once, in a piece of text, or nothing would tell roles apart")
        if unused := [token for token in self.special if token not in (*pieces, self.bos, self.end)]:
            raise ValueError(f"special has {unused[0]!r}, which is no piece; a special token is a piece of its own")
        if wrong := [token for token in self.add if token not in (*self.special, self.bos, self.end)]:
            raise ValueError(f"add has {wrong[0]!r}, which is not one of the special tokens")
        if not all((*pieces, *self.add)):
            raise ValueError("a piece is empty; leave it out")
        names = [self.roles.get(role, role) for role in ("user", "assistant", "tool")]
        if len({*names}) < len(names):
            raise ValueError(f"two roles have the same name, of {', '.join(names)}; give each its own")
        return self


class Recipe(Section):
    """A whole run."""

    name: str = Field(min_length=1, description="Name of the run, in wandb and in the exported model's metadata.")
    data: DataSection
    template: Literal[
        "openchat_v3.2",
        "openchat_v3.1",
        "openchat_v3.2_mistral",
        "openchat_3.5",
        "openchat_v3.2_gemma_new",
        "openchat_3.6",
        "chatml",
        "llama3_instruct",
        "gemma_it",
        "zephyr_mistral",
        "base",
        "pieces",
    ] = Field(description="Chat template: a built-in one, the base's own (base), or that of the key pieces.")
    pieces: PiecesSection | None = Field(None, description="The template, with template: pieces.")
    condition_in: ConditionPlace | None = Field(
        None, description="Where the condition is written; null: header, and with template: base system."
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

    @property
    def template_json(self) -> str | dict[str, Any]:
        """The template as stores and models describe it, see `read_template`."""
        if self.template == "base":
            return {"template": "base", "condition_in": self.condition_in or "system"}
        if self.pieces is not None:
            return {"template": to_json(self.pieces), "condition_in": self.condition_in or "header"}
        return {"template": self.template, "condition_in": self.condition_in} if self.condition_in else self.template

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if (self.template == "pieces") != (self.pieces is not None):
            raise ValueError(
                "template: pieces and the section pieces belong together; give both, or a built-in template alone"
            )
        if self.template == "base" and self.condition_in == "header":
            raise ValueError(
                "condition_in: header needs a template of pieces; with template: base give system, user_prefix or "
                "assistant_prefix"
            )
        if self.data.max_tokens > self.packing.capacity:
            raise ValueError(
                f"data.max_tokens {self.data.max_tokens:,} is above {self.packing.capacity_in_words}: an "
                "example would fit no micro-batch; raise the second or lower the first"
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
        if self.model.lora is not None and self.zero.stage == 3:
            if self.model.lora.base_bits is not None:  # zero.Init would take the packed bytes for weights
                raise ValueError(
                    "model.lora.base_bits cannot be used with zero.stage 3, which splits weights that are not "
                    "quantised; use zero.stage 2, or model.lora.base_bits=null"
                )
            if self.model.lora.dora:  # peft reads the base's weight outside of its layer, where it is not gathered
                raise ValueError("model.lora.dora cannot be used with zero.stage 3; use zero.stage 2")
        if self.model.lora is not None and self.optim.lr == "auto":
            raise ValueError(
                "optim.lr auto is the published rule for training all weights; with model.lora give a number, such as "
                "optim.lr=2e-4"
            )
        best, checks = self.checkpoint.best, [check.name for check in self.eval.checks]
        if best not in (None, "loss", *checks):
            named = ", ".join(checks) or "none"
            raise ValueError(f"checkpoint.best {best} is neither loss nor one of eval.checks ({named})")
        if self.checkpoint.export == "best" and best is None:
            raise ValueError("checkpoint.export: best needs checkpoint.best: loss, or the name of a check")
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
