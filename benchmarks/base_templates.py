"""The ids of `template: base` against `apply_chat_template`, for tokenizers on disk.

    python benchmarks/base_templates.py FOLDER ...

A folder holds a tokenizer with a chat template, as models have it. For each, conversations of one, three and eight
turns of the quickstart's texts and odd ones, with and without a system text, are encoded for training; their ids and
the prompt of each answer are compared with those that transformers makes of the base's own template. Exits with 1 if
any differs.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.tokens.chat_template import chat_template
from ochat_train.tokens.encode import Encoded
from ochat_train.tokens.rendered import encode_all
from ochat_train.tokens.strings import Refused
from ochat_train.tokens.tokenizer import load_tokenizer

ODD = ("Hi", "  two spaces ", "größer 漢字 🦙", "\n\nbegins with breaks", "ends\n", "x = 1\n\n\n\ty", "don't 1234567")
NUM_EACH = 20


def main() -> None:
    """Print a line for each tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", nargs="+")
    results = {folder: try_tokenizer(folder) for folder in parser.parse_args().folders}
    sys.exit(1 if any(found["different"] or found["other prompt"] for found in results.values()) else 0)


def try_tokenizer(folder: str) -> Counter[str]:
    """How many conversations had equal ids, and how many prompts; prints both."""
    found: Counter[str] = Counter()
    try:
        tokenizer = load_tokenizer(folder, BaseTemplate())
        chat_template(tokenizer, "")
    except ValueError as error:
        print(f"{folder}: refused: {error}", flush=True)
        return found
    template = tokenizer.template
    assert isinstance(template, BaseTemplate)
    base = PreTrainedTokenizerFast.from_pretrained(folder)
    # The date that training fixes is given to the base, which would take today's.
    options: dict[str, Any] = {"date_string": "26 Jul 2024"} if "date_string" in template.source else {}
    for conversation in make_conversations():
        messages = [{"role": message.role, "content": message.text} for message in conversation.messages]
        messages = [{"role": "system", "content": conversation.system}] * bool(conversation.system) + messages
        (outcome,) = encode_all([conversation], template, tokenizer)
        if isinstance(outcome, Refused):
            found[outcome.reason] += 1
            continue
        whole = base.apply_chat_template(messages, return_dict=False, **options)
        found["equal" if outcome[0].example.input_ids.tolist() == whole else "different"] += 1
        found["examples"] += len(outcome)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [
            base.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=False, **options)
            for place in places
        ]
        trained = sorted((prompt for part in outcome for prompt in prompts_of(part)), key=len)
        for prompt, served in zip(trained, prompts, strict=True):
            joins = prompt != served and "\n" in base.decode(served[-1:])
            found["equal prompt" if prompt == served else "joined break" if joins else "other prompt"] += 1
    print(f"{folder}: {dict(found)}; {'; '.join(template.notes())}", flush=True)
    return found


def make_conversations() -> Iterator[Conversation]:
    """Conversations of one, three and eight turns; every third text is an odd one."""
    data = Path(__file__).resolve().parents[1] / "data/quickstart.json"
    texts = [turn["value"] for record in json.loads(data.read_bytes()) for turn in record["conversations"]]
    for num_turns in (1, 3, 8):
        for system in ("", "You are a helpful pirate. "):
            for first in range(NUM_EACH):
                said = [
                    texts[(7 * first + turn) % len(texts)] if (first + turn) % 3 else ODD[(first + turn) % len(ODD)]
                    for turn in range(2 * num_turns)
                ]
                messages = (
                    Message("assistant" if turn % 2 else "user", text, turn % 2) for turn, text in enumerate(said)
                )
                yield Conversation("", "", "", system, tuple(messages))


def prompts_of(part: Encoded) -> list[list[int]]:
    """The ids before each answer with a loss."""
    is_trained = np.concatenate([[False], part.example.loss_weights > 0])
    starts = np.flatnonzero(is_trained[1:] & ~is_trained[:-1]).tolist()
    return [part.example.input_ids[:start].tolist() for start in starts]


if __name__ == "__main__":
    main()
