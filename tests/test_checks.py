"""The checks of a recipe: their questions are read, their functions called, and leaks into the training data named."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from transformers import AutoConfig

from ochat_train.conversations.described import read_template
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.text_part import auto_class, base_of, keep_text_part
from ochat_train.recipe import CheckSection
from ochat_train.tokens.leaks import find_leaks
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from ochat_train.training.checks import Checker
from ochat_train.training.engine import Failed, World, join_process_group
from ochat_train.training.generate import Answer, GreedyDecoder, Prompt
from ochat_train.training.interval import wilson_interval
from ochat_train.training.questions import encode_questions, read_checks, score_answer
from tests.base_templates import DEFAULT_SYSTEM
from tests.dumps import chat, make, source, write_lines, write_recipe
from tests.small_tokenizers import write_base

ALONE = World(0, 1, 0, torch.device("cpu"))


def write_questions(folder: Path, *records: Any) -> str:
    file = folder / "questions.jsonl"
    file.write_bytes(b"\n".join(map(orjson.dumps, records)))
    return str(file)


def section(questions: str, check: str, **others: Any) -> CheckSection:
    return CheckSection(name="sums", questions=questions, check=check, **others)


FUNCTIONS = """
def share(text, record):
    return len(set(text.split()) & set(record["words"])) / len(record["words"])
def broken(text, record):
    return record["no such field"]
def above(text, record):
    return 2
"""


@pytest.mark.parametrize(
    ("check", "options", "right", "wrong"),
    [
        ("exact_match", {}, " 12\n", "It is 12"),
        ("regex", {"pattern": r"is \d+"}, "It is 5", "It is five"),
        ("regex", {"pattern": r"is (\d+)"}, "It is 5, no, it is 12", "It is 12, no, it is 5"),
        ("FILE:share", {}, "twelve 12", "none"),
    ],
)
def test_answers_are_scored(tmp_path: Path, check: str, options: Any, right: str, wrong: str) -> None:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    questions = write_questions(tmp_path, {"question": "How many?", "answer": 12, "words": ["12", "twelve"]})
    (found,) = read_checks([section(questions, check.replace("FILE", str(file)), **options)])
    assert [score_answer(found, text, 0) for text in (right, wrong)] == [1.0, 0.0]


def test_a_pattern_of_the_record_comes_before_that_of_the_recipe(tmp_path: Path) -> None:
    questions = write_questions(tmp_path, {"question": "Which?", "pattern": "^red$"})
    (found,) = read_checks([section(questions, "regex", pattern="blue")])
    assert [score_answer(found, text, 0) for text in ("red", "blue")] == [1.0, 0.0]


def test_math_is_compared_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = write_questions(tmp_path, {"question": "1 / 2?", "answer": "1/2"})
    if importlib.util.find_spec("math_verify") is not None:
        (found,) = read_checks([section(questions, "math")])
        texts = ("It is $\\frac{1}{2}$.", "The answer is 0.5", "It is 2.")
        assert [score_answer(found, text, 0) for text in texts] == [1.0, 1.0, 0.0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"eval.checks.0: check: math needs .* math-verify"):
        read_checks([section(questions, "math")])


@pytest.mark.parametrize(
    ("lines", "check", "told"),
    [
        ([{"question": "Hi", "answer": 1}], "no_such_module:f", "module cannot be loaded: ModuleNotFoundError"),
        ([{"question": "Hi", "answer": 1}], "nowhere.py:f", "there is no file nowhere.py"),
        ([{"question": "Hi", "answer": 1}], "operator:nothing", "the module has no function nothing"),
        ([{"question": "Hi", "answer": 1}], "FILE:broken", "fails for the first question .* KeyError"),
        ([{"question": "Hi", "answer": 1}], "FILE:above", "the score 2 is not from 0 to 1"),
        ([{"question": "Hi"}], "exact_match", "line 1 has no answer, which exact_match needs"),
        ([{"question": "Hi"}], "regex", "neither the record nor the recipe has a pattern"),
        ([{"question": "Hi", "answer": 1}, {"answer": 1}], "exact_match", "line 2 is no question: 'question'"),
        ([{"messages": [{"role": "assistant", "content": "Hi"}]}], "exact_match", "its last message is not the user's"),
        ([], "exact_match", "has no questions"),
    ],
)
def test_a_mistake_is_a_line_before_training(tmp_path: Path, lines: Any, check: str, told: str) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    asked = section(write_questions(tmp_path, *lines), check.replace("FILE", str(tmp_path / "functions.py")))
    with pytest.raises(ValueError, match=told) as raised:
        read_checks([asked])
    assert str(raised.value).startswith("eval.checks.0") and "\n" not in str(raised.value)


def test_questions_are_asked_under_each_condition_within_the_models_positions(
    tmp_path: Path, quickstart: ChatTokenizer
) -> None:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    checks = read_checks([section(write_questions(tmp_path, {"messages": messages}), "operator:eq", max_new_tokens=9)])
    asked = encode_questions(checks, quickstart, ["A", "B"], max_positions=100)
    assert [(one.condition, one.question) for one in asked] == [("A", "Hi"), ("B", "Hi")]
    assert "B User:Bye" in quickstart.pretrained.decode(asked[1].prompt)
    with pytest.raises(ValueError, match=r"question 1: \d+ tokens and max_new_tokens 9 are above the model's 20"):
        encode_questions(checks, quickstart, ["A"], max_positions=20)


@pytest.mark.parametrize("base", [False, True], ids=["pieces", "base"])
def test_questions_among_the_training_prompts_are_found(tmp_path: Path, base: bool) -> None:
    """Short and long, in later turns, under other conditions; not what only begins or ends alike, nor an answer."""
    dump = write_lines(
        tmp_path / "dump.jsonl",
        [
            chat("first", "What is 2 + 2?", "4", "And now?", "Nothing"),
            chat("longer", "What is 2 + 22? Please", "24"),
            chat("short", "Hi", "What is 3 + 3?"),
        ],
    )
    recipe = write_recipe(tmp_path, [source("s", dump)])
    overrides = (
        ["template=base", f"tokenizer={write_base(tmp_path / 'base', 'gpt4', chat_template=DEFAULT_SYSTEM)}"]
        if base
        else []
    )
    store = TokenStore(make(recipe, *overrides))
    tokenizer = load_tokenizer(str(tmp_path / "store/tokenizer"), read_template(store.manifest.template))
    questions = ["What is 2 + 2?", "And now?", "What is 2 + 22?", "Hi", "What is 3 + 3?", "Nothing", "What"]
    assert find_leaks(store, questions, tokenizer) == {"What is 2 + 2?": "first", "And now?": "first", "Hi": "short"}


def test_the_interval_is_wilsons() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20."""
    for count, num, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert np.allclose(wilson_interval(count / num, num), (low, high), atol=5e-5)


