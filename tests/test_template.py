"""Every template's pieces, as OpenChat publishes them, and a Jinja template that gives the same ids."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, TemplateError

from ochat_train.conversations.clean import clean_turns
from ochat_train.conversations.records import read_chunks
from ochat_train.conversations.schema import Conversation, Message, ParsedRecord, Record, Role
from ochat_train.conversations.sharegpt import parse_record
from ochat_train.conversations.sources import Source, assign_source
from ochat_train.conversations.template import TEMPLATES, ChatTemplate, Joint
from ochat_train.tokens.chat_template import chat_template
from ochat_train.tokens.encode import encode
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from tests.small_tokenizers import CLASSES, TEXTS, write_base

ROOT = Path(__file__).resolve().parents[1]

# What the model card prints for V3.2 SUPER, by the text that it tokenizes.
CARD_TURNS: dict[str, tuple[tuple[Role, str], ...]] = {
    "GPT4 User: Hello<|end_of_turn|>GPT4 Assistant:": (("user", "Hello"),),
    "GPT4 User: Hello<|end_of_turn|>GPT4 Assistant: Hi<|end_of_turn|>"
    "GPT4 User: How are you today?<|end_of_turn|>GPT4 Assistant:": (
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "How are you today?"),
    ),
}
CARD_LENGTHS = (14, 33)


def talk(*turns: tuple[Role, str], condition: str = "", system: str = "") -> Conversation:
    """A conversation in which only the assistant's turns have a weight, of 1."""
    messages = tuple(Message(role, text, 1.0 if role == "assistant" else 0.0) for role, text in turns)
    return Conversation("id", "source", condition, system, messages)


def pieces(name: str, conversation: Conversation, **options: bool) -> list[tuple[str, bool]]:
    """Text of each segment, and whether it is a special token."""
    return [(segment.text, segment.is_special) for segment in TEMPLATES[name].segments(conversation, **options)]


def special(text: str) -> tuple[str, bool]:
    return text, True


def plain(text: str) -> tuple[str, bool]:
    return text, False


def jinja_ids(tokenizer: ChatTokenizer, source: str, conversation: Conversation, **options: Any) -> list[int]:
    messages = [{"role": message.role, "content": message.text} for message in conversation.messages]
    if conversation.system:
        messages.insert(0, {"role": "system", "content": conversation.system})
    return list(tokenizer.pretrained.apply_chat_template(messages, chat_template=source, return_dict=False, **options))


def reply_ids(tokenizer: ChatTokenizer, conversation: Conversation) -> list[int]:
    """The ids with which the model is asked, piece by piece."""
    ids: list[int] = []
    for segment in tokenizer.template.segments(conversation, for_reply=True):
        is_special = segment.is_special
        ids += (
            [tokenizer.special_ids[segment.text]] if is_special else tokenizer.encode_texts([segment.text])[0].tolist()
        )
    return ids


def card_ids(shared: Path) -> dict[str, list[int]]:
    card = (shared / "seed/openchat_v3.2_super_model_card.txt").read_text(encoding="utf-8")
    found = re.findall(r'tokenize\("(.*?)"\)\s*\|?\s*\n\|?\s*# Result: \[(.*?)\]', card)
    return {text: [int(id_) for id_ in ids.split(",")] for text, ids in found}


# ---- The model card ----


def test_the_ids_of_the_model_card_come_out_piece_by_piece_and_through_jinja(
    shared: Path, llama2: ChatTokenizer
) -> None:
    expected = card_ids(shared)
    assert list(expected) == list(CARD_TURNS)
    assert tuple(map(len, expected.values())) == CARD_LENGTHS
    source = chat_template(llama2, "GPT4")
    for text, turns in CARD_TURNS.items():
        conversation = talk(*turns, condition="GPT4")
        assert reply_ids(llama2, conversation) == expected[text]
        asked = jinja_ids(llama2, source, conversation, add_generation_prompt=True)
        assert asked == expected[text]
        assert llama2.pretrained(text)["input_ids"] == expected[text]


