"""What doctor checks: a table of checks, one function each, and `examine`, which runs them.

Checks that run a model are in trials.py, and the one that reads the base's weights is in rows.py.
"""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from deepspeed.launcher.runner import fetch_hostfile
from packaging.requirements import Requirement

from ochat_train.conversations.described import read_template
from ochat_train.doctor.case import GIB, Case, Finding
from ochat_train.doctor.rows import check_rows
from ochat_train.doctor.trials import check_fullest, check_isolation
from ochat_train.gpus import check_gpus, usable_gpus
from ochat_train.model.kernels import choose_kernels, require_compiler
from ochat_train.model.pretrained import DTYPES, load_config
from ochat_train.model.router import choose_router_loss
from ochat_train.model.text_part import text_part_of
from ochat_train.preprocess.job import check_moved
from ochat_train.recipe import moved_places, to_json
from ochat_train.tokens.plan import PlanTable, make_table
from ochat_train.tokens.store import SPLITS, TokenStore
from ochat_train.tokens.store_files import check_blocks
from ochat_train.tokens.tokenizer import load_tokenizer, require_model
from ochat_train.training.checkpoint import check_resume, find_candidates, newest_readable
from ochat_train.training.data import check_store, groups_of, make_run_plan, trained_rows
from ochat_train.training.questions import read_checks
from ochat_train.training.resources import (
    RESERVED,
    AvailableMemory,
    MemoryPlan,
    existing_parent,
    find_memory,
    nearest_that_fits,
    plan_disk,
    plan_memory,
    show_bytes,
    size_of,
)
from ochat_train.training.setup import (
    attention_of,
    check_options,
    deepspeed_configuration,
    peak_learning_rate,
    require_adapters,
)
from ochat_train.training.sinks import check_sinks
from ochat_train.training.speed import GPUS, Machine, measured_rate, predict, work_of

_REACHED_WITHIN_S = 3.0
_SSH_PORT = 22
_CPU_PROCESSES = 2  # that launch.sh starts on a machine without GPUs


# ------------------------------------------------------------------------------------------ this machine


def check_versions(_: Case) -> Finding:
    """The installed versions against the ranges of pyproject.toml, as the installed package states them."""
    install = "pip install -c constraints.txt -e ."
    try:
        stated = metadata.requires("ochat_train") or []
    except metadata.PackageNotFoundError:
        return Finding("warning", "ochat_train is not installed, so its tested ranges are unknown", install)
    shown, wrong = [f"python {platform.python_version()}"], []
    for requirement in map(Requirement, stated):
        # gpu: a package of another version is a problem, a missing one is not.
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        is_used = is_needed or (requirement.marker is not None and requirement.marker.evaluate({"extra": "gpu"}))
        if not is_used:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if is_needed:
                wrong.append(f"{requirement.name} is not installed, tested with {requirement.specifier}")
            continue
        if requirement.name in ("torch", "deepspeed", "transformers", "liger-kernel"):
            shown.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not in {requirement.specifier}")
    if wrong:
        return Finding("problem", "; ".join(wrong), install)
    return Finding("ok", f"{', '.join(shown)}: all packages are in the tested ranges")


def check_accelerators(case: Case) -> Finding:
    """Which accelerators are here, and whether the recipe's dtype suits them."""
    machine = find_memory()
    if case.gpu_gib is not None:
        machine = AvailableMemory(int(case.gpu_gib * GIB), machine.host_bytes, is_here=False)
    case.machine = machine
    here = f"{len(os.sched_getaffinity(0))} CPU cores, {show_bytes(machine.host_bytes)} of host memory free"
    if case.gpu_gib is None:
        check_gpus()
    if usable_gpus():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        here = f"{kinds}, {show_bytes(machine.gpu_bytes or 0)} each; {here}"
    else:
        here = f"no GPU here; {here}"
    if machine.gpu_bytes is not None and not machine.is_here:
        planned = (
            f"{case.gpu_name}, {show_bytes(machine.gpu_bytes)}" if case.gpu_name else show_bytes(machine.gpu_bytes)
        )
        detail = f"{here}; planned for GPUs that are not here: {planned} each"
        return Finding("ok", f"{detail}. Attention and kernels below are what this machine would use")
    if machine.gpu_bytes is None and case.recipe.model.dtype == "bfloat16":
        remedy = (
            "set model.dtype: float32 here, or name the GPUs that you will rent: --gpus 8 --gpu H100, or --gpu-gib N"
        )
        return Finding("warning", f"{here}; model.dtype bfloat16 is slow on a CPU", remedy)
    return Finding("ok", here)


