"""A request that is not served, as OpenAI's API says so."""

from typing import Any

import orjson

_TYPES = {401: "authentication_error", 404: "not_found_error", 405: "not_found_error", 413: "invalid_request_error"}


class Refusal(Exception):
    """Why a request is refused: an HTTP status, a message for its sender, and the field that is at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> bytes:
        """OpenAI's JSON of an error."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})
