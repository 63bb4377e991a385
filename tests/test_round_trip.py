"""What training writes is loaded by transformers as the same model, or refused with the size of the difference."""

from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import ochat_train.export
from ochat_train.conversations.template import TEMPLATES
from ochat_train.export import _check_weights
from ochat_train.model.exported import read_export
from ochat_train.model.round_trip import check_round_trip, compare_weights
from ochat_train.tokens.tokenizer import load_tokenizer
from tests.chat_model import write_chat_model
from tests.small_tokenizers import write_base


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_small_copy_has_the_same_logits_after_its_export(family: str, targets: str | None) -> None:
    """Adapters beside shared experts are those layers' own: by names, peft would put them into the experts."""
    config = AutoConfig.for_model(family)
    assert check_round_trip(config, longest=64, is_alone=False, is_extended=True, lora_targets=targets) < 5e-6


def test_a_model_that_transformers_does_not_load_again_is_refused() -> None:
    """Of Emu3 the text model is trained, whose files have no class for AutoModelForCausalLM."""
    with pytest.raises(ValueError, match=r"^emu3 cannot be exported: Unrecognized configuration class"):
        check_round_trip(AutoConfig.for_model("emu3"), longest=64, is_alone=False, is_extended=True)


def test_where_adapters_cannot_be_exported_the_remedy_has_been_tried() -> None:
    """Zamba 2's attention stands in several places, and the adapters of each place are its own: q_proj's as well."""
    zamba = AutoConfig.for_model("zamba2")
    refused = r"^zamba2 cannot be exported: .* logits differ by .*; train all weights, without model.lora$"
    with pytest.raises(ValueError, match=refused):
        check_round_trip(zamba, longest=64, is_alone=True, is_extended=True, lora_targets="all-linear")


def test_tokens_are_added_only_where_the_run_adds_some() -> None:
    """Moshi has a row more in its embedding than in its head, which transformers cannot extend."""
    moshi = AutoConfig.for_model("moshi")
    assert check_round_trip(moshi, longest=64, is_alone=False, is_extended=False) < 5e-6
    with pytest.raises(ValueError, match=r"^moshi cannot be exported: "):
        check_round_trip(moshi, longest=64, is_alone=False, is_extended=True)


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