def test_a_saved_and_reloaded_tokenizer_still_gives_the_ids_of_the_model_card(
    shared: Path, llama2: ChatTokenizer, tmp_path: Path
) -> None:
    llama2.save(tmp_path)
    reloaded = load_tokenizer(str(tmp_path), TEMPLATES["openchat_v3.2"])
    source = chat_template(reloaded, "GPT4")
    assert source == chat_template(llama2, "GPT4")
    for text, expected in card_ids(shared).items():
        conversation = talk(*CARD_TURNS[text], condition="GPT4")
        assert reply_ids(reloaded, conversation) == expected
        assert jinja_ids(reloaded, source, conversation, add_generation_prompt=True) == expected
        assert reloaded.pretrained(text)["input_ids"] == expected


# ---- The pieces ----

ALL_ROLES: tuple[tuple[Role, str], ...] = (
    ("user", "Hi"),
    ("assistant", " Hello "),
    ("system", "Be brief."),
    ("user", "Sum?"),
    ("tool", "{}"),
    ("assistant", "3\n"),
)


@pytest.mark.parametrize("name", ["openchat_v3.2", "openchat_v3.2_mistral"])
def test_openchat_v3_2_puts_the_condition_in_front_of_each_role(name: str) -> None:
    end = special("<|end_of_turn|>")
    assert pieces(name, talk(*ALL_ROLES, condition="GPT4 Correct", system="You are kind.")) == [
        special("<s>"),
        *(plain("You are kind."), end),
        *(plain("GPT4 Correct User:"), plain("Hi"), end),
        *(plain("GPT4 Correct Assistant:"), plain(" Hello "), end),
        *(plain("Be brief."), end),
        *(plain("GPT4 Correct User:"), plain("Sum?"), end),
        *(plain("GPT4 Correct Tool:"), plain("{}"), end),
        *(plain("GPT4 Correct Assistant:"), plain("3\n"), end),
    ]


@pytest.mark.parametrize("condition", ["", "  "])
def test_an_empty_condition_leaves_no_space(condition: str) -> None:
    end = special("<|end_of_turn|>")
    conversation = talk(("user", "Hi"), condition=condition)
    expected = [special("<s>"), plain("User:"), plain("Hi"), end, plain("Assistant:")]
    assert pieces("openchat_v3.2", conversation, for_reply=True) == expected
    assert pieces("chatml", conversation)[1] == plain("user\n")
    assert pieces("openchat_3.6", conversation)[2] == plain("User")


def test_openchat_v3_1_says_the_condition_first_and_once() -> None:
    end = special("<|end_of_turn|>")
    turns = [
        *(plain("You are kind."), end),
        *(plain("User:"), plain("Hi"), end),
        *(plain("Assistant:"), plain(" Hello "), end),
        *(plain("Be brief."), end),
        *(plain("User:"), plain("Sum?"), end),
        *(plain("Tool:"), plain("{}"), end),
        *(plain("Assistant:"), plain("3\n"), end),
    ]
    with_condition = talk(*ALL_ROLES, condition="GPT4", system="You are kind.")
    assert pieces("openchat_v3.1", with_condition) == [special("<s>"), plain("Assistant is GPT4"), end, *turns]
    assert pieces("openchat_v3.1", talk(*ALL_ROLES, system="You are kind.")) == [special("<s>"), *turns]


