"""Measures gothic_jax beside other programs on this machine.

    python -m benchmarks.run [--device auto|cpu|cuda] [--parts train,decode,starts,...]

Each system runs a case in a process of its own; the processes take turns, so that whatever else
the machine does falls on all of them. The medians go to benchmarks/results/DEVICE.json and, as a
table, to DEVICE.md beside it. Peers: `scripts/install.sh peers`; what is not installed says so.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case, Decode, Dtype, Model, Train

RESULTS = Path(__file__).parent / "results"
PARTS = ("train", "decode", "serve", "pipeline", "starts", "growth")
OURS = "gothic_jax"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "xllamacpp")
ROUNDS = 5
PAUSE = 0.5
"""Seconds between two turns, in which the threads of the last one stop looking for work."""


class Entry(NamedTuple):
    """One system's turn in a comparison."""

    system: str
    case: Case

    @property
    def label(self) -> str:
        """The system and its type, as the table names them."""
        return f"{self.system}, {self.case.dtype}"


@dataclasses.dataclass
class Row:
    """One measured figure."""

    case: str
    system: str
    metric: str
    value: float | None
    unit: str
    ratio_to_best_peer: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    date: str = ""
    """When it was measured; set by `Results.add`."""


class Worker:
    """A system that holds one case, in its own process."""

    def __init__(self, entry: Entry, device: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        order = {
            "system": entry.system,
            "device": device,
            "kind": type(entry.case).__name__,
            "case": dataclasses.asdict(entry.case),
        }
        self.facts = self._ask(json.dumps(order))

    def run(self) -> dict[str, float]:
        """One repetition; seconds by name. Raises RuntimeError where the process ends over it."""
        seconds = self._ask("run")
        if "unable" in seconds:
            raise RuntimeError(seconds["unable"])
        return seconds

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or [""])[-1]
        return {"unable": f"its process ended with code {code}: {last}"}


def compare(title: str, entries: Sequence[Entry], device: str, rounds: int) -> list[Row]:
    """The rows of a case: every system's figures, from runs that take turns."""
    workers = {entry: Worker(entry, device) for entry in entries}
    able = {entry: worker for entry, worker in workers.items() if "unable" not in worker.facts}
    runs: dict[Entry, list[dict[str, float]]] = {entry: [] for entry in able}
    for _ in range(rounds):
        for entry, worker in [*able.items()]:
            time.sleep(PAUSE)
            try:
                runs[entry].append(worker.run())
            except RuntimeError as error:  # the others, and the other cases, are still worth it
                worker.facts = {"unable": str(error)}
                del able[entry]
    for worker in workers.values():
        worker.close()
    rates = {
        entry: [entry.case.tokens / run["run"] for run in entry_runs]
        for entry, entry_runs in runs.items()
    }
    peers = [statistics.median(rates[entry]) for entry in able if entry.system != OURS]
    best_peer = max(peers, default=None)
    rows = []
    for entry in entries:
        if entry not in able:
            note = workers[entry].facts["unable"]
            rows.append(Row(title, entry.label, "speed", None, "tokens/s", note=note))
            continue
        speed = statistics.median(rates[entry])
        rows.append(
            Row(
                title,
                entry.label,
                "speed",
                speed,
                "tokens/s",
                ratio_to_best_peer=speed / best_peer if best_peer else None,
                low=min(rates[entry]),
                high=max(rates[entry]),
            )
        )
        rows += _details(title, entry, workers[entry].facts, runs[entry], speed)
    return rows


def _details(
    title: str, entry: Entry, facts: dict[str, float], runs: list[dict[str, float]], speed: float
) -> Iterator[Row]:
    def row(metric: str, value: float, unit: str) -> Row:
        return Row(title, entry.label, metric, value, unit)

    def median(name: str) -> float:
        return statistics.median(run[name] for run in runs)

    case = entry.case
    if isinstance(case, Train):
        yield row("iteration", 1e3 * median("run") / case.iterations, "ms")
        if "waited" in runs[0]:
            yield row("iteration, waited for", 1e3 * median("waited") / case.iterations, "ms")
        flops = speed * _flops_per_token(case)
        yield row("model FLOP/s", flops / 1e12, "TFLOP/s")
        if peak := _peak_flops():
            yield row("MFU", 100 * flops / peak, "%")
    else:
        yield row("first text", 1e3 * median("first_token"), "ms")
    yield row("first call", facts["first_call"], "s")
    yield row("peak memory", median("peak_bytes") / 2**20, "MiB")


