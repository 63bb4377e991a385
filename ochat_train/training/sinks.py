"""Where the numbers of a run go besides metrics.jsonl, when the recipe asks: Weights & Biases, TensorBoard."""

import importlib.util
import secrets
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from tqdm import tqdm

from ochat_train.recipe import Recipe, to_json

# A run waits for a wandb server for this long, and no longer: to see whether it answers, to begin and to end there.
_ANSWER_S, _INIT_S, _FINISH_S = 4.0, 10.0, 10.0


class Sink(Protocol):
    """Takes the numbers of a run. Whatever its methods raise, the run goes on without it."""

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take named numbers of a step."""

    def close(self, *, is_failed: bool) -> None:
        """Take no more."""


def check_sinks(recipe: Recipe) -> None:
    """Raise ValueError when what the recipe's log section asks for is not installed."""
    if recipe.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "log.tensorboard true needs the package tensorboard: pip install 'ochat_train[tensorboard]', or set it to "
            "false"
        )


def open_sinks(recipe: Recipe, run_dir: Path, start: int) -> list[Sink]:
    """The sinks of a run that goes on behind step `start`; 0: that begins."""
    sinks: list[Sink] = []
    if recipe.log.wandb is not None:
        sinks.append(_Wandb(recipe, run_dir, start))
    if recipe.log.tensorboard:
        sinks.append(_TensorBoard(run_dir / "tensorboard", start))
    return sinks


def flat_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, each by its path: the event in front, conditions behind a slash."""

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
    """Event files in a folder."""

    name = "tensorboard"

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the extra, and slow to import

        # What an earlier part of the run wrote of steps that a crash undid is hidden; if nothing is continued, all.
        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, is_failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run in wandb. No trouble with its server holds the training run up for long."""

    name = "wandb"

    def __init__(self, recipe: Recipe, run_dir: Path, start: int) -> None:
        import wandb  # slow to import, and most runs do not ask for it

        section = recipe.log.wandb
        assert section is not None
        id_file = run_dir / "wandb_id"  # a resumed run goes on in the same wandb run
        if start == 0 or not id_file.exists():
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
        if section.mode == "offline":
            self._run: Any = wandb.init(mode="offline", **options)
            return
        server = wandb.setup().settings.base_url
        trouble = _find_trouble(server)
        if trouble is None:
            try:
                self._run = wandb.init(mode="online", **options)
            except wandb.errors.CommError as error:
                trouble = " ".join(str(error).split())
                wandb.teardown()  # it holds on to the id of the run that it failed to begin
        if trouble is not None:
            self._run = wandb.init(mode="offline", **options)
            folder = Path(self._run.dir).parent
            tqdm.write(
                f"warning: the wandb server {server} cannot be reached ({trouble}); the run goes on without it. "
                f"To send the numbers later: wandb sync {folder}"
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, is_failed: bool) -> None:
        self._run.finish(exit_code=int(is_failed))


def _find_trouble(server: str) -> str | None:
    """Why an HTTP server cannot be reached; None if it answers."""
    answer: Future[str | None] = Future()

    def ask() -> None:
        try:
            urllib.request.urlopen(server, timeout=_ANSWER_S).close()
            answer.set_result(None)
        except urllib.error.HTTPError as error:  # an answer all the same, unless a proxy says that it finds no server
            answer.set_result(str(error) if error.code >= 500 else None)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            # Whose certificates are good is for wandb to say.
            answer.set_result(None if isinstance(reason, ssl.SSLError) else str(reason))

    Thread(target=ask, daemon=True).start()  # a thread, because looking up a name heeds no time limit
    try:
        return answer.result(_ANSWER_S)
    except TimeoutError:
        return f"no answer in {_ANSWER_S:g} s"
