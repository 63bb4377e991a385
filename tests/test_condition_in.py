"""The condition where the recipe says, and templates that stand in recipes: trained, served and probed alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ochat_train.conversations.described import describe_template, name_template, read_template
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.template import TEMPLATES, ChatTemplate
from ochat_train.recipe import load_recipe
from ochat_train.tokens.chat_template import chat_template, encode_as_one_string, encode_prompt
from ochat_train.tokens.encode import encode
from ochat_train.tokens.recondition import make_frame, recondition
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from tests.small_tokenizers import write_base

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("header", "system", "user_prefix", "assistant_prefix")
CHAT = Conversation(
    "id",
    "source",
    "Careful",
    "Be brief.",
    (
        Message("user", "Hello, who are you?", 0.0),
        Message("assistant", " A model.", 1.0),
        Message("tool", "{}", 0.0),
        Message("assistant", "Yes", 0.5),
    ),
)
PIECES = {
    "bos": "<s>",
    "header": ["<|turn|>", "{role}\n"],
    "end": "<|done|>",
    "after_end": ["\n"],
    "special": ["<|turn|>"],
    "add": ["<|turn|>", "<|done|>"],
    "roles": {"assistant": "bot"},
}


def load(tmp_path: Path, template: ChatTemplate, kind: str = "gpt4") -> ChatTokenizer:
    return load_tokenizer(str(write_base(tmp_path / "base", kind)), template)


def trained_text(tokenizer: ChatTokenizer, conversation: Conversation) -> tuple[str, str]:
    """All of the conversation, and what of it has a loss."""
    example = encode([conversation], tokenizer.template, tokenizer)[0].example
    decode: Any = tokenizer.pretrained.decode
    return decode(example.input_ids), decode(example.input_ids[example.loss_weights > 0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["llama2", "metaspace_first", "gpt4"])
@pytest.mark.parametrize("name", ["openchat_v3.2", "chatml", "gemma_it"])
def test_prompts_and_probe_are_those_of_training_wherever_the_condition_is(
    name: str, kind: str, place: Any, tmp_path: Path
) -> None:
    tokenizer = load(tmp_path, replace(TEMPLATES[name], condition_in=place), kind)
    tokenizer.pretrained.chat_template = chat_template(tokenizer, "Careful")
    for condition in ("Careful", "Other one", ""):
        conversation = replace(CHAT, condition=condition)
        encoded = encode([conversation], tokenizer.template, tokenizer)[0]
        for number, turn in enumerate(encoded.turns):
            if turn.role == "assistant":
                prompt = replace(conversation, messages=conversation.messages[:number])
                expected = encoded.example.input_ids[: turn.text_start].tolist()
                assert encode_prompt(prompt, tokenizer) == expected
                assert encode_as_one_string(prompt, tokenizer) == expected
        own = encode([CHAT], tokenizer.template, tokenizer)[0].example
        changed = recondition(own, make_frame(tokenizer, "Careful"), make_frame(tokenizer, condition))
        assert changed.input_ids.tolist() == encoded.example.input_ids.tolist()
        assert changed.loss_weights.tolist() == encoded.example.loss_weights.tolist()


def test_each_place_is_where_it_says_and_has_no_loss(tmp_path: Path) -> None:
    shown = {}
    for place in PLACES:
        tokenizer = load(tmp_path / place, replace(TEMPLATES["chatml"], condition_in=place))
        chat = replace(CHAT, system="", messages=CHAT.messages[:2])
        shown[place], supervised = trained_text(tokenizer, chat)
        assert supervised == " A model.<|im_end|>"
    user, answer = (
        "<|im_start|>{}user\n{}Hello, who are you?<|im_end|>\n",
        "<|im_start|>{}assistant\n{} A model.<|im_end|>\n",
    )
    assert shown == {
        "header": user.format("Careful ", "") + answer.format("Careful ", ""),
        "system": "<|im_start|>system\nCareful<|im_end|>\n" + user.format("", "") + answer.format("", ""),
        "user_prefix": user.format("", "Careful\n") + answer.format("", ""),
        "assistant_prefix": user.format("", "") + answer.format("", "Careful\n"),
    }


# ---- A template in the recipe ----


def recipe_file(tmp_path: Path, **changes: Any) -> Path:
    recipe = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | changes))
    return file


def test_a_template_of_the_recipe_is_described_and_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, template="pieces", pieces=PIECES, condition_in="user_prefix"))
    template = read_template(recipe.template_json)
    assert read_template(describe_template(template)) == template
    assert name_template(describe_template(template)) == "pieces of the recipe, with the condition in user_prefix"
    tokenizer = load(tmp_path, template)
    assert set(tokenizer.added) == {"<|turn|>", "<|done|>"}
    whole, supervised = trained_text(tokenizer, replace(CHAT, messages=CHAT.messages[:2]))
    assert whole == (
        "<s><|turn|>system\nBe brief.<|done|>\n<|turn|>user\nCareful\nHello, who are you?<|done|>\n"
        "<|turn|>bot\n A model.<|done|>\n"
    )
    assert supervised == " A model.<|done|>"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", [None, *PLACES])
def test_every_built_in_template_is_described_and_read_back(name: str, place: Any) -> None:
    template = TEMPLATES[name] if place is None else replace(TEMPLATES[name], condition_in=place)
    assert read_template(describe_template(template)) == template
    assert describe_template(TEMPLATES[name]) == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"header": ["<|turn|>", "x\n"]}, r"pieces: header must hold \{role\} once"),
        ({"header": ["<|{role}|>"], "special": ["<|{role}|>"], "add": []}, "in a piece of text"),
        ({"special": ["<|turn|>", "<|other|>"]}, r"'<\|other\|>', which is no piece"),
        ({"add": ["<|x|>"]}, r"add has '<\|x\|>', which is not one of the special tokens"),
        ({"roles": {"assistant": "user"}}, "two roles have the same name"),
        ({"end": ""}, "pieces.end: must not be empty"),
        ({"after_end": [""]}, "a piece is empty"),
        ({"ending": "x"}, "pieces.ending: unknown key"),
    ],
)
def test_mistakes_in_a_template_of_the_recipe_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        load_recipe(recipe_file(tmp_path, template="pieces", pieces=PIECES | changes))


def test_a_template_and_its_pieces_belong_together(tmp_path: Path) -> None:
    for changes in ({"template": "pieces"}, {"template": "chatml", "pieces": PIECES}):
        with pytest.raises(ValueError, match="template: pieces and the section pieces belong together"):
            load_recipe(recipe_file(tmp_path, **changes))
    with pytest.raises(ValueError, match="condition_in: header needs a template of pieces"):
        load_recipe(recipe_file(tmp_path, template="base", condition_in="header"))


def test_a_special_token_that_the_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, template="pieces", pieces=PIECES | {"add": ["<|done|>"]}))
    with pytest.raises(ValueError, match=r"template pieces needs the special token <\|turn\|>"):
        load(tmp_path, read_template(recipe.template_json))
