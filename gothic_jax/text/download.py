"""Downloads files or copies them from a mirror: checks their SHA-256, resumes partial ones."""

import http.client
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gothic_jax.errors import UserError
from gothic_jax.machine.files import file_sha256
from gothic_jax.machine.terminal import styled

CHUNK_BYTES = 1 << 16
ATTEMPTS = 5
TIMEOUT_S = 30.0
FIRST_PAUSE_S = 0.5  # doubled after each failed attempt
PASSING_STATUSES = (408, 425, 429)  # below 500, yet worth another attempt


@dataclass(frozen=True)
class Item:
    """One file to fetch: from an http(s) address or a path, to `path`, if its hash matches."""

    source: str
    path: Path
    size: int  # bytes
    sha256: str
    if_missing: str = "check the address"  # the cure that an error names


@dataclass(frozen=True)
class _Session:
    stop: threading.Event  # set when another file failed or the user pressed Ctrl-C
    first_pause: float  # seconds
    progress: Callable[[Item, int], None]  # reports how many bytes of a file have arrived


class _Retry(Exception):
    """A failure that may pass with time: worth another attempt."""


class _Stopped(Exception):
    """The session was stopped; the error that stopped it is reported elsewhere."""


def is_url(source: str) -> bool:
    """Whether a source is an address rather than a path."""
    return source.startswith(("http://", "https://"))


def is_complete(item: Item) -> bool:
    """Whether the file exists and its hash matches."""
    return item.path.is_file() and _has_hash(item.path, item)


def fetch(items: Sequence[Item], jobs: int = 8, first_pause: float = FIRST_PAUSE_S) -> int:
    """Fetches the files that are missing, `jobs` at once; returns how many it fetched.

    `first_pause` is the pause before the second attempt, in seconds. Raises UserError at the
    first file that cannot be fetched. Partial files remain as NAME.part; a later call resumes them.
    """
    missing = [item for item in items if not is_complete(item)]
    if not missing:
        return 0
    stop = threading.Event()
    with _progress_bar(sum(item.size for item in missing)) as progress:
        session = _Session(stop, first_pause, progress)
        pool = ThreadPoolExecutor(min(jobs, len(missing)))
        try:
            futures = [pool.submit(_fetch_or_stop_all, item, session) for item in missing]
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C, which must not wait for a server that sends nothing
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        stop.set()
        pool.shutdown(cancel_futures=True)
    _raise_first_error(futures)
    return len(missing)


def _raise_first_error(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _Stopped):
            raise error


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[Item, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    hidden = not styled(sys.stderr)
    arrived: dict[Item, int] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        task = progress.add_task("Downloading", total=total)

        def report(item: Item, size: int) -> None:
            # Less than before where an attempt starts over: the bar moves back.
            progress.update(task, advance=size - arrived.get(item, 0))
            arrived[item] = size

        yield report


def _fetch_or_stop_all(item: Item, session: _Session) -> None:
    if session.stop.is_set():
        raise _Stopped
    try:
        _fetch_one(item, session)
    except BaseException:
        session.stop.set()
        raise


def _fetch_one(item: Item, session: _Session) -> None:
    part = item.path.with_name(item.path.name + ".part")
    try:
        item.path.parent.mkdir(parents=True, exist_ok=True)
        if is_url(item.source):
            _download(item, part, session)
        else:
            _copy(item, part, session)
        part.replace(item.path)
    except OSError as error:
        raise UserError(
            f"{error.filename or part} cannot be read or written: {error.strerror or error}; "
            "check its permissions, or name another --data-dir"
        ) from error


def _copy(item: Item, part: Path, session: _Session) -> None:
    source = Path(item.source)
    if not source.is_file():
        raise UserError(f"{source} is missing; {item.if_missing}")
    with source.open("rb") as stream, part.open("wb") as file:
        _pump(stream, file, item, session)
    if not _has_hash(part, item):
        part.unlink()
        raise UserError(f"{source} does not match the SHA-256 in the manifest; copy it again")


def _download(item: Item, part: Path, session: _Session) -> None:
    failure = ""
    for attempt in range(ATTEMPTS):
        if attempt and session.stop.wait(session.first_pause * 2 ** (attempt - 1)):
            raise _Stopped
        try:
            _attempt(item, part, session)
            return
        except _Retry as error:
            failure = str(error)
    raise UserError(
        f"{item.source} could not be downloaded in {ATTEMPTS} attempts ({failure}); check the "
        "network and try again, or take the texts from a copy with --mirror DIR"
    )


def _attempt(item: Item, part: Path, session: _Session) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have > item.size:
        part.unlink()
        have = 0
    session.progress(item, have)
    if have < item.size or item.size == 0:
        _transfer(item, part, have, session)
    size = part.stat().st_size
    if size < item.size:
        raise _Retry(f"only {size} of {item.size} bytes arrived")
    if not _has_hash(part, item):
        # The next attempt would resume it and end with another bad file.
        part.unlink()
        raise _Retry("the file does not match the SHA-256 in the manifest")


def _transfer(item: Item, part: Path, have: int, session: _Session) -> None:
    request = urllib.request.Request(item.source, headers={"User-Agent": "gothic-jax"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            # A server that does not support ranges answers 200 with the whole file.
            resumed = reply.status == http.HTTPStatus.PARTIAL_CONTENT
            with part.open("ab" if resumed else "wb") as file:
                _pump(reply, file, item, session)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
        elif error.code < 500 and error.code not in PASSING_STATUSES:
            raise UserError(
                f"{item.source} answers {error.code} {error.reason}; {item.if_missing}"
            ) from error
        raise _Retry(f"it answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Retry(f"network: {error.reason}") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Retry(f"the connection broke: {error}") from error


def _pump(
    source: IO[bytes] | http.client.HTTPResponse, to: IO[bytes], item: Item, session: _Session
) -> None:
    """Copies a file, but at most one byte too many: a wrong source must not fill the disk."""
    while (size := to.tell()) <= item.size:
        session.progress(item, size)
        if session.stop.is_set():
            raise _Stopped
        chunk = source.read(min(CHUNK_BYTES, item.size + 1 - size))
        if not chunk:
            return
        to.write(chunk)


def _has_hash(path: Path, item: Item) -> bool:
    return path.stat().st_size == item.size and file_sha256(path) == item.sha256
