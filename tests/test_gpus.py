"""GPUs that torch cannot use: found by the driver, named with the remedy, and never passed over for the CPU.

No GPU is here: /proc and /dev are files of the test, NVML is a stand-in for the driver's library.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ochat_train import gpus, train
from ochat_train.doctor import checks
from ochat_train.doctor.case import Case
from ochat_train.gpus import Driver, check_gpus, find_driver
from ochat_train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "recipes/quickstart.yaml")
# As the drivers write them: the proprietary module, and the open one.
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Wed Oct 25 20:54:53 UTC 2023\nGCC version:  gcc 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@b)\nGCC version:  gcc 12\n"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def machine(root: Path, version: str | None = "535.129.03", form: str = CLOSED, *, is_given: bool = True) -> Path:
    """Two GPUs; is_given: whether their device files are there, as they are not in a container without GPUs."""
    for number in range(2):
        (root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0").mkdir(parents=True)
    if version is not None:
        (root / "proc/driver/nvidia/version").write_text(form.format(version))
    (root / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm") if is_given else ():
        (root / "dev" / name).write_text("")
    return root


def test_the_driver_is_found_by_what_it_writes_to_proc_and_dev(tmp_path: Path) -> None:
    assert find_driver(tmp_path) is None
    assert find_driver(machine(tmp_path / "a")) == Driver(2, "535.129.03")
    assert find_driver(machine(tmp_path / "b", "560.35.03", OPEN)) == Driver(2, "560.35.03")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").write_text("")
    assert find_driver(tmp_path) == Driver(1, None)


def test_nvml_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def nvmlInit_v2(self) -> int:
            return 0

        def nvmlDeviceGetCount_v2(self, count: Any) -> int:
            count._obj.value = 8
            return 0

        def nvmlSystemGetDriverVersion(self, text: Any, _: Any) -> int:
            text.value = b"570.86.15"
            return 0

        def nvmlSystemGetCudaDriverVersion_v2(self, number: Any) -> int:
            number._obj.value = 12080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    assert find_driver(machine(tmp_path)) == Driver(8, "570.86.15", "12.8")
    monkeypatch.setattr(Library, "nvmlInit_v2", lambda _: 9)  # the driver is not loaded
    assert find_driver(tmp_path) == Driver(2, "535.129.03")


@pytest.mark.parametrize(
    ("version", "torch_cuda", "is_given", "told"),
    [
        (
            "535.129.03",
            "13.0",
            True,
            r"built for CUDA 13.0, cannot use: install a build of torch for CUDA 12 .*cu126\)",
        ),
        ("535.129.03", "13.0", True, "update the driver to 580 or newer"),
        ("535.129.03", None, True, "built for the CPU alone, cannot use: install a build of torch for CUDA 12"),
        (
            "580.65.06",
            None,
            True,
            r"install a build of torch for CUDA 13 \(.*torch==2[.\d]+\+cu130 --index-url \S+cu130\)\.",
        ),
        ("470.57.02", "13.0", True, "update the driver to 525 or newer"),
        ("535.129.03", "12.6", True, "see what `nvidia-smi` says"),
        ("535.129.03", "13.0", False, "not given to this container or job"),
        (None, "13.0", True, "a driver of unknown version.*look at nvidia-smi"),
    ],
)
def test_the_remedy_is_the_build_that_fits_the_driver(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    torch_cuda: str | None,
    is_given: bool,
    told: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    root = machine(tmp_path, version, is_given=is_given)
    with pytest.raises(ValueError, match=r"has 2 NVIDIA GPU\(s\).*" + told + ".*set DS_ACCELERATOR=cpu"):
        check_gpus(root)
    for name, value in (("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")):
        with monkeypatch.context() as told_to:
            told_to.setenv(name, value)
            check_gpus(root)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_segments_are_expandable_unless_the_environment_says_how_to_allocate(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    gpus.use_expandable_segments()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def test_the_launcher_doctor_and_training_stop_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus.main()
    assert capsys.readouterr().out == "0\n"
    found = Driver(8, "550.54.14", "12.4")
    monkeypatch.setattr(gpus, "find_driver", lambda _: found)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(SystemExit, match=r"8 NVIDIA GPU\(s\) \(driver 550.54.14, CUDA 12.4\)"):
        gpus.main()
    with pytest.raises(SystemExit, match=r"^error: this machine has 8 NVIDIA"):
        train.main([RECIPE])
    finding = next(f for f in checks.examine(Case(load_recipe(RECIPE), RECIPE, True)) if f.name == "accelerators")
    assert finding.state == "problem" and "driver 550.54.14" in finding.detail
    # What GPUs that are rented later need can be planned here all the same.
    assert checks.check_accelerators(Case(load_recipe(RECIPE), RECIPE, True, None, 80.0)).state == "ok"
