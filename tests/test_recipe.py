"""A recipe arrives as it is written, or is refused with the key, the value and what would have been right."""

import os
import signal
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from ochat_train.conversations.template import TEMPLATES
from ochat_train.recipe import EvalSourceSection, Recipe, differences, known_keys, load_recipe, to_json
from ochat_train.recipe.__main__ import main
from ochat_train.recipe.mistakes import FOREIGN_KEYS

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/quickstart.yaml"
NO_CONFIG = "model.config=null"
LONG_NAME = "a folder: #1 " * 12 + "end"
CHECK = {"name": "a", "questions": "b", "check": "math", "pattern": None, "max_new_tokens": 256, "num": 3}

# A new valid value for every leaf of the quickstart's resolved recipe: as typed, as it arrives, and what else it needs.
CHANGES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "name": ("other", "other", ()),
    "data.store": ("elsewhere", "elsewhere", ()),
    "data.sources.0.name": ("exact", "exact", ()),
    "data.sources.0.path": ("[a.json, 'b/*.json']", ["a.json", "b/*.json"], ()),
    "data.sources.0.condition": ("null", None, ()),
    "data.sources.0.weight": ("0.25", 0.25, ()),
    "data.sources.0.epochs": ("0.5", 0.5, ()),
    "data.sources.0.where.model": ("[x, 3, true, null]", ["x", 3, True, None], ()),
    "data.sources.0.where_not": ("{lang: de}", {"lang": "de"}, ()),
    "data.sources.0.html": ("always", "always", ()),
    "data.sources.0.encoding": ("gb18030", "gb18030", ()),
    "data.sources.0.fields.turns": ("chat", "chat", ()),
    "data.sources.0.fields.role": ("who", "who", ()),
    "data.sources.0.fields.text": ("body", "body", ()),
    "data.sources.0.fields.question": ("[a, b]", ["a", "b"], ("data.sources.0.fields.answer=c",)),
    "data.sources.0.fields.answer": ("out", "out", ()),
    "data.sources.0.fields.answers": ("[a, b]", ["a", "b"], ()),
    "data.sources.0.fields.chosen": ("good", "good", ()),
    "data.sources.0.fields.rejected": ("bad", "bad", ()),
    "data.sources.0.fields.history": ("before", "before", ("data.sources.0.fields.answer=c",)),
    "data.sources.0.fields.system": ("sys", "sys", ()),
    "data.sources.0.roles": ("{agent: assistant}", {"agent": "assistant"}, ()),
    "data.sources.0.tree": ("all", "all", ()),
    "data.sources.0.weight_field": ("reward", "reward", ()),
    "data.sources.1.name": ("quick", "quick", ()),
    "data.sources.1.path": ("c.json", "c.json", ()),
    "data.sources.1.condition": ("''", "", ()),
    "data.sources.1.weight": ("0", 0.0, ()),
    "data.sources.1.epochs": ("3", 3.0, ()),
    "data.sources.1.where.model": ("5", 5, ()),
    "data.sources.1.where_not": ("{lang: [de, fr]}", {"lang": ["de", "fr"]}, ()),
    "data.sources.1.html": ("never", "never", ()),
    "data.sources.1.encoding": ("gb18030", "gb18030", ()),
    "data.sources.1.fields.turns": ("chat", "chat", ()),
    "data.sources.1.fields.role": ("who", "who", ()),
    "data.sources.1.fields.text": ("body", "body", ()),
    "data.sources.1.fields.question": ("[a, b]", ["a", "b"], ("data.sources.1.fields.answer=c",)),
    "data.sources.1.fields.answer": ("out", "out", ()),
    "data.sources.1.fields.answers": ("[a, b]", ["a", "b"], ()),
    "data.sources.1.fields.chosen": ("good", "good", ()),
    "data.sources.1.fields.rejected": ("bad", "bad", ()),
    "data.sources.1.fields.history": ("before", "before", ("data.sources.1.fields.answer=c",)),
    "data.sources.1.fields.system": ("sys", "sys", ()),
    "data.sources.1.roles": ("{agent: assistant}", {"agent": "assistant"}, ()),
    "data.sources.1.tree": ("all", "all", ()),
    "data.sources.1.weight_field": ("reward", "reward", ()),
    "data.max_tokens": ("256", 256, ()),
    "data.overlong": ("drop", "drop", ()),
    "data.overlong_context": ("0", 0, ()),
    "data.dedupe.exact": ("false", False, ()),
    "data.dedupe.prefix": ("false", False, ()),
    "data.dedupe.near": ("0.8", 0.8, ()),
    "data.filters.languages": ("[en, de]", ["en", "de"], ()),
    "data.filters.language_confidence": ("1", 1.0, ()),
    "data.filters.refusals": ("drop", "drop", ()),
    "data.filters.repeated_answers": ("keep", "keep", ()),
    "data.filters.min_answers": ("2", 2, ()),
    "data.filters.last_answer_only": ("true", True, ()),
    "data.leading_answers": ("train", "train", ()),
    "data.reasoning": ("keep", "keep", ()),
    "data.tool_calls": ("train", "train", ()),
    "data.media": ("text", "text", ()),
    "data.verify": ("false", False, ()),
    "data.eval_fraction": ("0.5", 0.5, ()),
    "data.eval_sources": (
        "[{name: asked, path: asked.json}]",
        [to_json(EvalSourceSection(name="asked", path="asked.json"))],
        (),
    ),
    "template": ("chatml", "chatml", ()),
    "pieces": (
        "{header: ['{role}'], end: e}",
        {
            "bos": "",
            "header": ["{role}"],
            "system_header": None,
            "end": "e",
            "after_end": [],
            "special": [],
            "add": [],
            "roles": {},
            "inference_condition": "",
        },
        ("template=pieces",),
    ),
    "condition_in": ("system", "system", ()),
    "tokenizer": ("elsewhere", "elsewhere", ()),
    "model.base": ("some/model", "some/model", (NO_CONFIG,)),
    "model.config.model_type": ("mistral", "mistral", ()),
    "model.config.hidden_size": ("64", 64, ()),
    "model.config.intermediate_size": ("128", 128, ()),
    "model.config.num_hidden_layers": ("2", 2, ()),
    "model.config.num_attention_heads": ("4", 4, ()),
    "model.config.num_key_value_heads": ("1", 1, ()),
    "model.config.max_position_embeddings": ("1024", 1024, ()),
    "model.config.tie_word_embeddings": ("false", False, ()),
    "model.dtype": ("bfloat16", "bfloat16", ("zero.stage=1",)),
    "model.attention": ("sdpa", "sdpa", ()),
    "model.checkpointing": ("every_12", "every_12", ()),
    "model.mlp_tiles": ("4", 4, ()),
    "model.kernels": ("none", "none", ()),
    "model.compile": ("true", True, ()),
    "model.router_aux_loss_coef": ("0.01", 0.01, ()),
    "model.lora": (
        "{rank: 8}",
        {
            "rank": 8,
            "alpha": 32.0,
            "targets": "all-linear",
            "train_template_tokens": True,
            "base_bits": None,
            "dora": False,
            "rslora": False,
        },
        (NO_CONFIG, "model.base=some/model"),
    ),
    "packing.tokens_per_gpu": ("1024", 1024, ()),
    "packing.grad_accum": ("4", 4, ()),
    "packing.sequence_parallel": ("2", 2, ()),
    "optim.algorithm": ("adamw_8bit", "adamw_8bit", ()),
    "optim.lr": ("auto", "auto", ()),
    "optim.betas": ("[0.8, 0.99]", [0.8, 0.99], ()),
    "optim.eps": ("1e-8", 1e-8, ()),
    "optim.weight_decay": ("0", 0.0, ()),
    "optim.decay_vectors": ("true", True, ()),
    "optim.warmup": ("0.1", 0.1, ()),
    "optim.min_lr": ("0", 0.0, ()),
    "optim.grad_clip": ("null", None, ()),
    "zero.stage": ("3", 3, ()),
    "zero.offload": ("optimizer", "optimizer", ("zero.stage=2",)),
    "deepspeed": ("{wall_clock_breakdown: true}", {"wall_clock_breakdown": True}, ()),
    "train.epochs": ("7", 7, ()),
    "train.loss": ("answer", "answer", ()),
    "train.max_steps": ("11", 11, ()),
    "train.seed": ("13", 13, ()),
    "train.max_skipped": ("1", 1, ()),
    "train.early_stop": ("{epochs: 2}", {"epochs": 2}, ()),
    "train.stall_timeout_s": ("60", 60.0, ()),
    "eval.every_steps": ("50", 50, ()),
    "eval.checks": ("[{name: a, questions: b, check: math, num: 3}]", [CHECK], ()),
    "checkpoint.dir": ("elsewhere", "elsewhere", ()),
    "checkpoint.every_epochs": ("null", None, ()),
    "checkpoint.every_steps": ("100", 100, ()),
    "checkpoint.keep": ("5", 5, ()),
    "checkpoint.models.every_epochs": ("1", 1, ()),
    "checkpoint.models.every_steps": ("100", 100, ()),
    "checkpoint.models.keep": ("3", 3, ()),
    "checkpoint.best": ("loss", "loss", ()),
    "checkpoint.export": ("best", "best", ("checkpoint.best=loss",)),
    "checkpoint.resume": ("never", "never", ()),
    "log.wandb": ("{project: chat}", {"project": "chat", "entity": None, "mode": "online"}, ()),
    "log.tensorboard": ("true", True, ()),
    "log.profile": ("true", True, ()),
    "log.question": ("Who?", "Who?", ()),
}


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list of plain values is one leaf."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for position, item in enumerate(tree):
            yield from leaves(item, f"{prefix}.{position}")
    else:
        yield prefix, tree


