"""The benchmark of a training step on small shapes, on a GPU. Needs one: pytest -m gpu tests/gpu."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import machine
import measure
import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
]


def test_all_ways_run_in_bfloat16_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 64, as many tokens as make kernels of attention use several blocks."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    shape = ["--width", "256", "--heads", "4", "--mlp", "688", "--vocab", "4096", "--capacities", "8192"]
    words = ["--compared", "8192", "--checkpointing", "full", "none", "--repeats", "2"]
    train_step.main(["--preset", "13b", *shape, *words])
    (file,) = (tmp_path / "benchmarks/results").iterdir()
    found = json.loads(file.read_text())
    assert found["gpu"] == torch.cuda.get_device_name() and found["driver"] and found["cuda"]
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    failed = {one["name"] for one in found["steps"] if one["failure"]}
    assert failed == (set() if has_liger else {"transformers+liger"})
    assert {one["name"] for one in found["differences"]} >= {"padded", "transformers", "upstream"}


def test_waits_are_counted_by_what_cuda_says() -> None:
    values = torch.arange(4.0, device="cuda")

    def waits_twice() -> None:
        values.nonzero()
        float(values[0])

    assert measure.count_waits(waits_twice, values.device) == 2
    assert measure.count_waits(lambda: values * 2, values.device) == 0


def test_memory_is_counted_with_what_was_there_before() -> None:
    known = torch.zeros(2**20, device="cuda")  # 4 MiB

    def run() -> None:
        first = known * 2
        second = first * 2
        del first, second

    before = torch.cuda.memory_allocated()
    assert measure.peak_bytes(run, known.device, [known]) == before + 2 * 4 * 2**20
