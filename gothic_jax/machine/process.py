"""Signals, the lock on a run's folder, and huge pages.

Nothing here needs JAX, so that a command can do all of it before its slow imports.
"""

import contextlib
import fcntl
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from gothic_jax.errors import UserError

LOCK = ".lock"
"""In a run's folder: the file that its trainer holds locked, with its PID in it."""


def end_on_interrupt() -> None:
    """Lets SIGINT (Ctrl-C) end this process at once, even within C code, unless it is ignored.

    Python's own handler would have to wait for the C code, and then print a traceback.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see use_huge_pages


def catch_interrupts() -> None:
    """Lets SIGINT raise KeyboardInterrupt again, for a command that has something to tidy up."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def use_huge_pages() -> None:
    """Starts this process again with its memory in huge pages, if Linux gives them on request.

    A training step on a CPU is then about 1.15 times faster. The C library reads the setting from
    the environment before the program starts, so that a program can set it only for its next
    start. Does nothing if GLIBC_TUNABLES is already set, to any value.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or not switch.exists():
        return
    if "[madvise]" in switch.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        # Until the second start calls `end_on_interrupt`: while Python starts, SIGINT would
        # print a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.execv(sys.executable, sys.orig_argv)


class Interrupted(Exception):
    """A signal arrived within `StopSignal.interrupts`."""


class StopSignal:
    """Notes SIGINT, SIGTERM or SIGHUP, so that the training loop can save and stop.

    A second SIGINT or SIGTERM ends the process at once. A second SIGHUP does not: when a terminal
    is closed, the kernel and the shell may each send one. A signal that is ignored, as SIGHUP is
    under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupts = False

    @contextlib.contextmanager
    def watched(self) -> Iterator["StopSignal"]:
        """Watches for the signals within the block."""
        previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN
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
        if self.received is None:
            self.received = number
            for ending in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(ending) is not signal.SIG_IGN:
                    signal.signal(ending, signal.SIG_DFL)
            # Not print(), which the signal may have interrupted.
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving and stopping; a second signal stops at once\n")
        if number == signal.SIGHUP:
            _leave_terminal()
        if self._interrupts:
            self._interrupts = False
            raise Interrupted


def _leave_terminal() -> None:
    """Points those of stdin, stdout and stderr that are a terminal at os.devnull.

    After a hangup, every write to the terminal fails.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        # os.isatty is False once the terminal is gone.
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(null, descriptor)
    os.close(null)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a run's folder, which is created if necessary, against other trainers.

    The lock is the kernel's: it ends with the process, however that ends. A folder that was
    created here is deleted afterwards if nothing was written in it. Raises UserError if another
    process holds the lock, and names its PID, or if the folder cannot be written.
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
        with contextlib.suppress(OSError):  # the folder may have been deleted, or replaced
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
        # The previous holder may have deleted the file between our two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)
