"""A chat as ids before its next answer: as in training, and as servers make them that render one string.

Training encodes each text on its own; such servers encode one string, which the Jinja template of the exported
tokenizer gives. The template is written here, and checked to give the ids of training.
"""

from dataclasses import replace
from itertools import product, starmap

import numpy as np

from ochat_train.conversations.base_template import BaseTemplate, TemplateRefused
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.spell_out import Spelling
from ochat_train.conversations.template import Joint
from ochat_train.tokens.rendered import encode_all, encode_rendered_prompt
from ochat_train.tokens.strings import Refused
from ochat_train.tokens.tokenizer import ChatTokenizer


def chat_template(tokenizer: ChatTokenizer, inference_condition: str) -> str:
    """The Jinja source of the tokenizer's template; its `condition` defaults to `inference_condition`.

    Its ids are those of training except where a tokenizer merges across the border of two texts, such as an answer that
    begins with a line break after a header that ends with one. Raises ValueError when they differ even on plain
    conversations.
    """
    template = tokenizer.template
    checked = [(inference_condition, ""), ("", ""), ("Other", "You are kind.")]
    if isinstance(template, BaseTemplate):
        source = template.jinja(inference_condition)
        if template.shape is None or not template.shape.has_system:
            checked.pop()
    else:
        source = template.jinja(inference_condition, joint=_find_joint(tokenizer))
    turns = (Message("user", "Hello, who are you?"), Message("assistant", "I am a model.", 1.0))
    for condition, system in checked:
        conversation = Conversation("check", "check", condition, system, (*turns, *turns))
        (outcome,) = encode_all([conversation], template, tokenizer)
        if isinstance(outcome, Refused):
            raise ValueError(f"template {template.name}: {outcome.detail}")
        trained = outcome[0].example.input_ids.tolist()
        prompt = encode_prompt(replace(conversation, messages=conversation.messages[:-1]), tokenizer)
        if trained[: len(prompt)] != prompt:
            raise ValueError(
                f"template {template.name}: the tokenizer {tokenizer.pretrained.name_or_path} joins a prompt's end "
                "with the beginning of the answer, so that answers would not be trained as they are asked for; choose "
                "a template of pieces, such as template: chatml"
            )
        if (served := _apply_chat_template(tokenizer, source, conversation, for_reply=False)) != trained:
            raise ValueError(
                f"template {template.name}: apply_chat_template gives other ids than training with the tokenizer "
                f"{tokenizer.pretrained.name_or_path}; serve the model with token ids.\n{served}\n{trained}"
            )
    return source


def encode_prompt(conversation: Conversation, tokenizer: ChatTokenizer, *, continues: bool = False) -> list[int]:
    """The conversation's ids up to where the assistant would begin to answer, or to go on with its last turn.

    continues: whether the last turn is an answer that goes on. The ids are those of training: what a text spells never
    becomes control. Raises ValueError for what the base's own template refuses.
    """
    template, text = tokenizer.template, ""
    if continues:
        *messages, last = conversation.messages
        if isinstance(template, BaseTemplate):  # which may write an answer's text otherwise than alone
            whole = replace(conversation, messages=(*messages, replace(last, weight=1.0)))
            (outcome,) = encode_all([whole], template, tokenizer)
            if isinstance(outcome, Refused):
                raise TemplateRefused(outcome.detail)
            encoded = outcome[-1]
            return list(map(int, encoded.example.input_ids[: encoded.turns[-1].text_end]))
        conversation, text = replace(conversation, messages=tuple(messages)), last.text
    if isinstance(template, BaseTemplate):
        return [*map(int, encode_rendered_prompt(conversation, template, tokenizer.text.strings))]
    segments = list(template.segments(conversation, for_reply=True))
    texts = iter(tokenizer.encode_texts([*(segment.text for segment in segments if not segment.is_special), text]))
    ids: list[int] = []
    for segment in segments:
        ids += [tokenizer.special_ids[segment.text]] if segment.is_special else next(texts).tolist()
    return [*ids, *next(texts).tolist()]