def check_hosts(case: Case) -> Finding | None:
    """Whether each host of HOSTFILE has an address and, if ssh starts it, answers where ssh listens."""
    stated = os.environ.get("NUM_GPUS", "")
    per_host = int(stated) if stated.isdecimal() else None
    case.num_processes = case.num_gpus or per_host or usable_gpus() or _CPU_PROCESSES
    if not (hostfile := os.environ.get("HOSTFILE")):
        return None
    hosts = {host: min(slots, per_host or slots) for host, slots in read_hosts(hostfile).items()}
    case.num_processes = case.num_gpus or sum(hosts.values())
    by_ssh = "NODE_RANK" not in os.environ
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        failures = list(filter(None, pool.map(_try_host if by_ssh else _find_address, hosts)))
    if failures:
        remedy = "start the host and its sshd, or correct the name in HOSTFILE or ~/.ssh/config"
        return Finding("problem", "; ".join(failures), remedy)
    found = "answer" if by_ssh else "have an address"
    return Finding("ok", f"all {len(hosts)} hosts {found}, {sum(hosts.values())} processes")


def read_hosts(hostfile: str) -> dict[str, int]:
    """The hosts of a host file and their slots, as DeepSpeed reads them. Raises ValueError for a wrong file."""
    if not os.access(hostfile, os.R_OK):
        raise ValueError(f"HOSTFILE {hostfile} cannot be read")
    try:
        hosts: dict[str, int] = fetch_hostfile(hostfile)
    except ValueError as error:
        raise ValueError(f"HOSTFILE {hostfile}: {error}") from None
    if idle := [host for host, slots in hosts.items() if not slots]:
        raise ValueError(f"HOSTFILE {hostfile}: {idle[0]} has slots=0; give its number of GPUs, or leave it out")
    return hosts


def _find_address(host: str) -> str | None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host} has no address ({error})"
    return None


def _try_host(host: str) -> str | None:
    name, port = _ssh_address(host)
    try:
        with socket.create_connection((name, port), timeout=_REACHED_WITHIN_S):
            return None
    except OSError as error:
        return f"{host}: {name} port {port} does not answer within {_REACHED_WITHIN_S:g} s ({error})"


def _ssh_address(host: str) -> tuple[str, int]:
    """The name and the port that ssh would use, by its configuration; without ssh the host itself, and 22."""
    if shutil.which("ssh") is None:
        return host, _SSH_PORT
    printed = subprocess.run(["ssh", "-G", "--", host], capture_output=True, text=True).stdout
    settings = dict(line.split(" ", 1) for line in printed.splitlines() if " " in line)
    return settings.get("hostname", host), int(settings.get("port", _SSH_PORT))


def check_port(_: Case) -> Finding:
    """Whether MASTER_PORT, on which processes meet, is free here."""
    port = os.environ.get("MASTER_PORT")
    if port is None:
        return Finding("ok", "MASTER_PORT is not set: launch.sh takes a free one")
    remedy = "set MASTER_PORT to another, or leave it out on one machine"
    if not port.isdecimal() or not 1 <= int(port) <= 65_535:
        return Finding("problem", f"MASTER_PORT {port!r} is not a number from 1 to 65535", remedy)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            return Finding("problem", f"MASTER_PORT {port} cannot be used: {error.strerror}", remedy)
    return Finding("ok", f"MASTER_PORT {port} is free")