def test_openchat_3_6_has_headers_and_a_system_turn_without_condition() -> None:
    def turn(name: str, text: str) -> list[tuple[str, bool]]:
        header = [special("<|start_header_id|>"), plain(name), special("<|end_header_id|>"), plain("\n\n")]
        return [*header, plain(text), special("<|eot_id|>")]

    conversation = talk(*ALL_ROLES, condition="GPT4 Correct", system="You are kind.")
    assert pieces("openchat_3.6", conversation, for_reply=True) == [
        special("<|begin_of_text|>"),
        *turn("System", "You are kind."),
        *turn("GPT4 Correct User", "Hi"),
        *turn("GPT4 Correct Assistant", " Hello "),
        *turn("System", "Be brief."),
        *turn("GPT4 Correct User", "Sum?"),
        *turn("GPT4 Correct Tool", "{}"),
        *turn("GPT4 Correct Assistant", "3\n"),
        *turn("GPT4 Correct Assistant", "")[:4],
    ]


def test_chatml_has_a_line_end_after_each_end_token_and_no_bos() -> None:
    def turn(name: str, text: str) -> list[tuple[str, bool]]:
        return [special("<|im_start|>"), plain(f"{name}\n"), plain(text), special("<|im_end|>"), plain("\n")]

    conversation = talk(*ALL_ROLES, condition="Careful", system="You are kind.")
    assert pieces("chatml", conversation, for_reply=True) == [
        *turn("system", "You are kind."),
        *turn("Careful user", "Hi"),
        *turn("Careful assistant", " Hello "),
        *turn("system", "Be brief."),
        *turn("Careful user", "Sum?"),
        *turn("Careful tool", "{}"),
        *turn("Careful assistant", "3\n"),
        *turn("Careful assistant", "")[:2],
    ]


def test_special_tokens_are_listed_once_each_and_the_end_token_may_always_be_added() -> None:
    assert {name: template.special_tokens for name, template in TEMPLATES.items()} == {
        "openchat_v3.2": ("<s>", "<|end_of_turn|>"),
        "openchat_v3.1": ("<s>", "<|end_of_turn|>"),
        "openchat_v3.2_mistral": ("<s>", "<|end_of_turn|>"),
        "openchat_3.5": ("<s>", "<|end_of_turn|>"),
        "openchat_v3.2_gemma_new": ("<bos>", "<end_of_turn>"),
        "llama3_instruct": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "gemma_it": ("<bos>", "<end_of_turn>", "<start_of_turn>"),
        "zephyr_mistral": ("<s>", "</s>"),
        "openchat_3.6": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "chatml": ("<|im_end|>", "<|im_start|>"),
    }
    assert all(template.end_token in template.addable for template in TEMPLATES.values())


# ---- The weights ----


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_only_the_answers_and_their_end_tokens_carry_weight(template: ChatTemplate) -> None:
    conversation = talk(*ALL_ROLES, condition="GPT4", system="You are kind.")
    weighted = [segment for segment in template.segments(conversation) if segment.weight]
    answers = [" Hello ", template.end_token, "3\n", template.end_token]
    assert [(segment.text, segment.weight) for segment in weighted] == [(text, 1.0) for text in answers]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_weight_of_its_own_is_carried_on_any_role(template: ChatTemplate) -> None:
    weights: dict[Role, float | None] = {"user": 0.5, "assistant": 0.25, "system": 0.125, "tool": None}
    messages = tuple(Message(role, f"text of {role}", weight) for role, weight in weights.items())
    segments = list(template.segments(Conversation("id", "source", "GPT4", "", messages)))
    for role, weight in weights.items():
        position = [segment.text for segment in segments].index(f"text of {role}")
        assert [segment.weight for segment in segments[position : position + 2]] == [weight or 0.0] * 2
        assert segments[position + 1].text == template.end_token
    assert sum(segment.weight for segment in segments) == 2 * (0.5 + 0.25 + 0.125)


# ---- Jinja ----


def records(file: str) -> Iterator[Record]:
    return (record for chunk in read_chunks([file]) for record in chunk.records())


def quickstart_conversations(_: Path) -> Iterator[Conversation]:
    for record in records(str(ROOT / "data/quickstart.json")):
        condition = {"careful": "Careful", "hasty": "Hasty"}[record.fields["model"]]
        yield as_conversation(record, condition)


