"""The probe: which models are trained exactly on packed sequences, and which are refused, in one line."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import ochat_train.model.attention
import ochat_train.model.packed_lm
from ochat_train.model.alone import COST
from ochat_train.model.attention import AttentionNeeds, AttentionOptions, BackendChoice
from ochat_train.model.probe import Agreement, check_split, check_tiles, choose_attention, probe
from ochat_train.model.small import BORDER, small_model

ANY_LENGTH = 1 << 30
PACKED = BackendChoice("sdpa", "any device")
ROPE = {"rope_theta": 1e4}
LONG_ROPE = ROPE | {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 48,
    "long_factor": [float(4 + i) for i in range(48)],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1": ("llama", {"num_key_value_heads": 8, "max_position_embeddings": 131_072}),
    "a window in every second layer, softcaps": ("gemma2", {}),
    "a window in five of six layers": ("gemma3_text", {}),
    "a window that its attention does not pass on": (
        "qwen2_moe",
        {"use_sliding_window": True, "max_window_layers": 24},
    ),
    "LongRoPE": ("phi3", {"max_position_embeddings": 131_072, "rope_parameters": LONG_ROPE}),
    "dynamic RoPE": ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}}),
    "logits that are divided": ("granite", {"logits_scaling": 8.0}),
    "logits that are multiplied by a setting of the same name": ("hyperclovax", {"logits_scaling": 8.0}),
    "parallel layers, scaled logits": ("cohere", {}),
    "dense layers, then experts in groups": ("deepseek_v3", {}),
    "experts, of which first weights choose one by rounding": (
        "deepseek_v2",
        {"num_experts_per_tok": 6, "n_routed_experts": 64, "n_shared_experts": 2, "topk_method": "greedy"},
    ),
    "heads of several sizes, shared keys": ("gemma4_text", {}),
    "attention sinks, a window in every second layer, experts": ("gpt_oss", {}),
    "learned positions": ("gpt2", {"attn_pdrop": 0.0}),
    "layers before the head": ("bert", {"is_decoder": True}),
    "layers before the head that are no part of its module": ("modernbert-decoder", {}),
    "experts whose width is another part's setting": ("dbrx", {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}}),
    "the text part of a multimodal model": ("mistral3", {}),
    "the text part, with a window in five of six layers": ("gemma3", {}),
    "the text part, with positions in time, height and width": ("qwen2_5_vl", {}),
    "the text part, with interleaved positions": ("qwen3_vl", {}),
}
# With attention of their own or one that ours cannot do, or with layers that are none.
ALONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("bloom", {"attention_dropout": 0.0}, "an attention of the model's own"),
    "an attention that takes no arguments of ours": ("nemotron", {"num_key_value_heads": 8}, "without cu_seqlens"),
    "a recurrence": ("mamba", {}, "sequences see each other"),
    "a softcap, and a head at whose weight the model looks": ("xlstm", {}, "sequences see each other"),
    "convolutions": ("lfm2", {"layer_types": ["conv"] * 31 + ["full_attention"]}, "keep packed sequences apart"),
    "linear attention in three of four layers, experts": ("qwen3_next", {}, "keep packed sequences apart"),
    "state-space layers, attention that several layers share": ("zamba2", {}, "keep packed sequences apart"),
    "chunks": ("llama4_text", {}, "sequences of more than its chunk of"),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "both directions": ("bert", {}, "its tokens see later ones"),
    "logits of several predictions": (
        "prophetnet",
        {"is_decoder": True, "num_decoder_layers": 1, "num_encoder_layers": 1},
        "after the layers",
    ),
    "dropout of attention": ("llama", {"attention_dropout": 0.1}, r"attention dropout of 0\.1 .* set it to 0"),
    "layers of its text part for pictures alone": (
        "mllama",
        {},
        "text does not pass .*cross_attn.* more of its weights",
    ),
    "text that sees what follows, as beside a picture": ("paligemma", {}, "logits differ from those of each sequence"),
    "a configuration that is none": ("llama", {"hidden_act": "no such"}, "no small copy of it works"),
}


def probe_of(model_type: str, settings: dict[str, Any], *, longest: int = ANY_LENGTH, **options: Any) -> Agreement:
    config = AutoConfig.for_model(model_type, **settings)
    return probe(config, longest=longest, checkpointing="full", **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_packed_attention_suits_is_exact(name: str) -> None:
    found = probe_of(*MODELS[name])
    assert found.why_alone is None
    assert found.logits < 1e-5 and found.gradients < 2e-5


@pytest.mark.parametrize("name", ALONE)
def test_other_models_are_run_on_each_sequence_alone_and_the_reason_and_the_cost_are_reported(name: str) -> None:
    model_type, settings, reason = ALONE[name]
    config = AutoConfig.for_model(model_type, **settings)
    needs = AttentionNeeds(capability=None, dtype=torch.float32, head_dim=64, has_softcap=False)
    choice, found = choose_attention("auto", config, needs, longest=ANY_LENGTH, checkpointing="none")
    assert choice.backend == "alone" and reason in choice.reason and choice.reason.endswith(COST)
    assert found.logits < 1e-5 and found.gradients < 2e-5
    with pytest.raises(ValueError, match=reason):
        choose_attention("sdpa", config, needs, longest=ANY_LENGTH, checkpointing="none")


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_be_trained_wrongly_is_refused_in_one_line(name: str) -> None:
    model_type, settings, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason) as caught:
        probe_of(model_type, settings)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{model_type} cannot be trained")


def test_borders_that_no_sequence_reaches_do_not_matter() -> None:
    probe_of("llama4_text", {"attention_chunk_size": 8192}, longest=8192)
    small = small_model(AutoConfig.for_model("mistral", sliding_window=4096), longest=4096)
    assert small.config.sliding_window == 4096
    assert (
        small_model(AutoConfig.for_model("mistral", sliding_window=4096), longest=4097).config.sliding_window == BORDER
    )


def test_a_difference_is_reported_with_its_size_and_where_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ochat_train.model.attention.sdpa_attention

    def without_window(*args: Any) -> Any:
        *tensors, options = args
        return original(*tensors, AttentionOptions(*options)._replace(window=None))

    monkeypatch.setattr(ochat_train.model.attention, "sdpa_attention", without_window)
    with pytest.raises(ValueError, match=rf"by \de-\d\d, from token {BORDER} of .* in layer 0 \(sliding_attention\)"):
        probe_of("gemma2", {}, wanted="sdpa")


@pytest.mark.parametrize("name", ["LongRoPE", "dynamic RoPE"])
def test_frequencies_of_a_neighbour_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ochat_train.model.packed_lm, "rotate_each_alone", lambda *_: None)
    with pytest.raises(ValueError, match="sequences see each other"):
        probe_of(*MODELS[name], wanted="sdpa")


@pytest.mark.parametrize("name", MODELS)
def test_ranks_may_have_shares_of_the_tokens_where_attention_alone_mixes_them(name: str) -> None:
    model_type, settings = MODELS[name]
    check_split(AutoConfig.for_model(model_type, **settings), PACKED, 2, longest=ANY_LENGTH)


@pytest.mark.parametrize(
    ("model_type", "settings", "num_shares", "attention", "reason"),
    [
        ("llama", {"num_attention_heads": 32}, 12, PACKED, "12 does not divide the model's 32 attention heads; set it"),
        (
            "mamba",
            {},
            2,
            PACKED,
            r"2: mamba mixes tokens outside of packed attention \(tokens in another order",
        ),
        ("llama", {}, 2, BackendChoice("alone", "asked for"), r"2 needs packed attention \(asked for\); set it to 1"),
    ],
)
def test_ranks_may_have_no_shares_of_what_would_be_trained_wrongly(
    model_type: str, settings: dict[str, Any], num_shares: int, attention: BackendChoice, reason: str
) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    check_split(config, attention, 1, longest=ANY_LENGTH)
    with pytest.raises(ValueError, match=f"^packing.sequence_parallel {reason}") as caught:
        check_split(config, attention, num_shares, longest=ANY_LENGTH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "deepseek_v3"])
def test_mlps_run_in_tiles(model_type: str) -> None:
    check_tiles(AutoConfig.for_model(model_type), PACKED, 4, longest=ANY_LENGTH)


def test_mlps_do_not_run_in_tiles_where_they_are_experts_or_mix_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    mixtral, llama = (AutoConfig.for_model(name) for name in ("mixtral", "llama"))
    check_tiles(mixtral, PACKED, 1, longest=ANY_LENGTH)
    with pytest.raises(
        ValueError, match=r"^model\.mlp_tiles 4: mixtral: no layer of MixtralForCausalLM has an MLP that"
    ):
        check_tiles(mixtral, PACKED, 4, longest=ANY_LENGTH)
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x - x.mean(dim=-2, keepdim=True)))
    with pytest.raises(ValueError, match=r"^model\.mlp_tiles 4: llama: hidden states change by .*; set it to 1"):
        check_tiles(llama, PACKED, 4, longest=ANY_LENGTH)


def test_a_small_copy_has_layers_of_all_kinds() -> None:
    gemma = small_model(AutoConfig.for_model("gemma3_text"), longest=ANY_LENGTH).config
    assert gemma.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    deepseek = small_model(AutoConfig.for_model("deepseek_v3"), longest=ANY_LENGTH)
    kinds = [type(layer.mlp).__name__ for layer in deepseek.base_model.layers]
    assert kinds == ["DeepseekV3MLP"] * 3 + ["DeepseekV3MoE"]
    # Of 54 layers the attention of the second hybrid one is the first one's.
    zamba = small_model(AutoConfig.for_model("zamba2"), longest=ANY_LENGTH).config
    assert zamba.layer_types == ["linear_attention", "hybrid", "hybrid"] and zamba.hybrid_layer_ids == [1, 2]
    # The only sliding layers are the last of many.
    types = ["full_attention"] * 28 + ["sliding_attention"] * 4
    qwen = AutoConfig.for_model("qwen2", use_sliding_window=True, layer_types=types, num_hidden_layers=32)
    assert small_model(qwen, longest=ANY_LENGTH).config.layer_types == ["full_attention", "sliding_attention"]
