"""Settings of other frameworks become recipes: their published examples, written anew, with other data and places."""

import json
from pathlib import Path
from typing import Any

import pytest

from ochat_train.init.migrate import main as migrate
from ochat_train.recipe import Recipe, load_recipe

# imoneoi/openchat, README.md: training of OpenChat V3.2.
OPENCHAT = r"""
NUM_GPUS=8
deepspeed --num_gpus=$NUM_GPUS --module ochat.training_deepspeed.train \
    --model-type openchat_v3.2 --model_path bases/thirteen --data_path dumps/packed_v3.2 --save_path runs/v3.2 \
    --epochs 5 --lr 2e-5 --eps 1e-5 --batch_size_per_gpu 8 --lr_warmup_steps 100 \
    --loss_balancing --deepspeed --deepspeed_config ochat/training_deepspeed/deepspeed_config.json
"""
# axolotl, examples/llama-3/qlora.yml and instruct-lora-8b.yml.
AXOLOTL = """
base_model: bases/llama3
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
chat_template: llama3
datasets:
  - path: ann/questions
    name: en
    type: chat_template
    split: train[:20%]
    field_messages: talk
    message_property_mappings: {role: who, content: what}
    roles: {user: [asker], assistant: [assistant, expert]}
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/qlora
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
group_by_length: false
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: <|end_of_text|>}
"""
# LLaMA-Factory, examples/train_lora/llama3_lora_sft_ds3.yaml.
LLAMA_FACTORY = """
model_name_or_path: bases/llama3-instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: who,what
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/lora
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
# TRL, docs/source/clis.md.
TRL = {
    "model_name_or_path": "bases/half",
    "dataset_name": "ann/chats",
    "dataset_train_split": "train_sft",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "use_peft": True,
    "lora_r": 4,
    "report_to": "none",
    "num_processes": 4,
    "assistant_only_loss": True,
}


def migrated(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Recipe, str]:
    """The recipe, and what was printed with single spaces."""
    (folder / "theirs.txt").write_text(text)
    migrate([str(folder / "theirs.txt"), "--out", str(folder / "mine.yaml")])
    return load_recipe(folder / "mine.yaml"), " ".join(capsys.readouterr().out.split())


def test_a_command_line_of_openchat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, printed = migrated(OPENCHAT, tmp_path, capsys)
    assert (recipe.template, recipe.model.base, recipe.checkpoint.dir) == (
        "openchat_v3.2",
        "bases/thirteen",
        "runs/v3.2",
    )
    assert (recipe.data.max_tokens, recipe.packing.tokens_per_gpu, recipe.train.epochs) == (4096, 8 * 4096, 5)
    assert (recipe.optim.lr, recipe.optim.eps, recipe.optim.weight_decay) == (2e-5, 1e-5, 0.1)
    assert recipe.data.sources[0].path == "dumps"
    assert 'data_path: "dumps/packed_v3.2" not taken over: it is tokenised; data.sources.0.path is' in printed
    assert "lr_warmup_steps: 100 not taken over: optim.warmup is a share of the run" in printed
    assert "loss_balancing: true not taken over: data.sources.N.weight says" in printed


def test_a_command_line_of_openchat_3_6_among_prose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """That's how it's trained:
deepspeed --num_gpus=8 --module ochat.training_deepspeed.train \\
    --model_path bases/eight --data_prefix dumps/packed --save_path runs/3.6 \\
    --batch_max_len 65536 --epochs 4 --save_every 2 --lr_warmup_ratio 0.1 --deepspeed
