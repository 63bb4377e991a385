"""What training writes is loaded by transformers as the same model, or refused with the size of the difference."""

from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import ochat_train.export
from ochat_train.conversations.template import TEMPLATES
from ochat_train.export import _check_weights
from ochat_train.model.exported import read_export
from ochat_train.model.round_trip import check_round_trip, compare_weights, save_weights
from ochat_train.model.small import small_model
from ochat_train.model.text_part import keep_text_part, untrained_of
from ochat_train.tokens.tokenizer import load_tokenizer
from tests.chat_model import write_chat_model
from tests.small_tokenizers import write_base


@pytest.mark.parametrize(
    "family", ["llama", "deepseek_v3", "qwen3_moe", "gemma3_text", "gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl"]
)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_small_copy_has_the_same_logits_after_its_export(family: str, targets: str | None) -> None:
    """Adapters beside shared experts are those layers' own: by names, peft would put them into the experts."""
    config = AutoConfig.for_model(family)
    assert check_round_trip(config, longest=64, is_alone=False, is_extended=True, lora_targets=targets) < 5e-6


def test_a_model_that_transformers_does_not_load_again_is_refused() -> None:
    """Of Emu3 the text model is trained, whose files have no class for AutoModelForCausalLM."""
    with pytest.raises(ValueError, match=r"^emu3 cannot be exported: Unrecognized configuration class"):
        check_round_trip(
            AutoConfig.for_model("emu3", architectures=["Emu3ForCausalLM"]),
            longest=64,
            is_alone=False,
            is_extended=True,
        )


def test_tokens_are_added_only_where_the_run_adds_some() -> None:
    """Moshi has a row more in its embedding than in its head, which transformers cannot extend."""
    moshi = AutoConfig.for_model("moshi")
    assert check_round_trip(moshi, longest=64, is_alone=False, is_extended=False) < 5e-6
    with pytest.raises(ValueError, match=r"^moshi cannot be exported: "):
        check_round_trip(moshi, longest=64, is_alone=False, is_extended=True)


@pytest.mark.parametrize(
    ("family", "language", "vision"),
    [
        ("gemma3", "language_model.model.layers.", "vision_tower."),
        ("mistral3", "language_model.model.layers.", "vision_tower.transformer.layers."),
        ("qwen2_5_vl", "model.layers.", "visual.blocks."),
        ("qwen3_vl", "model.language_model.layers.", "model.visual.blocks."),
    ],
)
def test_a_multimodal_model_is_written_by_the_names_of_its_hub(
    family: str, language: str, vision: str, tmp_path: Path
) -> None:
    lm = keep_text_part(small_model(AutoConfig.for_model(family), longest=64))
    untrained = untrained_of(lm)
    assert untrained is not None and not untrained.weights.keys() & lm.state_dict().keys()
    save_weights(tmp_path, lm.state_dict(), lm.config, torch.float32, untrained)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(name.startswith(language) for name in names) and any(name.startswith(vision) for name in names)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(whole[name], weight) for name, weight in untrained.weights.items())


def test_an_export_with_another_weight_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base(tmp_path / "base", "llama2")
    model = write_chat_model(tmp_path / "model", load_tokenizer(str(tmp_path / "base"), TEMPLATES["chatml"]))
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert compare_weights(model, weights, torch.float32) == len(weights)
    _check_weights(model, weights, torch.float32)
    assert (read_export(model) or {})["num_compared_weights"] == len(weights)

    monkeypatch.setattr(ochat_train.export, "free_host_bytes", lambda: 1000)
    _check_weights(model, weights, torch.float32)
    metadata = orjson.loads((model / "ochat_train.json").read_bytes())
    assert metadata["num_compared_weights"] is None and "were not compared" in metadata["problems"][-1]

    file = model / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if name.endswith("o_proj.weight"))
    save_file(stored | {name: stored[name] * 1.25}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"other weights than the checkpoint: {name} by 2.5e-01 \(relative"):
        compare_weights(model, weights, torch.float32)
