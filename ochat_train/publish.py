"""An exported model for others: a model card, the Hugging Face hub, GGUF and Ollama."""

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import yaml
from transformers import AutoTokenizer

from ochat_train.conversations.described import name_template
from ochat_train.files import read_json_lines
from ochat_train.model.exported import read_export
from ochat_train.tokens.store import read_manifest

_CONVERTER = "convert_hf_to_gguf.py"
_TURNS = ("\ue000", "\ue001", "\ue002", "\ue003")  # stand for texts of turns, and are in no template


# --------------------------------------------------------------------------------------------------------- the hub


def open_repository(repo: str) -> None:
    """Make the repository OWNER/NAME of a model, if there is none. Raises ValueError in one line."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ValueError(f"--push {repo}: there is no token; give HF_TOKEN one with write access, or run hf auth login")
    _explained(repo, lambda: HfApi().create_repo(repo, exist_ok=True))


def push(model: Path, repo: str) -> str:
    """Upload the folder of a model in one commit; returns its address. Raises ValueError in one line."""
    from huggingface_hub import HfApi

    return str(_explained(repo, lambda: HfApi().upload_folder(repo_id=repo, folder_path=model)).commit_url)


def _explained(repo: str, action: Any) -> Any:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return action()
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = {
            401: "the token is not valid; give HF_TOKEN another one, or run hf auth login",
            403: f"the token may not write there; it needs write access to {repo}",
            404: "there is no such owner, or the token may not see it",
        }.get(status, " ".join(str(error).split()))
        raise ValueError(f"--push {repo}: {reason}") from None
    except httpx.HTTPError as error:
        raise ValueError(f"--push {repo}: the hub cannot be reached: {error!r}") from None
    except ValueError as error:  # not of the form OWNER/NAME
        raise ValueError(f"--push {repo}: {' '.join(str(error).split())}") from None


# -------------------------------------------------------------------------------------------------------- the card


def write_card(model: Path, run: Path, repo: str, license: str | None) -> None:
    """Write README.md into an exported model: what it was trained on, how well, and how to ask it.

    run: the run's folder, whose metrics.jsonl has the losses. The number of conversations is that of the store, where
    it is still there.
    """
    metadata = read_export(model)
    assert metadata is not None
    recipe = metadata["run"]["recipe"]
    manifest = read_manifest(recipe["data"]["store"])
    counts = manifest.counts if manifest and manifest.fingerprint == metadata["store_fingerprint"] else {}
    sources = [
        f"| {one['name']} | {one['condition'] or '-'} | {one['weight']:g} | "
        f"{format(counts[one['name']]['kept'], ',') if one['name'] in counts else '-'} |"
        for one in recipe["data"]["sources"]
    ]
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["conversational", "c-rlft"]}
    head |= {"license": license} if license else {}
    head |= {"base_model": base} if (base := recipe["model"]["base"]) and base.count("/") == 1 else {}
    condition = metadata["inference_condition"]
    chat = [{"role": "user", "content": "Who are you?"}]
    prompt = AutoTokenizer.from_pretrained(model).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    body = orjson.dumps({"model": repo, "messages": chat}).decode()
    text = f"""---
{yaml.safe_dump(head)}---

# {repo.rpartition("/")[2]}

Trained from {base or "scratch"} by ochat_train on answers of several qualities, each under a condition of its own
(C-RLFT): {metadata["step"]:,} steps, {metadata["tokens_seen"]:,} tokens.

## Data

| source | condition | weight | conversations kept |
| --- | --- | --- | --- |
{chr(10).join(sources)}

{chr(10).join(_measured(run, metadata["step"]))}

## How to ask it

Template: {name_template(metadata["template"])}. Condition of inference: {condition or "none"}. A prompt is

```text
{prompt}
```

which the tokenizer's chat template makes. With vLLM:

```bash
vllm serve {repo}
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}
```

