"""Many streams at once against a running server: what came of them, how long they took, how long a first token.

    python benchmarks/serve_load.py URL [--streams N] [--seconds S] [--max-tokens T] [--vanishing SHARE]

Each of N clients asks one streamed question after the other until the time is up; a share of the streams is left in the
middle, as clients do that vanish. The key is read from OPENAI_API_KEY. The numbers are printed and written to
benchmarks/results/. Pieces are the deltas of streams, about one a token.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import openai
import orjson
from machine import describe_machine, write_results


@dataclass(slots=True)
class Outcome:
    """What all clients saw. first_s, whole_s: seconds to the first token and to the end, of streams that ended."""

    ends: Counter[str] = field(default_factory=Counter)
    num_pieces: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)


async def ask_on(client: openai.AsyncOpenAI, options: argparse.Namespace, outcome: Outcome, seed: int) -> None:
    """One client, until the time is up."""
    draw, until = random.Random(seed), time.monotonic() + options.seconds
    while time.monotonic() < until:
        begun, first, num_pieces = time.monotonic(), None, 0
        vanishes = draw.random() < options.vanishing
        try:
            stream = await client.chat.completions.create(
                model="openchat",
                messages=[{"role": "user", "content": f"Question {draw.randrange(10**6)}: what do you know?"}],
                max_tokens=options.max_tokens,
                stream=True,
            )
            async with stream:
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content:
                        first = first or time.monotonic() - begun
                        num_pieces += 1
                        if vanishes:
                            break
        except openai.APIStatusError as error:
            outcome.ends[f"status {error.status_code}"] += 1
        except openai.APIError as error:
            outcome.ends[type(error).__name__] += 1
        else:
            outcome.num_pieces += num_pieces
            outcome.ends["left" if vanishes else "ended"] += 1
            if first is not None and not vanishes:
                outcome.first_s.append(first)
                outcome.whole_s.append(time.monotonic() - begun)


async def load(options: argparse.Namespace) -> Outcome:
    """What came of all clients."""
    outcome = Outcome()
    key = os.environ.get("OPENAI_API_KEY", "none")
    async with openai.AsyncOpenAI(base_url=options.url, api_key=key, max_retries=0, timeout=600) as client:
        await asyncio.gather(*(ask_on(client, options, outcome, seed) for seed in range(options.streams)))
    return outcome


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and the longest."""
    if len(seconds) < 2:
        return {}
    return {
        "median": round(statistics.median(seconds), 3),
        "percentile_95": round(statistics.quantiles(seconds, n=20)[-1], 3),
        "longest": round(max(seconds), 3),
    }


def main() -> None:
    """Load a server, print what came of it, and write it down."""
    parser = argparse.ArgumentParser(description="Many streams at once against a running server.")
    parser.add_argument("url", help="such as http://localhost:18888/v1")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--vanishing", type=float, default=0.1, help="share of streams that are left in the middle")
    options = parser.parse_args()
    results = describe_machine(("openai", "transformers", "torch"))
    begun = time.monotonic()
    outcome = asyncio.run(load(options))
    seconds = time.monotonic() - begun
    results |= vars(options) | {"seconds": round(seconds, 1), "streams_by_end": dict(outcome.ends)}
    results["pieces_per_s"] = round(outcome.num_pieces / seconds, 1)
    results |= {"first_s": spread(outcome.first_s), "whole_s": spread(outcome.whole_s)}
    print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
    write_results("serve_load", results)


if __name__ == "__main__":
    main()
