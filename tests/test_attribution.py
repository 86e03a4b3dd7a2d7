"""scripts/attribution.py, on works that a child could tell apart and on a tiny model."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from gothic_jax.measuring.novelty import build
from tests.common import TEXT, Workplace

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "attribution.py"))


def works(voice: str, sentence: str, count: int) -> str:
    return "".join(f"<|{voice}|>\n{sentence * 20}\n<|endoftext|>\n" for _ in range(count))


def test_works_are_cut_into_passages_that_know_their_work(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(works("wilde", "one two three four five. ", 2) + works("poe", "a b. ", 1))
    file.write_text(file.read_text() + works("saki", "c d. ", 1))
    known = SCRIPT["passages"]([file], 40, ["wilde", "poe"])
    assert known.voices == ["wilde"] * 4 + ["poe"]
    assert known.works == [0, 0, 1, 1, 2]
    assert all(len(text.split()) == 40 for text in known.texts)


def test_the_classifier_is_asked_about_works_that_it_has_not_seen(tmp_path: Path) -> None:
    """Told apart by style, 100%; by what only the very work says, no better than chance."""
    file = tmp_path / "a.txt"
    style = works("wilde", "Oh, how charming! ", 4) + works("poe", "The tomb was old. ", 4)
    file.write_text(style)
    right = SCRIPT["leaving_works_out"](SCRIPT["passages"]([file], 10, ["wilde", "poe"]), folds=4)
    assert right["wilde"]["share"] == right["poe"]["share"] == 1.0
    names = [f"{a}{b}{a}{b} " for a, b in zip("abcdefgh", "stuvwxyz", strict=True)]
    file.write_text(
        "".join(works(("wilde", "poe")[i % 2], name * 5, 1) for i, name in enumerate(names))
    )
    right = SCRIPT["leaving_works_out"](SCRIPT["passages"]([file], 10, ["wilde", "poe"]), folds=4)
    assert right["wilde"]["share"] + right["poe"]["share"] < 1.5


def test_shares_have_wilsons_interval() -> None:
    """Against the closed form's known values: 8 of 10, and 0 of 10 (Wilson 1927)."""
    share = SCRIPT["share_right"](np.arange(10) < 8)
    assert share == pytest.approx({"share": 0.8, "low": 0.4902, "high": 0.9433, "of": 10}, abs=1e-4)
    none = SCRIPT["share_right"](np.zeros(10, bool))
    assert none["low"] == 0.0
    assert none["high"] == pytest.approx(0.2775, abs=1e-4)


def test_what_is_repeated_is_the_share_of_sequences_that_came_before() -> None:
    assert SCRIPT["repeated"]("One two three four five.") == 0
    # Six sequences of three words, of which the last two came before.
    assert SCRIPT["repeated"]("a b c d; A, b c d") == pytest.approx(2 / 6)
    assert SCRIPT["repeated"]("sunset sunset sunset sunset sunset") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--words", "0"], "--words must be at least 20"),
        (["--folds", "1"], "--folds must be at least 2"),
        (["--sampling", "0.8,40"], "must be temperature, top-k and top-p"),
        (["--sampling", "0.8,40,2"], "top-p must be above 0"),
        (["--per-prompt", "0"], "--per-prompt must be at least 1"),
    ],
)
def test_mistakes_are_told_before_the_checkpoint_is_opened(
    capsys: pytest.CaptureFixture[str], flags: list[str], cure: str
) -> None:
    assert SCRIPT["main"](["nowhere", *flags]) == 2
    captured = capsys.readouterr()
    assert cure in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


@pytest.mark.long
def test_voices_that_it_does_not_know_are_told(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.train("--resume", max_iters=7) == 0  # with the text of this folder
    build(trained.root / "mixed_train.txt", None)
    for given, told in (("wilde,poe", "no voice 'poe'"), ("wilde", "at least two")):
        capsys.readouterr()
        assert SCRIPT["main"]([f"{trained.out_dir}/latest", "--voices", given]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.long
def test_more_folds_than_works_are_told_before_anything_is_written(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.train("--resume", max_iters=7) == 0  # with the text of this folder
    build(trained.root / "mixed_train.txt", None)
    capsys.readouterr()
    flags = ["--words", "30", "--folds", "9"]
    assert SCRIPT["main"]([f"{trained.out_dir}/latest", *flags]) == 2
    captured = capsys.readouterr()
    assert "works of wilde" in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


@pytest.mark.long
def test_a_checkpoint_is_asked_from_the_command_to_the_report(
    trained: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.train("--resume", max_iters=7) == 0  # with the text of this folder
    build(trained.root / "mixed_train.txt", TEXT)
    output = tmp_path / "report.json"
    flags = ["--output", str(output), "--folds", "2", "--words", "30", "--per-prompt", "2"]
    flags += ["--sampling", "1,40,0.9", "0.9,40,0.9"]
    capsys.readouterr()
    assert SCRIPT["main"]([f"{trained.out_dir}/latest", *flags]) == 0
    report = json.loads(output.read_text())
    assert report["voices"] == ["wilde", "lovecraft"]
    assert [row["weight"] for row in report["blends"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all(0 < row["attributed"]["of"] <= 16 for row in report["blends"])
    assert set(report["originality"]) == {"wilde", "lovecraft", "held out"}
    for voice in ("wilde", "lovecraft"):
        own = report["written"][voice]
        assert sum(own["taken_for"].values()) == own["right"]["of"]
    same, other = report["sampling"]
    assert same["texts"] == sum(report["originality"][name]["texts"] for name in report["voices"])
    assert (other["sampling"], other["texts"] > 0) == ([0.9, 40, 0.9], True)
    out = capsys.readouterr().out
    assert "| 0.9, 40, 0.9 |" in out
    assert "| wilde 0.75, lovecraft 0.25 |" in out
    held_out = report["originality"]["held out"]
    longest = f"{held_out['longest_median']} words | {held_out['longest_p99']:.0f}"
    assert f"| held out | {longest} |" in out
