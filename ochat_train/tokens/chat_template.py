"""The Jinja chat template of an exported tokenizer, proved to give the ids of training."""

from itertools import product, starmap

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.template import Joint
from ochat_train.tokens.encode import encode
from ochat_train.tokens.tokenizer import ChatTokenizer


def chat_template(tokenizer: ChatTokenizer, inference_condition: str) -> str:
    """The Jinja source whose `condition` defaults to `inference_condition`.

    Training encodes each piece on its own, serving encodes one string. The two agree except where a tokenizer merges
    across the border of two text pieces, such as an answer that begins with a line break behind a header that ends
    with one. Raises ValueError when they differ even on plain conversations.
    """
    template = tokenizer.template
    source = template.jinja(inference_condition, joint=find_joint(tokenizer))
    turns = (Message("user", "Hello, who are you?"), Message("assistant", "I am a model.", 1.0))
    for condition, system in ((inference_condition, ""), ("", ""), ("Other", "You are kind.")):
        conversation = Conversation("check", "check", condition, system, (*turns, *turns))
        trained = encode([conversation], template, tokenizer)[0].example.input_ids.tolist()
        if (served := apply_chat_template(tokenizer, source, conversation)) != trained:
            raise ValueError(
                f"template {template.name}: apply_chat_template gives other ids than training with the tokenizer "
                f"{tokenizer.pretrained.name_or_path}; serve the model with token ids.\n{served}\n{trained}"
            )
    return source


def apply_chat_template(
    tokenizer: ChatTokenizer, source: str, conversation: Conversation, *, for_reply: bool = False
) -> list[int]:
    """The conversation's ids through transformers' own `apply_chat_template` with the Jinja template `source`.

    With `for_reply` up to where the assistant would begin to answer.
    """
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


def find_joint(tokenizer: ChatTokenizer) -> Joint:
    """What must stand between two text pieces so that this tokenizer encodes the joined string piece by piece.

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
