"""gothic-serve: a page for writers, and OpenAI's endpoint, on this machine."""

import argparse
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.writing.settings import RECEIPTS, check_copy_guard

MAX_SLOTS = 1024
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gothic-serve",
        description="Serve a trained model: a page for writers, and OpenAI's endpoint.",
    )
    parser.add_argument(
        "--checkpoint",
        help="RUN/best, RUN/latest or RUN/ITERATION (default: the model that comes with a clone)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--slots",
        type=int,
        default=8,
        help="texts written at the same time; a blend takes one for each of its voices",
    )
    key = parser.add_mutually_exclusive_group()
    key.add_argument(
        "--api-key-file", type=Path, help="a file whose first line is the key that all need"
    )
    key.add_argument("--no-key", action="store_true", help="serve other machines without a key")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that this machine is asked under; may be given several times",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask, as https://example.org; may be given several times",
    )
    parser.add_argument(
        "--copy-guard",
        type=int,
        metavar="N",
        help="write no span of N words that a training work has, unless a request names another N",
    )
    parser.add_argument(
        "--train-file", help="where the training text is now, to mark what is copied from it"
    )
    parser.add_argument(
        "--keep-receipts",
        action="store_true",
        help=f"add a receipt of each text to RUN/{RECEIPTS}, as gothic-chat does",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


@command("gothic-serve")
def main(argv: Sequence[str]) -> int:
    """Serves a checkpoint."""
    arguments = _parser().parse_args(argv)
    if not 1 <= arguments.slots <= MAX_SLOTS:
        raise UserError(f"--slots must be from 1 to {MAX_SLOTS:,}, not {arguments.slots}")
    check_copy_guard(arguments.copy_guard)
    key = _key(arguments)
    with _listen(arguments.host, arguments.port) as listening:
        return 128 + _serve(arguments, key, listening)


def _serve(arguments: argparse.Namespace, key: str | None, listening: socket.socket) -> int:
    """Serves until a signal comes, and returns its number. Raises UserError."""
    from gothic_jax.checkpoints.checkpoint import locate
    from gothic_jax.checkpoints.release import gothic_dandy
    from gothic_jax.machine.compiled import cache_compiled_programs
    from gothic_jax.machine.device import out_of_memory_reported, select_device
    from gothic_jax.machine.environment import warn_of_other_versions
    from gothic_jax.measuring import novelty
    from gothic_jax.serving.app import build
    from gothic_jax.serving.gate import Allowed
    from gothic_jax.serving.server import serve
    from gothic_jax.serving.service import Service
    from gothic_jax.writing.writer import Writer

    cache_compiled_programs()
    device = select_device(arguments.device)
    checkpoint = locate(arguments.checkpoint) if arguments.checkpoint else gothic_dandy()
    if arguments.keep_receipts and checkpoint.is_foreign:
        raise UserError(
            "--keep-receipts: the folder of another program is not filled; leave it out"
        )
    meta = checkpoint.meta
    index = None
    try:
        index = novelty.load_for(meta.config, meta.train_sha256, arguments.train_file)
    except UserError as error:
        if arguments.copy_guard is not None or arguments.train_file is not None:
            raise
        print(f"copied passages are not marked: {error}", file=sys.stderr)
    with out_of_memory_reported("lower --slots, or serve with --device cpu"):
        warn_of_other_versions(str(checkpoint), meta.environment)
        service = Service(
            name=checkpoint.run.name,
            checkpoint=checkpoint,
            writer=Writer.load(checkpoint, device),
            slots=arguments.slots,
            index=index,
            copy_guard=arguments.copy_guard,
            keeps_receipts=arguments.keep_receipts,
        )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    origins = frozenset(map(_origin, arguments.allow_origin))
    hosts = frozenset(
        _host_name(name) for name in (*_LOOPBACK, arguments.host, *arguments.allow_host)
    )
    app = build(service, Allowed(hosts, origins, key))
    print(f"{service.name} writes at http://{shown}:{port}/  (Ctrl-C ends)", flush=True)
    return serve(app, listening)


def _key(arguments: argparse.Namespace) -> str | None:
    """The API key, if there is one. Raises UserError where one is needed."""
    if (path := arguments.api_key_file) is None:
        if arguments.host not in _LOOPBACK and not arguments.no_key:
            raise UserError(
                f"--host {arguments.host} lets other machines ask; give --api-key-file, or --no-key"
                " if anybody may"
            )
        return None
    try:
        key = path.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path} cannot be read: {error}") from error
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"the first line of {path} must be a key of 16 or more ASCII characters without blanks;"
            f" `openssl rand -hex 16 > {path}` makes one"
        )
    return key


def _origin(text: str) -> str:
    """An origin as browsers name it. Raises UserError where it is none."""
    if not re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", text):
        raise UserError(
            f"--allow-origin must be as https://example.org, in small letters and without a path,"
            f" not {text}"
        )
    return text


def _host_name(text: str) -> str:
    """A host's name in small letters. Raises UserError where it has a port."""
    if "/" in text or text.count(":") == 1:
        raise UserError(f"--allow-host must be a name without a port, not {text}")
    return text.lower()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where that cannot be."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be from 0 to 65,535, not {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened at: {error.strerror or error}; give another --port,"
            " or another --host"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
