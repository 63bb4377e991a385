"""The recipe: one YAML file that describes a whole run. `docs/keys.md` lists every key."""

from ochat_train.recipe.load import load_recipe, parse_arguments, piped_output, read_yaml, recipe_arguments
from ochat_train.recipe.mistakes import foreign_key
from ochat_train.recipe.resume import FREE_AT_RESUME, moved_places, refused_differences
from ochat_train.recipe.schema import (
    CheckpointSection,
    CheckSection,
    DataSection,
    EvalSourceSection,
    LoraSection,
    ModelSection,
    ModelsSection,
    OptimSection,
    RangeSection,
    Recipe,
    check_encoding,
    differences,
    known_keys,
    leaves,
    to_json,
)

__all__ = [
    "FREE_AT_RESUME",
    "CheckSection",
    "CheckpointSection",
    "DataSection",
    "EvalSourceSection",
    "LoraSection",
    "ModelSection",
    "ModelsSection",
    "OptimSection",
    "RangeSection",
    "Recipe",
    "check_encoding",
    "differences",
    "foreign_key",
    "known_keys",
    "leaves",
    "load_recipe",
    "moved_places",
    "parse_arguments",
    "piped_output",
    "read_yaml",
    "recipe_arguments",
    "refused_differences",
    "to_json",
]
