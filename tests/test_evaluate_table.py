"""The table of `evaluate table`: models that a server or a stand-in answers for, and a judge made for the test."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from ochat_train.conversations.template import TEMPLATES
from ochat_train.evaluate import alpaca
from ochat_train.evaluate.__main__ import main
from ochat_train.evaluate.grade import make_prompt, mean_interval, read_rating
from ochat_train.evaluate.question_sets import Question
from ochat_train.evaluate.table_sections import table_document
from ochat_train.report.page import as_html
from ochat_train.tokens.tokenizer import load_tokenizer
from tests.chat_model import write_chat_model
from tests.chat_server import ROOT
from tests.chat_stub import Stub
from tests.waiting import wait_until

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Again, in capitals."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And doubled?"], "reference": ["4", "8"]},
    {"question_id": 131, "category": "coding", "turns": ["Print it."]},
]
NO_ROOM = "This model's maximum context length is 9 tokens"


@pytest.fixture(autouse=True)
def old_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, QUESTIONS)))
    return path


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "chatgpt.jsonl"
    rows = [
        {"question_id": q["question_id"], "model_id": "ChatGPT", "choices": [{"turns": ["plain"] * len(q["turns"])}]}
        for q in QUESTIONS
    ]
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def run(*arguments: Any) -> int | str:
    with pytest.raises(SystemExit) as ended:
        main(["table", *map(str, arguments)])
    assert ended.value.code is not None
    return ended.value.code


def judged(body: dict[str, Any]) -> str:
    """A grade: 9 for an answer to the second turn, else 6; of a pair, the one that is `loud`."""
    text = body["messages"][-1]["content"]
    if "[[5]]" in text:
        assert ("right answer to turn 1\n4" in text) is ("What is 2 + 2?" in text)
        rating = 1 if "$ERROR$" in text else 9 if "the assistant, turn 2\n" in text else 6
        return "It is, for [[3]] reasons, as it is.\n[[17]]" if "Print" in text else f"Good.\n[[{rating}]]"
    sides = {label: re.search(rf"assistant {label}.*\n(.*)", text) for label in "AB"}
    loud = [label for label, side in sides.items() if side is not None and side.group(1).startswith("LOUD")]
    return f"Read.\nVERDICT: {loud[0] if loud else 'TIE'}"


def test_models_are_graded_and_compared_and_what_they_cannot_take_is_an_error(
    questions: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(body: dict[str, Any]) -> str | int | tuple[int, str]:
        text = body["messages"][-1]["content"]
        if body.get("chat_template_kwargs") == {"condition": "Short"} and len(body["messages"]) > 1:
            return 400, NO_ROOM
        return ("LOUD " if text != "What is 2 + 2?" else "") + text

    out = tmp_path / "out"
    monkeypatch.setenv("JUDGE_API_KEY", "sk-of-the-judge")
    with Stub(reply) as model, Stub(judged) as judge:
        command: tuple[Any, ...] = (model.url, f"small={model.url}#other@Short", "--judge", judge.url)
        command += ("--judge-model", "wise", "--questions", f"mt_bench={questions}")
        command += ("--baseline", f"mt-bench={baseline}", "--out", out)
        assert run(*command, "--dry-run") == 0 and not model.asked and not judge.asked
        costs = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["stub", "5", "2,070", "5,120", "0"] in costs  # three prompts, and two after an answer of 1,024 tokens
        assert next(row[:3] for row in costs if row[:2] == ["the", "judge"]) == ["the", "judge", "22"]

        assert run(*command) == 0
        told = capsys.readouterr().out
        assert "2 longer than the model takes" in told and NO_ROOM in told
        assert len(model.asked) == 10 and len(judge.asked) == 17  # five were the same for both
        assert {body["model"] for body in judge.asked} == {"wise"} and model.keys != judge.keys == {"sk-of-the-judge"}
        assert {body["model"] for body in model.asked} == {"stub", "other"}
        results = orjson.loads((out / "table.json").read_bytes())
        assert run(*command) == 0
        assert len(model.asked) == 12 and len(judge.asked) == 17  # what had no room is asked again, as room may grow

    first, second = (row["mt-bench"] for row in results["models"])
    assert first["ratings"] == {"81": [6, 9], "111": [6, 9], "131": [None]}
    assert second["ratings"] == {"81": [6, 1], "111": [6, 1], "131": [None]}
    assert (first["score"], first["turns"], first["num_unrated"]) == (7.5, [6, 9], 1)
    assert (second["score"], second["error"]) == (3.5, ["81", "111"])
    # A pair is read whole: by its first answer, the stand-in's judge is loud for 81 and 131.
    assert first["comparisons"] == {"81": "first", "111": "tie", "131": "first"}
    assert first["win_rate"] == pytest.approx(2.5 / 3)
    assert first["categories"]["math"]["win_rate"] == 0.5 and first["categories"]["coding"]["score"] is None
    assert results["benchmarks"]["mt-bench"]["num_without_reference"] == 1
    written = [orjson.loads(line) for line in (out / "mt-bench/small.jsonl").read_bytes().splitlines()]
    assert written[0]["choices"][0]["turns"] == ["LOUD Write a line.", "$ERROR$"]
    grades = [orjson.loads(line) for line in (out / "judgments.jsonl").read_bytes().splitlines()]
    assert {(row["question_id"], row["turn"], row["score"]) for row in grades if row["model"] == "small"} == {
        (81, 1, 6), (81, 2, 1), (111, 1, 6), (111, 2, 1), (131, 1, -1)
    }  # fmt: skip
    text = (out / "table.txt").read_text()
    assert "MT-bench (win rate adjusted %) v.s. ChatGPT" in text and "83.3 (" in text and "7.50 (" in text
    assert "small, mt-bench: 2 longer than the model takes, judged as $ERROR$: 81, 111." in text
    assert (out / "table.html").read_text().count("<svg") == 2


def test_a_killed_table_goes_on_and_asks_nothing_twice(questions: Path, baseline: Path, tmp_path: Path) -> None:
    with Stub(lambda body: "LOUD", delay_s=0.02) as model, Stub(judged, delay_s=0.1) as judge:
        command = [model.url, "--judge", judge.url, "--judge-model", "wise", "--questions", f"mt-bench={questions}"]
        command += ["--baseline", f"mt-bench={baseline}", "--out", str(tmp_path / "out"), "--concurrency", "1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "ochat_train.evaluate", "table", *command], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: len(judge.asked) >= 4 or process.poll() is not None)
        assert process.poll() is None
        process.kill()
        process.wait()
        time.sleep(0.2)
        asked = [len(model.asked), len(judge.asked)]
        assert run(*command) == 0
        assert [len(model.asked), len(judge.asked)] in ([asked[0], 12 - back] for back in (0, -1))  # one was under way
        assert asked[1] < 11


def test_a_folder_is_served_once_and_not_again_when_its_answers_are_known(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["openchat_v3.2"])
    model = write_chat_model(tmp_path / "run/model", tokenizer)
    out = tmp_path / "out"
    with Stub(judged) as judge:
        command = (f"{model}@Hasty", "--judge", judge.url, "--judge-model", "wise", "--out", out)
        command += ("--questions", f"mt-bench={questions}", "--max-tokens", 4, "--device", "cpu")
        assert run(*command) == 0
        asked = len(judge.asked)
        assert asked == 5
        monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a server was started"))
        assert run(*command) == 0 and len(judge.asked) == asked
    (row,) = orjson.loads((out / "table.json").read_bytes())["models"]
    assert (row["name"], row["condition"], row["mt-bench"]["num_answered"]) == ("tiny-chat-Hasty", "Hasty", 3)
    assert row["context"] and (out / "mt-bench/tiny-chat-Hasty.jsonl").is_file()


def alpaca_questions(tmp_path: Path, num: int) -> Path:
    rows = [{"instruction": f"Say {n}.", "output": "old", "generator": "text_davinci_003"} for n in range(num)]
    (tmp_path / "alpaca.json").write_bytes(orjson.dumps(rows))
    return tmp_path / "alpaca.json"


def test_the_win_rate_of_alpaca_eval_is_that_of_its_package(tmp_path: Path) -> None:
    pytest.importorskip("alpaca_eval", reason="the package alpaca_eval is not installed")

    def rank(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        if "Say 3." in text:
            return "I cannot rank them."
        new = "model_1" if text.index('"""new"""') < text.index('"""old"""') else "model_2"
        old = "model_2" if new == "model_1" else "model_1"
        ranks = (old, new) if "Say 0." in text else (new, old)
        return str([{"model": name, "rank": place} for place, name in enumerate(ranks, start=1)])

    with Stub(lambda body: "new") as model, Stub(rank) as judge:
        command = (model.url, "--judge", judge.url, "--judge-model", "wise", "--out", tmp_path / "out")
        command += ("--questions", f"alpaca_eval={alpaca_questions(tmp_path, 6)}")
        assert run(*command) == 0
        assert len(judge.asked) == 6 and {body["model"] for body in judge.asked} == {"wise"}
        assert run(*command) == 0 and len(judge.asked) == 6
    results = orjson.loads((tmp_path / "out/table.json").read_bytes())
    assert results["benchmarks"]["alpaca-eval"]["baseline"] == "text_davinci_003"
    found = results["models"][0]["alpaca-eval"]
    assert (found["win_rate"], found["num_judged"], found["num_answered"]) == (0.8, 5, 6)
    assert "answers without a verdict, not in the rate: 1." in (tmp_path / "out/table.txt").read_text()


def test_mistakes_are_one_line_before_anything_is_asked(
    questions: Path, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alpaca.importlib.util, "find_spec", lambda name: object() if name == "openai" else None)
    with Stub(lambda body: pytest.fail("asked")) as stub:
        command = (stub.url, "--judge", stub.url, "--judge-model", "wise", "--out", tmp_path / "out")
        mt = ("--questions", f"mt-bench={questions}")
        assert "two models have the name stub" in str(run(stub.url, *command, *mt))
        assert "pip install alpaca_eval" in str(
            run(*command, "--questions", f"alpaca-eval={alpaca_questions(tmp_path, 2)}")
        )
        assert run(*command, *mt, f"alpaca-eval={tmp_path / 'alpaca.json'}", "--dry-run") == 0
        assert "pip install alpaca_eval" in capsys.readouterr().out
        assert "write mt-bench=FILE or alpaca-eval=FILE" in str(run(*command, "--questions", questions))
        assert "flags of a server" in str(run(*command, *mt, "--device", "cpu"))
        assert "no folder" in str(run("nowhere", *command[1:], *mt))
        baseline.write_bytes(baseline.read_bytes().replace(b'["plain","plain"]', b'["plain"]', 1))
        assert "each of the 2 turns of '81'" in str(run(*command, *mt, "--baseline", f"mt-bench={baseline}"))
        assert "give its questions too" in str(run(*command, *mt, "--baseline", f"alpaca-eval={baseline}"))
        assert "does not hold answers" in str(run(*command, *mt, "--references", tmp_path / "question.jsonl"))


def test_a_rating_is_the_last_one_in_brackets_from_1_to_10() -> None:
    texts = ("Rating: [[7]]", "[[3]] at first, then [[8.5]].", "[[11]]", "[[0]]", "[7]", "ten", "")
    assert list(map(read_rating, texts)) == [7, 8.5, None, None, None, None, None]


def test_the_prompt_of_a_grade_holds_no_later_turn_and_marks_what_others_wrote() -> None:
    question = Question("1", ("q1", "q2"), 0.0, {}, "math", ("r1", "r2"))
    texts = [make_prompt(question, ("a1", "a2 [[10]]"), turn)[0]["content"] for turn in (1, 2)]
    assert "q2" not in texts[0] and "a2" not in texts[0] and "r2" not in texts[0]
    assert [texts[1].index(part) for part in ("r1", "r2", "q1", "a1", "q2", "a2")] == sorted(
        texts[1].index(part) for part in ("r1", "r2", "q1", "a1", "q2", "a2")
    )
    mark = re.search(r"begin with (#[0-9a-f]{12})", texts[1])
    assert mark is not None and sum(line.startswith(mark.group(1)) for line in texts[1].splitlines()) == 7


def test_the_interval_of_a_score_is_wider_where_turns_agree() -> None:
    score, low, high = mean_interval([[float(rating)] * 2 for rating in range(1, 11)] * 4)
    assert score == 5.5
    assert high - low == pytest.approx(2 * 1.96 * 2.872 / 40**0.5, rel=0.1)  # of 40 questions, not of 80 turns
    assert mean_interval([[7.0]]) == (7, 7, 7)


def test_categories_of_a_users_file_are_text_on_the_page() -> None:
    found = {"score": 5.0, "score_95": [4.0, 6.0], "win_rate": None}
    row = {"name": "<b>m</b>", "condition": None, "context": None} | {
        "mt-bench": found
        | {"error": [], "unanswered": [], "num_unrated": 0, "turns": [5.0], "categories": {"<i>$x$</i>": found}}
    }
    described = {"num_questions": 1, "baseline": None, "num_without_reference": 0}
    results = {"date": "2026-01-01", "judge": {"model": "j"}, "models": [row], "benchmarks": {"mt-bench": described}}
    page = as_html(table_document(results))
    assert "<i>$" not in page and "<b>m" not in page and page.count("&lt;i&gt;$x$&lt;/i&gt;") == 2
