"""Files at URLs are read as files on disk are, whatever breaks on the way."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from ochat_train.conversations import remote
from ochat_train.conversations.records import list_files, read_chunks
from ochat_train.conversations.remote import identify
from tests.dumps import chat, contents, make, prose, source, write_recipe

LINES = b"".join(b'{"id": "%d", "text": "%s"}\n' % (number, b"x" * 1000) for number in range(12_000))


class Server(ThreadingHTTPServer):
    """Gives LINES, in ranges, and breaks every second answer in the middle."""

    tag = "one"
    breaks = has_ranges = True
    num_requests = num_sent = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kinds: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.server.kinds[self.command] += 1
        status = {"/secret": 403, "/missing": 404}.get(self.path)
        if status:
            self.send_error(status)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "") * self.server.has_ranges)
        start, end = (int(wanted[1]), min(int(wanted[2] or 1e9) + 1, len(LINES))) if wanted else (0, len(LINES))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        if self.server.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.server.tag)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(LINES)}")
        self.end_headers()
        if with_body:
            self.server.num_requests += 1
            body = LINES[start:end]
            if self.server.breaks and self.server.num_requests % 2 and len(body) > 1000:
                body = body[: len(body) // 2]
                self.close_connection = True
            self.server.num_sent += len(body)
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01, 0.01))
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def url_of(server: Server, name: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def test_broken_connections_are_made_anew_where_they_broke(server: Server) -> None:
    (url,) = list_files(url_of(server, "a.jsonl"))
    got = [record for chunk in read_chunks([url]) for record in chunk.records()]
    assert [record.fields["id"] for record in got] == [str(number) for number in range(12_000)]
    assert server.num_requests > 3
    assert server.num_sent < 2.5 * len(LINES)


def test_a_tag_tells_whether_a_file_changed(server: Server) -> None:
    url = url_of(server, "a.jsonl")
    list_files(url)
    before = identify(url)
    assert identify(url) == before and server.kinds == {"HEAD": 1}
    server.tag = "two"
    list_files(url)
    assert identify(url) != before


@pytest.mark.parametrize(("name", "found"), [("secret", "no permission to read it"), ("missing", "is not there")])
def test_what_a_server_refuses_is_one_line(server: Server, name: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        list(read_chunks([url_of(server, name)]))


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.01,))
    with pytest.raises(ValueError, match="cannot be reached"):
        list(read_chunks(["http://127.0.0.1:1/a.jsonl"]))


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_globs_and_folders_of_file_systems(protocol: str, tmp_path: Path) -> None:
    base = "memory://dump" if protocol == "memory" else f"file://{tmp_path}"
    for name in ("a.jsonl", "b/c.jsonl", "notes.md"):
        with fsspec.open(f"{base}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b'{"id": "%s"}\n' % name.encode())
    for path, names in ((base, ["a.jsonl", "b/c.jsonl"]), (f"{base}/*.jsonl", ["a.jsonl"])):
        records = [record for chunk in read_chunks(list_files(path)) for record in chunk.records()]
        assert [record.fields["id"] for record in records] == names


def test_a_store_of_a_url_is_that_of_the_file_and_outlives_the_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(chat(str(number), prose(number, 20), "Yes.")).encode() for number in range(200)]
    monkeypatch.setattr("tests.test_remote.LINES", b"\n".join(lines))
    server.breaks = False
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.jsonl").write_bytes(LINES)
    here = contents(make(write_recipe(tmp_path / "here", [source("all", tmp_path / "here/a.jsonl")])))
    recipe = write_recipe(tmp_path, [source("all", url_of(server, "a.jsonl"))])
    store = make(recipe)
    assert server.kinds == {"HEAD": 2, "GET": 1}  # before and after it is read
    made = contents(store)
    assert {name for name in here if made[name] != here[name]} == {"ledger.parquet", "manifest.json"}  # with its name

    server.kinds.clear()
    make(recipe)
    assert "is up to date" in capsys.readouterr().out and server.kinds == {"HEAD": 1}
    server.tag = "two"
    make(recipe)
    assert "is stale (an input file changed)" in capsys.readouterr().out
    server.shutdown()
    server.server_close()
    make(recipe)
    said = capsys.readouterr().out
    assert "cannot be reached" in said and "is complete and is used as it is" in said
    assert contents(store).keys() == made.keys()
    with pytest.raises(ValueError, match="cannot be reached"):
        make(recipe, "data.max_tokens=400")


def test_a_server_without_ranges_is_read_from_front_to_back(server: Server) -> None:
    server.has_ranges = False
    (url,) = list_files(url_of(server, "a.jsonl"))
    got = [record for chunk in read_chunks([url]) for record in chunk.records()]
    assert [record.fields["id"] for record in got] == [str(number) for number in range(12_000)]