def _flops_per_token(case: Train) -> int:
    """The package's formula, 6 N + 12 L d T, for every system alike."""
    from benchmarks.gothic import settings
    from gothic_jax.model.gpt import abstract_params, flops_per_token
    from gothic_jax.model.shape import ModelConfig

    shape = ModelConfig(**settings(case).model)
    return flops_per_token(shape, abstract_params(shape))


def _peak_flops() -> float | None:
    import jax

    from gothic_jax.machine.device import peak_flops

    return peak_flops(jax.devices()[0])


def train_cases(on_gpu: bool) -> Iterator[tuple[str, list[Entry]]]:
    """Both architectures; on a GPU the default iteration, on a CPU one small micro-batch."""
    batch, micro_batches, iterations = (16, 4, 20) if on_gpu else (4, 1, 2)
    systems: list[tuple[str, Dtype]] = [
        (OURS, "bfloat16"),
        ("PyTorch eager", "bfloat16"),
        ("PyTorch compile", "bfloat16"),
    ]
    if not on_gpu:
        systems += [(OURS, "float32"), ("PyTorch eager", "float32")]
    for architecture in ("gpt2", "gemma"):
        title = f"train {architecture}, {batch} x {micro_batches} x 384"
        yield (
            title,
            [
                Entry(system, Train(Model(architecture), batch, micro_batches, dtype, iterations))
                for system, dtype in systems
            ],
        )


def decode_cases(on_gpu: bool) -> Iterator[tuple[str, list[Entry]]]:
    """One stream and many, a short prompt and a long one."""
    shapes = [(1, 8), (8, 8), (64, 8), (256, 8), (1, 300), (8, 300)]
    systems: list[tuple[str, Dtype]] = [(OURS, "bfloat16"), ("Transformers", "bfloat16")]
    if not on_gpu:
        systems += [(OURS, "float32"), ("Transformers", "float32")]
        systems += [("llama.cpp", "float16"), ("llama.cpp", "float32")]
    for architecture in ("gpt2", "gemma"):
        for streams, prompt in shapes:
            if architecture == "gemma" and (streams, prompt) not in [(1, 8), (8, 8)]:
                continue
            new = min(128 if on_gpu or streams <= 8 else 32, 384 - prompt)
            title = f"decode {architecture}, {streams} x {new} tokens after {prompt}"
            yield (
                title,
                [
                    Entry(system, Decode(Model(architecture), streams, prompt, new, dtype))
                    for system, dtype in systems
                ],
            )


