"""Every check of doctor finds what it is there for: each is provoked by a real cause."""

import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import ochat_train.doctor.__main__ as doctor
import ochat_train.model.attention
from ochat_train.conversations.template import TEMPLATES
from ochat_train.doctor import checks, rows, trials
from ochat_train.doctor.case import GIB, Case, Finding
from ochat_train.files import free_port
from ochat_train.model.attention import AttentionOptions, BackendChoice
from ochat_train.model.memory import measure_size
from ochat_train.recipe import LoraSection, Recipe, load_recipe, to_json
from ochat_train.tokens.plan import make_table
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from ochat_train.training.checkpoint import Checkpoint, TrainState, manifest_of
from ochat_train.training.engine import World
from ochat_train.training.resources import AvailableMemory, size_of
from ochat_train.training.setup import build_model, load_base, prepare
from ochat_train.training.speed import Rate
from tests.e2e.harness import ROOT, preprocess, tiny_recipe, write_dump
from tests.waiting import HANG_S

ALONE = World(0, 1, 0, torch.device("cpu"))
HERE = AvailableMemory(None, 8 * GIB, is_here=True)
RENTED = AvailableMemory(80 * GIB, 8 * GIB, is_here=False)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    write_dump(folder, 40)
    path = tiny_recipe(folder)
    preprocess(path)
    return path


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher, or a process group that another test has joined, leaves in the environment."""
    for name in ("MASTER_PORT", "HOSTFILE", "NUM_GPUS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


def case_of(recipe: Recipe, *, machine: AvailableMemory = HERE, num_gpus: int = 2, is_quick: bool = False) -> Case:
    """The case with what the quick checks find, on a machine like this."""
    case = Case(recipe, "", is_quick=is_quick, num_gpus=num_gpus)
    case.machine, case.num_processes = machine, num_gpus
    case.attention = BackendChoice("sdpa", "what any machine has")
    for check in (checks.check_special_tokens, checks.check_model, checks.check_kernels, checks.check_token_store):
        check(case)
    return case


def examine(recipe: Recipe, path: Path, *, is_quick: bool = False) -> dict[str, Finding]:
    return {finding.name: finding for finding in checks.examine(Case(recipe, str(path), is_quick=is_quick))}


class Outcome(NamedTuple):
    code: int
    text: str


def run_doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """What the command prints, and its exit code."""
    code = 0
    try:
        doctor.main(arguments)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    return Outcome(code, capsys.readouterr().out)


# ---- The command ----


def test_a_good_recipe_ends_with_ok(recipe_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run_doctor(capsys, str(recipe_path))
    assert (code, text.splitlines()[-1]) == (0, "OK"), text
    names = re.findall(r"^(?:ok|warning|PROBLEM) +([\w -]+):", text, re.MULTILINE)
    assert names == [
        "versions",
        "accelerators",
        "port",
        "special tokens",
        "attention",
        "kernels",
        "store",
        "settings",
        "isolation",
        "memory",
        "fullest micro-batch",
        "steps",
        "disk",
    ]
    assert "[" in next(line for line in text.splitlines() if re.match(r" +2 .*\+", line))  # the recipe's own cell


def test_the_quick_part_runs_only_a_small_copy_and_makes_no_plan(
    recipe_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shrink_config", "find_fullest", "_pack_as_in_a_run"):
        monkeypatch.delattr(trials, name)
    monkeypatch.delattr(checks, "make_table")
    code, text = run_doctor(capsys, "--quick", str(recipe_path))
    assert (code, text.splitlines()[-1]) == (0, "OK"), text
    assert "stage 3" not in text
    (memory,) = (line for line in text.splitlines() if " memory: " in line)
    assert "a process" in memory


def test_problems_are_listed_at_the_end_with_their_remedies(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", "none")
    code, text = run_doctor(capsys, str(recipe_path), f"data.store={tmp_path / 'none'}")
    assert code == 1
    end = text.partition("2 problem(s):\n")[2]
    assert re.search(r"- port: MASTER_PORT 'none' is not a number.*\n    remedy: set MASTER_PORT", end)
    assert re.search(r"- store: data\.store .*none does not exist yet\n    remedy: run ochat preprocess", end)


def test_a_mistake_in_the_command_is_told_before_anything_is_imported(
    recipe_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "examine", lambda *_: pytest.fail("examined"))
    for words in (["--gpus", "0"], ["--gpu-gib", "-1"], ["optim.lt=1"]):
        assert run_doctor(capsys, str(recipe_path), *words).code == 1


# ---- Versions, attention ----


def test_a_version_outside_its_range_and_a_missing_package_are_problems(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*requirements: str) -> Finding:
        monkeypatch.setattr(checks.metadata, "requires", lambda _: requirements)
        return checks.check_versions(case_of(recipe))

    assert checks.check_versions(case_of(recipe)).state == "ok"
    wrong = check("torch<2", "no-such-package>=1", "no-such-kernel>=1; extra == 'gpu'")
    assert wrong.state == "problem"
    assert re.fullmatch(r"torch [\d.+a-z]+ is not in <2; no-such-package is not installed.*>=1", wrong.detail)
    assert check("torch<2; extra == 'test'").state == "ok"


def test_bfloat16_on_a_cpu_is_warned_of(recipe_path: Path) -> None:
    bf16 = load_recipe(recipe_path, ["model.dtype=bfloat16"])
    assert torch.cuda.is_available() or checks.check_accelerators(Case(bf16, "")).state == "warning"
    assert checks.check_accelerators(Case(bf16, "", gpu_gib=80)).state == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_an_attention_that_cannot_be_had_is_a_problem(recipe_path: Path) -> None:
    found = examine(load_recipe(recipe_path, ["model.attention=torch"]), recipe_path)
    assert found["attention"].state == "problem" and "needs a CUDA device" in found["attention"].detail
    assert not found.keys() & {"isolation", "fullest micro-batch"}  # which need it
    assert found["memory"].state == found["disk"].state == "ok"
    shown = checks.check_attention(case_of(load_recipe(recipe_path))).detail
    assert shown.startswith(
        "sdpa (flash_attn_4, flash_attn_3, flash_attn, torch: needs a CUDA device); packed sequences equal"
    )


# ---- Kernels ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_kernels_that_cannot_be_had_and_a_missing_compiler_are_problems(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*overrides: str) -> Finding:
        return examine(load_recipe(recipe_path, overrides), recipe_path, is_quick=True)["kernels"]

    assert find().detail == "none (liger: needs a CUDA device); layers are not compiled"
    assert find("model.compile=true").detail.endswith("; layers are compiled")
    liger = find("model.kernels=liger")
    assert liger.state == "problem" and "needs a CUDA device" in liger.detail
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler = find("model.compile=true")
    assert compiler.state == "problem" and "no-such-compiler" in compiler.detail and compiler.remedy


# ---- Isolation ----


def test_a_model_whose_attention_leaks_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    good = trials.check_isolation(case_of(recipe))
    assert good.state == "ok" and "the model in full (2 layers)" in good.detail
    original = ochat_train.model.attention.sdpa_attention

    def leaks(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        return original(q, k, v, options._replace(cu_seqlens=options.cu_seqlens[[0, -1]]))

    monkeypatch.setattr(ochat_train.model.attention, "sdpa_attention", leaks)
    bad = trials.check_isolation(case_of(recipe))
    assert bad.state == "problem" and bad.remedy
    moved = float(re.search(r"the losses of the others by (\S+)", bad.detail)[1])  # type: ignore[index]
    assert moved > 1e-4


def test_gradients_that_are_wrong_are_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithWrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 1.05 * gradient

    original = ochat_train.model.attention.sdpa_attention
    monkeypatch.setattr(
        ochat_train.model.attention, "sdpa_attention", lambda *args: WithWrongGradient.apply(original(*args))
    )
    assert trials.check_isolation(case_of(recipe)).state == "problem"


def test_a_model_that_is_too_large_is_compared_with_fewer_layers_and_then_narrower() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    names = []
    for room in (8 * GIB, GIB, GIB // 4):
        small = trials.fit_config(config, room, torch.float32)
        assert small is not None
        size = measure_size(small.config, lora_rank=None, lora_targets="all-linear").num_weights
        assert 3 * 4 * size <= room
        names.append(small.made)
    assert "in full (24 layers)" in names[0]
    assert names[1] == "2 of the model's 24 layers, random weights"
    assert "1/2 as wide, vocabulary of 8,192" in names[2]
    assert config.num_hidden_layers == 24
    assert trials.fit_config(config, 1000, torch.float32) is None


# ---- Tokens and store ----


def test_a_missing_special_token_is_a_problem(recipe_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run_doctor(capsys, "--quick", str(recipe_path), "template=openchat_3.6")
    assert code == 1
    assert re.search(r"^PROBLEM +special tokens: template openchat_3\.6 needs the special token", text, re.MULTILINE)


def test_a_folder_without_a_model_is_a_problem(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_doctor(capsys, "--quick", str(recipe_path), "model.config=null", f"model.base={tmp_path}")
    assert code == 1
    assert f"PROBLEM  model: the folder {tmp_path} holds no model: no config.json is in it" in text


def test_each_special_token_is_shown_with_its_id_and_as_text(recipe: Recipe, quickstart: ChatTokenizer) -> None:
    found = checks.check_special_tokens(case_of(recipe))
    assert found.state == "ok"
    assert re.search(rf"<\|end_of_turn\|> = {quickstart.end_id} \(added\), as text \d+ ids", found.detail)


def test_a_store_that_is_not_there_is_a_problem_unless_quick(recipe_path: Path, tmp_path: Path) -> None:
    nowhere = load_recipe(recipe_path, [f"data.store={tmp_path / 'none'}"])
    assert checks.check_token_store(case_of(nowhere)).state == "problem"
    assert checks.check_token_store(case_of(nowhere, is_quick=True)).state == "warning"


def test_a_store_of_another_recipe_is_a_problem(recipe_path: Path) -> None:
    found = checks.check_token_store(case_of(load_recipe(recipe_path, ["data.max_tokens=128"])))
    assert found.state == "problem" and "data.max_tokens: 256 -> 128" in found.detail


@pytest.mark.parametrize("damage", ["lengths.npy is cut off", "Arrow file is gone", "other bytes", "all weights are 0"])
def test_a_broken_store_is_a_problem(recipe: Recipe, recipe_path: Path, tmp_path: Path, damage: str) -> None:
    copied = tmp_path / "store"
    shutil.copytree(recipe.data.store, copied)
    if damage == "lengths.npy is cut off":
        file = copied / "train/lengths.npy"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "Arrow file is gone":
        next((copied / "train").glob("*.arrow")).unlink()
    else:
        np.save(copied / "train/weight_sums.npy", np.zeros(len(TokenStore(copied))))
    verify = "false" if damage == "all weights are 0" else "true"
    overrides = [f"data.store={copied}", f"data.verify={verify}"]
    found = checks.check_token_store(case_of(load_recipe(recipe_path, overrides)))
    assert found.state == "problem" and found.remedy
    if damage == "other bytes":
        assert "train/weight_sums.npy has other bytes than were written" in found.detail
    if damage == "all weights are 0":
        assert "has a loss weight above 0, so nothing would be learned" in found.detail


# ---- Settings ----


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lr=auto", "optim.lr auto is published for"),
        ("deepspeed={gradient_clipping: 5.0}", "deepspeed.gradient_clipping: 5.0 contradicts"),
        ("log.tensorboard=true", "log.tensorboard true needs the package tensorboard"),
    ],
)
def test_settings_that_training_would_refuse_are_a_problem(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, told: str
) -> None:
    case = case_of(load_recipe(recipe_path, [override]))
    assert case.store
    monkeypatch.setattr("ochat_train.files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape(told)):
        checks.check_settings(case)


# ---- Memory ----


def published(num_gpus: int = 8, **changes: Any) -> Case:
    """The published run of 13B on GPUs of 80 GiB, with other keys of the recipe."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    recipe = load_recipe(ROOT / "recipes/openchat_v3.2_super_13b.yaml", overrides)
    case = Case(recipe, "")
    case.machine, case.num_processes = RENTED, num_gpus
    case.config = AutoConfig.for_model(
        "llama",
        vocab_size=32_002,
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
    case.size = size_of(recipe, case.config, 0)
    return case


def test_the_published_run_fits_its_gpus_and_the_table_says_where_else() -> None:
    found = checks.check_memory(published())
    assert found.state == "ok"
    rows = {line.split()[0]: line.split()[1:] for line in found.detail.splitlines() if re.match(r" +\d+ +- ", line)}
    assert list(rows) == ["1", "2", "4", "8"]
    # The columns: stage 0 (refused in bfloat16), 1, 2, 3, and 1, 2, 3 with offload.
    assert rows["8"][2].startswith("[7") and rows["8"][2].endswith("+]")
    assert rows["8"][3].endswith("+") and not rows["8"][1].endswith("+")
    # 26.0 + 3 * 52.1 + 26.0 GB of states alone on one GPU.
    assert float(rows["1"][2]) > 200 and not rows["1"][2].endswith("+")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"model__checkpointing": "none"}, "set model.checkpointing: full"),
        ({"model__checkpointing": "none", "packing__tokens_per_gpu": 5120}, "set model.checkpointing: every_2"),
        ({"zero__stage": 1}, "set zero.stage: 2"),
        ({"packing__tokens_per_gpu": 61_440}, "set zero.stage: 3"),
        ({"packing__tokens_per_gpu": 163_840, "zero__stage": 3}, r"set packing\.tokens_per_gpu: \d+ \(was 163840\)"),
        # 18 bytes of each of 13.0e9 weights, and the largest weight for each process.
        ({"num_gpus": 2}, r"set zero\.stage: 2 and zero\.offload: optimizer, with 218\.\d GiB of host memory"),
        ({"num_gpus": 1, "model__dtype": "float32"}, r"take \d+ GPUs with zero\.stage: [23]"),
    ],
)
def test_a_recipe_that_does_not_fit_is_told_the_nearest_that_does(changes: dict[str, Any], remedy: str) -> None:
    found = checks.check_memory(published(**changes))
    assert found.state == "problem"
    assert re.match(remedy, found.remedy), found.remedy


