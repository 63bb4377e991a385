"""Duplicates and the held-out split: against naive versions, and the same whatever the order."""

import pickle
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_train.conversations import dedupe
from ochat_train.conversations.dedupe import (
    EXACT,
    KEEP,
    NEAR,
    PREFIX,
    Decisions,
    find_duplicates,
    needs_minhash,
)
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.text_keys import NUM_HASHES, TextKeys, text_keys

WORDS = np.array([f"{a}{b}{c}" for a in "bcdfgklmnprst" for b in "aeiou" for c in "bdgklmnprstx"])


def chat(*texts: str, system: str = "", weight: float = 1.0, id: str = "", condition: str = "GPT4") -> Conversation:
    """User and assistant in turn; the answers have the weight."""
    messages = tuple(
        Message("assistant", text, weight) if number % 2 else Message("user", text, 0.0)
        for number, text in enumerate(texts)
    )
    return Conversation(id=id, source="dump", condition=condition, system=system, messages=messages)


def weighted(conversation: Conversation, *weights: float) -> Conversation:
    """With these weights on its answers."""
    left = iter(weights)
    messages = (replace(m, weight=next(left)) if m.role == "assistant" else m for m in conversation.messages)
    return replace(conversation, messages=tuple(messages))


def decide(
    conversations: Sequence[Conversation],
    *,
    exact: bool = True,
    prefix: bool = True,
    near: float | None = None,
    eval_fraction: float = 0.0,
    shard_size: int = 1000,
) -> Decisions:
    shards = (
        text_keys(conversations[start : start + shard_size], minhash=needs_minhash(near, eval_fraction))
        for start in range(0, len(conversations), shard_size)
    )
    return find_duplicates(shards, exact=exact, prefix=prefix, near=near, eval_fraction=eval_fraction)


def own(conversation: Conversation) -> int:
    return int(text_keys([conversation], minhash=False).own[0])


def similarities(keys: TextKeys) -> np.ndarray:
    """f64[N, N]: the estimate for every pair."""
    return np.array([(keys.signatures == row).mean(axis=1) for row in keys.signatures])


# Keys


def naive_own_key(conversation: Conversation) -> int:
    def framed(text: str) -> bytes:
        data = " ".join(unicodedata.normalize("NFKC", text).split()).encode("utf-8", "surrogatepass")
        return str(len(data)).encode() + b":" + data

    parts = [framed(conversation.system)]
    for message in conversation.messages:
        parts.append(message.role.encode() + (b" 1 " if message.weight else b" 0 ") + framed(message.text))
    return int.from_bytes(blake2b(b"".join(parts), digest_size=8).digest(), "little")


SPACES = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())


