"""The checks of a run: questions answered by the model in training under each condition, and their scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from tqdm import tqdm

from ochat_train.files import publish_file, step_name
from ochat_train.tokens.leaks import find_leaks
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.engine import Failed, gather_objects
from ochat_train.training.generate import GreedyDecoder, Prompt
from ochat_train.training.held_out import Interrupted
from ochat_train.training.interval import wilson_interval
from ochat_train.training.questions import Asked, first_question, score_answer


def name_leaks(asked: Sequence[Asked], store: TokenStore, tokenizer: ChatTokenizer) -> None:
    """Print which questions are among the prompts of the training data, a line for each check that has some."""
    leaks = find_leaks(store, (one.question for one in asked), tokenizer)
    for check in {one.check.name: one.check for one in asked}.values():
        questions = [first_question(chat) for chat in check.chats]
        if leaked := [question for question in questions if question in leaks]:
            print(
                f"WARNING: check {check.name}: {len(leaked):,} of {len(questions):,} questions are in the training "
                f"data, the first in {leaks[leaked[0]]}: {leaked[0][:200]!r}; what it measures is partly memory",
                flush=True,
            )


class _Scored(NamedTuple):
    """An answer. place: of its question among all. score: None where the function raised `error`."""

    place: int
    text: str
    is_truncated: bool
    score: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class CheckScore:
    """The mean score of a check under a condition, None without any, and its 95 % interval.

    num: answers that were scored. num_truncated: answers that were cut at max_new_tokens. num_failed: for which the
    function raised; they are not in the mean.
    """

    score: float | None
    interval_95: tuple[float, float] | None
    num: int
    num_truncated: int
    num_failed: int


@dataclass(frozen=True, slots=True)
class Checker:
    """Asks the questions of a run. folder: where the answers are kept, a folder for each step."""

    asked: Sequence[Asked]
    decoder: GreedyDecoder
    folder: Path

    def try_out(self) -> None:
        """Generate a token for the first question, on all ranks together. Raises Failed where the model cannot."""
        if not self.asked:
            return
        error = None
        try:
            list(self.decoder.answers([Prompt(self.asked[0].prompt, 1)], lambda _: None))
        except Interrupted:  # on all ranks; the loop hears the stop, too
            return
        except Exception as caught:  # of any kind: it is that of the model's code
            error = f"{type(caught).__name__}: {caught}".partition("\n")[0]
        if errors := [text for text in gather_objects(error) if text is not None]:
            raise Failed(
                f"eval.checks: the model does not generate answers ({errors[0]}); eval.checks=[] trains without checks"
            )

    def run(self, step: int) -> dict[str, Any] | None:
        """The scores, {check: {condition: fields of CheckScore}}, on every rank; None without checks.

        All ranks call it together. Writes the answers to folder/step-NNNNNNNN/CHECK.jsonl on the main rank. Raises
        Interrupted. A function that fails, and a folder that cannot be written, are named and end nothing.
        """
        if not self.asked:
            return None
        prompts = [Prompt(one.prompt, one.check.max_new_tokens) for one in self.asked]
        is_main = self.decoder.world.is_main
        with tqdm(total=len(prompts), unit=" answers", desc="checks", delay=1, leave=False, disable=not is_main) as bar:
            mine = [self._score(place, *answer) for place, answer in self.decoder.answers(prompts, bar.update)]
        scored = sorted(answer for of_rank in gather_objects(mine) for answer in of_rank)
        if is_main:
            for error in dict.fromkeys(answer.error for answer in scored if answer.error is not None):
                tqdm.write(f"WARNING: step {step}: {error}")
            try:
                self._write(step, scored)
            except OSError as error:
                tqdm.write(f"WARNING: step {step}: the answers of the checks could not be written: {error}")
        return self._summarize(scored)

    def _score(self, place: int, text: str, is_truncated: bool) -> _Scored:
        asked = self.asked[place]
        try:
            return _Scored(place, text, is_truncated, score_answer(asked.check, text, asked.number), None)
        except Exception as error:  # of any kind: it is the user's function
            named = f"check {asked.check.name} fails for answers, which are not counted: {error!r}"
            return _Scored(place, text, is_truncated, None, named)

    def _write(self, step: int, scored: Sequence[_Scored]) -> None:
        lines: dict[str, list[bytes]] = {}
        for answer in scored:
            asked = self.asked[answer.place]
            line = {"condition": asked.condition, "record": asked.check.records[asked.number]} | {
                "answer": answer.text,
                "score": answer.score,
                "truncated": answer.is_truncated,
                "error": answer.error,
            }
            lines.setdefault(asked.check.name, []).append(orjson.dumps(line))
        folder = self.folder / step_name(step)
        folder.mkdir(parents=True, exist_ok=True)
        for name, of_check in lines.items():
            with publish_file(folder / f"{name}.jsonl") as file:
                file.write(b"\n".join([*of_check, b""]))

    def _summarize(self, scored: Sequence[_Scored]) -> dict[str, Any]:
        groups: dict[tuple[str, str], list[_Scored]] = {}
        for answer in scored:
            asked = self.asked[answer.place]
            groups.setdefault((asked.check.name, asked.condition), []).append(answer)
        found: dict[str, Any] = {}
        for (name, condition), answers in groups.items():
            scores = [answer.score for answer in answers if answer.score is not None]
            mean = sum(scores) / len(scores) if scores else None
            found.setdefault(name, {})[condition] = asdict(
                CheckScore(
                    score=mean,
                    interval_95=None if mean is None else wilson_interval(mean, len(scores)),
                    num=len(scores),
                    num_truncated=sum(answer.is_truncated for answer in answers),
                    num_failed=len(answers) - len(scores),
                )
            )
        return found
