"""How much each held-out answer leans to its condition: RUN/leanings.json, of the newest condition probe."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from ochat_train.files import publish_file
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer

_NUM_SHOWN = 10  # at either end
_MOST_CHARACTERS = 2000


def write_leanings(
    file: Path, step: int, held_out: TokenStore, leanings: npt.NDArray[np.float64], tokenizer: ChatTokenizer
) -> None:
    """Write `leanings`, f64[n] of ConditionProbe, by condition, and the examples that lean most and least, with text.

    A file that cannot be written is named, and ends nothing.
    """
    conditions = held_out.manifest.conditions
    order = np.argsort(leanings)[: np.count_nonzero(np.isfinite(leanings))]  # nan stands at the end

    def shown(position: int) -> dict[str, Any]:
        text = tokenizer.pretrained.decode(held_out[position].input_ids)
        return {
            "id": held_out.name(position),
            "condition": conditions[held_out.condition_ids[position]],
            "leaning": float(leanings[position]),
            "text": text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ...",
        }

    found = {
        "step": step,
        "leanings": {
            condition: [round(value, 5) for value in leanings[order[held_out.condition_ids[order] == id]].tolist()]
            for id, condition in enumerate(conditions)
        },
        "most": [shown(position) for position in order[::-1][:_NUM_SHOWN].tolist()],
        "least": [shown(position) for position in order[:_NUM_SHOWN].tolist()],
    }
    try:
        with publish_file(file) as opened:
            opened.write(orjson.dumps(found))
    except OSError as error:
        print(f"WARNING: {file} could not be written: {error}", flush=True)
