"""An exported model for others: its card, its upload by the hub's own client, and its template for Ollama."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from ochat_train.conversations.described import read_template
from ochat_train.conversations.template import TEMPLATES
from ochat_train.publish import convert_to_gguf, find_converter, modelfile, open_repository, push, write_card
from ochat_train.tokens.tokenizer import load_tokenizer
from tests.chat_model import write_chat_model
from tests.hub_server import Hub, serve_hub
from tests.small_tokenizers import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base") / "base", "llama2"))


@pytest.fixture(scope="module")
def model(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model whose metadata are those of a run."""
    tokenizer = load_tokenizer(base, TEMPLATES["openchat_v3.2"])
    folder = write_chat_model(tmp_path_factory.mktemp("run") / "model", tokenizer)
    sources = [
        {"name": "good", "condition": "Careful", "weight": 1.0},
        {"name": "rest", "condition": "Hasty", "weight": 0.1},
    ]
    recipe = {"data": {"store": str(folder / "no store"), "sources": sources}, "model": {"base": "ann/base"}}
    file = folder / "ochat_train.json"
    about = {"step": 12, "tokens_seen": 3456, "store_fingerprint": "ab", "run": {"recipe": recipe}}
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    losses = {"loss": 1.25, "loss_by_condition": {"Careful": 1.0, "Hasty": 2.5}}
    probe = {"probe": {"own": 1.25, "other": 1.75, "none": None}}
    events = [{"event": "eval", "step": step} | losses | probe for step in (6, 12)]
    later = {"event": "eval", "step": 18, "loss": 9.0, "loss_by_condition": {}, "probe": None}
    (folder.parent / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in [*events, later]))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    from huggingface_hub import constants

    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files then go to the server itself
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub  # type: ignore[misc]


def test_a_model_is_uploaded_whole_with_its_card(model: Path, hub: Hub) -> None:
    open_repository("ann/tiny")
    write_card(model, model.parent, "ann/tiny", "apache-2.0")
    url = push(model, "ann/tiny")
    (files,) = hub.repos["ann/tiny"].values()
    assert url.startswith(f"{hub.url}/ann/tiny/commit/")
    assert files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() in hub.uploaded
    head, card = files["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head)["license"] == "apache-2.0" and yaml.safe_load(head)["base_model"] == "ann/base"
    for text in (
        "12 steps, 3,456 tokens",
        "| good | Careful | 1 | - |",
        "| rest | Hasty | 0.1 | - |",
        "Held-out loss after step 12, in nats a token: 1.2500",
        "| Hasty | 2.5000 |",
        "own 1.2500, other 1.7500.",
        "Careful User: Who are you?<|end_of_turn|>Careful Assistant:",
        "vllm serve ann/tiny",
    ):
        assert text in card, text


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("", "ann/tiny", "there is no token; give HF_TOKEN one with write access"),
        ("hf_wrong", "ann/tiny", "the token is not valid"),
        ("hf_reader", "ann/tiny", "the token may not write there; it needs write access to ann/tiny"),
        ("hf_writer", "ann/ti ny", "--push ann/ti ny: .*ti ny"),
    ],
)
def test_mistakes_of_tokens_are_said_in_one_line(
    token: str, repo: str, words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=words) as raised:
        open_repository(repo)
    assert "\n" not in str(raised.value) and not hub.repos


# Go's template, as far as it is used: turns by their role, and what follows them.
_BRANCH = re.compile(r'\{\{ if eq .Role "(\w+)" \}\}(.*?)\{\{ .Content \}\}(.*?)\{\{ end \}\}', re.DOTALL)


def rendered_by_ollama(text: str, turns: list[dict[str, str]]) -> str:
    start, _, rest = text.partition("{{ range .Messages }}")
    branches = {role: (before, after) for role, before, after in _BRANCH.findall(rest)}
    end = rest.rpartition("{{ end }}")[2]
    return start + "".join(turn["content"].join(branches[turn["role"]]) for turn in turns) + end


@pytest.mark.parametrize(
    ("name", "place"),
    [("openchat_v3.2", None), ("chatml", "system"), ("chatml", "user_prefix"), ("chatml", "assistant_prefix")],
)
def test_ollama_is_told_the_prompts_of_training(name: str, place: str | None, base: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base, read_template({"template": name, "condition_in": place}))
    folder = write_chat_model(tmp_path / "model", tokenizer)
    text = modelfile(folder, "tiny.gguf")
    assert text.startswith("FROM ./tiny.gguf\n") and f'PARAMETER stop "{tokenizer.template.end_token}"' in text
    (template,) = re.findall('TEMPLATE """(.*?)"""', text, re.DOTALL)
    loaded = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": role, "content": f"{role} text"} for role in ("system", "user", "assistant", "user")]
    for some in (turns, turns[1:], turns[3:]):
        wanted = str(loaded.apply_chat_template(some, tokenize=False, add_generation_prompt=True))
        assert rendered_by_ollama(template, some) == wanted.removeprefix(loaded.bos_token)
        assert "Careful" in wanted


def test_the_converter_is_one_of_a_checkout_of_llama_cpp(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"name a checkout of llama\.cpp with --llama-cpp or LLAMA_CPP"):
        find_converter(None)
    with pytest.raises(ValueError, match=r"is no checkout of llama.cpp: it has no convert_hf_to_gguf.py"):
        find_converter(str(tmp_path))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys; sys.exit('INFO: loading\\nmodel is not supported')")
    command = find_converter(str(tmp_path))
    assert command == [sys.executable, str(script)]
    with pytest.raises(ValueError, match=r"^--gguf: convert_hf_to_gguf.py failed: model is not supported$"):
        convert_to_gguf(model, tmp_path / "tiny.gguf", command)
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[3]).write_text(sys.argv[1])")
    convert_to_gguf(model, tmp_path / "tiny.gguf", command)
    assert (tmp_path / "tiny.gguf").read_text() == str(model)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./tiny.gguf\n")