@given(
    st.lists(
        st.lists(
            st.text(st.sampled_from(SPACES + "ab\u200b\uff21\ufb01²é\u0301漢\ud800") | st.characters(), max_size=8),
            min_size=1,
        ),
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_own_key_is_the_naive_hash_of_the_normalised_texts(dump: list[list[str]]) -> None:
    conversations = [chat(*texts[1:], system=texts[0]) for texts in dump]
    assert text_keys(conversations, minhash=False).own.tolist() == [naive_own_key(c) for c in conversations]


def test_every_kind_of_white_space_is_one_space() -> None:
    assert len(SPACES) > 20
    assert {own(chat("a b", f"x{space}{space} y")) for space in SPACES} == {own(chat("a b", "x y"))}


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    assert own(chat("Hi", "Hello")) == 0xDC65FB311A91F944
    assert question(chat(ASKED)) == 0x4B83760E39BD4CEF


@pytest.mark.parametrize(
    "other",
    [
        chat("  What is\t2 + 2?\n", "It is 4.\r\n\r\nReally."),
        chat("What is 2 + 2?", "It is 4.\u00a0Really. "),
        chat("What is 2 + \uff12?", "It is \uff14. Really."),
        chat("What is 2 + 2?", "It is 4. Really.", id="other", condition="GPT3", weight=0.1, system="  "),
    ],
)
def test_variants_in_white_space_and_compatibility_forms_are_exact_duplicates(other: Conversation) -> None:
    first = chat("What is 2 + 2?", "It is 4. Really.")
    assert sorted(decide([first, other]).status.tolist()) == [KEEP, EXACT]


@pytest.mark.parametrize(
    "other",
    [
        chat("a", "bc"),
        chat("abc", ""),
        chat("", "abc"),
        chat("ab 1:c", ""),
        chat("ab", "C"),
        chat("ab", "c", system="x"),
        chat("ab", system="c"),
        Conversation("", "dump", "GPT4", "", (Message("assistant", "ab", 1.0), Message("user", "c", 0.0))),
        Conversation("", "dump", "GPT4", "", (Message("user", "ab", 0.0), Message("tool", "c", 0.0))),
        Conversation("", "dump", "GPT4", "ab", (Message("assistant", "c", 1.0),)),
    ],
)
def test_the_same_letters_joined_or_said_otherwise_are_no_duplicates(other: Conversation) -> None:
    first = chat("ab", "c")
    assert own(other) != own(first)
    assert decide([first, other]).status.tolist() == [KEEP, KEEP]


def test_prefixes_are_the_own_keys_of_what_was_there_at_each_earlier_answer() -> None:
    texts = ["one", "two", "three", "four", "five", "six"]
    keys = text_keys([chat("x", "y"), chat(*texts, system="s"), chat(*texts[:5])], minhash=False)
    assert keys.num_prefixes.tolist() == [0, 2, 2]
    assert keys.prefixes.tolist() == [
        *(own(chat(*texts[:end], system="s")) for end in (2, 4)),
        *(own(chat(*texts[:end])) for end in (2, 4)),
    ]


def test_weight_counts_before_length_and_length_before_the_hash() -> None:
    ordered = [
        chat("q", "long answer", weight=0.0),
        chat("q", "answer", weight=0.1),
        chat("q", "long answer", weight=0.1),
        chat("a much longer question", "long answer!", weight=0.1),
        chat("q", "a", weight=1.0),
        chat("q", "a", "q", "a", weight=1.0),
        chat("q", "a", weight=float(np.nextafter(np.float32(1), np.float32(2)))),
    ]
    priority = text_keys(ordered, minhash=False).priority.tolist()
    assert [first for first, _ in priority] == sorted({first for first, _ in priority})

    equal = [chat("q", "a b", id=id) for id in ("1", "2")] + [chat("q", "a\tb", id="1"), chat("q", "a b", condition="")]
    assert len({first for first, _ in text_keys(equal, minhash=False).priority.tolist()}) == 1
    assert len({second for _, second in text_keys(equal, minhash=False).priority.tolist()}) == 4


def test_keys_do_not_depend_on_their_batch() -> None:
    conversations = make_dump(np.random.default_rng(5), 60)
    conversations += [
        chat("hi", "?"),
        chat("!", "..."),
        chat("x" * 100_000 + " y", "漢字かな 한글 é"),
        chat("a b", "c d e"),
    ]
    whole = text_keys(conversations, minhash=True)
    parts = [text_keys([conversation], minhash=True) for conversation in conversations]
    for name in TextKeys.__dataclass_fields__:
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))
        assert joined.dtype == getattr(whole, name).dtype


def test_keys_survive_files_and_pickles(tmp_path: Path) -> None:
    for minhash, dump in ((True, [chat("a", "b", "c", "d")]), (False, [chat("a", "b")]), (True, [])):
        keys = text_keys(dump, minhash=minhash)
        for name in ("one", "two"):
            keys.save(tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        for copy in (TextKeys.load(tmp_path / "one"), pickle.loads(pickle.dumps(keys))):
            for name in TextKeys.__dataclass_fields__:
                np.testing.assert_array_equal(getattr(copy, name), getattr(keys, name))
                assert getattr(copy, name).shape == getattr(keys, name).shape


# MinHash


def naive_shingles(conversation: Conversation) -> set[tuple[str, ...]]:
    text = " ".join(unicodedata.normalize("NFKC", message.text) for message in conversation.messages).lower()
    words = re.findall(r"[\u3000-\udfff]|(?:[a-z0-9]|[^\x00-\x7f\u3000-\udfff])+", text)
    return {tuple(words[start : start + 5]) for start in range(max(len(words) - 4, 1))}


def naive_jaccard(left: Conversation, right: Conversation) -> float:
    one, two = naive_shingles(left), naive_shingles(right)
    return len(one & two) / len(one | two)


def make_text(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, num_words).tolist())


