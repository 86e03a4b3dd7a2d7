"""What a text shares with the training works: against brute force, and through the commands."""

import itertools
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydivsufsort import divsufsort

from gothic_jax.commands import chat, data, evaluate
from gothic_jax.commands import index as index_command
from gothic_jax.errors import UserError
from gothic_jax.machine.files import sha256
from gothic_jax.measuring import novelty
from gothic_jax.measuring.novelty import Index
from gothic_jax.text.works import read_text
from tests.common import DARK, TEXT, Workplace
from tests.torture.world import points

WORDS = st.lists(st.sampled_from(["sea", "the", "old", "gate", "of"]), max_size=40)


def index_of(works: list[list[str]]) -> Index:
    vocabulary = sorted({word for work in works for word in work})
    ids = {word: n for n, word in enumerate(vocabulary, start=1)}
    table, words = [], []
    for number, work in enumerate(works):
        table.append({"title": str(number), "voice": "", "start": len(words)})
        words += [*(ids[word] for word in work), 0]
    array = np.array(words, np.uint32)
    return Index(vocabulary, array, np.asarray(divsufsort(array), np.int32), table)


def shared(query: list[str], works: list[list[str]]) -> int:
    """By brute force: the length of the longest beginning of `query` within one work."""
    best = 0
    for work in works:
        for start in range(len(work)):
            both = zip(query, work[start:], strict=False)
            best = max(
                best, sum(1 for _ in itertools.takewhile(lambda pair: len({*pair}) == 1, both))
            )
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), WORDS)
def test_all_figures_are_those_of_brute_force(works: list[list[str]], query: list[str]) -> None:
    measured = index_of(works).measure(" ".join(query))
    lengths = [shared(query[start:], works) for start in range(len(query))]
    assert measured.words == len(query)
    assert (measured.longest.words if measured.longest else 0) == max(lengths, default=0)
    if measured.longest is not None:
        span = measured.longest
        work = works[int(span.work)]
        assert work[span.place :][: span.words] == query[span.start :][: span.words]
    inside = {
        start + offset
        for start, length in enumerate(lengths)
        if length >= novelty.COPIED_WORDS
        for offset in range(length)
    }
    assert measured.copied == pytest.approx(len(inside) / len(query) if query else 0)
    for size, share in enumerate(measured.new_ngrams, start=1):
        ngrams = len(query) - size + 1
        new = sum(length < size for length in lengths[:ngrams])
        assert share == pytest.approx(new / ngrams)


@pytest.mark.parametrize("length", [15, 16, 17, 48, 49, 150])
@pytest.mark.parametrize("start", [0, 30, 150])
def test_long_recitals_are_found_whole(start: int, length: int) -> None:
    work = [f"w{n}" for n in range(300)]
    index = index_of([work, work[:5]])
    span = index.measure(" ".join(["new", *work[start : start + length], "new"])).longest
    assert span is not None
    assert (span.start, span.words, span.place) == (1, length, start)


def test_a_books_spans_are_those_of_its_chapters() -> None:
    rng = np.random.default_rng(0)
    work = [f"w{n}" for n in rng.integers(0, 2000, 20_000)]
    index = index_of([work])
    # Words in mixed order, a recital in the middle.
    book = [str(word) for word in rng.permutation(work)]
    book[10_000:10_300] = work[700:1_000]
    longest = index.measure(" ".join(book)).longest
    assert longest is not None
    assert longest.place <= 700 < longest.place + longest.words
    assert longest.words >= 300
    chapter = index.measure(" ".join(book[9_000:11_000])).longest
    assert chapter is not None
    assert (chapter.words, chapter.place) == (longest.words, longest.place)


def test_case_points_and_line_ends_hide_no_recital() -> None:
    work = "There are doors beneath the harbour that no tide has opened since".lower().split()
    text = 'He said: "THERE are doors, beneath the harbour,\nthat no tide has opened." And left.'
    measured = index_of([work]).measure(text)
    assert [(span.start, span.words, span.place) for span in measured.spans] == [(2, 11, 0)]
    assert novelty.highlighted(measured, text, "[", "]") == (
        'He said: "[THERE are doors, beneath the harbour,\nthat no tide has opened]." And left.'
    )


def test_a_text_without_words_is_measured_and_has_none() -> None:
    measured = index_of([["a"]]).measure(" ... \n")
    assert (measured.words, measured.longest, measured.copied) == (0, None, 0.0)
    assert novelty.describe(measured, " ... \n", None)


