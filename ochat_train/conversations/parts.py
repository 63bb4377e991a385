"""Parts of files: whole records, cut out by the driver and parsed by a worker."""

import io
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson

from ochat_train.conversations.containers import explain, unreadable
from ochat_train.conversations.json_scan import SPACE, NotUtf8, not_valid, parse_json
from ochat_train.conversations.schema import Record


class Part(NamedTuple):
    """Records of one file, not parsed yet: `parse(file, offset, data, *options)`, a function below, parses them.

    `beside` names what is not read of the object around the records.
    """

    file: str
    offset: int
    data: bytes
    parse: Callable[..., Iterator[Record]]
    options: tuple[Any, ...] = ()
    beside: tuple[str, ...] = ()

    def records(self) -> Iterator[Record]:
        """Its records. Raises ValueError for an array's value that is not valid JSON, and a row that Python lacks."""
        return self.parse(self.file, self.offset, self.data, *self.options)


def left_out(file: str, offset: int, end: int, damage: str, *, is_page: bool = False) -> Part:
    """A record that is not read because of its damage."""
    return Part(file, offset, b"", parse_made, (end, damage, is_page))


def parse_made(
    file: str, offset: int, data: bytes, end: int, damage: str | None = None, is_page: bool = False
) -> Iterator[Record]:
    """A record whose fields the driver wrote as JSON, or which has none."""
    yield Record(file, offset, end, orjson.loads(data) if data else None, damage, is_page=is_page)


def parse_nothing(_file: str, _offset: int, _data: bytes) -> Iterator[Record]:
    """No record."""
    return iter(())


def parse_lines(file: str, offset: int, data: bytes, max_bytes: int) -> Iterator[Record]:
    """The records of whole lines; only at the end of the file the last has no line end."""
    for line in io.BytesIO(data):
        raw = line.lstrip(SPACE)
        start = offset + len(line) - len(raw)
        raw = raw.rstrip(SPACE)
        has_end = line.endswith(b"\n")
        if len(line) - has_end > max_bytes:
            yield Record(file, offset, offset + len(line) - has_end, None, "record_too_large")
        elif raw:
            yield _parse_value(file, start, raw, "not_json" if has_end else "truncated_record")
        offset += len(line)


def parse_value(file: str, offset: int, data: bytes, is_row: bool, in_rows: bool) -> Iterator[Record]:
    """A value of an array or of a row of objects, of which a damaged one costs only itself (`is_row`).

    in_rows: whether the record is the field `row` of the value, as the hub's viewer gives rows.
    """
    record = _parse_value(file, offset, data, "not_json" if is_row else "")
    fields = record.fields
    if in_rows and isinstance(fields, dict) and isinstance(fields.get("row"), dict):
        record = Record(file, offset, record.end, fields["row"], None, record.repairs)
    yield record


def _parse_value(file: str, offset: int, data: bytes, damage: str) -> Record:
    """The record of JSON. What is not JSON has this damage, or is an error where it is empty."""
    end = offset + len(data)
    try:
        fields, repairs = parse_json(data)
    except ValueError as error:
        is_utf8 = not isinstance(error, NotUtf8)
        if is_utf8 and not damage:
            raise not_valid(file, offset, error) from None
        if damage != "truncated_record" and not is_utf8:
            damage = "not_utf8"
        return Record(file, offset, end, None, damage, raw=data[:2000].decode("utf-8", "backslashreplace"))
    return Record(file, offset, end, fields, None, repairs)


def parse_slice(file: str, first: int, data: bytes) -> Iterator[Record]:
    """Rows of a table from row `first` on, as `scan_table` gives them."""
    import pyarrow  # here, since JSON and pages do without it

    try:
        rows = pyarrow.ipc.open_stream(data).read_next_batch().to_pylist()
    except Exception as error:  # times out of Python's range, types of other libraries
        found, remedy = f"a row from here on: {explain(error)}", "write the table again without that column"
        raise unreadable(file, first, found, remedy, unit="row") from None
    for row, fields in enumerate(rows, start=first):
        yield Record(file, row, row + 1, fields, is_row=True)


# ---- Saved ShareGPT pages ----

# Next.js writes no `<` or `>` into the attributes of this tag.
_NEXT_DATA = re.compile(rb"""<script\s[^<>]*?\bid\s*=\s*["']?__NEXT_DATA__["']?(?=[\s/>])[^<>]*>""", re.IGNORECASE)
_SCRIPT_END = re.compile(rb"</script", re.IGNORECASE)


def parse_page(file: str, _offset: int, data: bytes, num_bytes: int) -> Iterator[Record]:
    """A saved page of `num_bytes`, without the space before it."""
    fields, damage, repairs = _read_page(data)
    yield Record(file, 0, num_bytes, fields, damage, repairs, is_page=True)


def _read_page(data: bytes) -> tuple[dict[str, Any] | None, str | None, tuple[str, ...]]:
    """The fields of a saved page, the damage if there are none, and the repairs."""
    opening = _NEXT_DATA.search(data)
    if opening is None:
        return None, "no_next_data", ()
    closing = _SCRIPT_END.search(data, opening.end())
    try:
        page, repairs = parse_json(data[opening.end() : closing.start() if closing else len(data)])
    except ValueError as error:
        return None, "not_utf8" if isinstance(error, NotUtf8) else "not_json", ()
    try:
        page_props = page["props"]["pageProps"]
        content = page_props["content"]
    except (KeyError, TypeError):
        content = None
    if not isinstance(content, dict):
        return None, "no_page_content", repairs
    return {key: page_props[key] for key in ("id", "views") if key in page_props} | content, None, repairs
