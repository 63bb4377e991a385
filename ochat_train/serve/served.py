"""What is served: an exported model, or adapters with their base; its names and its conditions."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from transformers import AutoConfig

from ochat_train.conversations.described import Description, read_template
from ochat_train.conversations.spell_out import Spelling
from ochat_train.files import STEP_FOLDERS
from ochat_train.model.exported import METADATA_FILE, read_export
from ochat_train.model.pretrained import max_positions_of
from ochat_train.tokens.chat_template import spelling_of
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer, locate_base

ALIAS = "openchat"
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapters as `export --adapter` writes them. has_tokens: they contain trained rows of tokens.

    base_bits: of the base beside which they were trained; None: it was not quantised.
    """

    base: str
    rank: int
    has_tokens: bool
    is_dora: bool
    base_bits: int | None


@dataclass(frozen=True, slots=True)
class Served:
    """A model and its names.

    folder: the export: tokenizer, template, and weights or adapters. names: what requests may call the model, the
    recipe's name first. conditions: those of its training. condition: for requests that name none. num_positions: how
    many tokens prompt and answer may have together. base_chat_template: the base's own, for tools; reasoning,
    tool_calls: the recipe's, as `spelling_of` takes them. dtype: of its weights.
    """

    folder: Path
    names: tuple[str, ...]
    template: Description
    conditions: tuple[str, ...]
    condition: str
    num_positions: int
    adapter: Adapter | None
    base_chat_template: str | dict[str, str] | None = None
    reasoning: str = "drop"
    tool_calls: str = "context"
    dtype: str | None = None

    @property
    def name(self) -> str:
        """The first name, the recipe's."""
        return self.names[0]

    def load_tokenizer(self) -> ChatTokenizer:
        """The tokenizer of the export. Raises ValueError."""
        return load_tokenizer(str(self.folder), read_template(self.template))

    def spelling(self, tokenizer: ChatTokenizer) -> Spelling:
        """How training wrote reasoning, calls and definitions of tools."""
        return spelling_of(tokenizer, self.base_chat_template, reasoning=self.reasoning, tool_calls=self.tool_calls)


def find_served(
    path: str, condition: str | None = None, num_positions: int | None = None, names: Sequence[str] = ()
) -> Served:
    """Find the exported model or adapters in the folder `path`, or the model in RUN/model if it is the folder of a run.

    condition, num_positions: replace the model's own. names: more names, before its own. Raises ValueError.
    """
    folder, metadata = _find_export(Path(path).expanduser())
    adapter = _read_adapter(folder, metadata)
    if adapter is None and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds neither config.json nor {_ADAPTER}; export the checkpoint again")
    try:
        files = locate_base(adapter.base if adapter else str(folder.absolute()))
    except ValueError as error:
        remedy = f"write where it is now into {folder / _ADAPTER}, or export again with --base"
        raise ValueError(f"the base of {folder}: {error}; {remedy}") from None
    try:
        config = AutoConfig.from_pretrained(files.name, **files.options)
    except (OSError, ValueError) as error:
        raise ValueError(f"the configuration of {files.name} cannot be read: {error}") from error
    inference = metadata["inference_condition"]
    conditions = tuple(dict.fromkeys([inference, *metadata["conditions"]]))
    if condition is not None and condition not in conditions:
        raise ValueError(f"--condition {condition!r}: {explain_unknown(condition, conditions)}")
    recipe = metadata["run"].get("recipe", {})
    data, name = recipe.get("data", {}), recipe.get("name") or folder.name
    return Served(
        folder=folder,
        names=tuple(dict.fromkeys([*names, name, *_template_name(metadata["template"]), ALIAS])),
        template=metadata["template"],
        conditions=conditions,
        condition=inference if condition is None else condition,
        num_positions=num_positions or max_positions_of(config),
        adapter=adapter,
        base_chat_template=metadata.get("base_chat_template"),
        reasoning=data.get("reasoning", "drop"),
        tool_calls=data.get("tool_calls", "context"),
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    )


def explain_unknown(condition: str, conditions: tuple[str, ...]) -> str:
    """The conditions that exist, and the most similar one."""
    near = difflib.get_close_matches(condition, conditions, n=1, cutoff=0.4)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}The model was trained under {', '.join(map(repr, conditions))}"


def _template_name(description: Description) -> list[str]:
    """The name of a built-in template, by which the clients of OpenChat's server call a model."""
    name = description if isinstance(description, str) else description["template"]
    return [name] if isinstance(name, str) and name != "base" else []


def _find_export(path: Path) -> tuple[Path, dict[str, Any]]:
    if not path.is_dir():
        raise ValueError(f"no folder {path}; name an exported model, or the folder of a run")
    for folder in (path, path / "model"):
        try:
            metadata = read_export(folder)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{folder / METADATA_FILE} is damaged ({error}); export the checkpoint again") from error
        if metadata is not None:
            return folder, metadata
    checkpoints = sorted(path.glob(STEP_FOLDERS))
    remedy = f"ochat export {checkpoints[-1]} OUT makes one" if checkpoints else "name another folder"
    raise ValueError(f"{path} holds no exported model, for {METADATA_FILE} is not there; {remedy}")


def _read_adapter(folder: Path, metadata: dict[str, Any]) -> Adapter | None:
    file = folder / _ADAPTER
    if not file.is_file():
        return None
    config = orjson.loads(file.read_bytes())
    lora = metadata["run"].get("recipe", {}).get("model", {}).get("lora") or {}
    return Adapter(
        base=config["base_model_name_or_path"],
        rank=config["r"],
        has_tokens=bool(config.get("trainable_token_indices")),
        is_dora=config.get("use_dora", False),
        base_bits=lora.get("base_bits"),
    )
