"""Texts lose what is page noise and nothing else, and turns are repaired by named rules only."""

import time
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat_train.conversations import page_noise
from ochat_train.conversations.clean import (
    LeadingAnswers,
    clean_turns,
    join_user_turns,
    lift_leading_system,
    remove_empty_turns,
    remove_leading_answers,
    remove_unanswered_turns,
    repair_turns,
)
from ochat_train.conversations.page_noise import (
    Messages,
    find_fences,
    remove_copy_code,
    remove_copy_counts,
    remove_glued_buttons,
    remove_page_noise,
    remove_regenerate_counter,
)
from ochat_train.conversations.schema import Drop, Message, ParsedRecord, Role
from tests.test_html import DIV, code_block, watch_examples

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
    dropped = repair_turns("", turns("aua"), leading_answers="drop")
    assert dropped == ("", turns("aua")[1:], ("leading_answer_removed",))


def test_answers_before_the_first_user_turn_are_context_or_trained() -> None:
    muted = tuple(Message(m.role, m.text, 0.0 if m.text == "a1" else None) for m in turns("satua"))
    assert repair_turns("", turns("satua")) == ("s0", muted[1:], ("leading_answer_untrained",))
    assert repair_turns("", turns("satua"), leading_answers="train") == ("s0", turns("satua")[1:], ())
    for choice, alone in (("context", "no_answer"), ("drop", "no_answer"), ("train", ("", turns("a"), ()))):
        assert repair_turns("", turns("a"), leading_answers=choice) == alone  # type: ignore[arg-type]
        assert repair_turns("", turns("au"), leading_answers=choice) == (  # type: ignore[arg-type]
            alone if isinstance(alone, str) else ("", turns("a"), ("unanswered_turn_removed",))
        )


@pytest.mark.parametrize("choice", ["context", "train", "drop"])
def test_a_turn_to_which_the_record_gives_a_weight_is_trained_wherever_it_stands(choice: LeadingAnswers) -> None:
    for letter, role in ROLE_LETTERS.items():
        for text in ("x", " "):
            own = Message(role, text, 0.5)
            for before, after in (("", ""), ("", "ua"), ("ua", ""), ("ua", "u"), ("u", "ua"), ("uau", "")):
                messages = (*turns(before), own, *turns(after))
                _, repaired, _ = expect_repaired("", messages, leading_answers=choice)
                assert own in repaired, (letter, text, before, after)


def test_user_turns_in_a_row_are_joined_by_a_blank_line() -> None:
    assert texts(join_user_turns(turns("uuuauua"))) == ["u0\n\nu1\n\nu2", "a3", "u4\n\nu5", "a6"]
    system, messages, repairs = expect_repaired("", turns("uua"))
    assert (system, texts(messages), repairs) == ("", ["u0\n\nu1", "a2"], ("user_turns_joined",))


def test_user_turns_that_are_trained_are_left_as_they_are() -> None:
    one, two, three = Message("user", "a", 1.0), Message("user", "b"), Message("user", "c")
    assert join_user_turns((one, two)) == (one, two)
    assert join_user_turns((one, two, three)) == (one, Message("user", "b\n\nc"))
    assert join_user_turns((one, one)) == (one, one)
    assert join_user_turns((Message("user", "a", 0.0), two)) == (Message("user", "a\n\nb", 0.0),)


def test_turns_after_the_last_answer_are_removed() -> None:
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


def expect_repaired(
    system: str, messages: Messages, *, leading_answers: LeadingAnswers = "context"
) -> tuple[str, Messages, tuple[str, ...]]:
    repaired = repair_turns(system, messages, leading_answers=leading_answers)
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
        # every answer's text is there, whole and in order
        answers = [m.text for m in messages if m.role == "assistant" and (m.text.strip() or m.weight)]
        assert [m.text for m in repaired[1] if m.role == "assistant"] == answers
        # and every turn to which the record gives a weight
        assert [m for m in repaired[1] if m.weight] == [m for m in messages if m.weight]


# ---- The whole of `clean_turns` ----

Html = Literal["auto", "always", "never"]


def record(*messages: tuple[Role, str], is_page: bool = False, system: str = "") -> ParsedRecord:
    texts = tuple(Message(role, text) for role, text in messages)
    return ParsedRecord("id7", "from/value", is_page, "GPT4", system, texts, ("surrogate_replaced",))