@pytest.fixture
def indexed(trained: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A finished run whose training text has an index."""
    settings = ["--resume", "--out-dir", str(trained.out_dir), "--max-iters", "7"]
    assert trained.train(*settings[:1], max_iters=7) == 0
    long = "".join(
        f"Nothing was here before {n} lamps went out over the marsh. " for n in range(99)
    )
    (trained.root / "mixed_val.txt.held").write_text(f"<|wilde|>\n{long}\n<|endoftext|>\n")
    arguments = ["--file", str(trained.root / "mixed_train.txt")]
    assert (
        index_command.main([*arguments, "--held-out", str(trained.root / "mixed_val.txt.held")])
        == 0
    )
    return trained


def test_eval_and_chat_tell_what_is_copied_beside_held_out_works(
    indexed: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = DARK.splitlines()[0]
    file = indexed.root / "mine.txt"
    file.write_text(f"Quite new words. {copied}")
    where = ["--checkpoint", f"{indexed.out_dir}/latest"]
    capsys.readouterr()
    assert evaluate.main([*where, "--novelty", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["longest_copied_span"]["voice"] == "lovecraft"
    assert report["longest_copied_span"]["words"] == len(novelty.find_words(copied))
    assert report["held_out"]["passages"] > 0
    assert evaluate.main([*where, "--novelty", str(file)]) == 0
    assert "held-out works" in capsys.readouterr().out
    assert chat.main([*where, "--novelty", "--max-tokens", "30", "--num-samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("in copied spans of 8 words or more") == 2
    assert out.count("held-out works") == 2


def test_a_training_text_that_was_moved_can_be_named(
    indexed: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = indexed.root / "texts [2024]" / "mixed_train.txt"
    moved.parent.mkdir()
    (indexed.root / "mixed_train.txt").rename(moved)
    shutil.rmtree(indexed.root / ".novelty")
    where = ["--checkpoint", f"{indexed.out_dir}/latest"]
    for command in (
        lambda *more: evaluate.main([*where, "--novelty", str(moved), *more]),
        lambda *more: chat.main([*where, "--best-of", "2", "--max-tokens", "8", *more]),
    ):
        shutil.rmtree(moved.parent / ".novelty", ignore_errors=True)
        capsys.readouterr()
        assert command() == 2
        assert "--train-file" in capsys.readouterr().err
        assert command("--train-file", str(moved)) == 2
        build = capsys.readouterr().err.split("`")[1]
        assert index_command.main(shlex.split(build)[1:]) == 0
        assert command("--train-file", str(moved)) == 0


def test_tensorboard_shows_what_samples_copy(indexed: Workplace) -> None:
    assert indexed.train("--resume", max_iters=9, eval_interval=2) == 0
    names = {(name, step) for name, step, _ in points(indexed.out_dir / "logs")}
    for voice in ("wilde", "lovecraft"):
        assert (f"novelty/longest_copied_words/{voice}", 8) in names
        assert (f"novelty/copied_share/{voice}", 8) in names


def test_a_missing_index_names_the_command_that_builds_it(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.train("--resume", max_iters=7) == 0
    for command in (
        lambda: chat.main(["--checkpoint", f"{trained.out_dir}/latest", "--novelty"]),
        lambda: evaluate.main(["--checkpoint", f"{trained.out_dir}/latest", "--novelty", "x"]),
    ):
        capsys.readouterr()
        assert command() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"gothic-index --file {trained.root}/mixed_train.txt" in error


def test_the_index_of_an_earlier_text_stays_for_the_model_that_read_it(
    indexed: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = indexed.root / "mixed_train.txt"
    old = path.read_text()
    path.write_text(old + "One line more.\n")
    assert index_command.main(["--file", str(path)]) == 0
    file = indexed.root / "mixed_val.txt"
    where = ["--checkpoint", f"{indexed.out_dir}/latest", "--novelty", str(file)]
    assert evaluate.main(where) == 0
    for index in indexed.root.glob(".novelty/*"):
        index.rename(index.with_name(f"{index.name}.away"))
    capsys.readouterr()
    assert evaluate.main(where) == 2
    assert "put that text back" in capsys.readouterr().err


def test_a_held_out_text_that_nobody_named_may_be_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = tmp_path / "me_train.txt", tmp_path / "me_val.txt"
    train.write_text("The tide was out, and nobody had seen it go. " * 40)
    val.write_text("It came back at night.\n")
    assert index_command.main(["--file", str(train)]) == 0
    assert f"{val} is not compared with" in capsys.readouterr().out
    assert novelty.load(train, sha256(read_text(train).encode())).baseline is None
    assert index_command.main(["--file", str(train), "--held-out", str(val)]) == 2
    assert "no passage of 150 words" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_is_no_text(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert index_command.main(["--file", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["words.npy", "suffixes.npy", "index.json", "manifest.json"])
def test_a_damaged_index_is_told_and_training_goes_on_without(
    indexed: Workplace, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (file,) = indexed.root.glob(f".novelty/*/{name}")
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    capsys.readouterr()
    where = ["--checkpoint", f"{indexed.out_dir}/latest"]
    assert evaluate.main([*where, "--novelty", str(indexed.root / "mixed_val.txt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error
    assert "`gothic-index --file" in error
    if name == "words.npy":
        assert indexed.train("--resume", max_iters=8) == 0
        assert "will not show what samples copy" in capsys.readouterr().out


def test_an_index_of_another_text_is_none_of_this_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    novelty.build(path, None)
    novelty.load(path, sha256(TEXT.encode()))
    with pytest.raises(UserError, match="is not the text that the model was trained on"):
        novelty.load(path, sha256(b"another"))
    path.with_name("b.txt").write_text(TEXT)
    with pytest.raises(UserError, match=r"`gothic-index --file .*/b.txt` builds it"):
        novelty.load(path.with_name("b.txt"), sha256(TEXT.encode()))


@pytest.mark.corpus
@pytest.mark.long
def test_the_real_corpus_is_indexed_and_searched(mirror: Path, tmp_path: Path) -> None:
    where = ["--data-dir", str(tmp_path), "--mirror", str(mirror), "--splits", "train,val"]
    assert data.main(where) == 0
    path = tmp_path / "processed" / "mixed_train.txt"
    novelty.build(path, read_text(path.with_name("mixed_val.txt")))
    text = read_text(path)
    index, baseline = novelty.load(path, sha256(text.encode()))
    assert baseline is not None
    # The corpus is split by works that share no 13 words.
    assert baseline["longest_max"] < 13
    assert baseline["copied"] < 0.01
    assert index.measure(text[1_000_000:1_001_000]).copied > 0.9
    cthulhu = "the inability of the human mind to correlate all its contents"
    found = index.measure(f"I wondered at {cthulhu}, as he put it.").longest
    assert found is not None
    assert (found.work, found.voice) == ("The Call of Cthulhu", "lovecraft")