def value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def refusal(*overrides: str, path: Path = QUICKSTART) -> str:
    """The message with which the recipe is refused."""
    with pytest.raises(ValueError) as error:
        load_recipe(path, overrides)
    assert not isinstance(error.value, ValidationError)
    return str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_recipe_loads_and_survives_json(path: Path) -> None:
    recipe = load_recipe(path)
    assert Recipe.model_validate_json(orjson.dumps(to_json(recipe))) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_committed_recipe_reads_files_of_the_repository_or_dumps_of_the_user(path: Path) -> None:
    recipe = load_recipe(path)
    for name in (*(name for source in recipe.data.sources for name in source.paths), recipe.tokenizer or "data"):
        assert name.startswith("dumps/") or (name.startswith("data") and (ROOT / name).exists())


def test_the_published_run_is_written_down_as_published() -> None:
    recipe = load_recipe(ROOT / "recipes/openchat_v3.2_super_13b.yaml")
    assert [(source.condition, source.weight) for source in recipe.data.sources] == [("GPT4", 1.0), ("GPT3", 0.1)]
    assert (recipe.data.max_tokens, recipe.packing.tokens_per_gpu, recipe.train.epochs) == (4096, 8 * 4096, 5)
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == ((0.9, 0.95), 1e-5, 0.1)
    assert (recipe.optim.warmup, recipe.optim.min_lr, recipe.optim.grad_clip) == (0.05, 0.1, 1.0)


