"""What OpenChat's own preprocessing does with conversations, written anew, to compare time with: JSON to token lists.

    python benchmarks/openchat_steps.py DUMP TOKENIZER OUTPUT.parquet NUM_PROCESSES

Its steps, after its repository: each process loads the tokenizer by transformers, takes an equal share of the records,
encodes all of its texts in one call, and puts lists of ids, positions, labels and weights together in Python; one table
of all is written as parquet. It neither cleans nor filters nor looks for duplicates.
"""

import multiprocessing
import sys
from typing import Any

import orjson
import pyarrow as pa
from pyarrow import parquet

MAX_TOKENS = 4096
LISTS = ("ids", "positions", "labels", "weights")


def main() -> None:
    """Preprocess the dump of the command line."""
    dump, tokenizer, output, num_processes = sys.argv[1:]
    with open(dump, "rb") as file:
        lines = [line.rstrip(b",\n") for line in file if line.startswith(b"{")]
    shares = [(lines[number :: int(num_processes)], tokenizer) for number in range(int(num_processes))]
    with multiprocessing.get_context("spawn").Pool(int(num_processes)) as pool:
        tables = pool.starmap(convert, shares)
    parquet.write_table(pa.concat_tables(tables), output)


def convert(lines: list[bytes], name: str) -> pa.Table:
    """The table of a share of the records."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    conversations = []
    for line in lines:
        record = orjson.loads(line)
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"] if isinstance(turn["value"], str)]
        conversations.append(("GPT4" if record["model"] == "Model: GPT-4" else "GPT3", turns))

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, return_attention_mask=False, add_special_tokens=False).input_ids
        return ids

    tokenizer.backend_tokenizer.encode_special_tokens = True
    texts = iter(encode([text for _, turns in conversations for _, text in turns]))
    names = {role: role.title() for role in ("human", "gpt", "narrator")}
    headers = {(condition, role): f"{condition} {names[role]}:" for condition in ("GPT3", "GPT4") for role in names}
    header_ids = dict(zip(headers, encode([*headers.values()]), strict=True))
    columns: dict[str, list[Any]] = {name: [] for name in LISTS}
    end = tokenizer.eos_token_id
    for condition, turns in conversations:
        ids: list[int] = [tokenizer.bos_token_id or end]
        weights: list[float] = [0.0]
        for role, _ in turns:
            header, text, weight = header_ids[condition, role], next(texts), float(role == "gpt")
            ids += [*header, *text, end]
            weights += [0.0] * len(header) + [weight] * (len(text) + 1)
        ids, weights = ids[:MAX_TOKENS], weights[:MAX_TOKENS]
        while weights and not weights[-1]:
            ids.pop()
            weights.pop()
        if ids:
            labels = [token if weight else 0 for token, weight in zip(ids, weights, strict=True)]
            rows = (ids, list(range(len(ids))), [*labels[1:], 0], [*weights[1:], 0.0])
            for name, row in zip(LISTS, rows, strict=True):
                columns[name].append(row)
    types = {name: pa.list_(pa.float32() if name == "weights" else pa.int32()) for name in LISTS}
    return pa.table(columns, schema=pa.schema(types))


if __name__ == "__main__":
    main()
