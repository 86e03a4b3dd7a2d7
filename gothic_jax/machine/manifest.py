"""The manifest of a folder: size and SHA-256 of every file in it, so that damage is seen.

It says that the files are those that were written, not who wrote them.
"""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gothic_jax.errors import UserError
from gothic_jax.machine.files import UNSOUND, file_sha256, parse_json, read_regular, sha256, sync

NAME = "manifest.json"
MAX_DEPTH = 8


class Damaged(UserError):
    """A folder is not as it was written; the message names the file."""


Entries = dict[str, Future[dict[str, Any]]]
"""What the manifest is to have on each file: `bytes` and `sha256`, by its path from the folder
on."""
HASHERS = 2
"""Threads that take hashes: on two cores they take half as long as one."""


def entries(folder: Path, inside: str, pool: Executor) -> Entries:
    """What the manifest of `folder` is to have on the files below `inside`, as "params/"."""
    return {name: pool.submit(_entry, folder / name) for name in _files(folder, inside)}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write(folder: Path, known: Entries, pool: Executor) -> None:
    """Puts all files and folders in `folder` on the disk, and last a manifest of them.

    `known` are entries that `pool` has at work already. Raises OSError.
    """
    names = [*_files(folder)]
    pending = {name: known.get(name) or pool.submit(_entry, folder / name) for name in names}
    list(pool.map(sync, [folder / name for name in names]))  # raises what went wrong
    listed = {name: entry.result() for name, entry in pending.items()}
    content = json.dumps({"sha256": _digest(listed), "files": listed}, indent=1) + "\n"
    with (folder / NAME).open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))


def verify(folder: Path, keep: Sequence[str] = ()) -> tuple[str, dict[str, bytes]]:
    """Checks every file of `folder`; its seal, and the content of the files named by `keep`.

    The seal is a SHA-256 that identifies all of them. What is kept is what was hashed: nothing
    needs to be read again. Opens no file outside the folder, follows no link. Raises Damaged.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise Damaged(f"{folder} is not a folder")
        names = {*_files(folder)}
        if NAME not in names:
            raise Damaged(f"{folder}/{NAME} is missing")
        seal, listed = _read(folder / NAME)
        for name in sorted(listed.keys() | (names - {NAME}) | {*keep}):
            if name not in names:
                raise Damaged(f"{folder}/{name} is missing")
            if name not in listed:
                raise Damaged(f"{folder}/{name} is not in the manifest")
            there = (folder / name).stat().st_size
            if there != listed[name][0]:
                raise Damaged(
                    f"{folder}/{name} is damaged: {there} bytes instead of {listed[name][0]}"
                )
        kept = {name: read_regular(folder / name) for name in keep}

        def digest_of(name: str) -> str:
            return sha256(kept[name]) if name in kept else file_sha256(folder / name)

        with ThreadPoolExecutor(HASHERS) as pool:
            digests = pool.map(digest_of, listed)
            for (name, (_, expected)), digest in zip(listed.items(), digests, strict=True):
                if digest != expected:
                    raise Damaged(f"{folder}/{name} is damaged: it does not match its SHA-256")
    except OSError as error:
        raise Damaged(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    return seal, kept


def _files(folder: Path, inside: str = "") -> Iterator[str]:
    """The paths of all files, from `folder` on; anything else raises Damaged."""
    if inside.count("/") > MAX_DEPTH:
        raise Damaged(f"{folder}/{inside} is in too deep a folder")
    with os.scandir(folder / inside) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            name = f"{inside}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise Damaged(f"{folder}/{name} is a link or a device, not a file")


def _digest(entries: Any) -> str:
    return sha256(json.dumps(entries, sort_keys=True).encode())


def _read(path: Path) -> tuple[str, dict[str, tuple[int, str]]]:
    """A manifest's own digest, which is checked, and the sizes and digests of its files."""
    content = read_regular(path)
    try:
        value = parse_json(content)
        files, seal = value["files"], value["sha256"]
        if _digest(files) != seal:
            raise ValueError("it does not match its own SHA-256")
        return seal, {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()
        }
    except UNSOUND as error:
        raise Damaged(f"{path} is damaged: {error}") from error
