"""Records of many layouts become the conversations that they hold, each with the fields of its own."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat_train.conversations.fields import Reading
from ochat_train.conversations.forms import FORMS
from ochat_train.conversations.schema import Drop, ParsedRecord, Record
from ochat_train.conversations.sharegpt import chats_of, parse_record
from ochat_train.conversations.turns import read_written, split_marked


def read(fields: Any, /, **reading: Any) -> list[tuple[ParsedRecord | Drop, dict[str, Any]]]:
    """Each conversation of a record, with its answer's own fields."""
    record = Record("a.json", 0, 9, fields)
    how = Reading(**reading)
    return [
        (parse_record(record, default_id="r", reading=how, chat=chat), {name: chat.fields[name] for name in chat.own})
        for chat in chats_of(record, how)
    ]


def parsed_of(fields: Any, /, **reading: Any) -> list[ParsedRecord]:
    found = [parsed for parsed, _ in read(fields, **reading)]
    assert all(isinstance(parsed, ParsedRecord) for parsed in found), found
    return [parsed for parsed in found if isinstance(parsed, ParsedRecord)]


def texts(parsed: ParsedRecord) -> list[str]:
    """Each turn as "user: Hi", with "*" where an answer is context."""
    return [f"{m.role}{'*' * (m.weight == 0)}: {m.text}" for m in parsed.messages]


