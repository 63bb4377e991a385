"""Turns are repaired by named rules only, and no text is changed."""

from hypothesis import given
from hypothesis import strategies as st

from ochat_train.conversations.clean import (
    Messages,
    join_user_turns,
    lift_leading_system,
    remove_empty_turns,
    remove_leading_answers,
    remove_unanswered_turns,
    repair_turns,
)
from ochat_train.conversations.schema import Message, Role

ROLE_LETTERS: dict[str, Role] = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


def turns(letters: str) -> Messages:
    """One turn a letter, its text the letter and its place: "ua" is user "u0", assistant "a1"."""
    return tuple(Message(ROLE_LETTERS[letter], f"{letter}{place}") for place, letter in enumerate(letters))


def texts(messages: Messages) -> list[str]:
    return [message.text for message in messages]


def test_a_sound_conversation_is_left_as_it_is() -> None:
    assert repair_turns("Be brief.", turns("uauatta")) == ("Be brief.", turns("uauatta"), ())


def test_empty_and_blank_turns_are_removed() -> None:
    messages = (*turns("u"), Message("assistant", ""), Message("tool", " \n\t\u00a0"), *turns("a"))
    assert texts(remove_empty_turns(messages)) == ["u0", "a0"]
    assert repair_turns("", messages) == ("", turns("u") + turns("a"), ("empty_turn_removed",))


def test_answers_before_the_first_user_turn_are_removed_but_not_system_turns() -> None:
    assert texts(remove_leading_answers(turns("satsuata"))) == ["s0", "s3", "u4", "a5", "t6", "a7"]
    assert repair_turns("", turns("aua")) == ("", turns("aua")[1:], ("leading_answer_removed",))


def test_user_turns_in_a_row_are_joined_by_a_blank_line() -> None:
    assert texts(join_user_turns(turns("uuuauua"))) == ["u0\n\nu1\n\nu2", "a3", "u4\n\nu5", "a6"]
    system, messages, repairs = expect_repaired("", turns("uua"))
    assert (system, texts(messages), repairs) == ("", ["u0\n\nu1", "a2"], ("user_turns_joined",))


def test_user_turns_of_unequal_weight_are_left_as_they_are() -> None:
    one, two, three = Message("user", "a", 1.0), Message("user", "b"), Message("user", "c")
    assert join_user_turns((one, two)) == (one, two)
    assert join_user_turns((one, two, three)) == (one, Message("user", "b\n\nc"))
    assert join_user_turns((one, one)) == (Message("user", "a\n\na", 1.0),)


def test_turns_behind_the_last_answer_are_removed() -> None:
    assert texts(remove_unanswered_turns(turns("uauts"))) == ["u0", "a1"]
    assert remove_unanswered_turns(turns("ut")) == ()
    assert repair_turns("", turns("uau")) == ("", turns("ua"), ("unanswered_turn_removed",))


def test_a_conversation_without_an_answer_is_refused() -> None:
    for letters in ("", "u", "uut", "s", "su", "a", "sat"):
        assert repair_turns("x", turns(letters)) == "no_answer"
    assert repair_turns("", (*turns("u"), Message("assistant", " "))) == "no_answer"


def test_a_leading_system_turn_becomes_the_system_text_and_is_no_repair() -> None:
    assert repair_turns("", turns("sua")) == ("s0", turns("sua")[1:], ())
    assert repair_turns("field", turns("ssua")) == ("field\n\ns0\n\ns1", turns("ssua")[2:], ())


def test_a_blank_system_text_is_an_empty_turn() -> None:
    assert repair_turns(" \n", turns("sua")) == ("s0", turns("sua")[1:], ("empty_turn_removed",))


def test_a_system_turn_in_the_middle_stays_a_message() -> None:
    assert repair_turns("", turns("uasua")) == ("", turns("uasua"), ())


def test_a_leading_system_turn_with_a_loss_weight_stays_a_message() -> None:
    weighted = Message("system", "learn me", 1.0)
    assert lift_leading_system("", (weighted, *turns("ua"))) == ("", (weighted, *turns("ua")))
    assert lift_leading_system("", (Message("system", "x", 0.0), *turns("ua"))) == ("x", turns("ua"))


def test_two_answers_in_a_row_stay_as_they_are() -> None:
    assert repair_turns("", turns("uaata")) == ("", turns("uaata"), ())


def test_no_text_is_trimmed() -> None:
    messages = (Message("user", "  a\n\n"), Message("user", "\tb "), Message("assistant", "\n c\u200b "))
    _, repaired, _ = expect_repaired(" s ", messages)
    assert texts(repaired) == ["  a\n\n\n\n\tb ", "\n c\u200b "]
    assert repair_turns(" s ", messages[1:]) == (" s ", messages[1:], ())


def expect_repaired(system: str, messages: Messages) -> tuple[str, Messages, tuple[str, ...]]:
    repaired = repair_turns(system, messages)
    assert not isinstance(repaired, str)
    return repaired


any_messages = st.lists(
    st.builds(
        Message,
        st.sampled_from(list(ROLE_LETTERS.values())),
        st.text("ab \n", max_size=3),
        st.sampled_from([None, 0.0, 1.0]),
    ),
    max_size=8,
).map(tuple)


@given(st.text("ab \n", max_size=3), any_messages)
def test_repairing_twice_changes_nothing_more(system: str, messages: Messages) -> None:
    repaired = repair_turns(system, messages)
    if isinstance(repaired, str):
        assert repaired == "no_answer"
        return
    assert repair_turns(repaired[0], repaired[1]) == (repaired[0], repaired[1], ())


@given(st.text("ab", max_size=3), any_messages)
def test_a_conversation_changes_only_by_rules_that_are_named(system: str, messages: Messages) -> None:
    repaired = repair_turns(system, messages)
    if not isinstance(repaired, str) and not repaired[2]:
        assert (repaired[0], repaired[1]) == lift_leading_system(system, messages)
    if not isinstance(repaired, str):
        # every answer's text is there, whole and in order, but for those before the first question
        first = [message.role for message in messages].index("user")
        answers = [m.text for m in messages[first:] if m.role == "assistant" and m.text.strip()]
        if all(m.text.strip() for m in messages if m.role == "user"):
            assert [m.text for m in repaired[1] if m.role == "assistant"] == answers
