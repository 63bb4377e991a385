"""What is wrong with a recipe: a line for each mistake, with key, value, what is allowed, and the nearest right key."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# What other frameworks (axolotl, LLaMA-Factory, TRL, ms-swift, DeepSpeed) call it; our key, or None where we have
# nothing alike; and what differs, or why there is nothing.
FOREIGN_KEYS: tuple[tuple[str, str | None, str], ...] = (
    ("run_name exp_name experiment_name wandb_name wandb_run_id", "name", ""),
    ("base_model model_name_or_path model_name model_id model_path model", "model.base", ""),
    ("tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_config", "tokenizer", ""),
    (
        "chat_template prompt_template template_type conversation_template",
        "template",
        "a built-in one, base (the base's own) or pieces",
    ),
    (
        "dataset datasets dataset_name dataset_path dataset_dir data_path data_files train_file train_data",
        "data.sources",
        "a list of sections, each with a name and a path",
    ),
    ("dataset_prepared_path tokenized_path cached_dataset", "data.store", ""),
    ("sequence_len cutoff_len max_seq_length max_seq_len max_length model_max_length", "data.max_tokens", ""),
    ("truncation_strategy excess_length_strategy", "data.overlong", ""),
    ("val_set_size val_size test_size split_dataset_ratio", "data.eval_fraction", "a share from 0 to 1, not a count"),
    (
        "test_datasets eval_dataset val_dataset validation_file",
        "data.eval_sources",
        "a list of sections, each with a name and a path",
    ),
    (
        "train_on_inputs train_on_prompt roles_to_train loss_scale assistant_only_loss",
        "data.sources.N.weight",
        "the loss weight of answers",
    ),
    ("mask_history", "data.filters.last_answer_only", ""),
    ("per_sequence_loss", "train.loss", "answer, or token"),
    ("dtype torch_dtype bf16 fp16 float16 pure_bf16 mixed_precision", "model.dtype", "bfloat16 or float32"),
    (
        "flash_attention flash_attn flash_attention_2 use_flash_attention_2 attn_implementation attn_impl",
        "model.attention",
        "auto takes the fastest that is there",
    ),
    (
        "gradient_checkpointing activation_checkpointing gradient_checkpointing_kwargs disable_gradient_checkpointing",
        "model.checkpointing",
        "full, every_N, none or auto",
    ),
    ("use_liger use_liger_kernel enable_liger_kernel liger_kernel", "model.kernels", "auto, liger or none"),
    ("torch_compile", "model.compile", ""),
    (
        "adapter finetuning_type train_type tuner_type use_peft use_lora peft_config",
        "model.lora",
        "a section of this name trains adapters; without it all weights are trained",
    ),
    ("lora_r lora_rank r", "model.lora.rank", ""),
    ("lora_alpha", "model.lora.alpha", ""),
    ("use_dora", "model.lora.dora", ""),
    ("use_rslora", "model.lora.rslora", ""),
    (
        "lora_target lora_target_modules lora_target_linear target_modules",
        "model.lora.targets",
        "all-linear, or a list of names",
    ),
    (
        "micro_batch_size per_device_train_batch_size train_batch_size train_micro_batch_size_per_gpu batch_size"
        " batch_size_per_gpu",
        "packing.tokens_per_gpu",
        "it counts tokens, not sequences: 2 sequences are 2 x data.max_tokens",
    ),
    ("batch_max_len", "packing.tokens_per_gpu", ""),
    (
        "packing sample_packing eval_sample_packing neat_packing padding_free pad_to_sequence_len",
        "packing.tokens_per_gpu",
        "sequences are always packed, without padding",
    ),
    ("gradient_accumulation_steps gradient_accumulation grad_accum_steps", "packing.grad_accum", ""),
    (
        "sequence_parallel_size sequence_parallel_degree context_parallel_size context_parallel_degree ulysses_size",
        "packing.sequence_parallel",
        "packing.tokens_per_gpu is what each GPU has of a micro-batch",
    ),
    ("moe_aux_loss_coef output_router_logits router_aux_loss", "model.router_aux_loss_coef", "auto: the base's own"),
    ("learning_rate", "optim.lr", ""),
    ("optim optimizer optimizer_type optimizer_name", "optim.algorithm", "adamw, adamw_8bit or sgd"),
    ("adam_beta1 adam_beta2 beta1 beta2", "optim.betas", "a list of both"),
    ("adam_epsilon", "optim.eps", ""),
    (
        "warmup_ratio lr_warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps",
        "optim.warmup",
        "a share of the run's examples, from 0 to 1, not a number of steps",
    ),
    (
        "lr_scheduler lr_scheduler_type lr_scheduler_kwargs scheduler cosine_min_lr_ratio min_lr_rate lr_min_ratio",
        "optim.min_lr",
        "the schedule is always a cosine, which ends at this share of optim.lr",
    ),
    ("max_grad_norm gradient_clipping clip_grad_norm gradient_clip_val", "optim.grad_clip", ""),
    ("num_steps total_steps max_train_steps", "train.max_steps", ""),
    ("num_epochs num_train_epochs max_epochs", "train.epochs", "a whole number"),
    ("data_seed random_seed", "train.seed", ""),
    ("output_dir save_dir save_path", "checkpoint.dir", ""),
    ("save_steps save_interval", "checkpoint.every_steps", ""),
    ("save_strategy saves_per_epoch", "checkpoint.every_epochs", ""),
    ("save_total_limit", "checkpoint.keep", ""),
    ("save_every", "checkpoint.models.every_epochs", ""),
    ("save_only_model", "checkpoint.models", "models for use, beside the checkpoints"),
    ("resume_from_checkpoint auto_resume_from_checkpoints", "checkpoint.resume", "auto, never or a path"),
    (
        "eval_steps eval_strategy evaluation_strategy evals_per_epoch",
        "eval.every_steps",
        "the held-out split is evaluated after each epoch, too",
    ),
    ("wandb_project", "log.wandb.project", ""),
    ("wandb_entity", "log.wandb.entity", ""),
    ("wandb_mode", "log.wandb.mode", ""),
    ("report_to", "log", "log.wandb.project or log.tensorboard"),
    (
        "deepspeed deepspeed_config ds_config",
        "deepspeed",
        "the settings themselves, not the path of their file; the stage is zero.stage",
    ),
    ("fsdp fsdp_config fsdp_version", "zero.stage", "DeepSpeed's ZeRO splits the model, 3 as FSDP's full shards"),
    (
        "load_in_4bit load_in_8bit quantization_bit quantization_config quant_bits quant_method",
        "model.lora.base_bits",
        "4 quantises the frozen base of adapters; there are no other bits",
    ),
    ("lora_dropout dropout", None, "adapters are trained without dropout"),
    ("loss_balancing", None, "data.sources.N.weight says what the answers of a source count"),
    ("neftune_noise_alpha", None, "no noise is added to embeddings"),
    ("type formatting format ds_type", None, "the dialect of each record is found from the record"),
    ("special_tokens added_tokens new_special_tokens", None, "the template brings its special tokens"),
    ("load_best_model_at_end metric_for_best_model", "checkpoint.best", "loss, or the name of one of eval.checks"),
    ("early_stopping_patience early_stopping_steps early_stopping", "train.early_stop.epochs", "in epochs"),
    (
        "gpus num_gpus n_gpus num_processes",
        None,
        "launch.sh takes all GPUs, or NUM_GPUS of the environment; report plan takes gpus=N",
    ),
    ("logging_steps log_interval", None, "every step is logged to checkpoint.dir/metrics.jsonl"),
    ("per_device_eval_batch_size eval_batch_size", None, "evaluation takes packing.tokens_per_gpu as training does"),
    ("group_by_length", None, "the plan balances lengths by itself"),
    ("shuffle_dataset shuffle_merged_datasets", None, "the data is always shuffled, by train.seed"),
    (
        "dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers",
        None,
        "preprocess takes --workers N, and training loads batches ahead by itself",
    ),
    ("hub_model_id push_to_hub", None, "ochat export --push OWNER/NAME uploads a model"),
    ("tokenizer_type strict local_rank ddp_timeout overwrite_cache overwrite_output_dir plot_loss", None, "not needed"),
    ("max_samples", None, "data.sources.N.epochs is the share of a source that is drawn"),
    ("tf32", None, "torch's own default"),
    ("plugins", None, "model.kernels chooses Liger's kernels"),
    ("trust_remote_code", None, "no code of a base is run"),
    ("do_train do_eval rl trainer_type", None, "a recipe is always supervised fine-tuning, with evaluation"),
)
_FOREIGN = {name: (ours, note) for names, ours, note in FOREIGN_KEYS for name in names.split()}

# pydantic's type of an error, and what is right then; {} are fields of its context.
_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "not empty",  # of our fields none has another least length
    "too_long": "a list of at most {max_length}",
    "string_too_short": "not empty",
    "missing": "a longer list",  # of a fixed length
}
_OPEN = ("model.config", "deepspeed", "where", "where_not")  # any key may be below


def list_mistakes(
    errors: Iterable[Any], known: Sequence[str], required: Sequence[str], found: dict[str, str]
) -> list[str]:
    """A line for each mistake.

    errors: pydantic's. known: every dotted key, list positions written as N; required: those that a recipe must give.
    found: mistakes by key that were found before; what pydantic says of these keys is a consequence.
    """
    by_key: dict[str, list[Any]] = {}
    for error in errors:
        by_key.setdefault(_key_of(error, known), []).append(error)
    lines, missing = dict(found), []
    meant: list[str] = []  # what misspelt and foreign keys stand for: it is not missing as well
    for key, of_key in by_key.items():
        below = f"{key}." if key else ""
        if key in found or any(other.startswith(below) for other in (*by_key, *found) if other != key):
            continue  # a consequence, too: a list or section is wrong for what is in it
        value = of_key[0]["input"]
        if of_key[0]["type"] == "extra_forbidden":
            for wrong, inner in _unknown(key, value, known):
                ours, hint = _right_key(wrong, known)
                meant += [ours] if ours else []
                lines[wrong] = f"unknown key (value {_short(inner)}){hint}"
        elif of_key[0]["type"] == "missing" and isinstance(value, dict):
            missing += [name for name in required if f"{name}.".startswith(below)] or [key]
        else:
            lines[key] = _describe(key, of_key, known)
    for key in missing:
        generic = _generic(key)
        if not any(f"{generic}.".startswith(f"{ours}.") or ours.startswith(f"{generic}.") for ours in meant):
            lines[key] = "missing; the recipe must give it"
    return [f"{key}: {line}" if key else line for key, line in lines.items()]


def _key_of(error: Any, known: Sequence[str]) -> str:
    """The dotted key; pydantic's location also holds the members of unions."""
    parts: list[str] = []
    for part in error["loc"]:
        generic = _generic(".".join([*parts, str(part)]))
        is_open = generic.rpartition(".")[0].endswith(_OPEN)
        if isinstance(part, int) or generic in known or is_open or error["type"] == "extra_forbidden":
            parts.append(str(part))
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        parts.pop()
    return ".".join(parts)


