"""A model loaded once a node is, bit for bit, the one that each process would load for itself."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.activation_grid import small
from tests.e2e.harness import start_ranks

NUM_IDS = 514  # the bases have 512
MIXTRAL = AutoConfig.for_model(
    "mixtral",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bases in the forms that models come in."""
    root = tmp_path_factory.mktemp("bases")
    configs = {"untied": small("llama"), "tied": small("llama, tied"), "experts": MIXTRAL, "buffers": small("gemma2")}
    for name, config in configs.items():
        torch.manual_seed(1)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        lm.save_pretrained(root / name, max_shard_size="1MB")  # experts one by one, as Mixtral has them
    lm = AutoModelForCausalLM.from_config(small("llama"), dtype=torch.bfloat16)
    lm.config.save_pretrained(root / "bin")
    torch.save(lm.state_dict(), root / "bin/pytorch_model.bin")
    return {name: str(root / name) for name in (*configs, "bin")}


def kind(base: str | None, stage: int, dtype: str = "bfloat16", *, lora: bool = False) -> dict[str, Any]:
    config = None if base else {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": NUM_IDS}
    config = config and config | {"intermediate_size": 96, "num_attention_heads": 4}
    return {"base": base, "config": config, "stage": stage, "dtype": dtype, "num_ids": NUM_IDS, "lora": lora}


def run(kinds: list[dict[str, Any]], *, num_hosts: int = 1, code: str = "") -> list[dict[str, Any]]:
    """What each rank of two found of each kind."""
    folders = [Path("/"), Path("/tmp")] if num_hosts == 2 else [Path("/")] * 2
    words = [orjson.dumps(each).decode() for each in kinds]
    ended = start_ranks("tests.e2e.loading", *words, code=code, folders=folders).end()
    assert [status for status, _ in ended] == [0, 0], ended
    lines = [line.removeprefix("FOUND ") for _, text in ended for line in text.splitlines() if line.startswith("FOUND")]
    found = [orjson.loads(line) for line in lines]
    assert len(found) == 2 * len(kinds)
    assert [each for each in found if each["loaded"] or each["engine"]] == []
    return found


def test_one_process_of_a_node_loads_and_all_have_the_same_bits_at_every_stage(bases: dict[str, str]) -> None:
    kinds = [
        kind(bases["untied"], 0, "float32"),
        kind(bases["bin"], 1, "float32"),
        kind(bases["experts"], 2),
        kind(bases["tied"], 3, lora=True),
        kind(bases["buffers"], 3),
        kind(None, 3, "float32"),
    ]
    assert all(each["loads"] == (each["rank"] == 0) for each in run(kinds))


def test_each_node_loads(bases: dict[str, str]) -> None:
    assert [each["loads"] for each in run([kind(bases["tied"], 3)], num_hosts=2)] == [1, 1]


def test_a_model_that_cannot_be_pickled_is_loaded_by_each_process(bases: dict[str, str]) -> None:
    code = "import pickle, ochat_train.training.loading as p\ndef dump(*_): raise pickle.PicklingError('lambda')\n"
    found = run([kind(bases["tied"], 2)], code=f"{code}p._Pickler.dump = dump")
    assert [each["loads"] for each in found] == [1, 1]
