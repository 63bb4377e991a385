"""Training that is started again after a crash."""

from pathlib import Path

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
    newest = _newest_step(run_dir)
    while True:
        code = commands.train(command)
        if code in (0, STOPPED) or commands.num_signals or not max_restarts:
            return code
        before, newest = newest, _newest_step(run_dir)
        num_vain_tries = 0 if newest > before else num_vain_tries + 1
        progress = f"the newest checkpoint is of step {newest}, before this try it was {before}"
        say(f"training ended with exit code {code}; {progress}")
        if num_vain_tries == _MOST_VAIN_TRIES:
            say("giving up: two tries in a row made no checkpoint")
            return code
        if num_restarts == max_restarts:
            say(f"giving up after MAX_RESTARTS={max_restarts}")
            return code
        num_restarts += 1
        say(f"restart {num_restarts} of at most {max_restarts} in {PAUSE_S} seconds")
        commands.pause(PAUSE_S)


def _newest_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in run_dir.glob(f"{STEP_FOLDERS}/checkpoint.json")]
    return max(steps, default=0)