def _generic(key: str) -> str:
    return ".".join("N" if part.isdecimal() else part for part in key.split("."))


def foreign_key(key: str) -> tuple[str | None, str] | None:
    """Our key, or None, and a note, for another framework's; None for a key that no known framework has."""
    return _FOREIGN.get(key.rpartition(".")[2].lower().replace("-", "_"))


def _unknown(key: str, value: Any, known: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The unknown key; or all that are below it, if it is a section that resembles none of ours."""
    if isinstance(value, dict) and value and _right_key(key, known)[0] is None and foreign_key(key) is None:
        for name, inner in value.items():
            yield from _unknown(f"{key}.{name}", inner, known)
    else:
        yield key, value


def _right_key(wrong: str, known: Sequence[str]) -> tuple[str | None, str]:
    """The key that was probably meant, and what to say of it."""
    wrong = _generic(wrong).replace("/", ".")
    section, _, last = wrong.lower().rpartition(".")
    names = {key: key.rpartition(".")[2] for key in known}
    if last not in names.values() and (foreign := foreign_key(wrong)) is not None:
        ours, note = foreign
        if ours is None:
            return None, f"; there is nothing like it here: {note}"
        return ours, f"; here it is {ours}{note and f', {note}'}"
    siblings = [name for key, name in names.items() if key.lower().rpartition(".")[0] == section]
    for among in ({last}.intersection(names.values()), siblings, sorted(set(names.values()))):
        if close := difflib.get_close_matches(last, among, n=1):
            keys = (key for key, name in names.items() if name == close[0])
            nearest = max(keys, key=lambda key: difflib.SequenceMatcher(None, wrong.lower(), key.lower()).ratio())
            return nearest, f"; the nearest known key is {nearest}"
    if section and siblings:
        return None, f"; the keys of {wrong.rpartition('.')[0]} are {', '.join(siblings)}"
    return None, "; docs/keys.md lists every key"


def _describe(key: str, errors: list[Any], known: Sequence[str]) -> str:
    """What is wrong with the value of a known key. Several errors are those of a union's members."""
    kinds, value = {error["type"] for error in errors}, errors[0]["input"]
    hint = ""
    if "model_type" in kinds:
        first = next(name for name in known if name.startswith(f"{_generic(key)}."))
        message = f"must be a section with keys of its own, such as {first}"
    elif kinds <= _WANTED.keys():
        named = kinds - {"int_type"} if "float_type" in kinds else kinds
        wanted = [_WANTED[error["type"]].format(**error.get("ctx", {})) for error in errors if error["type"] in named]
        *others, last = dict.fromkeys(wanted)
        message = f"must be {' or '.join([*([', '.join(others)] if others else []), last])}"
        message = message.replace("be not", "not be")
    else:
        message = errors[0]["msg"].removeprefix("Value error, ")
        if isinstance(value, dict):
            return str(message)
    if kinds & {"model_type", "dict_type"} and (foreign := _FOREIGN.get(key)) and foreign[1]:
        hint = f"; {foreign[1]}"
    elif value is None:
        hint = "; an empty value is null"
    elif "string_type" in kinds and isinstance(value, int | float):
        hint = "; in quotes it is text"
    elif "tuple_type" in kinds and f"{_generic(key)}.N.name" in known:
        hint = "; each item is a section"
    elif "tuple_type" in kinds and isinstance(value, str):
        hint = f"; a list of it is [{value}]"
    elif kinds & {"int_type", "float_type"} and re.fullmatch(r"[-+]?(0|[1-9]\d*)(\.\d*)?(e[-+]?\d+)?", str(value)):
        hint = "; write it without quotes" if isinstance(value, str) else ""
    return f"{message} (value {_short(value)}){hint}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
