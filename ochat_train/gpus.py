"""Which GPUs of this machine torch can use, and the remedy where it cannot use NVIDIA's. Imports nothing of ours."""

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

# The oldest Linux driver for the CUDA versions of a major number, newest first: "Minor Version Compatibility" in
# NVIDIA's CUDA Compatibility. With each, a build of torch of that CUDA; torch 2.11 to 2.13 have none for CUDA 11.
_CUDA_OF_DRIVER = ((580, 13, "cu130"), (525, 12, "cu126"), (450, 11, None))


class Driver(NamedTuple):
    """NVIDIA's driver and the GPUs that it has; version, and its own CUDA (13.0): None where they are not known."""

    num_gpus: int
    version: str | None
    cuda: str | None = None


def usable_gpus() -> int:
    """How many GPUs torch can use; 0 where DS_ACCELERATOR=cpu asks for the CPU.

    torch.cuda.device_count alone also counts those that a driver too old keeps it from using.
    """
    import torch  # seconds; the launcher asks in a process of its own

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count()


def check_gpus(root: Path = Path("/")) -> None:
    """Raise ValueError, with the remedy, where there are NVIDIA GPUs and torch cannot use them.

    DS_ACCELERATOR=cpu and an empty CUDA_VISIBLE_DEVICES (or -1) ask for the CPU. root: where /proc and /dev are.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    driver = find_driver(root)
    if driver is None or usable_gpus():
        return
    import torch

    version = f"driver {driver.version}" if driver.version else "a driver of unknown version"
    cuda = f", CUDA {driver.cuda}" if driver.cuda else ""
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    raise ValueError(
        f"this machine has {driver.num_gpus} NVIDIA GPU(s) ({version}{cuda}), which torch {torch.__version__}, built "
        f"for {built_for}, cannot use: {_remedy(driver, root)}. To use the CPU all the same, set "
        "DS_ACCELERATOR=cpu in the environment"
    )


def find_driver(root: Path = Path("/")) -> Driver | None:
    """The driver, by NVML, which comes with it, else by /proc/driver/nvidia and /dev; None without NVIDIA GPUs."""
    if (driver := _ask_nvml()) is not None:
        return driver
    listed = list((root / "proc/driver/nvidia/gpus").glob("*"))
    num_gpus = len(listed or [path for path in (root / "dev").glob("nvidia*") if path.name[6:].isdecimal()])
    if not num_gpus:
        return None
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"Kernel Module\D*?\s(\d+(?:\.\d+)+)", re.sub("x86_64|aarch64", "", text))
    return Driver(num_gpus, found and found[1])


def _ask_nvml() -> Driver | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        count, cuda, version = ctypes.c_uint(), ctypes.c_int(), ctypes.create_string_buffer(80)
        asked = (
            nvml.nvmlInit_v2()
            or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
            or nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(80))
            or nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        )
    except (OSError, AttributeError):  # not there, or too old to have one of these
        return None
    if asked != 0 or not count.value:
        return None
    return Driver(count.value, version.value.decode(), f"{cuda.value // 1000}.{cuda.value % 1000 // 10}")


def _remedy(driver: Driver, root: Path) -> str:
    import torch

    if driver.cuda is None and not (root / "dev/nvidiactl").exists():  # NVML does not answer either
        return "they are not given to this container or job; start it with them (docker run --gpus all, srun --gpus)"
    if driver.version is None:
        return "look at nvidia-smi for the driver's CUDA, and install a build of torch for that or an older one"
    major = int(driver.version.split(".")[0])
    cuda, build = next(((cuda, build) for oldest, cuda, build in _CUDA_OF_DRIVER if major >= oldest), (0, None))
    if build is None:
        return f"update the driver to {_CUDA_OF_DRIVER[1][0]} or newer; no tested torch has a build for this one"
    if torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) <= cuda:  # the driver is new enough
        return "see what `nvidia-smi` says; a driver that was updated is loaded only after a restart of the machine"
    newer = "" if cuda == _CUDA_OF_DRIVER[0][1] else f", or update the driver to {_CUDA_OF_DRIVER[0][0]} or newer"
    wheel = f"torch=={torch.__version__.partition('+')[0]}+{build} --index-url https://download.pytorch.org/whl/{build}"
    return f"install a build of torch for CUDA {cuda} ({sys.executable} -m pip install {wheel}){newer}"


def use_expandable_segments() -> None:
    """Let torch's allocator grow its segments on a GPU, unless the environment says how it allocates.

    The batches of each step have other sizes; blocks of fixed segments would leave gaps that no later one fits.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main() -> None:
    """Print how many GPUs torch can use; exits with the remedy where it cannot use those of the machine."""
    try:
        check_gpus()
    except ValueError as error:
        sys.exit(str(error))
    print(usable_gpus())