def expect_clean(turns: ParsedRecord, html: Html = "auto") -> tuple[list[str], tuple[str, ...]]:
    """(texts, repairs that were added)"""
    cleaned = clean_turns(turns, html=html)
    assert isinstance(cleaned, ParsedRecord)
    assert (cleaned.id, cleaned.dialect, cleaned.is_page, cleaned.condition) == (
        "id7",
        "from/value",
        turns.is_page,
        "GPT4",
    )
    assert cleaned.repairs[0] == "surrogate_replaced"
    return texts(cleaned.messages), cleaned.repairs[1:]


ANSWER = (
    '<div class="markdown prose w-full break-words dark:prose-invert light"><p>Use <code>os.remove</code>:</p>'
    + code_block("import os\n\n\nif True:\n    os.remove('my_file')\n", "python")
    + "<p>It deletes the file &amp; keeps the folder.</p></div>"
)
MARKDOWN = (
    "Use `os.remove`:\n\n```python\nimport os\n\n\nif True:\n    os.remove('my_file')\n```\n\n"
    "It deletes the file & keeps the folder."
)
COUNTER = (
    '<div class="text-xs flex items-center justify-center gap-1"><button><svg></svg></button>'
    '<span class="flex-grow flex-shrink-0">1 / 2</span><button><svg></svg></button></div>'
)


def test_a_saved_page_becomes_markdown() -> None:
    page = record(
        ("user", DIV.format("How do I delete my_file in *Python* 3?\n\n  1. if it is &lt; 1 kB\n# 2")),
        ("assistant", COUNTER + ANSWER),
        ("user", "and in C++? I&#39;d write vector&lt;int&gt;\n\n\n  too"),
        ("assistant", "<p>Call <code>remove</code>.</p>"),
        is_page=True,
    )
    assert expect_clean(page) == (
        [
            "How do I delete my_file in *Python* 3?\n\n  1. if it is < 1 kB\n# 2",
            MARKDOWN,
            "and in C++? I'd write vector<int>\n\n\n  too",
            "Call `remove`.",
        ],
        ("html_converted",),
    )
    assert expect_clean(page, "never") == (texts(page.messages), ())


def test_a_json_record_is_html_only_by_chatgpts_own_marks() -> None:
    question = "What is &lt;p&gt;, and <b>?"
    assert expect_clean(record(("user", question), ("assistant", ANSWER)))[0] == ["What is <p>, and <b>?", MARKDOWN]
    talk = (("user", "Write <p>1 &lt; 2</p>"), ("assistant", "<p>1 &lt; 2</p>"))
    assert expect_clean(record(*talk)) == ([text for _, text in talk], ())
    assert expect_clean(record(("user", ANSWER), ("assistant", "It is HTML."))) == ([ANSWER, "It is HTML."], ())


def test_always_converts_every_text_that_has_tags() -> None:
    turns = record(
        ("user", "one<br>two"),
        ("tool", "<b>t</b>"),
        ("assistant", "Is <i>x</i>"),
        ("user", "a_b"),
        ("assistant", "1 &lt; 2"),
    )
    assert expect_clean(turns, "always") == (["one\ntwo", "**t**", "Is *x*", "a_b", "1 < 2"], ("html_converted",))
    cleaned = clean_turns(record(("user", "q"), ("assistant", "a"), system="<p>Be &lt;brief&gt;</p>"), html="always")
    assert isinstance(cleaned, ParsedRecord) and cleaned.system == "Be <brief>"


def test_what_a_tool_says_stays_in_a_page_and_keeps_its_noise() -> None:
    tool = "1 / 2\n\n<p>x</p>\n\nCopy 1 chars / 2 words"
    page = record(("user", "q"), ("tool", tool), ("assistant", "a"), is_page=True)
    assert expect_clean(page) == (["q", tool, "a"], ())


def test_repairs_are_named_once_and_in_order() -> None:
    page = record(
        ("assistant", "<p>Hi</p>"),
        ("user", "1 / 2\n\none"),
        ("user", "thanksSave & SubmitCancel"),
        ("assistant", "<p>Yes</p>"),
        ("assistant", "<div><button>Copy code</button></div>"),
        ("user", "more"),
        is_page=True,
    )
    assert expect_clean(page) == (
        ["Hi", "one\n\nthanks", "Yes"],
        (
            "html_converted",
            "page_noise_removed",
            "empty_turn_removed",
            "leading_answer_untrained",
            "user_turns_joined",
            "unanswered_turn_removed",
        ),
    )