def change_words(rng: np.random.Generator, text: str, share: float) -> str:
    words = np.array(text.split(" "))
    changed = rng.random(len(words)) < share
    return " ".join(np.where(changed, rng.choice(WORDS, len(words)), words).tolist())


def test_the_share_of_equal_values_estimates_the_similarity_of_the_shingle_sets() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for number in range(60):
        text = make_text(rng, int(rng.integers(20, 400)))
        if number % 3 == 1:
            text = re.sub("[aeiou]", lambda match: "äéіõ漢"["aeiou".index(match[0])], text)
        pair = [chat("Tell me, now", text), chat("TELL ME NOW!", change_words(rng, text, rng.uniform(0, 0.1)).upper())]
        truth = naive_jaccard(*pair)
        errors.append(
            (similarities(text_keys(pair, minhash=True))[0, 1] - truth) / (truth * (1 - truth) / 128 + 1e-9) ** 0.5
        )
    assert np.abs(errors).max() < 3
    assert abs(np.mean(errors)) < 3 / 60**0.5
    assert np.std(errors) < 1.3


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("One, two", "one two", True),
        ("one two", "two one", False),
        ("one two", "one two two", False),
        ("漢字", "漢 字", True),
        ("abc漢def", "abc 漢 def", True),
        ("ЖУК", "жук", True),
        ("ab", "a b", False),
        ("?", "!", False),
        ("...", "…", True),
    ],
)
def test_what_counts_as_a_word(left: str, right: str, equal: bool) -> None:
    signatures = text_keys([chat(left, ""), chat(right, "")], minhash=True).signatures
    assert np.array_equal(signatures[0], signatures[1]) == equal


def test_a_system_text_does_not_make_conversations_alike() -> None:
    rng = np.random.default_rng(1)
    system = make_text(rng, 2000)
    dump = [chat(make_text(rng, 20), make_text(rng, 50), system=system) for _ in range(2)]
    assert similarities(text_keys(dump, minhash=True))[0, 1] < 0.1


# Exact copies and prefixes


def normalised(conversation: Conversation) -> tuple[object, ...]:
    texts = [" ".join(unicodedata.normalize("NFKC", message.text).split()) for message in conversation.messages]
    losses = [(message.role, bool(message.weight)) for message in conversation.messages]
    return (conversation.system, *zip(losses, texts, strict=True))


def naive_copies(conversations: Sequence[Conversation], *, exact: bool, prefix: bool) -> list[tuple[int, set[int]]]:
    """(status, the positions that `of` may be) of each, by comparing all with all."""
    keys = [normalised(conversation) for conversation in conversations]

    def rank(position: int) -> tuple[float, int]:
        messages = conversations[position].messages
        return max(m.weight or 0 for m in messages), sum(len(m.text) for m in messages if m.weight)

    decisions: list[tuple[int, set[int]]] = []
    for key in keys:
        longer = [i for i, other in enumerate(keys) if len(other) > len(key) and other[: len(key)] == key]
        same = [i for i, other in enumerate(keys) if other == key]
        if prefix and longer:
            longest = [i for i in longer if len(keys[i]) == max(len(keys[j]) for j in longer)]
            decisions.append((PREFIX, {i for i in longest if rank(i) == max(map(rank, longest))}))
        else:
            decisions.append((EXACT if exact else KEEP, {i for i in same if rank(i) == max(map(rank, same))}))
    return decisions


