"""A run made by version 0.1.0 still opens, resumes and replays.

`reference/run-0.1.0.tar.gz` has a checkpoint of iteration 200 of 300, receipts written with it, and
the losses that 0.1.0 printed as it went on to 300.
"""

import re
import tarfile
from pathlib import Path

import pytest

from gothic_jax.checkpoints.checkpoint import locate
from gothic_jax.commands import chat, evaluate, train

ARCHIVE = Path(__file__).parent / "reference" / "run-0.1.0.tar.gz"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder. Its settings name the texts beside it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def figures(lines: str) -> dict[str, float]:
    """The losses in what was printed, by iteration and kind."""
    found = re.findall(r"^(\d+)/300  (validation: )?loss ([\d.]+)", lines, re.MULTILINE)
    return {f"{step} {kind}": float(loss) for step, kind, loss in found}


def test_it_opens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = locate(str(run))
    assert opened.iteration == 200
    assert opened.meta.scores is not None
    assert [*opened.tokenizer.voices] == ["lovecraft", "wilde"]
    assert evaluate.main(["--checkpoint", str(run), "--verify"]) == 0
    assert opened.seal in capsys.readouterr().out


@pytest.mark.long
def test_it_resumes_with_the_losses_that_it_had(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--resume", "--out-dir", str(run)]) == 0
    now = figures(capsys.readouterr().out)
    then = figures(Path("printed.txt").read_text())
    assert len(then) == 6
    assert now == pytest.approx(then, abs=2e-3)  # the last digits depend on the processor


@pytest.mark.long
def test_its_receipts_replay(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1, 5):
        assert chat.main(["--replay", f"{run}/samples.jsonl:{number}"]) == 0
        assert "the same text" in capsys.readouterr().err
