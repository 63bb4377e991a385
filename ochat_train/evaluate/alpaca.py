"""AlpacaEval's win rate by the alpaca_eval package: its annotator's prompt, order and count, with requests of ours."""

import asyncio
import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from ochat_train.evaluate.ask import CachedClient

ANNOTATOR = "alpaca_eval_gpt4"  # of AlpacaEval 1, whose figures model cards of OpenChat give
_Z95 = 1.959964


class AlpacaRate(NamedTuple):
    """The package's win rate and its interval of 95 %, as shares of 1; num_judged: pairs with a readable verdict."""

    rate: float
    low: float
    high: float
    num_judged: int
    version: str


class _Rehearsed(Exception):
    pass


def is_installed() -> bool:
    """Whether the alpaca_eval package is."""
    return importlib.util.find_spec("alpaca_eval") is not None


def alpaca_win_rate(
    judge: CachedClient, name: str, outputs: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]
) -> AlpacaRate | None:
    """The win rate of `outputs` against `references`, both rows of AlpacaEval's files; None in a rehearsal.

    name: of the model, for the judge's failures. None, too, where no verdict can be read.
    """
    from alpaca_eval import annotators, metrics, utils  # takes seconds

    def complete(prompts: Sequence[str], *, temperature: float, max_tokens: int, **_: Any) -> dict[str, list[Any]]:
        texts = [""] * len(prompts)  # a failure stays empty, which the package counts in no rate

        async def work(position: int) -> None:
            messages = utils.prompt_to_chatml(prompts[position].strip())
            texts[position] = (await judge.ask(messages, temperature=temperature, max_tokens=max_tokens)).text

        items = {f"{name}, alpaca-eval, pair {position + 1}": position for position in range(len(prompts))}
        asyncio.run(judge.run(items, work, title=f"{name}, alpaca-eval"))
        if judge.rehearses:
            raise _Rehearsed
        zeros = [0.0] * len(prompts)
        return {"completions": texts, "price_per_example": zeros, "time_per_example": zeros}

    logging.disable(logging.CRITICAL)  # it logs at length, and each verdict that it cannot read
    try:
        annotator = annotators.PairwiseAnnotator(annotators_config=ANNOTATOR, caching_path=None)
        for single in annotator.annotators.values():
            single.fn_completions = complete
        found = metrics.get_winrate(
            annotator.annotate_head2head(outputs_1=references, outputs_2=outputs, chunksize=None)
        )
    except _Rehearsed:
        return None
    finally:
        logging.disable(logging.NOTSET)
    if not found["n_total"]:
        return None
    rate, spread = found["win_rate"] / 100, _Z95 * found["standard_error"] / 100
    spread = spread if spread == spread else 1.0  # a single pair has no error
    version = importlib.metadata.version("alpaca_eval")
    return AlpacaRate(
        float(rate), float(max(0, rate - spread)), float(min(1, rate + spread)), int(found["n_total"]), version
    )
