"""What doctor checks of kernels and compiling."""

from typing import Any

import torch

from ochat_train.doctor.finding import Finding
from ochat_train.model.kernels import Kernels, choose_kernels, require_compiler
from ochat_train.model.pretrained import DTYPES
from ochat_train.recipe import Recipe


def check_kernels(recipe: Recipe, config: Any) -> tuple[Finding, Kernels]:
    """Which kernels a run here would take and how well they agree, and whether layers can be compiled; the kernels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if recipe.model.compile:
            require_compiler(device.type)
        choice = choose_kernels(
            recipe.model.kernels,
            config,
            device=device,
            dtype=DTYPES[recipe.model.dtype],
            is_compiled=recipe.model.compile,
        )
    except ValueError as error:
        remedy = "correct model.kernels or model.compile, or install what they need, as said"
        return Finding("kernels", "problem", str(error), remedy), "none"
    layers = "compiled" if recipe.model.compile else "not compiled"
    detail = f"{choice.kernels} ({choice.reason}); layers are {layers}"
    return Finding("kernels", "ok", detail), choice.kernels
