"""The arms of an ablation: recipes that differ in conditions, weights and sources alone, and train equally long."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from ochat_train.conversations.described import read_template
from ochat_train.model.pretrained import load_config
from ochat_train.recipe import Recipe, load_recipe, to_json
from ochat_train.tokens.plan import make_table
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import load_tokenizer
from ochat_train.training.data import make_run_plan


class Arm(NamedTuple):
    """What an arm keeps of the recipe's data."""

    about: str
    has_weights: bool
    has_conditions: bool
    is_good_only: bool = False


WHOLE = "both"
ARMS = {
    "all": Arm("all data plain: no condition, weight 1", False, False),
    "good": Arm("the good source only, plain", False, False, is_good_only=True),
    "weights": Arm("all data, weights only", True, False),
    "conditions": Arm("all data, conditions only", False, True),
    WHOLE: Arm("the recipe: conditions and weights", True, True),
}


@dataclass(frozen=True, slots=True)
class Ablation:
    """The recipe at `path` with overrides, whose arms are trained. equal: what they have alike, steps or tokens."""

    path: str
    overrides: Sequence[str]
    recipe: Recipe
    arms: Sequence[str]
    seeds: Sequence[int]
    equal: str

    @property
    def good_condition(self) -> str:
        """The condition of inference; the recipe's store is there."""
        return TokenStore(self.recipe.data.store, "eval").manifest.inference_condition

    @property
    def good_sources(self) -> frozenset[str]:
        """The names of the sources of that condition."""
        return frozenset(source.name for source in self.recipe.data.sources if source.condition == self.good_condition)

    def words(self, arm: str, seed: int, *, scale: float = 1.0, max_steps: int | None = None) -> list[str]:
        """The overrides that make the recipe an arm. scale: of the epochs of its sources."""
        recipe = self.recipe
        values: dict[str, Any] = {
            "name": f"{recipe.name}-{arm}-{seed}",
            "train.seed": seed,
            "checkpoint.dir": str(Path(recipe.checkpoint.dir) / f"{arm}-{seed}"),
        }
        if arm != WHOLE:
            values |= {"data.store": f"{recipe.data.store}-{arm}", "data.sources": self._sources(ARMS[arm], scale)}
        if max_steps is not None:
            values["train.max_steps"] = max_steps
        return [*self.overrides, *(f"{key}={orjson.dumps(value).decode()}" for key, value in values.items())]

    def _sources(self, arm: Arm, scale: float) -> list[dict[str, Any]]:
        sources: list[dict[str, Any]] = to_json(self.recipe)["data"]["sources"]
        for source in sources:
            source["epochs"] *= scale
            if not arm.has_conditions:
                source["condition"] = ""
            if not arm.has_weights:
                source |= {"weight": 1.0, "weight_field": None}
            if arm.is_good_only and source["name"] not in self.good_sources:
                source["weight"] = 0.0  # its records still need a source that takes them
        return sources

    def settle(self, arm: str, seed: int, num_processes: int) -> list[str]:
        """The overrides of an arm that trains as long as the recipe does; all stores are there.

        An epoch gets the tokens of the recipe's. With equal=steps the arm ends after as many steps as the recipe; where
        it would have fewer, since they are filled otherwise, its epochs are made longer.
        """
        whole = self.words(WHOLE, seed)
        if arm == WHOLE:
            return whole
        scale = _epoch_tokens(self.load(whole)) / _epoch_tokens(self.load(self.words(arm, seed)))
        if self.equal == "tokens":
            return self.words(arm, seed, scale=scale)
        most = count_steps(self.load(whole), num_processes)
        while (steps := count_steps(self.load(self.words(arm, seed, scale=scale)), num_processes)) < most:
            scale *= 1.001 * most / steps
        return self.words(arm, seed, scale=scale, max_steps=most)

    def load(self, words: Sequence[str]) -> Recipe:
        """The recipe under these overrides."""
        return load_recipe(self.path, words)


def _epoch_tokens(recipe: Recipe) -> float:
    store = TokenStore(recipe.data.store)
    epochs = {source.name: source.epochs for source in recipe.data.sources}
    return sum(
        epochs[name] * float(store.lengths[store.members(id)].sum()) for id, name in enumerate(store.manifest.sources)
    )


def count_steps(recipe: Recipe, num_processes: int) -> int:
    """The steps of the recipe's run on so many processes; its store is there."""
    tokenizer = load_tokenizer(recipe.tokenizer_name, read_template(recipe.template_json))
    config = load_config(recipe.model.base, recipe.model.config, tokenizer.num_ids)
    plan = make_run_plan(recipe, TokenStore(recipe.data.store, loss=recipe.train.loss), config, num_processes)
    return min(make_table(plan).num_steps, recipe.train.max_steps or sys.maxsize)


def read_ablation(path: str, words: Sequence[str]) -> Ablation:
    """The ablation of a command line. words: arms=, seeds=, equal=, and overrides. Raises ValueError."""
    own = {"arms": ",".join(ARMS), "seeds": "3", "equal": "steps"}
    overrides = [word for word in words if word.partition("=")[0] not in own]
    own |= dict(word.split("=", 1) for word in words if word not in overrides)
    arms = own["arms"].split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"arms={own['arms']}: there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if not own["seeds"].isdecimal() or not int(own["seeds"]):
        raise ValueError(f"seeds={own['seeds']} is not a number of seeds from 1 on, such as 3")
    if own["equal"] not in ("steps", "tokens"):
        raise ValueError(f"equal={own['equal']} is neither steps nor tokens")
    recipe = load_recipe(path, overrides)
    conditions = {source.condition for source in recipe.data.sources}
    if len(conditions) < 2 or None in conditions:
        raise ValueError("data.sources must each have a condition, and not all the same: they are what is compared")
    if not recipe.data.eval_fraction:
        raise ValueError("data.eval_fraction is 0, and the arms are compared on held-out answers; set it, as to 0.05")
    if own["equal"] == "tokens" and recipe.train.max_steps is not None:
        raise ValueError("equal=tokens trains whole epochs; leave train.max_steps out, or take equal=steps")
    if (Path(recipe.checkpoint.dir) / "metrics.jsonl").exists():
        raise ValueError(f"checkpoint.dir {recipe.checkpoint.dir} is the folder of one run; name another")
    seeds = range(recipe.train.seed, recipe.train.seed + int(own["seeds"]))
    return Ablation(path, overrides, recipe, [arm for arm in ARMS if arm in arms], seeds, own["equal"])