def spelling_of(
    tokenizer: ChatTokenizer, base_template: str | dict[str, str] | None, *, reasoning: str, tool_calls: str
) -> Spelling:
    """How tools and reasoning are written for this tokenizer's model. base_template: the base's own, in Jinja."""
    if isinstance(base_template, dict):  # several by name
        base_template = base_template.get("tool_use", base_template.get("default"))
    control = (str(token) for token in tokenizer.pretrained.added_tokens_decoder.values() if token.special)
    template = tokenizer.template
    arguments = template.arguments() if isinstance(template, BaseTemplate) else frozenset[str]()
    return Spelling(base_template, tuple(control) if base_template else (), reasoning, tool_calls, arguments)  # type: ignore[arg-type]


def encode_as_one_string(conversation: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """The same through the tokenizer's Jinja template, as servers that render one string do."""
    return _apply_chat_template(tokenizer, tokenizer.pretrained.chat_template, conversation, for_reply=True)


def _apply_chat_template(
    tokenizer: ChatTokenizer, source: str, conversation: Conversation, *, for_reply: bool
) -> list[int]:
    """The conversation's ids by transformers' `apply_chat_template` with the Jinja template `source`."""
    messages = [{"role": message.role, "content": message.text} for message in conversation.messages]
    if conversation.system:
        messages.insert(0, {"role": "system", "content": conversation.system})
    return list(
        tokenizer.pretrained.apply_chat_template(
            messages,
            chat_template=source,
            condition=conversation.condition,
            add_generation_prompt=for_reply,
            tokenize=True,
            return_dict=False,
        )
    )


def _find_joint(tokenizer: ChatTokenizer) -> Joint:
    """What must stand between two texts so that this tokenizer encodes the joined string as it encodes each alone.

    Found by trying: of all joints the first with which most texts agree.
    """
    header, texts = "GPT4 User:", ("Hello", " Hello", "  Hello", "\nHello", "▁Hello")
    header_ids, *texts_ids = (ids.tolist() for ids in tokenizer.encode_texts([header, *texts]))
    before = ((header, header_ids, False), (tokenizer.template.end_token, [tokenizer.end_id], True))

    def num_equal(joint: Joint) -> int:
        num = 0
        for text, text_ids in zip(texts, texts_ids, strict=True):
            for first, first_ids, is_special in before:
                lead = "" if text[0] in joint.unless else joint.before_text(is_special)
                ids = tokenizer.pretrained.encode(first + lead + text, add_special_tokens=False)
                num += ids == first_ids + text_ids
        return num

    return max(starmap(Joint, product(("", " "), ("", " "), ("", " ", " ▁"))), key=num_equal)


class ControlText:
    """Finds text that spells special tokens, which servers that render one string read as control."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.pretrained.added_tokens_decoder
        self._control = np.array([id_ for id_, token in added.items() if token.special])

    def find(self, conversation: Conversation) -> str | None:
        """The text of the conversation that would become control in one string, as `messages[2]: <|end_of_turn|>`.

        None if there is none. The special tokens of the whole prompt are compared, encoded both ways, so a special
        token that only several messages together spell is found too.
        """
        ids = encode_as_one_string(conversation, self._tokenizer)
        if self._control_of(ids) == self._control_of(encode_prompt(conversation, self._tokenizer)):
            return None
        for position, message in enumerate(conversation.messages):
            forged = self._control_of(self._tokenizer.pretrained.encode(message.text, add_special_tokens=False))
            if forged:
                return f"messages[{position}]: {self._tokenizer.pretrained.convert_ids_to_tokens(forged[0])}"
        return "the messages put together"

    def _control_of(self, ids: list[int]) -> list[int]:
        """Those of the ids that are special tokens, in order."""
        array = np.array(ids)
        return [int(id_) for id_ in array[np.isin(array, self._control)]]
