"""`gothic-data`: what it writes, what it refuses, and the texts it makes of real works."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gothic_jax.commands.data import main
from gothic_jax.text import corpus
from gothic_jax.text.corpus import Work, load_manifest
from gothic_jax.text.voices import RESERVED_VOICES, VOICE_NAME
from gothic_jax.text.works import SPLITS

Run = Callable[..., int]


def prose(seed: int, paragraphs: int = 3, length: int = 40) -> str:
    """Paragraphs of words that no other seed has in the same order."""
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ("mist", "tomb", "sea", "lily", "moon") for b in ("", "s", "less")]
    return "\n\n".join(
        " ".join(rng.choice(words) for _ in range(length)).capitalize() + "."
        for _ in range(paragraphs)
    )


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of six small works, which the manifest lists in place of the real ones."""
    works = []
    for n, (voice, split) in enumerate(
        (voice, split) for voice in ("wilde", "lovecraft") for split in SPLITS
    ):
        raw = f"{voice.upper()}\r\n\r\n{prose(n)}\r\n".encode()
        path = tmp_path / "mirror" / voice / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        file, digest = f"{voice}/{split}.txt", hashlib.sha256(raw).hexdigest()
        row = (voice, "", file, split, "story", split, len(raw), digest, "http://x/", "", "")
        works.append(Work(*row))
    monkeypatch.setattr(corpus, "load_manifest", lambda: works)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(small: Path, file: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives one work another text."""
    (small / "mirror" / file).write_bytes(body.encode())
    digest = hashlib.sha256(body.encode()).hexdigest()
    works = [
        replace(w, bytes=len(body.encode()), sha256=digest) if w.file == file else w
        for w in corpus.load_manifest()
    ]
    monkeypatch.setattr(corpus, "load_manifest", lambda: works)


def processed(folder: Path) -> dict[str, str]:
    paths = (folder / "data" / "processed").glob("*")
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


# The manifest


def test_the_manifest_lists_every_work_with_address_hash_voice_and_split() -> None:
    works = load_manifest()
    assert len(works) == len({w.file for w in works}) == 90
    assert {w.voice for w in works} == {"wilde", "lovecraft"}
    for work in works:
        assert work.split in SPLITS
        assert work.url.startswith("https://")
        assert len(work.sha256) == 64
        assert work.file.startswith(f"{work.voice}/")
    for voice in ("wilde", "lovecraft"):
        assert {w.split for w in works if w.voice == voice} == set(SPLITS)


@pytest.mark.corpus
def test_the_manifest_has_the_hashes_of_the_mirror(mirror: Path) -> None:
    for work in load_manifest():
        path = mirror / work.file
        if path.exists():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == work.sha256


# What is written


def test_each_voice_and_split_has_a_file_of_marked_works(small: Path) -> None:
    assert main(["--mirror", "mirror"]) == 0
    files = processed(small)
    names = {f"{v}_{s}.txt" for v in ("wilde", "lovecraft", "mixed") for s in SPLITS}
    assert set(files) == names | {"report.json"}
    body = f"LOVECRAFT\n\n{prose(4)}"
    assert files["lovecraft_val.txt"] == f"<|lovecraft|>\n{body}\n<|endoftext|>\n"
    assert files["mixed_val.txt"] == files["wilde_val.txt"] + files["lovecraft_val.txt"]


def test_the_report_counts_works_words_and_bytes(small: Path) -> None:
    main(["--mirror", "mirror"])
    counts = json.loads(processed(small)["report.json"])["counts"]
    body = f"WILDE\n\n{prose(0)}"
    assert counts["wilde"]["train"] == {"works": 1, "words": 121, "bytes": len(body)}
    assert counts["mixed"]["train"]["words"] == 242


def test_the_summary_is_printed(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--mirror", "mirror"])
    out = " ".join(capsys.readouterr().out.split())
    assert "lovecraft test 1 121" in out
    assert "Dropped 0 repeated paragraphs" in out
    assert "0 of 436 held-out 13-word sequences occur in train." in out


def test_splits_and_voices_can_be_left_out_and_stale_files_go(small: Path) -> None:
    main(["--mirror", "mirror"])
    main(["--mirror", "mirror", "--splits", "train,val", "--voices", "wilde"])
    assert set(processed(small)) == {
        "wilde_train.txt",
        "wilde_val.txt",
        "mixed_train.txt",
        "mixed_val.txt",
        "report.json",
    }


def test_the_same_command_writes_the_same_bytes(small: Path) -> None:
    main(["--mirror", "mirror"])
    first = processed(small)
    main(["--mirror", "mirror"])
    assert processed(small) == first


def test_files_in_raw_need_no_mirror(small: Path) -> None:
    main(["--mirror", "mirror"])
    for path in (small / "mirror").rglob("*.txt"):
        path.unlink()
    assert main(["--mirror", "mirror"]) == 0


def test_a_mirror_by_address_is_laid_out_like_a_folder(small: Path) -> None:
    works = corpus.load_manifest()
    item = corpus.items(works, "http://127.0.0.1/texts/", Path("raw"))[0]
    assert item.source == "http://127.0.0.1/texts/wilde/train.txt"
    assert item.path == Path("raw/wilde/train.txt")
    assert corpus.items(works, None, Path("raw"))[0].source == works[0].url


# The library


def in_library(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    """Makes a library of three works: two by Poe, one by somebody with little text."""
    works = []
    for n, (voice, split) in enumerate((("poe", "train"), ("poe", "val"), ("library", "train"))):
        file = f"library/{voice}/{n}.txt"
        raw = f"{voice.upper()}\n\n{prose(50 + n)}\n".encode()
        path = small / "mirror" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        digest = hashlib.sha256(raw).hexdigest()
        row = (voice, "A. Author", file, f"Work {n}", "tale", split, len(raw), digest, "", "", "")
        works.append(Work(*row))
    monkeypatch.setattr(corpus, "load_library", lambda: works)


def test_the_library_has_files_of_its_own_and_one_of_everything(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["--mirror", "mirror"])
    without = processed(small)
    in_library(monkeypatch, small)
    assert main(["--mirror", "mirror", "--library"]) == 0
    files = processed(small)
    assert {n: files[n] for n in without if n != "report.json"} == {
        n: content for n, content in without.items() if n != "report.json"
    }
    assert set(files) - set(without) == {
        *("library_train.txt", "library_val.txt"),
        *(f"all_{split}.txt" for split in SPLITS),
    }
    assert files["library_train.txt"].startswith("<|poe|>\n")
    assert "<|library|>\n" in files["library_train.txt"]
    assert files["all_train.txt"] == files["mixed_train.txt"] + files["library_train.txt"]


def test_a_voice_of_the_library_can_be_chosen_by_name(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_library(monkeypatch, small)
    assert main(["--mirror", "mirror", "--voices", "wilde,poe"]) == 0
    files = processed(small)
    assert files["mixed_train.txt"] == files["wilde_train.txt"] + files["poe_train.txt"]
    assert "library_train.txt" not in files
    assert main(["--mirror", "mirror", "--library", "--add", "poe=own/*.txt"]) == 2


def test_the_voices_are_listed_with_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["wilde", "23", "4,997"] in lines
    assert ["machen", "Arthur", "Machen", "8", "2,337"] in lines


def test_the_library_lists_every_work_once() -> None:
    works = [*load_manifest(), *corpus.load_library()]
    assert len(works) == 90 + 249
    assert len({work.file for work in works}) == len({work.sha256 for work in works}) == 339
    assert all(work.url.startswith("https://") for work in works)
    assert all(VOICE_NAME.fullmatch(work.voice) for work in works)
    assert not RESERVED_VOICES & {work.voice for work in works}


@pytest.mark.long
def test_the_real_library_keeps_the_rules_of_its_manifest(mirror: Path) -> None:
    works = corpus.load_library()
    if not (mirror / works[0].file).exists():
        pytest.skip("the mirror has no library")
    sizes: dict[str, int] = {}
    for work, text in zip(works, corpus.read_works(works, mirror), strict=True):
        body, words = text.body, len(text.body.split())
        # What rules drop, apart from Gutenberg's pages and what the manifest's markers cut off.
        by_rules = {k: n for k, n in text.dropped.items() if k not in ("gutenberg", "markers")}
        assert sum(by_rules.values()) <= 0.15 * (words + sum(by_rules.values())), work.file
        author = work.file.split("/")[1]
        sizes[author] = sizes.get(author, 0) + len(body.encode())
    for work in works:
        author = work.file.split("/")[1]
        # The Yellow Book is by many.
        large = sizes[author] >= 500_000 and author != "yellow_book"
        assert work.voice == (author if large else "library")
    held_out = [work for work in works if work.split == "val"]
    assert len({work.voice for work in held_out}) == len(held_out) == 10


def test_many_works_are_read_as_one_by_one(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [work for work in load_manifest() if work.split == "val"]
    monkeypatch.setattr(corpus, "BYTES_A_PROCESS", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert corpus.read_works(works, mirror) == [corpus.read_work(w, mirror) for w in works]


READ_ALL = """
from pathlib import Path
from gothic_jax.text import corpus
import os, sys
os.cpu_count = lambda: 2
corpus.BYTES_A_PROCESS = 1
works = [work for work in corpus.load_manifest() if work.split == "train"]
if __name__ == "__main__":
    corpus.read_works(works, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_processes_that_clean_end_with_their_command(
    mirror: Path, tmp_path: Path, end: signal.Signals
) -> None:
    script = tmp_path / "read_all.py"
    script.write_text(READ_ALL)
    command = [sys.executable, str(script), str(mirror)]
    options: Any = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as run:
        process = psutil.Process(run.pid)
        workers: list[psutil.Process] = []
        while len(workers) < 2 and run.poll() is None:
            children = process.children(recursive=True)
            workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
        # As Ctrl-C in a terminal, the signal reaches every process.
        os.killpg(run.pid, end) if end == signal.SIGINT else run.kill()
        _, ended_late = psutil.wait_procs(workers, timeout=60)
        errors = run.stderr.read() if run.stderr else ""
    assert len(workers) == 2
    assert not ended_late
    # Only the command itself tells of the interruption.
    assert errors.count("KeyboardInterrupt") == (end == signal.SIGINT)


# Repeats and leaks


def test_repeats_are_kept_on_demand(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(small, "lovecraft/train.txt", prose(0), monkeypatch)
    main(["--mirror", "mirror", "--keep-duplicates"])
    assert "lovecraft_train.txt" in processed(small)
    main(["--mirror", "mirror"])
    report = json.loads(processed(small)["report.json"])
    assert report["duplicates"]["paragraphs"] == 3
    assert "lovecraft_train.txt" not in processed(small)


def test_a_leak_is_refused_and_nothing_is_written(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--mirror", "mirror"])
    before = processed(small)
    copied = prose(0).split("\n\n")[0]
    change(small, "lovecraft/test.txt", f"{copied}\n\n{prose(9)}", monkeypatch)
    assert main(["--mirror", "mirror"]) == 2
    assert "lovecraft/test.txt (test, 18.9%)" in capsys.readouterr().err
    assert processed(small) == before
    assert main(["--mirror", "mirror", "--allow-leaks"]) == 0
    overlap = json.loads(processed(small)["report.json"])["overlap"]
    assert overlap["leaks"] == ["lovecraft/test.txt"]
    assert overlap["in_train"] == 28


# One's own texts


def add_files(folder: Path, count: int) -> None:
    (folder / "own").mkdir()
    for n in range(count):
        (folder / "own" / f"{n}.txt").write_text(f"“Own {n}”\n\n{prose(100 + n)}")


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(2, [1, 1, 0]), (3, [1, 1, 1]), (10, [8, 1, 1]), (40, [36, 2, 2])],
)
def test_own_files_are_split_by_file(small: Path, count: int, sizes: list[int]) -> None:
    add_files(small, count)
    assert main(["--voices", "none", "--add", "poe=own/*.txt"]) == 0
    report = json.loads(processed(small)["report.json"])
    poe = report["counts"]["poe"]
    assert [poe.get(split, {"works": 0})["works"] for split in SPLITS] == sizes
    assert processed(small)["poe_train.txt"].startswith('<|poe|>\n"Own ')


def test_an_own_voice_joins_the_others(small: Path) -> None:
    add_files(small, 3)
    main(["--mirror", "mirror", "--add", f"poe={small}/own/*.txt"])
    files = processed(small)
    assert files["mixed_val.txt"].endswith(files["poe_val.txt"])


def test_a_single_file_is_split_by_position(small: Path) -> None:
    body = prose(5, paragraphs=200)
    Path("diary.txt").write_text(body)
    assert main(["--voices", "none", "--add", "me=diary.txt"]) == 0
    files = processed(small)
    parts = [files[f"me_{s}.txt"].split("\n", 1)[1] for s in SPLITS]
    assert "\n\n".join(p.removesuffix("\n<|endoftext|>\n") for p in parts) == body
    shares = [len(part) / len(body) for part in parts]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


@pytest.mark.parametrize(
    ("text", "splits"),
    [
        ("A line of a few words", 1),
        (prose(5, 2), 2),
        (prose(5, 3), 3),
        ("\n".join(prose(5, 30).split("\n\n")), 3),
        ("One. Two. Three. Four. Five. Six.", 3),
        (" ".join(prose(5, 30).split()), 3),
        ("".join(chr(0x4E00 + n) for n in range(1500)), 3),
    ],
    ids=["a line", "2 paragraphs", "3 paragraphs", "lines", "sentences", "words", "ideographs"],
)
def test_a_single_file_is_cut_at_what_it_has(
    small: Path, capsys: pytest.CaptureFixture[str], text: str, splits: int
) -> None:
    Path("diary.txt").write_text(text)
    assert main(["--voices", "none", "--add", "me=diary.txt"]) == 0
    assert ("too short to hold out" in capsys.readouterr().err) == (splits == 1)
    files = processed(small)
    parts = [files[f"me_{s}.txt"] for s in SPLITS if f"me_{s}.txt" in files]
    assert len(parts) == splits
    bodies = [part.split("\n", 1)[1].removesuffix("\n<|endoftext|>\n") for part in parts]
    assert "".join("".join(bodies).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("pattern", "titles"),
    [
        ("News [1].txt", {"News [1]"}),
        ("[2024]/News [1].txt", {"News [1]"}),
        ("[2024]/*.txt", {"News [1]", "News 1"}),
        ("[2024]/N*[1].txt", {"News 1"}),
        ("[[]2024]/*[[]*.txt", {"News [1]"}),
        ("202[4]/*.txt", {"other"}),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_path_with_brackets_that_exists_is_taken_as_it_is(
    small: Path, pattern: str, titles: set[str], absolute: bool
) -> None:
    for folder in (Path(), Path("[2024]")):
        folder.mkdir(exist_ok=True)
        for n, name in enumerate(("News [1].txt", "News 1.txt")):
            (folder / name).write_text(prose(n, 5))
    Path("2024").mkdir()
    Path("2024", "other.txt").write_text(prose(7, 5))
    path = f"{small}/{pattern}" if absolute else pattern
    assert main(["--voices", "none", "--add", f"me={path}"]) == 0
    works = json.loads(processed(small)["report.json"])["works"]
    assert {work["title"] for work in works} == titles


def test_a_file_that_repeats_itself_is_a_leak(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("diary.txt").write_text("\n\n".join([prose(5, 2)] * 20))
    assert main(["--voices", "none", "--add", "me=diary.txt"]) == 2
    assert "me/diary.txt (val, 100.0%)" in capsys.readouterr().err


# Bad input: one line that names the cure, exit 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--splits", "train,foo"], "unknown split foo; choose among train, val, test"),
        (["--splits", ","], "choose among"),
        (["--voices", "nobody"], "unknown voice nobody; `gothic-data --list` lists them"),
        (["--voices", "none"], "--add NAME=GLOB"),
        (["--mirror", "nowhere"], "no such folder"),
        (["--jobs", "0"], "--help"),
        (["--add", "poe"], "write NAME=GLOB"),
        (["--add", "=x.txt"], "write NAME=GLOB"),
        (["--add", "Poe=x.txt"], "write NAME=GLOB"),
        (["--add", "mixed=x.txt"], "reserved"),
        (["--add", "endoftext=x.txt"], "reserved"),
        (["--add", "any=x.txt"], "reserved"),
        (["--add", "wilde=x.txt"], "--voices"),
        (["--add", "poe=*.nothing"], "no file matches"),
        (["--add", "poe=[ab]*.nothing"], "write [[] for [ in a name"),
        (["--add", "poe=folder/"], "folder/ holds no file of .txt,"),
        (["--add", "poe=one.txt", "--encoding", "utf-99"], "try cp1252"),
        (["--add", "poe=latin.txt", "--encoding", "ascii"], "byte 3 (line 1) is not ascii"),
        (["--add", "poe=a**b"], "cannot be searched"),
        (["--add", f"poe={'x' * 300}.txt"], "cannot be searched (File name too long)"),
        (["--add", "poe=~no-such-user/*.txt"], "cannot be searched"),
        (["--add", "poe=empty.txt"], "contains no text"),
        (["--add", "poe=nul.txt"], "byte 3 (line 1) is NUL, so it is not plain text"),
        (["--add", "me=one.txt", "--voices", "none", "--splits", "test"], "leaves no texts"),
    ],
)
def test_bad_input_names_its_cure(
    small: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], cure: str
) -> None:
    Path("folder").mkdir()
    Path("empty.txt").write_text(" \n\n")
    Path("nul.txt").write_bytes(b"GIF\0")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("one.txt").write_text("One paragraph.\n\nAnd another.")
    mirror = [] if "--mirror" in arguments else ["--mirror", "mirror"]
    assert main([*mirror, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gothic-data: error: ")
    assert err.count("\n") == 1
    assert cure in err
    assert not Path("data", "processed").exists()


def test_a_test_work_that_the_mirror_lacks_names_the_splits(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "mirror" / "wilde" / "test.txt").unlink()
    assert main(["--mirror", "mirror"]) == 2
    assert "--splits train,val" in capsys.readouterr().err
    assert main(["--mirror", "mirror", "--splits", "train,val"]) == 0


def test_a_changed_file_in_the_mirror_is_refused(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "mirror" / "wilde" / "train.txt").write_text("tampered")
    assert main(["--mirror", "mirror"]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (small / "data" / "raw" / "wilde" / "train.txt").exists()


def test_a_failure_while_writing_leaves_the_earlier_files(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--mirror", "mirror"])
    before = processed(small)
    write = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        if "mixed_test" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert main(["--mirror", "mirror", "--voices", "wilde"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert processed(small) == before


def test_help_does_not_wait_for_slow_imports(small: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gothic_jax.commands.data", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gothic_jax.commands.cli" in imported
    assert not imported & {"rich", "http.client", "chardet", "numpy", "jax"}


# The real texts


@pytest.mark.corpus
@pytest.mark.long
def test_the_real_corpus_has_no_leak_and_drops_the_reprinted_essays(
    mirror: Path, tmp_path: Path
) -> None:
    there = {w.split for w in load_manifest()} - {
        w.split for w in load_manifest() if not (mirror / w.file).exists()
    }
    splits = ",".join(s for s in SPLITS if s in there)
    assert main(["--mirror", str(mirror), "--splits", splits, "--data-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "processed" / "report.json").read_text())
    assert report["overlap"]["leaks"] == []
    dropped = {r["file"]: r["words"] for r in report["duplicates"]["works"]}
    assert dropped["wilde/pg14062.txt"] > 10_000
    assert dropped["wilde/pg2061.txt"] > 10_000
    for voice in ("wilde", "lovecraft"):
        body = (tmp_path / "processed" / f"{voice}_train.txt").read_text(encoding="utf-8")
        for leftover in ("_", "*", "Project Gutenberg", "http", "www.", "Footnote", "  ", "--"):
            assert leftover not in body
        assert not set("“”‘’\r\t") & set(body)
        assert body.count("<|") == 2 * report["counts"][voice]["train"]["works"]