def test_the_table_of_changes_has_every_leaf_of_the_quickstart() -> None:
    resolved = dict(leaves(to_json(load_recipe(QUICKSTART))))
    resolved.pop("model.config", None)
    assert set(CHANGES) == set(resolved)
    assert not [key for key, (_, value, _) in CHANGES.items() if resolved[key] == value]


@pytest.mark.parametrize("key", CHANGES)
def test_an_override_reaches_its_leaf_and_no_other(key: str) -> None:
    text, expected, others = CHANGES[key]
    old, new = to_json(load_recipe(QUICKSTART)), to_json(load_recipe(QUICKSTART, [f"{key}={text}", *others]))
    found = value_at(new, key)
    assert (found, type(found)) == (expected, type(expected))
    touched = {key, *(other.partition("=")[0] for other in others)}
    changed = [line.partition(":")[0] for line in differences(old, new)]
    assert changed
    assert [leaf for leaf in changed if not any(f"{leaf}.".startswith(f"{name}.") for name in touched)] == []


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1e-5", "1.e-5", "1.0e-5", "0.00001", ".1e-4"])
def test_1e_5_is_a_float(text: str, tmp_path: Path) -> None:
    assert load_recipe(QUICKSTART, [f"optim.lr={text}"]).optim.lr == 1e-5
    path = tmp_path / "recipe.yaml"
    path.write_text(QUICKSTART.read_text().replace("lr: 3.0e-3", f"lr: {text}"))
    assert load_recipe(path).optim.lr == 1e-5


def test_an_override_makes_sections_that_the_file_leaves_out() -> None:
    recipe = load_recipe(QUICKSTART, ["log.wandb.project=chat", "deepspeed.activation.level=2", "optim.min_lr=0.5"])
    assert recipe.log.wandb is not None and recipe.log.wandb.project == "chat"
    assert recipe.deepspeed == {"activation": {"level": 2}}
    assert (recipe.optim.min_lr, recipe.optim.lr) == (0.5, 3e-3)


def test_an_override_may_replace_one_item_of_a_list() -> None:
    overrides = ["data.sources.1={name: b, path: [b.json, c.json]}", "data.sources.1.path.0=d.json"]
    careful, replaced = load_recipe(QUICKSTART, overrides).data.sources
    assert (careful.name, careful.weight) == ("careful", 1.0)
    assert (replaced.name, replaced.paths, replaced.weight) == ("b", ("d.json", "c.json"), 1.0)