@pytest.mark.parametrize(("exact", "prefix"), [(True, True), (True, False), (False, True)])
def test_copies_and_prefixes_are_those_that_comparing_all_with_all_finds(exact: bool, prefix: bool) -> None:
    rng = np.random.default_rng(2)
    dump = []
    for number in range(600):
        texts = rng.choice(["x", "y", "x ", "\ty"], 2 * int(rng.integers(1, 5))).tolist()
        system = str(rng.choice(["", "", "s"]))
        whole = chat(*texts, system=system, id=str(number))
        weights = np.where(rng.random(len(texts)) < 0.15, 0.0, rng.choice([0.1, 1.0]))
        dump.append(weighted(whole, *weights[1::2].tolist()))
    decisions = decide(dump, exact=exact, prefix=prefix, shard_size=64)

    seen = set()
    for position, (status, candidates) in enumerate(naive_copies(dump, exact=exact, prefix=prefix)):
        of = int(decisions.of[position])
        if of == -1:
            assert decisions.status[position] == KEEP
            assert status == KEEP or (status == EXACT and position in candidates)
        else:
            assert decisions.status[position] == status
            assert of in candidates and of != position
            assert decisions.status[of] == KEEP or not exact
        seen.add(int(decisions.status[position]))
    # Of a set of copies exactly one stays.
    kept = [normalised(dump[position]) for position in np.flatnonzero(decisions.status == KEEP)]
    assert len(kept) == len(set(kept)) or not exact
    assert seen == {KEEP} | ({EXACT} if exact else set()) | ({PREFIX} if prefix else set())


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_of_the_snapshots_of_a_growing_chat_the_longest_stays(order: tuple[int, ...]) -> None:
    texts = ["How do I sort a list?", "Use sorted().", "In place?", "Use list.sort().", "Thanks", "You are welcome."]
    snapshots = [chat(*texts[: 2 * size], id=str(size), weight=1.0 / size) for size in (1, 2, 3)]
    decisions = decide([snapshots[number] for number in order], shard_size=1)
    longest = order.index(2)
    assert [decisions.status[order.index(number)] for number in range(3)] == [PREFIX, PREFIX, KEEP]
    assert [decisions.of[order.index(number)] for number in range(3)] == [longest, longest, -1]


def test_a_snapshot_points_to_the_copy_of_the_longer_chat_that_stays() -> None:
    short, long = ("a", "b"), ("a", "b", "c", "d")
    dump = [chat(*short), chat(*long, weight=0.1), chat(*long, weight=1.0), chat(*short, weight=1.0, id="2")]
    decisions = decide(dump)
    assert decisions.status.tolist() == [PREFIX, EXACT, KEEP, PREFIX]
    assert decisions.of.tolist() == [2, 2, -1, 2]


def test_another_branch_of_a_chat_and_a_question_cut_off_are_no_prefixes() -> None:
    dump = [
        chat("a", "b", "c", "d"),
        chat("a", "b", "c", "e"),
        chat("a"),
        chat("a", "b", "c"),
        chat("a", "b", system="s"),
    ]
    assert decide(dump).status.tolist() == [KEEP] * 5


def test_the_records_of_one_chat_that_train_one_answer_each_all_stay() -> None:
    texts = ["How do I sort a list?", "Use sorted().", "In place?", "Use list.sort().", "Thanks", "You are welcome."]
    dump = [weighted(chat(*texts[: 2 * size]), *[0.0] * (size - 1), 1.0) for size in (1, 2, 3)]
    assert decide(dump).status.tolist() == [KEEP] * 3
    assert decide([*dump, chat(*texts)]).status.tolist() == [PREFIX, KEEP, KEEP, KEEP]


def test_a_copy_that_trains_other_answers_stays_and_one_that_trains_the_same_goes() -> None:
    text = chat("a", "b", "c", "d")
    dump = [weighted(text, 1.0, 0.0), weighted(text, 0.0, 1.0), weighted(text, 0.1, 0.0), weighted(text, 1.0, 1.0)]
    decisions = decide(dump)
    assert (decisions.status.tolist(), decisions.of.tolist()) == ([KEEP, KEEP, EXACT, KEEP], [-1, -1, 0, -1])
    decisions = decide([weighted(chat("a", "b"), 0.1), dump[0], dump[1]])
    assert (decisions.status.tolist(), decisions.of.tolist()) == ([PREFIX, KEEP, KEEP], [1, -1, -1])