def test_a_record_that_cannot_be_used_says_why() -> None:
    assert clean_turns(record(("system", "s"), ("user", "q")), html="auto") == Drop(
        "id7", "no_answer", "turns: system user", ("surrogate_replaced",)
    )
    many = clean_turns(record(*[("user", "q")] * 9), html="auto")
    assert isinstance(many, Drop) and many.detail == "turns:" + " user" * 8 + " ..."
    deep = clean_turns(record(("user", "q"), ("assistant", "<div>" * 9999 + "x"), is_page=True), html="auto")
    assert isinstance(deep, Drop) and (deep.reason, deep.repairs) == ("html_too_deep", ("surrogate_replaced",))
    nulls = clean_turns(record(("user", "q"), ("assistant", "<p>" + "\0" * 999), is_page=True), html="auto")
    assert isinstance(nulls, Drop) and nulls.reason == "html_not_converted"


# ---- Page noise ----

RULES_OF_TEXTS = ["remove_copy_code", "remove_copy_counts", "remove_regenerate_counter", "remove_glued_buttons"]


@pytest.mark.parametrize("name", RULES_OF_TEXTS)
def test_every_rule_has_examples_that_hold_of_what_it_removes_and_what_it_leaves(name: str) -> None:
    calls = watch_examples(page_noise, name)
    assert len(calls) >= 2 and {result == text for text, result in calls} == {True, False}


@pytest.mark.parametrize("name", ["find_fences", "remove_page_noise", "repeats_counter"])
def test_the_examples_of_whole_records_and_of_fences_hold(name: str) -> None:
    assert len(watch_examples(page_noise, name)) >= 2


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("```\nCopy code\n\n\n  x_y  \n```", "```\n\n\n  x_y  \n```"),
        ("```\npython\nCopy code\nx\n```", "```python\nx\n```"),
        ("```python\npythonCopy code\nx\n```", "```python\nx\n```"),
        ("```\npythonCopy codeimport os\n```", "```python\nimport os\n```"),
        ("```\nobjective-cCopy codeCopy code\nx\n```", "```objective-c\nx\n```"),
        ("a\n```Copy code\nx\n```\nb\n~~~\nc++Copy code\ny\n~~~", "a\n```\nx\n```\nb\n~~~c++\ny\n~~~"),
        ("- a\n\n  ```\n  jsCopy code\n  x\n  ```", "- a\n\n  ```js\n  x\n  ```"),
        ("1. ```\n   jsCopy codelet x\n   ```", "1. ```js\n   let x\n   ```"),
        ("> ```\n> jsCopy code\n> x\n> ```", "> ```js\n> x\n> ```"),
        ("```\r\njsCopy code\r\nx\r\n\r\n```\r\ny", "```js\r\nx\r\n\r\n```\r\ny"),
        ("```\njsCopy code\nnever closed", "```js\nnever closed"),
    ],
)
def test_captions_of_code_are_removed(text: str, cleaned: str) -> None:
    assert remove_copy_code(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "Copy code",
        "pythonCopy code\n\n    import os",
        "```python\nimport os\n```\nCopy code\n",
        "```\nx\n```\npythonCopy code\n```\ny\n```",
        "`Copy code` copies ```Copy code``` in line",
        "```html\n<button>Copy code</button>\n```",
        "```\nCopy codes from A1 to B1\n```",
        "```\nCopy code: press here\n```",
        "```\nHardCopy code\nx\n```",
        "```\n\nCopy code\nx\n```",
        "```\nCopy code",
        "```Copy code",
        "```pythonCopy code\n```",
    ],
)
def test_copy_code_that_is_no_caption_stays(text: str) -> None:
    assert remove_copy_code(text) == text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\n\nCopy 10 chars / 2 words\n\nb", "a\n\nb"),
        ("a\n\nCopy 10 chars / 2 words\nb", "a\n\nb"),
        ("a\r\nCopy 10 chars / 2 words\r\nb", "a\r\nb"),
        ("Copy 10 chars / 2 words\n\n  b", "  b"),
        ("a\n  Copy10 chars / 2 words  \nCopy 1 chars / 1 words", "a"),
        ("```\nx\n\n\n```\n\nCopy 10 chars / 2 words", "```\nx\n\n\n```"),
        ("Copy 10 chars / 2 words", ""),
    ],
)
def test_counts_of_copied_text_are_removed(text: str, cleaned: str) -> None:
    assert remove_copy_counts(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "a Copy 10 chars / 2 words",
        "Copy 10 chars / 2 words is what it says",
        "`Copy 10 chars / 2 words`",
        "| Copy 10 chars / 2 words |",
        "x\n```\nCopy 10 chars / 2 words\n\n\n```\ny",
        "~~~\nCopy 10 chars / 2 words",
        "copy 10 chars / 2 words",
    ],
)
def test_counts_that_somebody_wrote_stay(text: str) -> None:
    assert remove_copy_counts(text) == text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("1 / 2\nx", "x"),
        ("2 / 2\n\n\n    x\n", "    x\n"),
        ("1 / 1\r\n\r\nx", "x"),
        ("10 / 12 \nx", "x"),
        ("1 / 2\n2 / 2\nx", "x"),
    ],
)
def test_counters_of_answers_are_removed(text: str, cleaned: str) -> None:
    assert remove_regenerate_counter(text, "Why?") == remove_regenerate_counter(text, "") == cleaned
    assert remove_regenerate_counter(text, "Why 2?") == text
    assert remove_regenerate_counter(text, "Why a Half?") == text


