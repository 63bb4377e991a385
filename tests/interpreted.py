"""Runs a program twice, with functions compiled by numba and as plain Python."""

import os
import subprocess
import sys


def run_both_ways(program: str) -> list[str]:
    """The lines that the program prints, which are the same both ways."""
    printed = []
    for disabled in ("0", "1"):
        done = subprocess.run(
            # numpy warns of products that wrap, as they shall.
            [sys.executable, "-W", "ignore", "-c", f"import numba; print(numba.config.DISABLE_JIT)\n{program}"],
            env=os.environ | {"NUMBA_DISABLE_JIT": disabled},
            capture_output=True,
            text=True,
            check=True,
        )
        used, *lines = done.stdout.splitlines()
        assert used == disabled
        printed.append(lines)
    assert printed[0] == printed[1]
    return printed[0]
