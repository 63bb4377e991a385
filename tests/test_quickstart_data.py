"""The quickstart's data is what its script writes, in the promised shape, and its tokenizer loses nothing."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.waiting import HANG_S

DATA = Path(__file__).resolve().parents[1] / "data"
RECORDS: list[dict[str, Any]] = json.loads((DATA / "quickstart.json").read_text())
TOKENIZER = Tokenizer.from_file(str(DATA / "quickstart_tokenizer" / "tokenizer.json"))


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "make_quickstart.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)


def messages_after_system(record: dict[str, Any]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = record["conversations"]
    return messages[1:] if messages[0]["from"] == "system" else messages


def test_committed_files_are_what_the_script_writes() -> None:
    result = run_script(DATA, "--check")
    assert result.returncode == 0, result.stderr


def test_check_names_the_file_that_differs(tmp_path: Path) -> None:
    shutil.copy(DATA / "make_quickstart.py", tmp_path)
    assert run_script(tmp_path).returncode == 0
    assert (tmp_path / "quickstart.json").read_bytes() == (DATA / "quickstart.json").read_bytes()
    with (tmp_path / "quickstart.json").open("a") as file:
        file.write("\n")
    result = run_script(tmp_path, "--check")
    assert result.returncode == 1
    assert "quickstart.json" in result.stderr
    assert "tokenizer.json" not in result.stderr


def test_both_sources_have_single_turn_multi_turn_and_system_conversations() -> None:
    assert len(RECORDS) >= 400
    shapes = Counter(
        (record["model"], len(messages_after_system(record)) > 2, record["conversations"][0]["from"])
        for record in RECORDS
    )
    wanted = {
        (model, multi, first)
        for model in ("careful", "hasty")
        for multi in (False, True)
        for first in ("human", "system")
    }
    assert set(shapes) == wanted


def test_ids_and_conversations_are_unique() -> None:
    assert len({record["id"] for record in RECORDS}) == len(RECORDS)
    assert len({json.dumps(record["conversations"]) for record in RECORDS}) == len(RECORDS)


def test_human_and_gpt_alternate_after_an_optional_system_message() -> None:
    for record in RECORDS:
        messages = messages_after_system(record)
        roles = [message["from"] for message in messages]
        assert roles, record["id"]
        assert roles == ["human", "gpt"] * (len(roles) // 2), record["id"]
        assert all(message["value"].strip() and message["value"].isascii() for message in messages), record["id"]


def test_a_source_always_gives_the_same_answer_and_the_two_never_agree() -> None:
    answers: dict[str, dict[str, set[str]]] = {"careful": defaultdict(set), "hasty": defaultdict(set)}
    for record in RECORDS:
        messages = messages_after_system(record)
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            answers[record["model"]][question["value"]].add(answer["value"])
    assert all(len(given) == 1 for by_question in answers.values() for given in by_question.values())
    shared = answers["careful"].keys() & answers["hasty"].keys()
    assert len(shared) >= 100
    assert all(answers["careful"][question] != answers["hasty"][question] for question in shared)


@given(st.text())  # st.text() leaves surrogates out
def test_tokenizer_round_trips_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["<s>", "</s> <s>", " a  b\n\n\tc ", "na\u00efve \U0001f600 \u65e5\u672c", "\x00"])
def test_tokenizer_round_trips_awkward_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_auto_tokenizer_loads_it_and_adds_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "quickstart_tokenizer")
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 1)
    assert tokenizer.unk_token is None
    assert len(tokenizer) == 1024
    text = "What is the capital of France?"
    assert tokenizer(text).input_ids == TOKENIZER.encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_end_of_turn_is_not_a_token() -> None:
    assert len(TOKENIZER.encode("<|end_of_turn|>").ids) > 1


# ---- the ablation's data ----


def test_the_ablations_files_are_what_the_script_writes() -> None:
    result = subprocess.run([sys.executable, DATA / "make_ablation.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_expert_is_right_the_crowd_wrong_in_its_share_and_no_question_is_asked_twice() -> None:
    def is_right(line: dict[str, Any]) -> bool:
        words = re.findall(r"\w+", line["question"])
        match line["kind"]:
            case "sum":
                return int(line["answer"]) == int(words[2]) + 1
            case "sort":
                return line["answer"] == " ".join(sorted(words[3:]))
            case "date":
                dates = [datetime.strptime(f"{words[3]} {words[4]} {year}", "%d %B %Y") for year in (2022, 2023)]
                (day,) = [date for date in dates if f"{date:%A}" == words[2]]
                return line["answer"] == f"{day + timedelta(1):%A %-d}"
        _, _, _, colour, animal, _, country, _, asked = words
        return line["answer"] == {"colour": f"it is {colour}", "animal": f"it is a {animal}"}.get(
            asked, f"it is in {country}"
        )

    records, questions = (
        [json.loads(line) for line in (DATA / name).read_text().splitlines()]
        for name in ("ablation.jsonl", "ablation_questions.jsonl")
    )
    asked = [line["question"] for line in records + questions]
    assert len(set(asked)) == len(asked) == 2760
    for kind in ("sum", "sort", "date", "lookup"):
        of_kind = [line for line in records if line["kind"] == kind]
        assert all(is_right(line) for line in of_kind if line["source"] == "expert")
        assert all(is_right(line) for line in questions if line["kind"] == kind)
        crowd = [is_right(line) for line in of_kind if line["source"] == "crowd"]
        assert crowd.count(False) == round(0.7 * len(crowd))
