"""Files that are there whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gothic_jax.errors import UserError

MAX_TRUSTED = 2**24
"""Bytes of a file of settings, hashes or tokens that are read before they are looked through."""
UNSOUND = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
"""What may be raised when a JSON value of any origin is read as if it were sound."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and moves it into place; raises UserError."""
    if not path.name:
        raise UserError(f"{path} is a folder; name a file in it")
    try:
        write_all_atomically(path.parent, {path.name: content})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def write_all_atomically(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files of a folder by name: none of them is replaced before all are on the disk.

    Makes the folder if it is missing. Raises OSError.
    """
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, path in temporary.items():
            path.write_bytes(contents[name])
            sync(path)
        for name, path in temporary.items():
            path.replace(folder / name)
        sync(folder)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def read_regular(path: Path) -> bytes:
    """The content of a file that may be anything: no link is followed, no pipe waited for.

    Raises OSError where it is not a regular file, or longer than MAX_TRUSTED.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > MAX_TRUSTED:
            raise OSError(errno.EFBIG, f"it is longer than {MAX_TRUSTED:,} bytes", str(path))
        return file.read()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text of any origin; raises ValueError where it is not JSON."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
