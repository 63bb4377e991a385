"""Put into one folder what a bare GPU machine lacks: wheels, a small token store and its recipe.

    python -m benchmarks.gpu_kit.prepare                   needs a package registry; about a minute
    python -m benchmarks.gpu_kit.prepare --without-wheels  for a machine that lacks none, as for `run --preset cpu`

Run it in an environment of ochat_train: the versions of its packages are those that are fetched. The folder
benchmarks/gpu_kit/prepared/ is made anew each time. The command fails where a wheel does not fit the target, and where
the tree and the folder together are larger than may travel.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import yaml

from benchmarks.gpu_kit import PREPARED, ROOT

# What an image with torch, transformers and the usual packages of their users has no copy of.
LACKING = (
    *("deepspeed", "hjson", "liger-kernel", "bitsandbytes", "datasets", "dill", "multiprocess"),
    *("orjson", "pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"),
)
BUILT = ("deepspeed",)  # published as a source only; without its compiled parts it is pure Python
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
MOST_MIB = 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-wheels", action="store_true", help="the store and the recipe alone")
    parser.add_argument("--into", type=Path, default=PREPARED, metavar="FOLDER", help="instead of prepared/")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.into, ignore_errors=True)
    options.into.mkdir(parents=True)
    if not options.without_wheels:
        fetch_wheels(options.into / "wheels")
    make_store(options.into)
    size, tree = folder_bytes(options.into) / 2**20, tree_bytes() / 2**20
    print(f"{options.into}: {size:.1f} MiB, and the tree {tree:.1f} MiB")
    if size + tree > MOST_MIB:
        sys.exit(f"error: together {size + tree:.1f} MiB, and at most {MOST_MIB} MiB travel: leave wheels out")


def fetch_wheels(folder: Path) -> None:
    """The wheels of LACKING for the target, in the versions that are installed here."""
    versions = {name: metadata.version(name) for name in LACKING}
    for name, version in versions.items():
        if name in BUILT:
            # In this environment: building needs torch only to look at it.
            command = ["wheel", "--no-build-isolation", f"--wheel-dir={folder}"]
        else:
            platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
            target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
            command = ["download", *target, f"--dest={folder}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command, "--no-deps", "--quiet", f"{name}=={version}"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"error: no wheel of {name} {version} for Python {PYTHON} on x86-64:\n{done.stderr.strip()}")
    for wheel in sorted(folder.iterdir()):
        print(f"  {wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    # A wheel that was built here for this machine alone would fail there.
    if wrong := [wheel.name for wheel in folder.iterdir() if not fits_target(wheel.name)]:
        sys.exit(f"error: not for Python {PYTHON} on x86-64: {', '.join(wrong)}")


def fits_target(wheel: str) -> bool:
    """Whether a wheel of this name runs on the target."""
    python, abi, platform = wheel.removesuffix(".whl").split("-")[-3:]
    is_its_python = "cp312" in python or python.startswith("py3") or "py3" in python.split(".") or abi == "abi3"
    return is_its_python and (platform == "any" or "x86_64" in platform)


def make_store(into: Path) -> None:
    """The quickstart's token store, and its recipe in bfloat16 with steps as those of its golden losses."""
    recipe = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    recipe["name"] = "gpu_kit"
    recipe["data"]["store"] = str(into / "store")
    recipe["model"]["dtype"] = "bfloat16"
    recipe["zero"] = {"stage": 2}  # the quickstart's own is for fp32
    recipe["packing"]["grad_accum"] = 2  # the golden losses are of two processes
    del recipe["log"]["question"]
    file = into / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    subprocess.run([sys.executable, "-m", "ochat_train.preprocess", str(file)], cwd=ROOT, check=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def tree_bytes() -> int:
    """Bytes of the files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name for name in listed.decode().split("\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    main()
