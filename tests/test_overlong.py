"""Above the limit, each token with a weight is trained once, and each answer ends where it ended."""

from collections.abc import Sequence
from itertools import combinations, groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ochat_train.conversations.schema import Conversation, Message, Role
from ochat_train.conversations.template import TEMPLATES
from ochat_train.tokens.encode import Encoded, Example, encode
from ochat_train.tokens.overlong import Fitted, Overlong, TokenCounts, fit
from ochat_train.tokens.tokenizer import ChatTokenizer

Turns = list[tuple[Role, int, float]]  # role, tokens of the text, weight


def laid_out(turns: Turns, *, prefix: int = 10, header: int = 2, after_end: int = 0) -> Encoded:
    """A conversation whose token ids are their own positions. System turns after a prefix have no header."""
    edges, weights = [prefix], [0.0] * prefix
    for role, text, weight in turns:
        pieces = (0 if role == "system" and prefix else header, text, 1, after_end)
        edges += [edges[-1] + sum(pieces[: count + 1]) for count in range(4)]
        weights += [0.0] * pieces[0] + [weight] * (text + 1) + [0.0] * after_end
    weights[:1] = [0.0]
    ids = np.arange(len(weights), dtype=np.int32)
    tokens = Example(ids, np.array(weights, dtype=np.float32))
    return Encoded(tokens, tuple(role for role, _, _ in turns), np.array(edges))


def split(encoded: Encoded, max_tokens: int, context_tokens: int = 0) -> Fitted:
    return fit(encoded, max_tokens=max_tokens, overlong="split", context_tokens=context_tokens)


def runs(fitted: Fitted) -> list[str]:
    """The unbroken runs of positions of each part, START-END with END after the last; trained ones in brackets."""
    found = []
    for part in fitted.examples:
        rows = list(zip(part.input_ids.tolist(), (part.loss_weights > 0).tolist(), strict=True))
        borders = [n for n, (a, b) in enumerate(pairwise(rows), start=1) if b != (a[0] + 1, a[1])]
        ends = [(rows[start], rows[end - 1][0] + 1) for start, end in pairwise([0, *borders, len(rows)])]
        found.append(" ".join(f"[{first}-{end}]" if trained else f"{first}-{end}" for (first, trained), end in ends))
    return found


# ---- Within the limit, dropped, truncated ----


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_a_conversation_of_exactly_the_limit_is_left_as_it_is(overlong: Overlong) -> None:
    encoded = laid_out([("user", 17, 0.0), ("assistant", 17, 0.5)])  # 10 + 20 + 20
    fitted = fit(encoded, max_tokens=50, overlong=overlong, context_tokens=10)
    assert fitted.examples == (encoded.example,)
    assert (fitted.actions, fitted.reason, fitted.detail) == ((), None, "")
    assert fitted.kept == {choice: TokenCounts(50, 18) for choice in ("split", "truncate", "drop")}
    lower = fit(encoded, max_tokens=49, overlong=overlong, context_tokens=10)
    assert lower.actions or lower.reason


# Three exchanges of 40 tokens after a prefix of 10; answers begin at 30, 70 and 110, their texts 2 tokens later.
THREE: Turns = [("user", 17, 0.0), ("assistant", 17, 1.0)] * 3


def test_dropped_it_says_how_long_it_was() -> None:
    fitted = fit(laid_out(THREE), max_tokens=100, overlong="drop", context_tokens=0)
    assert (fitted.examples, fitted.actions) == ((), ())
    assert (fitted.reason, fitted.detail) == ("too_long", "130 tokens, above data.max_tokens 100")
    assert fitted.kept == {"split": (130, 54), "truncate": (90, 36), "drop": (0, 0)}


