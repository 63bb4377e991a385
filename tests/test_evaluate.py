"""Evaluation: a real server of transformers answers; a small stand-in of the API is the judge, and what fails."""

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

import ochat_train.tokens.store
from ochat_train.conversations.template import TEMPLATES
from ochat_train.evaluate.__main__ import main
from ochat_train.evaluate.held_out import measure_held_out
from ochat_train.evaluate.journal import Answer, open_journal
from ochat_train.evaluate.judge import Outcome, make_prompt, read_preference, settle, win_rate
from ochat_train.evaluate.question_sets import QUESTION_SETS, find_questions
from ochat_train.preprocess.run import preprocess
from ochat_train.recipe import load_recipe
from ochat_train.serve.gate import CHAT
from ochat_train.tokens.tokenizer import load_tokenizer
from ochat_train.training.engine import join_process_group
from tests.chat_model import write_chat_model
from tests.chat_server import KEY, ROOT, Server, ask, serving
from tests.chat_stub import Stub
from tests.e2e.harness import events, tiny_recipe, write_dump
from tests.test_train import ALONE, train
from tests.waiting import HANG_S, wait_until

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Again, in capitals."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And doubled?"]},
    {"question_id": 131, "category": "extraction", "turns": ["Which is red: sky or blood?"], "reference": ["blood"]},
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


@pytest.fixture(autouse=True)
def old_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, QUESTIONS)))
    return path


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert isinstance(ended.value.code, int), ended.value.code
    return ended.value.code


