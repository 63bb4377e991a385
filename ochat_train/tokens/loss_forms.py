"""What a loss weight is the weight of: each token of an answer, or the answer as a whole."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Counts = Sequence[int] | npt.NDArray[np.integer[Any]]
LossForm = Literal["token", "answer"]
LOSS_FORMS: Mapping[LossForm, str] = {
    "token": "each token of an answer has the answer's weight",
    "answer": "an answer's weight is spread evenly over its tokens, so that its length does not count",
}


def spread_over_answers(
    weights: npt.NDArray[np.float32],
    lengths: Counts,
    answer_lengths: npt.NDArray[np.int32],
    num_answers: Counts,
) -> npt.NDArray[np.float32]:
    """f32[T]: the weights of the loss form "answer", for examples one after the other.

    weights: f32[T], of the form "token". lengths: i[E], the tokens of each example. answer_lengths: i32[A], of each
    answer with a loss the number of its tokens that have one. num_answers: i[E], how many of these each example has.
    An example whose answers have more tokens than it has with a loss is a window of one answer: its tokens get their
    share of the answer's weight, so that all windows together have it once. Each weight is rounded once.

    As OpenChat's per-sequence loss does it (`tokenize_conversations` of imoneoi/openchat, 2024-05): a message's weight
    over the number of its text's tokens and end token.

    >>> weights = np.array([0, 1, 1, 0, 0.5], np.float32)
    >>> spread_over_answers(weights, [5], np.array([2, 1], np.int32), [2]).tolist()
    [0.0, 0.5, 0.5, 0.0, 0.5]
    >>> spread_over_answers(weights[:3], [3], np.array([8], np.int32), [1]).tolist()
    [0.0, 0.125, 0.125]
    """
    trained = np.flatnonzero(weights)
    num_examples = len(lengths)
    example_of_token = np.repeat(np.arange(num_examples), lengths)
    example_of_answer = np.repeat(np.arange(num_examples), num_answers)
    num_trained = np.bincount(example_of_token[trained], minlength=num_examples)
    is_window = np.bincount(example_of_answer, answer_lengths, num_examples) != num_trained
    here: npt.NDArray[Any] = np.where(is_window[example_of_answer], num_trained[example_of_answer], answer_lengths)
    spread = weights.copy()
    spread[trained] /= np.repeat(answer_lengths, here)
    return spread
