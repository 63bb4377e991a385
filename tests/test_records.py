"""Every form of input is read whole, exactly and in bounded memory; nothing bad passes without its name."""

import csv
import gzip
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_train.conversations import containers, records
from ochat_train.conversations.records import Chunk, list_files, read_chunks
from ochat_train.conversations.schema import Record
from tests.waiting import HANG_S

SHARED_DATA = Path(__file__).resolve().parents[1] / "../shared/data"
MIB = 1 << 20

Write = Callable[[bytes], str]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A function that writes bytes to a file, always the same one, and returns its path."""
    path = tmp_path_factory.mktemp("dumps") / "dump"

    def write_file(data: bytes) -> str:
        path.write_bytes(data)
        return str(path)

    return write_file


def read(*files: str, chunk_bytes: int = MIB) -> list[Record]:
    return [record for chunk in read_chunks(files, chunk_bytes=chunk_bytes) for record in chunk.records()]


def fields_of(*files: str, chunk_bytes: int = MIB) -> list[Any]:
    return [record.fields for record in read(*files, chunk_bytes=chunk_bytes)]


def error_of(*files: str, chunk_bytes: int = MIB) -> str:
    with pytest.raises(ValueError) as raised:
        read(*files, chunk_bytes=chunk_bytes)
    return str(raised.value)


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))


def gzip_of(data: bytes) -> bytes:
    # Tests are named by these bytes, in several processes alike: so no time of now is in them, here and below.
    return gzip.compress(data, mtime=0)


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)  # with no time of now
    return file.getvalue()


def tar_of(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet_of(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def arrow_of(rows: list[dict[str, Any]], *, batch_rows: int = 1000) -> bytes:
    table = pa.Table.from_pylist(rows)
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return file.getvalue()


def page_of(id: str, text: str = "Hi") -> bytes:
    content = {"title": "t", "model": "Model: GPT-4", "items": [{"from": "human", "value": text}]}
    data = {"props": {"pageProps": {"id": id, "views": 3, "content": content}}}
    encoded = json.dumps(data).replace("</", "<\\/").encode()
    return b'<!DOCTYPE html><html><script id="__NEXT_DATA__" type="application/json">' + encoded + b"</script></html>"


def fields_of_page(id: str, text: str = "Hi") -> dict[str, Any]:
    items = [{"from": "human", "value": text}]
    return {"id": id, "views": 3, "title": "t", "model": "Model: GPT-4", "items": items}


# ---- Files under a path ----


def make_tree(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


def test_a_folder_is_every_file_of_a_known_suffix_below_it_sorted(tmp_path: Path) -> None:
    known = ["B.HTML", "a/x.htm", "a/y.json", "b.jsonl", "c.ndjson", "d.parquet", "e.arrow", "f.zip", "g.tar"]
    known += ["g.tar.gz", "g.tgz", "h.tar.zst", "i.json.gz", "j.jsonl.zst", "k.ndjson.gz", "l.html.zst"]
    others = ["README.md", "a_files/x.js", "a_files/y.png", "x.gz", ".x.json", ".git/y.json", "._z.html", "no_suffix"]
    make_tree(tmp_path, *known, *others)
    assert list_files(str(tmp_path)) == sorted(str(tmp_path / name) for name in known)


def test_a_file_is_itself_whatever_its_name(tmp_path: Path) -> None:
    make_tree(tmp_path, "odd", "[a].json", ".hidden")
    for name in ("odd", "[a].json", ".hidden"):
        assert list_files(str(tmp_path / name)) == [str(tmp_path / name)]


def test_a_glob_takes_files_as_they_are_and_folders_as_above_each_once(tmp_path: Path) -> None:
    make_tree(tmp_path, "a/x.json", "a/b/y.json", "a/b/notes.txt", "c.txt")
    assert list_files(str(tmp_path / "*")) == [str(tmp_path / name) for name in ("a/b/y.json", "a/x.json", "c.txt")]
    both = list_files(str(tmp_path / "a" / "**"))
    assert sorted(both) == [str(tmp_path / "a" / name) for name in ("b/notes.txt", "b/y.json", "x.json")]
    assert list_files(str(tmp_path / "**" / "*.json")) == [
        str(tmp_path / "a" / name) for name in ("b/y.json", "x.json")
    ]


def test_what_datasets_writes_beside_its_tables_is_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path, "dataset_dict.json", "train/data-00000-of-00001.arrow", "train/state.json")
    make_tree(tmp_path, "train/dataset_info.json", "train/more.json")
    assert list_files(str(tmp_path)) == [
        str(tmp_path / "train" / n) for n in ("data-00000-of-00001.arrow", "more.json")
    ]
    make_tree(tmp_path / "other", "state.json")
    assert list_files(str(tmp_path / "other")) == [str(tmp_path / "other" / "state.json")]


def test_nothing_found_says_what_was_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches '.*nowhere\*'; "):
        list_files(str(tmp_path / "nowhere*"))
    make_tree(tmp_path, "README.md", "x.js", ".DS_Store")
    with pytest.raises(ValueError, match=r"3 are left out.*\.jsonl"):
        list_files(str(tmp_path))


# ---- Forms ----

ROWS: list[dict[str, Any]] = [
    {"id": f"r{number}", "conversations": [{"from": "human", "value": "né 🙂\n" * number}], "n": number}
    for number in range(60)
]
LINES = b"\n".join(json.dumps(row).encode() for row in ROWS) + b"\n"
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
NUM_HALF = len(LINES) // 2

FORMS: dict[str, tuple[bytes, str]] = {
    "lines": (LINES, "JSON lines"),
    "array": (ARRAY, "JSON array"),
    "objects": (
        b"".join(json.dumps(row, indent=n % 3 or None).encode() + b"\n" * (n % 2) for n, row in enumerate(ROWS)),
        "JSON objects",
    ),
    "wrapper": (b'{"v": [1], "data": ' + ARRAY + b', "n": {}}\n', "JSON object with records in 'data'"),
    "rows of the hub's viewer": (
        json.dumps({"features": [{"i": 0}], "rows": [{"row": row} for row in ROWS]}).encode(),
        "JSON object with records in 'rows'",
    ),
    "gzip": (gzip_of(LINES), "JSON lines, gzip"),
    "gzip of many members": (
        gzip_of(ARRAY[:99]) + gzip_of(b"") + gzip_of(ARRAY[99:]) + gzip_of(b""),
        "JSON array, gzip",
    ),
    "zstd": (zstd(ARRAY), "JSON array, zstd"),
    "zstd of many frames": (
        b"\x5a\x2a\x4d\x18\3\0\0\0abc" + zstd(LINES[:NUM_HALF]) + b"\x50\x2a\x4d\x18\0\0\0\0" + zstd(LINES[NUM_HALF:]),
        "JSON lines, zstd",
    ),
    "zip": (zip_of({"a/b.jsonl": LINES}), "JSON lines in zip"),
    "stored zip": (zip_of({"a/b.json": ARRAY}, zipfile.ZIP_STORED), "JSON array in zip"),
    "gzip in zip": (zip_of({"a.json.gz": gzip_of(ARRAY)}), "JSON array, gzip in zip"),
    "tar": (tar_of({"a.jsonl": LINES}), "JSON lines in tar"),
    "old tar": (tar_of({"a.jsonl": LINES}, tarfile.USTAR_FORMAT), "JSON lines in tar"),
    "gzip tar": (gzip_of(tar_of({"a.json": ARRAY})), "JSON array in tar, gzip"),
    "zstd tar": (zstd(tar_of({"x" * 150 + ".json": ARRAY}, tarfile.GNU_FORMAT)), "JSON array in tar, zstd"),
    "zstd in gzip tar": (gzip_of(tar_of({"a.json.zst": zstd(ARRAY)})), "JSON array, zstd in tar, gzip"),
    "parquet": (parquet_of(ROWS), "parquet"),
    "zstd parquet of many groups": (parquet_of(ROWS, compression="zstd", row_group_size=7), "parquet"),
    "Arrow stream": (arrow_of(ROWS), "Arrow stream"),
    "Arrow stream of many batches": (arrow_of(ROWS, batch_rows=7), "Arrow stream"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_records_whatever_its_name_and_chunk_size(write: Write, name: str) -> None:
    data, form = FORMS[name]
    path = write(data)
    whole = read(path)
    assert [record.fields for record in whole] == ROWS
    assert all(record.damage is None and record.repairs == () and not record.is_page for record in whole)
    for chunk_bytes in (1, 1000, 20_000):
        chunks = list(read_chunks([path], chunk_bytes=chunk_bytes))
        assert chunks == list(read_chunks([path], chunk_bytes=chunk_bytes))
        assert [record for chunk in chunks for record in chunk.records()] == whole
        assert {chunk.form for chunk in chunks} == {form}
        progress = [chunk.bytes_read for chunk in chunks]
        assert progress == sorted(progress)
        assert progress[0] > 0
        assert progress[-1] == len(data)
        assert len(chunks) > {1: 30, 1000: 8, 20_000: 0}[chunk_bytes]
        assert all(size_of(chunk) <= 3 * chunk_bytes + 6000 for chunk in chunks)


def size_of(chunk: Chunk) -> int:
    return sum(len(part.data) for part in chunk.parts)


@pytest.mark.parametrize("name", FORMS)
def test_offsets_are_in_the_decompressed_text_and_rows_are_numbered(write: Write, name: str) -> None:
    data, form = FORMS[name]
    text = data if "obj" in form else ARRAY if "array" in form else LINES
    for number, record in enumerate(read(write(data), chunk_bytes=500)):
        if form.startswith("JSON"):
            value = json.loads(text[record.offset : record.end])
            assert value.get("row", value) == record.fields
        else:
            assert (record.offset, record.end) == (number, number + 1)


def test_a_chunk_comes_through_pickle_whole(write: Write, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_bytes(page_of("a"))
    for data, _ in FORMS.values():
        for chunk in read_chunks([write(data), str(page)], chunk_bytes=3000):
            sent = pickle.loads(pickle.dumps(chunk))
            assert sent == chunk
            assert list(sent.records()) == list(chunk.records())


def test_files_come_in_the_order_given_and_progress_counts_them_all(tmp_path: Path) -> None:
    paths = []
    for number, (data, _) in enumerate(FORMS.values()):
        paths.append(str(tmp_path / f"{number}"))
        Path(paths[-1]).write_bytes(data)
    paths.reverse()
    chunks = list(read_chunks(paths, chunk_bytes=5000))
    firsts = dict.fromkeys(path for chunk in chunks for path in paths if (chunk.file + "/").startswith(path + "/"))
    assert list(firsts) == paths
    progress = [chunk.bytes_read for chunk in chunks]
    assert progress == sorted(progress)
    assert progress[-1] == sum(len(data) for data, _ in FORMS.values())


def test_small_files_of_one_form_share_a_chunk_and_keep_their_names(tmp_path: Path) -> None:
    paths = []
    for number in range(60):
        paths.append(str(tmp_path / f"{number}.json"))
        Path(paths[-1]).write_bytes(b'[{"n": %d}]' % number if number < 30 else b'{"n": %d}\n' % number)
    for chunk_bytes, num_chunks in ((MIB, 2), (80, 8), (1, 60)):
        chunks = list(read_chunks(paths, chunk_bytes=chunk_bytes))
        assert abs(len(chunks) - num_chunks) <= 2
        assert [chunk.form for chunk in chunks] == sorted(chunk.form for chunk in chunks)
        got = [(record.file, record.offset, record.fields["n"]) for chunk in chunks for record in chunk.records()]
        assert got == [(path, int(number < 30), number) for number, path in enumerate(paths)]
        progress = [chunk.bytes_read for chunk in chunks]
        assert progress == sorted(progress)
        assert progress[-1] == sum(Path(path).stat().st_size for path in paths)


@pytest.mark.parametrize("name", FORMS)
def test_a_file_name_that_is_not_utf8_is_escaped(tmp_path: Path, name: str) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"d\xe9.json")
    with open(path, "wb") as file:
        file.write(FORMS[name][0])
    (listed,) = list_files(str(tmp_path))
    names = {record.file for record in read(listed)}
    assert {file[: len(str(tmp_path)) + 11] for file in names} == {f"{tmp_path}/d\\xe9.json"}
    with open(path, "wb") as file:
        file.write(b"?")
    assert error_of(listed).startswith(f"{tmp_path}/d\\xe9.json, byte 0: ")
    os.remove(path)
    assert error_of(listed).startswith(f"{tmp_path}/d\\xe9.json cannot be read: ")


def test_a_member_name_that_is_not_utf8_is_escaped(write: Write) -> None:
    path = write(tar_of({"d\udce9.json": b"[1]", "é.json": b"[2]"}, tarfile.GNU_FORMAT))
    assert [record.file for record in read(path)] == [f"{path}/d\\xe9.json", f"{path}/é.json"]
    path = write(tar_of({"d\udce9.json": b"?"}, tarfile.GNU_FORMAT))
    assert error_of(path).startswith(f"{path}/d\\xe9.json, byte 0: ")
    path = write(zip_of({"dXX.json": b"[1]"}).replace(b"dXX", b"d\xe9\xff"))
    (record,) = read(path)
    record.file.encode()


def test_a_dataset_that_datasets_saved_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert fields_of(*list_files(str(tmp_path / "saved"))) == ROWS


# ---- JSON arrays and lines ----


@pytest.mark.parametrize(("name", "num_records"), [("identity", 500), ("toolcall", 300)])
@pytest.mark.parametrize("chunk_bytes", [1000, MIB])
def test_real_files_are_read_as_json_reads_them(name: str, num_records: int, chunk_bytes: int) -> None:
    path = SHARED_DATA / f"{name}_sharegpt.json"
    raw = path.read_bytes()
    got = read(str(path), chunk_bytes=chunk_bytes)
    assert len(got) == num_records
    assert [record.fields for record in got] == json.loads(raw)
    for record in got:
        assert json.loads(raw[record.offset : record.end]) == record.fields


def test_array_and_lines_of_the_same_records_give_the_same_records(write: Write) -> None:
    values = [{"id": 1, "f": 0.1, "big": 123456789012345678901234567890, "t": 'é\n"\\'}, {}, {"a": [[], {}]}]
    encoded = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    from_lines = fields_of(write(b"\n".join(encoded)))
    assert fields_of(write(b"[" + b",".join(encoded) + b"]")) == from_lines
    assert len(from_lines) == 3


def test_offsets_point_at_records_after_multibyte_and_invalid_bytes(write: Write) -> None:
    first = '{"a": "日本 🙂 '.encode() + b'\xff\xfe"}'
    raw = b"\xef\xbb\xbf \n[" + first + b' ,\r\n\t{"b": 2}\n]\n'
    one, two = read(write(raw), chunk_bytes=3)
    assert raw[one.offset : one.end] == first
    assert raw[two.offset : two.end] == b'{"b": 2}'
    raw = b"\xef\xbb\xbf \n  " + first + b' \r\n\n \t\n  {"b": 2}'
    for chunk_bytes in (3, MIB):
        one, two = read(write(raw), chunk_bytes=chunk_bytes)
        assert raw[one.offset : one.end] == first
        assert raw[two.offset : two.end] == b'{"b": 2}'


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (rb"\ud83d", "\ufffd"),
        (rb"\uDE00 x", "\ufffd x"),
        (rb"\ud83d\ud83d\ude00", "\ufffd😀"),
        (rb"\ud83d\u0041", "\ufffdA"),
        (rb"\\ud83d \ud83d", "\\ud83d \ufffd"),
    ],
)
def test_surrogates_that_are_no_text_become_replacement_characters(
    write: Write, form: str, inside: bytes, expected: str
) -> None:
    raw = b'{"id": "' + inside + b'", "x' + inside + b'": [{"deep": "' + inside + b'"}]}'
    (record,) = read(write(b"[" + raw + b"]" if form == "array" else raw))
    assert record.fields == {"id": expected, "x" + expected: [{"deep": expected}]}
    assert record.repairs == ("surrogate_replaced",)


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"caf\xe9", b'\\" \xff NaN \\\\'])
def test_a_record_that_is_not_utf8_is_damage_and_the_others_are_read(write: Write, form: str, bad: bytes) -> None:
    records = [b'{"a": "x"}', b'{"a": "' + bad + b'", "b": NaN}', b'{"a": "y"}']
    first, damaged, last = read(write(b"[" + b",".join(records) + b"]" if form == "array" else b"\n".join(records)))
    assert (first.fields, last.fields) == ({"a": "x"}, {"a": "y"})
    assert (damaged.fields, damaged.damage, damaged.repairs) == (None, "not_utf8", ())


ENCODED = {
    "gb18030": "你好吗。我很好。谢谢你。今天天气不错",
    "cp1252": "Où est la bibliothèque ? Elle est à côté de l'école, près du café.",
    "cp1251": "Привет, как дела? Спасибо, хорошо.",
    "cp932": "こんにちは、元気ですか。今日はいい天気ですね",
}


@pytest.mark.parametrize("form", ["array", "lines", "lines, late"])
@pytest.mark.parametrize("encoding", [*ENCODED, "utf-16", "utf-16-le", "utf-32-be"])
def test_a_file_in_another_encoding_is_refused_with_its_name_and_read_by_it(
    write: Write, form: str, encoding: str
) -> None:
    text = ENCODED.get(encoding, ENCODED["gb18030"])
    ascii_only = '{"a": "x"}\n' * 200_000 if form == "lines, late" else ""
    objects = json.dumps([{"a": text}] * 3, ensure_ascii=False)
    path = write((objects if form == "array" else ascii_only + objects[1:-1].replace("}, ", "}\n")).encode(encoding))
    message = error_of(path)
    assert f"it is likely {encoding.replace('-', '_')}" in message.replace("-", "_")
    assert "as in encoding: " in message
    chunks = [record.fields for chunk in read_chunks([path], encoding=encoding) for record in chunk.records()]
    assert chunks[-3:] == [{"a": text}] * 3
    if "utf" not in encoding:
        with pytest.raises(ValueError, match=r"this is not ascii .* name the file's encoding"):
            list(read_chunks([path], encoding="ascii"))
        with pytest.raises(ValueError, match=r"this is not utf-8 .* name the file's encoding"):
            list(read_chunks([path], encoding="utf-8"))


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "big5", "euc_kr", "utf-16"])
@pytest.mark.parametrize("text", ["na\u00efve caf\u00e9", "\u201cx\u201d \u2013 y", ENCODED["gb18030"] * 30])
def test_a_file_in_utf8_is_not_read_in_another_encoding(write: Write, encoding: str, text: str) -> None:
    path = write(json.dumps({"a": text}, ensure_ascii=False).encode())
    with pytest.raises(ValueError, match=r"but this is UTF-8; give the file a source of its own|it starts with"):
        list(read_chunks([path], encoding=encoding))


@pytest.mark.parametrize("piece", [1, 7, 64, MIB])
def test_utf8_is_never_taken_for_another_encoding(write: Write, piece: int) -> None:
    for text in ENCODED.values():
        assert [record.damage for record in read(write(json.dumps({"a": text * 9}, ensure_ascii=False).encode()))] == [
            None
        ]
    mixed = [json.dumps({"a": ENCODED["cp1252"]}, ensure_ascii=False).encode(), b'{"a": "\xe9\xe9\xe9\xe9\xe9 \xe8"}']
    got = read(write(b"\n".join([*mixed, b""])), chunk_bytes=piece)
    assert [record.damage for record in got] == [None, "not_utf8"]
    _, cut = read(write(b'{"a": 1}\n' + '{"a": "\u4f60'.encode()[:-1]), chunk_bytes=piece)
    assert cut.damage == "truncated_record"


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize(
    ("raw", "expected", "repairs"),
    [
        (b'{"a": NaN, "b":[Infinity,-Infinity]}', {"a": math.nan, "b": [math.inf, -math.inf]}, ("nan_read",)),
        (rb'{"NaN": "NaN \" Infinity", "\\": NaN}', {"NaN": 'NaN " Infinity', "\\": math.nan}, ("nan_read",)),
        (
            rb'{"a": "\ud83d NaN", "b": NaN}',
            {"a": "\ufffd NaN", "b": math.nan},
            ("surrogate_replaced", "nan_read"),
        ),
        (b'{"a": "NaN"}', {"a": "NaN"}, ()),
        (b'{"a": 1e999, "b": -1E9999}', {"a": math.inf, "b": -math.inf}, ()),
        (b'{"id": 123456789012345678901234567890123}', {"id": 123456789012345678901234567890123}, ()),
    ],
)
def test_numbers_that_orjson_does_not_have_are_read_as_python_reads_them(
    write: Write, form: str, raw: bytes, expected: Any, repairs: tuple[str, ...]
) -> None:
    (record,) = read(write(b"[" + raw + b"]" if form == "array" else raw))
    assert repr(record.fields) == repr(expected)  # NaN equals nothing
    assert record.repairs == repairs


@pytest.mark.parametrize("bad", ["NaNs", "xNaN", "1NaN", "-NaN", "--Infinity", "+Infinity", "NaN NaN", "nan"])
def test_what_only_looks_like_such_a_number_is_not_json(write: Write, bad: str) -> None:
    assert [record.damage for record in read(write(b'{"a": %s}\n' % bad.encode()))] == ["not_json"]


@pytest.mark.parametrize("unit", [b'\\"', b'"', b"NaN", b"-", b"\\"])
def test_looking_for_them_costs_linear_time(write: Write, unit: bytes) -> None:
    path = write(b'{"a": NaN, "b": "' + unit * (2 * MIB // len(unit)) + b"}\n")
    start = time.process_time()
    assert [record.damage for record in read(path)] == ["not_json"]
    assert time.process_time() - start < 5


def test_whole_surrogate_pairs_and_escaped_backslashes_are_no_repair(write: Write) -> None:
    (record,) = read(write(rb'{"a": "\ud83d\ude00 \\ud83d \u00e9"}'))
    assert record.fields == {"a": "😀 \\ud83d é"}
    assert record.repairs == ()


@pytest.mark.parametrize("chunk_bytes", [1, 10, MIB])
def test_a_bad_line_is_damage_and_the_lines_after_it_are_read(write: Write, chunk_bytes: int) -> None:
    raw = b'{"a": 1}\n{"a": \n\n{"a": nan}\n{"a": 2} x\n{"a": 3}\n{"a": "cu'
    got = read(write(raw), chunk_bytes=chunk_bytes)
    assert [record.fields for record in got] == [{"a": 1}, None, None, None, {"a": 3}, None]
    damages = [None, "not_json", "not_json", "not_json", None, "truncated_record"]
    assert [record.damage for record in got] == damages
    places = [raw[record.offset : record.end] for record in got]
    assert places[1] == b'{"a":'
    assert places[5] == b'{"a": "cu'
    assert [record.raw for record in got] == [None, '{"a":', '{"a": nan}', '{"a": 2} x', None, '{"a": "cu']


def test_of_a_bad_line_the_beginning_is_shown_and_never_compared(write: Write) -> None:
    (_, record) = read(write(b'{"a": 1}\n{"\xff' + b"x" * 5000 + b"\n"))
    assert record.raw == '{"\\xff' + "x" * 1997
    assert record == Record(record.file, 9, 9 + 5003, None, "not_utf8")


def test_a_bad_last_line_with_a_line_end_is_not_called_truncated(write: Write) -> None:
    assert [record.damage for record in read(write(b'{"a": 1}\n{"a": \n'))] == [None, "not_json"]


def test_deep_nesting_is_bad_syntax(write: Write) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for chunk_bytes in (1000, MIB):
        lines = read(write(b'{"a": 1}\n{"a": ' + deep + b"}\n"), chunk_bytes=chunk_bytes)
        assert [record.damage for record in lines] == [None, "not_json"]
        assert "byte 10: " in error_of(write(b'[{"a": 1},' + deep + b"]"), chunk_bytes=chunk_bytes)


@pytest.mark.parametrize(
    ("raw", "offset", "found"),
    [
        (b"", 0, "empty"),
        (b" \n ", 3, "empty"),
        (b"\xef\xbb\xbf", 3, "empty"),
        (b" []", 1, "array is empty"),
        (b"[]x", 0, "array is empty"),
        (b"  x", 2, "starts with b'  x'"),
        (b"BZh91AY", 0, "decompress"),
        (b"ARROW1\0\0", 0, "an Arrow IPC file (Feather); of Arrow only streams are read"),
        (b"\x1f\x8b\x08", 0, "Truncated compressed stream"),
        (gzip_of(gzip_of(b"{}")), 0, "decompress"),
        (b'\xff\xfe[\x00"', 0, "UTF-8"),
        (b'{"a": \n1 2}\n', 0, "no line"),
        (b'{\n  "a": [\n    "x"\n  ]\n', 0, "no line"),
        (b'{"a": 1}{"b"', 8, "ends inside the object"),
        (b'{"a": 1}{"b": 1} 7', 17, "where an object should start"),
        (b'{"a": \n1}{"b" 1}', 9, "not valid JSON"),
        (b'{"train": [{"q": 1}], "test": [{"q": 2}]}', 30, "a second list of records, 'test', beside 'train'"),
        (b'{"data": [{"q": 1}]', 19, "the object around the records breaks here"),
        (b'{"a', 0, "no line"),
        (b'[{"a": 1}', 9, "ends inside"),
        (b'[{"a": 1},', 10, "ends inside"),
        (b'[{"a": 1}, {"b"', 11, "ends inside"),
        (b"[12", 1, "ends inside"),
        (b"[", 1, "ends inside"),
        (b'[{"a": 1},]', 10, "where a value should start"),
        (b"[,1]", 1, "where a value should start"),
        (b'[{"a": 1} {"b": 2}]', 10, "instead of ','"),
        (b'[{"a": 1}}', 9, "instead of ','"),
        (b'[{"a": 1},\n {"a" 1}, {"a": 2}]', 12, "not valid JSON"),
        (b"[1, tru, 2]", 4, "not valid JSON"),
        (b"[1, NaNs]", 7, "instead of ','"),
        (b'[1, "a\nb"]', 4, "not valid JSON"),
        (b"[1, {]]", 4, "not valid JSON"),
        (b"[1] 2", 4, "follows"),
        (b'[{"a": 1}]\n[{"a": 2}]\n', 11, "follows"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 7, MIB])
def test_a_file_that_cannot_be_read_names_file_byte_and_remedy(
    write: Write, raw: bytes, offset: int, found: str, chunk_bytes: int
) -> None:
    path = write(raw)
    message = error_of(path, chunk_bytes=chunk_bytes)
    assert message.startswith(f"{path}, byte {offset}: ")
    assert found in message
    assert ";" in message


def test_a_file_that_is_not_there_or_may_not_be_read_is_named(tmp_path: Path) -> None:
    assert "nowhere cannot be read: No such file" in error_of(str(tmp_path / "nowhere"))
    assert "cannot be read: Is a directory" in error_of(str(tmp_path))


@pytest.mark.parametrize("chunk_bytes", [1, 5, MIB])
def test_an_array_cut_at_any_byte_never_gives_a_wrong_record(write: Write, chunk_bytes: int) -> None:
    raw = '\ufeff [{"a": [1, {"b": "é\\\\"}], "c\\"": -1.5e3}, 123, true, "x]", [], null]\n'.encode()
    whole = fields_of(write(raw))
    assert len(whole) == 6
    closed = raw.rindex(b"]") + 1
    for num_bytes in range(len(raw)):
        path = write(raw[:num_bytes])
        if num_bytes >= closed:
            assert fields_of(path, chunk_bytes=chunk_bytes) == whole
        else:
            got: list[Any] = []
            with pytest.raises(ValueError):
                for chunk in read_chunks([path], chunk_bytes=chunk_bytes):
                    got.extend(record.fields for record in chunk.records())
            assert got == whole[: len(got)]


@pytest.mark.parametrize("chunk_bytes", [1, 5, MIB])
def test_lines_cut_at_any_byte_never_give_a_wrong_record(write: Write, chunk_bytes: int) -> None:
    raw = '{"a": "é"}\n{"b": [1, 2]}\n\n{"c": {}}'.encode()
    whole = fields_of(write(raw))
    for num_bytes in range(len(b'{"a": "\xc3\xa9"}'), len(raw) + 1):
        got = read(write(raw[:num_bytes]), chunk_bytes=chunk_bytes)
        good = [record.fields for record in got if record.damage is None]
        assert good == whole[: len(good)]
        assert [record.damage for record in got[len(good) :]] in ([], ["truncated_record"])


@pytest.mark.parametrize(
    ("raw", "form", "num_records"),
    [
        (b'{"conversations": [{"from": "human", "value": "x"}]}', "JSON lines", 1),
        (b'{"conversations": [{"human": "x", "gpt": "y"}]}', "JSON lines", 1),
        (b'{"data": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "JSON lines", 1),
        (b'{"data": [{"q": 1}, {"q": 2}]}\n{"data": [{"q": 1}]}\n', "JSON lines", 2),
        (b'{"conversations": [{"messages": []}, {"messages": []}]}', "JSON object with records in 'conversations'", 2),
        (b'{"a": \n{"b": 1}\n', "JSON lines", 2),
        (b'{"a": [\n{"b": 1}\n]}', "JSON objects", 1),
        (b'{"a": 1}, {"b": 1}\n{}\n', "JSON lines", 2),
    ],
)
def test_lines_rows_of_objects_and_wrappers_are_told_apart(
    write: Write, raw: bytes, form: str, num_records: int
) -> None:
    chunks = list(read_chunks([write(raw)]))
    assert [chunk.form for chunk in chunks] == [form]
    assert sum(1 for chunk in chunks for _ in chunk.records()) == num_records


@pytest.mark.parametrize("between", [b"", b" ", b"\n"])
@pytest.mark.parametrize(
    "broken", [b'{"b": tru}', b'{"b": "x}', b'{"b": "x" y"}', b'{"b": [1}', b'{"b" 1}}', b'{"b": "\xff"}']
)
def test_a_damaged_object_of_a_row_is_a_record_with_its_reason(write: Write, broken: bytes, between: bytes) -> None:
    raw = between.join([b'{"a":\n1}', broken, b'{"c": "}{"}', b'{"d": {"e": []}}'])
    records = read(write(raw))
    assert [record.fields for record in records] == [{"a": 1}, None, {"c": "}{"}, {"d": {"e": []}}]
    assert [record.damage for record in records] == [None, "not_utf8" if b"\xff" in broken else "not_json", None, None]
    assert raw[records[1].offset : records[1].end] == broken


def test_what_stands_beside_the_records_of_a_wrapper_is_named(write: Write) -> None:
    path = write(b'{"version": 2, "data": [{"messages": []}], "note": "", "meta": {"by": "x"}}')
    (chunk,) = read_chunks([path])
    assert list(chunk.beside()) == [(path, "version"), (path, "meta")]


def test_a_folder_of_pretty_printed_objects_shares_chunks(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}.json").write_text(json.dumps(ROWS[number % 60], indent=2))
    chunks = list(read_chunks(list_files(str(tmp_path))))
    assert [chunk.form for chunk in chunks] == ["JSON objects"]
    assert [record.fields for record in chunks[0].records()] == ROWS * 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=2, max_size=2), min_size=1
    ),
    st.sampled_from([("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")]),
    st.sampled_from([1, 20, MIB]),
)
def test_csv_and_tsv_read_back_equal_at_exact_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], kind: tuple[str, str], chunk_bytes: int
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=kind[1], quoting=csv.QUOTE_ALL).writerows([["human", "gpt"], *rows])
    raw = b"\xef\xbb\xbf" + text.getvalue().encode()
    path = tmp_path_factory.getbasetemp() / kind[0]
    path.write_bytes(raw)
    got = read(str(path), chunk_bytes=chunk_bytes)
    assert [record.fields for record in got] == [dict(zip(("human", "gpt"), row, strict=True)) for row in rows]
    for record, row in zip(got, rows, strict=True):
        place = io.StringIO(raw[record.offset : record.end].decode(), newline="")
        assert list(csv.reader(place, delimiter=kind[1])) == [row]


def test_a_bad_row_of_a_csv_costs_only_itself_and_an_open_quotation_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"q,a\r\n1,2\n\n1,2,3\n\xff,4\n5,6")
    assert [(record.damage, record.offset) for record in read(str(path))] == [
        (None, 5),
        ("bad_row", 10),
        ("not_utf8", 16),
        (None, 20),
    ]
    path.write_bytes(b'q,a\n1,"2\n3,4\n')
    assert error_of(str(path)).startswith(f"{path}, byte 4: the row that starts here")
    path.write_bytes(b"q,q\n1,2\n")
    assert "a name twice: q, q" in error_of(str(path))
    path.write_bytes(b"q,a\n")
    assert "the table has no rows" in error_of(str(path))


def test_plain_text_with_speakers_is_refused_with_what_to_write(write: Write) -> None:
    assert 'write a JSON line for each conversation, as in {"conversations"' in error_of(
        write(b"User: Hi\nthere\n\nAssistant: Hello\n")
    )


# ---- Limits ----


@pytest.mark.parametrize("chunk_bytes", [1, 30, 100, MIB])
def test_a_line_above_the_limit_is_left_out_and_the_others_are_read(
    write: Write, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 50)
    at_limit = b'{"a": "' + b"x" * 41 + b'"}'
    assert len(at_limit) == 50
    for end in (b"", b"\n"):
        raw = at_limit + b"\n" + at_limit + b" \n\n{}\n" + b"x" * 500 + b"\n" + at_limit + b"\n" + b"y" * 51 + end
        got = read(write(raw), chunk_bytes=chunk_bytes)
        assert [record.damage for record in got] == [None, *["record_too_large", None] * 2, "record_too_large"]
        lines = [raw[record.offset : record.end] for record in got]
        assert lines == [at_limit, at_limit + b" ", b"{}", b"x" * 500, at_limit, b"y" * 51]


@pytest.mark.parametrize("chunk_bytes", [1, 30, MIB])
def test_a_record_of_an_array_above_the_limit_is_an_error(
    write: Write, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 50)
    for value in (b'"' + b"x" * 48 + b'"', b"[" + b"1" * 48 + b"]"):
        assert fields_of(write(b"[1," + value + b",2]"), chunk_bytes=chunk_bytes) == [1, orjson.loads(value), 2]
        longer = value[:1] + b"1" + value[1:]
        path = write(b"[1," + longer + b",2]")
        message = error_of(path, chunk_bytes=chunk_bytes)
        assert message.startswith(f"{path}, byte 3: the record that starts here is above 50 bytes")


def test_a_page_above_the_limit_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of("a")
    paths = [str(tmp_path / name) for name in ("a.html", "b.html")]
    Path(paths[0]).write_bytes(page)
    Path(paths[1]).write_bytes(page + b" ")
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", len(page))
    fits, too_large = read(*paths)
    assert fits.damage is None
    assert too_large == Record(paths[1], 0, len(page) + 1, None, "record_too_large", is_page=True)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, MIB])
def test_a_row_above_the_limit_is_damage(write: Write, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 2000)
    rows = [{"items": [{"from": "human", "value": "x" * length}]} for length in (10, 1500, 5000, 10, 9000)]
    for data in (parquet_of(rows), arrow_of(rows)):
        got = read(write(data), chunk_bytes=chunk_bytes)
        assert [record.damage for record in got] == [None, None, "record_too_large", None, "record_too_large"]
        assert [record.fields for record in got if record.damage is None] == [rows[0], rows[1], rows[3]]
        assert [record.offset for record in got] == [0, 1, 2, 3, 4]


# ---- Archives ----


def test_members_are_named_after_their_archive_and_only_known_ones_are_read(tmp_path: Path) -> None:
    members = {
        "README.md": b"no",
        "./pages/a.html": page_of("a"),
        "pages/a_files/x.js": b"no",
        "__MACOSX/pages/._a.html": b"\0\5\x16\7",
        ".cache/x.json": b"no",
        "pages/": b"",
        "b.json": b'[{"b": 1}]',
        "../../up.jsonl": b'{"c": 1}\n',
        "/etc/abs.ndjson.gz": gzip_of(b'{"d": 1}\n'),
    }
    for kind, data in (("zip", zip_of(members)), ("tar", tar_of(members)), ("tgz", gzip_of(tar_of(members)))):
        path = tmp_path / f"dump.{kind}"
        path.write_bytes(data)
        got = {record.file.removeprefix(f"{path}/"): record.fields for record in read(str(path))}
        expected = {"./pages/a.html": fields_of_page("a"), "b.json": {"b": 1}, "../../up.jsonl": {"c": 1}}
        assert got == expected | {"/etc/abs.ndjson.gz": {"d": 1}}
    assert {path.name for path in tmp_path.iterdir()} == {"dump.zip", "dump.tar", "dump.tgz"}


def test_members_of_an_archive_are_packed_into_chunks_by_form(write: Write) -> None:
    members = {f"{number}.json": b'{"n": %d}' % number for number in range(100)}
    path = write(zip_of(members | {f"{number}.html": page_of(str(number)) for number in range(100)}))
    chunks = list(read_chunks([path], chunk_bytes=MIB))
    assert [chunk.form for chunk in chunks] == ["JSON lines in zip", "ShareGPT page in zip"]
    assert [record.fields for record in chunks[0].records()] == [{"n": number} for number in range(100)]
    assert [record.fields["id"] for record in chunks[1].records()] == [str(number) for number in range(100)]
    assert len(list(read_chunks([path], chunk_bytes=90))) > 100


@pytest.mark.parametrize(
    ("data", "name", "found"),
    [
        (zip_of({}), "", "holds no file with a known suffix"),
        (tar_of({}), "", "holds no file with a known suffix"),
        (zip_of({"README": b"x"}), "", "holds no file with a known suffix"),
        (zip_of({"a.json": b"x"}), "/a.json", "starts with b'x'"),
        (tar_of({"a/b.json": b""}), "/a/b.json", "empty"),
        (zip_of({"in.zip": zip_of({"a.json": b"[1]"})}), "/in.zip", "starts with b'PK"),
        (tar_of({"in.tgz": gzip_of(tar_of({"a.json": b"[1]"}))}), "/in.tgz", "decompress or unpack it"),
        (zip_of({"a.parquet": parquet_of(ROWS)}), "/a.parquet", "unpack it"),
        (gzip_of(arrow_of(ROWS)), "", "Arrow stream, gzip cannot be read; unpack it"),
        (gzip_of(zip_of({"a.json": b"[1]"})), "", "decompress it to the zip file first"),
        (zip_of({"a.jsonl": LINES}, zipfile.ZIP_BZIP2), "/a.jsonl", "packed by method 12"),
        (zip_of({"a.jsonl": LINES}, zipfile.ZIP_LZMA), "/a.jsonl", "zip it again"),
        (zip_of({"a.jsonl": LINES})[:-30], "", "not a whole zip file (BadZipFile"),
        (zip_of({"a.jsonl": b"[1]"}, 0).replace(b"[1]", b"[2]"), "/a.jsonl", "Bad CRC-32"),
        (tar_of({"a.jsonl": LINES})[:2000], "/a.jsonl", "unexpected end of data"),
        (gzip_of(tar_of({"a.jsonl": LINES}))[:300], "", "Truncated"),
        (gzip_of(LINES)[:-9], "", "Truncated compressed stream"),
        (gzip_of(LINES) + b"more", "", "reading stops here"),
        (zstd(LINES)[:-1], "", "Truncated compressed stream"),
        (tar_of({"a.json": b"[1]"})[:1024] + b"x" * 512, "", "no valid header"),
        (tar_of({"a.json": b"[1]"}) + tar_of({"b.json": b"[1]"}), "", "something follows the archive's end"),
    ],
)
def test_an_archive_that_cannot_be_read_names_member_and_remedy(
    write: Write, data: bytes, name: str, found: str
) -> None:
    path = write(data)
    message = error_of(path)
    assert message.startswith(f"{path}{name}, byte ")
    assert found in message


def test_an_encrypted_member_is_refused_with_the_remedy(write: Write) -> None:
    data = bytearray(zip_of({"a.json": b"[1]"}))
    for header in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        data[header] |= 1
    message = error_of(write(bytes(data)))
    assert "a.json, byte 0: the member is encrypted; unpack the archive with its password" in message


def test_links_and_folders_of_a_tar_are_left_out(write: Write) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (("x.json", tarfile.SYMTYPE), ("y.json", tarfile.LNKTYPE), ("d.json", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("a.json")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"[1]"))
    assert fields_of(write(file.getvalue())) == [1]


def test_an_archive_of_many_members_is_read_in_bounded_memory(write: Write) -> None:
    path = write(tar_of({f"{number}.json": b"{}" for number in range(2500)}))
    tracemalloc.start()
    try:
        assert sum(1 for chunk in read_chunks([path], chunk_bytes=20) for _ in chunk.records()) == 2500
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


# ---- Saved pages ----


@pytest.mark.parametrize(
    "tag",
    [
        b'<script id="__NEXT_DATA__" type="application/json">',
        b"<script type='application/json' id='__NEXT_DATA__' nonce=\"x\">",
        b"<SCRIPT crossorigin=anonymous\n  ID = __NEXT_DATA__>",
        b"<script id=__NEXT_DATA__ async>",
    ],
)
def test_a_page_is_found_by_its_script_however_the_tag_is_written(write: Write, tag: bytes) -> None:
    text = 'a </script> & "b" <script id="__NEXT_DATA__">'
    before = b'\xef\xbb\xbf \n<html data-id="__NEXT_DATA__"><script src="x.js"></script><script id="other">1</script>'
    raw = page_of("p1", text).replace(b'<script id="__NEXT_DATA__" type="application/json">', before + tag)
    raw = before + raw[raw.index(tag) :]
    (record,) = read(write(raw))
    assert record == Record(record.file, 0, len(raw), fields_of_page("p1", text), None, (), is_page=True)


def page_with(data: bytes) -> bytes:
    return b'<html><script id="__NEXT_DATA__">' + data + b"</script></html>"


@pytest.mark.parametrize(
    ("raw", "damage"),
    [
        (b"<html>Too many requests</html>", "no_next_data"),
        (b"<html><script id='__NEXT_DATA__2'>{}</script>", "no_next_data"),
        (b"<html>&lt;script id='__NEXT_DATA__'&gt;{}", "no_next_data"),
        (page_with(b""), "not_json"),
        (page_with(b'{"props": '), "not_json"),
        (page_with(b"[" * 100_000), "not_json"),
        (page_with(b'{"props": {}}')[:40], "not_json"),
        (page_with(b"[1]"), "no_page_content"),
        (page_with(b'{"props": {"pageProps": {"statusCode": 404}}}'), "no_page_content"),
        (page_with(b'{"props": {"pageProps": {"content": []}}}'), "no_page_content"),
        (page_with(b'{"props": "x"}'), "no_page_content"),
    ],
)
def test_a_page_without_data_is_a_record_that_says_so(write: Write, raw: bytes, damage: str) -> None:
    (record,) = read(write(raw))
    assert (record.fields, record.damage, record.is_page) == (None, damage, True)


def test_what_is_named_html_and_is_no_form_is_a_page_without_data(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.html", "b.htm", "c.HTML.gz")]
    for path, data in zip(paths, (b"", b"Too many requests", gzip_of(b" \n")), strict=True):
        Path(path).write_bytes(data)
    assert [record.damage for record in read(*paths)] == ["no_next_data"] * 3
    path = tmp_path / "dump.zip"
    path.write_bytes(zip_of({"a.html": b"", "b.html": page_of("b")}))
    assert [record.damage for record in read(str(path))] == ["no_next_data", None]


def test_a_page_that_is_not_utf8_is_damage(write: Write) -> None:
    (record,) = read(write(page_of("a", "MARK").replace(b"MARK", b"x\xff")))
    assert (record.fields, record.damage) == (None, "not_utf8")


def test_small_pages_share_a_chunk_and_keep_their_files(tmp_path: Path) -> None:
    paths = []
    for number in range(30):
        paths.append(str(tmp_path / f"{number}.html"))
        Path(paths[-1]).write_bytes(page_of(str(number)))
    for chunk_bytes, num_chunks in ((MIB, 1), (1000, 8), (1, 30)):
        chunks = list(read_chunks(paths, chunk_bytes=chunk_bytes))
        assert abs(len(chunks) - num_chunks) <= 3
        got = [(record.file, record.fields["id"]) for chunk in chunks for record in chunk.records()]
        assert got == [(path, str(number)) for number, path in enumerate(paths)]
        assert all(chunk.form == "ShareGPT page" for chunk in chunks)
        assert chunks[-1].bytes_read == sum(Path(path).stat().st_size for path in paths)


# ---- Tables ----


@pytest.mark.parametrize(
    ("data", "place", "found"),
    [
        (parquet_of([{"text": "x", "label": 1}]), "row 0", "no column is named as turns are; there are: text, label"),
        (arrow_of([{"text": "x"}]), "row 0", "rename the right one to one of conversations, items"),
        (parquet_of(ROWS)[:-20], "row 0", "reading stops here"),
        (parquet_of(ROWS)[:8], "row 0", "reading stops here"),
        (b"PAR1", "row 0", "reading stops here"),
        (b"\xff\xff\xff\xff", "row 0", "reading stops here"),
        (arrow_of(ROWS, batch_rows=20)[:-1500], "row 40", "reading stops here"),
        (arrow_of([{"items": "né" * 9}]).replace("é".encode(), b"\xff\xfe"), "row 0", "UTF8"),
        (parquet_of([{"items": "né" * 9}], compression="none").replace("é".encode(), b"\xff\xfe"), "row 0", "UTF8"),
    ],
)
def test_a_table_that_cannot_be_read_names_file_row_and_remedy(
    write: Write, data: bytes, place: str, found: str
) -> None:
    path = write(data)
    message = error_of(path)
    assert message.startswith(f"{path}, {place}: ")
    assert found in message
    assert ";" in message


def test_a_table_without_rows_is_refused(write: Write) -> None:
    table = pa.Table.from_pylist(ROWS).slice(0, 0)
    file = io.BytesIO()
    pq.write_table(table, file)
    assert "the table has no rows" in error_of(write(file.getvalue()))


def test_a_value_that_python_cannot_hold_names_the_row(write: Write) -> None:
    far = pa.array([2**62], pa.int64()).cast(pa.timestamp("s"))
    file = io.BytesIO()
    table = pa.table({"items": ["x"], "time": far})
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert ", row 0: a row from here on: " in error_of(write(file.getvalue()))


def test_what_a_row_lacks_is_none(write: Write) -> None:
    # Arrow takes the columns of a table from the first rows
    turn = {"from": "human", "value": "Hi", "weight": None}
    rows = [{"items": [turn], "note": None}, {"items": [{"from": "gpt", "value": "x", "weight": 0.5}], "note": "n"}]
    for data in (parquet_of(rows), arrow_of(rows)):
        assert fields_of(write(data)) == rows


# ---- Properties ----

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)
json_objects = st.dictionaries(text, json_values, max_size=4)
spaces = st.text(" \t\r\n", max_size=3).map(str.encode)
chunk_sizes = st.integers(1, 40) | st.just(MIB)


@settings(max_examples=60, deadline=None)
@given(st.lists(json_objects, min_size=1, max_size=5), st.data())
def test_any_objects_in_any_layout_read_back_equal_at_exact_offsets(
    write: Write, objects: list[dict[str, Any]], data: st.DataObject
) -> None:
    indent = data.draw(st.none() | st.integers(0, 2))
    ascii_only = data.draw(st.booleans())
    is_array = data.draw(st.booleans())
    raw = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + data.draw(spaces) + (b"[" if is_array else b"")
    places = []
    for index, value in enumerate(objects):
        encoded = json.dumps(value, ensure_ascii=ascii_only, indent=indent if is_array else None).encode()
        raw += data.draw(spaces)
        places.append((len(raw), len(raw) + len(encoded)))
        is_last = index == len(objects) - 1
        raw += encoded + data.draw(spaces) + (b"" if is_last else b"," if is_array else b"\n")
    raw += b"]" + data.draw(spaces) if is_array else b""

    got = read(write(raw), chunk_bytes=data.draw(chunk_sizes))
    assert [record.fields for record in got] == objects
    assert [(record.offset, record.end) for record in got] == places
    assert all(record.damage is None and record.repairs == () for record in got)


@settings(max_examples=100, deadline=None)
@given(st.lists(json_objects, min_size=4, max_size=6), st.data())
def test_a_damaged_object_of_a_row_costs_itself_and_never_gives_a_wrong_record(
    write: Write, objects: list[dict[str, Any]], data: st.DataObject
) -> None:
    objects = [value | {"n": number} for number, value in enumerate(objects)]
    encoded = [json.dumps(value).encode() for value in objects]
    broken = data.draw(st.integers(2, len(objects) - 1))
    at = data.draw(st.integers(0, len(encoded[broken]) - 1))
    instead = data.draw(st.sampled_from([b"", *(bytes((sign,)) for sign in b'"{}[],:x\n\\')]))
    encoded[broken] = encoded[broken][:at] + instead + encoded[broken][at + 1 :]
    with suppress(ValueError):
        assert isinstance(json.loads(encoded[broken]), dict)
        return  # it is only another one
    path = write(data.draw(spaces).join(encoded))
    got: list[Any] = []
    has_ended = False
    with suppress(ValueError):
        for chunk in read_chunks([path], chunk_bytes=data.draw(chunk_sizes)):
            got.extend(chunk.records())
        has_ended = True
    found = [record.fields for record in got if record.damage is None]
    # a part of the broken one that is JSON by itself is a record that is no object with a number
    found = [fields for fields in found if isinstance(fields, dict) and "n" in fields]
    assert found == [value for value in objects if value in found]
    if has_ended:
        assert [value for value in objects[:broken] if value not in found] == []
        assert any(record.damage or not isinstance(record.fields, dict) for record in got)
        assert [value for value in objects[broken + 2 :] if value not in found] == []
    else:
        assert broken >= len(objects) - 2  # nothing whole follows it for certain


@settings(max_examples=60, deadline=None)
@given(st.lists(json_objects, min_size=1, max_size=3), st.data())
def test_replacing_surrogates_equals_decoding_and_replacing_in_every_string(
    write: Write, objects: list[dict[str, Any]], data: st.DataObject
) -> None:
    bad = data.draw(st.sampled_from([rb"\ud800", rb"\udfff", rb"\ud83d\ud83d\ude00"]))
    raw = json.dumps([*objects, {"z\ue000": ["\\\ue000"]}], ensure_ascii=data.draw(st.booleans())).encode()
    raw = raw.replace("\ue000".encode(), bad).replace(rb"\ue000", bad)
    naive = json.loads(raw)
    assert fields_of(write(raw), chunk_bytes=data.draw(chunk_sizes)) == replace_surrogates(naive)


def replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in value)
    if isinstance(value, list):
        return [replace_surrogates(element) for element in value]
    if isinstance(value, dict):
        return {replace_surrogates(name): replace_surrogates(element) for name, element in value.items()}
    return value


signs = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\n", b" ", b"1", b"-", b"e", b"true", b'"a"', b"\xff"]
signs += [b'{"a":1}', b'"\\ud800"', b'{"items":[{"role":"user","content":"x"}]}', b"\x00", b"\xef\xbb\xbf", b"<"]
signs += [b'<script id="__NEXT_DATA__">', b"</script>", b"PK\3\4", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"PAR1"]
signs += [b"ARROW1\0\0", b"\xff\xff\xff\xff", b"PK\5\6" + bytes(18), bytes(512)]
arbitrary_bytes = st.binary(max_size=40) | st.lists(st.sampled_from(signs), max_size=14).map(b"".join)


@settings(max_examples=100, deadline=None)
@given(arbitrary_bytes, chunk_sizes)
def test_arbitrary_bytes_raise_nothing_but_a_value_error(write: Write, raw: bytes, chunk_bytes: int) -> None:
    try:
        for record in read(write(raw), chunk_bytes=chunk_bytes):
            if not record.is_page:
                assert raw[record.offset : record.end].strip(b" \t\r\n") == raw[record.offset : record.end]
    except ValueError as error:
        assert "byte" in str(error) or "row" in str(error)


WHOLE = [data for data, _ in FORMS.values()] + [page_of("a"), zip_of({"a.html": page_of("a"), "b.json": b"[1]"})]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(WHOLE), st.integers(0, 2**32))
def test_damaged_files_of_every_form_raise_nothing_but_a_value_error(write: Write, whole: bytes, seed: int) -> None:
    chance = random.Random(seed)  # hypothesis would draw small positions only
    data = bytearray(whole)
    for _ in range(chance.choice((1, 2, 5, 20))):
        place = chance.randrange(len(data))
        change = chance.choice(("set", "flip", "cut", "insert"))
        if change == "set":
            data[place] = chance.choice((0, 255))
        elif change == "flip":
            data[place] ^= 1 << chance.randrange(8)
        elif change == "cut":
            del data[place : place + chance.randrange(1, 20)]
        else:
            data[place:place] = chance.randbytes(4)
    try:
        read(write(bytes(data)), chunk_bytes=chance.choice((1, 1000, MIB)))
    except ValueError as error:
        assert ", byte " in str(error) or ", row " in str(error)


@settings(max_examples=100, deadline=None)
@given(arbitrary_bytes, st.sampled_from([b"", b"[", b'{"a": 1}\n']), st.integers(1, 9))
def test_what_is_read_does_not_depend_on_chunk_size(write: Write, tail: bytes, head: bytes, chunk_bytes: int) -> None:
    path = write(head + tail)

    def outcome(chunk_bytes: int) -> tuple[list[Record], bool]:
        got: list[Record] = []
        try:
            for chunk in read_chunks([path], chunk_bytes=chunk_bytes):
                got.extend(chunk.records())
        except ValueError:
            return got, True
        return got, False

    (small, small_fails), (large, large_fails) = outcome(chunk_bytes), outcome(MIB)
    assert small_fails == large_fails
    # a file that breaks off gives small chunks before it does
    assert small[: len(large)] == large if large_fails else small == large


# ---- Size ----


def array_of(num_bytes: int, record: bytes) -> Iterator[bytes]:
    block = b",\n".join([record] * (MIB // len(record) + 1))
    yield b"[" + block
    for _ in range(num_bytes // len(block)):
        yield b",\n" + block
    yield b"]"


@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_file_of_60_mb_is_read_in_bounded_memory_and_time(tmp_path: Path, form: str) -> None:
    path = tmp_path / "large.json"
    turn = {"from": "gpt", "value": 'He said "yes" — né\n' * 60}
    record = json.dumps({"id": "a", "conversations": [turn] * 8}, ensure_ascii=False).encode()
    with open(path, "wb") as file:
        if form == "array":
            file.writelines(array_of(60_000_000, record))
        else:
            file.writelines([b"\n".join([record] * 100) + b"\n"] * (60_000_000 // (100 * len(record)) + 1))
    size = path.stat().st_size
    try:
        tracemalloc.start()
        start = time.process_time()
        end = num_records = 0
        for chunk in read_chunks([str(path)], chunk_bytes=MIB):
            for one in chunk.records():
                end = one.end
                num_records += 1
        duration_s = time.process_time() - start
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        path.unlink()
    assert size > 60_000_000
    assert end == size - 1
    assert num_records > 3_000
    assert peak_bytes < 16 * MIB
    assert duration_s < 10


def test_a_record_of_many_windows_costs_linear_time(write: Write) -> None:
    # 10 MB in blocks of 4 KiB is 2,500 of them: scanning all of it again for each would take minutes
    turn = {"from": "gpt", "value": "x\\\n" * 25_000}
    for value in ({"conversations": [turn] * 100}, {"value": "y" * 10_000_000}):
        for raw in (b"[1, " + orjson.dumps(value) + b", 2]", b"{}\n" + orjson.dumps(value) + b"\n"):
            path = write(raw)
            start = time.process_time()
            fields = fields_of(path, chunk_bytes=4096)
            assert time.process_time() - start < 10
            assert value in fields


def deflated(prefix: bytes, block: bytes, num_blocks: int) -> bytes:
    """A gzip file of `prefix` and so many times `block`, without its end: no reader gets there."""
    compressor = zlib.compressobj(1, wbits=31)
    head = compressor.compress(prefix) + compressor.flush(zlib.Z_FULL_FLUSH)
    return head + (compressor.compress(block) + compressor.flush(zlib.Z_FULL_FLUSH)) * num_blocks


def write_hole(path: Path, head: bytes, num_bytes: int, tail: bytes) -> None:
    """A file of `num_bytes` zeros between head and tail, which takes no space on disk."""
    with open(path, "wb") as file:
        file.write(head)
        file.seek(num_bytes, io.SEEK_CUR)
        file.write(tail)


def zip_bomb(path: Path, name: str, head: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(name, "w") as file:
        file.write(head)
        for _ in range(300):
            file.write(bytes(MIB))


def long_name_tar(path: Path) -> None:
    info = tarfile.TarInfo("a.json")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4000 * MIB
    write_hole(path, info.tobuf(tarfile.GNU_FORMAT), info.size, b"")


def left_out_tar(path: Path) -> None:
    info = tarfile.TarInfo("film.bin")
    info.size = 4000 * MIB
    path.write_bytes(deflated(info.tobuf(), bytes(MIB), 4000))


BOMBS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a zip of zeros": (lambda path: zip_bomb(path, "a.jsonl", b'{"a": "'), "are taken for a bomb; decompress it"),
    "a page of zeros in a zip": (lambda path: zip_bomb(path, "a.html", b"<html>"), "are taken for a bomb"),
    "a gzip of zeros": (lambda path: path.write_bytes(deflated(b'{"', bytes(MIB), 4000)), "are taken for a bomb"),
    "a gzip of spaces": (lambda path: path.write_bytes(deflated(b"", b" " * MIB, 4000)), "are taken for a bomb"),
    "zeros that are left out of a tar": (left_out_tar, "are taken for a bomb"),
    "a long name in a tar": (long_name_tar, "a header of 4,194,304,000 bytes"),
    "a line of 500 MB": (
        lambda path: write_hole(path, b'{"b": 0}\n{"a": "', 500 * MIB, b'"}\n{"b": 1}\n'),
        "[None, 'record_too_large', None]",
    ),
    "a value of 500 MB": (lambda path: write_hole(path, b'[{"a": "', 500 * MIB, b'"}]'), "byte 1: the record"),
    "brackets without end": (lambda path: path.write_bytes(b"[[1]," + b"[" * MIB), "byte 5: the record"),
    "a page of brackets": (
        lambda path: path.write_bytes(b'<script id="__NEXT_DATA__">' + b"[" * 20 * MIB),
        "['not_json']",
    ),
    "a page of tags": (lambda path: path.write_bytes(b"<script id " * 5 * MIB), "['no_next_data']"),
}
# The peak of the child's own memory: ru_maxrss would begin with the parent's.
MEASURE = """
import sys, time
from ochat_train.conversations.records import read_chunks
try:
    print([record.damage for chunk in read_chunks([sys.argv[1]]) for record in chunk.records()])