def identity_conversations(shared: Path) -> Iterator[Conversation]:
    for record in records(str(shared / "data/identity_sharegpt.json")):
        yield as_conversation(record, "GPT4")


def tool_conversations(shared: Path) -> Iterator[Conversation]:
    for record in records(str(shared / "data/toolcall_sharegpt.json")):
        yield as_conversation(record, "GPT4")


def as_conversation(record: Record, condition: str) -> Conversation:
    parsed = parse_record(record, default_id=f"{record.offset}")
    assert isinstance(parsed, ParsedRecord)
    turns = clean_turns(parsed, html="never")
    assert isinstance(turns, ParsedRecord)
    return assign_source(turns, Source("source", condition, 1.0, {}, {}))


def with_condition(conversation: Conversation, condition: str) -> Conversation:
    return Conversation(conversation.id, conversation.source, condition, conversation.system, conversation.messages)


@pytest.mark.parametrize("read", [quickstart_conversations, identity_conversations, tool_conversations])
@pytest.mark.parametrize("tokenizer_name", ["llama2", "quickstart", "quickstart_chatml"])
def test_jinja_gives_the_ids_of_training_for_whole_files(
    read: Callable[[Path], Iterator[Conversation]], tokenizer_name: str, shared: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(tokenizer_name)
    default = "Some default"
    source = chat_template(tokenizer, default)
    conversations = list(read(shared))
    assert len(conversations) >= 300
    for condition, options in (
        (None, None),  # its own
        ("", {"condition": ""}),
        (default, {}),
    ):
        asked = conversations if condition is None else [with_condition(each, condition) for each in conversations]
        trained = encode(asked, tokenizer.template, tokenizer)
        for conversation, encoded in zip(asked, trained, strict=True):
            given = {"condition": conversation.condition} if options is None else options
            served = jinja_ids(tokenizer, source, conversation, **given)
            assert served == encoded.example.input_ids.tolist(), conversation.id


@pytest.mark.parametrize("name", ["openchat_v3.1", "openchat_v3.2_mistral"])
def test_jinja_gives_the_ids_of_training_for_the_other_llama_2_templates(name: str, shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "fixtures/llama2-tokenizer"), TEMPLATES[name])
    source = chat_template(tokenizer, TEMPLATES[name].inference_condition)
    for conversation in list(quickstart_conversations(shared))[:60]:
        for condition in ("", "GPT3"):
            asked = with_condition(conversation, condition)
            trained = encode([asked], tokenizer.template, tokenizer)[0].example.input_ids.tolist()
            assert jinja_ids(tokenizer, source, asked, condition=condition) == trained
        trained = reply_ids(tokenizer, with_condition(conversation, TEMPLATES[name].inference_condition))
        assert jinja_ids(tokenizer, source, conversation, add_generation_prompt=True) == trained


@pytest.mark.parametrize(
    "condition", ["it's", 'so "called"', "back\\slash", "two\nlines", "{{ 7 }}{% x %}", "größer 漢"]
)
def test_a_condition_with_signs_of_jinja_arrives_as_it_is(condition: str, quickstart_chatml: ChatTokenizer) -> None:
    source = quickstart_chatml.template.jinja(condition, joint=Joint())
    conversation = talk(("user", "Hi"), condition=condition)
    text = quickstart_chatml.pretrained.apply_chat_template(
        [{"role": "user", "content": "Hi"}], chat_template=source, tokenize=False
    )
    assert text == "".join(segment.text for segment in quickstart_chatml.template.segments(conversation))


@pytest.mark.parametrize("text", ["  two spaces ", "tab\t", "\u00a0", "a\r\nb", "{{ x }}", "'\\n"])
def test_jinja_does_not_trim_or_change_what_is_said(text: str, quickstart: ChatTokenizer) -> None:
    conversation = talk(("user", text), ("assistant", text), condition="GPT4", system=text)
    trained = encode([conversation], quickstart.template, quickstart)[0].example.input_ids.tolist()
    assert jinja_ids(quickstart, chat_template(quickstart, "GPT4"), conversation) == trained