@pytest.mark.parametrize(
    "text",
    [
        *("3 / 4 of them\nx", "3 / 4", "1 / 2\n \n", "0 / 2\nx", "3 / 2\nx", "1/2\nx", " 1 / 2\nx"),
        *("x\n1 / 2\ny", "1 / 2x", "1 / 31\nx"),
        *("12 / 31\nBirthday party plan", "3 / 4\nConvert this to a decimal.", "3 / 4\n+ 1 / 4"),
    ],
)
def test_fractions_stay(text: str) -> None:
    assert remove_regenerate_counter(text, "") == text
    assert remove_page_noise((Message("user", text),), is_page=True) == (Message("user", text),)


@pytest.mark.parametrize(
    "chat",
    [
        ("3 / 4\nConvert this to a decimal.", "0.75"),
        ("12 / 31\nBirthday party plan", "Here is a plan."),
        ("12 / 24\nParty plan", "Here is a plan.", "12 / 26\nLeftovers", "Here is another."),
        ("What is three quarters as a fraction?", "3 / 4\n\nis the answer."),
        ("3 / 4\nWhat is it?", "3 / 4\nis a measure of music."),
        ("Write a poem", "1 / 2\n\nRoses"),
        ("1 / 2\nFirst part", "Go on.", "2 / 2\nSecond part", "Thanks."),
        ("3 / 4\nWrite it as a decimal", "0.75", "3 / 4\nin percent", "75"),
    ],
)
def test_a_plain_record_without_noise_keeps_a_first_line_like_a_counter(chat: tuple[str, ...]) -> None:
    roles: tuple[Role, Role] = ("user", "assistant")
    plain = record(*((roles[place % 2], text) for place, text in enumerate(chat)))
    assert expect_clean(plain) == (list(chat), ())
    assert texts(remove_page_noise(plain.messages, is_page=False)) == list(chat)


@pytest.mark.parametrize(
    ("first", "answer", "second"),
    [
        ("Hi", "1 / 2\n\nHello.\n\nCopy 6 chars / 1 words", "more"),
        ("Hi", "1 / 2\n\nHello.\n```\njsCopy code\nx\n```", "more"),
        ("HiSave & SubmitCancel", "1 / 2\n\nHello.", "more"),
        ("1 / 1\nHi", "1 / 2\n\nHello.", "1 / 1\nmore"),
    ],
)
def test_a_plain_record_with_other_noise_or_a_repeated_counter_loses_its_counters(
    first: str, answer: str, second: str
) -> None:
    noisy = record(("user", first), ("assistant", answer), ("user", second), ("assistant", "1 / 3\nBye"))
    cleaned, repairs = expect_clean(noisy)
    assert (cleaned[0], cleaned[1][:6], cleaned[2:]) == ("Hi", "Hello.", ["more", "Bye"])
    assert repairs == ("page_noise_removed",)


def test_counters_go_from_records_that_were_html() -> None:
    rest = (("user", "more"), ("assistant", "1 / 2\n\nYes"))
    html_answer = ("assistant", '<div class="markdown prose"><p>Hi</p></div>')
    assert expect_clean(record(("user", "1 / 2\nHi"), html_answer, *rest)) == (
        ["Hi", "Hi", "more", "Yes"],
        ("html_converted", "page_noise_removed"),
    )
    assert expect_clean(record(*rest, is_page=True)) == (["more", "Yes"], ("page_noise_removed",))
    fraction = (("user", "What is three quarters as a fraction?"), ("assistant", "3 / 4\n\nis the answer."))
    assert expect_clean(record(*fraction, is_page=True)) == ([text for _, text in fraction], ())


def test_a_counter_is_judged_by_the_question_before_it_without_its_own_noise() -> None:
    def answers(question: str) -> str:
        messages = (Message("user", question), Message("tool", "7"), Message("assistant", "1 / 2\nx"))
        return remove_page_noise(messages, is_page=True)[2].text

    assert answers("1 / 3\nWhy?") == "x"
    assert answers("What is 2/4?") == "1 / 2\nx"


