"""Compiled functions do what the plain ones do, and work where no cache can be written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.compiled import compiled


@compiled
def cumulative(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    total, sums = 0, np.empty_like(values)
    for index in range(len(values)):
        total += values[index]
        sums[index] = total
    return sums


def test_a_compiled_function_gives_what_the_plain_one_gives() -> None:
    values = np.array([3, -1, 4], np.int64)
    plain: Any = cumulative  # numba's dispatcher, which has the plain function
    assert cumulative(values).tolist() == plain.py_func(values).tolist() == [3, 2, 6]


# Whoever runs the tests may write everywhere, so that numba is told here that it finds no place.
WITHOUT_A_PLACE = """
import numba.core.caching as caching
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(lambda cls, *arguments: None)
from ochat_train.tokens.order import DataOrder
print(DataOrder(10, 0).examples(0, 0, 10).tolist())
try:
    import tests.test_compiled
    import numba
    numba.njit(cache=True)(tests.test_compiled.cumulative.py_func)
except RuntimeError as error:
    print(error)
"""


def test_without_a_place_for_the_cache_each_process_compiles_for_itself() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", WITHOUT_A_PLACE]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    from ochat_train.tokens.order import DataOrder

    first, second = done.stdout.splitlines()
    assert first == str(DataOrder(10, 0).examples(0, 0, 10).tolist())
    assert second.startswith("cannot cache function")  # what numba says of its own accord