# Near-duplicates


def test_templated_short_conversations_are_no_near_duplicates() -> None:
    capitals = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima"}
    dump = [chat(f"What is the capital of {c}?", f"The capital of {c} is {town}.") for c, town in capitals.items()]
    dump += [chat("Hi", "Hello!"), chat("Hi", "Hi!"), chat("!", "?"), chat("?", "!")]
    assert decide(dump, near=0.8).status.tolist() == [KEEP] * 8


def test_long_conversations_that_differ_by_a_typo_are_near_duplicates() -> None:
    answer = make_text(np.random.default_rng(3), 150)
    dump = [chat("Explain this.", answer + " recieve", weight=0.1), chat("Explain this!", answer + " receive")]
    decisions = decide(dump, near=0.8)
    assert (decisions.status.tolist(), decisions.of.tolist()) == ([NEAR, KEEP], [1, -1])
    assert decide(dump, near=None).status.tolist() == [KEEP, KEEP]


def test_the_answer_of_another_model_is_no_near_duplicate() -> None:
    answer = make_text(np.random.default_rng(3), 150)
    dump = [chat("Explain.", answer), chat("Explain!", answer + " so", condition="GPT3")]
    assert decide(dump, near=0.8).status.tolist() == [KEEP, KEEP]


def test_pairs_above_the_threshold_are_found_and_pairs_far_below_never() -> None:
    rng = np.random.default_rng(4)
    dump = []
    for _ in range(300):
        text = make_text(rng, 300)
        for share in (0.005, 0.15):
            dump += [chat("q", text), chat("q", change_words(rng, text, share))]
            text = make_text(rng, 300)
    status = decide(dump, exact=False, near=0.8, shard_size=100).status.reshape(300, 4)
    truth = np.array([naive_jaccard(dump[i], dump[i + 1]) for i in range(0, len(dump), 2)]).reshape(300, 2)
    dropped = np.stack([(status[:, :2] == NEAR).any(axis=1), (status[:, 2:] == NEAR).any(axis=1)], axis=1)
    assert (truth >= 0.9).sum() > 200 and (truth < 0.6).sum() > 200
    assert dropped[truth >= 0.9].all()
    assert not dropped[truth < 0.6].any()


def test_a_near_duplicate_is_similar_to_a_better_one_of_its_condition_and_no_close_pair_stays() -> None:
    dump = make_dump(np.random.default_rng(6), 1500)
    keys = text_keys(dump, minhash=True)
    decisions = decide(dump, near=0.8)
    dropped = np.flatnonzero(decisions.status == NEAR)
    leaders = decisions.of[dropped]
    assert len(dropped) > 50
    assert ((keys.signatures[dropped] == keys.signatures[leaders]).mean(axis=1) >= 0.8).all()
    assert (keys.condition[dropped] == keys.condition[leaders]).all()
    assert all(
        keys.priority[leader].tolist() > keys.priority[copy].tolist()
        for copy, leader in zip(dropped, leaders, strict=True)
    )
    similar = similarities(keys) >= 0.9
    similar &= keys.condition[:, None] == keys.condition
    kept = np.flatnonzero(decisions.status == KEEP)
    assert np.array_equal(similar[np.ix_(kept, kept)], np.eye(len(kept), dtype=bool))


def keys_of(signatures: np.ndarray, own: np.ndarray) -> TextKeys:
    """One condition, the first the best."""
    size = len(own)
    priority = np.stack([np.arange(size, 0, -1), np.zeros(size)], axis=1).astype(np.uint64)
    none = np.zeros(size, np.uint64)
    signatures, held_out = signatures.astype(np.uint16), np.zeros(size, np.bool_)
    return TextKeys(own, np.zeros(size, np.int32), none[:0], priority, none, own, none, signatures, held_out, none[:0])


