"""R3, R4, R5, S3: what is on the disk is not what it should be."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorstore

from gothic_jax.checkpoints import checkpoint
from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.machine import manifest
from gothic_jax.machine.files import sha256
from tests.common import Workplace, process
from tests.torture.world import (
    Figure,
    Life,
    arrays,
    finished_run,
    fresh_copy,
    in_lanes,
    limited,
    run_with_all_checkpoints,
    same,
    steps_of,
    whole_state,
)

SETTINGS = {"max_iters": 12, "eval_interval": 4}


def power_loss(workplace: Workplace) -> Figure:
    """R3: of every file and folder of a step, the last change and the last fsync before the
    rename that makes it a checkpoint, as strace saw them."""
    what = "files and folders of a step not on the disk when it gets its name"
    if shutil.which("strace") is None:
        return Figure("R3", what, 0, [], "not measured: strace is not installed")
    out_dir = workplace.root / "traced"
    log = workplace.root / "strace.log"
    calls = (
        "open,openat,creat,write,pwrite64,writev,pwritev,ftruncate,rename,renameat,renameat2,"
        "mkdir,mkdirat,unlink,unlinkat,link,linkat,fsync,fdatasync"
    )
    with process(
        "train",
        workplace.arguments(out_dir=out_dir, **SETTINGS),
        workplace.root,
        PYTHONUNBUFFERED="1",
    ) as life:
        command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-o", str(log)]
        with subprocess.Popen([*command, "-p", str(life.pid)], stderr=subprocess.DEVNULL) as tracer:
            out, error = life.communicate(timeout=300)
            tracer.wait()
    if life.returncode:
        raise RuntimeError(out + error)
    wrong, count = _unsynced(log.read_text(), out_dir)
    return Figure("R3", what, count, wrong, "strace of a run with three saves")


def _unsynced(log: str, out_dir: Path) -> tuple[list[str], int]:
    """Paths of each step that were changed after their last fsync, and how many there were."""
    changed: dict[str, int] = {}
    synced: dict[str, int] = {}
    wrong: list[str] = []
    count = 0
    for line_number, raw in enumerate(log.splitlines()):
        line = re.sub(r"^\d+\s+", "", raw)
        if line.startswith("<... ") or " = -1 " in line:
            continue
        call = line.partition("(")[0]
        names = re.findall(r'"([^"]*)"', line)
        opened = re.search(r"\((\d+)<([^>]*)>", line)
        at = re.search(r"= \d+<([^>]*)>", line)
        if call in ("fsync", "fdatasync") and opened:
            synced[opened[2]] = line_number
        elif call in ("write", "pwrite64", "writev", "pwritev", "ftruncate") and opened:
            changed[opened[2]] = line_number
        elif call in ("open", "openat", "creat") and "O_CREAT" in line and at:
            changed[at[1]] = line_number
            changed[str(Path(at[1]).parent)] = line_number
        elif call.startswith(("mkdir", "unlink", "link")) and names:
            changed[names[-1]] = line_number
            changed[str(Path(names[-1]).parent)] = line_number
        elif call.startswith("rename") and len(names) >= 2:
            source, target = names[0], names[-1]
            step = re.fullmatch(rf"{re.escape(str(out_dir))}/\.(\d+)\.tmp", source)
            if step and target == f"{out_dir}/{step[1]}":
                mine = {path for path in changed if f"{path}/".startswith(f"{source}/")}
                count += len(mine)
                gone = {
                    path
                    for path in mine
                    if not (out_dir / step[1] / Path(path).relative_to(source)).exists()
                }
                wrong += [
                    f"{path} was changed after its last fsync"
                    for path in sorted(mine - gone)
                    if synced.get(path, -1) < changed[path]
                ]
                if not mine:
                    wrong.append(f"step {step[1]}: nothing seen of it")
            for table in (changed, synced):
                for path in [path for path in table if f"{path}/".startswith(f"{source}/")]:
                    table[path.replace(source, target, 1)] = table.pop(path)
            changed[str(Path(source).parent)] = changed[str(Path(target).parent)] = line_number
    if not count:
        wrong.append("no checkpoint was seen")
    return wrong, count


def damaged_files(workplace: Workplace, flips: int, cuts: int, zeros: int, deleted: int) -> Figure:
    """R4: bit flips, truncations, zeroed blocks and deleted files in the newest checkpoint.

    It must load as it was, or the one before it must, with a warning that names the file; with
    no other, an error that names it; the files stay as they are.
    """
    pair, _ = finished_run(workplace, "damaged", **SETTINGS)
    held = checkpoint.iterations(pair)
    alone = fresh_copy(pair, workplace.root / "alone")
    for iteration in held[:-1]:
        shutil.rmtree(alone / str(iteration))
    newest = held[-1]
    wanted = {n: arrays(Checkpoint.open(pair, n)) for n in held[-2:]}
    # The last is the best, too, and so what every command asks for.
    names = ["latest", "best"]
    rng = random.Random(4)
    kinds = ["flip"] * flips + ["cut"] * cuts + ["zero"] * zeros + ["delete"] * deleted
    wrong: list[str] = []
    silent = 0
    for index, kind in enumerate(kinds):
        run = alone if index % 5 == 0 else pair
        folder = run / str(newest)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        # Half of them by size, as a disk would; half by file, so that small ones get their share.
        sizes = [path.stat().st_size + 1 for path in files]
        file = rng.choices(files, sizes)[0] if index % 2 else rng.choice(files)
        content = file.read_bytes()
        _damage(file, content, kind, rng)
        before = _tree(run)
        error = io.StringIO()
        label = f"{kind} in {file.relative_to(run)}"
        try:
            with contextlib.redirect_stderr(error):
                location = checkpoint.locate(str(run / rng.choice(names)))
                loaded = arrays(location)
                assert location.tokenizer
            if not same(loaded, wanted.get(location.iteration, [])):
                silent += 1
                wrong.append(f"{label}: loaded silently, and wrong")
            elif location.iteration == newest and file.name != manifest.NAME:
                wrong.append(f"{label}: not noticed")
            elif location.iteration != newest and str(file) not in error.getvalue():
                wrong.append(f"{label}: the warning names no file: {error.getvalue()}")
        except UserError as told:
            if run is pair or str(file) not in str(told):
                wrong.append(f"{label}: {told}")
        except Exception as broken:
            wrong.append(f"{label}: {type(broken).__name__}: {broken}")
        if _tree(run) != before:
            wrong.append(f"{label}: something was written")
        file.write_bytes(content)
    return Figure(
        "R4",
        "flipped bits, truncations, zeroed blocks, deleted files: wrong or unnamed loads",
        len(kinds),
        wrong,
        f"{flips:,} + {cuts:,} + {zeros:,} + {deleted:,}; {silent} loaded silently wrong",
    )


def _damage(file: Path, content: bytes, kind: str, rng: random.Random) -> None:
    changed = bytearray(content)
    match kind:
        case "flip":
            if not changed:
                changed = bytearray(b"\0")
            else:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        case "cut":
            del changed[rng.randrange(len(changed) or 1) :]
            if bytes(changed) == content:
                changed += b"\0"
        case "zero":
            start = rng.randrange(len(changed) or 1)
            block = changed[start : start + 512]
            changed[start : start + 512] = (
                bytes(len(block)) if any(block) else b"\1" * (len(block) or 1)
            )
        case "delete":
            file.unlink()
            return
    file.write_bytes(changed)


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")
    }


def damaged_commands(workplace: Workplace, count: int) -> Figure:
    """R4 again, with the real commands: resume, chat and eval on a damaged run."""
    base = run_with_all_checkpoints(workplace, "commands", **SETTINGS)
    wanted = whole_state(base)
    shutil.rmtree(base / "12")

    def trial(index: int) -> list[str]:
        rng = random.Random(500 + index)
        out_dir = fresh_copy(base, workplace.root / f"commands-{index}")
        if alone := index % 3 == 0:
            shutil.rmtree(out_dir / "4")
        file = rng.choice(sorted(path for path in (out_dir / "8").rglob("*") if path.is_file()))
        kind = rng.choice(["flip", "cut", "zero", "delete"])
        _damage(file, file.read_bytes(), kind, rng)
        label = f"{kind} in {file.relative_to(out_dir)}"
        before = steps_of(out_dir)
        wrong = []
        for module, arguments in (
            ("chat", ["--max-tokens", "4", "--checkpoint", f"{out_dir}/latest", "--seed", "1"]),
            ("evaluate", ["--checkpoint", str(out_dir), "--verify"]),
        ):
            with process(module, arguments, workplace.root) as started:
                _, error = started.communicate(timeout=120)
            # What is to be verified is never replaced by another.
            refused = alone or module == "evaluate"
            if str(file) not in error or started.returncode != (2 if refused else 0):
                wrong.append(f"{label}: {module}: {started.returncode}: {error[-200:]}")
        resumed = Life(["--resume", "--out-dir", str(out_dir)], workplace.root)
        code = resumed.end()
        if str(file) not in resumed.error:
            wrong.append(f"{label}: resume names no file: {resumed.error[-200:]}")
        if alone:
            if code != 2 or steps_of(out_dir) != before:
                wrong.append(f"{label}: code {code}, or something overwritten")
        elif code or not same(wanted, whole_state(out_dir)):
            wrong.append(
                f"{label}: code {code}, or another state at the end: {resumed.error[-200:]}"
            )
        return wrong

    wrong = in_lanes(trial, count)
    return Figure(
        "R4", "the same, through gothic-train --resume, gothic-chat, gothic-eval", count, wrong,
        "every third with no other checkpoint to go back to",
    )  # fmt: skip


def failing_disk(workplace: Workplace, library: Path | None, count: int) -> Figure:
    """R5: ENOSPC, EIO and a file-size limit while checkpoints are written."""
    what = "disk full, EIO, file-size limit during saves"
    if library is None:
        return Figure("R5", what, 0, [], "not measured: no C compiler")
    settings = {"max_iters": 16, "eval_interval": 4}
    whole_dir, _ = finished_run(workplace, "disk-whole", **settings)
    whole = whole_state(whole_dir)

    def trial(index: int) -> list[str]:
        rng = random.Random(700 + index)
        out_dir = workplace.root / f"disk-{index}"
        number = rng.choice([28, 5])  # ENOSPC, EIO
        call = rng.choice(["write", "write", "fsync", "rename", "mkdir"])
        lasting = index % 2 == 0  # up to the end, or for one save
        hit_path = rng.choice(["/.8.tmp", "/.12.tmp"]) if not lasting else "/.1"
        label = f"errno {number} of {call} in {hit_path}"
        environment = {
            "LD_PRELOAD": str(library),
            "FAULTS_CALLS": call,
            "FAULTS_PATH": f"{out_dir}{hit_path}",
            "FAULTS_AT": str(rng.randrange(1, 4)),
            "FAULTS_COUNT": "1000000" if lasting else "1",
            "FAULTS_ERROR": str(number),
        }
        life = Life(workplace.arguments(out_dir=out_dir, **settings), workplace.root, **environment)
        code = life.end()
        held = checkpoint.iterations(out_dir)
        wrong = []
        if "cannot be written" not in life.out + life.error:
            hit = "was hit" if held != [12, 16] else "was never hit"
            wrong.append(f"{label}: not told ({hit}): {life.error[-300:]}")
        if code != (2 if lasting else 0):
            wrong.append(f"{label}: code {code}: {life.error[-300:]}")
        if left := [path.name for path in out_dir.glob(".*.tmp")]:
            wrong.append(f"{label}: {left} left behind")
        if lasting:
            again = Life(["--resume", "--out-dir", str(out_dir)], workplace.root)
            if again.end():
                wrong.append(f"{label}: the resumed run: {again.error[-300:]}")
        if not same(whole, whole_state(out_dir)):
            wrong.append(f"{label}: another state at the end")
        return wrong

    wrong = in_lanes(trial, count)
    wrong += _size_limit(workplace)
    return Figure("R5", what, count + 1, wrong, "half of them lasting, so that the last save fails")


def _size_limit(workplace: Workplace) -> list[str]:
    """A file-size limit below that of the arrays: nothing can ever be saved."""
    out_dir = workplace.root / "limited"
    arguments = workplace.arguments(out_dir=out_dir, max_iters=12, eval_interval=4)
    command = [sys.executable, "-m", "gothic_jax.commands.train", *arguments]
    done = subprocess.run(
        limited("RLIMIT_FSIZE", 60_000, command),
        cwd=workplace.root,
        # JAX's cache must not get half a program from this.
        env=os.environ | {"GLIBC_TUNABLES": "", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    wrong = []
    if done.returncode != 2 or "cannot be written" not in done.stderr:
        wrong.append(f"file-size limit: code {done.returncode}: {done.stderr[-300:]}")
    if checkpoint.iterations(out_dir) or [*out_dir.glob(".*.tmp")]:
        wrong.append("file-size limit: something was left")
    return wrong


class Bomb:
    """What no one may unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch PWNED",))


