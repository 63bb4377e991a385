"""Whether an exported model is asked with the prompts that it was trained on."""

from pathlib import Path

from ochat_train.conversations.described import read_template
from ochat_train.model.exported import METADATA_FILE, read_export
from ochat_train.tokens.parity import PromptParity, check_parity
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import load_tokenizer


def compare_prompts(model: str | Path, store: str | Path, *, num: int) -> PromptParity:
    """Compare the prompts of answers in a store with those that servers make for the exported model.

    Raises ValueError when `model` is no exported model, `store` no store, or their templates differ.
    """
    if num < 1:
        raise ValueError(f"--num {num} is below 1")
    metadata = read_export(Path(model))
    if metadata is None:
        raise ValueError(f"{model} is not an exported model, for {METADATA_FILE} is not there")
    examples = TokenStore(store)
    if examples.manifest.template != metadata["template"]:
        raise ValueError(
            f"{model} has the template {metadata['template']}, and {store} {examples.manifest.template}; name the "
            "store that it was trained on"
        )
    return check_parity(examples, load_tokenizer(str(model), read_template(metadata["template"])), num=num)
