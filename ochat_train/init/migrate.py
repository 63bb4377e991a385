"""Another framework's settings to a recipe.

    ochat migrate FILE [--out recipe.yaml]

FILE is an OpenChat command line (deepspeed --module ochat.training_deepspeed.train ...), an axolotl YAML, a
LLaMA-Factory YAML beside whose data folder lies dataset_info.json, or the YAML or JSON of `trl sft --config`. Each key
is printed with what it became, or why it was not taken over. Where FILE leaves out a key whose default there is another
than here, that default is written.
"""

import argparse
import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ochat_train.files import publish_file
from ochat_train.recipe import foreign_key, known_keys, load_recipe, read_yaml

Settings = dict[str, Any]

_OPENCHAT = "ochat.training_deepspeed.train"
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
# What each framework takes for keys that are left out, where a recipe would take something else or must give it.
_DEFAULTS: Mapping[str, Settings] = {
    "OpenChat": {"batch_size_per_gpu": 16, "epochs": 5, "lr": 4e-5, "eps": 1e-8},
    "OpenChat 3.6": {"batch_max_len": 81920, "epochs": 5},  # its other defaults are a recipe's
    "axolotl": _ADAM
    | {"sequence_len": 512, "micro_batch_size": 1, "num_epochs": 1, "learning_rate": 5e-5, "lr_scheduler": "cosine"},
    "LLaMA-Factory": _ADAM
    | {"cutoff_len": 2048, "per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 5e-5}
    | {"finetuning_type": "lora", "lora_rank": 8, "lr_scheduler_type": "linear", "warmup_ratio": 0.0},
    "TRL": _ADAM
    | {"max_length": 1024, "per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 2e-5}
    | {"lr_scheduler_type": "linear", "warmup_ratio": 0.0},
}
_LEFT_OUT_TOGETHER = {"warmup_ratio": "warmup_steps"}  # the default does not count where the other one is given
_CONTEXT_8K = re.compile("mistral|3.5|3.6|gemma")  # of OpenChat's model types; the others have 4,096 tokens
# Names of chat templates there that have other ones here; any else means the base's own.
_TEMPLATES = dict.fromkeys(("llama3", "llama-3"), "llama3_instruct") | {"gemma": "gemma_it", "zephyr": "zephyr_mistral"}
_TEMPLATES |= dict.fromkeys(("qwen", "qwen_25", "qwen3_nothink"), "chatml")
_OWN_TEMPLATES = ("openchat_v3.2", "openchat_v3.1", "openchat_v3.2_mistral", "openchat_v3.2_gemma_new", "chatml")
_OF_SOURCES = re.compile("dataset(s|_name|_dir|_config|_train_split)?|data_path|data_prefix|eval_dataset|test_datasets")
_ADAPTERS = ("lora", "qlora", True)
_NO_SWITCH = re.compile(
    "(disable_)?gradient_checkpointing|.*packing|padding_free|shuffle_.*"
)  # off means something here


class Why(str):
    """In place of a value: that a recipe does the same anyway (as here), or why it does not."""


class Line(NamedTuple):
    """What became of a key."""

    key: str
    value: Any
    became: str

    def __str__(self) -> str:
        return f"{f'{self.key}: {_json(self.value)}':<44} {self.became}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the recipe."""
    parser = argparse.ArgumentParser(prog="ochat migrate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="FILE", help="the settings of the other framework")
    parser.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="the recipe's file (recipe.yaml)")
    options = parser.parse_args(arguments)
    try:
        if options.out.exists():
            raise ValueError(f"{options.out} is there already; name another file with --out")
        framework, settings = read_settings(options.file)
        recipe, lines = migrate(framework, settings, options.out.stem)
        text = f"# From {options.file.name}, settings of {framework}.\n{yaml.safe_dump(recipe, sort_keys=False)}"
        with tempfile.TemporaryDirectory() as folder:
            (checked := Path(folder) / "it").write_text(text, encoding="utf-8")
            try:
                load_recipe(checked)  # what FILE sets may be beyond what a recipe takes
            except ValueError as error:
                raise ValueError(str(error).replace(str(checked), f"the recipe of {options.file}")) from None
        with publish_file(options.out) as file:
            file.write(text.encode())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.file}: settings of {framework}", *lines, sep="\n  ")
    print(f"written to {options.out}; next: ochat preprocess --dry-run {options.out}, then ochat doctor {options.out}")


def read_settings(path: Path) -> tuple[str, Settings]:
    """The framework and its settings, those that are left empty not among them. Raises ValueError for another file."""
    text = path.read_text(encoding="utf-8")
    if _OPENCHAT in text:
        given = _read_flags(text)
        return "OpenChat 3.6" if "data_prefix" in given else "OpenChat", given
    try:
        tree = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings: its top level must be keys, or a command line with {_OPENCHAT}")
    given = {key: value for key, value in tree.items() if value is not None}
    if "base_model" in given:
        _refuse_other_training(path, "rl", given.get("rl", "sft"))
        return "axolotl", given
    if {"model", "train_dataset"} <= given.keys():
        raise ValueError(
            f"{path} is for v1 of LLaMA-Factory; write it with the names of v0: model_name_or_path for model, dataset "
            "(and dataset_dir) for train_dataset, finetuning_type, lora_rank and lora_alpha for peft_config"
        )
    if "model_name_or_path" not in given:
        raise ValueError(
            f"{path} is of no known framework: axolotl's has base_model, LLaMA-Factory's and TRL's model_name_or_path; "
            "of TRL's own Python code write the keys of SFTConfig, model_name_or_path and dataset_name into a YAML file"
        )
    if given.keys() & {"stage", "finetuning_type", "cutoff_len", "dataset"}:
        _refuse_other_training(path, "stage", given.get("stage", "sft"))
        return "LLaMA-Factory", given
    return "TRL", given


def _refuse_other_training(path: Path, key: str, value: Any) -> None:
    if value == "pt":
        raise ValueError(f"{path} has {key}: pt; a recipe is supervised fine-tuning, on conversations with answers")
    if value != "sft":
        raise ValueError(
            f"{path} has {key}: {value}; a recipe is supervised fine-tuning, which trains better and worse answers "
            "under conditions: `ochat init --data PATH ... --base MODEL` writes it for such data"
        )


def _read_flags(text: str) -> Settings:
    """The flags of OpenChat's module; dashes in their names are underscores, as to argparse."""
    lines = text.replace("\\\n", " ").splitlines()
    command = shlex.split(next(line for line in lines if _OPENCHAT in line), comments=True)
    words = command[command.index(_OPENCHAT) + 1 :]
    given: Settings = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[place + 1 : place + 2]
            is_alone = not following or following[0].startswith("--")
            given[name.replace("-", "_")] = read_yaml(value if equals else "true" if is_alone else following[0])
    if isinstance(kind := given.pop("model_type", None), str):
        given["chat_template"] = kind
        given["max_length"] = 8192 if _CONTEXT_8K.search(kind) else 4096
    return given


def migrate(framework: str, given: Settings, name: str) -> tuple[Settings, list[Line]]:
    """The recipe as a tree, and a line for each key. Raises ValueError for settings that name no data."""
    defaults = {
        key: value
        for key, value in _DEFAULTS[framework].items()
        if not given.keys() & {key, _LEFT_OUT_TOGETHER.get(key, key)}
    }
    settings = defaults | given
    if framework == "LLaMA-Factory" and "lora_alpha" not in given:
        defaults["lora_alpha"] = settings["lora_alpha"] = 2 * settings["lora_rank"]
    lines: list[Line] = []
    flat: Settings = {"name": name, "data.store": f"stores/{name}", "data.sources": list(_sources(settings, lines))}
    if eval_sources := list(_eval_sources(settings, lines)):
        flat["data.eval_sources"] = eval_sources
    for key, value in settings.items():
        if _OF_SOURCES.fullmatch(key) is None:
            ours, became = _translate(key, value, settings)
            if not isinstance(became, Why):
                flat[ours] = became
            shown = became if isinstance(became, Why) else f"-> {ours}: {_json(became)}"
            lines.append(Line(f"{key} (default)" if key in defaults else key, value, shown))
    if "template" not in flat:
        flat["template"] = "base"
        lines.append(Line("template (default)", None, '-> template: "base", the own one of the base model'))
    flat.setdefault("checkpoint.dir", f"runs/{name}")
    tree: Settings = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        here = tree
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = here.get(last, {}) | value if isinstance(value, dict) else value
    return tree, lines


def _translate(key: str, value: Any, settings: Settings) -> tuple[str, Any]:
    """Our key and value, or Why."""
    same = {
        known.rpartition(".")[2]: known for known in known_keys() if re.match(r"((optim|train)\.\w+|template)$", known)
    }
    ours, note = foreign_key(key) or (same.get(key), "no key here is known to mean the same")
    if (_is_off(value) or (ours, value) == ("model.lora", "full")) and not _NO_SWITCH.fullmatch(key):
        return "", Why("as here: off")
    if (key, value) == ("stage", "sft"):
        return "", Why("as here")
    is_full = all(settings.get(name) not in _ADAPTERS for name in ("adapter", "finetuning_type", "use_peft"))
    if ours is not None and ours.startswith("model.lora.") and is_full:
        return "", Why("not taken over: no adapters are trained")
    if ours is None:
        return "", Why(f"not taken over: {note}")
    became = _VALUES[ours](value, key, settings) if ours in _VALUES else _NEVER.get(ours, value)
    return {"log": "log.tensorboard", "deepspeed": "zero.stage"}.get(ours, ours), became


def _is_off(value: Any) -> bool:
    return value is False or (not isinstance(value, int | float) and value in ("", "none", "no", [], {}))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# ----------------------------------------------------------------------------------------- what values mean here


def _tokens_per_gpu(value: Any, key: str, settings: Settings) -> Any:
    if isinstance(value, bool):
        return Why(f"{'as here' if value else 'not taken over'}: sequences are always packed, without padding")
    names = ("sequence_len", "cutoff_len", "max_seq_length", "max_length")
    return value if key == "batch_max_len" else value * next(settings[name] for name in names if name in settings)


def _targets(value: Any, key: str, settings: Settings) -> Any:
    names = value.split(",") if isinstance(value, str) else value
    return names if isinstance(names, list) and "all" not in names else "all-linear"


def _algorithm(value: Any, key: str, settings: Settings) -> Any:
    if found := re.search("adamw|sgd", str(value)):
        return found[0] + "_8bit" * ("8bit" in value)
    return Why("not taken over: optim.algorithm is adamw, adamw_8bit or sgd; adamw stays")


def _betas(value: Any, key: str, settings: Settings) -> Any:
    return [settings.get(f"adam_beta{n}", settings.get(f"beta{n}", own)) for n, own in ((1, 0.9), (2, 0.95))]


def _lora(value: Any, key: str, settings: Settings) -> Any:
    if value not in _ADAPTERS:
        return Why("not taken over: adapters are LoRA's here; without model.lora all weights are trained")
    return {"base_bits": 4} if value == "qlora" else {}


def _min_lr(value: Any, key: str, settings: Settings) -> Any:
    if value == "cosine":
        return float(settings.get("cosine_min_lr_ratio", 0.0))
    if str(value).startswith("constant"):
        return 1.0  # a cosine that ends where it begins
    reason = "not taken over: the schedule is always a cosine, which ends at optim.min_lr, a share of optim.lr"
    return float(value) if isinstance(value, int | float) else Why(reason)


def _stage(value: Any, key: str, settings: Settings) -> Any:
    found = re.search(r"z(?:ero)?_?([0-3])", str(value)) if key.startswith(("deepspeed", "ds")) else None
    if found is not None:
        return max(1, int(found[1]))  # stage 0 adds bf16 up inexactly
    if key == "fsdp" and "full_shard" in value:
        return 3
    return Why(
        "as here: DeepSpeed trains" if value is True else "not taken over: set zero.stage, and deepspeed below it"
    )


def _steps(value: Any, key: str, settings: Settings) -> Any:
    if value in ("epoch", "steps") or key.endswith("per_epoch"):
        is_same = value in ("epoch", "steps", 1)
        return Why("as here: after each epoch" if is_same else "not taken over: once an epoch, or every N steps")
    return value if isinstance(value, int) else Why("not taken over: it is a number of steps here")


_NEVER = {
    "data.sources.N.weight": Why("as here where it asks for no more: only answers are trained"),
    "data.overlong": Why("not taken over: it is split, truncate or drop here"),
    "model.attention": Why("as here: the fastest that is there (auto)"),
    "model.kernels": Why("as here: the fastest that is there (auto)"),
    "checkpoint.models": Why("not taken over: it keeps models for use here"),
    "checkpoint.best": Why("not taken over: it is loss, or the name of one of eval.checks here"),
    "checkpoint.resume": Why("not taken over: a run goes on from its own newest checkpoint"),
}
_VALUES: Mapping[str, Callable[[Any, str, Settings], Any]] = {
    "template": lambda value, *_: value if value in _OWN_TEMPLATES else _TEMPLATES.get(str(value), "base"),
    "packing.tokens_per_gpu": _tokens_per_gpu,
    "data.eval_fraction": lambda value, *_: (
        float(value) if isinstance(value, int | float) and value < 1 else Why("not taken over: it is a share here")
    ),
    "model.dtype": lambda value, *_: "float32" if value == "float32" else "bfloat16",
    "model.checkpointing": lambda value, key, _: (
        "none" if (value is not False) == key.startswith("disable") else "full"
    ),
    "model.lora": _lora,
    "model.lora.base_bits": lambda value, key, _: (
        Why("not taken over: 4 bits (model.lora.base_bits) or none") if key == "load_in_8bit" or value == 8 else 4
    ),
    "model.lora.targets": _targets,
    "optim.algorithm": _algorithm,
    "optim.betas": _betas,
    "optim.warmup": lambda value, key, _: (
        Why("not taken over: optim.warmup is a share of the run; ochat report plan counts its steps")
        if "steps" in key and value
        else float(value)
    ),
    "optim.min_lr": _min_lr,
    "train.epochs": lambda value, *_: math.ceil(value),
    "train.max_steps": lambda value, *_: value if value > 0 else Why("as here: all epochs"),
    "checkpoint.every_steps": _steps,
    "checkpoint.every_epochs": _steps,
    "eval.every_steps": _steps,
    "log": lambda value, *_: (
        True if "tensorboard" in value else Why("not taken over: log.wandb.project names a project of wandb")
    ),
    "deepspeed": _stage,
    "zero.stage": _stage,
}


# ------------------------------------------------------------------------------------------------------- sources


def _sources(settings: Settings, lines: list[Line]) -> Iterator[Settings]:
    """The recipe's sources; adds their lines. Raises ValueError where no data is named."""
    if key := next((key for key in ("data_prefix", "data_path") if key in settings), None):  # OpenChat's: parquet files
        folder = str(Path(settings[key]).parent)
        reason = f"it is tokenised; data.sources.0.path is its folder {folder}, make it that of your dump"
        lines.append(Line(key, settings[key], f"not taken over: {reason}"))
        yield {"name": "data", "path": folder}
    elif named := settings.get("dataset"):  # LLaMA-Factory's, of its list
        for name in _names(named):
            yield _listed("dataset", name, settings, lines)
    else:
        of_trl = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        one = {name: settings[key] for name, key in of_trl.items() if key in settings}
        if not (listed := settings.get("datasets", [one] if "path" in one else [])):
            raise ValueError("the settings name no data: datasets, dataset, dataset_name, data_path or data_prefix")
        for place, entry in enumerate(listed):
            yield _source(f"datasets.{place}", entry, lines)


def _eval_sources(settings: Settings, lines: list[Line]) -> Iterator[Settings]:
    """Those of LLaMA-Factory's eval_dataset and axolotl's test_datasets."""
    for name in _names(settings.get("eval_dataset", "")):
        if name in _names(settings.get("dataset", "")):
            reason = "it is trained on; data.eval_fraction holds a share of it out"
            lines.append(Line("eval_dataset", name, f"not taken over: {reason}"))
        else:
            yield _listed("eval_dataset", name, settings, lines)
    for place, entry in enumerate(settings.get("test_datasets", [])):
        yield _source(f"test_datasets.{place}", entry, lines)


def _names(named: Any) -> list[str]:
    """LLaMA-Factory names data sets in a text with commas, or in a list."""
    return [name for name in (re.split(r"\s*,\s*", named) if isinstance(named, str) else named) if name]


def _listed(key: str, name: str, settings: Settings, lines: list[Line]) -> Settings:
    """A source that LLaMA-Factory names."""
    folder, described = settings.get("dataset_dir", "data"), "as its dataset_info.json describes it"
    if folder == "ONLINE":
        path, described = f"hf://{name}", "of the hub"
    elif folder.startswith("REMOTE:"):
        folder = folder.removeprefix("REMOTE:")
        path = f"{folder}:{name}"
        described += f", after `hf download --repo-type dataset {folder} --local-dir {folder}`"
    else:
        path = f"{folder}:{name}"
    lines.append(Line(key, name, f"-> data.{'eval_' * key.startswith('eval')}sources: {path}, {described}"))
    return {"name": re.sub(r"[^\w.-]+", "-", name), "path": path}


def _source(key: str, entry: Settings, lines: list[Line]) -> Settings:
    """One source of axolotl's or TRL's list."""
    path, left = str(entry["path"]), dict(entry)
    name, files = re.sub(r"[^\w.-]+", "-", path).strip("-."), left.pop("data_files", None)
    split, _, part = str(left.pop("split", "")).partition("[")
    if files is not None:
        path = files
    elif not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        subset = left.pop("name", None)
        path = f"hf://{path}{f'/{subset}' if subset else ''}{f':{split}' if split else ''}"
    mappings = left.pop("message_property_mappings", {})
    fields = {
        "turns": left.pop("field_messages", None),
        "role": left.pop("message_field_role", mappings.get("role")),
        "text": left.pop("message_field_content", mappings.get("content")),
    }
    fields = {ours: theirs for ours, theirs in fields.items() if theirs is not None}
    listed = left.pop("roles", {}).items()
    roles = {theirs: role for role, names in listed for theirs in names if theirs != role}
    lines.append(
        Line(
            key,
            entry["path"],
            f"-> data.{'eval_' * key.startswith('test')}sources: {path}{f', fields {_json(fields)}' * bool(fields)}",
        )
    )
    if part:
        lines.append(
            Line(f"{key}.split", entry["split"], "not taken over: a source is a whole split; epochs is a share")
        )
    for other in [name for name in left if name != "path"]:
        found = foreign_key(other)
        reason = found[1] if found else "no key of a source is known to mean the same"
        lines.append(Line(f"{key}.{other}", left[other], f"not taken over: {reason}"))
    source: Settings = {"name": name, "path": path}
    return source | ({"fields": fields} if fields else {}) | ({"roles": roles} if roles else {})


if __name__ == "__main__":
    main()