def test_the_last_override_of_a_key_wins() -> None:
    assert load_recipe(QUICKSTART, ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


@pytest.mark.parametrize(
    ("override", "value", "nearest"),
    [
        ("nam=x", "'x'", "name"),
        ("epochs=3", "3", "train.epochs"),
        ("data.max_token=512", "512", "data.max_tokens"),
        ("data.sources.0.wieght=0.5", "0.5", "data.sources.N.weight"),
        ("data.dedupe.nere=0.8", "0.8", "data.dedupe.near"),
        ("data.refusals=drop", "'drop'", "data.filters.refusals"),
        ("model.bas=x", "'x'", "model.base"),
        ("packing.tokens_per_gp=512", "512", "packing.tokens_per_gpu"),
        ("optim.wieght_decay=0.1", "0.1", "optim.weight_decay"),
        ("optim.grad_accum=2", "2", "packing.grad_accum"),
        ("zero.stag=2", "2", "zero.stage"),
        ("train.epoch=2", "2", "train.epochs"),
        ("checkpoint.every_step=[1, 2]", "[1, 2]", "checkpoint.every_steps"),
        ("log.wandB=null", "None", "log.wandb"),
        ("log.wandb.projct=x", "'x'", "log.wandb.project"),
    ],
)
def test_an_unknown_key_is_refused_with_all_of_it(override: str, value: str, nearest: str) -> None:
    key = override.partition("=")[0]
    expected = f"{key}: unknown key (value {value}); the nearest known key is {nearest}"
    assert expected in [line.strip() for line in refusal(override).splitlines()]


def test_an_unknown_key_in_the_file_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(QUICKSTART.read_text() + "checkpoints: 3\n")
    message = refusal(path=path)
    assert str(path) in message
    assert "checkpoints: unknown key (value 3); the nearest known key is checkpoint" in message


def test_every_mistake_is_named_at_once() -> None:
    message = refusal("train.epochs=two", "optim.foo=1", "zero.stage=4")
    assert "3 mistake(s)" in message
    for key in ("train.epochs", "optim.foo", "zero.stage"):
        assert f"\n  {key}: " in message


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("train.epochs=two", "'two'"),
        ("train.epochs=true", "True"),
        ("train.epochs='3'", "'3'"),
        ("train.epochs=2.5", "2.5"),
        ("train.epochs=null", "None"),
        ("train.epochs=0", "0"),
        ("train.max_steps=true", "True"),
        ("zero.stage=true", "True"),
        ("zero.stage='2'", "'2'"),
        ("zero.stage=4", "4"),
        ("zero.stage=-1", "-1"),
        ("data.max_tokens=7", "7"),
        ("data.eval_fraction=1.0", "1.0"),
        ("data.sources.0.weight=true", "True"),
        ("data.sources.1.weight='0.1'", "'0.1'"),
        ("data.sources.1.weight=-0.1", "-0.1"),
        ("data.sources.0.epochs=0", "0"),
        ("data.sources.0.name=3", "3"),
        ("data.sources.0.name=", "None"),
        ("data.sources.0.html=yes", "'yes'"),
        ("data.sources.0.path=3", "3"),
        ("data.sources.0.path=[]", "[]"),
        ("data.sources.0.where={a: {b: c}}", "{'b': 'c'}"),
        ("data.overlong=cut", "'cut'"),
        ("data.overlong_context=-1", "-1"),
        ("data.dedupe.exact=1", "1"),
        ("data.dedupe.near=0.4", "0.4"),
        ("data.dedupe.near=true", "True"),
        ("data.filters.languages=en", "'en'"),
        ("data.filters.languages=[]", "[]"),
        ("data.filters.language_confidence=0", "0"),
        ("data.filters.language_confidence=1.1", "1.1"),
        ("data.filters.refusals=false", "False"),
        ("data.filters.repeated_answers=remove", "'remove'"),
        ("data.filters.min_answers=0", "0"),
        ("name=true", "True"),
        ("template=openchat_v3.3", "'openchat_v3.3'"),
        ("model.dtype=float16", "'float16'"),
        ("model.checkpointing=every_1", "'every_1'"),
        ("model.checkpointing=some", "'some'"),
        ("optim.lr=fast", "'fast'"),
        ("optim.lr='0.1'", "'0.1'"),
        ("optim.lr=0", "0"),
        ("optim.betas=[0.9, 1.0]", "[0.9, 1.0]"),
        ("optim.betas=0.9", "0.9"),
        ("log=[1]", "[1]"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_key_and_value(override: str, shown: str) -> None:
    message = refusal(override)
    (line,) = message.splitlines()[1:]
    assert line.startswith(f"  {override.partition('=')[0]}")
    assert f"(value {shown})" in line


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["optim.grad_clip", "optim.lr", "data.sources.0.weight", "model.config.rms_norm_eps"])
def test_a_number_that_is_not_finite_is_refused_and_never_read_as_null(key: str, value: str) -> None:
    message = refusal(f"{key}={value}")
    assert key in message and "finite" in message


# A mistake, as overrides of the quickstart, and the one line that is said of it.
MISTAKES: dict[tuple[str, ...], str] = {
    ("data.sources.0.wieght=0.5",): "data.sources.0.wieght: unknown key (value 0.5); the nearest known key is "
    "data.sources.N.weight",
    ("data.sources.0={nmae: x, path: b}",): "data.sources.0.nmae: unknown key (value 'x'); the nearest known key is "
    "data.sources.N.name",
    ("data.sources.1.weight='0.1'",): "data.sources.1.weight: must be a number (value '0.1'); write it without quotes",
    ("data.sources=[a.json]",): "data.sources.0: must be a section with keys of its own, such as data.sources.N.name "
    "(value 'a.json')",
    ("data.sources=a.json",): "data.sources: must be a list (value 'a.json'); each item is a section",
    ("data.sources.0={path: x}",): "data.sources.0.name: missing; the recipe must give it",
    ("data.sources.0.path=null",): "data.sources.0.path: must be text or a list (value None); an empty value is null",
    ("data.sources.0.path=[a, 3]",): "data.sources.0.path.1: must be text (value 3); in quotes it is text",
    ("data.sources.0.where={a: [b, [c]]}",): "data.sources.0.where.a.1: must be text, a number or true or false (value "
    "['c'])",
    ("data.sources.0.where.lang=no",): "data.sources.0.where.lang: no without quotes may mean false or text; write "
    "false or 'no'",
    ("model.config.tie_word_embeddings=off",): "model.config.tie_word_embeddings: off without quotes may mean false or "
    "text; write false or 'off'",
    ("data.filters.languages=en",): "data.filters.languages: must be a list (value 'en'); a list of it is [en]",
    ("data.filters.languages=[true]",): "data.filters.languages.0: must be text (value True); in quotes it is text",
    ("train.epochs=010",): "train.epochs: must be a whole number (value '010')",
    ("train.epochs=1:30",): "train.epochs: must be a whole number (value '1:30')",
    ("train.epochs=99999999999999999999",): "train.epochs: 99999999999999999999 is beyond 64 bits",
    ("name=!!binary aGVsbG8=",): "name: a value of YAML's type bytes means nothing here; write text or a number",
    ("optim.lr=fast",): "optim.lr: must be a number or 'auto' (value 'fast')",
    ("optim.lr=-1",): "optim.lr: must be above 0 or 'auto' (value -1)",
    ("optim.lr=.nan",): "optim.lr: nan is not a finite number",
    ("optim.betas=[0.9]",): "optim.betas: must be a longer list (value [0.9])",
    ("optim.foo=3", "packing.tokens_per_gpu=256"): "optim.foo: unknown key (value 3); the keys of optim are algorithm, "
    "lr, betas, eps, weight_decay, decay_vectors, warmup, min_lr, grad_clip",
    ("model.checkpointing=3",): "model.checkpointing: must be auto, full, none or every_N of N from 2, such as every_2 "
    "(value 3)",
    ("model.bse=x", NO_CONFIG): "model.bse: unknown key (value 'x'); the nearest known key is model.base",
    (NO_CONFIG,): "model: give either base (a pretrained model) or config (a model from scratch)",
    ("train=null",): "train: must be a section with keys of its own, such as train.epochs (value None); an empty value "
    "is null",
    ("log.wandb.projct=x",): "log.wandb.projct: unknown key (value 'x'); the nearest known key is log.wandb.project",
    ("deepspeed=ds.json",): "deepspeed: must be a mapping (value 'ds.json'); the settings themselves, not the path of "
    "their file; the stage is zero.stage",
    ("packing=true",): "packing: must be a section with keys of its own, such as packing.tokens_per_gpu (value True); "
    "sequences are always packed, without padding",
    ("x.y.z=3",): "x.y.z: unknown key (value 3); docs/keys.md lists every key",
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line(overrides: tuple[str, ...]) -> None:
    header, line = refusal(*overrides).splitlines()
    assert header == f"{QUICKSTART} has 1 mistake(s):"
    assert line == f"  {MISTAKES[overrides]}"


def test_a_misspelt_section_is_not_missing_as_well(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(QUICKSTART.read_text().replace("train: {", "trian: {"))
    (line,) = refusal(path=path).splitlines()[1:]
    assert line == "  trian: unknown key (value {'epochs': 20, 'seed': 0}); the nearest known key is train"


def test_missing_sections_are_named_by_what_they_must_hold(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n")
    missing = ["data.store", "data.sources", "template", "model", "packing.tokens_per_gpu", "train.epochs"]
    lines = [f"  {key}: missing; the recipe must give it" for key in (*missing, "checkpoint.dir")]
    assert refusal(path=path).splitlines()[1:] == lines


# ---- Keys of other frameworks ----


def test_a_hint_names_a_key_that_there_is_and_no_foreign_name_has_two() -> None:
    known = set(known_keys())
    assert {ours for _, ours, _ in FOREIGN_KEYS if ours is not None} <= known
    names = [name for foreign, _, _ in FOREIGN_KEYS for name in foreign.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("place", ["", "training_args.", "optim.", "data.sources.0."])
def test_a_foreign_key_is_hinted_at_wherever_it_stands(place: str) -> None:
    hints = {name: ours for names, ours, _ in FOREIGN_KEYS for name in names.split() if name not in Recipe.model_fields}
    lines = dict(
        line.strip().split(": ", 1) for line in refusal(*(f"{place}{name}=1" for name in hints)).splitlines()[1:]
    )
    assert len(lines) == len(hints)
    called_so = {key.rpartition(".")[2] for key in known_keys()}
    for name, ours in hints.items():
        hint = "the nearest known key is" if name in called_so else "here it is"
        expected = "there is nothing like it here: " if ours is None else f"{hint} {ours}"
        assert lines[f"{place}{name}"].startswith(f"unknown key (value 1); {expected}"), name


def test_a_recipe_of_another_framework_gets_a_line_for_each_key(tmp_path: Path) -> None:
    path = tmp_path / "axolotl.yml"
    path.write_text(
        "base_model: a/b\nload_in_4bit: true\nadapter: qlora\nsequence_len: 4096\nmicro_batch_size: 2\n"
        "datasets:\n  - path: x.json\n    type: chat_template\nnum_epochs: 4\noutput_dir: out\nlearning_rate: 0.0002\n"
    )
    lines = [line.strip() for line in refusal(path=path).splitlines()[1:]]
    assert [line.partition(":")[0] for line in lines] == [
        *("base_model", "load_in_4bit", "adapter", "sequence_len", "micro_batch_size", "datasets", "num_epochs"),
        *("output_dir", "learning_rate", "name", "data.store", "template"),
    ]
    assert lines[4] == (
        "micro_batch_size: unknown key (value 2); here it is packing.tokens_per_gpu, it counts tokens, not sequences: "
        "2 sequences are 2 x data.max_tokens"
    )


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(QUICKSTART.read_text().replace("checkpoint: {dir: runs/quickstart, ", "checkpoint: {"))
    assert "checkpoint.dir: missing" in refusal(path=path)


@pytest.mark.parametrize(
    ("addition", "line", "key"),
    [("name: again\n", 1, "name"), ("extra: {a: {b: 1, c: 2, b: 3}}\n", 1, "b"), ("extra:\n  x: 1\n  x: 1\n", 3, "x")],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, addition: str, line: int, key: str) -> None:
    text = QUICKSTART.read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(text + addition)
    assert f"line {text.count(chr(10)) + line}: the key {key!r} stands twice" in refusal(path=path)
    with pytest.raises(ValueError, match="'stage' stands twice"):
        load_recipe(QUICKSTART, ["zero={stage: 1, stage: 2}"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["packing.tokens_per_gpu=511"], ["data.max_tokens 512", "packing.tokens_per_gpu 511"]),
        (
            ["packing.tokens_per_gpu=255", "packing.sequence_parallel=2"],
            ["data.max_tokens 512", "packing.tokens_per_gpu 255 x packing.sequence_parallel 2"],
        ),
        (["model.base=some/model"], ["model: ", "base", "config", "not both"]),
        ([NO_CONFIG], ["model: ", "either base", "or config"]),
        (["tokenizer=null"], ["model.config", "name one in tokenizer"]),
        (["model.config={hidden_size: 64}"], ["model: ", "config needs model_type"]),
        (["data.sources.0.weight=0", "data.sources.1.weight=0.0"], ["every source has weight 0"]),
        (["data.sources.1.name=careful"], ["two sources are named 'careful'"]),
        (["data.sources=[]"], ["data.sources: must not be empty"]),
        (["model.lora.rank=8"], ["model: lora trains beside a base", "give base"]),
        ([NO_CONFIG, "model.base=some/model", "model.lora={}", "optim.lr=auto"], ["optim.lr auto", "optim.lr=2e-4"]),
        (["model.compile=true", "zero.stage=3"], ["model.compile cannot be used with zero.stage 3", "zero.stage 2"]),
        (["zero.stage=0", "zero.offload=optimizer"], ["zero: ", "offload", "stage 1, 2 or 3"]),
        (
            ["optim.algorithm=adamw_8bit", "zero.stage=2", "zero.offload=optimizer"],
            ["optim.algorithm adamw_8bit", "use adamw, or zero.offload: none"],
        ),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], words: list[str]) -> None:
    message = refusal(*overrides)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("position", ["2", "-1", "x"])
def test_a_list_position_out_of_range_is_refused(position: str) -> None:
    message = refusal(f"data.sources.{position}.weight=1.0")
    assert f"in the list data.sources {position!r} must be a number from 0 to 1" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("", "not of the form key=value"),
        ("optim..lr=3", "not of the form key=value"),
        ("optim.lr=[1, 2", "the value is not YAML"),
        ("optim.lr.peak=3", "lr is the value 0.003, it has no keys of its own"),
        ("name.first=x", "name is the value 'quickstart', it has no keys of its own"),
    ],
)
def test_a_malformed_override_is_refused(override: str, words: str) -> None:
    message = refusal(override)
    assert repr(override) in message and words in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert f"no recipe at {tmp_path / 'none.yaml'}" == refusal(path=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "it is empty; its top level must be keys, such as name: and data:"),
        (b"# only a comment\n", "it is empty; its top level must be keys, such as name: and data:"),
        (b"- a\n- b\n", "it is a list; its top level must be keys, such as name: and data:"),
        (b"just text\n", "it is one value; its top level must be keys, such as name: and data:"),
        (b"name: x\n---\nname: y\n", "a recipe is one document: remove the line ---"),
        (b"data:\n\tstore: x\n", "line 2, column 1: while scanning for the next token, found character '\\t' that "),
        (b"data:\n\tstore: x\n", "; indent with spaces, not with tabs"),
        (b"name: my: run\nx: 1\n", "line 1, column 9: mapping values are not allowed here; put a text that holds"),
        (b"data: {a: [b\nc: d\n", "; close the brackets before it, or quote the text"),
        (b"data:\n  a: 1\n   b: 2\n", "line 3, column 5: mapping values are not allowed here"),
        (b"name: @x\n", "line 1, column 7: while scanning for the next token, found character '@'"),
        (b"name: caf\xe9\n", "line 1 is not UTF-8; save it as UTF-8 text"),
        (b"name: x\n3: y\n", "line 2: the key 3 is not text; quote it, or correct it"),
        (b"name: x\ntrue: y\n", "line 2: the key True is not text; quote it, or correct it"),
        (b"name: x\n? [a, b]\n: y\n", "line 2: the key ['a', 'b'] is not text; quote it, or correct it"),
        (b"name: !!python/object:os.system x\nx: y\n", "could not determine a constructor for the tag"),
        (b"deepspeed: " + b"{a: " * 2000 + b"1" + b"}" * 2000, "it is nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    message = refusal(path=path)
    assert message.startswith(f"{path} is not a recipe: ") and "\n" not in message
    assert words in message


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert refusal(path=tmp_path) == f"{tmp_path} is not a recipe: it cannot be read (Is a directory); name a YAML file"


# ---- YAML's traps ----


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=2024-01-01", "2024-01-01"),
        ("name=2001-12-14 21:59:43", "2001-12-14 21:59:43"),
        ("name=yes", "yes"),
        ("name=1:30", "1:30"),
        ("data.sources.0.where.model=007", "007"),
        ("data.sources.0.where.model=2024-01-01", "2024-01-01"),
        ("data.filters.languages=[en, no]", ["en", "no"]),
        ("log.tensorboard=on", True),
        ("model.compile=No", False),
        ("data.max_tokens=1_00", 100),
        ("train.seed=+0", 0),
    ],
)
def test_a_value_arrives_as_it_was_written(override: str, value: Any) -> None:
    key = override.partition("=")[0]
    assert value_at(to_json(load_recipe(QUICKSTART, [override])), key) == value


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    first = (
        "- &first {name: careful, path: data/quickstart.json, where: {model: careful}, condition: Careful, weight: 1.0}"
    )
    text = QUICKSTART.read_text().replace(first.replace("&first ", ""), first)
    path.write_text(text.replace("  max_tokens", "    - {<<: *first, name: third}\n  max_tokens"))
    careful, _, third = load_recipe(path).data.sources
    assert (third.name, third.where) == ("third", careful.where)


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe(QUICKSTART)
    for section, name in ((recipe, "name"), (recipe.optim, "lr"), (recipe.data.sources[0], "weight")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1.0)


def test_the_templates_of_recipes_are_the_templates_there_are() -> None:
    assert set(typing.get_args(Recipe.model_fields["template"].annotation)) == {*TEMPLATES, "base", "pieces"}


def test_differences_are_one_line_a_leaf() -> None:
    old = to_json(load_recipe(QUICKSTART))
    new = to_json(load_recipe(QUICKSTART, ["train.epochs=3", "data.sources.1.weight=0.1", "deepspeed.a=1"]))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "data.sources.1.weight: 0.3 -> 0.1",
        "deepspeed: {} -> None",
        "deepspeed.a: None -> 1",
        "train.epochs: 20 -> 3",
    ]


