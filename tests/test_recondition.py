"""An example under another condition is what encoding its conversation anew would give."""

from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ochat_train.conversations.schema import Conversation, Message, Role
from ochat_train.conversations.template import TEMPLATES
from ochat_train.tokens.encode import Encoded, Example, encode
from ochat_train.tokens.overlong import fit
from ochat_train.tokens.recondition import Reconditioned, Selected, make_frame, recondition
from ochat_train.tokens.store import Examples
from ochat_train.tokens.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parents[1]
LLAMA2 = ROOT.parent / "shared/fixtures/llama2-tokenizer"
TOKENIZERS = {
    "quickstart": pytest.param(ROOT / "data/quickstart_tokenizer", id="quickstart"),
    "llama2": pytest.param(
        LLAMA2, id="llama2", marks=pytest.mark.skipif(not LLAMA2.is_dir(), reason=f"needs {LLAMA2}")
    ),
}
every_template = pytest.mark.parametrize("template", TEMPLATES)
both_tokenizers = pytest.mark.parametrize("folder", TOKENIZERS.values())

CONDITIONS = st.sampled_from(["", "GPT4", "GPT4 Correct", "User", "Sloppy, and quick"])
SPELLED = st.sampled_from(["<|end_of_turn|>", "<s>", "<|im_end|>", "GPT4 User:", " User: ", "Assistant is GPT4", "\n"])
TEXTS = st.lists(SPELLED | st.text(max_size=12), max_size=5).map("".join)
ROLES: list[Role] = ["user", "assistant", "tool", "system"]


@st.composite
def messages(draw: st.DrawFn) -> Message:
    role = draw(st.sampled_from(ROLES))
    # Where system messages have no header, theirs must not begin like one: that is the one thing that is ambiguous.
    return Message(role, ("Note: " if role == "system" else "") + draw(TEXTS), draw(st.sampled_from([0.0, 0.3, 1.0])))


CONVERSATIONS = st.builds(
    Conversation,
    id=st.just("id"),
    source=st.just("source"),
    condition=CONDITIONS,
    system=st.just("") | TEXTS.map("Note: {}".format),
    messages=st.lists(messages(), min_size=1, max_size=6).map(tuple),
)


@cache
def tokenizer_for(folder: Path, template: str) -> ChatTokenizer:
    """A tokenizer with all special tokens of a template."""
    pretrained = AutoTokenizer.from_pretrained(folder)
    pretrained.add_tokens(list(TEMPLATES[template].special_tokens), special_tokens=True)
    return ChatTokenizer(pretrained, TEMPLATES[template])


def encode_one(tokenizer: ChatTokenizer, conversation: Conversation) -> Encoded:
    return encode([conversation], tokenizer.template, tokenizer)[0]


def assert_same(given: Example, expected: Example) -> None:
    assert given.input_ids.tolist() == expected.input_ids.tolist()
    assert given.loss_weights.tolist() == expected.loss_weights.tolist()
    assert (given.input_ids.dtype, given.loss_weights.dtype) == (np.int32, np.float32)


@every_template
@both_tokenizers
@given(conversation=CONVERSATIONS, condition=CONDITIONS)
@settings(max_examples=60, deadline=None)
def test_it_is_the_conversation_encoded_anew(
    folder: Path, template: str, conversation: Conversation, condition: str
) -> None:
    tokenizer = tokenizer_for(folder, template)
    example = encode_one(tokenizer, conversation).example
    own, other = make_frame(tokenizer, conversation.condition), make_frame(tokenizer, condition)
    changed = recondition(example, own, other)
    assert_same(changed, encode_one(tokenizer, replace(conversation, condition=condition)).example)
    assert_same(recondition(changed, other, own), example)


