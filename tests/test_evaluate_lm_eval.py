"""lm-eval's own library, run when it is installed (it is in no extra): our model by its hf model and by our server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.template import TEMPLATES
from ochat_train.evaluate.harness import run_tasks
from ochat_train.tokens.chat_template import encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from tests.chat_model import write_chat_model
from tests.chat_server import KEY, ROOT, serving

pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")
pytest.importorskip("sacrebleu", reason="the package lm-eval is installed without what it needs")

ROWS = [
    {"question": "What is red?", "choices": ["blood", "sky"], "answer": "blood", "label": 0},
    {"question": "What is blue?", "choices": ["blood", "sky"], "answer": "sky", "label": 1},
]
GENERATED = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}
CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["openchat_v3.2"])


@pytest.fixture(scope="module")
def model(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("run") / "model", tokenizer)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving(model.parent) as running:
        yield f"http://127.0.0.1:{running.port}/v1"


def write_task(folder: Path, name: str, fields: dict[str, Any]) -> str:
    data, task = folder / "data.json", folder / f"{name}.yaml"
    data.write_bytes(b"\n".join(map(orjson.dumps, ROWS)))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    task.write_bytes(orjson.dumps(common | fields))  # JSON is YAML
    return str(task)


def run(target: str, task: str, condition: str) -> dict[str, Any]:
    return run_tasks(target, [task], model=None, condition=condition, limit=None, batch_size=1, concurrency=2)


def test_a_folder_and_its_server_give_the_same_answers(
    model: Path, url: str, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    task = write_task(tmp_path, "generated", GENERATED)
    local = run(str(model), task, "Hasty")["samples"]["generated"]
    served = run(url, task, "Hasty")["samples"]["generated"]
    assert [sample["resps"] for sample in local] == [sample["resps"] for sample in served]
    other = run(url, task, "Careful")["samples"]["generated"]
    assert [sample["resps"] for sample in other] != [sample["resps"] for sample in served]
    text = local[0]["arguments"][0][0]
    turns = (Message("user", local[0]["doc"]["question"]),)
    ids = tokenizer.pretrained(text, add_special_tokens=False)["input_ids"]
    assert ids == encode_prompt(Conversation("", "", "Hasty", "", turns), tokenizer)


def test_likelihoods_are_for_a_folder_alone(
    model: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    task = write_task(tmp_path, "chosen", CHOSEN)
    assert run(str(model), task, "Careful")["results"]["chosen"]["acc,none"] in (0.0, 0.5, 1.0)
    with pytest.raises(ValueError, match="name the model's folder"):
        run(url, task, "Careful")