# ------------------------------------------------------------------------------------- tokenizer and base


def check_special_tokens(case: Case) -> Finding:
    """That each special token of the template is one id, and that text which spells one is not it."""
    tokenizer = case.tokenizer = load_tokenizer(case.recipe.tokenizer_name, read_template(case.recipe.template_json))
    name, ids = tokenizer.template.name, tokenizer.special_ids
    as_text = [len(found) for found in tokenizer.encode_texts(list(ids))]
    shown = ", ".join(
        f"{token} = {number}{' (added)' if token in tokenizer.added else ''}, as text {length} ids"
        for (token, number), length in zip(ids.items(), as_text, strict=True)
    )
    return Finding("ok", f"each of {name} is one id, and text that spells it is not: {shown}")


# ------------------------------------------------------------------------------ model, store and settings


def check_model(case: Case) -> None:
    """That its size is known, and that there is a model; this is a finding only if it is not so.

    Without the weights, which take long to fetch, all that follows from the size is checked all the same.
    """
    model = case.recipe.model
    case.config = load_config(model.base, model.config, case.tokenizer.num_ids)
    case.row_ids = trained_rows(case.recipe, case.tokenizer)
    case.size = size_of(case.recipe, case.config, len(case.row_ids))
    if model.base is not None:
        require_model(model.base)


def check_attention(case: Case) -> Finding:
    """Which attention a run here would use, and whether a small copy of the model is exact on packed batches."""
    case.attention, agreement = attention_of(case.recipe, case.config, case.device.type)
    model = case.recipe.model
    router = choose_router_loss(model.router_aux_loss_coef, case.config, is_frozen=model.lora is not None)
    detail = f"{case.attention.backend} ({case.attention.reason}); {agreement}{f'; {router}' if router else ''}"
    if part := text_part_of(case.config):
        detail += f"; {part}"
    if agreement.why_alone is None:
        return Finding("ok", detail)
    return Finding(
        "warning", detail, "expect a lower speed, and compare the step times of a few packing.tokens_per_gpu"
    )


def check_groups(case: Case) -> Finding | None:
    """Whether so many processes can share micro-batches as the recipe says; no finding where none does."""
    packing = case.recipe.packing
    case.num_groups = groups_of(case.recipe, case.num_processes)
    if packing.sequence_parallel == 1:
        return None
    shared = f"each {packing.sequence_parallel} of {case.num_processes:,} processes share micro-batches"
    return Finding("ok", f"{shared} of {packing.capacity:,} tokens")


def check_kernels(case: Case) -> Finding:
    """Which kernels a run here would use and how well they agree, and whether layers can be compiled."""
    model = case.recipe.model
    if model.compile:
        require_compiler(case.device.type, case.config)
    case.kernels = choose_kernels(
        model.kernels, case.config, device=case.device, dtype=DTYPES[model.dtype], is_compiled=model.compile
    )
    layers = "compiled" if model.compile else "not compiled"
    return Finding("ok", f"{case.kernels.kernels} ({case.kernels.reason}); layers are {layers}")


def check_token_store(case: Case) -> Finding:
    """That the store is there, was made for this recipe, is whole, and has something to train on."""
    path = Path(case.recipe.data.store)
    if not path.exists():
        state: Literal["warning", "problem"] = "warning" if case.is_quick else "problem"
        return Finding(state, f"data.store {path} does not exist yet", _PREPROCESS)
    try:
        train, held_out = (TokenStore(path, split, case.recipe.train.loss) for split in SPLITS)
        if case.recipe.data.verify and not case.is_quick:
            check_blocks(path, train.manifest.files)
        check_store(case.recipe, train.manifest, case.tokenizer)
        if not case.is_quick:  # launch.sh has just done it
            check_moved(case.recipe, train.manifest)
        plan = make_run_plan(case.recipe, train, case.config, case.num_processes)
        for split in (train, held_out):
            if len(split):
                split[len(split) - 1]  # the far end of the Arrow files
    except (OSError, ValueError, LookupError) as error:
        return Finding("problem", f"{path}: {error}", _PREPROCESS)
    case.store, case.plan = train, plan
    detail = (
        f"{path}, {train.fingerprint[:12]}: {len(train):,} examples, {int(train.lengths.sum()):,} tokens, weight "
        f"{float(train.weight_sums.sum()):,.6g}; {len(held_out):,} held out; longest {int(train.lengths.max()):,} of "
        f"{case.recipe.packing.capacity_in_words}"
    )
    return Finding("ok", detail)