def one_run(rng: np.random.Generator) -> np.ndarray:
    """Four signatures that share the first band of 0.8 and no other; the last two are similar."""
    signatures = rng.integers(0, 1 << 16, (4, NUM_HASHES))
    signatures[3] = signatures[2]
    signatures[3, 7::7] += 1
    signatures[:, :7] = signatures[0, :7]
    return signatures


@pytest.mark.parametrize(("max_leaders", "expected"), [(3, [-1, -1, -1, 2]), (2, [-1, -1, -1, -1])])
def test_after_the_last_leader_of_a_run_near_duplicates_stay(
    max_leaders: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedupe, "MAX_LEADERS", max_leaders)
    keys = keys_of(one_run(np.random.default_rng(0)), np.arange(4, dtype=np.uint64))
    decisions = find_duplicates([keys], exact=True, prefix=True, near=0.8, eval_fraction=0)
    assert decisions.of.tolist() == expected


@pytest.mark.parametrize(("max_leaders", "together"), [(3, (2, 3)), (1, (0, 1, 2, 3)), (2, (1, 2, 3))])
def test_after_the_last_leader_of_a_run_all_are_one_group(
    max_leaders: int, together: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedupe, "MAX_LEADERS", max_leaders)
    rng = np.random.default_rng(0)
    held_out = []
    for _ in range(30):
        keys = keys_of(one_run(rng), rng.integers(0, 1 << 63, 4, dtype=np.uint64))
        held_out.append(find_duplicates([keys], exact=True, prefix=True, near=None, eval_fraction=0.5).held_out)
    same = np.array([[np.array_equal(one, two) for two in np.transpose(held_out)] for one in np.transpose(held_out)])
    expected = np.eye(4, dtype=bool)
    expected[np.ix_(together, together)] = True
    assert np.array_equal(same, expected)


# The held-out split


def test_no_group_is_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedupe, "BLOCK_SIZE", 200)
    dump = make_dump(np.random.default_rng(7), 1500)
    for near in (None, 0.85):
        decisions = decide(dump, near=near, eval_fraction=0.3)
        kept = np.flatnonzero(decisions.status == KEEP)
        assert not decisions.held_out[decisions.status != KEEP].any()
        keys = text_keys([dump[position] for position in kept], minhash=True)
        held_out = decisions.held_out[kept]
        on_both_sides = held_out[:, None] != held_out
        close = similarities(keys) >= 0.9  # also across conditions
        question = np.array([" ".join(dump[position].messages[0].text.split()) for position in kept])
        same_question = question[:, None] == question
        assert close.sum() > len(kept) + 20 and same_question.sum() > len(kept) + 20
        assert (same_question & ~close).sum() > 20
        assert not (on_both_sides & (close | same_question)).any()
        assert 0.2 < held_out.mean() < 0.4


def question(conversation: Conversation) -> int:
    return int(text_keys([conversation], minhash=False).question[0])


GREETING = Message("assistant", "What can I do for you?", 0.0)
ASKED = "Why is the sky blue?"


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (chat(ASKED, "Rayleigh."), chat(f" {ASKED}\n", "No idea.", "So?", condition="GPT3", weight=0.0), True),
        (chat(ASKED, "a"), chat(ASKED, "a", system="Be brief."), True),
        (chat(ASKED, "a"), chat(ASKED), True),
        (chat(ASKED, "a"), chat("Why is the sky red?", "a"), False),
        (chat("Why is the sky", "a"), chat("Why is the sky", "b"), False),
        (chat("Hi", "Hello!", "One", "1"), chat("Hi", "Hello! ", "Two", "2", system="s", weight=0.0), True),
        (chat("Hi", "Hello!"), chat("Hi", "Good day!"), False),
        (chat("Hi", "Hello!"), chat("Hello", "Hello!"), False),
        (chat("Hi", "Hello!"), chat("Hi"), False),
        (chat("!" * 50, "a"), chat("!" * 50, "b"), False),
        (chat("天空为什么", "a"), chat("天空为什么", "b"), True),
        (chat("为什么呢", "a"), chat("为什么呢", "b"), False),
        (chat("Почему небо такое синее днём", "a"), chat("Почему небо такое синее днём", "b"), True),
        (chat("Почему небо синее", "a"), chat("Почему небо синее", "b"), False),
        (
            Conversation("", "", "", "", (GREETING, *chat("Hi", "a").messages)),
            Conversation("", "", "", "", (GREETING, *chat("Hi", "b").messages)),
            False,
        ),
        (Conversation("", "", "", "", (GREETING, *chat(ASKED, "a").messages)), chat(ASKED, "b"), True),
        (
            Conversation("", "", "", "", (GREETING,)),
            Conversation("", "", "", "", (Message("assistant", ASKED, 1.0),)),
            False,
        ),
    ],
)
def test_what_counts_as_the_same_first_question(left: Conversation, right: Conversation, equal: bool) -> None:
    assert (question(left) == question(right)) == equal