def hostile_folders(workplace: Workplace, every: int, *, timed: bool) -> Figure:
    """S3: checkpoint folders that a stranger has prepared, manifest and all; every so many."""
    base, _ = finished_run(workplace, "hostile", max_iters=4, eval_interval=4)

    def trial(index: int) -> list[str]:
        root = workplace.root / f"hostile-{index}"
        run = fresh_copy(base, root / "run")
        secret = root / "secret.txt"
        secret.write_text("private\n")
        name, prepare, sealed = [*_hostile(secret)][index * every]
        step = run / "4"
        prepare(step)
        if sealed:
            (step / manifest.NAME).unlink()
            with ThreadPoolExecutor(1) as pool:
                manifest.write(step, {}, pool)
        opened = secret.stat().st_atime_ns
        started = time.monotonic()
        command = ["--max-tokens", "4", "--seed", "1", "--checkpoint", str(run)]
        chat = [sys.executable, "-m", "gothic_jax.commands.chat", *command]
        result = subprocess.run(
            limited("RLIMIT_DATA", 8 << 30, chat),
            cwd=root,
            capture_output=True,
            text=True,
            timeout=120,
        )
        wrong = []
        if result.returncode != 2 or result.stderr.count("\n") != 1:
            wrong.append(f"{name}: code {result.returncode}: {result.stderr[-300:]}")
        if (root / "PWNED").exists():
            wrong.append(f"{name}: code was run")
        if "private" in result.stdout + result.stderr or secret.stat().st_atime_ns != opened:
            wrong.append(f"{name}: a file outside was read")
        if timed and time.monotonic() - started > 30:
            wrong.append(f"{name}: it took {time.monotonic() - started:.0f} s")
        return wrong

    count = len(range(0, len([*_hostile(Path())]), every))
    wrong = in_lanes(trial, count)
    return Figure("S3", "hostile checkpoint folders", count, wrong, "gothic-chat on each")