def check_settings(case: Case) -> Finding:
    """The peak learning rate, DeepSpeed's configuration, and what the recipe's options need.

    Without a store a learning rate of auto is not known.
    """
    recipe = case.recipe
    deepspeed_configuration(recipe)
    check_sinks(recipe)
    read_checks(recipe.eval.checks)
    require_adapters(recipe, case.device)
    check_options(recipe, case.config, case.size, case.num_processes)
    if not hasattr(case, "store"):
        return Finding("ok", f"optim.lr {recipe.optim.lr}, zero.stage {recipe.zero.stage}")
    peak_lr, reason = peak_learning_rate(recipe, case.config, case.store.manifest, case.num_processes)
    return Finding("ok", f"peak learning rate {peak_lr:.3g} ({reason}), zero.stage {recipe.zero.stage}")


# ----------------------------------------------------------------------------------- memory, steps, disk


def check_memory(case: Case) -> Finding:
    """The memory of each process against what is there; with a table of all stages and numbers of GPUs."""
    config, machine = case.config, case.machine
    is_alone = hasattr(case, "attention") and case.attention.backend == "alone"
    plan = case.memory = plan_memory(case.recipe, machine, config, case.size, case.num_processes, is_alone=is_alone)
    there = (
        f"{show_bytes(machine.gpu_bytes)} of a GPU, of which {RESERVED:.0%} are left to CUDA"
        if machine.gpu_bytes is not None
        else f"{show_bytes(machine.host_bytes)} of host memory for {plan.num_processes} processes"
    )
    lines = [f"{show_bytes(plan.total(plan.own))} a process, {there}"]
    if plan.recipe.model.checkpointing == "auto":
        lines.append(f"model.checkpointing auto is {plan.policy} here")
    if not case.is_quick:
        lines += [*_memory_by_part(plan), *_memory_by_setting(plan)]
    if plan.fits(plan.own):
        return Finding("ok", "\n".join(lines))
    return Finding("problem", "\n".join(lines), nearest_that_fits(plan))


def _memory_by_part(plan: MemoryPlan) -> list[str]:
    setting = plan.own
    needs = plan.needs(setting)
    parts = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "fp32 master": needs.master,
        "optimizer": needs.optimizer,
        f"activations of {plan.recipe.packing.tokens_per_gpu:,} tokens": needs.activations,
        "a layer's backward": needs.layer,
        "logits chunk": needs.logits,
        "buffers": needs.buffers,
        "optimizer step": needs.step,
    }
    width = max(map(len, parts))
    lines = [f"{plan.size.num_weights:,} weights, {plan.size.num_trained:,} of them trained; by part:"]
    lines += [f"  {name:<{width}}  {show_bytes(size):>12}" for name, size in parts.items()]
    lines.append("the larger of layer and logits counts; with one micro-batch a step gradients come as activations go")
    if setting.offload or plan.is_on_gpu:
        offloaded = f", offloaded {show_bytes(needs.host)} a process" if setting.offload else ""
        lines.append(f"host memory: {show_bytes(plan.host_needs(setting))}, where the model is loaded once{offloaded}")
    return lines


