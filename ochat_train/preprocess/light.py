"""Processes that only preprocess start without torch and pandas, which take them 2 CPU seconds to import.

transformers would import torch, which tokenizers do without except for .gguf files; and pyarrow pandas, to recognise
its arrays. Both look for them once. Whoever imports torch or pandas later gets them.
"""

import os
import sys
import warnings
from types import ModuleType

import pyarrow as pa


def without_torch() -> None:
    """Import transformers, unless that is done, as if there were no torch."""
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is none
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import transformers  # noqa: F401
    finally:
        del sys.modules["torch"]


def without_pandas() -> None:
    """Let pyarrow look for pandas, unless that is imported, as if it were too old."""
    if "pandas" in sys.modules:
        return
    sys.modules["pandas"] = pandas = ModuleType("pandas")
    pandas.__version__ = "0"  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(action="ignore"):
            pa.array([0])
    finally:
        del sys.modules["pandas"]