def _hostile(secret: Path) -> Iterator[tuple[str, Callable[[Path], object], bool]]:
    """Name, what prepares the step's folder, and whether it then gets a true manifest."""

    def in_json(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
        def prepare(step: Path) -> None:
            value = json.loads((step / name).read_text())
            change(value)
            (step / name).write_text(json.dumps(value))

        return prepare

    def replaced_by_link(name: str) -> Callable[[Path], object]:
        def prepare(step: Path) -> None:
            (step / name).unlink()
            (step / name).symlink_to(secret)

        return prepare

    def step_is_a_link(step: Path) -> None:
        step.rename(step.parent / "elsewhere")
        step.symlink_to(step.parent / "elsewhere")

    def listed(path: str) -> Callable[[Path], object]:
        def change(value: Any) -> None:
            value["files"][path] = {"bytes": 8, "sha256": sha256(b"private\n")}
            value["sha256"] = sha256(json.dumps(value["files"], sort_keys=True).encode())

        return in_json(manifest.NAME, change)

    def model(**settings: object) -> Callable[[Path], object]:
        return in_json("meta.json", lambda value: value["config"]["model"].update(settings))

    def fifo(step: Path) -> None:
        (step / "meta.json").unlink()
        os.mkfifo(step / "meta.json")

    def pickled(step: Path) -> None:
        for file in ("params/_METADATA", "params/_sharding", "tokenizer.json", "meta.json"):
            (step / file).write_bytes(pickle.dumps(Bomb()))

    def extra_pickle(step: Path) -> None:
        (step / "arrays.pkl").write_bytes(pickle.dumps(Bomb()))

    def array(shape: list[int], chunks: list[int]) -> Callable[[Path], object]:
        def prepare(step: Path) -> None:
            stored = {
                "driver": "zarr",
                "kvstore": {
                    "driver": "ocdbt",
                    "base": f"file://{step}/params/",
                    "path": "embedding.embedding/",
                },
                "metadata": {"shape": shape, "chunks": chunks, "dtype": "<f4"},
                "create": True,
                "delete_existing": True,
            }
            name = _embedding_name(step)
            stored["kvstore"]["path"] = f"{name}/"  # type: ignore[index]
            tensorstore.open(stored).result()

        return prepare

    def nested(step: Path) -> None:
        (step / "meta.json").write_text("[" * 100_000)

    def deep_folders(step: Path) -> None:
        (step / "/".join(["d"] * 60)).mkdir(parents=True)

    yield "a pickle among the files", extra_pickle, False
    yield "pickles in place of files", pickled, True
    yield "a link in place of a file", replaced_by_link("meta.json"), False
    yield "a link in place of an array file", replaced_by_link("params/_METADATA"), False
    yield "the step is a link", step_is_a_link, False
    yield "the manifest lists ../", listed("../../secret.txt"), False
    yield "the manifest lists an absolute path", listed(str(secret)), False
    yield "a pipe in place of a file", fifo, False
    yield "folders sixty deep", deep_folders, False
    yield "JSON nested 100,000 deep", nested, True
    yield "a model of 4e11 weights", model(n_embd=2**14, n_layer=128, n_head=1), True
    yield "a model beyond all limits", model(vocab_size=10**12), True
    yield "a model of negative width", model(n_embd=-32), True
    yield "a model of text", model(n_embd="32"), True
    yield "another model than the arrays'", model(n_embd=64), True
    yield "an array of 1e12 elements", array([10**6, 10**6], [320, 32]), True
    yield "an array in chunks of 1e12", array([320, 32], [10**6, 10**6]), True
    yield "an unknown setting", in_json("meta.json", lambda v: v["config"].update(run="rm")), True
    yield "no scores in its scores", in_json("meta.json", lambda v: v.update(scores={"a": 1})), True
    yield (
        "its iteration is a path",
        in_json("meta.json", lambda v: v.update(iteration="../7")),
        True,
    )


def _embedding_name(step: Path) -> str:
    content = (step / "params" / "array_metadatas" / "process_0").read_text()
    return next(name for name in re.findall(r'"param_name": "([^"]+)"', content) if "embed" in name)
