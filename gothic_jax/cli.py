"""What every command shares: one kind of user error, told in one line, and exit codes."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from gothic_jax.errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless it is None or the help tells it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default:" in (action.help or ""):
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
        """Raises UserError in place of argparse's several lines and exit."""
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


def command(
    program: str, *, before: Callable[[], None] = lambda: None
) -> Callable[[Callable[[Sequence[str]], int | None]], Callable[..., int]]:
    """Makes an entry point of `main(argv)`: returns its exit code, 2 after a UserError.

    A UserError becomes one line on stderr. Any other exception is our bug and keeps its
    traceback. `before` runs first where the arguments are the process's own.
    """

    def decorate(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def entry(argv: Sequence[str] | None = None) -> int:
            if argv is None:
                before()
                # A name or prompt that is not UTF-8 can be given, and must be told.
                sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
                sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
            try:
                given = sys.argv[1:] if argv is None else argv
                if odd := [argument for argument in given if "\0" in argument]:
                    raise UserError(f"the argument {odd[0]!r} holds a NUL character; leave it out")
                return main(given) or 0
            except UserError as error:
                print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                return 130
            except BrokenPipeError:
                # The reader of our output left (`| head`). Python would complain once more
                # while it flushes stdout on the way out.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141

        return entry

    return decorate
