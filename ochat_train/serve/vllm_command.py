"""vLLM's own command, with a server that does not wait for the headers of a request for ever.

vLLM's workers import this module again as their main module, and what else that imports: so it imports next to nothing.
"""

import importlib
from typing import Any

from ochat_train.serve.process import with_header_timeout


def main() -> None:
    """Run the command with the arguments of this process."""
    protocols: Any = importlib.import_module("uvicorn.protocols.http.auto")
    protocols.AutoHTTPProtocol = with_header_timeout()  # uvicorn looks it up when vLLM's server starts
    importlib.import_module("vllm.entrypoints.cli.main").main()


if __name__ == "__main__":
    main()
