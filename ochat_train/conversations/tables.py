"""Tables, parquet files and Arrow streams: slices of rows as bytes, without making Python objects.

An Arrow stream is what `datasets` writes, into its cache and by `save_to_disk`. Arrow's other form, the IPC file, which
is also Feather 2, is not read.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from ochat_train.conversations.containers import ByteStream, Unreadable, explain, unreadable
from ochat_train.conversations.hub import Unreachable
from ochat_train.conversations.remote import RemoteFile

MESSAGE = frozenset(("message_id", "parent_id", "text", "role"))  # the columns of OpenAssistant's flat files
_BOMB_REMEDY = "write it as JSON lines if you trust it"


def scan_table(
    stream: ByteStream, columns: Sequence[str] | None, *, chunk_bytes: int, max_bytes: int
) -> Iterator[tuple[int, bytes | None]]:
    """(row, bytes) of slices of the table, in order, each an Arrow stream of about `chunk_bytes` from that row on.

    A row above `max_bytes` is a slice of its own, and has None. A table must have one of the `columns`; None takes any.

    Raises ValueError, with name and row, while iterating: for a table without the columns or without rows, for a
    damaged one and for a bomb.
    """
    import pyarrow  # here, since JSON and pages do without it

    row = num_bytes = 0
    try:
        for batch in _read_parquet(stream, columns) if stream.peek(4) == b"PAR1" else _read_arrow(stream, columns):
            batch.validate(full=True)  # buffers of a damaged file may point anywhere, and text may be no UTF-8
            num_bytes += batch.nbytes
            stream.refuse_bomb(num_bytes, stream.disk.size, _BOMB_REMEDY, unit="row")
            # In a batch in which a row may be too large, each stands alone.
            is_large = batch.nbytes > max_bytes
            num_rows = 1 if is_large else max(1, batch.num_rows * chunk_bytes // max(1, batch.nbytes))
            for start in range(0, batch.num_rows, num_rows):
                rows = batch.slice(start, num_rows)
                sink = pyarrow.BufferOutputStream()
                if rows.nbytes <= max_bytes:
                    with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
                        writer.write_batch(rows)
                yield row, sink.getvalue().to_pybytes() or None
                row += rows.num_rows
    except (Unreadable, Unreachable):
        raise
    except Exception as error:  # what Arrow makes of a damaged file is in no list
        remedy = "the file is damaged: fetch it again"
        raise unreadable(stream.name, row, f"reading stops here ({explain(error)})", remedy, unit="row") from error
    if not row:
        raise unreadable(stream.name, 0, "the table has no rows", "remove it, or fetch it again", unit="row")


def _read_parquet(stream: ByteStream, columns: Sequence[str] | None) -> Iterator[Any]:
    import pyarrow.parquet  # as in scan_table

    disk = stream.disk
    # not the defaults, which hold all columns of a row group
    if isinstance(disk, RemoteFile):
        source = pyarrow.PythonFile(disk, mode="r")
    else:
        source = pyarrow.OSFile(os.fsencode(disk.path))  # as text, Arrow would take no name that is not UTF-8
    file = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
    _check_columns(stream, file.schema_arrow, columns)
    num_rows = 0
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        stream.refuse_bomb(group.total_byte_size, disk.size, _BOMB_REMEDY, unit="row")
        batch_rows = min(256, max(1, (group.num_rows << 20) // max(1, group.total_byte_size)))  # about 1 MiB
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[index], use_threads=False):
            num_rows += batch.num_rows
            disk.num_read = disk.size * num_rows // file.metadata.num_rows
            yield batch


def _read_arrow(stream: ByteStream, columns: Sequence[str] | None) -> Iterator[Any]:
    import pyarrow  # as in scan_table

    reader = pyarrow.ipc.open_stream(pyarrow.PythonFile(stream, mode="r"))
    _check_columns(stream, reader.schema, columns)
    yield from reader


def _check_columns(stream: ByteStream, schema: Any, columns: Sequence[str] | None) -> None:
    if columns is not None and not set(schema.names) & set(columns) and not set(schema.names) >= MESSAGE:
        found = f"no column is named as turns are; there are: {', '.join(schema.names)[:200] or 'none'}"
        remedy = (
            f"rename the right one to one of {', '.join(columns)}, or name it in the source, as in "
            "fields: {turns: NAME} or fields: {question: NAME, answer: NAME}"
        )
        raise unreadable(stream.name, 0, found, remedy, unit="row")
