"""What every command shares: its parser, its streams, how it reports an error, its exit codes."""

import argparse
import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gothic_jax.errors import UserError
from gothic_jax.machine.process import end_on_interrupt


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless it is a switch, or the help names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_switch = action.nargs == 0
        if is_switch or action.default in (None, []) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors and whose --help shows defaults."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of argparse's several lines and exit."""
        raise UserError(f"{message}; `{self.prog} --help` lists the options")

    def print_help(self, file: Any = None) -> None:
        """Prints the help; raises OSError if it cannot be written, which argparse ignores."""
        print(self.format_help(), end="", file=file, flush=True)


def command(
    program: str, *, before: Callable[[], None] = lambda: None
) -> Callable[[Callable[[Sequence[str]], int | None]], Callable[..., int]]:
    """Makes an entry point of `main(argv)`, which returns the exit code.

    A UserError, or a stdout that cannot be written (a full disk), becomes one line on stderr
    and exit code 2; a closed pipe gives 141 and a KeyboardInterrupt 130. Any other exception is
    a bug of ours and keeps its traceback. If the arguments are the process's own (`argv` is
    None), SIGINT ends the process at once unless `main` calls `catch_interrupts`, and `before`
    runs first.
    """

    def decorate(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def entry(argv: Sequence[str] | None = None) -> int:
            if argv is None:
                end_on_interrupt()
                # JAX's imports make a million objects that stay: collecting garbage meanwhile, as
                # often as Python does by itself, takes a seventh of their time.
                gc.set_threshold(100_000)
                _open_missing_streams()
                before()
                # A file name or prompt that is not valid UTF-8 must be readable and printable.
                sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
                sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
            try:
                given = sys.argv[1:] if argv is None else argv
                if invalid := [argument for argument in given if "\0" in argument]:
                    raise UserError(f"the argument {invalid[0]!r} has a NUL character; remove it")
                code = main(given) or 0
            except UserError as error:
                _report(program, str(error))
                code = 2
            except KeyboardInterrupt:
                code = 130
            except BrokenPipeError:
                code = 141
            except OSError:
                # A stdout that failed fails again; otherwise the error is not stdout's.
                if not (code := _flush_stdout(program, 0, last="\n")):
                    raise
            code = _flush_stdout(program, code)
            if argv is None and code == 130:
                os._exit(code)  # at once: a thread may be waiting for the network
            return code

        return entry

    return decorate


def _open_missing_streams() -> None:
    """Opens os.devnull as each of stdin, stdout and stderr that the process started without."""
    # Otherwise the next file opened would get descriptor 0, 1 or 2, and be written to by mistake.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def _flush_stdout(program: str, code: int, *, last: str = "") -> int:
    """Writes `last` and flushes stdout: returns `code`, unless that is 0 and stdout fails."""
    try:
        print(end=last, flush=True)
    except OSError as error:
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has closed it (`| head`)
            return code or 141
        if not code:
            _report(program, f"stdout cannot be written: {error.strerror}")
            return 2
    return code


def _report(program: str, message: str) -> None:
    try:
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """Sends what a stream still holds to os.devnull: Python would fail to flush it at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
