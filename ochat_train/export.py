"""A checkpoint to a Hugging Face model that everything else can load.

ochat export [--adapter] CHECKPOINT OUT | --best RUN OUT | --average K RUN OUT
"""

import argparse
import copy
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ochat_train.conversations.described import read_template
from ochat_train.files import flush_tree, publish_folder
from ochat_train.model.exported import METADATA_FILE, read_export
from ochat_train.model.lora import CHECKSUM, TRAINED, checksum, merge_adapters, require_peft, row_ids_of, save_adapter
from ochat_train.model.pretrained import DTYPES, load_model
from ochat_train.model.quantised import SETTING, round_to_4_bits
from ochat_train.model.round_trip import compare_weights, empty_model, save_weights
from ochat_train.model.text_part import Untrained, is_multimodal, untrained_of, with_untrained
from ochat_train.publish import convert_to_gguf, find_converter, open_repository, push, write_card
from ochat_train.recipe import LoraSection
from ochat_train.tokens.chat_template import chat_template
from ochat_train.tokens.parity import check_parity
from ochat_train.tokens.store import TokenStore, read_manifest
from ochat_train.tokens.tokenizer import ChatTokenizer, compare_with_auto, load_tokenizer
from ochat_train.training.checkpoint import Checkpoint, check_files, only_data, read_checkpoint
from ochat_train.training.kept_models import average_models, copy_best, require_free
from ochat_train.training.resources import free_host_bytes, room_for

_NUM_COMPARED = 20  # conversations of the store at each export


def main(arguments: Sequence[str] | None = None) -> None:
    """Export one checkpoint, or a model that a run has kept."""
    parser = argparse.ArgumentParser(prog="ochat export", description="Checkpoint to model.")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint, RUN/step-NNNNNNNN, or of a run, RUN"
    )
    parser.add_argument("out", metavar="OUT", help="folder of the model; an earlier export there is replaced")
    parser.add_argument("--adapter", action="store_true", help="write the adapters of model.lora alone, for peft")
    parser.add_argument("--base", help="where the base of adapters or a multimodal model is now; default: where it was")
    parser.add_argument("--best", action="store_true", help="of a run, the model that checkpoint.best has kept")
    parser.add_argument("--average", type=int, metavar="K", help="of a run, the mean of its last K models")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the model, with a card, to the Hugging Face hub")
    parser.add_argument("--license", metavar="ID", help="the card's, such as apache-2.0")
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="write it for llama.cpp, too, with Ollama's Modelfile"
    )
    parser.add_argument(
        "--llama-cpp", metavar="FOLDER", default=os.environ.get("LLAMA_CPP"), help="a checkout of llama.cpp (LLAMA_CPP)"
    )
    options = parser.parse_args(arguments)
    is_average = options.average is not None
    if options.best + is_average + bool(options.adapter or options.base) > 1:
        parser.error("--best and --average take models that are whole: give one of them, without --adapter and --base")
    if options.adapter and options.gguf:
        parser.error("--gguf takes a model that is whole: leave --adapter out")
    source, out = Path(options.checkpoint), Path(options.out)
    try:
        converter = find_converter(options.llama_cpp) if options.gguf else []
        if options.push:
            open_repository(options.push)
        if options.best:
            print(f"exported {copy_best(source, out)} to {out}")
        elif is_average:
            models = average_models(source, options.average, out)
            print(f"exported the mean of {', '.join(model.name for model in models)} to {out}")
        else:
            export(source, out, adapter=options.adapter, base=options.base)
            print(f"exported {source} to {out}")
        if options.gguf:
            convert_to_gguf(out, options.gguf, converter)
            print(f"converted to {options.gguf}; ollama create NAME -f {options.gguf.parent / 'Modelfile'}")
        if options.push:
            run = source if (source / "metrics.jsonl").exists() else source.parent
            write_card(out, run, options.push, options.license)
            print(f"pushed to {push(out, options.push)}")
    except (OSError, ValueError) as error:  # OSError: a full disk, a folder that may not be written
        sys.exit(f"error: {error}")


