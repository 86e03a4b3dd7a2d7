"""What a long run owes the machine that it runs on: signals, a lock, memory pages.

Nothing here needs JAX, so that a command can do all of it before its slow imports.
"""

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from gothic_jax.errors import UserError

LOCK = ".lock"
"""In a run's folder: the file that its trainer holds locked, with its PID in it."""


def begin_run() -> None:
    """The first thing that `gothic-train` does.

    Until there is something to save, SIGINT ends the process at once, as SIGTERM does, even
    within a compilation, where Python's own handler would have to wait.
    """
    use_huge_pages()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def use_huge_pages() -> None:
    """Starts this process anew with its memory in huge pages, where Linux gives them on request.

    A training step on a CPU is then some 1.15 times faster. The C library takes the setting from
    the environment before a program's first line, so that a program can only set it for its
    next start. Does nothing where GLIBC_TUNABLES is already set, to whatever.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or not switch.exists():
        return
    if "[madvise]" in switch.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


class Interrupted(Exception):
    """A signal came within `StopSignal.interrupts`."""


class StopSignal:
    """Notes SIGINT or SIGTERM, so that the loop can save and leave; a second one leaves at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupts = False

    @contextlib.contextmanager
    def watched(self) -> Iterator["StopSignal"]:
        """Watches for the signals within the block."""
        previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within the block, which must leave nothing half done, a signal raises Interrupted."""
        if self.received is not None:
            raise Interrupted
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # print() could be interrupting itself here.
        os.write(2, b"\nsaving and stopping; again to stop at once\n")
        if self._interrupts:
            raise Interrupted


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a run's folder, which is made if need be, against other trainers.

    The lock is the kernel's: it ends with the process, however that ends. A new folder in which
    nothing was written is gone afterwards. Raises UserError where another process holds it, by
    PID, or where it cannot be written.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
    except OSError as error:
        raise UserError(f"--out-dir {folder} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, or another's by now
            if is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(descriptor)


def _locked(folder: Path) -> int:
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"--out-dir {folder} is in use by another gothic-train (PID {holder}); wait for"
                " it, stop it, or name another folder"
            ) from None
        # The holder before may have taken the file away between our two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)