def test_answers_of_two_models_with_and_without_a_system_text_are_on_one_side_of_the_split() -> None:
    rng = np.random.default_rng(12)
    dump = []
    for _ in range(60):
        asked = make_text(rng, 5)
        dump += [chat(asked, make_text(rng, 60), condition=condition) for condition in ("GPT4", "GPT3")]
        dump.append(chat(asked, make_text(rng, 60), make_text(rng, 5), make_text(rng, 60), system=make_text(rng, 9)))
    held_out = decide(dump, eval_fraction=0.5).held_out.reshape(60, 3)
    assert (held_out == held_out[:, :1]).all()
    assert 15 < held_out[:, 0].sum() < 45


def test_conversations_that_only_begin_with_the_same_greeting_are_split() -> None:
    rng = np.random.default_rng(13)
    dump = [chat("Hello there!", make_text(rng, 60)) for _ in range(200)]
    assert 60 < decide(dump, eval_fraction=0.5).held_out.sum() < 140


def test_a_group_goes_on_from_one_to_the_next() -> None:
    rng = np.random.default_rng(8)
    held_out = []
    for _ in range(20):
        # Every step changes about a tenth of the values, and ten steps all of them.
        chain = (np.arange(300)[:, None] + rng.integers(0, 10, NUM_HASHES)) // 10
        keys = keys_of(rng.permutation(chain), rng.integers(0, 1 << 63, 300, dtype=np.uint64))
        held_out.append(find_duplicates([keys], exact=True, prefix=True, near=None, eval_fraction=0.5).held_out)
    assert {len(set(group.tolist())) for group in held_out} == {1}
    assert {bool(group[0]) for group in held_out} == {True, False}


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_connected_components(seed: int) -> None:
    rng = np.random.default_rng(seed)
    paths = rng.permutation(2000).reshape(4, 500)
    edges = rng.permutation(np.stack([paths[:, :-1].ravel(), paths[:, 1:].ravel()], axis=1))
    parents = np.arange(2000)
    for batch in np.array_split(edges, 3):
        dedupe._unite(parents, batch[:, 0], batch[:, 1])
    for path in paths:
        assert set(dedupe._find_roots(parents, path).tolist()) == {int(path.min())}


def test_the_split_hardly_depends_on_what_else_is_in_the_dump() -> None:
    rng = np.random.default_rng(9)
    dump = [chat(make_text(rng, 30), make_text(rng, 60)) for _ in range(2000)]
    few, many = decide(dump[:1000], eval_fraction=0.05).held_out, decide(dump, eval_fraction=0.05).held_out
    assert np.array_equal(few, many[:1000])
    assert 60 < many.sum() < 140


# The whole