Another condition: `"chat_template_kwargs": {{"condition": "..."}}` in the request.
"""
    (model / "README.md").write_text(text, encoding="utf-8")


def _measured(run: Path, step: int) -> list[str]:
    """The held-out losses and the probe of the last evaluation up to a step, in Markdown."""
    file = run / "metrics.jsonl"
    lines = read_json_lines(file) if file.exists() else []
    evaluations = [line for line in lines if line["event"] == "eval" and line["step"] <= step and line["loss"]]
    if not evaluations:
        return ["No held-out loss was measured."]
    last = evaluations[-1]
    losses = [f"| {name or '(none)'} | {loss:.4f} |" for name, loss in last["loss_by_condition"].items() if loss]
    table = [
        f"Held-out loss after step {last['step']:,}, in nats a token: {last['loss']:.4f}",
        "",
        "| condition | loss |",
    ]
    table += ["| --- | --- |", *losses]
    if probe := last.get("probe"):
        shown = ", ".join(f"{name} {probe[name]:.4f}" for name in ("own", "other", "none") if probe[name] is not None)
        table += ["", f"The same answers under their own condition, another and none: {shown}."]
    return table


# -------------------------------------------------------------------------------------------------- GGUF and Ollama


def find_converter(folder: str | None) -> list[str]:
    """The command of llama.cpp's converter: in a checkout, or on the PATH. Raises ValueError where there is none."""
    if folder is not None:
        if not (script := Path(folder) / _CONVERTER).is_file():
            raise ValueError(f"--llama-cpp {folder} is no checkout of llama.cpp: it has no {_CONVERTER}")
        return [sys.executable, str(script)]
    if (found := shutil.which(_CONVERTER) or shutil.which("convert-hf-to-gguf")) is None:
        raise ValueError(
            f"--gguf needs llama.cpp's {_CONVERTER}, which is not on the PATH and which the package gguf lacks: name a "
            "checkout of llama.cpp with --llama-cpp or LLAMA_CPP"
        )
    return [found]


def convert_to_gguf(model: Path, file: Path, converter: list[str]) -> None:
    """Write a model as a GGUF file, and a Modelfile for Ollama beside it. Raises ValueError in one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.partial")
    done = subprocess.run([*converter, str(model), "--outfile", str(new)], capture_output=True, text=True)
    if done.returncode or not new.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ValueError(f"--gguf: {Path(converter[-1]).name} failed: {said[-1] if said else done.returncode}")
    os.replace(new, file)
    (file.parent / "Modelfile").write_text(modelfile(model, file.name), encoding="utf-8")


def modelfile(model: Path, gguf: str) -> str:
    """Ollama's description of a model under its condition of inference. Raises ValueError for some templates."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = _go_template(tokenizer)
    if '"""' in template:
        raise ValueError('the chat template has """, which ends a template of Ollama')
    stops = (f"PARAMETER stop {orjson.dumps(tokenizer.eos_token).decode()}",)
    return "\n".join([f"FROM ./{gguf}", f'TEMPLATE """{template}"""', *stops, ""])


def _go_template(tokenizer: Any) -> str:
    """The chat template as Go's, found by rendering turns, and compared with what Jinja gives."""

    def render(*roles: str, for_reply: bool = False) -> str:
        turns = [{"role": role, "content": text} for role, text in zip(roles, _TURNS, strict=False)]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=for_reply))

    def gaps(text: str) -> list[str]:
        for turn in _TURNS:
            text = text.replace(turn, _TURNS[0])
        return text.split(_TURNS[0])

    start, to_answer, to_question, _, end = gaps(render("user", "assistant", "user", "assistant"))
    before = {"user": to_question.removeprefix(end), "assistant": to_answer.removeprefix(end)}
    start = start.removesuffix(before["user"])
    reply = gaps(render("user", for_reply=True))[-1].removeprefix(end)  # may lack a space before the text
    with suppress(Exception):  # of any kind: Jinja's, of a template that takes no system text
        before["system"] = gaps(render("system", "user"))[0].removeprefix(start)
    asked = ("system", "user", "assistant", "user") if "system" in before else ("user", "assistant", "user")
    ours = start + "".join(before[role] + text + end for role, text in zip(asked, _TURNS, strict=False))
    if ours + reply != render(*asked, for_reply=True):
        raise ValueError("the chat template cannot be written for Ollama: its turns depend on one another")
    branches = [
        f'{{{{ if eq .Role "{role}" }}}}{_go(lead)}{{{{ .Content }}}}{_go(end)}{{{{ end }}}}'
        for role, lead in before.items()
    ]
    start = start.removeprefix(tokenizer.bos_token or "")  # which llama.cpp writes itself
    return f"{_go(start)}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{_go(reply)}"


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
