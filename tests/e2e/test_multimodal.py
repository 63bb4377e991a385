"""Multimodal bases: their text part is trained as stock trains it, and exports are whole, with all else as it was."""

from pathlib import Path
from typing import Any

import orjson
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from ochat_train.export import export
from ochat_train.model.text_part import untrained_of
from tests.e2e.harness import events, preprocess, tiny_recipe, train_several, weights, write_dump
from tests.e2e.test_families import MOST_ROUNDING, RATE, TIMES_ITS_ERROR, Naive

NUM_IDS = 1025  # one more than the bases have
PROCESSOR = b'{"image_processor_type": "Gemma3ImageProcessor"}'
SIZES: dict[str, Any] = {
    "vocab_size": NUM_IDS - 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
VISION |= {"image_size": 28, "patch_size": 14}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
BASES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": SIZES | WINDOWS, "mm_tokens_per_image": 4, "image_token_id": 5},
    "mistral3": {"text_config": SIZES | {"model_type": "mistral"}, "image_token_index": 5},
}
STEPS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bases, and runs of three steps in two processes."""
    folder = tmp_path_factory.mktemp("multimodal")
    for family, settings in BASES.items():
        torch.manual_seed(1)
        vision = {"model_type": "pixtral"} if family == "mistral3" else {}
        config = AutoConfig.for_model(family, **settings, vision_config=VISION | vision)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder / family)
        (folder / family / "preprocessor_config.json").write_bytes(PROCESSOR)
    file = folder / "gemma3/model.safetensors"  # with a part in its names that stock has no more, as on the hub
    stored = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    write_dump(folder, 52)
    optim = {"algorithm": "sgd", "lr": RATE, "weight_decay": 0.0, "grad_clip": 1e6, "warmup": 0.0, "min_lr": 1.0}
    model = {"base": str(folder / "gemma3"), "dtype": "float32", "checkpointing": "none"}
    recipe = tiny_recipe(folder, optim=optim, train={"epochs": 2, "seed": 5, "max_steps": STEPS}, model=model)
    preprocess(recipe)
    lora = [f"model.base={folder / 'mistral3'}", "model.lora={rank: 4, alpha: 8.0}"]
    train_several(
        recipe,
        *(
            [f"checkpoint.dir={folder / name}", *overrides]
            for name, *overrides in (
                ("stage 1", "zero.stage=1"),
                ("stage 3", "zero.stage=3"),
                ("resumed", "zero.stage=3", "train.max_steps=1"),
                ("resumed", "zero.stage=3"),
                ("lora", "zero.stage=2", *lora),
            )
        ),
    )
    return folder


def of_base(family: str, runs: Path) -> dict[str, Tensor]:
    return load_file(runs / family / "model.safetensors")


def is_text(name: str) -> bool:
    return name.startswith("language_model.")


def load_whole(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def test_two_processes_have_no_more_than_the_rounding_of_the_naive_loop(runs: Path) -> None:
    """Whose model is the whole of transformers, with the row of the added token that the run began with."""
    start = load_whole(runs / "gemma3")
    start.resize_token_embeddings(NUM_IDS, mean_resizing=False)
    with torch.no_grad():
        table = start.get_input_embeddings().weight
        table[-1] = table[:-1].mean(dim=0)
    naive = Naive(runs, start)
    (exact, losses), (rounded, _) = naive.train(torch.float64), naive.train(torch.float32)
    begun = dict(start.named_parameters())
    largest = max(float((exact[name] - begun[name].detach().double()).norm()) for name in exact)

    def error(given: dict[str, Tensor]) -> float:
        assert given.keys() == exact.keys()
        return max(float((given[name].detach().double() - exact[name]).norm()) for name in exact) / largest

    assert len(losses) == STEPS and error(rounded) < MOST_ROUNDING
    for run in (runs / "stage 1", runs / "stage 3"):
        assert error(dict(load_whole(run / "model").named_parameters())) < TIMES_ITS_ERROR * error(rounded)
        assert [step["loss"] for step in events(run, "step")] == pytest.approx(losses, rel=1e-5)  # fp32 sums


@pytest.mark.parametrize(("run", "family"), [("stage 1", "gemma3"), ("stage 3", "gemma3"), ("lora", "mistral3")])
def test_an_export_is_whole_with_all_but_its_text_part_bit_for_bit_as_it_was(run: str, family: str, runs: Path) -> None:
    base, model = of_base(family, runs), weights(runs / run)
    assert base.keys() == model.keys()
    for name, weight in base.items():
        assert torch.equal(model[name], weight) != is_text(name) or (run == "lora" and "norm" in name), name
    whole = load_whole(runs / run / "model")
    assert type(whole).__name__ == AutoConfig.from_pretrained(runs / family).architectures[0]
    assert whole.get_input_embeddings().weight.shape == whole.get_output_embeddings().weight.shape == (NUM_IDS, 32)
    assert (runs / run / "model/preprocessor_config.json").read_bytes() == PROCESSOR
    assert orjson.loads((runs / run / "model/config.json").read_bytes())["text_config"]["vocab_size"] == NUM_IDS


def test_a_checkpoint_has_no_weight_beside_the_text_part_and_resume_is_exact(runs: Path) -> None:
    state = torch.load(runs / f"stage 1/step-{STEPS:08d}/deepspeed/mp_rank_00_model_states.pt", weights_only=False)
    assert not [name for name in state["module"] if "vision" in name or "projector" in name]
    once, resumed = weights(runs / "stage 3"), weights(runs / "resumed")
    assert all(torch.equal(resumed[name], weight) for name, weight in once.items())


def test_another_base_in_the_place_of_the_one_of_training_is_refused(runs: Path, tmp_path: Path) -> None:
    checkpoint, base = runs / f"stage 1/step-{STEPS:08d}", runs / "gemma3"
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in base.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    export(checkpoint, tmp_path / "again", base=str(moved))
    assert load_file(tmp_path / "again/model.safetensors").keys() == of_base("gemma3", runs).keys()
    assert all(
        torch.equal(weight, weights(runs / "stage 1")[name])
        for name, weight in load_file(tmp_path / "again/model.safetensors").items()
    )
    changed = of_base("gemma3", runs)
    name = next(name for name in changed if name.startswith("vision_tower"))
    save_file(changed | {name: changed[name] + 1}, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds other weights than those beside which .* was trained"):
        export(checkpoint, tmp_path / "other", base=str(moved))


def test_adapters_are_of_the_language_model_and_peft_puts_them_into_the_whole(runs: Path, tmp_path: Path) -> None:
    export(runs / f"lora/step-{STEPS:08d}", tmp_path / "adapter", adapter=True)
    names = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert names and all(".language_model." in name or "lm_head" in name for name in names)
    merged, whole = load_whole(runs / "lora/model"), load_whole(runs / "mistral3")
    whole.resize_token_embeddings(NUM_IDS, mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    ids = torch.arange(20, 60)[None]
    ids[0, 5] = NUM_IDS - 1
    with torch.no_grad():
        expected, given = merged(ids).logits, adapted(input_ids=ids).logits
    assert torch.allclose(given, expected, atol=1e-5 * float(expected.abs().max()))
    assert untrained_of(merged) is None
