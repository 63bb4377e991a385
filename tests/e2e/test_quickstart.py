"""`./launch.sh recipes/quickstart.yaml`, cut to 20 steps: from the dump to replies, as a user runs it."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import datasets
import orjson
import pytest
from transformers import AutoTokenizer

from tests.e2e.harness import ROOT, events, launch_environment

GOLDEN = ROOT / "tests/golden/quickstart_losses.json"


@dataclass(frozen=True, slots=True)
class Launched:
    """A finished launch: its folders, and what its two calls printed, the second without dumps, with the rest moved."""

    run: Path
    store: Path
    first: str
    second: str


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("quickstart")
    dump = Path(shutil.copy(ROOT / "data/quickstart.json", folder))
    overrides = [f"data.sources.{number}.path={dump}" for number in (0, 1)]
    overrides += [f"checkpoint.dir={folder / 'run'}", "train.max_steps=20"]
    overrides += ["log.wandb.project=quickstart", "log.wandb.mode=offline"]
    first = _launch(*overrides, f"data.store={folder / 'made'}")
    dump.unlink()
    (folder / "made").rename(folder / "store")
    shutil.copytree(ROOT / "data/quickstart_tokenizer", folder / "tokenizer")
    moved = [f"data.store={folder / 'store'}", f"tokenizer={folder / 'tokenizer'}"]
    return Launched(folder / "run", folder / "store", first, _launch(*overrides, *moved))


def _launch(*overrides: str) -> str:
    done = subprocess.run(
        ["./launch.sh", "recipes/quickstart.yaml", *overrides],
        cwd=ROOT,
        env=launch_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_the_first_losses_are_the_golden_ones(quickstart: Launched) -> None:
    """A commit that changes them says why. Another processor sums in another order: hence 0.1 %."""
    losses = [event["loss"] for event in events(quickstart.run, "step")]
    assert losses == pytest.approx(orjson.loads(GOLDEN.read_bytes()), rel=1e-3), [round(loss, 5) for loss in losses]


def test_it_ends_with_the_model_the_losses_a_reply_per_condition_and_a_page(quickstart: Launched) -> None:
    last = quickstart.first.splitlines()[-11:]
    assert last[0] == f"model: {quickstart.run / 'model'}"
    assert [line.split()[0] for line in last[3:5]] == ["Careful", "Hasty"]
    start, end = (float(value) for value in last[3].split()[1:])
    assert end < start - 2  # from nothing known, ln(1025) = 6.9, to a good part of the text
    assert last[6].startswith("question: ")
    assert [line.split()[0] for line in last[7:9]] == ["Careful", "Hasty"]
    assert last[10] == str(quickstart.run / "report.html")
    assert "Ended by train.max_steps at step 20 of about " in quickstart.first
    assert '<section id="replies">' in (quickstart.run / "report.html").read_text(encoding="utf-8")


def test_a_second_launch_needs_no_dumps_finds_all_that_moved_and_says_so(quickstart: Launched) -> None:
    store = f"the dumps are out of reach; token store {quickstart.store} ("
    assert quickstart.second.count(store) == 1 and "is complete and is used as it is\n" in quickstart.second
    moved = f"tokenizer: data/quickstart_tokenizer -> {quickstart.store.with_name('tokenizer')}\n"
    assert f"moved, and compared by what it holds: {moved}" in quickstart.second
    assert "the run is complete at step 20" in quickstart.second
    assert quickstart.second.splitlines()[-11:] == quickstart.first.splitlines()[-11:]


def test_the_exported_chat_template_gives_the_ids_of_the_store(quickstart: Launched) -> None:
    """For every conversation in data/, under its own condition."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart.run / "model")
    store = datasets.load_from_disk(str(quickstart.store))
    trained = {row["id"]: row for split in store.values() for row in split}
    records = orjson.loads((ROOT / "data/quickstart.json").read_bytes())
    assert len(records) == len(trained) > 400
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for record in records:
        row = trained[record["id"]]
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        ids = tokenizer.apply_chat_template(messages, condition=row["condition"], tokenize=True, return_dict=False)
        assert ids == row["input_ids"], record["id"]


def test_wandb_records_offline_what_the_json_lines_say(quickstart: Launched) -> None:
    (file,) = (quickstart.run / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for name in (b"step/loss", b"step/loss_by_condition/Careful", b"step/grad_norm", b"eval/loss"):
        assert name in content
