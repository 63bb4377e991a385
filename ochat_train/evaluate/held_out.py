"""Held-out loss and condition probe of an exported model, by the functions that training calls."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ochat_train.model.exported import read_export
from ochat_train.model.packed_lm import PackedCausalLM, attention_needs
from ochat_train.model.pretrained import DTYPES, load_model, max_positions_of
from ochat_train.model.probe import choose_attention
from ochat_train.serve.served import find_served
from ochat_train.tokens.loss_forms import LossForm
from ochat_train.tokens.plan import PlanShape
from ochat_train.tokens.store import Split, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.data import check_lengths
from ochat_train.training.engine import join_process_group, read_world
from ochat_train.training.held_out import HeldOut
from ochat_train.training.metrics import evaluation_to_json


def measure_held_out(model: str, store: str | Path, *, split: Split, tokens_per_batch: int | None) -> dict[str, Any]:
    """The fields of training's evaluation line (docs/runs.md) for a split of a store, but its place and the checks.

    The loss form is that of training. tokens_per_batch: None takes the value of training, so that the probe leaves out
    the same examples. One process, on the GPU if there is one. Raises ValueError.
    """
    served = find_served(model)
    if served.adapter is not None:
        raise ValueError(f"{served.folder} holds adapters alone; export the merged model, without --adapter")
    metadata = read_export(served.folder)
    assert metadata is not None  # or it would not have been found
    recipe = metadata["run"].get("recipe", {})
    loss: LossForm = recipe.get("train", {}).get("loss", "token")
    examples = TokenStore(store, split, loss)
    tokenizer = served.load_tokenizer()
    _check_store(examples, tokenizer, metadata, str(store))
    packing = recipe.get("packing", {})
    capacity = tokens_per_batch or packing.get("tokens_per_gpu", 0) * packing.get("sequence_parallel", 1)
    if not capacity:
        raise ValueError(f"{served.folder} does not say how it was trained; give --tokens-per-batch")
    if not len(examples):
        raise ValueError(f"the split {split} of {store} is empty; data.eval_fraction makes one")
    check_lengths(examples, capacity)
    world = read_world()
    join_process_group(world)  # of one process: training sums over ranks
    dtype = AutoConfig.from_pretrained(served.folder).dtype
    name = next((name for name, known in DTYPES.items() if known == dtype), "float32")
    lm = load_model(str(served.folder.absolute()), None, dtype=name, num_ids=tokenizer.num_ids, added_ids=(), seed=0)
    conditions = examples.manifest.conditions
    needs = attention_needs(lm.config.get_text_config(), lm.dtype, world.device.type)
    attention, _ = choose_attention("auto", lm.config, needs, longest=capacity, checkpointing="none")
    packed = PackedCausalLM(
        lm,
        attention=attention.backend,
        device_type=world.device.type,
        checkpointing="none",
        num_conditions=len(conditions),
    )
    # How batches are balanced changes no sum, so the cost of length need not be the run's.
    shape = PlanShape(capacity=capacity, world_size=1, grad_accum=1, quadratic_length=capacity)
    held_out = HeldOut(examples, packed.to(world.device), shape, world)
    sums = held_out.loss_sums()
    probe = held_out.probe_conditions(tokenizer, sums, max_tokens=min(capacity, max_positions_of(lm.config)))
    line = evaluation_to_json(
        metadata["step"], 0, sums.by_condition(len(conditions)), probe, conditions, is_epoch_end=False
    )
    for place in ("event", "epoch", "epoch_end"):
        del line[place]
    return {"model": served.name, "store": str(store), "split": split, "loss_form": loss} | line


def _check_store(examples: TokenStore, tokenizer: ChatTokenizer, metadata: dict[str, Any], store: str) -> None:
    """Raise ValueError unless the store has the model's template, tokenizer and conditions."""
    manifest = examples.manifest
    if manifest.template != metadata["template"]:
        raise ValueError(f"{store} has the template {manifest.template}, and the model {metadata['template']}")
    if manifest.made_from["tokenizer"] != tokenizer.digest:
        raise ValueError(f"{store} was made with another tokenizer than the model's; preprocess with that")
    if set(manifest.conditions) - set(metadata["conditions"]):
        raise ValueError(
            f"{store} has the conditions {', '.join(map(repr, manifest.conditions))}, and the model was trained under "
            f"{', '.join(map(repr, metadata['conditions']))}"
        )