def make_dump(rng: np.random.Generator, size: int) -> list[Conversation]:
    """New conversations, and copies, snapshots, branches and near-duplicates of earlier ones."""
    dump: list[Conversation] = []
    while len(dump) < size:
        kind = rng.integers(0, 11) if dump else 10
        earlier = dump[int(rng.integers(0, len(dump)))] if dump else chat()
        texts = [message.text for message in earlier.messages]
        if kind == 0:
            texts = [f" {text}\n" for text in texts]
        elif kind == 1:
            texts = texts[: 2 * int(rng.integers(1, len(texts) // 2 + 1))]
        elif kind == 2:
            texts = [*texts[:2], make_text(rng, 5), make_text(rng, 60)]
        elif kind == 3:
            texts = [texts[0], make_text(rng, 60)]
        elif kind in (4, 5):
            texts = [change_words(rng, text, 0.005) for text in texts]
        else:
            texts = [make_text(rng, length) for _ in range(int(rng.integers(1, 4))) for length in (8, 60)]
        good = rng.random() < 0.5
        dump.append(chat(*texts, id=str(len(dump)), condition="GPT4" if good else "GPT3", weight=1.0 if good else 0.1))
    return dump


def test_decisions_depend_neither_on_the_order_nor_on_the_shards() -> None:
    rng = np.random.default_rng(10)
    dump = make_dump(rng, 20_000)
    ids = np.array([int(conversation.id) for conversation in dump])
    outcomes = []
    for order, shard_size in ((np.arange(len(dump)), 20_000), (rng.permutation(len(dump)), 999)):
        decisions = decide([dump[i] for i in order], near=0.8, eval_fraction=0.1, shard_size=shard_size)
        of = np.where(decisions.of < 0, -1, ids[order][decisions.of])
        back = np.argsort(order)
        outcomes.append(np.stack([decisions.status[back], of[back], decisions.held_out[back]]))
    np.testing.assert_array_equal(*outcomes)
    assert set(outcomes[0][0].tolist()) == {KEEP, EXACT, PREFIX, NEAR}
    assert 0 < outcomes[0][2].sum() < 4000


def test_no_conversations_at_all_and_empty_shards() -> None:
    for shards in ([], [text_keys([], minhash=True)] * 2):
        decisions = find_duplicates(shards, exact=True, prefix=True, near=0.8, eval_fraction=0.1)
        assert [len(array) for array in (decisions.status, decisions.of, decisions.held_out)] == [0, 0, 0]
    empty = text_keys([], minhash=True)
    shards = [empty, text_keys([chat("a", "b")], minhash=True), empty, text_keys([chat("a", "b")], minhash=True), empty]
    assert find_duplicates(shards, exact=True, prefix=True, near=0.8, eval_fraction=0).of.tolist() == [-1, 0]


def test_nothing_is_left_in_the_work_folder(tmp_path: Path) -> None:
    keys = text_keys([chat("a", "b"), chat("a", "b")], minhash=True)
    decisions = find_duplicates([keys], exact=True, prefix=True, near=0.8, eval_fraction=0.1, work_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert decisions.status.tolist() == [KEEP, EXACT]


def test_minhash_is_needed_for_near_duplicates_and_for_a_split() -> None:
    assert [needs_minhash(near, share) for near in (None, 0.8) for share in (0.0, 0.1)] == [False, True, True, True]
    with pytest.raises(AssertionError, match="without MinHash"):
        find_duplicates(
            [text_keys([chat("a", "b")], minhash=False)], exact=True, prefix=True, near=0.8, eval_fraction=0
        )


@pytest.mark.parametrize(
    ("near", "eval_fraction", "message"),
    [(0.0, 0.0, "threshold 0.0 .* 0.8 is usual"), (1.2, 0.0, "threshold 1.2"), (None, 1.0, "eval_fraction 1.0")],
)
def test_thresholds_and_fractions_out_of_range_are_refused(
    near: float | None, eval_fraction: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_duplicates([], exact=True, prefix=True, near=near, eval_fraction=eval_fraction)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_a_pair_at_the_threshold_shares_a_band_with_the_chance_that_is_stated(threshold: float) -> None:
    rng = np.random.default_rng(11)
    pairs = rng.integers(0, 1 << 16, (4000, 2, NUM_HASHES))
    pairs[:, 1] = np.where(rng.random((4000, NUM_HASHES)) < threshold, pairs[:, 0], pairs[:, 1])
    rows = dedupe._rows_per_band(threshold)
    num_bands = NUM_HASHES // rows
    equal = (pairs[:, 0] == pairs[:, 1])[:, : rows * num_bands].reshape(4000, num_bands, rows)
    assert equal.all(axis=2).any(axis=1).mean() >= 0.97
