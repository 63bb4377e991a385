"""A recipe arrives as it is written, or is refused with the key, the value and what would have been right."""

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
from ochat_train.recipe import Recipe, differences, known_keys, load_recipe, main, to_json

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/quickstart.yaml"
NO_CONFIG = "model.config=null"
LONG_NAME = "a folder: #1 " * 12 + "end"

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
    "data.sources.0.fields.system": ("sys", "sys", ()),
    "data.sources.0.roles": ("{agent: assistant}", {"agent": "assistant"}, ()),
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
    "data.sources.1.fields.system": ("sys", "sys", ()),
    "data.sources.1.roles": ("{agent: assistant}", {"agent": "assistant"}, ()),
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
    "data.leading_answers": ("train", "train", ()),
    "data.reasoning": ("keep", "keep", ()),
    "data.tool_calls": ("train", "train", ()),
    "data.media": ("text", "text", ()),
    "data.eval_fraction": ("0.5", 0.5, ()),
    "template": ("chatml", "chatml", ()),
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
    "model.dtype": ("bfloat16", "bfloat16", ()),
    "model.attention": ("sdpa", "sdpa", ()),
    "model.checkpointing": ("every_12", "every_12", ()),
    "model.kernels": ("none", "none", ()),
    "model.compile": ("true", True, ()),
    "model.lora": (
        "{rank: 8}",
        {"rank": 8, "alpha": 32.0, "targets": "all-linear"},
        (NO_CONFIG, "model.base=some/model"),
    ),
    "packing.tokens_per_gpu": ("1024", 1024, ()),
    "packing.grad_accum": ("4", 4, ()),
    "optim.algorithm": ("adamw_8bit", "adamw_8bit", ()),
    "optim.lr": ("auto", "auto", ()),
    "optim.betas": ("[0.8, 0.99]", [0.8, 0.99], ()),
    "optim.eps": ("1e-8", 1e-8, ()),
    "optim.weight_decay": ("0", 0.0, ()),
    "optim.warmup": ("0.1", 0.1, ()),
    "optim.min_lr": ("0", 0.0, ()),
    "optim.grad_clip": ("null", None, ()),
    "zero.stage": ("3", 3, ()),
    "zero.offload": ("optimizer", "optimizer", ()),
    "deepspeed": ("{wall_clock_breakdown: true}", {"wall_clock_breakdown": True}, ()),
    "train.epochs": ("7", 7, ()),
    "train.max_steps": ("11", 11, ()),
    "train.seed": ("13", 13, ()),
    "train.max_skipped": ("1", 1, ()),
    "train.stall_timeout_s": ("60", 60.0, ()),
    "eval.every_steps": ("50", 50, ()),
    "checkpoint.dir": ("elsewhere", "elsewhere", ()),
    "checkpoint.every_epochs": ("null", None, ()),
    "checkpoint.every_steps": ("100", 100, ()),
    "checkpoint.keep": ("5", 5, ()),
    "checkpoint.models.every_epochs": ("1", 1, ()),
    "checkpoint.models.every_steps": ("100", 100, ()),
    "checkpoint.models.keep": ("3", 3, ()),
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
        ("data.sources.0.html=yes", "True"),
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
        ("name=yes", "True"),
        ("template=openchat_v3.3", "'openchat_v3.3'"),
        ("model.dtype=float16", "'float16'"),
        ("model.checkpointing=every_1", "'every_1'"),
        ("model.checkpointing=some", "'some'"),
        ("optim.lr=fast", "'fast'"),
        ("optim.lr='0.1'", "'0.1'"),
        ("optim.lr=0", "0"),
        ("optim.betas=[0.9, 1.0]", "[0.9, 1.0]"),
        ("optim.betas=0.9", "0.9"),
        ("log.wandb.mode=on", "True"),
        ("log=[1]", "[1]"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_key_and_value(override: str, shown: str) -> None:
    message = refusal(override)
    assert f"\n  {override.partition('=')[0]}: " in message
    assert f"(value {shown})" in message


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["optim.grad_clip", "optim.lr", "data.sources.0.weight", "model.config.rms_norm_eps"])
def test_a_number_that_is_not_finite_is_refused_and_never_read_as_null(key: str, value: str) -> None:
    message = refusal(f"{key}={value}")
    assert key in message and "finite" in message


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
        (["model.base=some/model"], ["model: ", "base", "config", "not both"]),
        ([NO_CONFIG], ["model: ", "either base", "or config"]),
        (["tokenizer=null"], ["model.config", "name one in tokenizer"]),
        (["model.config={hidden_size: 64}"], ["model: ", "config needs model_type"]),
        (["data.sources.0.weight=0", "data.sources.1.weight=0.0"], ["every source has weight 0"]),
        (["data.sources.1.name=careful"], ["two sources are named 'careful'"]),
        (["data.sources=[]"], ["data.sources", "at least 1"]),
        (["model.lora.rank=8"], ["model: lora trains beside a base", "give base"]),
        ([NO_CONFIG, "model.base=some/model", "model.lora={}", "optim.lr=auto"], ["optim.lr auto", "optim.lr=2e-4"]),
        (["model.compile=true", "zero.stage=3"], ["model.compile cannot be used with zero.stage 3", "zero.stage 2"]),
        (["zero.stage=0", "zero.offload=optimizer"], ["zero: ", "offload", "stage 1, 2 or 3"]),
        (
            ["optim.algorithm=adamw_8bit", "zero.offload=optimizer"],
            ["optim.algorithm adamw_8bit", "use adamw, or zero.offload: none"],
        ),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], words: list[str]) -> None:
    message = refusal(*overrides)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("position", ["2", "-1", "x"])
def test_a_list_position_out_of_range_is_refused(position: str) -> None:
    assert f"{position!r} must be a number from 0 to 1" in refusal(f"data.sources.{position}.weight=1.0")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("", "not of the form key=value"),
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


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n", "name: [a\n", "name: !!python/object:os.system x\n"])
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert f"{path} is not a recipe" in refusal(path=path)


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe(QUICKSTART)
    for section, name in ((recipe, "name"), (recipe.optim, "lr"), (recipe.data.sources[0], "weight")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1.0)


def test_the_templates_of_recipes_are_the_templates_there_are() -> None:
    assert set(typing.get_args(Recipe.model_fields["template"].annotation)) == set(TEMPLATES)


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
        with pytest.raises(SystemExit, match=rf"error: {key} is no key with a single value"):
            main([str(QUICKSTART), "--key", key])


def test_the_command_prints_one_value_or_fails_in_one_line() -> None:
    command = [sys.executable, "-m", "ochat_train.recipe", str(QUICKSTART)]
    arguments = ["checkpoint.dir=runs/x y", "--key", "checkpoint.dir"]
    good = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert (good.returncode, good.stdout, good.stderr) == (0, "runs/x y\n", "")
    bad = subprocess.run([*command, "train.epoch=3"], capture_output=True, text=True, cwd=ROOT)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    assert "train.epoch: unknown key (value 3); the nearest known key is train.epochs" in bad.stderr