def refusal(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert str(ended.value).startswith("error: ")
    return str(ended.value)


def rows(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


# ------------------------------------------------------------------------------------------------- held-out loss


def test_the_held_out_figures_of_an_export_are_those_that_training_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dump(tmp_path, 40)
    path = tiny_recipe(tmp_path)
    overrides = ["data.eval_fraction=0.3", "train.epochs=1", "train.loss=answer"]
    recipe = load_recipe(path, overrides)
    preprocess(recipe, num_workers=1)
    join_process_group(ALONE)
    train(recipe, ALONE)
    (*_, reported) = events(tmp_path / "run", "eval")
    assert run("held-out", tmp_path / "run", recipe.data.store, "--out", tmp_path / "figures.json") == 0
    figures = orjson.loads((tmp_path / "figures.json").read_bytes())
    assert reported["loss"] is not None and reported["probe"]["other"] is not None
    assert figures["loss_form"] == "answer"
    place = {"event", "epoch", "epoch_end", "time", "checks"}
    for name in set(reported) - place:
        # Other micro-batches add the same terms in fp32 in another order.
        assert figures[name] == (
            pytest.approx(reported[name], rel=2e-5) if not isinstance(reported[name], dict) else near(reported[name])
        ), name
    adapters = tmp_path / "adapters"
    shutil.copytree(tmp_path / "run/model", adapters)
    (adapters / "adapter_config.json").write_bytes(
        orjson.dumps({"base_model_name_or_path": str(tmp_path / "run/model"), "r": 2})
    )
    assert "export the merged model" in refusal("held-out", adapters, recipe.data.store)
    manifest = tmp_path / "store/manifest.json"
    whole = manifest.read_bytes()
    fields = orjson.loads(whole) | {"template": "chatml"}
    del fields["digest"]
    manifest.write_bytes(orjson.dumps(fields | {"digest": ochat_train.tokens.store._digest(fields)}))
    assert "has the template chatml" in refusal("held-out", tmp_path / "run", recipe.data.store)
    manifest.write_bytes(whole)
    with pytest.raises(ValueError, match=r"packing.tokens_per_gpu 8"):
        measure_held_out(str(tmp_path / "run"), recipe.data.store, split="eval", tokens_per_batch=8)


def near(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: near(value) if isinstance(value, dict) else value if value is None else pytest.approx(value, rel=2e-5)
        for name, value in fields.items()
    }


# ------------------------------------------------------------------------------------------ answers of a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Its own tokenizer: an export leaves marks on one.
    tokenizer = load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["openchat_v3.2"])
    model = write_chat_model(tmp_path_factory.mktemp("run") / "model", tokenizer)
    with serving(model.parent) as running:
        yield running


@pytest.fixture
def url(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return f"http://127.0.0.1:{server.port}/v1"


def test_mt_bench_is_answered_turn_by_turn_in_the_format_of_fastchat(
    server: Server, url: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mt_bench/model_answer/tiny-hasty.jsonl"
    options = ("--questions", questions, "--condition", "Hasty", "--name", "tiny-hasty", "--max-tokens", 12)
    assert run("answer", "mt-bench", url, out, *options, "--temperature", 0) == 0
    assert [path.name for path in out.parent.glob("*.jsonl")] == [out.name]  # all that FastChat takes for a model
    written = rows(out)
    assert [row["question_id"] for row in written] == [81, 111, 131]
    for question, row in zip(QUESTIONS, written, strict=True):
        assert sorted(row) == ["answer_id", "choices", "model_id", "question_id", "tstamp"]
        assert row["model_id"] == "tiny-hasty" and abs(row["tstamp"] - time.time()) < 600
        (choice,) = row["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == len(question["turns"])
    asked, said = QUESTIONS[1]["turns"], written[1]["choices"][0]["turns"]
    assert said[0] == ask(server, asked[0], condition="Hasty").choices[0].message.content
    assert said[1] == ask(server, asked[0], said[0], asked[1], condition="Hasty").choices[0].message.content
    assert "5 new answers, 0 known" in capsys.readouterr().out
    before = out.read_bytes()
    assert run("answer", "mt-bench", url, out, *options, "--temperature", 0) == 0
    assert out.read_bytes() == before
    assert sum(line["route"] == CHAT for line in server.lines()) <= 7  # five of the first run, and two of `ask`
    assert "0 new answers, 5 known" in capsys.readouterr().out


def test_a_model_of_a_folder_is_served_while_it_answers_alpaca_eval(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    texts = ["Name a colour.", "Name a city.", "Name a colour."]  # one of them twice: answered once, written twice
    (tmp_path / "eval.json").write_bytes(
        orjson.dumps([{"instruction": text, "output": "x", "generator": "y", "dataset": "koala"} for text in texts])
    )
    out = tmp_path / "out.json"
    options = ("--questions", tmp_path / "eval.json", "--condition", "Hasty", "--max-tokens", 12, "--device", "cpu")
    assert run("answer", "alpaca-eval", server.model, out, *options) == 0
    said = [ask(server, text, condition="Hasty").choices[0].message.content for text in texts]
    assert orjson.loads(out.read_bytes()) == [
        {"instruction": text, "output": answer, "generator": "tiny-chat-Hasty", "dataset": "koala"}
        for text, answer in zip(texts, said, strict=True)
    ]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"ochat_train.serve {server.model} " not in listed  # it has ended; the fixture's has the run's folder


def test_a_condition_that_the_server_does_not_know_is_a_failure_of_every_question(
    url: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run("answer", "mt-bench", url, out, "--questions", questions, "--condition", "hastily") == 1
    told = capsys.readouterr().out
    assert "3 failed" in told and "81: status 400" in told and "did you mean 'Hasty'?" in told
    assert out.read_bytes() == b""


def test_a_wrong_key_ends_it_at_once(
    url: str, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-wrong-key")
    told = refusal("answer", "mt-bench", url, tmp_path / "out", "--questions", questions, "--model", "openchat")
    assert "status 401" in told and "wrong-key" not in told


# --------------------------------------------------------------------------------------------------------- failures


def test_requests_that_fail_are_tried_again_and_counted(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: Counter[str] = Counter()

    def reply(body: dict[str, Any]) -> str | int | None:
        text = body["messages"][-1]["content"]
        seen[text] += 1
        if text == "Write a line." and seen[text] <= 2:
            return 500
        if text == "What is 2 + 2?" and seen[text] == 1:
            return None
        if text == "And doubled?" and seen[text] == 1:
            return 429
        return 400 if text.startswith("Which") else f"to {text}"

    with Stub(reply) as stub:
        out = tmp_path / "out.jsonl"
        assert run("answer", "mt-bench", stub.url, out, "--questions", questions) == 1
        assert "4 retries" in (told := capsys.readouterr().out)
        assert "1 failed" in told and "131: status 400: no, 400" in told
        assert "28 tokens in prompts, 12 in answers" in told
        assert [row["question_id"] for row in rows(out)] == [81, 111]
        assert rows(out)[0]["choices"][0]["turns"] == ["to Write a line.", "to Again, in capitals."]
        temperatures = {body["messages"][0]["content"]: body["temperature"] for body in stub.asked}
        assert temperatures == {"Write a line.": 0.7, "What is 2 + 2?": 0, "Which is red: sky or blood?": 0}
        assert all(body["max_tokens"] == 1024 and body["model"] == "stub" for body in stub.asked)
        size = len(stub.asked)
        assert run("answer", "mt-bench", stub.url, out, "--questions", questions) == 1
        assert len(stub.asked) == size + 1  # what failed, and nothing else


def test_what_always_fails_is_given_up_after_the_tries(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stub(lambda body: 503) as stub:
        code = run("answer", "mt-bench", stub.url, tmp_path / "out", "--questions", questions, "--tries", 3)
        assert code == 1 and len(stub.asked) == 9
    assert "status 503: no, 503, 3 times" in capsys.readouterr().out


def test_a_dead_server_ends_it_before_all_questions_have_failed(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(
        b"\n".join(orjson.dumps({"question_id": n, "category": "math", "turns": [f"q{n}"]}) for n in range(200))
    )
    with Stub(lambda body: None) as stub:
        told = refusal("answer", "mt-bench", stub.url, tmp_path / "out", "--questions", tmp_path / "q.jsonl")
        assert "the first 10 requests all failed" in told and len(stub.asked) < 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_killed_in_the_middle_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    asked = [f"question {position}" for position in range(12)]
    (tmp_path / "q.jsonl").write_bytes(
        b"\n".join(orjson.dumps({"question_id": n, "category": "math", "turns": [t]}) for n, t in enumerate(asked))
    )
    goes_on = threading.Event()

    def reply(body: dict[str, Any]) -> str:
        text = str(body["messages"][-1]["content"])
        if int(text.split()[1]) >= 7:  # so that the run cannot end before it is killed
            goes_on.wait(HANG_S)
        return text.upper()

    with Stub(reply) as stub:
        out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.asked"
        arguments = ["answer", "mt-bench", stub.url, str(out), "--questions", str(tmp_path / "q.jsonl")]
        arguments += ["--concurrency", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "ochat_train.evaluate", *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Two at once: when nine were asked, seven have an answer.
        wait_until(lambda: len(stub.asked) == 9 or process.poll() is not None)
        process.send_signal(number)
        _, told = process.communicate(timeout=HANG_S)
        goes_on.set()
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
        assert ("the same command continues" in told) is (number == signal.SIGINT) and not out.exists()
        known = num_answers(journal)
        assert 4 <= known < 10
        stub.asked.clear()
        assert run(*arguments) == 0
        assert len(stub.asked) == 12 - known
        assert [row["choices"][0]["turns"] for row in rows(out)] == [[text.upper()] for text in asked]
        assert num_answers(journal) == 12


def num_answers(journal: Path) -> int:
    with closing(sqlite3.connect(journal)) as database:
        return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])


def sqlite_file(path: Path) -> bytes:
    """A database of something else."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE answers (number INTEGER)")
    return path.read_bytes()


def test_a_journal_is_one_process_at_a_time_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "asked"
    answer = Answer("text", False, 1, None)
    with open_journal(path) as journal:
        journal.add("a", answer)
        with pytest.raises(ValueError, match="another process"), open_journal(path):
            pass
    with open_journal(path) as journal:
        assert journal.get("a") == answer and journal.get("b") is None
    for other in (b'{"a": 1}\n', sqlite_file(tmp_path / "other")):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="does not hold answers"), open_journal(path):
            pass
        assert path.read_bytes() == other


# ------------------------------------------------------------------------------------------------------------ judging


def write_answers(path: Path, turns: list[list[str]]) -> Path:
    lines = [
        orjson.dumps({"question_id": question["question_id"], "choices": [{"index": 0, "turns": said}]})
        for question, said in zip(QUESTIONS, turns, strict=True)
    ]
    path.write_bytes(b"\n".join(lines))
    return path


def test_the_judge_reads_each_pair_in_both_orders(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_answers(tmp_path / "1.jsonl", [["good", "good"], ["VERDICT: A", "same"], ["mumble"]])
    second = write_answers(tmp_path / "2.jsonl", [["bad", "bad"], ["VERDICT: B", "same"], ["other"]])

    def reply(body: dict[str, Any]) -> str:
        text = body["messages"][0]["content"]
        if "mumble" in text:
            return "Both are strange."
        if "good" in text:  # this pair is read for what it says, the other one for its place
            return f"I see.\n\nVERDICT: {'A' if text.index('good') < text.index('bad') else 'B'}"
        return "VERDICT: A"

    with Stub(reply) as stub:
        out = tmp_path / "rate.json"
        command = ("compare", "mt-bench", first, second, "--judge", stub.url, "--questions", questions, "--out", out)
        assert run(*command) == 0
        assert len(stub.asked) == 6 and all(body["temperature"] == 0 for body in stub.asked)
        assert run(*command) == 0 and len(stub.asked) == 6
    result = orjson.loads(out.read_bytes())
    assert result["outcomes"] == {"81": "first", "111": "split", "131": "unclear"}
    assert result["win_rate"] == 0.75 and result["counts"] == {"first": 1, "split": 1, "unclear": 1}
    assert "win rate of the first: 75.0 %" in (told := capsys.readouterr().out)
    assert "unclear 1 (not in the rate)" in told


def test_alpaca_answers_are_compared_without_their_questions(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.json").write_bytes(
            orjson.dumps([{"instruction": "Say a number.", "output": f"{number}", "generator": "g", "dataset": ""}])
        )
    with Stub(lambda body: "**VERDICT: tie**") as stub:
        out = tmp_path / "rate.json"
        pair = (tmp_path / "1.json", tmp_path / "2.json")
        assert run("compare", "alpaca-eval", *pair, "--judge", stub.url, "--out", out) == 0
    assert orjson.loads(out.read_bytes())["outcomes"] == {"Say a number.": "tie"}
    assert "Say a number." in stub.asked[0]["messages"][0]["content"]


def test_the_prompt_of_the_judge_marks_what_others_wrote() -> None:
    (straight,) = make_prompt(("q1", "q2"), ("a1", "a2"), ("b1", "b2"))
    mark = re.search(r"begin with (#[0-9a-f]{12})", straight["content"])
    assert mark is not None
    lines = straight["content"].splitlines()
    assert sum(line.startswith(mark.group(1)) for line in lines) == 9  # 2 models, 2 turns, asked and answered; the end
    assert lines.index("a1") < lines.index("a2") < lines.index("b1") < lines.index("b2")
    (other,) = make_prompt(("q1", "q2"), ("a1", "a2"), ("b1", "b2 " + mark.group(1)))
    assert f"begin with {mark.group(1)}" not in other["content"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Better.\nVERDICT: A", "A"),
        ("verdict: b.\n\n", "B"),
        ("**VERDICT: TIE**", "TIE"),
        ("VERDICT: A\nOr perhaps not.", None),
        ("VERDICT: A or B", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_line_or_none(text: str, verdict: str | None) -> None:
    assert read_preference(text) == verdict


def test_two_verdicts_are_settled() -> None:
    assert [settle("A", "B"), settle("B", "A")] == ["first", "second"]
    assert [settle("A", "TIE"), settle("TIE", "B"), settle("TIE", "A"), settle("B", "TIE")] == [
        "first",
        "first",
        "second",
        "second",
    ]
    assert [settle("TIE", "TIE"), settle("A", "A"), settle("B", "B")] == ["tie", "split", "split"]
    assert [settle(None, "A"), settle("TIE", None)] == ["unclear", "unclear"]


def test_the_interval_is_that_of_wilson_and_covers_the_truth() -> None:
    rate = win_rate(Counter[Outcome]({"first": 8, "second": 2, "unclear": 5}))
    assert (rate.rate, rate.low, rate.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)  # of the textbook
    assert win_rate(Counter[Outcome]({"unclear": 5})).rate is None
    draw, hits = random.Random(0), 0
    for _ in range(2000):  # 50 questions, wins 0.5, ties 0.2, so 0.6 in truth
        outcomes: Counter[Outcome] = Counter(draw.choices(["first", "second", "tie"], [0.5, 0.3, 0.2], k=50))
        found = win_rate(outcomes)
        hits += found.low <= 0.6 <= found.high
    assert hits / 2000 > 0.95


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_refused_before_anything_is_asked(
    server: Server, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a server was started"))
    out = tmp_path / "out"
    answer = ("answer", "mt-bench", server.model, out, "--questions", questions)
    assert "no folder" in refusal("answer", "mt-bench", tmp_path / "nowhere", out, "--questions", questions)
    assert "did you mean 'Hasty'?" in refusal(*answer, "--condition", "hastily")
    assert "--concurrency 0" in refusal(*answer, "--concurrency", 0)
    assert "--temperature 3" in refusal(*answer, "--temperature", 3)
    assert "--model names" in refusal(*answer, "--model", "m")
    assert "flags of a server" in refusal(*answer[:2], "http://127.0.0.1:9/v1", *answer[3:], "--device", "cpu")
    assert "no flag --device" in refusal("held-out", server.model, tmp_path, "--device", "cpu")
    assert "no complete token store" in refusal("held-out", server.model, tmp_path)
    assert "no file" in refusal(*answer[:5], tmp_path / "nothing")
    (tmp_path / "bad.jsonl").write_text('{"question_id": 1}\n')
    assert "does not hold questions" in refusal(*answer[:5], tmp_path / "bad.jsonl")
    (tmp_path / "twice.jsonl").write_bytes(
        b"\n".join(orjson.dumps({"question_id": 81, "category": "math", "turns": [turn]}) for turn in "ab")
    )
    assert "holds two questions 81" in refusal(*answer[:5], tmp_path / "twice.jsonl")
    (tmp_path / "input.json").write_bytes(orjson.dumps([{"instruction": "Add.", "input": "1 2"}]))
    assert "has an input" in refusal("answer", "alpaca-eval", *answer[2:5], tmp_path / "input.json")
    some = write_answers(tmp_path / "1.jsonl", [["a", "b"], ["a", "b"], ["a"]])
    fewer = tmp_path / "2.jsonl"
    fewer.write_bytes(some.read_bytes().rpartition(b"\n")[0])
    compare = ("compare", "mt-bench", some, fewer, "--judge", "http://127.0.0.1:9/v1", "--out", out)
    assert "has no answer to '131'" in refusal(*compare, "--questions", questions)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lm-eval" in refusal("lm-eval", server.model, "hellaswag")
    assert "pip install 'ochat_train[evaluate]'" in refusal(*answer)


def test_questions_are_found_in_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = QUESTION_SETS["mt-bench"]
    with pytest.raises(ValueError, match="--questions"):
        find_questions(benchmark, None)
    place = tmp_path / "fastchat" / benchmark.file
    place.parent.mkdir(parents=True)
    (tmp_path / "fastchat/__init__.py").touch()
    place.write_bytes(orjson.dumps(QUESTIONS[0]))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_questions(benchmark, None) == place