@pytest.mark.parametrize(("max_tokens", "length"), [(129, 90), (90, 90), (89, 50), (50, 50)])
def test_truncated_it_ends_after_the_last_answer_that_fits(max_tokens: int, length: int) -> None:
    encoded = laid_out(THREE)
    fitted = fit(encoded, max_tokens=max_tokens, overlong="truncate", context_tokens=0)
    assert (fitted.actions, fitted.reason) == (("overlong_truncated",), None)
    (cut,) = fitted.examples
    assert cut.input_ids.tolist() == list(range(length))
    assert cut.loss_weights.tolist() == encoded.example.loss_weights[:length].tolist()
    assert fitted.kept["truncate"] == TokenCounts(length, int(np.count_nonzero(cut.loss_weights)))


@pytest.mark.parametrize("turns", [THREE, [("user", 17, 0.0), ("assistant", 7, 0.0), *THREE]])
def test_truncated_without_a_weighted_answer_it_is_dropped(turns: Turns) -> None:
    fitted = fit(laid_out(turns), max_tokens=49, overlong="truncate", context_tokens=0)
    assert (fitted.examples, fitted.actions, fitted.reason) == ((), (), "too_long")
    assert fitted.detail.endswith(" tokens, above data.max_tokens 49, and no weighted answer ends within it")
    assert fitted.kept["truncate"] == (0, 0)


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
@pytest.mark.parametrize("max_tokens", [10, 1000])
def test_without_any_weight_nothing_is_kept(overlong: Overlong, max_tokens: int) -> None:
    encoded = laid_out([("user", 17, 0.0), ("assistant", 17, 1e-60)])
    fitted = fit(encoded, max_tokens=max_tokens, overlong=overlong, context_tokens=0)
    assert (fitted.examples, fitted.reason) == ((), "no_weight")
    assert set(fitted.kept.values()) == {(0, 0)}


# ---- Whole exchanges ----


def test_the_example_of_the_docstring() -> None:
    encoded = laid_out([("user", 7, 0.0), ("assistant", 7, 1.0)] * 3)
    fitted = split(encoded, 50, context_tokens=20)
    assert (fitted.actions, fitted.reason, fitted.detail) == (("overlong_split",), None, "")
    assert runs(fitted) == ["0-22 [22-30] 30-42 [42-50]", "0-10 30-62 [62-70]"]


@pytest.mark.parametrize(
    ("max_tokens", "context_tokens", "last"),
    [
        (129, 0, "0-10 90-112 [112-130]"),
        (129, 39, "0-10 90-112 [112-130]"),
        (129, 40, "0-10 50-112 [112-130]"),
        (129, 79, "0-10 50-112 [112-130]"),
        (90, 1000, "0-10 50-112 [112-130]"),  # half of the room
        (89, 1000, "0-10 90-112 [112-130]"),  # the exchange needs the room
    ],
)
def test_context_is_whole_turns_from_a_user_turn_within_its_limit(
    max_tokens: int, context_tokens: int, last: str
) -> None:
    assert runs(split(laid_out(THREE), max_tokens, context_tokens))[-1] == last


def test_context_begins_with_a_tool_turn_where_no_user_turn_is_near() -> None:
    calls: Turns = [("assistant", 17, 1.0), ("tool", 17, 0.0)] * 3
    encoded = laid_out([("user", 17, 0.0), *calls, ("assistant", 17, 1.0)])  # turns begin at 10, 30, ... 150
    assert runs(split(encoded, 90, context_tokens=59))[-1] == "0-10 90-152 [152-170]"
    assert runs(split(encoded, 90, context_tokens=19))[-1] == "0-10 90-112 [112-130] 130-152 [152-170]"


def test_masked_exchanges_are_context_or_left_out_and_never_parts() -> None:
    masked: Turns = [("user", 17, 0.0), ("assistant", 17, 0.0)]
    encoded = laid_out([*masked, *THREE[:2], *masked, *masked, *THREE[:2], *masked])  # exchanges from 10, 50, ... 210
    assert runs(split(encoded, 99, context_tokens=40)) == ["0-72 [72-90]", "0-10 130-192 [192-210]"]
    too_long: Turns = [("user", 17, 0.0), ("assistant", 500, 0.0)]
    assert runs(split(laid_out([*too_long, *THREE[:2]]), 99)) == ["0-10 533-555 [555-573]"]


