"""The benchmark on a tiny model: real processes, true arithmetic, honest gaps."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run as benchmark
from benchmarks.cases import Case, Decode, Model, Train
from benchmarks.run import OURS, Entry, Results, Row, compare, table

TINY = Model(block_size=32, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
CASES = [
    Train(TINY, batch=2, micro_batches=2, dtype="float32", iterations=2),
    Decode(TINY, streams=2, prompt=3, new_tokens=20, dtype="bfloat16"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_a_comparison_tells_speeds_and_says_who_cannot_run(case: Case) -> None:
    peer = "PyTorch eager" if isinstance(case, Train) else "llama.cpp"
    rows = compare("tiny", [Entry(OURS, case), Entry(peer, case)], "cpu", rounds=2)
    ours, theirs = (row for row in rows if row.metric == "speed")
    assert ours.value is not None
    assert ours.low is not None
    assert ours.high is not None
    assert 0 < ours.low <= ours.value <= ours.high
    figures = {row.metric: row.value for row in rows if row.system.startswith(OURS)}
    fastest, slowest = (1e3 * case.tokens / rate for rate in (ours.high, ours.low))  # ms of a run
    if isinstance(case, Train):
        assert figures["iteration"] is not None
        assert fastest <= figures["iteration"] * case.iterations * 1.0001
        assert figures["iteration"] * case.iterations <= slowest * 1.0001
    else:
        assert 0 < (figures["first text"] or 0) < slowest
    if theirs.value is None:
        assert "not installed" in theirs.note
        assert ours.ratio_to_best_peer is None
        assert f"| {theirs.note} |" in table(rows)
    else:
        assert theirs.ratio_to_best_peer == 1
        assert ours.ratio_to_best_peer == pytest.approx(ours.value / theirs.value)


def test_a_case_that_a_system_does_not_do_says_so() -> None:
    long = Decode(TINY, streams=1, prompt=30, new_tokens=20, dtype="float32")
    (row,) = compare("long", [Entry(OURS, long)], "cpu", rounds=1)
    assert (row.value, row.note) == (None, "longer than the block size")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (
            "Intel(R) Xeon(R) Processor, 2 cores (avx512f, avx512_bf16, amx_bf16)",
            "intel-xeon-processor-2-cores-amx-bf16.json",
        ),
        ("AMD EPYC, 2 cores (avx512f, avx512_bf16)", "amd-epyc-2-cores-avx512-bf16.json"),
        ("x86_64, 8 cores", "x86-64-8-cores.json"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
    ],
)
def test_each_device_has_a_file_of_its_own(device: str, name: str) -> None:
    assert benchmark.file_name(device) == name


def test_results_hold_machine_versions_date_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cpu.json"
    for value in (0.7, 0.5):  # the second run replaces what the first one measured
        rows = [Row("pipeline", OURS, "restore", value, "s")]
        monkeypatch.setattr(benchmark, "pipeline", lambda *_, rows=rows: rows)
        benchmark.main(["--device", "cpu", "--parts", "pipeline", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["machine"]["versions"]["jax"]
    assert result["machine"]["cpu_cores"] >= 1
    assert result["machine"]["date"]
    assert [row["value"] for row in result["rows"]] == [0.5]
    assert "restore | 0.5 s" in output.with_suffix(".md").read_text()
    assert "restore | 0.5 s" in capsys.readouterr().out


def test_rows_of_other_cases_stay_until_a_version_changes(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    machine = {"device": "CPU", "versions": {"jax": "1"}, "date": "2026-01-01"}

    def add(case: str, machine: dict[str, Any]) -> list[tuple[str, str]]:
        Results(path, machine).add([Row(case, OURS, "speed", 1.0, "tokens/s")])
        return [(row["case"], row["date"]) for row in json.loads(path.read_text())["rows"]]

    first, second = ("train", "2026-01-01"), ("serve", "2026-01-02")
    assert add("train", machine) == [first]
    later = machine | {"date": "2026-01-02"}
    assert not Results(path, later).has("train")  # today
    assert add("serve", later) == [first, second]
    assert path.with_suffix(".md").read_text().startswith("CPU; 2026-01-01, 2026-01-02; jax 1")
    newer = later | {"versions": {"jax": "2"}}
    assert add("decode", newer) == [("decode", "2026-01-02")]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("architecture", ["gpt2", "gemma"])
def test_the_pytorch_peer_has_as_many_parameters(architecture: str) -> None:
    import torch

    from benchmarks import pytorch
    from benchmarks.gothic import _model
    from gothic_jax.model.gpt import abstract_params, parameter_count

    shape = Model(architecture)  # type: ignore[arg-type]
    theirs = sum(p.numel() for p in pytorch.build(torch, shape).parameters())
    assert theirs == parameter_count(abstract_params(_model(shape)))


@pytest.mark.long
def test_a_system_that_ends_while_it_runs_is_told_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = benchmark.Worker.run

    def killed(worker: benchmark.Worker) -> dict[str, float]:
        if worker.facts.get("compile"):  # of a training case of ours
            return run(worker)
        raise RuntimeError("its process ended with code -9: killed")

    monkeypatch.setattr(benchmark.Worker, "run", killed)
    entries = [Entry(OURS, CASES[0]), Entry(OURS, CASES[1])]
    rows = [row for row in compare("tiny", entries, "cpu", rounds=2) if row.metric == "speed"]
    assert rows[0].value is not None
    assert (rows[1].value, rows[1].note) == (None, "its process ended with code -9: killed")


def test_a_benchmark_that_was_stopped_measures_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(title: str, entries: list[Entry], *_: object, **__: object) -> list[Row]:
        measured.append(title)
        assert all(entry.case.model.n_embd == 16 for entry in entries)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [Row(title, OURS, "speed", 1.0, "tokens/s")]

    monkeypatch.setattr(benchmark, "compare", measure)
    arguments = ["--device", "cpu", "--parts", "train", "--tiny", "--resume"]
    output = str(tmp_path / "cpu.json")
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*arguments, "--output", output])
    for _ in range(2):
        benchmark.main([*arguments, "--output", output])
    gpt2, gemma = "tiny train gpt2, 2 x 4 x 384", "tiny train gemma, 2 x 4 x 384"
    assert measured == [gpt2, gemma, gemma]
