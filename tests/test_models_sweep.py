"""All causal and multimodal families of the installed transformers through the probe. It writes docs/models.md:

python -m pytest -m sweep tests/test_models_sweep.py
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ochat_train.model.probe import probe
from ochat_train.model.small import without_dropout

PAGE = Path(__file__).resolve().parents[1] / "docs/models.md"
SECONDS = 120
ANY_LENGTH = 1 << 30
MULTIMODAL = list(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
CAUSAL = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in MULTIMODAL]

# Of these the default is an encoder, or a decoder beside one.
ENCODERS = (
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "mbart", "marian", "megatron-bert", "mvp", "pegasus", "plbart"),
    *("prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
    "xlm-roberta-xl",
)
HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
# What a family's own defaults leave open.
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64, "n_shared_experts": 2, "topk_method": "greedy"},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30},
        }
    },
    "glm4v": {"text_config": {"rope_parameters": HALF_ROPE}},
    "glm46v": {"text_config": {"rope_parameters": HALF_ROPE}},
    "glmga": {"text_config": {"rope_parameters": HALF_ROPE}},
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_key_value_heads": 8, "num_experts": 64, "moe_topk": 8},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 16},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 24},
    "reformer": {"is_decoder": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    **{family: {"is_decoder": True} for family in ENCODERS},
}

HEAD = """# Models

This page lists which families of transformers {version} are trained exactly, as the project's tests measure it.

- *Each family.* A small copy in float32, with random weights and with layers of every kind that the family has, runs on
  packed sequences. It is compared with transformers' eager attention on each sequence alone.
- *Settings.* The configuration is the family's default, without dropout. Windows, chunks and the lengths at which
  rotary embeddings change are scaled down, so that the sequences exceed them.
- *Numbers.* The columns `logits` and `gradients` are the largest relative differences: of the logits of a token, and of
  the gradient of a parameter.

{num_exact} of {num_all} families are trained exactly. Of these, {num_alone} are marked `alone`: they run on
each sequence alone, which costs a forward and a backward pass for each sequence. Their reason says what packed
attention lacks.

A run depends on its own configuration, not on this page. Before training and `ochat doctor` (also with `--quick`) load
anything, they probe a small copy of the run's model. If the results differ, they refuse the model in one line.

`python -m pytest -m sweep tests/test_models_sweep.py` writes this page.

| family | trained | logits | gradients | reason |
| --- | --- | --- | --- | --- |
"""
MULTIMODAL_HEAD = """
## Multimodal families

Only the text part, which is the language model and its head, is trained, on text. Encoders of images, video and audio,
and the layers that connect them to the language model, are frozen. They take no GPU memory, and exports contain them
as they are in the base. The comparison is with transformers' whole model on text alone.

{num_exact} of {num_all} families are trained exactly, {num_alone} of them on each sequence alone.

| family | trained | logits | gradients | reason |
| --- | --- | --- | --- | --- |
"""


Row = tuple[str, str, str, str]  # trained, logits, gradients, reason


class TooLong(BaseException):
    """No Exception, which the probe would take for what a model's code says."""


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    """The rows so far; a part of the page is written when all its families are there."""
    found: dict[str, Row] = {}
    yield found
    begin = MULTIMODAL_HEAD.partition("Only")[0]
    of_causal, _, of_multimodal = PAGE.read_text(encoding="utf-8").partition(begin)
    of_multimodal = begin + of_multimodal
    if all(family in found for family in CAUSAL):
        of_causal = part_of_page(HEAD, {family: found[family] for family in CAUSAL})
    if all(family in found for family in MULTIMODAL):
        of_multimodal = part_of_page(MULTIMODAL_HEAD, {family: found[family] for family in MULTIMODAL})
    PAGE.write_text(of_causal + of_multimodal, encoding="utf-8")


def part_of_page(head: str, found: dict[str, Row]) -> str:
    trained = [row[0] for row in found.values()]
    counts = {
        "num_exact": len(trained) - trained.count("no"),
        "num_all": len(trained),
        "num_alone": trained.count("alone"),
    }
    lines = [f"| `{family}` | {' | '.join(row)} |\n" for family, row in found.items()]
    return head.format(version=transformers.__version__, **counts) + "".join(lines)


@pytest.mark.sweep
@pytest.mark.parametrize("family", [*CAUSAL, *MULTIMODAL])
def test_a_family_is_exact_or_refused_in_one_line(family: str, rows: dict[str, Row]) -> None:
    def stop(*_: object) -> NoReturn:
        raise TooLong(f"{family} takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        rows[family] = row_of(family)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in rows[family][-1]


def row_of(family: str) -> Row:
    try:
        config = CONFIG_MAPPING[family](**SETTINGS.get(family, {}))
    except Exception as error:
        reason = str(error).splitlines()[0]
        return ("no", "", "", f"its default configuration is none: {reason}")
    try:
        found = probe(without_dropout(config), longest=ANY_LENGTH, checkpointing="none")
    except ValueError as error:  # anything else fails the test
        reason = str(error).partition(": ")[2]
        return ("no", "", "", reason.removesuffix("; take another model").replace("|", "\\|"))
    trained = "yes" if found.why_alone is None else "alone"
    return (trained, f"{found.logits:.0e}", f"{found.gradients:.0e}", found.why_alone or "")
