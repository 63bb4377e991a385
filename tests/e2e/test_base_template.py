"""`template: base` as a user runs it: preprocess, a few steps, the export, and a server that asks what was trained."""

from pathlib import Path

import datasets
import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ochat_train.model.exported import read_export
from tests.base_templates import DEFAULT_SYSTEM
from tests.chat_server import ask, serving
from tests.e2e.harness import events, preprocess, tiny_recipe, train, write_dump
from tests.small_tokenizers import write_base


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps under conditions before the texts of users."""
    folder = tmp_path_factory.mktemp("base-template")
    write_dump(folder, 52)
    base = write_base(folder / "base", "gpt4", chat_template=DEFAULT_SYSTEM)
    recipe = tiny_recipe(folder, name="tiny-chat", template="base", condition_in="user_prefix", tokenizer=str(base))
    preprocess(recipe, "data.eval_fraction=0.2")
    train(recipe, "data.eval_fraction=0.2", "train.max_steps=3", num_processes=1)
    return folder / "run"


def test_the_export_serves_the_prompts_of_training(run: Path) -> None:
    metadata = read_export(run / "model")
    assert metadata is not None and metadata["problems"] == []
    assert metadata["template"]["source"] == DEFAULT_SYSTEM and metadata["template"]["condition_in"] == "user_prefix"
    ways = metadata["parity"]["ways"]
    assert all(way["num_equal"] > 10 and way["num_different"] == 0 for way in ways.values())


def test_the_probe_has_every_held_out_answer(run: Path) -> None:
    last = events(run, "eval")[-1]
    assert last["probe"] is not None and last["probe_left_out"] == 0


def test_a_served_answer_is_that_to_the_ids_of_the_store(run: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(run / "model"), AutoModelForCausalLM.from_pretrained(run / "model")
    rows = datasets.load_from_disk(str(run.parent / "store"))["train"]
    records = {record["id"]: record for record in orjson.loads((run.parent / "dump.json").read_bytes())}
    row = next(row for row in rows if records[row["id"]]["conversations"][0]["from"] == "human")
    question = records[row["id"]]["conversations"][0]["value"]
    start = next(place for place, weight in enumerate(row["loss_weights"]) if weight)
    prompt = torch.tensor([row["input_ids"][:start]])
    assert f"\n{row['condition']}\n{question}" in tokenizer.decode(prompt[0])
    with torch.inference_mode():
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    with serving(run, "--engine", "transformers", "--device", "cpu") as server:
        answer = ask(server, question, condition=row["condition"])
    assert answer.usage.prompt_tokens == prompt.shape[1]
    assert answer.choices[0].message.content == tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
