"""A chat as the ids before its next answer, as training has them, and as servers that render one string do."""

import numpy as np

from ochat_train.conversations.schema import Conversation
from ochat_train.tokens.chat_template import apply_chat_template
from ochat_train.tokens.tokenizer import ChatTokenizer


def encode_prompt(conversation: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """The conversation's ids up to where the assistant would begin to answer.

    Equal to those that training has in front of that answer: each piece is encoded on its own, and text never becomes
    control.
    """
    segments = list(tokenizer.template.segments(conversation, for_reply=True))
    texts = iter(tokenizer.encode_texts([segment.text for segment in segments if not segment.is_special]))
    pieces = [[tokenizer.special_ids[s.text]] if s.is_special else next(texts).tolist() for s in segments]
    return [id_ for piece in pieces for id_ in piece]


def encode_as_one_string(conversation: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """The same through the tokenizer's Jinja template, as servers that render one string do."""
    return apply_chat_template(tokenizer, tokenizer.pretrained.chat_template, conversation, for_reply=True)


class ControlText:
    """Finds text that spells special tokens, for servers that render one string and then read those as control."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.pretrained.added_tokens_decoder
        self._control = np.array([id_ for id_, token in added.items() if token.special])

    def find(self, conversation: Conversation) -> str | None:
        """What of the conversation would become control in one string, as `messages[2]: <|end_of_turn|>`; or None.

        Compares the special tokens of the whole prompt both ways, so nothing that is put together is missed either.
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