def test_captions_of_buttons_after_typed_text_are_removed() -> None:
    assert remove_glued_buttons("a\n\n  b.Share PromptSave & SubmitCancel") == "a\n\n  b."
    notice = page_noise._ROW_ENDS[2]
    assert remove_glued_buttons("你好。" + notice) == "你好。"
    for text in (
        notice,
        "I got: " + notice,
        "What is this?\n\n" + notice,
        f'"{notice}',
        "(Share Prompt",
        "1 / 1Write a poem.",
        "Share Promptx",
    ):
        assert remove_glued_buttons(text) == text
    assert texts(remove_page_noise((Message("assistant", "xShare Prompt"),), is_page=True)) == ["xShare Prompt"]


def test_fences_are_found_as_markdown_has_them() -> None:
    text = "````md\n```\nx\n```\n````\n```a`b\n- ~~~\n  y\n  ```\n  ~~~\nz"
    assert [text[fence.end() : end] for fence, end in find_fences(text)] == ["\n```\nx\n```\n", "\n  y\n  ```\n"]


marks = st.sampled_from(["```", "~~~", "\n", "\n\n", "\r\n", " ", "  ", "    ", "> ", "- ", "`", "."])
noise = st.sampled_from(
    ["Copy code", "Copy 12 chars / 3 words", "Copy12 chars / 3 words", "Share Prompt", "1 / 2", "3 / 4"]
)
words = st.sampled_from(["x", "é", "s", "2", "Copy", "python", "Save & SubmitCancel"])
noisy_text = st.lists(st.one_of(marks, noise, words), max_size=14).map("".join)


@given(noisy_text, st.sampled_from(["user", "assistant", "system"]), noisy_text, st.booleans())
def test_removing_noise_twice_removes_no_more(text: str, role: Role, other: str, is_page: bool) -> None:
    for rule in (remove_copy_code, remove_copy_counts, remove_glued_buttons):
        assert rule(rule(text)) == rule(text)
    once = remove_page_noise((Message("user", "q"), Message(role, text), Message(role, other)), is_page=is_page)
    assert remove_page_noise(once, is_page=is_page) == once


@given(noisy_text)
def test_removing_noise_adds_nothing_and_keeps_every_other_word(text: str) -> None:
    cleaned = remove_page_noise((Message("user", text),), is_page=True)[0].text
    assert len(cleaned) <= len(text)
    assert cleaned.count("é") == text.count("é") and cleaned.count("x") == text.count("x")
    assert cleaned.count("~~~") == text.count("~~~") and cleaned.count("`") == text.count("`")


@given(st.text(), st.text("`~\n\r #*_-1.>/ \tab\\<&;"), st.sampled_from(["auto", "never"]))
def test_text_without_noise_is_left_byte_for_byte(text: str, marked: str, html: Html) -> None:
    for it in (text, marked, f"x{marked}"):
        if it.strip() and "Copy" not in it and "/" not in it:
            assert expect_clean(record(("user", it), ("assistant", it)), html) == ([it, it], ())


NOISE_BOMBS = {
    "ticks": "`" * 1_000_000,
    "fences": "```\n" * 250_000 + "Copy code chars / ",
    "captions": "```\n" + "Copy code\n" * 100_000 + "x",
    "blocks": "```\njsCopy code\nx\n```\n" * 40_000,
    "glued captions": "```\n" + "xCopy code" * 100_000,
    "counters": "1 / 1\n" * 160_000 + "x",
    "counter and line ends": "1 / 1" + "\n" * 1_000_000,
    "counts": "Copy 1 chars / 1 words\n" * 40_000,
    "counts in line": "Copy 1 chars / 1 words " * 40_000,
    "line ends": "\n" * 1_000_000 + "Copy code chars / ",
    "spaces": "```\n" + " " * 1_000_000 + "Copy code chars / ",
    "list marks": "- 1. > " * 150_000 + "Copy code chars / ",
    "info": "```" + " a" * 500_000 + "Copy code\nx",
    "buttons": "Share Prompt" * 80_000,
    "tags": "<" * 1_000_000,
}


@pytest.mark.parametrize("text", NOISE_BOMBS.values(), ids=NOISE_BOMBS)
def test_a_megabyte_of_noise_takes_no_longer_than_linear_time(text: str) -> None:
    started = time.process_time()
    remove_page_noise((Message("user", text), Message("assistant", text)), is_page=True)
    assert time.process_time() - started < 8