Don't stop it.
"""
    recipe, printed = migrated(text, tmp_path, capsys)
    assert (recipe.model.base, recipe.checkpoint.dir, recipe.data.sources[0].path) == (
        "bases/eight",
        "runs/3.6",
        "dumps",
    )
    assert (recipe.packing.tokens_per_gpu, recipe.train.epochs, recipe.optim.lr) == (65536, 4, "auto")
    assert (recipe.checkpoint.models.every_epochs, recipe.optim.warmup, recipe.optim.eps) == (2, 0.1, 1e-5)
    assert 'data_prefix: "dumps/packed" not taken over: it is tokenised; data.sources.0.path is' in printed


def test_a_recipe_of_axolotl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, printed = migrated(AXOLOTL, tmp_path, capsys)
    (source,) = recipe.data.sources
    assert source.path == "hf://ann/questions/en:train"
    assert (source.fields.turns, source.fields.role, source.fields.text) == ("talk", "who", "what")
    assert source.roles == {"asker": "user", "expert": "assistant"}
    lora = recipe.model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.base_bits, lora.targets) == (32, 16, 4, "all-linear")
    assert (recipe.template, recipe.data.eval_fraction, recipe.model.dtype) == ("llama3_instruct", 0.05, "bfloat16")
    assert (recipe.packing.tokens_per_gpu, recipe.packing.grad_accum) == (2 * 4096, 4)
    optim = recipe.optim
    assert (optim.algorithm, optim.lr, optim.min_lr, optim.weight_decay) == ("adamw_8bit", 2e-4, 0, 0)
    assert (optim.betas, optim.eps) == ((0.9, 0.999), 1e-8)  # axolotl's own, which the file leaves out
    for line in (
        'datasets.0.split: "train[:20%]" not taken over: a source is a whole split',
        "lora_dropout: 0.05 not taken over: adapters are trained without dropout",
        "load_in_8bit: false as here: off",
        'optimizer: "paged_adamw_8bit" -> optim.algorithm: "adamw_8bit"',
        "adam_beta2 (default): 0.999 -> optim.betas: [0.9, 0.999]",
        "warmup_steps: 10 not taken over: optim.warmup is a share of the run",
        "evals_per_epoch: 4 not taken over: once an epoch, or every N steps",
        "saves_per_epoch: 1 as here: after each epoch",
    ):
        assert line in printed, line


def test_a_recipe_of_llama_factory_reads_its_list_of_data_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, printed = migrated(LLAMA_FACTORY, tmp_path, capsys)
    assert [(source.name, source.path) for source in recipe.data.sources] == [
        ("who", "data:who"),
        ("what", "data:what"),
    ]
    lora = recipe.model.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.targets) == (8, 16, "all-linear")
    assert (recipe.template, recipe.zero.stage) == ("llama3_instruct", 3)
    assert (recipe.checkpoint.every_steps, recipe.train.epochs) == (500, 3)
    assert (recipe.optim.warmup, recipe.packing.tokens_per_gpu, recipe.packing.grad_accum) == (0.1, 2048, 8)
    assert "lora_alpha (default): 16 -> model.lora.alpha: 16" in printed
    assert "max_samples: 1000 not taken over: data.sources.N.epochs is the share" in printed
    assert 'stage: "sft" as here ' in printed and 'template: "llama3" -> template: "llama3_instruct"' in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("finetuning_type: freeze", "not taken over: adapters are LoRA's here; without model.lora all weights"),
        ("finetuning_type: oft", "not taken over: adapters are LoRA's here; without model.lora all weights"),
        ("finetuning_type: full", "as here: off"),
        ("packing: false", "not taken over: sequences are always packed, without padding"),
        ("packing: true", "as here: sequences are always packed, without padding"),
        ("recompute_granularity: full", "not taken over: no key here is known"),
        ("lr_scheduler_type: constant_with_warmup", "-> optim.min_lr: 1.0"),
        ("template: ours", '-> template: "base"'),
        ("eval_dataset: a", "not taken over: it is trained on; data.eval_fraction"),
        ("eval_dataset: c", "-> data.eval_sources: data:c, as its dataset_info.json"),
    ],
)
def test_a_key_of_llama_factory_is_reported_as_what_it_does(
    more: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, printed = migrated(f"model_name_or_path: m\ndataset: a, b\n{more}\n", tmp_path, capsys)
    key, _, value = more.partition(": ")
    assert f"{key}: {value if value in ('true', 'false') else json.dumps(value)} {words}" in printed
    assert (recipe.model.lora is None) == (key == "finetuning_type")  # adapters are that framework's default
    assert [source.path for source in recipe.data.eval_sources] == (["data:c"] if value == "c" else [])
    assert recipe.optim.min_lr == (1.0 if key == "lr_scheduler_type" else 0.1)


@pytest.mark.parametrize(
    ("folder", "path", "words"),
    [
        ("mine", "mine:ann/a", "dataset_info.json"),
        ("ONLINE", "hf://ann/a", "of the hub"),
        (
            "REMOTE:ann/lists",
            "ann/lists:ann/a",
            "after `hf download --repo-type dataset ann/lists --local-dir ann/lists`",
        ),
    ],
)
def test_folders_of_llama_factory(
    folder: str, path: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, printed = migrated(f"model_name_or_path: m\ndataset: [ann/a]\ndataset_dir: {folder}\n", tmp_path, capsys)
    assert recipe.data.sources[0].path == path and words in printed


def test_test_datasets_of_axolotl_are_eval_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "base_model: m\ndatasets: [{path: ann/a}]\ntest_datasets: [{path: ann/b, split: test}]\n"
    recipe, printed = migrated(text, tmp_path, capsys)
    assert [source.path for source in recipe.data.eval_sources] == ["hf://ann/b:test"]
    assert "-> data.eval_sources: hf://ann/b:test" in printed
    assert (recipe.template, recipe.optim.min_lr) == ("base", 0.0)  # axolotl's schedule ends at 0


def test_settings_of_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, printed = migrated(json.dumps(TRL), tmp_path, capsys)
    assert (recipe.data.sources[0].path, recipe.template) == ("hf://ann/chats:train_sft", "base")
    assert recipe.model.lora is not None and recipe.model.lora.rank == 4
    assert (recipe.data.max_tokens, recipe.packing.tokens_per_gpu, recipe.train.epochs) == (1024, 8 * 1024, 3)
    assert "num_processes: 4 not taken over: launch.sh takes all GPUs" in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: a\nsequence_len: 64\n", "the settings name no data"),
        ("stage: dpo\nmodel_name_or_path: a\ndataset: b\n", "has stage: dpo; .* under conditions: `ochat init"),
        ("stage: pt\nmodel_name_or_path: a\ndataset: b\n", "has stage: pt; .* on conversations with answers"),
        ("rl: dpo\nbase_model: a\ndatasets: [{path: b}]\n", "has rl: dpo; .* under conditions: `ochat init"),
        ("model: a\ntrain_dataset: b.yaml\n", "is for v1 of LLaMA-Factory; write it with the names of v0: model_name"),
        ("name: mine\n", "is of no known framework: axolotl's has base_model"),
        ("- a\n", "holds no settings"),
        ("a: [\n", "is neither YAML nor JSON"),
        (json.dumps(TRL | {"lora_r": 0}), "the recipe of .*theirs has 1 .*\n.*model.lora.rank: must be at least 1"),
    ],
)
def test_what_cannot_become_a_recipe_is_said_in_a_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text(text)
    with pytest.raises(SystemExit, match=words):
        migrate([str(tmp_path / "theirs"), "--out", str(tmp_path / "mine.yaml")])
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize("settings", [{}, {"use_peft": False}])
def test_keys_of_adapters_are_left_where_none_are_trained(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in TRL.items() if key != "use_peft"} | settings
    recipe, printed = migrated(json.dumps(given), tmp_path, capsys)
    assert recipe.model.lora is None and "lora_r: 4 not taken over: no adapters are trained" in printed