def _memory_by_setting(plan: MemoryPlan) -> list[str]:
    """GiB a process for each number of GPUs and stage; + fits, the recipe's own in brackets."""
    numbers = sorted({1, 2, 4, 8, plan.num_processes} | {2**power for power in range(plan.num_processes.bit_length())})
    columns = [(stage, offload) for offload in (False, True) for stage in range(4) if stage or not offload]
    names = [f"   stage {stage}{' offload' if offload else ''}" for stage, offload in columns]
    lines = ["GiB a process; + fits, [] the recipe's:", f"  GPUs{''.join(names)}"]
    for number in (number for number in numbers if number % plan.recipe.packing.sequence_parallel == 0):
        line = f"  {number:<4,}"
        for (stage, offload), name in zip(columns, names, strict=True):
            setting = plan.setting(stage, offload=offload, num_processes=number)
            cell = f"{plan.total(setting) / GIB:,.1f}{'+' if plan.fits(setting) else ' '}"
            cell = f"[{cell}]" if setting == plan.own else f" {cell} "
            is_exact = stage > 0 or plan.recipe.model.dtype == "float32"
            if not is_exact or (stage == 3 and plan.size.num_quantised):  # the recipe refuses it
                cell = "-  "
            line += f"{cell:>{len(name)}}"
        lines.append(line.rstrip())
    return lines


def check_steps(case: Case) -> Finding:
    """Steps, and hours where a speed is known: of an earlier run, or of the micro-batch that was run."""
    table = make_table(case.plan)
    table = PlanTable(table.rows[: case.recipe.train.max_steps], table.shape)
    case.num_steps = table.num_steps
    num_processes = case.num_processes
    steps = f"{table.num_steps:,} steps on {num_processes} processes, {table.num_tokens:,} tokens"
    if not case.machine.is_here:
        return _predict_steps(case, table, steps)
    if measured := measured_rate(case.path, case.recipe):
        rate, origin = measured.tokens_per_s, f"as measured in {measured.num_steps:,} steps of checkpoint.dir"
    elif case.tokens_per_s is not None:
        rate = case.tokens_per_s
        origin = "as measured on the micro-batch above, without optimizer and communication"
    else:
        remedy = "train a few steps with train.max_steps=20, or ochat report plan RECIPE tokens_per_s=X"
        return Finding("warning", f"{steps}; hours are not known, since no speed was measured", remedy)
    seconds = table.num_tokens / (rate * num_processes)
    duration = f"{timedelta(seconds=round(seconds))} ({seconds * num_processes / 3600:.3g} GPU hours)"
    return Finding("ok", f"{steps} in {duration} at {rate:,.0f} tokens/s a process, {origin}")


def _predict_steps(case: Case, table: PlanTable, steps: str) -> Finding:
    """The hours on GPUs that are not here, modelled on known speeds, by each source of these."""
    gpu, work = GPUS.get(case.gpu_name or ""), None
    if gpu is not None and hasattr(case, "memory"):
        work = work_of(case.recipe, case.config.get_text_config(), table, case.memory.policy)
    if gpu is None or work is None:
        why = "these GPUs have no name; give --gpu" if gpu is None else "no speed of such a model is known"
        remedy = "measure it there with train.max_steps=20, or ask ochat report plan RECIPE tokens_per_s=X"
        return Finding("warning", f"{steps}; hours are not known, since {why}", remedy)
    found = predict(work, Machine(case.gpu_name or "", gpu.device, case.num_processes))
    lines = [
        f"{timedelta(seconds=round(one.seconds))} ({one.seconds * case.num_processes / 3600:.3g} GPU hours) at "
        f"{one.tokens_per_s:,.0f} tokens/s a GPU, modelled on {one.basis.source}, {one.basis.origin}"
        for one in found
    ]
    return Finding("ok", "\n".join([steps, *lines]))


