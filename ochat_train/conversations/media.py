"""Pictures, sound and video in a record: such a record is dropped, or keeps only its text."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ochat_train.conversations.fields import holds_something, is_plain

MEDIA_HINT = "data.media: text"

# Names of fields, of the record, a turn or a part, that hold media or names of media files.
_MEDIA_NAME = re.compile(
    r"(?:image|img|picture|photo|audio|video|media|pixel_value|inline_?data|file_?data)s?"
    r"(?:_?(?:base64|bytes|id|path|url|uri|file|name|filename))?s?",
    re.IGNORECASE,
)
_SURE_MEDIA_NAME = re.compile(r"(?:image|audio|video)s?(?:_?(?:base64|bytes|path|file))?s?", re.IGNORECASE)
_ABSENT = ("", "none", "null", "nan", "n/a", "no", "false", "0", "-1", "[]", "{}")
_MEDIA_FILE = re.compile(
    r"data:(?:image|audio|video)/|.*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|wav|mp3|flac|ogg|m4a|mp4|avi|mov|mkv|webm)"
    r"(?:[?#].*)?\Z",
    re.IGNORECASE | re.DOTALL,
)
_PLACEHOLDER = re.compile(r"<\|?(?:image|audio|video)(?:_\d+|_pad)?\|?>\n?|<(img|audio|video)>[^<>\n]+\.\w+</\1>\n?")
_PART_TYPES = frozenset(
    f"{before}{kind}{after}"
    for kind in ("image", "audio", "video", "file")
    for before in ("", "input_")
    for after in ("", "_url")
)


def find_media(fields: Mapping[str, Any], turns: Sequence[Any]) -> str:
    """The name of a field, of the record or of a turn, that holds media; empty where there is none.

    That is a field with a name of media, or any field with the name of a media file where a text has a placeholder such
    as <image>. A placeholder that contains a file name is returned as it is. Parts of texts are not searched.
    """
    objects = [fields, *(turn for turn in turns if isinstance(turn, dict))]
    for part in objects:
        if is_plain(part):
            continue
        for name, value in part.items():
            if _is_media_name(name) and _is_media(value, is_sure=_SURE_MEDIA_NAME.fullmatch(name) is not None):
                return str(name)
    texts = [text for part in objects for text in part.values() if isinstance(text, str) and "<" in text]
    for text in texts:
        if "</img>" in text or "</audio>" in text or "</video>" in text:
            for found in _PLACEHOLDER.finditer(text):
                if found[1]:
                    return found[0].strip()
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        is_file = bool(values) and all(isinstance(one, str) and _MEDIA_FILE.match(one) for one in values)
        is_named = _is_media_name(name) and holds_something(value)
        if (is_file or is_named) and any(map(_PLACEHOLDER.search, texts)):
            return name
    return ""


def is_media_type(part: Mapping[str, Any]) -> bool:
    """Whether the type of a part of a text is that of media."""
    return isinstance(part.get("type"), str) and part["type"] in _PART_TYPES


def is_media_part(part: Mapping[str, Any]) -> bool:
    """Whether a part of a text is media, by its type or by a field with media in it."""
    return is_media_type(part) or any(_is_media_name(name) and _is_media(part[name], is_sure=True) for name in part)


def remove_placeholders(text: str) -> str:
    """The text without placeholders for media: "<image>\\nHi" becomes "Hi"."""
    return _PLACEHOLDER.sub("", text)


def _is_media(value: Any, *, is_sure: bool) -> bool:
    """Whether a field with a name of media holds media, rather than text that describes them.

    is_sure: the name can mean nothing else, so any text is taken for a file's name.
    """
    if isinstance(value, dict):
        return holds_something(value)
    if isinstance(value, list):
        return any(_is_media(one, is_sure=is_sure) for one in value)
    if isinstance(value, str):
        return value.strip().lower() not in _ABSENT and (is_sure or _MEDIA_FILE.match(value) is not None)
    return isinstance(value, bytes) and bool(value)


@lru_cache(maxsize=4096)
def _is_media_name(name: str) -> bool:
    return _MEDIA_NAME.fullmatch(name) is not None