def u(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def a(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def f(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


HI = ["user: Hi", "assistant: Hello"]
MARKED = "\n\nHuman: Hi\n\nAssistant: Hello"

# Layouts of public data sets, with one conversation: (the data set, a record, its dialect, its turns).
SINGLE: list[tuple[str, dict[str, Any], str, list[str]]] = [
    (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Hello"},
        "instruction + input / output",
        HI,
    ),
    ("code_alpaca", {"instruction": "Hi", "output": "Hello"}, "instruction / output", HI),
    (
        "LLaMA-Factory alpaca with history",
        {"instruction": "More", "input": "x", "output": "Yes", "system": "S", "history": [["Hi", "Hello"]]},
        "history + instruction + input / output, pairs + role/content",
        [*HI, "user: More\n\nx", "assistant: Yes"],
    ),
    (
        "dolly",
        {"instruction": "Hi", "context": "C", "response": "Hello", "category": "qa"},
        "instruction + context / response",
        ["user: Hi\n\nC", "assistant: Hello"],
    ),
    (
        "sql-create-context",
        {"question": "Hi", "context": "C", "answer": "Hello"},
        "context + question / answer",
        ["user: C\n\nHi", "assistant: Hello"],
    ),
    ("OpenOrca", {"system_prompt": "S", "question": "Hi", "response": "Hello"}, "question / response", HI),
    ("gsm8k", {"question": "Hi", "answer": "Hello"}, "question / answer", HI),
    ("MetaMathQA", {"query": "Hi", "response": "Hello", "type": "t"}, "query / response", HI),
    ("MATH", {"problem": "Hi", "solution": "Hello", "answer": "7"}, "problem / solution", HI),
    ("aya", {"inputs": "Hi", "targets": "Hello", "language": "en"}, "inputs / targets", HI),
    ("HelpSteer", {"prompt": "Hi", "response": "Hello", "helpfulness": 3}, "prompt / response", HI),
    ("TRL", {"prompt": "Hi", "completion": "Hello"}, "prompt / completion", HI),
    ("TRL, messages", {"prompt": [u("Hi")], "completion": [a("Hello")]}, "prompt / completion, role/content", HI),
    (
        "TRL, a prompt with an answer",
        {"prompt": [u("Hi"), a("Hello"), u("More")], "completion": "Yes"},
        "prompt / completion, role/content",
        ["user: Hi", "assistant*: Hello", "user: More", "assistant: Yes"],
    ),
    ("csv", {"Question": "Hi", " answer": "Hello"}, "question / answer", HI),
    ("shared/cases/data.csv", {"human": "Hi", "gpt": "Hello"}, "human / gpt", HI),
    ("UltraChat", {"id": "0", "data": ["Hi", "Hello"]}, "data", HI),
    ("LIMA", {"conversations": ["Hi", "Hello"], "source": "s"}, "conversations", HI),
    ("UltraChat 200k", {"prompt": "Hi", "prompt_id": "1", "messages": [u("Hi"), a("Hello")]}, "role/content", HI),
    (
        "WildChat",
        {"conversation_hash": "x", "conversation": [u("Hi") | {"toxic": False}, a("Hello")], "language": "English"},
        "role/content",
        HI,
    ),
    ("Capybara", {"conversation": [{"input": "Hi", "output": "Hello"}], "source": "s"}, "pairs", HI),
    (
        "a column of JSON",
        {"conversations": '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]'},
        "conversations as a text, from/value",
        HI,
    ),
    (
        "an object of lists",
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}},
        "role/content",
        HI,
    ),
    ("messages, then an answer", {"messages": [u("Hi")], "response": "Hello"}, "messages / response, role/content", HI),
]


@pytest.mark.parametrize(("name", "fields", "dialect", "turns"), SINGLE, ids=[row[0] for row in SINGLE])
def test_a_record_with_one_answer_is_one_conversation(
    name: str, fields: dict[str, Any], dialect: str, turns: list[str]
) -> None:
    (parsed,) = parsed_of(fields)
    assert (parsed.dialect, texts(parsed)) == (dialect, turns)


# Layouts with several answers: (the data set, a record, its dialect, of each answer its suffix, fields and turns).
Several = list[tuple[str, dict[str, Any], list[str]]]
CHOSEN, REJECTED = {"preference": "chosen"}, {"preference": "rejected"}
PAIR: Several = [
    ("/chosen", CHOSEN, ["user: Hi", "assistant: Hello"]),
    ("/rejected", REJECTED, ["user: Hi", "assistant: No"]),
]
SEVERAL: list[tuple[str, dict[str, Any], str, Several]] = [
    (
        "SQuAD",
        {"question": "Hi", "answers": {"text": ["Hello"], "answer_start": [0]}},
        "question / answers",
        [("/1", {"number": 1, "answer_start": 0}, HI)],
    ),
    ("DPO", {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "prompt / chosen + rejected", PAIR),
    (
        "TRL, implicit prompt",
        {"chosen": [u("Hi"), a("Hello")], "rejected": [u("Hi"), a("No")]},
        "chosen + rejected, role/content",
        PAIR,
    ),
    (
        "TRL, explicit prompt",
        {"prompt": [u("Hi")], "chosen": [a("Hello")], "rejected": [a("No")]},
        "prompt / chosen + rejected, role/content",
        PAIR,
    ),
    (
        "orca_dpo_pairs",
        {"system": "S", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        "question / chosen + rejected",
        PAIR,
    ),
    (
        "LLaMA-Factory, alpaca",
        {"instruction": "Hi", "input": "x", "chosen": "Hello", "rejected": "No"},
        "instruction + input / chosen + rejected",
        [
            ("/chosen", CHOSEN, ["user: Hi\n\nx", "assistant: Hello"]),
            ("/rejected", REJECTED, ["user: Hi\n\nx", "assistant: No"]),
        ],
    ),
    (
        "LLaMA-Factory, sharegpt",
        {"conversations": [f("human", "Hi")], "chosen": f("gpt", "Hello"), "rejected": f("gpt", "No")},
        "conversations / chosen + rejected, from/value",
        PAIR,
    ),
    (
        "turns with an earlier answer",
        {"conversations": [f("human", "Hi"), f("gpt", "Yes?"), f("human", "Go")], "chosen": "A", "rejected": "B"},
        "conversations / chosen + rejected, from/value + role/content",
        [
            ("/chosen", CHOSEN, ["user: Hi", "assistant*: Yes?", "user: Go", "assistant: A"]),
            ("/rejected", REJECTED, ["user: Hi", "assistant*: Yes?", "user: Go", "assistant: B"]),
        ],
    ),
    (
        "hh-rlhf",
        {
            "chosen": f"{MARKED}\n\nHuman: Go\n\nAssistant: A",
            "rejected": f"{MARKED}\n\nHuman: Go\n\nAssistant: B",
        },
        "chosen + rejected, role/content",
        [
            ("/chosen", CHOSEN, ["user: Hi", "assistant*: Hello", "user: Go", "assistant: A"]),
            ("/rejected", REJECTED, ["user: Hi", "assistant*: Hello", "user: Go", "assistant: B"]),
        ],
    ),
    (
        "UltraFeedback binarized",
        {
            "prompt": "Hi",
            "messages": [u("Hi"), a("Hello")],
            "chosen": [u("Hi"), a("Hello")],
            "rejected": [u("Hi"), a("No")],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        "chosen + rejected, role/content",
        [
            ("/chosen", CHOSEN | {"score": 8.5}, PAIR[0][2]),
            ("/rejected", REJECTED | {"score": 3.0}, PAIR[1][2]),
        ],
    ),
    (
        "Capybara preferences",
        {
            "chosen": [u("Hi"), a("Hello")],
            "rejected": [u("Hi"), a("No")],
            "chosen_rating": 5,
            "rejected_rating": 2,
            "chosen-model": "big",
            "rejected-model": "small",
        },
        "chosen + rejected, role/content",
        [
            ("/chosen", CHOSEN | {"rating": 5, "score": 5, "model": "big"}, PAIR[0][2]),
            ("/rejected", REJECTED | {"rating": 2, "score": 2, "model": "small"}, PAIR[1][2]),
        ],
    ),
    (
        "ms-swift",
        {"messages": [u("Hi"), a("Hello")], "rejected_response": "No"},
        "messages / rejected_response, role/content",
        PAIR,
    ),
    (
        "OpenAI",
        {"input": {"messages": [u("Hi")]}, "preferred_output": [a("Hello")], "non_preferred_output": [a("No")]},
        "input / preferred_output + non_preferred_output, role/content",
        PAIR,
    ),
    (
        "LLaMA-Factory",
        {"chosen_messages": [u("Hi"), a("Hello")], "rejected_messages": [u("Hi"), a("No")]},
        "chosen_messages + rejected_messages, role/content",
        PAIR,
    ),
    (
        "UltraFeedback",
        {
            "instruction": "Hi",
            "models": ["m1", "m2"],
            "completions": [
                {"model": "m1", "response": "Hello", "overall_score": 8.0, "annotations": {}},
                {"model": "m2", "response": "No", "overall_score": 2.0, "annotations": {}},
            ],
        },
        "instruction / completions",
        [
            ("/1", {"number": 1, "model": "m1", "overall_score": 8.0, "score": 8.0, "annotations": {}}, PAIR[0][2]),
            ("/2", {"number": 2, "model": "m2", "overall_score": 2.0, "score": 2.0, "annotations": {}}, PAIR[1][2]),
        ],
    ),
    (
        "Nectar",
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [{"answer": "Hello", "model": "m1", "rank": 1.0}, {"answer": "No", "model": "m2", "rank": 2.0}],
            "turns": 1,
        },
        "prompt / answers, role/content",
        [
            ("/1", {"number": 1, "model": "m1", "rank": 1.0}, PAIR[0][2]),
            ("/2", {"number": 2, "model": "m2", "rank": 2.0}, PAIR[1][2]),
        ],
    ),
    (
        "texts and scores in two lists",
        {"prompt": "Hi", "responses": ["Hello", "No"], "scores": [0.9, 0.1]},
        "prompt / responses",
        [("/1", {"number": 1, "score": 0.9}, PAIR[0][2]), ("/2", {"number": 2, "score": 0.1}, PAIR[1][2])],
    ),
    (
        "LLaMA-Factory's older ranking",
        {"instruction": "Hi", "input": "", "output": ["Hello", "No"]},
        "instruction + input / output",
        [("/1", {"number": 1}, PAIR[0][2]), ("/2", {"number": 2}, PAIR[1][2])],
    ),
    (
        "ELI5",
        {"question": "Hi", "answers": {"text": ["Hello", "No"], "score": [9, 1]}},
        "question / answers",
        [("/1", {"number": 1, "score": 9}, PAIR[0][2]), ("/2", {"number": 2, "score": 1}, PAIR[1][2])],
    ),
]


@pytest.mark.parametrize(("name", "fields", "dialect", "expected"), SEVERAL, ids=[row[0] for row in SEVERAL])
def test_each_of_several_answers_is_a_conversation(
    name: str, fields: dict[str, Any], dialect: str, expected: Several
) -> None:
    found = read(fields)
    assert [(one.id, own) for one, own in found] == [(f"r{suffix}", own) for suffix, own, _ in expected]
    for (parsed, _), (_, _, turns) in zip(found, expected, strict=True):
        assert isinstance(parsed, ParsedRecord), parsed
        assert (parsed.dialect, texts(parsed)) == (dialect, turns)
        earlier = any("*" in turn for turn in turns)
        assert parsed.repairs == (("earlier_answer_untrained",) if earlier else ())


# What only a recipe can say: (the data set, a record, `fields`, of each answer its suffix, fields and turns).
NAMED: list[tuple[str, dict[str, Any], dict[str, Any], Several]] = [
    (
        "stack-exchange-paired",
        {"question": "Hi", "response_j": "Hello", "response_k": "No"},
        {"chosen": "response_j", "rejected": "response_k"},
        PAIR,
    ),
    (
        "PKU-SafeRLHF",
        {
            "prompt": "Hi",
            "response_0": "Hello",
            "response_1": "No",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
        },
        {"question": "prompt", "answers": ("response_0", "response_1")},
        [
            ("/response_0", {"answer": "response_0", "number": 1, "is_safe": True}, PAIR[0][2]),
            ("/response_1", {"answer": "response_1", "number": 2, "is_safe": False}, PAIR[1][2]),
        ],
    ),
    (
        "WebGPT comparisons",
        {"question": {"full_text": "Hi"}, "answer_0": "Hello", "answer_1": "No", "score_0": 0.5, "score_1": -0.5},
        {"question": "question.full_text", "answers": ("answer_0", "answer_1")},
        [
            ("/answer_0", {"answer": "answer_0", "number": 1, "score": 0.5}, PAIR[0][2]),
            ("/answer_1", {"answer": "answer_1", "number": 2, "score": -0.5}, PAIR[1][2]),
        ],
    ),
    (
        "SHP",
        {"history": "Hi", "human_ref_A": "Hello", "human_ref_B": "No", "score_A": 9, "score_B": 1, "labels": 1},
        {"question": "history", "answers": ("human_ref_A", "human_ref_B")},
        [
            ("/human_ref_A", {"answer": "human_ref_A", "number": 1, "score": 9}, PAIR[0][2]),
            ("/human_ref_B", {"answer": "human_ref_B", "number": 2, "score": 1}, PAIR[1][2]),
        ],
    ),
    (
        "camel",
        {"role_1": "R", "message_1": "Hi", "message_2": "Hello"},
        {"question": "message_1", "answer": "message_2"},
        [("", {}, PAIR[0][2])],
    ),
    (
        "turns whose role is in an object",
        {"log": [{"author": {"role": "user"}, "body": "Hi"}, {"author": {"role": "bot"}, "body": "Hello"}]},
        {"turns": "log", "role": "author.role", "text": "body"},
        [("", {}, PAIR[0][2])],
    ),
]


@pytest.mark.parametrize(("name", "fields", "names", "expected"), NAMED, ids=[row[0] for row in NAMED])
def test_a_recipe_describes_a_record_of_another_form(
    name: str, fields: dict[str, Any], names: dict[str, Any], expected: Several
) -> None:
    found = [(one.id, own, texts(one)) for one, own in read(fields, fields=names) if isinstance(one, ParsedRecord)]
    assert found == [(f"r{suffix}", own, turns) for suffix, own, turns in expected]


def test_a_field_that_a_recipe_names_and_a_record_lacks_is_named() -> None:
    record = {"messages": [u("Hi"), a("Hello")]}
    for part in ("chosen", "answers", "answer"):
        ((parsed, _),) = read(record, fields={part: "good"})
        assert isinstance(parsed, Drop) and f"good, the source's {part}, is missing or null" in parsed.detail


@pytest.mark.parametrize(
    ("fields", "preference"),
    [
        ({"prompt": "Hi", "completion": "Hello", "label": True}, "chosen"),
        ({"prompt": "Hi", "completion": "Hello", "label": 0}, "rejected"),
        ({"prompt": "Hi", "completion": "Hello", "label": "False"}, "rejected"),
        ({"messages": [u("Hi"), a("Hello")], "kto_tag": True}, "chosen"),
        ({"messages": [u("Hi"), a("Hello")], "label": 1}, None),
        ({"prompt": "Hi", "completion": "Hello", "label": "good"}, None),
    ],
)
def test_a_label_is_a_preference(fields: dict[str, Any], preference: str | None) -> None:
    ((parsed, own),) = read(fields)
    assert isinstance(parsed, ParsedRecord) and texts(parsed) == HI
    assert own.get("preference") == preference
    assert (("record field", "label") in parsed.unread) == (preference is None and "label" in fields)


def test_only_the_answer_that_is_labelled_has_a_loss() -> None:
    (parsed,) = parsed_of({"messages": [u("Hi"), a("Yes?"), u("Go"), a("A")], "label": False})
    assert texts(parsed) == ["user: Hi", "assistant*: Yes?", "user: Go", "assistant: A"]


def test_equal_answers_are_named() -> None:
    (chosen, _), (rejected, own) = read({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"})
    assert isinstance(chosen, ParsedRecord) and own == REJECTED
    assert isinstance(rejected, Drop)
    assert (rejected.id, rejected.reason) == ("r/rejected", "equal_answer")
    assert rejected.detail == "the answer is that of r/chosen"


def test_a_conversation_that_begins_the_other_one_is_still_trained() -> None:
    longer, shorter = parsed_of({"chosen": f"{MARKED}\n\nHuman: Go\n\nAssistant: A", "rejected": MARKED})
    assert texts(longer) == ["user: Hi", "assistant*: Hello", "user: Go", "assistant: A"]
    assert texts(shorter) == HI


@pytest.mark.parametrize(
    ("fields", "read_from", "not_read"),
    [
        (
            {"messages": [u("Hi"), a("Hello")], "prompt": "P", "completion": "C"},
            "role/content",
            {"prompt", "completion"},
        ),
        ({"conversations": [f("human", "Hi"), f("gpt", "Hello")], "answers": ["x", "y"]}, "from/value", {"answers"}),
        ({"prompt": "Hi", "completion": "Hello", "responses": ["x", "y"]}, "prompt / completion", {"responses"}),
        (
            {"instruction": "Hi", "prompt": "P", "output": "Hello", "response": "R"},
            "instruction / output",
            {"prompt", "response"},
        ),
    ],
)
def test_of_two_forms_the_first_counts_and_the_other_is_named(
    fields: dict[str, Any], read_from: str, not_read: set[str]
) -> None:
    (parsed,) = parsed_of(fields)
    assert (parsed.dialect, texts(parsed)) == (read_from, HI)
    assert {name for _, name in parsed.unread} == not_read


# ---- Trees ----


def tree_of(*nodes: tuple[str, str | None, str, Any], **more: Any) -> dict[str, Any]:
    """A ChatGPT export of (id, parent, role, parts)."""
    mapping: dict[str, Any] = {
        id: {
            "id": id,
            "message": {"author": {"role": role}, "content": {"content_type": "text", "parts": said}, "weight": 1.0},
            "parent": parent,
            "children": [other for other, above, *_ in nodes if above == id],
        }
        for id, parent, role, said in nodes
    }
    return {"title": "T", "mapping": mapping} | more


BRANCHES = (("s", None, "system", [""]), ("u", "s", "user", ["Hi"]), ("a", "u", "assistant", ["Old"]))
BRANCHES_2 = (*BRANCHES, ("b", "u", "assistant", ["Hello"]))


def test_of_a_chatgpt_export_the_path_shown_last_is_read() -> None:
    (parsed,) = parsed_of(tree_of(*BRANCHES_2))
    assert (parsed.dialect, texts(parsed)) == ("mapping", HI)
    (parsed,) = parsed_of(tree_of(*BRANCHES_2, current_node="a"))
    assert texts(parsed) == ["user: Hi", "assistant: Old"]


def test_a_chatgpt_export_has_hidden_messages_tools_thoughts_and_pictures() -> None:
    export = tree_of(*BRANCHES_2, ("m", "b", "user", ["More"]), ("c", "m", "assistant", ["x"]), current_node="end")
    nodes = export["mapping"]
    nodes["c"]["message"] |= {"recipient": "python", "content": {"content_type": "code", "text": "1 + 1"}}

    def put(id: str, parent: str, role: str, content: dict[str, Any], **more: Any) -> None:
        message = {"author": {"role": role}, "content": content} | more
        nodes[id] = {"id": id, "message": message, "parent": parent, "children": []}

    put("t", "c", "tool", {"content_type": "execution_output", "text": "2"})
    put("hidden", "t", "system", {"parts": ["Be brief."]}, metadata={"is_visually_hidden_from_conversation": True})
    put("think", "hidden", "assistant", {"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "Hm."}]})
    put("recap", "think", "assistant", {"content_type": "reasoning_recap", "content": "Thought for 1 s"})
    put("odd", "recap", "assistant", {"content_type": "tether_quote", "url": "x"})
    put("end", "odd", "assistant", {"content_type": "text", "parts": ["Two."]}, weight=0.0)
    (parsed,) = parsed_of(export)
    assert [(m.role, m.text, m.calls, m.reasoning, m.weight) for m in parsed.messages[2:]] == [
        ("user", "More", "", "", None),
        ("assistant", "", "1 + 1", "", None),
        ("tool", "2", "", "", None),
        ("assistant", "Two.", "", "Hm.", 0.0),
    ]
    assert ("turn field", "content_type tether_quote") in parsed.unread
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "file://x"}
    ((dropped, _),) = read(tree_of(("u", None, "user", [picture, "What?"]), ("a", "u", "assistant", ["A cat."])))
    assert isinstance(dropped, Drop) and dropped.reason == "not_text"


@pytest.mark.parametrize("current", [None, "u", "nobody", 7])
def test_a_damaged_export_ends(current: Any) -> None:
    export = tree_of(("u", "a", "user", ["Hi"]), ("a", "u", "assistant", ["Hello"]), current_node=current)
    assert all(isinstance(parsed, Drop) for parsed, _ in read(export))
    assert read(export | {"mapping": tree_of(*BRANCHES)["mapping"] | export["mapping"]})


OASST = {
    "message_tree_id": "t",
    "prompt": {
        "text": "Hi",
        "role": "prompter",
        "lang": "en",
        "replies": [
            {"text": "No", "role": "assistant", "rank": 1, "replies": []},
            {
                "text": "Hello",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {"text": "Go", "role": "prompter", "replies": [{"text": "A", "role": "assistant", "replies": []}]}
                ],
            },
        ],
    },
}


def test_of_messages_with_replies_the_best_path_or_every_answer_is_read() -> None:
    (parsed,) = parsed_of(OASST)
    assert (parsed.dialect, texts(parsed)) == ("prompt", [*HI, "user: Go", "assistant: A"])
    found = read(OASST, tree="all")
    assert [(one.id, own["lang"], own.get("rank")) for one, own in found] == [
        ("r/1", "en", 1),
        ("r/2", "en", 0),
        ("r/3", "en", None),
    ]
    assert [texts(one)[-2:] for one, _ in found if isinstance(one, ParsedRecord)] == [
        ["user: Hi", "assistant: No"],
        ["user: Hi", "assistant: Hello"],
        ["user: Go", "assistant: A"],
    ]
    assert texts(parsed_of(OASST, tree="all")[2])[1] == "assistant*: Hello"


# ---- Lists as texts ----


VALUES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content"]), st.text() | st.none() | st.integers()), min_size=1
)


@given(VALUES)
def test_a_list_is_read_back_as_python_writes_it(value: Any) -> None:
    found, repairs = read_written(repr(value))
    assert found == value
    assert set(repairs) <= {"python_literal_read", "surrogate_replaced"}


@given(st.lists(st.text(), min_size=2), st.sampled_from([" ", "\n "]))
def test_an_array_is_read_back_as_numpy_writes_it(value: Sequence[str], between: str) -> None:
    assert read_written(f"[{between.join(map(repr, value))}]")[0] == list(value)
    turns = [{"role": "user", "content": text} for text in value]
    assert read_written(f"[{between.join(map(repr, turns))}]")[0] == turns


def test_what_a_csv_of_pandas_has_is_read_and_named() -> None:
    turns = "[{'from': 'human', 'value': \"It's\"}\n {'from': 'gpt', 'value': 'Hello'}]"
    (parsed,) = parsed_of({"conversations": turns})
    assert texts(parsed) == ["user: It's", "assistant: Hello"]
    assert parsed.repairs == ("python_literal_read",)


def test_a_text_that_only_looks_like_a_list_stays_a_text() -> None:
    for text in ("[1, 2]", '["a", "b"]', "{'a': 1}", "[citation needed]", "Human: x\n\nAssistant: y"):
        (parsed,) = parsed_of({"prompt": text, "completion": text})
        assert texts(parsed) == [f"user: {text}", f"assistant: {text}"]


def test_a_marked_text_is_split_at_its_marks() -> None:
    assert split_marked("### Human: Hi### Assistant: Hello") == [u("Hi"), a("Hello")]
    assert split_marked(f"{MARKED}\n\nHuman: Go\n\nAssistant:") == [u("Hi"), a("Hello"), u("Go")]
    for text in ("", "Hi", "\n\nHuman: Hi", "Say:\n\nHuman: Hi\n\nAssistant: x"):
        assert split_marked(text) == []


NAMES = sorted(
    {name for part in FORMS.values() for row in part for name in row} | {"replies", "role", "content", "text"}
)
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "Hi", "user", "[1]", "{'a': 1}", MARKED]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(NAMES), ANY, max_size=6), st.sampled_from(["best", "all"]))
def test_any_record_becomes_conversations_or_drops_with_a_reason(fields: dict[str, Any], tree: Any) -> None:
    found = read(fields, tree=tree)
    assert found
    assert len({one.id for one, _ in found}) == len(found)