def tiny(title: str, entries: Sequence[Entry]) -> tuple[str, list[Entry]]:
    """The comparison with so small a model and batch that it takes seconds anywhere."""
    shrunk = []
    for system, case in entries:
        model = dataclasses.replace(case.model, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
        if isinstance(case, Train):
            title = title.replace(f" {case.batch} x", " 2 x")
            small: Case = dataclasses.replace(case, model=model, batch=2, iterations=1)
        else:
            small = dataclasses.replace(case, model=model)
        shrunk.append(Entry(system, small))
    return f"tiny {title}", shrunk


def growth(device: str, on_gpu: bool, rounds: int) -> list[Row]:
    """How a step's and a token's time grow; the exponent is the slope on log-log axes."""
    base = Model("gpt2")
    batch = 16 if on_gpu else 4

    def train(model: Model = base, batch: int = batch) -> Train:
        return Train(model, batch, 1, "bfloat16", 10 if on_gpu else 1)

    def replaced(**change: Any) -> Model:
        return dataclasses.replace(base, **change)

    series: dict[str, dict[int, Case]] = {
        "batch": {n: train(batch=n) for n in (batch // 2, batch, 2 * batch, 4 * batch)},
        "block": {
            n: train(replaced(block_size=n), batch=batch // 4) for n in (384, 768, 1536, 3072, 4096)
        },
        "depth": {n: train(replaced(n_layer=n)) for n in (4, 8, 16)},
        "width": {n: train(replaced(n_embd=n, n_head=n // 64)) for n in (256, 512, 1024)},
        "context, a token's time": {
            n: Decode(replaced(block_size=2048), 1, n - 64, 64, "bfloat16")
            for n in (128, 256, 512, 1024, 2048)
        },
    }
    rows = []
    for name, cases in series.items():
        seconds = {}
        for size, case in cases.items():
            worker = Worker(Entry(OURS, case), device)
            runs = [worker.run() for _ in range(rounds)]
            worker.close()
            if isinstance(case, Decode):
                # After the first chunk of 16 tokens, which also waits for the prompt.
                each = [(run["run"] - run["first_token"]) / (case.new_tokens - 16) for run in runs]
            else:
                each = [run["run"] / case.iterations for run in runs]
            seconds[size] = statistics.median(each)
            rows.append(Row(f"growth with {name}", OURS, str(size), 1e3 * seconds[size], "ms"))
        slope = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0]
        rows.append(Row(f"growth with {name}", OURS, "exponent", float(slope), ""))
    return rows


def pipeline(device: str, on_gpu: bool) -> list[Row]:
    """What surrounds the step."""
    from benchmarks.pipeline import default_case, measure

    case = default_case(Model("gpt2"), on_gpu=on_gpu)
    with contextlib.redirect_stdout(sys.stderr):
        return [Row("pipeline", OURS, *figure) for figure in measure(device, case)]


def starts(device: str, rounds: int) -> list[Row]:
    """From a command to the first thing that a person waits for."""
    from benchmarks.starts import measure

    return [Row("starts", OURS, *figure) for figure in measure(device, rounds)]


def serve(device: str, rounds: int) -> Iterator[list[Row]]:
    """The server beside llama.cpp's, at several numbers of requests."""
    from benchmarks.serving import OURS as SERVER
    from benchmarks.serving import measure

    for requests, figures in measure(device, rounds):
        speeds = {system: value for system, metric, value, _ in figures if metric == "speed"}
        rows = []
        for system, metric, value, unit in figures:
            ratio = None
            if system != SERVER and metric == "speed":
                ratio = speeds[SERVER] / value
            note = "" if ratio is None else f"{SERVER} has {ratio:.2f} of it"
            rows.append(Row(f"serve, {requests} requests", system, metric, value, unit, note=note))
        yield rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown: a table of speeds, one of growth, one of the rest."""
    lines = [
        "| case | system | tokens/s | of the best peer | iteration or first text | MFU "
        "| first call | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    served = [row for row in rows if row.case.startswith("serve")]
    for row in (row for row in rows if row.metric == "speed" and row not in served):
        details = {r.metric: r for r in rows if (r.case, r.system) == (row.case, row.system)}

        def listed(metric: str, form: str = ",.0f", details: dict[str, Row] = details) -> str:
            found = details.get(metric)
            return "" if found is None else f"{found.value:{form}} {found.unit}"

        speed = row.note if row.value is None else f"{row.value:,.0f}"
        ratio = "" if row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.2f}"
        waits = listed("iteration") or listed("first text")
        lines.append(
            f"| {row.case} | {row.system} | {speed} | {ratio} | {waits} | {listed('MFU', '.1f')} "
            f"| {listed('first call', '.1f')} | {listed('peak memory')} |"
        )
    if served:
        lines += ["", "| case | system | | | |", "|---|---|---|---|---|"]
        lines += [
            f"| {r.case} | {r.system} | {r.metric} | {r.value:,.0f} {r.unit} | {r.note} |"
            for r in served
        ]
    others = [row for row in rows if row.case.startswith(("pipeline", "starts", "growth"))]
    if others:
        lines += ["", "| case | | |", "|---|---|---|"]
        lines += [f"| {r.case} | {r.metric} | {r.value:,.4g} {r.unit} |" for r in others]
    return "\n".join(lines) + "\n"


class Results:
    """The file of results. New rows replace those of the same case.

    The others stay, whatever day they are of, if the machine and all versions are the same.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self._path = path
        self._machine = machine
        self._rows: list[Row] = []
        if path.exists():
            old = json.loads(path.read_text())
            day = old["machine"]["date"]
            if old["machine"] | {"date": machine["date"]} == machine:
                self._rows = [Row(**{"date": day} | row) for row in old["rows"]]

    def has(self, case: str) -> bool:
        """Whether the case was measured, on this machine, with these versions and today."""
        return any((row.case, row.date) == (case, self._machine["date"]) for row in self._rows)

    def add(self, rows: Sequence[Row]) -> str:
        """Writes the rows, in JSON and as a table; returns their own table."""
        cases, today = {row.case for row in rows}, self._machine["date"]
        others = [row for row in self._rows if row.case not in cases]
        self._rows = others + [dataclasses.replace(row, date=today) for row in rows]
        result = {"machine": self._machine, "rows": [dataclasses.asdict(r) for r in self._rows]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(result, indent=1) + "\n")
        versions = ", ".join(
            f"{name} {version}" for name, version in self._machine["versions"].items()
        )
        dates = ", ".join(sorted({row.date for row in self._rows}))
        head = f"{self._machine['device']}; {dates}; {versions}"
        self._path.with_suffix(".md").write_text(f"{head}\n\n{table(self._rows)}")
        return table(rows)


def _machine(device: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": _device_name(device),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _device_name(device: str) -> str:
    if device == "cuda":
        import jax

        return jax.devices()[0].device_kind
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    name = names[0] if names else platform.processor() or platform.machine()
    extensions = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in text]
    return f"{name}, {len(os.sched_getaffinity(0))} cores" + (
        f" ({', '.join(extensions)})" if extensions else ""
    )


def file_name(device: str) -> str:
    """The file of a device's results, so that those of one do not replace those of another.

    Of what a CPU can do, the name has the last, which is the newest.
    """
    name, _, extensions = re.sub(r"\((?:R|TM)\)", "", device).partition(" (")
    newest = extensions.rstrip(")").rpartition(", ")[2]
    return "-".join(re.findall(r"[a-z0-9]+", f"{name} {newest}".lower())) + ".json"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of these, with commas")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each system")
    parser.add_argument(
        "--tiny", action="store_true", help="train and decode as on a GPU, with a tiny model"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out what a run that was stopped has trained and decoded",
    )
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    # The same for every process. gothic-train asks for huge pages itself; and no process may
    # take the whole of a GPU's memory.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    device = arguments.device
    if device == "auto":
        import jax

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    on_gpu = device == "cuda"
    os.environ["JAX_PLATFORMS"] = device  # here and in every worker

    machine = _machine(device)
    output = arguments.output or RESULTS / file_name(machine["device"])
    results = Results(output, machine)
    as_on_gpu = on_gpu or arguments.tiny
    comparisons = [*train_cases(as_on_gpu)] if "train" in parts else []
    comparisons += decode_cases(as_on_gpu) if "decode" in parts else []
    if arguments.tiny:
        comparisons = [tiny(*comparison) for comparison in comparisons]
    for title, entries in comparisons:
        if arguments.only in title and not (arguments.resume and results.has(title)):
            print(results.add(compare(title, entries, device, arguments.rounds)), flush=True)
    if "growth" in parts:
        print(results.add(growth(device, on_gpu, max(2, arguments.rounds // 2))), flush=True)
    if "pipeline" in parts:
        print(results.add(pipeline(device, on_gpu)), flush=True)
    if "serve" in parts:
        for rows in serve(device, arguments.rounds):
            print(results.add(rows), flush=True)
    if "starts" in parts:
        print(results.add(starts(device, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
