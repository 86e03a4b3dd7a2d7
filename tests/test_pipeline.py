"""The whole way a user goes, on the real texts and with the full-size model: real processes."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.common import run

pytestmark = [pytest.mark.corpus, pytest.mark.long]


def succeed(module: str, arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = run(module, arguments.split(), cwd)
    assert done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, mirror: Path) -> Path:
    """A folder with processed texts, a tokenizer and a short run of the default model."""
    home = tmp_path_factory.mktemp("home")
    succeed("data", f"--mirror {mirror} --splits train,val", home)
    succeed("tokenize", "--files data/processed/mixed_train.txt --vocab-size 4096", home)
    succeed(
        "train",
        "--max-iters 3 --batch-size 1 --grad-accum 2 --config.log_interval=1"
        " --config.sample_tokens=8 --val-file lovecraft_val.txt",
        home,
    )
    return home


def test_resume_chat_and_eval_of_the_default_model(home: Path) -> None:
    resumed = succeed("train", "--resume --max-iters 5", home)
    assert "resuming at iteration 3" in resumed.stdout
    assert "35,660,288 parameters" in resumed.stdout
    first_loss = float(re.findall(r"^4/5  loss ([\d.]+)", resumed.stdout, re.MULTILINE)[0])
    assert 4 < first_loss < 9

    for voice in ("wilde", "lovecraft"):
        written = succeed(
            "chat", f"--checkpoint checkpoints/best --voice {voice} --prompt Night --max-tokens 24"
            " --temperature 0.8 --top-k 40", home)  # fmt: skip
        assert written.stdout.startswith("Night")
        assert len(written.stdout) > 24

    text = home / "excerpt.txt"
    text.write_text((home / "data/processed/wilde_val.txt").read_text()[:8000])
    report = json.loads(
        succeed("evaluate", f"--checkpoint checkpoints/best --file {text} --json", home).stdout
    )
    assert report["bytes"] == report["voices"]["wilde"]["bytes"]
    assert 0.5 < report["bits_per_byte"] < 4


def test_the_model_of_the_repository_has_the_figures_of_its_card(home: Path) -> None:
    run = Path(__file__).parent.parent / "checkpoints" / "gothic-dandy"
    card = (run / "README.md").read_text()
    text = home / "data/processed/mixed_val.txt"
    report = json.loads(
        succeed("evaluate", f"--checkpoint {run} --file {text} --json", home).stdout
    )
    figures = [report["voices"]["wilde"], report["voices"]["lovecraft"], report]
    stated = re.findall(r"\| \*\*([\d.]+)\*\* \|", card)
    for figure, said in zip(figures, stated, strict=True):
        assert figure["bits_per_byte"] == pytest.approx(float(said), abs=2e-3)
    assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < 32e6


def test_tensorboard_holds_what_the_run_said(home: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    tags = set()
    for path in sorted((home / "checkpoints" / "logs").glob("events.*")):
        content, position = path.read_bytes(), 0
        while position < len(content):
            length = int.from_bytes(content[position : position + 8], "little")
            event = Event.FromString(content[position + 12 : position + 12 + length])
            tags |= {value.tag for value in event.summary.value}
            position += 16 + length
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "speed/tokens_per_second",
            "device/memory_peak_bytes", "val/loss/all", "val/perplexity/all",
            "val/bits_per_byte/lovecraft"} <= tags  # fmt: skip
    assert any(tag.startswith("sample/lovecraft") for tag in tags)
    assert not any(tag.startswith("sample/wilde") for tag in tags)  # not validated here


def test_a_config_file_and_overrides_train_a_smaller_model(home: Path) -> None:
    configs = Path(__file__).parent.parent / "configs"
    trained = succeed(
        "train",
        f"--config={configs}/gothic.py --config.max_iters=2 --config.batch_size=1"
        " --config.model.n_layer=2 --config.model.n_embd=64 --config.out_dir=checkpoints/small",
        home,
    )
    assert "gothic-chat --checkpoint checkpoints/small/best" in trained.stdout
    assert (home / "checkpoints" / "small" / "2").is_dir()
