"""API keys: read from the command line and the environment, compared in constant time, never shown."""

import hashlib
import hmac
import os
from collections.abc import Sequence

KEYS_VARIABLE = "OCHAT_TRAIN_API_KEYS"


class ApiKeys:
    """The keys of which a request needs one; without any, every request is allowed. Only their SHA-256 is kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: Sequence[str]) -> bool:
        """Whether the values of a request's Authorization headers are `Bearer KEY`, once.

        Takes as long for a wrong key as for a right one: digests have one length, and all are compared.
        """
        if not self._digests:
            return True
        scheme, _, given = (authorization[0] if len(authorization) == 1 else "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def read_keys(given: Sequence[str]) -> list[str]:
    """The keys of the command line and of the environment, each once. Raises ValueError, which shows none of them."""
    keys = list(dict.fromkeys([*given, *os.environ.get(KEYS_VARIABLE, "").split()]))
    if any(not key.isascii() or not key.isprintable() or not key or " " in key for key in keys):
        raise ValueError("an API key is empty, or has others than printable ASCII characters without spaces")
    return keys
