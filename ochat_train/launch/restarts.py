"""Training that is started again after a crash."""

from pathlib import Path
from typing import NamedTuple

from ochat_train.files import STEP_FOLDERS
from ochat_train.launch.commands import STOPPED, Commands, say
from ochat_train.launch.nodes import TrainingCommand

PAUSE_S = 10
_MOST_VAIN_TRIES = 2


def train_with_restarts(commands: Commands, command: TrainingCommand, run_dir: Path, max_restarts: int) -> int:
    """Train until it ends, is stopped, or crashed too often; returns its last exit code.

    Progress is a newer checkpoint: what was trained after the newest one is lost with the crash, however far it went.
    """
    num_restarts = num_vain_tries = 0
    newest = _newest_checkpoint(run_dir)
    while True:
        code = commands.train(command)
        if code in (0, STOPPED) or commands.num_signals:
            return code
        before, newest = newest, _newest_checkpoint(run_dir)
        num_vain_tries = 0 if newest.made_ns > before.made_ns else num_vain_tries + 1
        progress = f"the newest checkpoint is of step {newest.step}, before this try it was {before.step}"
        say(f"training ended with exit code {code}; {progress}")
        if not max_restarts:
            return code
        if num_vain_tries == _MOST_VAIN_TRIES:
            say("giving up: two tries in a row made no checkpoint")
            return code
        if num_restarts == max_restarts:
            say(f"giving up after MAX_RESTARTS={max_restarts}")
            return code
        num_restarts += 1
        say(f"restart {num_restarts} of at most {max_restarts} in {PAUSE_S} seconds")
        commands.pause(PAUSE_S)


class _Made(NamedTuple):
    """When a checkpoint was made, in ns, and of which step it is."""

    made_ns: int
    step: int


def _newest_checkpoint(run_dir: Path) -> _Made:
    """The complete checkpoint that was made last; 0, 0 without one. A run that goes on from an older step makes lower
    steps than there were."""
    manifests = run_dir.glob(f"{STEP_FOLDERS}/checkpoint.json")
    made = (_Made(path.stat().st_mtime_ns, int(path.parent.name.rpartition("-")[2])) for path in manifests)
    return max(made, default=_Made(0, 0))