except ValueError as error:
    print(error)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print(time.process_time())
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_bounded_memory_and_time(tmp_path: Path, name: str) -> None:
    make, found = BOMBS[name]
    path = tmp_path / "bomb"
    make(path)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=HANG_S)
    path.unlink()
    message, peak_kib, cpu_s = result.stdout.splitlines()
    assert found in message
    assert int(peak_kib) < 320 * 1024
    assert float(cpu_s) < 10


def test_what_compresses_well_is_no_bomb(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "BOMB_BYTES", 100_000)
    line = b'{"a": "' + b"x" * 1000 + b'"}\n'
    assert len(read(write(gzip_of(line * 90)))) == 90
    assert "are taken for a bomb" in error_of(write(gzip_of(line * 2000)))
    monkeypatch.setattr(containers, "BOMB_RATIO", 2000)
    assert len(read(write(gzip_of(line * 2000)))) == 2000


def test_a_table_that_swells_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"items": "\0" * 100_000}] * 30
    swelling = [
        parquet_of(rows),  # holds the text once, and its number 30 times
        parquet_of(rows, compression="zstd", use_dictionary=False, write_statistics=False),
    ]
    for data in swelling:
        assert len(read(write(data))) == 30
    monkeypatch.setattr(containers, "BOMB_BYTES", 500_000)
    for data in swelling:
        assert "are taken for a bomb; write it as JSON lines" in error_of(write(data))
    assert len(read(write(arrow_of(rows)))) == 30
    monkeypatch.delattr(pq.ParquetFile, "iter_batches")  # what says itself how large it is, is not even read
    assert "are taken for a bomb" in error_of(write(swelling[1]))