def test_the_schema_names_every_section_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--schema"])
    schema = orjson.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    definitions = schema["$defs"]
    for key in known_keys():
        section = schema
        for part in (part for part in key.split(".") if part != "N"):
            section = section["properties"][part]
            references = [name for name in definitions if f'"#/$defs/{name}"'.encode() in orjson.dumps(section)]
            section = definitions[references[0]] if references else section
        assert section


def test_the_resolved_recipe_is_printed_as_yaml_that_loads_to_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(QUICKSTART), "train.epochs=3"])
    path = tmp_path / "resolved.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == load_recipe(QUICKSTART, ["train.epochs=3"])


@pytest.mark.parametrize(
    ("override", "printed"),
    [
        ("checkpoint.dir=runs/x", "runs/x"),
        ("checkpoint.dir='yes'", "yes"),
        ("checkpoint.dir='12'", "12"),
        (f"checkpoint.dir='{LONG_NAME}'", LONG_NAME),
        ("optim.lr=2.5e-1", "0.25"),
        ("optim.grad_clip=null", "null"),
        ("model.config.tie_word_embeddings=true", "true"),
        ("train.epochs=3", "3"),
    ],
)
def test_one_value_is_printed_as_a_shell_can_use_it(
    override: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(QUICKSTART), override, "--key", override.partition("=")[0]])
    assert capsys.readouterr().out == f"{printed}\n"