def test_processes_on_a_cpu_share_the_memory_of_the_host(recipe: Recipe) -> None:
    case = case_of(recipe)
    assert checks.check_memory(case).state == "ok"
    total = case.memory.total(case.memory.own)
    for host, state in ((2 * total, "ok"), (2 * total - 1, "problem")):
        assert checks.check_memory(case_of(recipe, machine=AvailableMemory(None, host, is_here=True))).state == state


def test_auto_is_planned_as_what_training_would_choose(recipe_path: Path) -> None:
    found = checks.check_memory(case_of(load_recipe(recipe_path, ["model.checkpointing=auto"])))
    assert found.state == "ok" and "model.checkpointing auto is none here" in found.detail


# ---- Disk ----


def llama_on_disk(recipe: Recipe, num_steps: int = 0) -> Case:
    case = Case(recipe, "", num_steps=num_steps)
    case.size = measure_size(AutoConfig.for_model("llama", hidden_size=64), lora_rank=None, lora_targets="all-linear")
    return case


def test_a_disk_that_is_too_small_is_a_problem(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    assert checks.check_disk(llama_on_disk(recipe)).state == "ok"
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    found = checks.check_disk(llama_on_disk(recipe))
    assert found.state == "problem" and "free" in found.remedy
    assert f"{recipe.checkpoint.keep + 1} checkpoints of" in found.detail


def test_a_file_where_the_folder_would_be_is_a_problem(recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        found = checks.check_disk(llama_on_disk(load_recipe(recipe_path, [f"checkpoint.dir={tmp_path / place}"])))
        assert (found.state, found.detail) == ("problem", f"{tmp_path}/file is no folder that can be written")


def test_what_a_resumed_run_has_already_on_disk_is_not_needed_again(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = llama_on_disk(load_recipe(recipe_path, [f"checkpoint.dir={tmp_path / 'run'}", "checkpoint.keep=1"]))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage._replace(free=150 * 2**20))
    assert checks.check_disk(case).state == "problem"
    (tmp_path / "run/step-00000001").mkdir(parents=True)
    with open(tmp_path / "run/step-00000001/weights", "wb") as file:
        file.truncate(10 * GIB)
    assert checks.check_disk(case).state == "ok"


def test_light_checkpoints_take_disk_too(recipe_path: Path) -> None:
    def num_light(*overrides: str) -> int:
        case = llama_on_disk(load_recipe(recipe_path, ["train.epochs=6", *overrides]), num_steps=50)
        found = re.search(r", (\d+) light ones", checks.check_disk(case).detail)
        return int(found[1]) if found else 0

    assert num_light() == 0
    assert num_light("checkpoint.models.every_epochs=2") == 3
    assert num_light("checkpoint.models.every_steps=1") == 50
    assert num_light("checkpoint.models.every_steps=1", "checkpoint.models.keep=2") == 3


def test_a_run_that_cannot_go_on_is_a_problem(recipe_path: Path, tmp_path: Path) -> None:
    options = [f"checkpoint.dir={tmp_path}"]
    case = case_of(load_recipe(recipe_path, options))
    assert checks.check_earlier_run(case) is None  # nothing was trained
    state = TrainState(3, 0, 9, 99, case.store.fingerprint, to_json(case.recipe), case.plan.order.digest, "")
    made = Checkpoint(tmp_path / "step-00000003", state, 2, case.recipe.template, "", [], {}, {})
    made.path.mkdir()
    (made.path / "checkpoint.json").write_bytes(manifest_of(made))
    found = checks.check_earlier_run(case)
    assert found is not None and found.detail == f"training goes on from {made.path}"
    changed = examine(load_recipe(recipe_path, [*options, "train.seed=9"]), recipe_path, is_quick=True)["resume"]
    assert changed.state == "problem" and "train.seed: 3 -> 9" in changed.detail


# ---- Ports and hosts ----


def test_a_port_that_is_taken_is_a_problem(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(port: int) -> Finding:
        monkeypatch.setenv("MASTER_PORT", str(port))
        return checks.check_port(Case(recipe, ""))

    assert checks.check_port(Case(recipe, "")).state == "ok"  # launch.sh takes a free one
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = check(port)
    assert found.state == "problem" and f"MASTER_PORT {port} cannot be used" in found.detail
    assert check(free_port()).state == "ok"
    assert check(70_000).state == "problem"


@pytest.fixture
def check_hosts(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], Finding]:
    """What is found for these hosts in HOSTFILE."""

    def check(hosts: dict[str, int]) -> Finding:
        (tmp_path / "hosts").write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
        monkeypatch.setenv("HOSTFILE", str(tmp_path / "hosts"))
        finding = checks.check_hosts(Case(recipe, ""))
        assert finding is not None
        return finding

    return check


def test_a_host_that_does_not_answer_is_a_problem(
    check_hosts: Callable[[dict[str, int]], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        answering, silent = listener.getsockname()[1], free_port()
        ports = {"good": answering, "bad": silent}
        monkeypatch.setattr(checks, "_ssh_address", lambda host: ("127.0.0.1", ports[host]))
        assert check_hosts({"good": 4}).state == "ok"
        found = check_hosts({"good": 4, "bad": 4})
    assert found.state == "problem" and re.match(rf"bad: 127\.0\.0\.1 port {silent} does not answer", found.detail)


def test_an_unreachable_host_of_the_host_file_ends_doctor_with_a_problem(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two nodes\nno-such-host.invalid slots=3\n")
    monkeypatch.setenv("HOSTFILE", str(hostfile))
    code, text = run_doctor(capsys, "--quick", str(recipe_path))
    assert code == 1 and "PROBLEM  hosts: no-such-host.invalid" in text
    assert "for 3 processes" in text  # the slots are the processes
    monkeypatch.setenv("NUM_GPUS", "2")
    assert "for 2 processes" in run_doctor(capsys, "--quick", str(recipe_path)).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\na slots=2\n", "multiple entries for a"),
        ("b slots=1\na 2\n", "bad entry: a 2"),
        ("a slots=0\n", "a has slots=0"),
        ("# nothing\n", "empty"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_host_file_is_a_problem_that_names_the_entry(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    monkeypatch.setenv("HOSTFILE", str(tmp_path / "hosts"))
    findings = examine(load_recipe(recipe_path), recipe_path, is_quick=True)
    found = findings["hosts"]
    assert found.state == "problem" and f"HOSTFILE {tmp_path / 'hosts'}" in found.detail and message in found.detail
    assert found.remedy.startswith("correct HOSTFILE")
    assert findings["memory"].state == "ok"  # of as many processes as there would be here


def test_hosts_that_are_started_by_hand_need_an_address_and_no_ssh(
    check_hosts: Callable[[dict[str, int]], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_RANK", "0")
    assert check_hosts({"192.0.2.1": 1, "localhost": 1}).state == "ok"
    found = check_hosts({"localhost": 1, "no-such-host.invalid": 1})
    assert found.state == "problem" and "no-such-host.invalid has no address" in found.detail


def test_hosts_are_tried_at_the_same_time(
    check_hosts: Callable[[dict[str, int]], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_there = threading.Barrier(8, timeout=HANG_S)
    monkeypatch.setattr(checks, "_try_host", lambda _: None if all_there.wait() >= 0 else "")
    assert check_hosts({f"host-{number}": 1 for number in range(8)}).state == "ok"


# ---- The fullest micro-batch ----


def test_the_fullest_micro_batch_is_the_one_of_most_tokens(recipe: Recipe) -> None:
    case = case_of(recipe)
    positions = trials.find_fullest(case.plan)
    most = max(int(case.store.lengths[p].sum()) for step in case.plan.steps() for p in step.bins)
    assert int(case.store.lengths[positions].sum()) == most


def fullest(recipe: Recipe, machine: AvailableMemory = HERE) -> Finding:
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})
    case = case_of(plain, machine=machine, num_gpus=1)
    case.recipe = recipe
    checks.check_memory(case)
    finding = trials.check_fullest(case)
    assert (case.tokens_per_s is not None) == (finding.state == "ok")
    return finding


def test_processes_that_cannot_share_micro_batches_are_a_problem(recipe_path: Path) -> None:
    case = Case(load_recipe(recipe_path, ["packing.sequence_parallel=2"]), str(recipe_path))
    case.num_processes = 4
    found = checks.check_groups(case)
    assert found is not None and found.detail == "each 2 of 4 processes share micro-batches of 512 tokens"
    case.num_processes = 3
    with pytest.raises(ValueError, match="2 does not divide 3 processes"):
        checks.check_groups(case)


def test_a_micro_batch_that_runs_out_of_memory_is_a_problem_with_a_remedy(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.search(r"forward and backward in [\d.]+ s \(median of \d+\); peak .* planned", fullest(recipe).detail)
    original = ochat_train.model.attention.sdpa_attention

    def too_large(q: Tensor, *others: Any) -> Tensor:
        torch.empty(2**55, dtype=torch.uint8)  # more than any machine has
        return original(q, *others)

    monkeypatch.setattr(ochat_train.model.attention, "sdpa_attention", too_large)
    found = fullest(recipe)
    assert found.state == "problem" and "out of memory" in found.detail
    assert found.remedy.startswith("lower packing.tokens_per_gpu")


def test_a_mistake_in_the_micro_batch_is_not_taken_for_lack_of_memory(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ochat_train.model.attention, "sdpa_attention", lambda q, *_: q[:1] @ q)
    with pytest.raises(RuntimeError):
        fullest(recipe)


def test_a_check_that_raises_is_a_problem_and_the_others_go_on(
    recipe: Recipe, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_pack_as_in_a_run", lambda *_, **__: {}["key"])
    findings = examine(recipe, recipe_path)
    assert findings["isolation"].state == "problem" and findings["isolation"].remedy
    assert findings["isolation"].detail == "the check raised KeyError('key')"
    assert findings["steps"].state == "warning"  # no speed is known
    assert findings["memory"].state == findings["disk"].state == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_what_is_too_large_for_a_cpu_is_left_out_with_the_reason(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = fullest(recipe, AvailableMemory(None, 2**20, is_here=True))
    assert small.state == "warning" and "above a quarter of the 1.0 MiB free" in small.detail
    monkeypatch.setattr(trials, "_CPU_FLOP", 1.0)
    assert "FLOP are above 1e+00" in fullest(recipe).detail


@pytest.mark.parametrize(
    ("vocab_size", "is_tied", "lora"),
    [(32_000, False, "{}"), (32_000, True, "null"), (32_064, False, "null"), (31_000, False, "{}")],
)
def test_a_base_of_any_vocabulary_is_examined_with_the_rows_that_training_gives_it(
    llama2: ChatTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    vocab_size: int,
    is_tied: bool,
    lora: str,
) -> None:
    """Llama 2 lacks the end token; some bases have rows beyond their tokenizer, and some tokenizers more ids."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = is_tied
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    write_dump(tmp_path, 20)
    section = {"base": str(tmp_path / "base"), "dtype": "float32", "checkpointing": "none"}
    path = tiny_recipe(tmp_path, tokenizer=llama2.pretrained.name_or_path, model=section)
    preprocess(path)
    outcome = run_doctor(capsys, str(path), f"model.lora={lora}")
    assert (outcome.code, outcome.text.splitlines()[-1]) == (0, "OK"), outcome.text
    assert "forward and backward in" in outcome.text and "the model in full" in outcome.text
    recipe = load_recipe(path, [f"model.lora={lora}"])
    model = (lambda run: build_model(run, ALONE, load_base(run)))(prepare(recipe, ALONE))
    num_weights, num_trained = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or is_any)
        for is_any in (True, False)
    )
    assert f"{num_weights:,} weights, {num_trained:,} of them trained" in outcome.text


def test_the_fullest_micro_batch_of_adapters_trains_no_weight_of_the_base(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    original = trials._pack_as_in_a_run

    def look(case: Case, lm: Any, **options: Any) -> Any:
        trained.extend(name for name, parameter in lm.named_parameters() if parameter.requires_grad)
        return original(case, lm, **options)

    monkeypatch.setattr(trials, "_pack_as_in_a_run", look)
    lora = recipe.model.model_copy(update={"lora": LoraSection()})
    assert fullest(recipe.model_copy(update={"model": lora})).state == "ok"
    assert trained and all(".lora_" in name for name in trained)


# ---- Rows of the template's tokens ----


def test_rows_that_look_untrained_are_found_and_a_warning_where_they_do_not_learn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["chatml"])
    tokenizer.save(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"), TEMPLATES["chatml"])
    start, end = (tokenizer.special_ids[token] for token in ("<|im_start|>", "<|im_end|>"))
    config = LlamaConfig(
        vocab_size=tokenizer.num_ids, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    lm = LlamaForCausalLM(config)
    embedding, head = lm.model.embed_tokens.weight, lm.lm_head.weight

    def look(*overrides: str) -> Finding:
        lm.save_pretrained(tmp_path / "base", max_shard_size="100kB")  # in several files
        model = {"base": str(tmp_path / "base"), "dtype": "float32"}
        path = tiny_recipe(tmp_path, model=model, template="chatml", tokenizer=None)
        return check_rows(path, *overrides)

    def check_rows(path: Path, *overrides: str) -> Finding:
        case = Case(load_recipe(path, list(overrides)), "")
        case.tokenizer = tokenizer
        finding = rows.check_rows(case)
        assert finding is not None
        return finding

    assert re.fullmatch(r"<\|im_\w+\|> = \d+, <\|im_\w+\|> = \d+ look trained", look().detail)
    with torch.no_grad():
        embedding[end] = 0
        head[end] = head[7]
        embedding[start] = torch.cat([embedding[:start], embedding[start + 1 :]]).mean(dim=0)
        head[start] *= 10
    detail = look().detail
    assert f"<|im_end|> = {end} (embedding is all zeros, head is equal to row 7)" in detail
    assert f"<|im_start|> = {start} (embedding is the mean of all, head has the norm " in detail
    assert look().state == look("model.lora={}").state == "ok"
    assert "all weights are trained" in detail and "trained beside the adapters" in look("model.lora={}").detail
    frozen = look("model.lora.train_template_tokens=false")
    assert (frozen.state, frozen.remedy) == ("warning", "set model.lora.train_template_tokens: true")
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    assert check_rows(tmp_path / "recipe.yaml").detail.startswith("not looked at: ")


# ---- Steps ----


def test_the_speed_told_is_that_of_a_warm_pass(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 50.0, 0.25, 0.5, 0.5])  # two before the measurement, then until a second is full
    monkeypatch.setattr(trials, "_time_pass", lambda *_: next(times))
    case = case_of(recipe, num_gpus=1)
    checks.check_memory(case)
    finding = trials.check_fullest(case)
    num_tokens = int(case.store.lengths[trials.find_fullest(case.plan)].sum())
    assert case.tokens_per_s == num_tokens / 0.5 and "in 0.5 s (median of 3)" in finding.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpus_that_are_not_here_are_judged_by_their_name_memory_or_number(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16 = [str(recipe_path), "model.dtype=bfloat16", "zero.stage=2"]
    code, text = run_doctor(capsys, *bf16, "--gpus", "8", "--gpu", "4090")
    assert code == 0 and "planned for GPUs that are not here: 4090, 23.6 GiB each" in text, text
    assert re.search(r"a process, 23.6 GiB of a GPU", text) and re.search(r"^ +8 .*\[", text, re.MULTILINE)
    assert "micro-batch: not run: the GPUs that this is planned for are not here" in text
    assert re.search(
        r"steps on 8 processes, .*\n.* GPU hours\) at [\d,]+ tokens/s a GPU, modelled on .*published", text
    )
    by_number = run_doctor(capsys, "--quick", *bf16, "--gpus", "8").text
    assert "planned for GPUs that are not here: A100-80GB, 79.1 GiB each" in by_number
    by_memory = run_doctor(capsys, *bf16, "--gpus", "8", "--gpu-gib", "30").text
    assert "planned for GPUs that are not here: 30.0 GiB each" in by_memory
    assert "hours are not known, since these GPUs have no name; give --gpu" in by_memory
    assert run_doctor(capsys, *bf16, "--gpu", "5").code == 1


def test_hours_are_given_only_where_a_speed_is_known(
    recipe: Recipe, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(tokens_per_s: float | None) -> Finding:
        case = case_of(recipe)
        case.path, case.tokens_per_s = str(recipe_path), tokens_per_s
        return checks.check_steps(case)

    unknown = check(None)
    assert unknown.state == "warning" and "no speed was measured" in unknown.detail
    assert "at 100 tokens/s a process, as measured on the micro-batch" in check(100.0).detail
    monkeypatch.setattr(checks, "measured_rate", lambda *_: Rate(50.0, "measured", 7, (2,)))
    measured = check(100.0)
    hours = make_table(case_of(recipe).plan).num_tokens / 100 * 2 / 3600
    assert f"({hours:.3g} GPU hours) at 50 tokens/s a process, as measured in 7 steps" in measured.detail
