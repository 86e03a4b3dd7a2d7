"""Downloads, against a real server on loopback that fails in every way we can think of."""

import contextlib
import hashlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.progress import Progress

from gothic_jax.errors import UserError
from gothic_jax.text import download
from gothic_jax.text.corpus import load_manifest
from gothic_jax.text.download import Item, fetch, is_complete
from tests.terminal import Terminal

CONTENT = bytes(range(256)) * 1000
NO_PAUSE = 0.001  # seconds


@dataclass
class Server:
    """What the server serves, what it does wrong first, and what it was asked."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    # For each request in turn: a status to answer, "truncate", "corrupt", "ignore range", or
    # "stall", which sends a part and then nothing until the client leaves.
    faults: list[int | str] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)

    def item(self, folder: Path, name: str = "a.txt", content: bytes = CONTENT) -> Item:
        self.files.setdefault("/" + name, content)
        digest = hashlib.sha256(content).hexdigest()
        return Item(f"{self.address}/{name}", folder / "wilde" / name, len(content), digest)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            fault = state.faults.pop(0) if state.faults else ""
            if isinstance(fault, int) or self.path not in state.files:
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            content = state.files[self.path]
            if fault == "corrupt":
                content = content[:-1] + b"?"
            start = 0
            if asked and fault != "ignore range":
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:]
            if fault == "stall":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.rfile.read(1)
                return
            with contextlib.suppress(ConnectionError):  # the client may have had enough
                self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.address = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def part(item: Item) -> Path:
    return item.path.with_name(item.path.name + ".part")


def test_several_files_come_whole_and_only_once(server: Server, tmp_path: Path) -> None:
    items = [server.item(tmp_path, f"{n}.txt", CONTENT + bytes([n])) for n in range(12)]
    assert fetch(items, jobs=4) == 12
    assert all(map(is_complete, items))
    assert fetch(items, jobs=4) == 0
    assert len(server.ranges) == 12
    assert not list(tmp_path.rglob("*.part"))


def test_a_changed_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    item = server.item(tmp_path)
    fetch([item])
    item.path.write_bytes(CONTENT[::-1])
    assert fetch([item]) == 1
    assert item.path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_failures_are_retried(server: Server, tmp_path: Path, status: int) -> None:
    server.faults = [status, status]
    item = server.item(tmp_path)
    fetch([item], first_pause=NO_PAUSE)
    assert item.path.read_bytes() == CONTENT
    assert len(server.ranges) == 3


def test_a_truncated_transfer_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncate"]
    item = server.item(tmp_path)
    fetch([item], first_pause=NO_PAUSE)
    assert item.path.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_partial_file_of_an_earlier_run_is_resumed(server: Server, tmp_path: Path) -> None:
    item = server.item(tmp_path)
    part(item).parent.mkdir()
    part(item).write_bytes(CONTENT[:1000])
    fetch([item])
    assert item.path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.faults = ["ignore range"]
    item = server.item(tmp_path)
    part(item).parent.mkdir()
    part(item).write_bytes(CONTENT[:1000])
    fetch([item])
    assert item.path.read_bytes() == CONTENT


@pytest.mark.parametrize("rest", [b"x" * 1000, b"x" * (len(CONTENT) + 1), b"x" * len(CONTENT)])
def test_a_bad_partial_file_starts_over(server: Server, tmp_path: Path, rest: bytes) -> None:
    item = server.item(tmp_path)
    part(item).parent.mkdir()
    part(item).write_bytes(rest)
    fetch([item], first_pause=NO_PAUSE)
    assert item.path.read_bytes() == CONTENT


def test_one_corrupted_transfer_is_retried(server: Server, tmp_path: Path) -> None:
    server.faults = ["corrupt"]
    item = server.item(tmp_path)
    fetch([item], first_pause=NO_PAUSE)
    assert item.path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("faults", "partial"),
    [
        ([], b""),
        ([], CONTENT[:1000]),
        ([], CONTENT),
        (["truncate"], b""),
        (["truncate", 503, "truncate", "truncate"], b""),
        (["truncate", "ignore range"], b""),
        (["ignore range", "truncate"], CONTENT[:200_000]),
        (["corrupt"], b""),
        (["truncate", "corrupt", "truncate"], CONTENT[:1000]),
        ([416], CONTENT[:1000]),
        ([], b"x" * 1000),
        ([], b"x" * (len(CONTENT) + 1)),
    ],
)
def test_the_progress_bar_counts_each_byte_once(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: list[int | str],
    partial: bytes,
) -> None:
    bars = []

    class Bar(Progress):
        def __enter__(self) -> "Bar":
            bars.append(self)
            return super().__enter__()

    monkeypatch.setattr(download, "Progress", Bar)
    items = [server.item(tmp_path), server.item(tmp_path, "b.txt", CONTENT[::-1])]
    part(items[0]).parent.mkdir()
    part(items[0]).write_bytes(partial)
    server.faults = list(faults)
    fetch(items, jobs=1, first_pause=NO_PAUSE)
    assert [(task.completed, task.total) for task in bars[0].tasks] == [(2 * len(CONTENT),) * 2]


def test_a_file_of_a_wrong_hash_is_not_kept(server: Server, tmp_path: Path) -> None:
    item = server.item(tmp_path)
    server.files["/a.txt"] = CONTENT[::-1]
    with pytest.raises(UserError, match=r"SHA-256.*--mirror"):
        fetch([item], first_pause=NO_PAUSE)
    assert not item.path.exists()
    assert not part(item).exists()


def test_a_file_that_is_longer_than_it_should_be_is_not_kept(
    server: Server, tmp_path: Path
) -> None:
    item = server.item(tmp_path)
    server.files["/a.txt"] = CONTENT * 100
    with pytest.raises(UserError):
        fetch([item], first_pause=NO_PAUSE)
    assert not list(tmp_path.rglob("*.txt*"))


def test_a_missing_file_fails_at_once_and_names_the_cure(server: Server, tmp_path: Path) -> None:
    good, gone = server.item(tmp_path), server.item(tmp_path, "b.txt")
    del server.files["/b.txt"]
    with pytest.raises(UserError, match=r"b\.txt answers 404 .*check the address"):
        fetch([gone, good], jobs=1)
    assert len(server.ranges) == 1


def test_an_unreachable_network_names_the_cure(server: Server, tmp_path: Path) -> None:
    item = server.item(tmp_path)
    nowhere = Item("http://127.0.0.1:9/a.txt", item.path, item.size, item.sha256)
    with pytest.raises(UserError, match=r"in 5 attempts.*check the network.*--mirror DIR"):
        fetch([nowhere], first_pause=NO_PAUSE)


def test_one_failure_stops_the_others_but_keeps_what_came(server: Server, tmp_path: Path) -> None:
    items = [server.item(tmp_path, f"{n}.txt") for n in range(4)]
    server.faults = [404]
    with pytest.raises(UserError):
        fetch(items, jobs=1)
    assert fetch(items) == 4


def test_a_copy_from_a_folder_is_checked(tmp_path: Path) -> None:
    source = tmp_path / "mirror" / "a.txt"
    source.parent.mkdir()
    digest = hashlib.sha256(CONTENT).hexdigest()
    item = Item(str(source), tmp_path / "raw" / "a.txt", len(CONTENT), digest)
    with pytest.raises(UserError, match="is missing; check the address"):
        fetch([item])
    source.write_bytes(CONTENT[::-1])
    with pytest.raises(
        UserError, match=r"does not match the SHA-256 in the manifest; copy it again"
    ):
        fetch([item])
    assert not list((tmp_path / "raw").iterdir())
    source.write_bytes(CONTENT + b"more")
    with pytest.raises(UserError, match="SHA-256"):
        fetch([item])
    source.write_bytes(CONTENT)
    assert fetch([item]) == 1
    assert item.path.read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("a file in the way")
    source = tmp_path / "a.txt"
    source.write_bytes(b"x")
    item = Item(str(source), tmp_path / "raw" / "a.txt", 1, hashlib.sha256(b"x").hexdigest())
    with pytest.raises(UserError, match="--data-dir"):
        fetch([item])


def test_ctrl_c_ends_a_stalled_download_and_shows_the_cursor_again(
    server: Server, tmp_path: Path
) -> None:
    """The real command at a real terminal."""
    server.files = dict.fromkeys((f"/{work.file}" for work in load_manifest()), b"A tale. " * 9999)
    server.faults = ["stall"] * 8
    arguments = ["-m", "gothic_jax.commands.data", "--mirror", server.address]
    terminal = Terminal(arguments, tmp_path)
    seen = terminal.read_until("Downloading")
    while len([*tmp_path.rglob("*.part")]) < 8:
        assert terminal.process.poll() is None
    terminal.process.send_signal(signal.SIGINT)
    seen += "".join(terminal.read())
    terminal.close()
    assert terminal.process.wait() == 130
    assert "Traceback" not in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
