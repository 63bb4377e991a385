"""Where the numbers of a run go besides metrics.jsonl, when the recipe asks for it: Weights & Biases, TensorBoard."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ochat_train.files import require_packages
from ochat_train.recipe import Recipe, to_json

# The longest that a run waits for a wandb server: to start, and to finish.
_INIT_S, _FINISH_S = 10.0, 10.0


class Sink(Protocol):
    """Takes the numbers of a run. Whatever its methods raise, the run continues without it."""

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step."""

    def close(self, *, is_failed: bool) -> None:
        """Write what is pending; nothing is logged afterwards."""


def check_sinks(recipe: Recipe) -> None:
    """Raise ValueError when the recipe's log section needs a package that is not installed."""
    if recipe.log.tensorboard:
        require_packages("log.tensorboard true", "tensorboard", extra="tensorboard", remedy="set it to false")


def open_sinks(
    recipe: Recipe, run_dir: Path, start: int, earlier: Sequence[Mapping[str, Any]], *, is_branch: bool
) -> list[Sink]:
    """The sinks of a run that continues after step `start`; 0 for a new run. One that cannot be opened is reported.

    earlier: the run's lines up to there. is_branch: whether other steps with the numbers of those to come were logged.
    """
    wanted: dict[str, Callable[[], Sink]] = {}
    if recipe.log.wandb is not None:
        wanted["wandb"] = lambda: _Wandb(recipe, run_dir, start, earlier, is_branch=is_branch)
    if recipe.log.tensorboard:
        wanted["tensorboard"] = lambda: _TensorBoard(run_dir / "tensorboard", start)
    sinks = []
    for name, open_sink in wanted.items():
        try:
            sinks.append(open_sink())
        except Exception as error:  # of any kind, as in Metrics
            tqdm.write(f"WARNING: {name} takes no numbers ({error!r}); the run continues without it")
    return sinks


def flat_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, each by its path: the event first, then keys separated by slashes."""

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(f"{path}/{name}", inner)
        elif isinstance(value, int | float):
            numbers[path] = value

    numbers: dict[str, float] = {}
    walk(line["event"], line)
    return numbers


class _TensorBoard:
    """Writes TensorBoard event files into a folder."""

    name = "tensorboard"

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the extra, and slow to import

        # Hides what an earlier part of the run wrote about steps that a crash undid; for a new run, everything.
        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, is_failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run in wandb; offline on request, or when its server does not answer in time."""

    name = "wandb"

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        start: int,
        earlier: Sequence[Mapping[str, Any]],
        *,
        is_branch: bool,
    ) -> None:
        import wandb  # slow to import, and most runs do not ask for it

        section = recipe.log.wandb
        assert section is not None
        id_file = run_dir / "wandb_id"  # a resumed run continues the same wandb run
        is_new = start == 0 or not id_file.exists() or is_branch  # wandb takes no step twice
        if is_new:
            id_file.write_text(secrets.token_hex(4))
        options: dict[str, Any] = {
            "project": section.project,
            "entity": section.entity,
            "name": recipe.name,
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": to_json(recipe),
            "settings": wandb.Settings(init_timeout=_INIT_S, finish_timeout=_FINISH_S),
        }
        self._run = self._begin(section.mode, options)
        for line in earlier if is_new else ():
            if line["event"] in ("step", "eval"):
                self.log(line["step"], flat_numbers(line))

    def _begin(self, mode: str, options: dict[str, Any]) -> Any:
        import wandb

        if mode == "offline":
            return wandb.init(mode="offline", **options)
        try:
            return wandb.init(mode="online", **options)
        except wandb.errors.CommError as error:
            server, reason = wandb.setup().settings.base_url, " ".join(str(error).split())
            wandb.teardown()  # it keeps the id of the run that it failed to begin
            run = wandb.init(mode="offline", **options)
            tqdm.write(
                f"warning: the wandb server {server} cannot be reached ({reason}); the run continues without it. To "
                f"send the numbers later: wandb sync {Path(run.dir).parent}"
            )
            return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, is_failed: bool) -> None:
        self._run.finish(exit_code=int(is_failed))