@pytest.fixture(params=CLASSES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The tokenizer of a base of each kind."""
    return str(write_base(tmp_path / "base", request.param))


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_the_mask_of_answers_are_those_of_training_for_tokenizers_of_every_kind(name: str, base: str) -> None:
    tokenizer = load_tokenizer(base, TEMPLATES[name])
    source = chat_template(tokenizer, "GPT4")
    for text in TEXTS:
        turns: list[tuple[Role, str]] = [("user", text), ("assistant", "Yes"), ("user", "No"), ("assistant", text)]
        conversation = talk(*turns, ("tool", text), ("assistant", ""), condition="GPT4", system=text)
        example = encode([conversation], tokenizer.template, tokenizer)[0].example
        messages = [{"role": role, "content": text} for role, text in [("system", text)] * bool(text)]
        messages += [{"role": message.role, "content": message.text} for message in conversation.messages]
        served = tokenizer.pretrained.apply_chat_template(
            messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
        assert served["input_ids"] == example.input_ids.tolist(), text
        assert served["assistant_masks"] == (example.loss_weights > 0).astype(int).tolist(), text


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_without_the_tag_of_transformers_plain_jinja_renders_the_same(
    template: ChatTemplate, quickstart: ChatTokenizer
) -> None:
    source = template.jinja("GPT4", joint=Joint(" ", " ", " ▁"))
    messages = [
        {"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), TEXTS[:3], strict=True)
    ]
    expected = quickstart.pretrained.apply_chat_template(messages, chat_template=source, tokenize=False)
    plain = re.sub(r"\{%-? (end)?generation -?%\}", "", source)  # as docs/serving.md says
    assert Environment().from_string(plain).render(messages=messages) == expected


@pytest.mark.parametrize("name", ["openchat_v3.2", "chatml"])
def test_parts_of_a_text_are_joined_as_they_are(name: str, shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "fixtures/llama2-tokenizer"), TEMPLATES[name])
    source = chat_template(tokenizer, "GPT4")

    def ids(content: object) -> list[int]:
        messages = [{"role": role, "content": content} for role in ("system", "user", "assistant")]
        return list(tokenizer.pretrained.apply_chat_template(messages, chat_template=source, return_dict=False))

    parts = [{"type": "text", "text": text} for text in (" Hi", " there", "", "\n!")]
    assert ids(parts) == ids(" Hi there\n!")
    assert ids([{"type": "text", "text": ""}]) == ids("")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}, "its type: image_url"),
        ({"content": [{"type": "text", "text": None}]}, "a part of a message is no text, its type: text"),
        ({"content": ["a"]}, "a part of a message is no text"),
        ({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "a message has no text, its role: assistant"),
        ({"content": []}, "a message has no text, its role: assistant"),
        ({}, "a message has no text, its role: assistant"),
    ],
    ids=["image", "null", "string", "call", "empty", "absent"],
)
def test_what_is_no_text_raises_in_jinja(
    message: dict[str, object], words: str, template: ChatTemplate, quickstart: ChatTokenizer
) -> None:
    source = template.jinja("GPT4", joint=Joint(" ", " ", " ▁"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", **message}]
    with pytest.raises(TemplateError, match=words):
        quickstart.pretrained.apply_chat_template(messages, chat_template=source, tokenize=False)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_role_that_is_unknown_raises_in_jinja(template: ChatTemplate, quickstart: ChatTokenizer) -> None:
    source = template.jinja("GPT4", joint=Joint())
    messages = [{"role": "narrator", "content": "Once upon a time"}]
    with pytest.raises(TemplateError, match="unknown role: narrator"):
        quickstart.pretrained.apply_chat_template(messages, chat_template=source, tokenize=False)
