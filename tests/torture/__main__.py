"""python -m tests.torture [--share 1.0] [--only R1,R4] [--output FILE]

Prints each figure of docs/reliability.md, with its 95% bound, as it comes. The full counts take
about an hour on two cores; `--share 0.1` takes a tenth of them.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.works import split_works
from tests.common import TEXT, TINY, Workplace
from tests.torture import damage, foreign, hosts, inputs, kills, numbers, server
from tests.torture.world import Figure, faults_library

HEAD = """| | what | failures | 95% bound of the rate | |
|---|---|---|---|---|"""


def main() -> int:
    """Runs the tortures; 1 if any figure has a failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--only", default="", help="some of R1, R2, ..., S9, with commas")
    parser.add_argument("--output", type=Path, help="a file for the table as well")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "compiled"
        # Thousands of processes compile the same tiny programs.
        for name, value in {
            "jax_compilation_cache_dir": str(compiled),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)
        root = Path(folder) / "work"
        root.mkdir()
        workplace = Workplace.make(root, Tokenizer.train(split_works(TEXT), TINY.vocab_size, 2))
        library = faults_library(Path(folder))

        def count(full: int) -> int:
            return max(2, round(full * arguments.share))

        tortures: list[tuple[str, Callable[[], Figure]]] = [
            ("R1", lambda: kills.sigkill(workplace, count(200))),
            ("R2", lambda: kills.kill_at_every_call(
                workplace, library, None if arguments.share >= 1 else count(80))),
            ("R3", lambda: damage.power_loss(workplace)),
            ("R4", lambda: damage.damaged_files(
                workplace, count(1000), count(500), count(500), count(100))),
            ("R4", lambda: damage.damaged_commands(workplace, count(40))),
            ("R5", lambda: damage.failing_disk(workplace, library, count(40))),
            ("R6", lambda: kills.signals(workplace, count(100), timed=True)),
            ("R7", lambda: numbers.not_finite(workplace, count(200), count(20))),
            ("R8", lambda: kills.neighbours(workplace, count(20), timed=True)),
            ("R9", lambda: numbers.twice(workplace, count(20))),
            ("R10", lambda: numbers.devices(workplace)),
            ("R11", lambda: numbers.data_positions(workplace, count(100))),
            ("R12", lambda: hosts.lost_processes(workplace, count(20))),
            ("S1", lambda: inputs.tokenizers(workplace, count(5000))),
            ("S1", lambda: foreign.folders(workplace, "tokenizer.json", count(1000))),
            ("S2", lambda: inputs.settings(workplace, count(5000))),
            ("S2", lambda: inputs.texts(workplace, count(5000), long=True)),
            ("S3", lambda: damage.hostile_folders(workplace, every=1, timed=True)),
            ("S3", lambda: foreign.folders(workplace, "config.json", count(1000))),
            ("S3", lambda: foreign.folders(workplace, "model.safetensors", count(1000))),
            ("S5", lambda: server.strangers(workplace, count(770))),
            ("S6", lambda: server.broken_requests(workplace, count(10_000))),
            ("S7", lambda: server.slow_clients(workplace, count(200))),
            ("S7", lambda: server.many_requests(workplace, count(10_000))),
            ("S8", lambda: server.scripts(workplace, count(len(server.PAYLOADS)))),
            ("S9", lambda: server.keys(workplace, count(200))),
        ]  # fmt: skip
        chosen = arguments.only.split(",") if arguments.only else [number for number, _ in tortures]
        table = [HEAD]
        print(HEAD, flush=True)
        failed = False
        for number, torture in tortures:
            if number not in chosen:
                continue
            started = time.monotonic()
            figure = torture()
            figure.notes += (
                f"; {time.monotonic() - started:.0f} s"
                if figure.notes
                else f"{time.monotonic() - started:.0f} s"
            )
            table.append(str(figure))
            print(figure, flush=True)
            for failure in figure.failures[:10]:
                print(f"    {failure}", file=sys.stderr, flush=True)
            failed = failed or bool(figure.failures)
            if arguments.output:
                arguments.output.write_text("\n".join(table) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
