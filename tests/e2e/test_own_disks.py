"""Two hosts that share no file system: two folders here, in each of which one of the two processes runs."""

import shutil
from pathlib import Path

import pytest
import torch

from ochat_train.training.checkpoint import find_checkpoints, read_checkpoint
from tests.e2e.harness import events, preprocess, run_two, tiny_recipe, weights, write_dump


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own_disks")
    write_dump(folder, 80)
    path = tiny_recipe(folder, checkpoint={"dir": "run", "every_steps": 1, "keep": 3})
    preprocess(path)
    return path


@pytest.fixture(scope="module")
def hosts(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """After three steps."""
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    for folder in folders:
        shutil.copytree(recipe_path.parent / "store", folder / "store")
    ended = run_two(recipe_path, folders, "train.max_steps=3")
    assert [code for code, _ in ended] == [0, 0], ended
    return folders


def copy_hosts(hosts: list[Path], folder: Path) -> list[Path]:
    return [shutil.copytree(host, folder / str(number)) for number, host in enumerate(hosts)]


def test_each_host_has_the_checkpoints_that_it_needs_and_one_has_the_rest(hosts: list[Path]) -> None:
    newest = [find_checkpoints(host / "run")[-1] for host in hosts]
    assert [path.name for path in newest] == ["step-00000003"] * 2
    names = [set(read_checkpoint(path).files) for path in newest]
    assert {name for name in names[0] if "random" in name} == {"random-00000.pt"}
    assert {name for name in names[1] if "random" in name} == {"random-00001.pt"}
    assert all("deepspeed/mp_rank_00_model_states.pt" in files for files in names)
    assert (hosts[0] / "run/metrics.jsonl").exists() and not (hosts[1] / "run/metrics.jsonl").exists()


# Prints which share of a store a rank verifies.
SAY_SHARES = """
import ochat_train.training.data as data
check_blocks = data.check_blocks
def say_share(store, files, *, part, parts, progress):
    print(f"share {part} of {parts}", flush=True)
    check_blocks(store, files, part=part, parts=parts, progress=progress)
data.check_blocks = say_share
"""


def test_hosts_that_share_a_store_share_its_verification_and_others_find_their_own_damage(
    recipe_path: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(recipe_path.parent / "store", folder / "store")
    damaged = folders[1] / "store/train/lengths.npy"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    ended = run_two(recipe_path, folders, code=SAY_SHARES)
    assert [code for code, _ in ended] == [1, 1]
    assert all("share 0 of 1\n" in output for _, output in ended)
    assert "error: token store store is damaged: train/lengths.npy has other bytes than were written" in ended[0][1]

    shutil.rmtree(folders[1] / "store")
    (folders[1] / "store").symlink_to(folders[0] / "store")
    files = sorted(path.name for path in (folders[0] / "store").iterdir())
    ended = run_two(recipe_path, folders, "data.max_tokens=128", code=SAY_SHARES)  # refused after it
    assert [next(line for line in output.splitlines() if "share" in line) for _, output in ended] == [
        "share 0 of 2",
        "share 1 of 2",
    ]
    assert sorted(path.name for path in (folders[0] / "store").iterdir()) == files


def test_a_checkpoint_that_one_host_lacks_or_has_damaged_is_passed_over_on_both(
    recipe_path: Path, hosts: list[Path], tmp_path: Path
) -> None:
    copies = copy_hosts(hosts, tmp_path)
    *_, second, third = find_checkpoints(copies[1] / "run")
    shutil.rmtree(third)
    (second / "random-00001.pt").unlink()
    (whole, _), (damaged, _) = [run_two(recipe_path, folders, "train.max_steps=5") for folders in (hosts, copies)]
    assert (whole[0], damaged[0]) == (0, 0), damaged
    assert "damaged: random-00001.pt is not there" in damaged[1]
    assert "step-00000003 is not on every node" in damaged[1]
    assert "falling back to step-00000001" in damaged[1]
    assert [event["step"] for event in events(copies[0] / "run", "step")] == [1, 2, 3, 4, 5]
    ours, theirs = (weights(folder / "run") for folder in (copies[0], hosts[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_number_of_processes_needs_the_files_of_all_hosts_in_one_place(
    recipe_path: Path, hosts: list[Path], tmp_path: Path
) -> None:
    copies = copy_hosts(hosts, tmp_path)
    ended = run_two(recipe_path, copies, "zero.stage=3", "train.max_steps=9")
    assert [code for code, _ in ended] == [1, 1]
    assert "the nodes do not share checkpoint.dir" in ended[0][1]


def test_weights_that_are_split_over_hosts_are_no_model(recipe_path: Path, hosts: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for host, folder in zip(hosts, folders, strict=True):
        shutil.copytree(host / "store", folder / "store")
    whole = ["checkpoint.models.every_steps=1", "train.max_steps=1"]
    ended = run_two(recipe_path, folders, "zero.stage=3", *whole)
    assert [code for code, _ in ended] == [1, 0]
    assert "error: training has ended, but run/model was not written: " in ended[0][1]
    assert "holds the weights of 1 of 2 processes" in ended[0][1]
    assert (folders[0] / "run/models/step-00000001/model.safetensors").exists()
    assert not list((folders[1] / "run/models").iterdir())
