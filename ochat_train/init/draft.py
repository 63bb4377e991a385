"""A recipe's text for a base and its GPUs: the first way of training that fits them."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ochat_train.conversations.described import read_template
from ochat_train.gpus import usable_gpus
from ochat_train.init.sources import Division, yaml_text
from ochat_train.model.pretrained import load_config
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.chat_template import chat_template
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer, require_model
from ochat_train.training.data import trained_rows
from ochat_train.training.resources import AvailableMemory, find_memory, nearest_that_fits, plan_memory, size_of
from ochat_train.training.speed import GPUS

_MOST_TOKENS, _MOST_TOKENS_CPU = 4096, 1024  # of an example
_TOKENS_A_STEP = 2**18  # of the shipped recipes
_CHARS_A_TOKEN = 4
_LEAST_STEPS = 50  # of an epoch
_CPU_PROCESSES = 2  # that launch.sh starts on a machine without GPUs
# By type of model, and a token that the vocabulary must have: those of the shipped recipes.
_TEMPLATES = (
    ("mistral", "<s>", "openchat_3.5"),
    ("llama", "<|begin_of_text|>", "openchat_3.6"),
    ("llama", "<s>", "openchat_v3.2"),
    ("gemma", "<bos>", "openchat_v3.2_gemma_new"),
)


class Machine(NamedTuple):
    """The processes of a run, and the memory of each GPU; None on a CPU."""

    num_processes: int
    memory: AvailableMemory


def read_machine(text: str) -> Machine:
    """The machine that 8xH100, 1x24 (GiB), cpu or `what is here` means. Raises ValueError for anything else."""
    here = find_memory()
    if text == "what is here":
        return Machine(usable_gpus() or _CPU_PROCESSES, here)
    if text == "cpu":
        return Machine(_CPU_PROCESSES, AvailableMemory(None, here.host_bytes, is_here=True))
    number, _, kind = text.partition("x")
    gib = GPUS[kind].gib if kind in GPUS else kind.lower().removesuffix("gb")
    if not (number.isdecimal() and int(number) and re.fullmatch(r"[1-9]\d*(\.\d+)?", str(gib))):
        raise ValueError(f"--gpus {text} is not of the form 8xH100, 1x24 or cpu; kinds are {', '.join(GPUS)}, or GiB")
    return Machine(int(number), AvailableMemory(int(float(gib) * 2**30), here.host_bytes, is_here=False))


class Base(NamedTuple):
    """A base with the template that suits it, as YAML."""

    name: str
    config: Any
    tokenizer: ChatTokenizer
    template: str


def read_base(name: str) -> Base:
    """The base with the first template that its tokenizer can have and its export can say. Raises ValueError."""
    require_model(name)
    reasons = []
    for template, place in _templates_of(name):
        try:
            tokenizer = load_tokenizer(name, read_template({"template": template, "condition_in": place}))
            chat_template(tokenizer, "Good")
        except ValueError as error:
            reasons.append(f"{template}: {error}")
            continue
        line = f"template: {template}" + (f"\ncondition_in: {place}" if place else "")
        return Base(name, load_config(name, None, tokenizer.num_ids).get_text_config(), tokenizer, line)
    raise ValueError(
        f"no template suits {name}; give pieces of your own (docs/templates.md):\n  " + "\n  ".join(reasons)
    )


def _templates_of(name: str) -> Iterator[tuple[str, str | None]]:
    """Templates that may suit, with where the condition is written, the best first."""
    plain = load_tokenizer(name, read_template({"template": "chatml", "condition_in": None})).pretrained
    vocabulary, kind = plain.get_vocab(), load_config(name, None, 0).model_type
    if plain.chat_template is not None and "<|im_start|>" not in vocabulary:  # a chat model with a form of its own
        yield from (("base", "system"), ("base", "user_prefix"))
    for family, token, template in _TEMPLATES:
        if kind.startswith(family) and token in vocabulary:
            yield template, None
    yield "chatml", None


def draft(base: Base, machine: Machine, name: str, division: Division, num_chars: int, num_records: int) -> str:
    """The recipe's text. Raises ValueError where no way of training fits the machine."""
    positions = getattr(base.config, "max_position_embeddings", None) or _MOST_TOKENS
    on_gpu = machine.memory.gpu_bytes is not None
    max_tokens = min(_MOST_TOKENS if on_gpu else _MOST_TOKENS_CPU, positions)
    share = min(0.05, max(0.005, round(200 / num_records, 3)))
    plan = None
    for model, zero, lr, tokens_per_gpu in _ways(base, max_tokens, on_gpu=on_gpu):
        a_step = min(_TOKENS_A_STEP, num_chars // _CHARS_A_TOKEN // _LEAST_STEPS)
        grad_accum = max(1, a_step // (tokens_per_gpu * machine.num_processes))
        text = f"""\
# Written by `ochat init`. Next: ochat preprocess --dry-run, ochat doctor and ochat train, each with this file.
name: {yaml_text(name)}
data:
  store: {yaml_text(f"stores/{name}")}
  # {division.found}
  sources:
{"".join(f"    {line}{chr(10)}" for line in division.lines)}\
  max_tokens: {max_tokens}  # longer conversations are split
  eval_fraction: {share:g}  # held out, to see whether training still helps
{base.template}
model: {{base: {yaml_text(base.name)}, {model}}}
packing: {{tokens_per_gpu: {tokens_per_gpu}, grad_accum: {grad_accum}}}  # {machine.num_processes} processes
optim: {{lr: {lr}}}
zero: {{stage: {zero}}}
train: {{epochs: 3}}
checkpoint: {{dir: {yaml_text(f"runs/{name}")}}}
"""
        recipe = _parse(text)
        with suppress(ValueError):  # of a way that this base cannot have
            size = size_of(recipe, base.config, len(trained_rows(recipe, base.tokenizer)))
            plan = plan_memory(recipe, machine.memory, base.config, size, machine.num_processes)
            if plan.fits(plan.own):
                return text
    remedy = f"; {nearest_that_fits(plan)}" if plan is not None else ""
    raise ValueError(f"{base.name} fits in no way into {machine.num_processes} such GPUs or processes{remedy}")


def _ways(base: Base, max_tokens: int, *, on_gpu: bool) -> Iterator[tuple[str, int, str, int]]:
    """Keys of model, ZeRO stage, learning rate and tokens a micro-batch, the best way first."""
    dtype = "dtype: bfloat16" if on_gpu else "dtype: float32"
    full = "auto" if re.match("llama|mistral", base.config.model_type) else "1.0e-5"
    lora, bits = (f"{dtype}, lora: {{rank: 16, alpha: 32.0{more}}}" for more in ("", ", base_bits: 4"))
    sizes = (4 * max_tokens, max_tokens) if on_gpu else (max_tokens,)
    stages = (2, 3) if on_gpu else (0,)
    yield from ((dtype, stage, full, size) for stage in stages for size in sizes)
    yield from ((lora, stages[0], "2.0e-4", size) for size in sizes)
    if on_gpu:
        yield from ((bits, 2, "2.0e-4", size) for size in sizes)


def _parse(text: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)
