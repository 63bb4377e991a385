"""A run goes on when what it reads lies elsewhere, or is no longer needed; what is not the same is refused."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ochat_train.export import export
from ochat_train.training.checkpoint import read_checkpoint
from tests.e2e.harness import (
    ROOT,
    preprocess,
    start_ranks,
    tiny_recipe,
    train,
    train_several,
    weights,
    write_dump,
)

LORA = "model.lora={rank: 2, alpha: 4.0}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe, dumps, base, tokenizer and store, and after two steps the runs `run` and `lora`."""
    home = tmp_path_factory.mktemp("moved") / "home"
    write_dump(home / "dumps", 60)
    shutil.copytree(ROOT / "data/quickstart_tokenizer", home / "tokenizer")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocab_size = len(AutoTokenizer.from_pretrained(home / "tokenizer"))
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(home / "base")
    model = {"base": str(home / "base"), "dtype": "float32", "checkpointing": "none"}
    path = tiny_recipe(home, model=model, tokenizer=str(home / "tokenizer"))
    recipe = yaml.safe_load(path.read_text())
    for source in recipe["data"]["sources"]:
        source["path"] = str(home / "dumps/dump.json")
    path.write_text(yaml.safe_dump(recipe))
    preprocess(path)
    two = "train.max_steps=2"
    train_several(path, [two], [two, LORA, f"checkpoint.dir={home / 'lora'}"])
    return home


@pytest.fixture
def new(home: Path, tmp_path: Path) -> Iterator[Path]:
    """Where everything lies now, each under a new name; nothing is left at the old places."""
    new, hidden = tmp_path / "new", home.with_name("hidden")
    shutil.copytree(home, new)
    for path in new.iterdir():
        path.rename(path.with_name(f"new_{path.name}"))
    home.rename(hidden)
    yield new
    hidden.rename(home)


def places(new: Path, run: str = "run") -> list[str]:
    """The overrides that name the new places, but for the dumps'."""
    keys = {"data.store": "store", "tokenizer": "tokenizer", "model.base": "base", "checkpoint.dir": run}
    return [f"{key}={new / f'new_{name}'}" for key, name in keys.items()]


def dumps(path: Path) -> list[str]:
    return [f"data.sources.{number}.path={path}" for number in (0, 1)]


def test_a_run_goes_on_bitwise_with_all_moved_and_the_dumps_gone(home: Path, new: Path) -> None:
    shutil.rmtree(new / "new_dumps")
    (new / "link").symlink_to(new / "new_base")
    overrides = [*places(new), f"model.base={os.path.relpath(new / 'link', ROOT)}", "train.max_steps=3"]
    printed = train(new / "new_recipe.yaml", *overrides)
    for key, name, now in (
        ("model.base", "base", overrides[-2][11:]),
        ("tokenizer", "tokenizer", new / "new_tokenizer"),
    ):
        assert printed.count(f"moved, and compared by what it holds: {key}: {home / name} -> {now}\n") == 1
    assert "data.sources" not in printed and f"continuing {new}/new_run/step-00000002 at step 2" in printed
    home.with_name("hidden").rename(home)
    train(home / "recipe.yaml", "train.max_steps=3")
    ours, theirs = weights(new / "new_run"), weights(home / "run")
    home.rename(home.with_name("hidden"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_there_instead_of_the_old_is_refused(new: Path) -> None:
    def refusal(*overrides: str) -> str:
        ended = start_ranks("ochat_train.train", str(new / "new_recipe.yaml"), *overrides, folders=[ROOT] * 2).end()
        assert [code for code, _ in ended] == [1, 1], ended
        return ended[0][1]

    moved = dumps(new / "new_dumps/dump.json")
    other = orjson.loads((new / "new_dumps/dump.json").read_bytes())[1:]
    (new / "other").mkdir()
    (new / "other/dump.json").write_bytes(orjson.dumps(other))
    told = refusal(*places(new), *dumps(new / "other/dump.json"))
    assert "was made from other paths (was -> is):" in told and "The files there hold something else. Go back" in told
    assert "no file matches" in refusal(*places(new), *dumps(new / "nowhere.json"))
    file = new / "new_base/model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 5] += 1
    save_file(tensors, file, {"format": "pt"})
    for run, options in (("run", []), ("lora", [LORA])):
        told = refusal(*places(new, run), *moved, *options)
        assert f"model.base {new / 'new_base'} holds other weights, or another configuration, than" in told


def test_adapters_go_on_beside_a_moved_base_and_older_ones_are_exported_with_it(
    home: Path, new: Path, tmp_path: Path
) -> None:
    old = new / "new_lora/step-00000002"
    with pytest.raises(ValueError, match=rf"no folder {home / 'base'}; .* name its place with --base"):
        export(old, tmp_path / "model")
    export(old, tmp_path / "model", base=str(new / "new_base"))
    before = load_file(new / "new_lora/model/model.safetensors")
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in load_file(tmp_path / "model/model.safetensors").items()
    )
    export(old, tmp_path / "adapter", adapter=True, base=str(new / "new_base"))
    config = orjson.loads((tmp_path / "adapter/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(new / "new_base")
    moved = dumps(new / "new_dumps/dump.json")
    printed = train(new / "new_recipe.yaml", *places(new, "lora"), *moved, LORA, "train.max_steps=3")
    assert f"data.sources.0.path: {home / 'dumps/dump.json'} -> {new / 'new_dumps/dump.json'}\n" in printed
    newest = read_checkpoint(new / "new_lora/step-00000003")
    assert newest.state.recipe["model"]["base"] == str(new / "new_base")
    assert (new / "new_lora/model/model.safetensors").stat().st_mtime > old.stat().st_mtime
