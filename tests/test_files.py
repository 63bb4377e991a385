"""Files and folders are published whole or not at all, and a lock is held until its file is closed."""

import subprocess
import sys
from pathlib import Path

import pytest

from ochat_train.files import free_port, publish_file, publish_folder, read_json_lines, require_packages, try_lock


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("is_new", [True, False])
def test_a_folder_is_published_whole_or_not_at_all(is_new: bool, tmp_path: Path) -> None:
    final = tmp_path / "a" / "model"
    if not is_new:
        final.mkdir(parents=True)
        (final / "old").write_bytes(b"1")
    before = content(tmp_path)
    with pytest.raises(KeyboardInterrupt), publish_folder(final) as folder:
        (folder / "new").write_bytes(b"2")
        raise KeyboardInterrupt
    assert content(tmp_path) == before and not (tmp_path / "a/model.partial").exists()
    with publish_folder(final) as folder:
        (folder / "new").write_bytes(b"2")
        assert content(tmp_path).items() >= before.items()
    assert content(tmp_path) == {"a/model/new": b"2"}


def test_a_file_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "a" / "file"
    for data in (b"1", b"2"):
        with publish_file(final) as file:
            file.write(data)
        assert content(tmp_path) == {"a/file": data}
    with pytest.raises(ValueError), publish_file(final) as file:
        file.write(b"3")
        raise ValueError
    assert content(tmp_path) == {"a/file": b"2"}


def test_a_lock_is_held_against_other_processes_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    ask = f"from ochat_train.files import try_lock\nprint(try_lock(open({str(path)!r}, 'rb'), shared=True))"

    def others_may_look() -> str:
        return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()

    with path.open("wb") as file:
        assert try_lock(file)
        with path.open("rb") as other:
            assert not try_lock(other)
        assert others_may_look() == "False"
    assert others_may_look() == "True"


def test_packages_that_are_missing_are_named_with_their_extra() -> None:
    require_packages("--ui", "orjson", extra="ui")
    with pytest.raises(ValueError, match=r"^--ui needs the package no-such-a: pip install 'ochat_train\[ui\]'$"):
        require_packages("--ui", "orjson", "no-such-a", extra="ui")
    with pytest.raises(ValueError, match=r"the packages no-such-a, no-such-b: .*, or set it to false$"):
        require_packages("x", "no-such-a", "no-such-b", extra="ui", remedy="set it to false")


def test_json_lines_are_read_without_one_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_json_lines(file) == []
    file.write_bytes(b'{"a": 1}\n[2]\n{"b": 3}\n{"c": ')
    assert read_json_lines(file) == [{"a": 1}, {"b": 3}]


def test_a_free_port_is_not_one_that_a_connection_may_get_before_it_is_used() -> None:
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 15 and all(1024 < port < first_of_connections for port in ports)
