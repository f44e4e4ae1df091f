"""Downloads that break off, lie, or meet each other, against a server on this machine only."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rarefy._files import atomic_write, fetch, sha256
from rarefy.errors import DataError

CONTENT = bytes(range(256)) * 4000
RIGHT = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves CONTENT; breaks off after `cut` bytes in the first `breaks` answers; may answer an error."""

    def __init__(self) -> None:
        self.content, self.cut, self.breaks, self.ranges, self.error = CONTENT, 300_000, 0, True, 0
        self.asked: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.asked.append(wanted)
                if outer.error:
                    self.send_error(outer.error)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and outer.ranges else 0
                if start >= len(outer.content):
                    self.send_error(416)
                    return
                body = outer.content[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if outer.breaks > 0:
                    outer.breaks -= 1
                    body = body[: outer.cut]
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/folder/train.gz"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def only(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_fetch_reports_progress_and_asks_once(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch(server.url, tmp_path / "new" / "train.gz", RIGHT, lambda a, b: seen.append((a, b)))
    assert path.read_bytes() == CONTENT
    assert only(path.parent) == ["train.gz"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(seen) == seen
    fetch(server.url, path, RIGHT)
    assert server.asked == [None], "a file that is right is not asked for again"


def test_a_break_is_resumed_where_it_happened(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    fetch(server.url, tmp_path / "f", RIGHT)
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"]
    assert only(tmp_path) == ["f"]


def test_a_later_call_resumes_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    server.breaks = 1
    with pytest.raises(DataError, match=r"train\.gz.*broke off after 300000 of 1024000 bytes.*RAREFY_DATA"):
        fetch(server.url, tmp_path / "f", RIGHT, attempts=1)
    assert only(tmp_path) == ["f.part"]
    fetch(server.url, tmp_path / "f", RIGHT)
    assert server.asked[-1] == "bytes=300000-"
    assert only(tmp_path) == ["f"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, 1
    assert fetch(server.url, tmp_path / "f", RIGHT).read_bytes() == CONTENT


@pytest.mark.parametrize("old", [b"of another version", CONTENT, CONTENT + b"x", b"\xff" * len(CONTENT)])
def test_an_old_part_file_does_no_harm(server: Server, tmp_path: Path, old: bytes) -> None:
    (tmp_path / "f.part").write_bytes(old)
    assert fetch(server.url, tmp_path / "f", RIGHT).read_bytes() == CONTENT
    assert only(tmp_path) == ["f"]


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(DataError, match=r"train\.gz is not what it should be .*expected " + RIGHT):
        fetch(server.url, tmp_path / "f", RIGHT)
    assert only(tmp_path) == []


def test_a_wrong_file_in_place_is_refused_and_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"not the official train\.gz"):
        fetch(server.url, tmp_path / "f", RIGHT)
    assert (tmp_path / "f").read_bytes() == b"mine"
    assert server.asked == []


@pytest.mark.parametrize(("code", "times"), [(404, 1), (503, 2)])
def test_errors_of_the_server_are_told(server: Server, tmp_path: Path, code: int, times: int) -> None:
    server.error = code
    with pytest.raises(DataError, match=f"train.gz.*answered {code}"):
        fetch(server.url, tmp_path / "f", RIGHT, attempts=2)
    assert len(server.asked) == times
    assert only(tmp_path) == []


def test_many_at_once_get_one_good_file(server: Server, tmp_path: Path) -> None:
    server.breaks = 3
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch(server.url, tmp_path / "f", RIGHT), range(8)))
    assert {p.read_bytes() for p in paths} == {CONTENT}
    assert only(tmp_path) == ["f"]
    assert len(server.asked) == 4, "one of them downloads, with its three resumptions; the others wait"


def test_offline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:  # port 9 of this machine: nobody listens
        fetch("http://127.0.0.1:9/some/file-7.gz", tmp_path / "there" / "x.gz", RIGHT, timeout=2)
    said = str(caught.value)
    assert "file-7.gz" in said
    assert "127.0.0.1" not in said
    assert "RAREFY_DATA" in said
    assert str(tmp_path / "there") in said


def test_only_web_addresses(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(CONTENT)
    with pytest.raises(DataError, match="only http and https"):
        fetch(f"file://{tmp_path}/secret", tmp_path / "f", RIGHT)


def test_a_folder_that_cannot_be_written_to(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot write"):
        fetch(server.url, tmp_path / "file" / "f", RIGHT)


def fail_midway(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as f:
        f.write(b"half")
        raise error


def test_atomic_write_keeps_the_old_file_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path, "w") as f:
        f.write("grün\n")
    assert path.read_bytes() == "grün\n".encode()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fail_midway(path, error)
    assert path.read_bytes() == "grün\n".encode()
    assert only(path.parent) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ValueError, match="mode"), atomic_write(path, "a"):
        pass


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    assert sha256(tmp_path / "f") == RIGHT
