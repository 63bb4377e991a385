"""What an exported model has beside its weights: padding, and the tokens that it names."""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.template import TEMPLATES
from ochat_train.export import main as export
from ochat_train.files import step_name
from ochat_train.model.pretrained import load_model
from ochat_train.tokens.chat_template import encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from ochat_train.training.checkpoint import mark_file
from tests.chat_model import write_chat_model
from tests.small_tokenizers import write_base


@pytest.fixture(scope="module", params=["openchat_v3.2", "chatml"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Of a base like Llama 2, without a token for padding."""
    folder = write_base(tmp_path_factory.mktemp("base") / "base", "llama2")
    return load_tokenizer(str(folder), TEMPLATES[request.param])


@pytest.fixture(scope="module")
def model(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model."""
    return write_chat_model(tmp_path_factory.mktemp("export") / "model", tokenizer)


def test_prompts_of_a_batch_are_padded_and_answered_as_each_alone(model: Path) -> None:
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "How does a crow sound? Tell me.", " a\n")]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    assert (batch["input_ids"][0, 0], batch["attention_mask"][0, 0]) == (tokenizer.pad_token_id, 0)
    answers = network.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for chat, answer in zip(chats, answers, strict=True):
        alone = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        expected = network.generate(**alone, max_new_tokens=12, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert answer[: len(expected)].tolist() == expected.tolist()
        assert set(answer[len(expected) :].tolist()) <= {tokenizer.pad_token_id}


def test_a_rendered_prompt_has_one_bos_when_it_is_tokenized_without_special_tokens(
    model: Path, tokenizer: ChatTokenizer
) -> None:
    loaded, chat = AutoTokenizer.from_pretrained(model), [{"role": "user", "content": "Hi"}]
    ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    rendered = loaded.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ids == encode_prompt(Conversation("", "", "Careful", "", (Message("user", "Hi"),)), tokenizer)
    assert loaded(rendered, add_special_tokens=False)["input_ids"] == ids
    assert loaded(rendered)["input_ids"] == [loaded.bos_token_id, *ids]  # as docs/serving.md says


def test_the_token_for_padding_is_the_same_everywhere_and_not_the_end_token(
    model: Path, tokenizer: ChatTokenizer
) -> None:
    generation = json.loads((model / "generation_config.json").read_text())
    loaded = AutoTokenizer.from_pretrained(model)
    assert (loaded.pad_token, loaded.padding_side, loaded.eos_token_id) == ("<unk>", "left", tokenizer.end_id)
    assert generation["pad_token_id"] == loaded.pad_token_id == 0
    assert len(loaded) == tokenizer.num_ids  # no row is new


@pytest.mark.parametrize("padding", ["end", "pad", None])
def test_no_row_that_a_model_needs_is_frozen_by_padding(
    padding: str | None, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    pad_id = tokenizer.pretrained.convert_tokens_to_ids(tokenizer.pad_token)
    base_pad = {"end": tokenizer.end_id, "pad": pad_id, None: None}[padding]

    kind = partial(LlamaConfig, pad_token_id=base_pad)  # as if the base had named this token
    folder = write_chat_model(tmp_path / "model", tokenizer, kind)
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == (None if padding is None else pad_id)

    def trained_rows(network: torch.nn.Module) -> set[int]:
        ids = torch.arange(tokenizer.num_ids)[None]
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradient = network.get_input_embeddings().weight.grad  # type: ignore[operator]
        return set(gradient.abs().sum(dim=1).nonzero().flatten().tolist())

    # By transformers' own loading the row of the padding alone is frozen, if the base named one; by ours none is. The
    # last id is followed by nothing, so it has no gradient where it is not the label of another.
    others = trained_rows(AutoModelForCausalLM.from_pretrained(folder))
    last = {tokenizer.num_ids - 1}
    assert set(range(tokenizer.num_ids)) - others <= last | ({pad_id} if padding else set())
    ours = load_model(str(folder), None, dtype="float32", num_ids=tokenizer.num_ids, added_ids=[], seed=0)
    assert set(range(tokenizer.num_ids)) - trained_rows(ours) <= last


def test_the_mean_of_the_last_models_is_exact_and_an_export(model: Path, tmp_path: Path) -> None:
    """Of three models in bfloat16, in other files than one another, the last two."""
    weights, kept = [], []
    for step in (1, 2, 3):
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        torch.manual_seed(step)
        for parameter in lm.parameters():
            torch.nn.init.normal_(parameter)
        folder = tmp_path / "run/models" / step_name(step)
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        lm.save_pretrained(folder, max_shard_size="100KB" if step == 3 else "1GB")
        (folder / "checksums.json").write_text(
            json.dumps({file.name: asdict(mark_file(file)) for file in folder.iterdir()})
        )
        kept.append(folder)
        weights.append(lm.state_dict())
    arguments = [str(tmp_path / "run"), str(tmp_path / "out")]
    export(["--average", "2", *arguments])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, weight in mean.items():
        assert torch.equal(weight, ((weights[1][name].float() + weights[2][name].float()) / 2).bfloat16()), name
    assert json.loads((tmp_path / "out/ochat_train.json").read_text())["averaged_steps"] == [2, 3]
    with pytest.raises(SystemExit, match=r"--average 4: .*models has 3; checkpoint.models.every_epochs=1"):
        export(["--average", "4", *arguments])
    save_file({"other": torch.zeros(1)}, kept[0] / "more.safetensors")
    with pytest.raises(SystemExit, match=r"have other weights \(other\)"):
        export(["--average", "3", *arguments])
    (kept[1] / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"step-00000002 is damaged: config.json"):
        export(["--average", "2", *arguments])