# ------------------------------------------------------------------------------------------------- generation

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "sliding_window": 8},
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "a text part": {"model_type": "mistral", "sliding_window": 8},
}
# Of the encoder beside the text part.
PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "alone"])
def test_answers_are_those_of_each_prompt_alone_without_a_cache(
    family: str, attention: str, quickstart: ChatTokenizer
) -> None:
    join_process_group(ALONE)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SMALL | FAMILIES[family], vocab_size=quickstart.num_ids, dtype="float32")
    if family == "a text part":
        config = AutoConfig.for_model("mistral3", text_config=config, vision_config=PIXTRAL, dtype="float32")
    lm = auto_class(config).from_config(config)
    naive = auto_class(config).from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    naive.load_state_dict(lm.state_dict())
    lm = keep_text_part(lm)
    packed = PackedCausalLM(lm, attention=attention, device_type="cpu", checkpointing="full", num_conditions=1)
    packed.train()
    before = (base_of(lm).config._attn_implementation, lm.generation_config, [part.forward for part in lm.modules()])
    texts = ["Hi", "Who are you?", "Name three colours of the rainbow, please.", "Why?", "Hm", "Say it."]
    prompts = [
        Prompt(ids.tolist(), 8 if number < 4 else 5) for number, ids in enumerate(quickstart.encode_texts(texts))
    ]
    expected = {}
    for place, prompt in enumerate(prompts):
        ids = list(prompt.ids)
        with torch.no_grad():
            while len(ids) < len(prompt.ids) + prompt.max_new_tokens and ids[-1] != quickstart.end_id:
                ids.append(int(naive(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        text = quickstart.pretrained.decode(ids[len(prompt.ids) :], skip_special_tokens=True)
        expected[place] = Answer(text, ids[-1] != quickstart.end_id)
    counts: list[int] = []
    decoder = GreedyDecoder(packed, quickstart, capacity=100, world=ALONE)
    assert dict(decoder.answers(prompts, counts.append)) == expected
    assert sum(counts) == len(prompts) and len({answer.text for answer in expected.values()}) > 4
    assert packed.training and before[:2] == (base_of(lm).config._attn_implementation, lm.generation_config)
    assert before[2] == [module.forward for module in lm.modules()]


def test_a_model_that_does_not_generate_ends_the_run_before_its_first_step(
    tmp_path: Path, quickstart: ChatTokenizer
) -> None:
    join_process_group(ALONE)
    config = AutoConfig.for_model(**SMALL | FAMILIES["llama"], vocab_size=quickstart.num_ids, dtype="float32")
    lm = auto_class(config).from_config(config)
    packed = PackedCausalLM(lm, attention="sdpa", device_type="cpu", checkpointing="none", num_conditions=1)
    checks = read_checks([section(write_questions(tmp_path, {"question": "Hi", "answer": "12"}), "exact_match")])
    asked = encode_questions(checks, quickstart, ["GPT4"], max_positions=512)
    checker = Checker(asked, GreedyDecoder(packed, quickstart, 100, ALONE), tmp_path)
    checker.try_out()
    lm.set_input_embeddings(torch.nn.Embedding(2, SMALL["hidden_size"]))  # the first token of a prompt is not in it
    with pytest.raises(Failed, match=r"eval.checks: .* \(IndexError: .*\); eval.checks=\[\] trains without"):
        checker.try_out()
    assert packed.training and not list(tmp_path.glob("step-*"))