def export(checkpoint_dir: str | Path, out: str | Path, *, adapter: bool = False, base: str | None = None) -> None:
    """Write the checkpoint's model to the folder `out` in the recipe's dtype, see `write_model`.

    An earlier export there stays until the new one is whole. Adapters of model.lora are merged into their base, which
    is loaded again, from `base` if it lies elsewhere now; with `adapter` they alone are written, for peft. transformers
    loads the model, whose weights must be the checkpoint's, see `compare_weights`. Its prompts are compared with those
    of its training; what differs there is printed and recorded in the metadata, but does not stop the export. Raises
    ValueError for an incomplete checkpoint, other weights, a base that is not what it was, adapters where there are
    none, a disk without room, or when `out` holds something that is not an earlier export.
    """
    checkpoint, out = read_checkpoint(checkpoint_dir), Path(out)
    require_free(out)
    if adapter:
        require_peft()
        if _lora(checkpoint) is None:
            raise ValueError(f"{checkpoint.path} has no adapters, since its model.lora was null; leave --adapter out")
    tokenizer = load_tokenizer(str(checkpoint.path / "tokenizer"), read_template(checkpoint.template))
    config = AutoConfig.from_pretrained(checkpoint.path / "model")
    if base is not None and _lora(checkpoint) is None and not is_multimodal(config):
        raise ValueError(f"{checkpoint.path} has no adapters and is a text model, so no base is read; leave --base out")
    generation_config = GenerationConfig.from_pretrained(checkpoint.path / "model")
    metadata, dtype = metadata_of(checkpoint), _dtype(checkpoint)
    trained = _read_trained(checkpoint)
    was = checkpoint.state.recipe["model"]["base"]
    if base not in (None, was):
        print(f"moved, and compared by what it holds: model.base: {was} -> {base}", flush=True)
    weights, untrained = trained, None
    if base not in (None, was) or (not adapter and (_lora(checkpoint) is not None or is_multimodal(config))):
        loaded = _load_base(base or was, trained, checkpoint, tokenizer)
        untrained = untrained_of(loaded)
        weights = trained if adapter else _merge(trained, loaded, checkpoint)
    # Weights that are read lazily have no size yet.
    sized = weights.values() if adapter else empty_model(config, dtype).parameters()
    with publish_folder(out) as folder, room_for(sum(weight.nbytes for weight in sized), folder):
        if adapter:
            metadata["base"] = _save_adapter(folder, weights, empty_model(config, dtype), checkpoint, base or was)
            _write_companions(folder, generation_config, tokenizer, metadata)
        else:
            write_model(
                folder,
                weights,
                configs=Configs(config, generation_config),
                tokenizer=tokenizer,
                dtype=dtype,
                metadata=metadata,
                untrained=untrained,
            )
            _check_weights(folder, with_untrained(weights, untrained), dtype)
        _record_parity(folder, checkpoint)
        flush_tree(folder)  # some file systems say only here that they are full


def _save_adapter(
    folder: Path, weights: dict[str, Tensor], empty: PreTrainedModel, checkpoint: Checkpoint, base: str
) -> dict[str, Any]:
    """Write the adapters for peft; returns what the metadata say of their base."""
    lora = _lora(checkpoint)
    assert lora is not None
    save_adapter(folder, weights, empty, base=base, rank=lora.rank, alpha=lora.alpha, rslora=lora.rslora)
    compute = {"bnb_4bit_compute_dtype": checkpoint.state.recipe["model"]["dtype"]}
    return {"name": base, "quantization": SETTING | compute if lora.base_bits else None}


class Configs(NamedTuple):
    """The configurations of a model, transformers' own."""

    model: Any
    generation: GenerationConfig


def write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    configs: Configs,
    tokenizer: ChatTokenizer,
    dtype: torch.dtype,
    metadata: dict[str, Any],
    untrained: Untrained | None = None,
) -> None:
    """Write a model that everything else can load into `folder`, which exists.

    Safetensors in `dtype`, configuration, a generation configuration that ends at the template's end token, the
    tokenizer with the Jinja chat template, and `metadata`, see `metadata_of`. weights: all, by transformers' names,
    with adapters merged. The configurations are not changed. untrained: what a multimodal model has beside these
    weights; it is written as it is, with the files of its processors.
    """
    config = copy.deepcopy(configs.model)
    for part in (config, config.get_text_config()):
        part.eos_token_id = tokenizer.end_id
        old = getattr(part, "bos_token_id", None)
        part.bos_token_id = tokenizer.special_ids.get(tokenizer.template.bos, old)
        if getattr(part, "pad_token_id", None) == tokenizer.end_id:  # as padding_idx it would freeze its embedding
            part.pad_token_id = tokenizer.pretrained.convert_tokens_to_ids(tokenizer.pad_token)
    save_weights(folder, weights, config, dtype, untrained)
    for name, content in untrained.files.items() if untrained else ():
        (folder / name).write_bytes(content)
    for file in folder.glob("*.safetensors"):  # safetensors makes them for their owner alone
        file.chmod((folder / "config.json").stat().st_mode)
    _write_companions(folder, configs.generation, tokenizer, metadata)