def test_a_key_that_has_no_single_value_is_refused() -> None:
    for key in ("optim.lrr", "optim"):
        with pytest.raises(SystemExit, match=rf"error: --key {key}: no key of this recipe with a single value"):
            main([str(QUICKSTART), "--key", key])


def test_options_may_stand_between_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(QUICKSTART), "train.epochs=3", "--key", "train.epochs", "train.seed=1"])
    assert capsys.readouterr().out == "3\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: RECIPE\n"),
        (
            [str(QUICKSTART), "--optim.lr=1"],
            "--optim.lr=1 is no option; a key of the recipe has no dashes, as in optim.lr",
        ),
        ([str(QUICKSTART), "--optim.lr", "1"], "--optim.lr is no option; a key of the recipe has no dashes"),
    ],
)
def test_arguments_that_are_wrong_are_said_to_be_so(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_the_command_prints_one_value_or_fails_in_one_line() -> None:
    command = [sys.executable, "-m", "ochat_train.recipe", str(QUICKSTART)]
    arguments = ["checkpoint.dir=runs/x y", "--key", "checkpoint.dir"]
    good = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert (good.returncode, good.stdout, good.stderr) == (0, "runs/x y\n", "")
    bad = subprocess.run([*command, "train.epoch=3"], capture_output=True, text=True, cwd=ROOT)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    assert "train.epoch: unknown key (value 3); the nearest known key is train.epochs" in bad.stderr


@pytest.mark.parametrize("words", ["recipe quickstart", "preprocess --fields data/quickstart.json"])
def test_a_command_whose_reader_has_gone_ends_without_a_word(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ochat_train.cli", *words.split()], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