def check_earlier_run(case: Case) -> Finding | None:
    """Whether the run in checkpoint.dir can go on under this recipe and store."""
    newest = newest_readable(find_candidates(Path(case.recipe.checkpoint.dir), case.recipe.checkpoint.resume))
    if newest is None:
        return None
    check_resume(
        newest,
        recipe=to_json(case.recipe),
        store_fingerprint=case.store.fingerprint,
        order=case.plan.order.digest,
        world_size=case.num_processes,
    )
    moved = moved_places(newest.state.recipe, to_json(case.recipe))
    compared = f"; moved, and compared by what it holds: {'; '.join(moved)}" if moved else ""
    return Finding("ok", f"training goes on from {newest.path}{compared}")


def check_disk(case: Case) -> Finding:
    """The disk that the run needs at most against what is free where its folder will be."""
    disk = plan_disk(case.recipe, case.size, case.num_steps)
    if disk.missing:
        return Finding("problem", disk.describe(), disk.remedy)
    if not (parent := existing_parent(disk.folder)).is_dir() or not os.access(parent, os.W_OK):
        return Finding("problem", f"{parent} is no folder that can be written", "name another folder in checkpoint.dir")
    return Finding("ok", disk.describe())


# -------------------------------------------------------------------------------------------- all checks


class Check(NamedTuple):
    """A check and what is found if it raises.

    run: None is no finding. remedy, state: of the finding if it raises. needs: fields of the case; a check is left out
    when they were not found, which is a finding of an earlier one. is_long: left out with --quick.
    """

    name: str
    run: Callable[[Case], Finding | None]
    remedy: str = "report it with this message"
    needs: tuple[str, ...] = ()
    state: Literal["warning", "problem"] = "problem"
    is_long: bool = False


_PREPROCESS = "run ochat preprocess with this recipe"
_TOKENIZER = "name a template that fits the base, or a tokenizer that is there"
_MODEL = "name a model that is there, or correct model.config"
_ATTENTION = "follow the message, set model.attention: auto, or take another model"
_GROUPS = "set packing.sequence_parallel, or NUM_GPUS, as the message says"
_KERNELS = "correct model.kernels or model.compile, or install what they need, as the message says"
_SETTINGS = "correct the recipe, or install what it needs, as the message says"
_MEMORY = "measure it with train.max_steps=2"
_RUNS = ("attention", "kernels")

CHECKS = (
    Check("versions", check_versions),
    Check("accelerators", check_accelerators, "install what the message names, or plan for other GPUs with --gpu-gib"),
    Check("hosts", check_hosts, "correct HOSTFILE, or leave it out on one machine"),
    Check("port", check_port),
    Check("special tokens", check_special_tokens, _TOKENIZER),
    Check("template rows", check_rows, needs=("tokenizer",)),
    Check("model", check_model, _MODEL, needs=("tokenizer",)),
    Check("attention", check_attention, _ATTENTION, needs=("size",)),
    Check("kernels", check_kernels, _KERNELS, needs=("size",)),
    Check("groups", check_groups, _GROUPS, needs=("num_processes",)),
    Check("store", check_token_store, _PREPROCESS, needs=("size", "num_groups")),
    Check("settings", check_settings, _SETTINGS, needs=("size",)),
    Check("resume", check_earlier_run, "go back to the old values, or name another checkpoint.dir", needs=("plan",)),
    Check("isolation", check_isolation, needs=_RUNS, is_long=True),
    Check("memory", check_memory, _MEMORY, needs=("size",), state="warning"),
    Check("fullest micro-batch", check_fullest, needs=(*_RUNS, "plan", "memory"), is_long=True),
    Check("steps", check_steps, needs=("plan",), is_long=True),
    Check("disk", check_disk, needs=("size",)),
)


def examine(case: Case) -> Iterator[Finding]:
    """Each finding in turn. A check that raises is a finding."""
    for check in CHECKS:
        if (check.is_long and case.is_quick) or not all(hasattr(case, name) for name in check.needs):
            continue
        try:
            finding = check.run(case)
        except Exception as error:  # of any kind: the other checks are worth having
            detail = str(error) if isinstance(error, ValueError) else f"the check raised {error!r}"
            finding = Finding(check.state, detail, check.remedy)
        if finding is not None:
            yield replace(finding, name=check.name)