def metadata_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `ochat_train.json` says of an exported model."""
    return {
        "template": checkpoint.template,
        "inference_condition": checkpoint.inference_condition,
        "conditions": checkpoint.conditions,
        "step": checkpoint.state.step,
        "examples_consumed": checkpoint.state.examples_consumed,
        "tokens_seen": checkpoint.state.tokens_seen,
        "store_fingerprint": checkpoint.state.store_fingerprint,
        "run": checkpoint.run,
    }


def is_export_of(model: Path, checkpoint_dir: Path) -> bool:
    """Whether the folder `model` holds the export of this very checkpoint."""
    checkpoint = read_checkpoint(checkpoint_dir)
    try:
        metadata = read_export(model) or {}
    except ValueError:  # damaged: it is written anew
        return False
    made_from = (metadata.get("step"), metadata.get("run"), metadata.get("averaged_steps"))
    return made_from == (checkpoint.state.step, checkpoint.run, None)


def _check_weights(model: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Compare the model's weights with the checkpoint's where there is memory to load it; else its metadata says so."""
    metadata = read_export(model)
    assert metadata is not None
    needed, free = sum(file.stat().st_size for file in model.glob("*.safetensors")), free_host_bytes()
    metadata["num_compared_weights"] = None
    if needed > free:
        note = f"its weights were not compared, which takes {needed / 1e9:.3g} GB of memory; {free / 1e9:.3g} are free"
        _report(note, metadata["problems"])
    else:
        metadata["num_compared_weights"] = compare_weights(model, weights, dtype)
    _write_metadata(model, metadata)


def _record_parity(model: Path, checkpoint: Checkpoint) -> None:
    """Compare the model's tokenizer as others load it, and its prompts if the store of its training is still there.

    Whatever goes wrong here, the model is trained, and is written.
    """
    store = checkpoint.state.recipe["data"]["store"]
    found = None
    problems: list[str] = []
    try:
        tokenizer = load_tokenizer(str(model), read_template(checkpoint.template))
        if note := compare_with_auto(str(model), tokenizer):
            problems.append(f"exported tokenizer: {note}; serve it by --engine transformers")
        manifest = read_manifest(store)
        if manifest is not None and manifest.fingerprint == checkpoint.state.store_fingerprint:
            parity = check_parity(TokenStore(store), tokenizer, num=_NUM_COMPARED)
            print(parity, flush=True)
            found = asdict(parity)
            for way in found["ways"].values():
                del way["first"]  # it quotes a conversation
            if parity.num_different:
                problems.append(
                    f"{parity.num_different:,} of {parity.num_compared:,} prompts are served with other ids"
                )
    except Exception as error:
        problems.append(f"the model's prompts could not be compared with those of its training: {error!r}")
    metadata = read_export(model)
    assert metadata is not None
    metadata["parity"] = found
    for problem in problems:
        _report(problem, metadata["problems"])
    _write_metadata(model, metadata)


def _report(problem: str, problems: list[str]) -> None:
    """Print what a check after training found, and keep it for the metadata."""
    print(f"WARNING: {problem}. The model is written all the same; its {METADATA_FILE} says so", flush=True)
    problems.append(problem)


def _write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    (folder / METADATA_FILE).write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2))


def _lora(checkpoint: Checkpoint) -> LoraSection | None:
    """The recipe's section model.lora."""
    section = checkpoint.state.recipe["model"].get("lora")
    return None if section is None else LoraSection.model_validate(section)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    return DTYPES[checkpoint.state.recipe["model"]["dtype"]]


