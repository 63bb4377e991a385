"""`ochat init` writes a recipe that preprocesses the dumps and that the doctor lets pass."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import ochat_train.doctor.__main__ as doctor
import ochat_train.init.__main__ as init
import ochat_train.preprocess.__main__ as preprocess
from ochat_train.init.draft import Machine, draft, read_base, read_machine
from ochat_train.init.sources import divide, find_good
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.training.resources import AvailableMemory
from tests.dumps import chat, write_lines
from tests.small_tokenizers import write_base

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with weights, of the kind of Llama 2."""
    folder = tmp_path_factory.mktemp("init") / "base"
    config = LlamaConfig(
        vocab_size=1100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in (ROOT / "data/quickstart_tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_signal_handlers: None) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASTER_PORT", raising=False)  # a process group of an earlier test in this process set it
    yield


def make(dump: Path, base: Path, *flags: str) -> Recipe:
    init.main(["--data", str(dump), "--base", str(base), "--gpus", "cpu", *flags])
    return load_recipe("recipe.yaml")


def sources(recipe: Recipe) -> list[tuple[Any, ...]]:
    return [(one.name, one.condition, one.weight, one.where, one.where_not) for one in recipe.data.sources]


def test_what_it_writes_for_mixed_models_passes_the_doctor_and_is_preprocessed(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["Model: GPT-4", "Model: Default (GPT-3.5)", "other: no"]
    dump = write_lines(
        tmp_path / "a.jsonl", *(chat(str(n), f"Hi {n}", "Hello", model=models[n % 3]) for n in range(30))
    )
    recipe = make(dump, base)
    where = {"model": ("Model: GPT-4",)}
    assert sources(recipe) == [("good", "Good", 1.0, where, {}), ("rest", "Other", 0.1, {}, where)]
    assert (recipe.template, recipe.data.max_tokens, recipe.model.dtype) == ("openchat_v3.2", 512, "float32")
    doctor.main(["--quick", "recipe.yaml"])
    preprocess.main(["--dry-run", "--workers", "1", "recipe.yaml"])
    said = capsys.readouterr().out
    assert "\nOK\n" in said and "WARNING" not in said
    assert [line.split()[:3] for line in said.splitlines() if line.startswith(("good", "rest"))] == [
        ["good", "10", "10"],
        ["rest", "20", "20"],
    ]


def test_pairs_are_divided_by_preference(tmp_path: Path, base: Path) -> None:
    pairs = ({"prompt": f"{n}?", "chosen": f"Yes, {n}", "rejected": f"no {n}"} for n in range(9))
    where = {"preference": ("chosen",)}
    expected = [("good", "Good", 1.0, where, {}), ("rest", "Other", 0.1, {}, where)]
    assert sources(make(write_lines(tmp_path / "a.jsonl", *pairs), base)) == expected


def test_values_that_say_nothing_get_a_source_each_and_a_word_about_the_weights(tmp_path: Path, base: Path) -> None:
    (tmp_path / "dump").mkdir()
    for number in range(2):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        rows = [{"messages": turns, "quality": name} for name in ("a", "no", "c d")]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"dump/{number}.parquet")
    found = sources(make(tmp_path / "dump", base))
    assert found == [
        ("a", "A", 1.0, {"quality": "a"}, {}),
        ("no", "No", 1.0, {"quality": "no"}, {}),
        ("c-d", "C-D", 1.0, {}, {"quality": ("a", "no")}),
    ]
    assert "lower the weight of the worse ones" in Path("recipe.yaml").read_text()
    Path("recipe.yaml").unlink()
    assert sources(make(tmp_path / "dump", base, "--by", "quality", "--good", "no", "c d"))[0][3] == {
        "quality": ("no", "c d")
    }


def test_records_that_need_names_of_fields_get_them(tmp_path: Path, base: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    recipe = make(write_lines(tmp_path / "a.jsonl", {"chat": turns}, {"chat": turns}), base)
    (source,) = recipe.data.sources
    assert (source.name, source.fields.turns) == ("everything", "chat")


def test_a_list_of_llama_factory_is_read_as_it_says(tmp_path: Path, base: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *({"ask": "Hi", "good": f"Hello {n}", "bad": "No"} for n in range(4)))
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    listed = {"pairs": {"file_name": "a.jsonl", "ranking": True, "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))
    recipe = make(Path(f"{tmp_path}:pairs"), base)
    assert [(one.name, one.where | one.where_not) for one in recipe.data.sources] == [
        ("good", {"preference": ("chosen",)}),
        ("rest", {"preference": ("chosen",)}),
    ]
    assert recipe.data.sources[0].path == f"{tmp_path}:pairs"


def test_on_a_terminal_it_asks_five_questions(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = write_lines(tmp_path / "a.jsonl", *(chat(str(n), "Hi", "Hello", tier="ab"[n % 2]) for n in range(4)))
    answers, asked = iter([str(dump), str(base), "cpu", "tier", "b"]), []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(answers))
    init.main([])
    assert [question[:3] for question in asked] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert sources(load_recipe("recipe.yaml"))[0][:4] == ("good", "Good", 1.0, {"tier": ("b",)})


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, base: Path) -> None:
    dump = write_lines(tmp_path / "a.jsonl", *(chat(str(n), "Hi", "Hello", tier="ab"[n % 2]) for n in range(4)))
    given = ["--data", str(dump), "--base", str(base)]
    for flags, message in (
        (["--data", str(dump)], "give --base: there is no terminal"),
        ([*given, "--by", "level"], "--by level: no field with 2 to 20 values; there are tier"),
        ([*given, "--by", "tier", "--good", "c"], "--good c is no value of tier; there are a, b"),
        ([*given, "--by", "tier", "--good", "a", "b"], "names all values of tier"),
        ([*given, "--gpus", "8xZ9"], "--gpus 8xZ9 is not of the form"),
        ([*given, "--data", "none.json"], "none.json"),
        (
            [*given, "--data", str(write_lines(tmp_path / "b.jsonl", {"text": "Once."}))],
            "no record of the dumps is read",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            init.main(flags)
        assert not Path("recipe.yaml").exists()
    Path("recipe.yaml").touch()
    with pytest.raises(SystemExit, match=r"recipe\.yaml is there already"):
        init.main(given)


@pytest.mark.parametrize(
    ("kind", "model_type", "chat_template", "line"),
    [
        ("llama2", "mistral", None, "template: openchat_3.5"),
        ("gpt4", "llama", None, "template: openchat_3.6"),
        ("llama2", "gemma3_text", None, "template: openchat_v3.2_gemma_new"),
        ("gpt2", "qwen3", None, "template: chatml"),
    ],
)
def test_the_template_is_that_of_the_family(
    tmp_path: Path, kind: str, model_type: str, chat_template: str | None, line: str
) -> None:
    folder = write_base(tmp_path / "base", kind, model_type=model_type, chat_template=chat_template)
    (folder / "model.safetensors").touch()
    assert read_base(str(folder)).template == line


def test_the_way_of_training_is_the_first_that_fits(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "data/quickstart_tokenizer", tmp_path / "7b")
    LlamaConfig(num_hidden_layers=8, max_position_embeddings=1024).save_pretrained(tmp_path / "7b")  # a quarter of one
    (tmp_path / "7b/model.safetensors").touch()
    base, nothing = read_base("7b"), divide(["a.json"], "", None, Counter(), [])

    def model(num_gpus: int, gib: int) -> str:
        machine = Machine(num_gpus, AvailableMemory(gib * 2**30, 2**40, is_here=False))
        text = draft(base, machine, "name", nothing, 10**9, 10**6)
        return next(line for line in text.splitlines() if line.startswith("model:"))

    assert model(8, 80) == 'model: {base: "7b", dtype: bfloat16}'
    assert model(1, 24).endswith("lora: {rank: 16, alpha: 32.0}}")


def test_machines_and_good_values() -> None:
    assert read_machine("4xH100").memory.gpu_bytes == int(79.1 * 2**30)
    assert read_machine("2x40gb")[0] == 2 and read_machine("2x40gb").memory.gpu_bytes == 40 * 2**30
    assert find_good(Counter({json.dumps(n): 10 for n in range(1, 11)})) == ["10", "9"]
    assert find_good(Counter({"true": 3, "false": 9})) == ["true"]
    assert find_good(Counter({'"gpt-4o-mini"': 3, '"gpt-3.5"': 9})) == []
