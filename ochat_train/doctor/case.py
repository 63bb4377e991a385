"""What the checks of doctor share: a recipe on this machine, what earlier checks found, and a finding."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ochat_train.model.attention import BackendChoice
from ochat_train.model.kernels import KernelChoice
from ochat_train.model.memory import ModelSize
from ochat_train.recipe import Recipe
from ochat_train.tokens.plan import RunPlan
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.resources import AvailableMemory, MemoryPlan

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. remedy: what to do about a warning or a problem. name: the check's, set by `examine`."""

    state: Literal["ok", "warning", "problem"]
    detail: str
    remedy: str = ""
    name: str = ""


@dataclass(slots=True)
class Case:
    """A recipe on this machine, and what the checks found, each field set by one check for those after it.

    path: the recipe's file. num_gpus: of the run; None: what launch.sh would start. gpu_gib: memory of each GPU, for
    GPUs that are not here; None: of those that are. gpu_name: what those are called in GPUS, if that is known. config:
    of transformers. row_ids: tokens whose rows are trained beside adapters. num_steps: of the plan; 0: not planned.
    tokens_per_s: of a process; None: not tried. num_groups: of processes that share
    micro-batches.
    """

    recipe: Recipe
    path: str
    is_quick: bool = False
    num_gpus: int | None = None
    gpu_gib: float | None = None
    gpu_name: str | None = None
    num_steps: int = 0
    tokens_per_s: float | None = None
    machine: AvailableMemory = field(init=False)
    num_processes: int = field(init=False)
    num_groups: int = field(init=False)
    tokenizer: ChatTokenizer = field(init=False)
    config: Any = field(init=False)
    row_ids: list[int] = field(init=False)
    size: ModelSize = field(init=False)
    attention: BackendChoice = field(init=False)
    kernels: KernelChoice = field(init=False)
    store: TokenStore = field(init=False)
    plan: RunPlan = field(init=False)
    memory: MemoryPlan = field(init=False)

    @property
    def device(self) -> torch.device:
        """The device on which models are tried."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
