"""A checkpoint to a Hugging Face model that everything else can load.

python -m ochat_train.export CHECKPOINT OUT
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ochat_train.conversations.template import TEMPLATES
from ochat_train.model.pretrained import DTYPES
from ochat_train.tokens.chat_template import chat_template
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from ochat_train.training.checkpoint import Checkpoint, read_checkpoint

METADATA_FILE = "ochat_train.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Export one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m ochat_train.export", description="Checkpoint to model.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint, RUN/step-NNNNNNNN")
    parser.add_argument("out", metavar="OUT", help="folder of the model; an earlier export there is replaced")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"exported {options.checkpoint} to {options.out}")


def export(checkpoint_dir: str | Path, out: str | Path) -> None:
    """Write the checkpoint's model to the folder `out`, or leave what was there.

    Safetensors in the recipe's dtype, configuration, a generation configuration that ends at the template's end token,
    the tokenizer with the Jinja chat template, and the run's metadata. Raises ValueError for an incomplete checkpoint,
    or when `out` holds something that is not an earlier export.
    """
    checkpoint, out = read_checkpoint(checkpoint_dir), Path(out)
    if out.exists() and not (out / METADATA_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an earlier export; name another folder")
    tokenizer = load_tokenizer(str(checkpoint.path / "tokenizer"), TEMPLATES[checkpoint.template])
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_model(checkpoint, tokenizer, partial)
    _save_generation_config(checkpoint, tokenizer, partial)
    _save_tokenizer(checkpoint, tokenizer, partial)
    metadata = {
        "template": checkpoint.template,
        "inference_condition": checkpoint.inference_condition,
        "conditions": checkpoint.conditions,
        "step": checkpoint.state.step,
        "examples_consumed": checkpoint.state.examples_consumed,
        "tokens_seen": checkpoint.state.tokens_seen,
        "store_fingerprint": checkpoint.state.store_fingerprint,
        "run": checkpoint.run,
    }
    (partial / METADATA_FILE).write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2))
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def read_export(model: Path) -> dict[str, Any] | None:
    """The metadata of an exported model; None when the folder holds none."""
    file = model / METADATA_FILE
    return dict(orjson.loads(file.read_bytes())) if file.is_file() else None


def is_export_of(model: Path, checkpoint_dir: Path) -> bool:
    """Whether the folder `model` holds the export of this very checkpoint."""
    metadata, checkpoint = read_export(model), read_checkpoint(checkpoint_dir)
    return metadata is not None and (metadata["step"], metadata["run"]) == (checkpoint.state.step, checkpoint.run)


def _save_model(checkpoint: Checkpoint, tokenizer: ChatTokenizer, folder: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint.path / "model")
    config.eos_token_id = tokenizer.end_id
    config.bos_token_id = tokenizer.special_ids.get(tokenizer.template.bos, config.bos_token_id)
    dtype = DTYPES[checkpoint.state.recipe["model"]["dtype"]]
    weights = {name: tensor.contiguous().to(dtype) for name, tensor in _read_weights(checkpoint).items()}
    with torch.device("meta"):  # only the names and shapes: the weights are there already
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    assert not unexpected, unexpected
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta], missing
    model.save_pretrained(folder)


def _read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The language model's weights by transformers' names."""
    if checkpoint.state.recipe["zero"]["stage"] == 3:  # split over ranks
        # Lazily: a weight is put together when _save_model asks for it.
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path), tag="deepspeed", lazy_mode=True)
    else:
        file = checkpoint.path / "deepspeed" / "mp_rank_00_model_states.pt"
        # DeepSpeed pickles its own classes beside the weights; this is a file that we wrote.
        weights = torch.load(file, map_location="cpu", weights_only=False)["module"]
    # The loss head shares the language model's head.
    return {name.removeprefix("lm."): weight for name, weight in weights.items() if name.startswith("lm.")}


def _save_generation_config(checkpoint: Checkpoint, tokenizer: ChatTokenizer, folder: Path) -> None:
    config = GenerationConfig.from_pretrained(checkpoint.path / "model")
    config.eos_token_id = tokenizer.end_id
    config.bos_token_id = tokenizer.special_ids.get(tokenizer.template.bos, config.bos_token_id)
    # Only here, never in the model's own configuration, where it would freeze the end token's embedding.
    config.pad_token_id = tokenizer.end_id
    try:
        config.validate(strict=True)
    except ValueError:  # some bases give a temperature but not do_sample, and transformers refuses to save that
        config.do_sample = True
    config.save_pretrained(folder)


def _save_tokenizer(checkpoint: Checkpoint, tokenizer: ChatTokenizer, folder: Path) -> None:
    tokenizer.pretrained.chat_template = chat_template(tokenizer, checkpoint.inference_condition)
    tokenizer.pretrained.eos_token = tokenizer.template.end_token
    tokenizer.save(folder)


if __name__ == "__main__":
    main()