def test_the_only_trained_answer_gets_all_the_context_that_fits_beside_it() -> None:
    masked: Turns = [("user", 17, 0.0), ("assistant", 17, 0.0)]
    encoded = laid_out([*masked * 4, *THREE[:2]])  # exchanges from 10, 50, 90, 130, 170
    assert runs(split(encoded, 209, context_tokens=0)) == ["0-10 50-192 [192-210]"]
    assert runs(split(encoded, 100, context_tokens=0)) == ["0-10 130-192 [192-210]"]


def test_a_weighted_user_turn_and_turns_after_the_last_answer_are_trained_too() -> None:
    turns: Turns = [("user", 17, 0.5), ("assistant", 17, 1.0), ("user", 17, 0.5), ("user", 17, 0.0)]
    fitted = split(laid_out(turns), 69)
    assert runs(fitted) == ["0-12 [12-30] 30-32 [32-50]", "0-10 50-52 [52-70]"]
    assert fitted.examples[1].loss_weights[-1] == 0.5


def naive_parts(encoded: Encoded, max_tokens: int, context_tokens: int) -> list[list[tuple[int, float]]]:
    """The parts as (position, weight), for conversations of which every exchange fits: by trying everything."""
    turns, weights = encoded.turns, encoded.example.loss_weights.tolist()
    while not any(weights[turns[-1].start : turns[-1].end]):
        turns.pop()
    groups: list[list[int]] = [[]]
    for position, turn in enumerate(turns):
        groups[-1].append(position)
        if turn.role == "assistant":
            groups.append([])
    groups = [group for group in groups if group]
    prefix = [(token, 0.0) for token in range(encoded.prefix_length)]

    def tokens(positions: list[int], is_trained: bool) -> list[tuple[int, float]]:
        return [
            (token, weights[token] if is_trained else 0.0)
            for position in positions
            for token in range(turns[position].start, turns[position].end)
        ]

    def fits(positions: list[int]) -> bool:
        after_end = turns[positions[-1]].end - turns[positions[-1]].weighted_end
        return len(prefix + tokens(positions, False)) - after_end <= max_tokens

    parts: list[list[tuple[int, float]]] = []
    while not any(weight for _, weight in tokens(groups[0], True)):
        groups.pop(0)
    while groups:
        own = groups.pop(0)
        contexts = [list(range(start, own[0])) for start in range(own[0])]
        contexts = [
            context
            for context in contexts
            if (not parts or len(tokens(context, False)) <= min(context_tokens, (max_tokens - len(prefix)) // 2))
            and fits(context + own)
        ]
        allowed = [["user"], [] if "user" in {turns[position].role for position in own} else ["tool", "system"]]
        found = [context for roles in allowed for context in contexts if turns[context[0]].role in roles]
        context = found[0] if found else []
        while groups and fits(context + own + groups[0]):
            own += groups.pop(0)
        while own and not any(weight for _, weight in tokens(own[-1:], True)):
            own.pop()
        if own:
            part = prefix + tokens(context, False) + tokens(own, True)
            while not part[-1][1]:
                part.pop()
            parts.append(part)
    return parts


ROLES: tuple[Role, ...] = ("user", "assistant", "assistant", "system", "tool")
WEIGHTS = st.sampled_from([0.0, 0.0, 0.1, 1.0])


@given(
    turns=st.lists(st.tuples(st.sampled_from(ROLES), st.integers(0, 12), WEIGHTS), min_size=4, max_size=14),
    prefix=st.integers(0, 10),
    after_end=st.integers(0, 1),
    max_tokens=st.integers(40, 150),
    context_tokens=st.integers(0, 90),
)
@settings(max_examples=200, deadline=None)
def test_whole_exchanges_equal_the_naive_split(
    turns: Turns, prefix: int, after_end: int, max_tokens: int, context_tokens: int
) -> None:
    encoded = laid_out(turns, prefix=prefix, after_end=after_end)
    starts = [turn.start for turn in encoded.turns]
    stops = [turn.end for turn in encoded.turns if turn.role == "assistant"]
    exchanges = pairwise([starts[0], *stops, encoded.turns[-1].end])
    assume(all(prefix + stop - start <= max_tokens for start, stop in exchanges))
    fitted = split(encoded, max_tokens, context_tokens)
    assume(fitted.actions)  # not within the limit, and not without weights
    found = [list(zip(p.input_ids.tolist(), p.loss_weights.tolist(), strict=True)) for p in fitted.examples]
    assert found == naive_parts(encoded, max_tokens, context_tokens)


def test_the_first_token_of_a_part_has_no_weight_even_without_prefix_and_header() -> None:
    turns: Turns = [("user", 19, 0.5), ("assistant", 19, 1.0)] * 2
    assert runs(split(laid_out(turns, prefix=0, header=0), 50)) == ["0-1 [1-40]", "40-41 [41-80]"]


# ---- Every conversation ----


@given(
    turns=st.lists(
        st.tuples(st.sampled_from(ROLES), st.integers(0, 30) | st.integers(0, 400), WEIGHTS), min_size=1, max_size=14
    ),
    prefix=st.integers(0, 60),
    header=st.integers(1, 6),
    after_end=st.integers(0, 2),
    max_tokens=st.integers(1, 300),
    context_tokens=st.integers(0, 200),
)
@settings(max_examples=600, deadline=None)
def test_every_weighted_token_is_trained_once_and_every_answer_ends(
    turns: Turns, prefix: int, header: int, after_end: int, max_tokens: int, context_tokens: int
) -> None:
    encoded = laid_out(turns, prefix=prefix, header=header, after_end=after_end)
    weights = encoded.example.loss_weights
    least = min(64, max(2, max_tokens // 4))
    fitted = split(encoded, max_tokens, context_tokens)
    assert bool(fitted.examples) == (fitted.reason is None)
    if fitted.reason == "no_weight":
        assert not weights.any()
        return
    if fitted.reason == "too_long":
        assert np.flatnonzero(weights)[-1] >= max_tokens
        frame = header + 1 + after_end
        assert max_tokens < prefix + 3 * frame + 2 * least
        return

    trained: dict[int, list[float]] = {}
    for part in fitted.examples:
        ids = part.input_ids.tolist()
        assert part.input_ids.dtype == np.int32
        assert part.loss_weights.dtype == np.float32
        assert len(ids) == len(part.loss_weights) <= max_tokens
        assert part.loss_weights[0] == 0 and part.loss_weights[-1] > 0
        assert ids[:prefix] == list(range(prefix))
        assert ids == sorted(set(ids))
        for position, weight in zip(ids, part.loss_weights.tolist(), strict=True):
            if weight:
                trained.setdefault(position, []).append(weight)
    assert trained == {int(position): [float(weights[position])] for position in np.flatnonzero(weights)}

    for before, turn in pairwise(encoded.turns):  # every answer begins after the end of its question
        if before.role != "assistant" and weights[turn.text_start : turn.end].any():
            holders = [p for p in fitted.examples if p.loss_weights[p.input_ids == turn.text_start].any()]
            (ids,) = (set(part.input_ids.tolist()) for part in holders)
            assert {*range(max(before.text_start, before.text_end - least), before.end)} <= ids

    if fitted.actions:
        assert sum(len(part.input_ids) - prefix for part in fitted.examples) <= 6 * len(weights)

    is_windowed = False
    for turn in encoded.turns:
        for part in fitted.examples:
            ids = part.input_ids.tolist()
            held = set(ids) & set(range(turn.start, turn.end))
            if not held:
                continue
            assert {*range(turn.start, turn.text_start)} <= held  # its header
            is_cut_at_right = turn.weighted_end - 1 not in held
            if is_cut_at_right:  # a window that is not the last one
                assert max(ids) in held and part.loss_weights[-1]
                assert turn.text_end - 1 not in held
                is_windowed = True
            else:
                end = turn.end if max(ids) >= turn.end else turn.weighted_end
                assert {*range(max(turn.text_start, turn.text_end - 1), end)} <= held
            body = sorted(held - {*range(turn.start, turn.text_start)})
            assert body == list(range(body[0], body[-1] + 1))  # only a beginning of a text is ever left out
    for part in fitted.examples:  # what a part leaves out between its turns is never a whole turn
        ids = set(part.input_ids.tolist())
        met = [n for n, turn in enumerate(encoded.turns) if ids & set(range(turn.start, turn.end))]
        assert met == list(range(met[0], met[-1] + 1))
    assert is_windowed == ("answer_windowed" in fitted.actions)

    distinct = {token for part in fitted.examples for token in part.input_ids.tolist()}
    assert fitted.kept["split"] == (len(distinct), int(np.count_nonzero(weights)))
    ends = [turn.weighted_end for turn in encoded.turns if turn.role == "assistant" and turn.weighted_end <= max_tokens]
    if np.flatnonzero(weights)[-1] >= max_tokens:
        weighted = np.flatnonzero(weights[: ends[-1]]).tolist() if ends else []
        assert fitted.kept["truncate"] == ((weighted[-1] + 1, len(weighted)) if weighted else (0, 0))
        assert fitted.kept["drop"] == (0, 0)


# ---- One exchange longer than the context ----


def test_a_question_loses_its_beginning_and_keeps_header_and_end() -> None:
    encoded = laid_out([("user", 400, 0.0), ("assistant", 97, 1.0)])  # 10-413, 413-513
    fitted = split(encoded, 300)
    assert fitted.actions == ("overlong_split", "question_cut")
    assert runs(fitted) == ["0-12 225-415 [415-513]"]  # 300 tokens
    assert fitted.kept == {"split": (300, 98), "truncate": (0, 0), "drop": (0, 0)}
    twice = split(laid_out([("user", 400, 0.0), ("assistant", 97, 1.0)] * 2), 300)
    assert (twice.actions, len(twice.examples)) == (fitted.actions, 2)


def test_the_oldest_turns_of_a_question_go_first() -> None:
    turns: Turns = [("user", 97, 0.0), ("tool", 197, 0.0), ("tool", 97, 0.0), ("assistant", 97, 1.0)]
    encoded = laid_out(turns)  # turns begin at 10, 110, 310, 410, and the last ends at 510
    assert runs(split(encoded, 410)) == ["0-10 110-412 [412-510]"]
    assert runs(split(encoded, 409)) == ["0-10 110-112 113-412 [412-510]"]
    assert runs(split(encoded, 277)) == ["0-10 110-112 245-412 [412-510]"]  # 64 tokens are left of the text
    assert runs(split(encoded, 276)) == ["0-10 310-412 [412-510]"]


def test_an_answer_longer_than_the_context_is_trained_in_windows_of_which_the_last_one_ends() -> None:
    encoded = laid_out([("user", 400, 0.0), ("assistant", 600, 1.0)])  # 10-413, 413-1016
    fitted = split(encoded, 300, context_tokens=100)
    assert fitted.actions == ("overlong_split", "question_cut", "answer_windowed")
    assert runs(fitted) == [
        "0-12 271-415 [415-559]",
        "0-10 413-415 459-559 [559-747]",
        "0-10 413-415 647-747 [747-935]",
        "0-10 413-415 835-935 [935-1016]",
    ]


@pytest.mark.parametrize(
    ("context_tokens", "second"), [(0, "413-415 495-559"), (65, "413-415 494-559"), (999, "413-559")]
)
def test_a_window_follows_at_least_64_tokens_and_at_most_half_a_room(context_tokens: int, second: str) -> None:
    encoded = laid_out([("user", 400, 0.0), ("assistant", 600, 1.0)])
    assert runs(split(encoded, 300, context_tokens))[1].startswith(f"0-10 {second} [559-")


def test_an_answer_that_leaves_64_tokens_to_its_question_stays_whole() -> None:
    for text, actions in ((220, ("question_cut",)), (221, ("question_cut", "answer_windowed"))):
        # The room of 290 holds two headers and end tokens of 3, a text of 220, and 64 tokens of the question.
        fitted = split(laid_out([("user", 400, 0.0), ("assistant", text, 1.0)]), 300)
        assert fitted.actions == ("overlong_split", *actions)
    short = laid_out([("user", 20, 0.0), ("assistant", 267, 1.0)])
    assert runs(split(short, 303)) == ["0-35 [35-303]"]
    assert split(short, 302).actions == ("overlong_split", "answer_windowed")


@pytest.mark.parametrize("text", range(430, 440))
def test_the_end_token_stays_with_the_last_token_of_the_text(text: int) -> None:
    encoded = laid_out([("assistant", text, 1.0)], after_end=2)  # 290 of room: 288, then 144 after as many
    last = split(encoded, 300, context_tokens=144).examples[-1]
    assert last.loss_weights[-2:].tolist() == [1.0, 1.0]
    assert last.input_ids[-2:].tolist() == [12 + text - 1, 12 + text]


def test_weighted_turns_of_one_long_exchange_are_trained_one_by_one() -> None:
    turns: Turns = [("user", 197, 0.5), ("tool", 197, 0.0), ("assistant", 97, 1.0)]  # 10-210, 210-410, 410-510
    assert runs(split(laid_out(turns), 400)) == ["0-12 [12-210]", "0-12 122-412 [412-510]"]


def test_short_turns_of_one_long_exchange_share_a_part() -> None:
    pairs: Turns = [("user", 17, 0.5), ("tool", 17, 0.0)] * 4
    turns: Turns = [("tool", 497, 0.0), *pairs, ("assistant", 17, 1.0)]
    fitted = split(laid_out(turns), 210)  # the first user turn begins at 510, the answer at 670
    # Half of the room is 100 tokens: two pairs of 40 and a user turn.
    assert runs(fitted) == [
        "0-12 412-512 [512-530] 530-552 [552-570] 570-592 [592-610]",
        "0-10 510-632 [632-650] 650-672 [672-690]",
    ]


def test_exchanges_beside_a_long_one_are_split_as_ever() -> None:
    turns: Turns = [*THREE[:2], ("user", 17, 0.0), ("assistant", 300, 1.0), *THREE[:2]]  # 10-50, 50-373, 373-413
    fitted = split(laid_out(turns), 200, context_tokens=50)
    assert fitted.actions == ("overlong_split", "answer_windowed")
    assert runs(fitted) == [
        "0-32 [32-50]",
        "0-10 50-72 [72-240]",
        "0-10 70-72 190-240 [240-373]",
        "0-10 373-395 [395-413]",
    ]


def test_a_system_message_that_fills_the_context_is_a_reason_to_drop() -> None:
    fits = laid_out([("user", 400, 0.0), ("assistant", 400, 1.0)], prefix=300)
    assert split(fits, 437).examples
    fitted = split(fits, 436)
    assert (fitted.examples, fitted.actions, fitted.reason) == ((), (), "too_long")
    assert fitted.detail == (
        "1,106 tokens, above data.max_tokens 436, "
        "and the 300 tokens that begin each part leave too little room for a turn"
    )


def test_exchanges_that_fit_are_kept_after_any_system_message() -> None:
    fitted = split(laid_out(THREE, prefix=300), 340, context_tokens=100)
    assert runs(fitted) == ["0-322 [322-340]", "0-300 340-362 [362-380]", "0-300 380-402 [402-420]"]


# ---- Real templates and tokenizers ----


STORY = (
    Message("system", "Rhyme if you can.", 0.5),  # it has a weight, so it is a turn
    Message("user", "Name a colour of the sky.", 0.0),
    Message("assistant", "Blue, by day.", 1.0),
    Message("user", "And at night?", 0.0),
    Message("tool", "clock: 23", 0.0),
    Message("assistant", "Black, with stars.", 1.0),
    Message("system", "Be brief.", 0.0),
    Message("user", "At dawn?", 0.0),
    Message("assistant", "Red.", 1.0),
)

READS = {
    "openchat_v3.2": [
        "<s> You see.<|end_of_turn|>[Rhyme if you can.<|end_of_turn|>]"
        "GPT4 User: Name a colour of the sky.<|end_of_turn|> GPT4 Assistant:[Blue, by day.<|end_of_turn|>]"
        "GPT4 User: And at night?<|end_of_turn|> GPT4 Tool: clock: 23<|end_of_turn|> "
        "GPT4 Assistant:[Black, with stars.<|end_of_turn|>]",
        "<s> You see.<|end_of_turn|> GPT4 User: And at night?<|end_of_turn|> GPT4 Tool: clock: 23<|end_of_turn|> "
        "GPT4 Assistant: Black, with stars.<|end_of_turn|> Be brief.<|end_of_turn|> GPT4 User: At dawn?<|end_of_turn|> "
        "GPT4 Assistant:[Red.<|end_of_turn|>]",
    ],
    "openchat_v3.1": [
        "<s> Assistant is GPT4<|end_of_turn|> You see.<|end_of_turn|>[Rhyme if you can.<|end_of_turn|>]"
        "User: Name a colour of the sky.<|end_of_turn|> Assistant:[Blue, by day.<|end_of_turn|>]"
        "User: And at night?<|end_of_turn|> Tool: clock: 23<|end_of_turn|> "
        "Assistant:[Black, with stars.<|end_of_turn|>]",
        "<s> Assistant is GPT4<|end_of_turn|> You see.<|end_of_turn|> User: And at night?<|end_of_turn|> "
        "Tool: clock: 23<|end_of_turn|> Assistant: Black, with stars.<|end_of_turn|> Be brief.<|end_of_turn|> "
        "User: At dawn?<|end_of_turn|> Assistant:[Red.<|end_of_turn|>]",
    ],
}


def tokenizer_for(template: str, shared: Path) -> ChatTokenizer:
    """The Llama 2 tokenizer with all special tokens of a template."""
    pretrained = AutoTokenizer.from_pretrained(shared / "fixtures/llama2-tokenizer")
    pretrained.add_tokens(list(TEMPLATES[template].special_tokens), special_tokens=True)
    return ChatTokenizer(pretrained, TEMPLATES[template])


def encode_messages(messages: Sequence[Message], tokenizer: ChatTokenizer) -> Encoded:
    conversation = Conversation("id", "source", "GPT4", "You see.", tuple(messages))
    return encode([conversation], tokenizer.template, tokenizer)[0]


def shown(tokenizer: ChatTokenizer, part: Example) -> str:
    """The text of a part, its trained runs in brackets."""
    rows = zip(part.input_ids.tolist(), (part.loss_weights > 0).tolist(), strict=True)
    runs = [(is_trained, [id_ for id_, _ in run]) for is_trained, run in groupby(rows, key=lambda row: row[1])]
    texts = [(is_trained, tokenizer.pretrained.decode(ids)) for is_trained, ids in runs]
    return "".join(f"[{text}]" if is_trained else text for is_trained, text in texts)


@pytest.mark.parametrize("template", READS)
def test_a_split_conversation_reads_like_this(template: str, shared: Path) -> None:
    tokenizer = tokenizer_for(template, shared)
    fitted = split(encode_messages(STORY, tokenizer), 74, context_tokens=45)
    assert [shown(tokenizer, part) for part in fitted.examples] == READS[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_part_has_the_ids_of_its_turns_alone(template: str, shared: Path) -> None:
    tokenizer = tokenizer_for(template, shared)
    encoded = encode_messages(STORY, tokenizer)
    turns = [encode_messages(STORY[start:stop], tokenizer) for start, stop in combinations(range(len(STORY) + 1), 2)]
    alone = [turn.example.input_ids[: turn.turns[-1].weighted_end].tolist() for turn in turns]
    longest = max(encoded.turns[last].end - encoded.turns[last - 2].start for last in (2, 5, 8))
    for max_tokens in range(encoded.prefix_length + longest, encoded.turns[-1].weighted_end):
        fitted = split(encoded, max_tokens, context_tokens=45)
        assert fitted.actions == ("overlong_split",)
        assert all(part.input_ids.tolist() in alone for part in fitted.examples)
