"""Starts training processes as forks of itself, which has imported all that they need: in a moment, not in seconds.

    python -m tests.e2e.zygote

Reads a request a line, as JSON, and answers with a line: what a process is to be, `{"argv", "program", "env", "cwd",
"output"}`, with its pid; a pid with its exit code, or null while it runs. `program` is Python that runs in the process.
"""

import os
import sys
from typing import Any

import datasets  # noqa: F401  # what takes the time: these two are imported late, by each process of a run
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numpy as np
import orjson

import ochat_train.train  # noqa: F401
from ochat_train.tokens.packing import pack_step


def main() -> None:
    """Answer until nobody asks."""
    pack_step(np.ones(1, np.int64), 8, 1, 8)  # its compiled code is loaded at the first call
    codes: dict[int, int | None] = {}
    for line in sys.stdin.buffer:
        request: Any = orjson.loads(line)
        if isinstance(request, dict):
            answer = os.fork() or _be(**request)
            codes[answer] = None
        else:
            if codes[request] is None:
                ended, status = os.waitpid(request, os.WNOHANG)
                codes[request] = os.waitstatus_to_exitcode(status) if ended else None
            answer = codes[request]
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()


def _be(argv: list[str], program: str, env: dict[str, str], cwd: str, output: str) -> int:
    """Run the program in this process, as `python -c` does. Does not return."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= env
    os.chdir(cwd)
    sys.argv = ["-c", *argv]
    code: Any = 0
    try:
        exec(program, {"__name__": "__main__"})
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