@every_template
@both_tokenizers
@given(
    conversation=CONVERSATIONS,
    condition=CONDITIONS,
    share=st.floats(0.2, 0.95),
    context_tokens=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_a_part_of_a_split_conversation_has_its_texts_under_the_other_headers(
    folder: Path, template: str, conversation: Conversation, condition: str, share: float, context_tokens: int
) -> None:
    tokenizer = tokenizer_for(folder, template)
    # A part may begin anywhere in a system message; where those have no header, it must not begin like one there.
    system_texts = [
        conversation.system,
        *(message.text for message in conversation.messages if message.role == "system"),
    ]
    assume(tokenizer.template.system_header or not any("User:" in text for text in system_texts))
    encoded = encode_one(tokenizer, conversation)
    anew = encode_one(tokenizer, replace(conversation, condition=condition))
    # The same parts, with the tokens' positions in the whole in place of their ids.
    numbered = replace(
        encoded, example=replace(encoded.example, input_ids=np.arange(encoded.edges[-1], dtype=np.int32))
    )
    cut = {"max_tokens": int(share * encoded.edges[-1]), "overlong": "split", "context_tokens": context_tokens}
    parts, positions = fit(encoded, **cut).examples, fit(numbered, **cut).examples  # type: ignore[arg-type]
    own, other = make_frame(tokenizer, conversation.condition), make_frame(tokenizer, condition)
    for part, numbers in zip(parts, positions, strict=True):
        changed = recondition(part, own, other)
        assert changed.input_ids.tolist() == moved(numbers.input_ids.tolist(), encoded, anew)
        is_trained, was_trained = changed.loss_weights > 0, part.loss_weights > 0
        assert changed.loss_weights[is_trained].tolist() == part.loss_weights[was_trained].tolist()
        assert changed.input_ids[is_trained].tolist() == part.input_ids[was_trained].tolist()
        assert_same(recondition(changed, other, own), part)


def moved(positions: list[int], encoded: Encoded, anew: Encoded) -> list[int]:
    """The ids of a part of `anew`, given which positions of `encoded` it has: headers whole, texts token by token."""

    def piece(position: int) -> int:
        return int(np.searchsorted(encoded.edges, position, side="right"))  # 0: prefix; 1 + 4 n: header of turn n

    ids: list[int] = []
    for number, run in groupby(positions, key=piece):
        start = int(anew.edges[number - 1]) if number else 0
        if number == 0 or number % 4 == 1:  # as long as the condition makes it
            ids += anew.example.input_ids[start : anew.edges[number]].tolist()
        else:
            offset = start - int(encoded.edges[number - 1])
            ids += [int(anew.example.input_ids[position + offset]) for position in run]
    return ids


def test_a_headerless_system_message_that_reads_like_a_header_is_taken_for_one() -> None:
    """What the docstring owns up to: the ids are those of a user turn."""
    tokenizer = tokenizer_for(ROOT / "data/quickstart_tokenizer", "openchat_v3.2")
    turns = (Message("assistant", "Hi", 1.0),)
    feigned = encode_one(tokenizer, Conversation("id", "source", "A", "A User: Hello", turns)).example
    real = encode_one(tokenizer, Conversation("id", "source", "A", "", (Message("user", " Hello"), *turns))).example
    assert_same(feigned, real)


class Three:
    """Three examples under two conditions, as a store holds them."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.conversations = [
            Conversation("id", "source", condition, "", (Message("user", "Hi"), Message("assistant", text, 1.0)))
            for condition, text in (("Careful", "Hello."), ("Very hasty", "yo"), ("Careful", "Good day."))
        ]
        encoded = encode(self.conversations, tokenizer.template, tokenizer)
        self.examples = [one.example for one in encoded]
        self.lengths = np.array([len(example.input_ids) for example in self.examples], np.int32)
        self.weight_sums = np.array([example.weight_sum for example in self.examples])
        self.condition_ids = np.array([0, 1, 0], np.int32)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> Example:
        return self.examples[position]


def test_a_view_of_a_store_has_the_lengths_and_weights_of_what_it_gives(quickstart: ChatTokenizer) -> None:
    store = Three(quickstart)
    careful, hasty = (make_frame(quickstart, condition) for condition in ("Careful", "Very hasty"))
    exchanged = Reconditioned(store, [(careful, hasty), (hasty, careful)])
    views: list[tuple[Examples, list[int]]] = [
        (exchanged, [0, 1, 2]),
        (Selected(exchanged, np.array([2, 1])), [2, 1]),
    ]
    for view, positions in views:
        assert len(view) == len(positions)
        for place, position in enumerate(positions):
            conversation = store.conversations[position]
            other = {"Careful": "Very hasty", "Very hasty": "Careful"}[conversation.condition]
            expected = encode_one(quickstart, replace(conversation, condition=other)).example
            assert_same(view[place], expected)
            assert view.lengths[place] == len(expected.input_ids) != store.lengths[position]
            assert view.weight_sums[place] == expected.weight_sum
            assert view.condition_ids[place] == store.condition_ids[position]