def _load_base(
    base: str | None, trained: dict[str, Tensor], checkpoint: Checkpoint, tokenizer: ChatTokenizer
) -> PreTrainedModel:
    """The base of what was trained. Raises ValueError unless it holds what it held in training."""
    recipe = checkpoint.state.recipe
    try:
        lm = load_model(
            base,
            recipe["model"]["config"],
            dtype=recipe["model"]["dtype"],
            num_ids=tokenizer.num_ids,
            added_ids=row_ids_of(trained),
            seed=recipe["train"]["seed"],
        )
    except ValueError as error:
        raise ValueError(f"the run's base: {error}; if it lies elsewhere now, name its place with --base") from None
    untrained = untrained_of(lm)
    found = untrained.checksum if untrained and _lora(checkpoint) is None else int(checksum(lm))
    if found != int(trained[CHECKSUM]):
        raise ValueError(
            f"model.base {base} holds other weights than those beside which {checkpoint.path} was trained; put those "
            "back, or name their place with --base"
        )
    return lm


def _merge(trained: dict[str, Tensor], base: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The language model's weights by transformers' names: with adapters in their base."""
    lora = _lora(checkpoint)
    if lora is None:
        return merge_adapters(trained, scaling=1)
    if lora.base_bits is not None:
        round_to_4_bits(base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return merge_adapters(base.state_dict() | trained, scaling=lora.scaling)


def _read_trained(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The language model's weights that the checkpoint holds, by their names in training. Raises Damaged."""
    check_files(checkpoint)
    if checkpoint.state.recipe["zero"]["stage"] == 3:  # split over ranks
        found = len(list((checkpoint.path / "deepspeed").glob("*optim_states.pt")))
        if found < checkpoint.world_size:
            raise ValueError(
                f"{checkpoint.path} holds the weights of {found} of {checkpoint.world_size} processes, since the nodes "
                "do not share checkpoint.dir; copy the files of that folder's deepspeed/ from all nodes together, or "
                "let checkpoint.models save whole models"
            )
        # Lazily: a weight is put together when it is asked for.
        with only_data():
            weights = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint.path), tag="deepspeed", exclude_frozen_parameters=True, lazy_mode=True
            )
    else:
        file = checkpoint.path / "deepspeed" / "mp_rank_00_model_states.pt"
        with only_data():
            weights = torch.load(file, map_location="cpu")["module"]
    # The loss head shares the language model's head.
    trained = {name.removeprefix("lm."): weight for name, weight in weights.items() if name.startswith("lm.")}
    if _lora(checkpoint) is None:
        return trained
    # As they were in forward: ZeRO-3 has the optimizer's copy, in fp32.
    dtype = _dtype(checkpoint)
    whole = {name: weight.contiguous() for name, weight in trained.items()}
    return {name: weight.to(dtype) if name.endswith(TRAINED) else weight for name, weight in whole.items()}


def _write_companions(
    folder: Path,
    generation_config: GenerationConfig,
    tokenizer: ChatTokenizer,
    metadata: dict[str, Any],
) -> None:
    """Write what an exported model has beside its weights."""
    config = copy.deepcopy(generation_config)
    config.eos_token_id = tokenizer.end_id
    config.bos_token_id = tokenizer.special_ids.get(tokenizer.template.bos, config.bos_token_id)
    config.pad_token_id = tokenizer.pretrained.convert_tokens_to_ids(tokenizer.pad_token)
    try:
        config.validate(strict=True)
    except ValueError:  # some bases give a temperature but not do_sample, and transformers refuses to save that
        config.do_sample = True
    config.to_json_file(folder / "generation_config.json")  # save_pretrained refuses what it takes for odd
    served = copy.deepcopy(tokenizer)  # training still uses this one
    problems: list[str] = []
    try:
        served.pretrained.chat_template = chat_template(tokenizer, metadata["inference_condition"])
    except Exception as error:  # preprocess has checked it; since then a package is another
        served.pretrained.chat_template = None
        _report(f"the model has no chat template, since none gives the ids of training: {error}", problems)
    served.pretrained.pad_token, served.pretrained.eos_token = tokenizer.pad_token, tokenizer.template.end_token
    served.pretrained.padding_side = served.pretrained.init_kwargs["padding_side"] = "left"  # answers follow prompts
    served.save(folder)
    # With the base's own template a server writes tools as training did.
    own = {"base_chat_template": tokenizer.pretrained.chat_template}
    _write_metadata(folder, metadata | own | {"problems": problems})


if __name__ == "__main__":
    main()
