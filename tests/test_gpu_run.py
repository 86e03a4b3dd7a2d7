"""The script of a GPU's measurements, rehearsed on a CPU: its parts, its time and its report."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gothic_jax.commands.train import _overrides, _parser
from gothic_jax.config import parse_overrides

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "gpu_run.py"))
ORDER = [
    "tests", "benchmark_train", "benchmark_decode", "tokenizer", "train", "evaluate",
    "samples_wilde", "samples_lovecraft", "samples_blend", "index", "attribution",
]  # fmt: skip


def environment(**changed: str) -> dict[str, str]:
    """A user's: what this pytest has set would change the pytest that the script starts."""
    kept = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS" and not n.startswith("PYTEST")}
    return kept | {"GLIBC_TUNABLES": ""} | changed


def start(results: Path, minutes: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "scripts/gpu_run.py",
            str(results),
            "--rehearse",
            "--minutes",
            f"{minutes}",
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(started: subprocess.Popen[str]) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and the records of the report."""
    with started:
        out, _ = started.communicate(timeout=1600)
    report = Path(started.args[2]) / "report.json"  # type: ignore[index]
    return started.returncode, out, json.loads(report.read_text()) if report.exists() else {}


def states(records: dict[str, Any]) -> dict[str, str]:
    return {name: record["state"] for name, record in records.items()}


@pytest.mark.long
def test_calls_that_are_too_short_and_stopped_go_on_to_the_end_and_repeat_nothing(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"

    code, out, records = finish(start(results, minutes=0.01))  # JAX is not yet imported
    assert (code, records) == (3, {}), out

    called = start(results, minutes=25)
    log = results / "train.txt"
    while not (log.exists() and "0/2000" in log.read_text()):
        assert called.poll() is None, called.stdout and called.stdout.read()
        time.sleep(0.05)
    called.send_signal(signal.SIGTERM)  # which is how a call's end comes, too
    code, out, records = finish(called)
    assert code == 3, out
    assert states(records) == dict.fromkeys(ORDER[:4], "done") | {"train": "stopped"}
    assert "stopped at iteration" in log.read_text()
    before = {name: records[name] for name in ORDER[:4]}

    code, out, records = finish(start(results, minutes=25))
    assert code == 0, out
    assert states(records) == dict.fromkeys(ORDER, "done")
    assert {name: records[name] for name in ORDER[:4]} == before
    assert "resuming at iteration" in log.read_text()
    # What a person takes home.
    assert all(records[name]["machine"]["jax"] for name in ORDER)
    for part, systems in (("train", "PyTorch eager"), ("decode", "Transformers")):
        rows = json.loads((results / f"benchmark_{part}.json").read_text())["rows"]
        measured = {row["system"] for row in rows if row["metric"] == "speed"}
        assert {"gothic_jax, bfloat16", f"{systems}, bfloat16"} <= measured
        assert all(row["value"] for row in rows if row["system"].startswith("gothic_jax"))
    assert json.loads((results / "evaluation.json").read_text())["voices"].keys() >= {"wilde"}
    assert json.loads((results / "attribution.json").read_text())["blends"]
    table = (results / "report.md").read_text()
    assert all(f"| {name} | done |" in table for name in ORDER)

    code, out, again = finish(start(results, minutes=25))
    assert (code, again) == (0, records)
    assert "..." not in out


def test_a_part_that_fails_is_told_and_keeps_no_other_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = SCRIPT["Part"]
    parts = [
        part("breaks", ["-c", "raise SystemExit('no such thing')"]),
        part("works", ["-c", "print('fine')"]),
        part("scores", ["-c", "print('a score')"], output="scores.json", needs="breaks"),
    ]
    names = SCRIPT["main"].__globals__
    monkeypatch.setitem(names, "all_parts", lambda *_, **__: parts)
    monkeypatch.setitem(names, "look_at_machine", lambda *_: {"devices": "1 x abacus", "jax": "0"})
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    assert SCRIPT["main"]([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "    no such thing" in out
    assert "failed: breaks" in out
    records = json.loads((tmp_path / "report.json").read_text())
    # Scores of a run that failed half-way are worth having, but are to be made again.
    assert states(records) == {"breaks": "failed", "works": "done", "scores": "early"}
    assert (tmp_path / "scores.json").read_text() == "a score\n"

    parts[0] = part("breaks", ["-c", "print('mended')"])
    assert SCRIPT["main"]([str(tmp_path)]) == 0
    assert "works ..." not in capsys.readouterr().out
    assert set(states(json.loads((tmp_path / "report.json").read_text())).values()) == {"done"}


def test_a_real_call_trains_the_default_model_on_the_library(tmp_path: Path) -> None:
    # A tokenizer that this clone has would leave its part out.
    parts = {part.name: part for part in SCRIPT["all_parts"](tmp_path, rehearse=False)}
    assert [name for name in ORDER if name in parts or name != "tokenizer"] == [*parts]
    command = parts["train"].arguments
    assert command[:2] == ["-m", "gothic_jax.train"]
    arguments, rest = _parser().parse_known_args(command[2:])
    given = parse_overrides(_overrides(arguments, rest))
    assert given == {
        "data_dir": "data/processed",
        "train_file": "all_train.txt",
        "val_file": "mixed_val.txt",
        "tokenizer": "data/tokenizer_library.json",
        "out_dir": str(tmp_path / "run"),
        "voice_weights": "wilde=0.2,lovecraft=0.2,rest=0.6",
    }


def test_parts_that_failed_come_after_those_that_were_never_tried() -> None:
    parts = [SCRIPT["Part"](name, []) for name in ("a", "b", "c", "d")]
    records = {"a": {"state": "failed"}, "b": {"state": "done"}, "c": {"state": "stopped"}}
    assert [part.name for part in SCRIPT["in_order"](parts, records)] == ["c", "d", "a"]


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit({code})))
print("ready", flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "code", "last"),
    [
        ("print('quick')", 0, "quick"),
        ("raise SystemExit(4)", 4, ""),
        (PATIENT.format(code=143), None, "saved"),
        (PATIENT.format(code=0), 0, "saved"),
        (STUBBORN, None, "ready"),
    ],
)
def test_a_command_ends_by_itself_or_with_the_budget(
    tmp_path: Path, program: str, code: int | None, last: str
) -> None:
    budget = SCRIPT["Budget"](60.0)
    log = tmp_path / "log"
    log.touch()
    # The time is over as soon as the program has said that it is ready.
    budget.is_over = lambda: b"ready" in log.read_bytes()
    begin = time.monotonic()
    ended = SCRIPT["run_command"](
        [sys.executable, "-c", program],
        log,
        budget,
        environment=environment(),
        stop_seconds=20.0 if last == "saved" else 0.5,
    )
    assert time.monotonic() - begin < 30
    assert ended == code
    assert (log.read_text().splitlines() or [""])[-1] == last


def test_a_budget_ends_by_the_clock_or_at_once() -> None:
    assert SCRIPT["Budget"](0.0).is_over()
    budget = SCRIPT["Budget"](60.0)
    assert not budget.is_over()
    budget.end()
    assert budget.is_over()


def test_without_a_gpu_nothing_is_started(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_run.py", str(tmp_path / "results")]
    hidden = environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2
    assert "JAX finds no gpu" in done.stderr
    assert [*(tmp_path / "results").iterdir()] == []
