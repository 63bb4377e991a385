"""What a check of doctor found."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. remedy: what to do about a warning or a problem."""

    name: str
    state: Literal["ok", "warning", "problem"]
    detail: str
    remedy: str = ""
