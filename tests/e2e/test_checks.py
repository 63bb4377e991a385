"""Checks in training: the answers are those of the model, on two processes at each ZeRO stage."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.template import TEMPLATES
from ochat_train.report.page import as_text
from ochat_train.report.run import read_run
from ochat_train.report.run_sections import run_document
from ochat_train.tokens.chat_template import encode_prompt
from ochat_train.tokens.tokenizer import load_tokenizer
from tests.e2e.harness import events, preprocess, start_ranks, tiny_recipe, train_several, write_dump

QUESTIONS = ("Who are you?", "Hi", "How does a crow sound?", "Please name three colours of the rainbow.", "Why?")
MAX_NEW_TOKENS = 6
# So small a rate that the random weights answer each prompt in another way.
OPTIONS = ("optim.lr=1e-6", "train.epochs=1", "train.max_steps=1")
STAGES = (0, 2, 3)


def write_recipe(folder: Path, **changes: Any) -> Path:
    write_dump(folder, 40)
    (folder / "check.py").write_text(
        "def check(text, record):\n    assert record['answer'] != 'fails' or text == 'fails'\n    return 'a' in text\n"
    )
    records = [{"question": question, "answer": "yes"} for question in QUESTIONS]
    records[2]["answer"] = "fails"
    (folder / "questions.jsonl").write_bytes(b"\n".join(map(orjson.dumps, records)))
    check = {"name": "letter", "questions": str(folder / "questions.jsonl"), "max_new_tokens": MAX_NEW_TOKENS}
    check["check"] = f"{folder / 'check.py'}:check"
    return tiny_recipe(folder, eval={"checks": [check]}, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step at each stage, on two processes, without a held-out split."""
    folder = tmp_path_factory.mktemp("checks")
    recipe = write_recipe(folder)
    preprocess(recipe)
    overrides = [[*OPTIONS, f"zero.stage={stage}", f"checkpoint.dir={folder / f'run{stage}'}"] for stage in STAGES]
    (folder / "printed").write_text(train_several(recipe, *overrides))
    return folder


def answers_of(model: Path, condition: str) -> list[str]:
    """Greedy, one question at a time, without a cache."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = load_tokenizer(str(model), TEMPLATES["openchat_v3.2"])
    texts = []
    for question in QUESTIONS:
        ids = encode_prompt(Conversation("", "", condition, "", (Message("user", question),)), tokenizer)
        start = len(ids)
        while len(ids) < start + MAX_NEW_TOKENS and ids[-1] != tokenizer.end_id:
            with torch.no_grad():
                ids.append(int(lm(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        texts.append(tokenizer.pretrained.decode(ids[start:], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("stage", STAGES)
def test_answers_are_those_of_the_exported_model_and_are_kept(runs: Path, stage: int) -> None:
    run = runs / f"run{stage}"
    lines = (run / "checks/step-00000001/letter.jsonl").read_bytes().splitlines()
    kept = [orjson.loads(line) for line in lines]
    (line,) = events(run, "eval")
    assert line["loss"] is None and line["probe"] is None
    assert line["checks"]["letter"].keys() == {"Careful", "Hasty"}
    for condition, found in line["checks"]["letter"].items():
        expected = answers_of(run / "model", condition)
        of_condition = [one for one in kept if one["condition"] == condition]
        assert [one["answer"] for one in of_condition] == expected and len(set(expected)) > 2
        assert [one["record"]["question"] for one in of_condition] == list(QUESTIONS)
        scores = [float("a" in text) for number, text in enumerate(expected) if number != 2]
        assert (found["score"], found["num"], found["num_failed"]) == (sum(scores) / 4, 4, 1)
        assert found["num_truncated"] == sum(one["truncated"] for one in of_condition)


def test_the_report_has_the_scores_where_nothing_is_held_out(runs: Path) -> None:
    text = as_text(run_document(read_run(runs / "run0")))
    assert re.search(r"letter +Careful +[\d.]+ % +[\d.]+ % to [\d.]+ % +4 +\d +1", text), text
    assert "because nothing is held out" in text


def test_a_function_that_fails_and_questions_of_the_training_data_are_named(runs: Path) -> None:
    printed = (runs / "printed").read_text()
    assert printed.count("check letter fails for answers, which are not counted: AssertionError()") == len(STAGES)
    assert printed.count("check letter: 1 of 5 questions are in the training data") == len(STAGES)


# Ctrl-C to rank 1 in the first of three rounds of answers.
STOPPED = """
import os, signal, ochat_train.training.generate as g
is_any, asked = g.is_any, []
def signal_and_ask(*arguments):
    asked.append(1)
    if rank == 1 and len(asked) == 2:  # the first asks for a token before training
        os.kill(os.getpid(), signal.SIGINT)
    return is_any(*arguments)
g.is_any, g._MOST_ROWS = signal_and_ask, 2
"""


def test_checks_hear_a_stop_and_are_made_when_the_run_goes_on(runs: Path, tmp_path: Path) -> None:
    options = [str(runs / "recipe.yaml"), "optim.lr=1e-6", "train.epochs=2", f"checkpoint.dir={tmp_path}"]
    ended = start_ranks("ochat_train.train", *options, code=STOPPED).end()
    assert [code for code, _ in ended] == [75, 75], ended
    assert "the evaluation was left on request; the same command begins with it" in ended[0][1]
    assert events(tmp_path, "eval") == []
    ended = start_ranks("ochat_train.train", *options).end()
    assert [code for code, _ in ended] == [0, 0], ended
    assert [event["epoch"] for event in events(tmp_path, "eval")] == [0, 1]
    assert len(list((tmp_path / "checks").iterdir())) == 2
