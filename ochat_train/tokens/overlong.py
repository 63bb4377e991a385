"""Conversations longer than the context: split into parts, truncated or dropped."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.encode import Encoded, Example, Turn

Overlong = Literal["split", "truncate", "drop"]

_LEAST_TOKENS = 64  # of a text: less is too little to answer, and too little to continue


class TokenCounts(NamedTuple):
    """The number of tokens, and of those among them that have a weight."""

    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class Fitted:
    """What becomes of a conversation.

    examples: none if it is dropped, for the `reason` and, in words, the `detail`. answer_lengths: i32[answers] of each
    example, the number of tokens with a weight of each turn that has some in it; all of them, also where the example
    has a window of the turn. actions: names for the ledger.
    whole: the tokens up to the last one with a weight. kept: how many of them each choice of `overlong` keeps; a token
    that is in several parts counts once.
    """

    examples: tuple[Example, ...]
    answer_lengths: tuple[npt.NDArray[np.int32], ...]
    actions: tuple[str, ...]
    reason: str | None
    detail: str
    whole: TokenCounts
    kept: Mapping[Overlong, TokenCounts]


class _Span(NamedTuple):
    """The tokens [start, end) of a conversation, with their weights or, as context, without."""

    start: int
    end: int
    is_trained: bool

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.end - self.start


_Part = tuple[_Span, ...]


class _Cut(NamedTuple):
    """The parts that a choice makes of a conversation, and the names of what it did."""

    parts: tuple[_Part, ...] = ()
    actions: tuple[str, ...] = ()


def fit(encoded: Encoded, *, max_tokens: int, overlong: Overlong, context_tokens: int) -> Fitted:
    """The conversation as examples of at most `max_tokens` tokens.

    Nothing is kept after the last token with a weight. A conversation without any is dropped (`no_weight`). One within
    the limit is one example, views into the same arrays. A longer one is dropped (`too_long`), truncated after its
    last whole answer within the limit, or split into parts:

    - Every part begins with the prefix: the beginning, the condition where it comes first, the system message.
    - It holds as many exchanges in a row as fit. An exchange is the turns after an answer up to and including the
      next answer. Turns after the part's last one with a weight are left out, and there is no part without a weight.
    - Before them come earlier turns as context, without weights: at most `context_tokens` tokens and half of the
      room, less where the first exchange needs it. The first part begins at the first exchange with a weight, and has
      as much context as fits: no other part has those turns. Context begins with a user turn; where none is near
      enough, and the exchange has none either, with a tool or system turn.
    - Where an exchange does not fit beside the prefix, each turn of it that has a weight, or a few that fill half of
      the room together, get their own part, with the turns of the exchange before them, the question, as context. Too
      long a question loses its beginning, but no header and no end token (`question_cut`).
    - Where such a turn leaves no room for 64 tokens of the text before it, it is trained in windows
      (`answer_windowed`). The first follows the question, which gets at most half of the room. The others repeat the
      turn's header and the last tokens of the window before, without weights: `context_tokens` but at least 64, and at
      most half of the room. Only the last window holds the end token, so nothing learns to stop in the middle.
    - Where even 64 tokens of a question and 64 of its answer do not fit, the conversation is dropped (`too_long`).

    So each token with a weight is trained exactly once, and without their prefixes the parts together are at most a
    few times as long as the conversation. Where a quarter of `max_tokens` is less than 64, it replaces the 64.

    Worked example: a prefix p, user turns u and answers a of 10 tokens each. With max_tokens 50 and context_tokens 20,
    p u1 a1 u2 a2 u3 a3 becomes p u1 a1 u2 a2 and p (u2 a2) u3 a3, the context in brackets.
    """
    encoded = _without_tail(encoded)
    example = encoded.example
    whole = TokenCounts(len(example.input_ids), int(np.count_nonzero(example.loss_weights)))
    kept: dict[Overlong, TokenCounts] = {"split": whole, "truncate": whole, "drop": whole}
    if not whole.supervised_tokens:
        nothing = TokenCounts(0, 0)
        return Fitted((), (), (), "no_weight", "its weights are 0 in float32", nothing, dict.fromkeys(kept, nothing))
    if whole.tokens <= max_tokens:
        everything = (_Span(0, whole.tokens, True),)
        return Fitted((example,), tuple(_answer_lengths(encoded, [everything])), (), None, "", whole, kept)

    cuts: dict[Overlong, _Cut] = {
        "split": _split(encoded, max_tokens, context_tokens) if encoded.can_split else _Cut(),
        "truncate": _truncate(encoded, max_tokens),
        "drop": _Cut(),
    }
    kept = {choice: _count(example, cut.parts) for choice, cut in cuts.items()}
    parts, actions = cuts[overlong]
    if parts:
        examples = tuple(_join(example, part) for part in parts)
        return Fitted(examples, tuple(_answer_lengths(encoded, parts)), actions, None, "", whole, kept)
    begin = f"the {encoded.prefix_length:,} tokens that begin each part leave too little room for a turn"
    why: dict[Overlong, str] = {
        "split": f", and {begin if encoded.can_split else 'its template has no place where it could be split'}",
        "truncate": ", and no weighted answer ends within it",
        "drop": "",
    }
    detail = f"{whole.tokens:,} tokens, above data.max_tokens {max_tokens:,}{why[overlong]}"
    return Fitted((), (), (), "too_long", detail, whole, kept)


def fit_all(parts: Sequence[Encoded], *, max_tokens: int, overlong: Overlong, context_tokens: int) -> Fitted:
    """What becomes of a conversation whose answers are trained in several examples, which share no such token."""
    each = [fit(one, max_tokens=max_tokens, overlong=overlong, context_tokens=context_tokens) for one in parts]
    if len(each) == 1:
        return each[0]
    first = each[0]
    examples = tuple(example for fitted in each for example in fitted.examples)
    actions = ["answers_apart", *(action for fitted in each for action in fitted.actions)]
    if examples and any(fitted.reason for fitted in each):
        actions.append("answer_left_out")

    def add(counts: Iterable[TokenCounts]) -> TokenCounts:
        return TokenCounts(*(sum(numbers) for numbers in zip(*counts, strict=True)))

    return Fitted(
        examples=examples,
        answer_lengths=tuple(lengths for fitted in each for lengths in fitted.answer_lengths),
        actions=tuple(dict.fromkeys(actions)),
        reason=None if examples else first.reason,
        detail="" if examples else first.detail,
        whole=add(fitted.whole for fitted in each),
        kept={choice: add(fitted.kept[choice] for fitted in each) for choice in first.kept},
    )


def _without_tail(encoded: Encoded) -> Encoded:
    """The conversation up to its last token with a weight; as it is where there is none."""
    example = encoded.example
    weighted = np.flatnonzero(example.loss_weights)
    if not len(weighted) or (end := int(weighted[-1]) + 1) == len(example.input_ids):
        return encoded
    num_turns = bisect_left(encoded.edges[4::4].tolist(), end) + 1
    edges = np.minimum(encoded.edges[: 1 + 4 * num_turns], end)
    cut = Example(example.input_ids[:end], example.loss_weights[:end])
    return Encoded(cut, encoded.roles[:num_turns], edges, encoded.can_split)


def _truncate(encoded: Encoded, max_tokens: int) -> _Cut:
    ends = [turn.end for turn in encoded.turns if turn.role == "assistant" and turn.weighted_end <= max_tokens]
    if not ends or not encoded.example.loss_weights[: ends[-1]].any():
        return _Cut()
    end = int(np.flatnonzero(encoded.example.loss_weights[: ends[-1]])[-1]) + 1
    return _Cut(((_Span(0, end, True),),), ("overlong_truncated",))


def _split(encoded: Encoded, max_tokens: int, context_tokens: int) -> _Cut:
    turns, weights = encoded.turns, encoded.example.loss_weights
    prefix = _Span(0, encoded.prefix_length, False)
    room = max_tokens - encoded.prefix_length
    least = max(2, min(_LEAST_TOKENS, max_tokens // 4))
    # Half of what an answer's header leaves then holds the frame and `least` tokens of a question.
    can_squeeze = room >= 3 * max(turn.frame_length for turn in turns) + 2 * least
    is_weighted = (np.maximum.reduceat(weights, [turn.start for turn in turns]) > 0).tolist()
    stops = deque(position for position, turn in enumerate(turns, start=1) if turn.role == "assistant")
    if not stops or stops[-1] < len(turns):
        stops.append(len(turns))
    parts: list[_Part] = []
    actions = ["overlong_split"]
    first = 0
    while not any(is_weighted[first : stops[0]]):
        first = stops.popleft()
    while stops:
        stop = stops.popleft()  # the first exchange of the part is turns[first:stop]
        length = turns[stop - 1].weighted_end - turns[first].start
        if length > room:
            for position, group in _group(turns, is_weighted, first, stop, room // 2):
                if not can_squeeze:
                    return _Cut()
                squeezed = _squeeze(turns[first:position], group, room, least, context_tokens)
                parts += [(prefix, *part) for part in squeezed.parts]
                actions += squeezed.actions
        else:
            most = min(context_tokens, room // 2, room - length) if parts else room - length
            start = turns[_find_context(turns, first, stop, most)].start
            while stops and turns[stops[0] - 1].weighted_end - start <= room:
                stop = stops.popleft()
            if trained := [turns[position] for position in range(first, stop) if is_weighted[position]]:
                own = turns[first].start
                parts.append((prefix, _Span(start, own, False), _Span(own, trained[-1].weighted_end, True)))
        first = stop
    return _Cut(tuple(parts), tuple(dict.fromkeys(actions)))


def _find_context(turns: Sequence[Turn], first: int, stop: int, context_tokens: int) -> int:
    """Where the context of turns[first:stop] begins; `first` if there is none."""
    nearest = bisect_left(turns, turns[first].start - context_tokens, hi=first, key=lambda turn: turn.start)
    near = [position for position in range(nearest, first) if turns[position].role != "assistant"]
    if users := [position for position in near if turns[position].role == "user"]:
        return users[0]
    has_question = any(turn.role == "user" for turn in turns[first:stop])
    return near[0] if near and not has_question else first


def _group(
    turns: Sequence[Turn], is_weighted: Sequence[bool], first: int, stop: int, max_tokens: int
) -> Iterator[tuple[int, Turn]]:
    """The weighted turns of turns[first:stop] with their positions, those within `max_tokens` together as one turn.

    Without that each of many short turns would bring along the whole of a long question.
    """
    end = first  # of the group before
    for position in range(first, stop):
        if position < end or not is_weighted[position]:
            continue
        end = position + 1
        while end < stop and turns[end].end - turns[position].start <= max_tokens:
            end += 1
        while not is_weighted[end - 1]:
            end -= 1
        last = turns[end - 1]
        yield position, turns[position]._replace(text_end=last.text_end, end=last.end)


def _squeeze(question: Sequence[Turn], turn: Turn, room: int, least: int, context_tokens: int) -> _Cut:
    """One turn in one part or several windows of at most `room` tokens, after as much of its question as fits."""
    header = _Span(turn.start, turn.text_start, False)
    half = (room - header.length) // 2
    needed = min(question[-1].length, question[-1].frame_length + least) if question else 0
    length = turn.weighted_end - turn.start
    is_whole = length + needed <= room
    asked = _keep_end(question, room - length if is_whole else half, least)
    actions = []
    if question and sum(span.length for span in asked) < turn.start - question[0].start:
        actions.append("question_cut")

    parts: list[_Part] = []
    before, start = (*asked, header), turn.text_start
    while start < turn.weighted_end:
        end = start + room - sum(span.length for span in before)
        # The last token of the text and the end token stay together.
        end = turn.weighted_end if end >= turn.weighted_end else min(end, turn.text_end - 1)
        parts.append((*before, _Span(start, end, True)))
        carried = min(max(context_tokens, least), half)
        before, start = (header, _Span(end - carried, end, False)), end
    if len(parts) > 1:
        actions.append("answer_windowed")
    return _Cut(tuple(parts), tuple(actions))


def _keep_end(question: Sequence[Turn], budget: int, least: int) -> list[_Span]:
    """The last turns of a question within `budget` tokens.

    Of the turn before them the end is kept too, where at least `least` tokens of its text fit.
    """
    kept: list[_Span] = []
    for turn in reversed(question):
        if turn.length <= budget:
            kept.insert(0, _Span(turn.start, turn.end, False))
            budget -= turn.length
            continue
        if (text_tokens := budget - turn.frame_length) >= least:
            header = _Span(turn.start, turn.text_start, False)
            kept[:0] = [header, _Span(turn.text_end - text_tokens, turn.end, False)]
        break
    return kept


def _count(example: Example, parts: Sequence[_Part]) -> TokenCounts:
    is_kept = np.zeros(len(example.input_ids), dtype=np.bool_)
    for span in (span for part in parts for span in part):
        is_kept[span.start : span.end] = True
    return TokenCounts(int(np.count_nonzero(is_kept)), int(np.count_nonzero(example.loss_weights[is_kept])))


def _answer_lengths(encoded: Encoded, parts: Sequence[_Part]) -> Iterator[npt.NDArray[np.int32]]:
    """What `Fitted.answer_lengths` holds."""
    starts, ends = encoded.edges[1::4], encoded.edges[3::4]  # of the texts, each with its end token
    num_trained = np.concatenate([[0], np.cumsum(encoded.example.loss_weights != 0)])
    lengths = (num_trained[ends] - num_trained[starts]).astype(np.int32)
    for part in parts:
        is_here = np.zeros(len(lengths), dtype=np.bool_)
        for span in part:
            if span.is_trained:
                is_here |= (starts < span.end) & (ends > span.start)
        yield lengths[is_here & (lengths > 0)]


def _join(example: Example, part: _Part) -> Example:
    weights = [example.loss_weights[start:end] * np.float32(is_trained) for start, end, is_trained in part]
    joined = Example(np.concatenate([example.input_ids[start:end] for start, end, _ in part]), np.concatenate(weights))
    joined.loss_weights[0] = 0.0
    return joined
