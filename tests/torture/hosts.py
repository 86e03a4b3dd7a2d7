"""R12: one of two processes of a run is killed."""

import random
import signal
import socket
import time
from pathlib import Path

from gothic_jax.checkpoints import checkpoint
from tests.common import Workplace
from tests.torture.kills import DONE
from tests.torture.world import Figure, Life, curves, figures, same, whole_state

RUN = {"max_iters": 160, "eval_interval": 40, "save_interval": 10, "batch_size": 4}


def lost_processes(workplace: Workplace, kills: int) -> Figure:
    """SIGKILL of the first or the second process; the other must end, and both are resumed.

    A run is killed and resumed until it ends; then parameters, optimizer, every printed loss and
    every point in TensorBoard must be those of a run of two processes that nothing disturbed.
    """
    whole_dir = workplace.root / "two"
    lives = _two(workplace, whole_dir)
    if max(life.end() for life in lives):
        raise RuntimeError("".join(life.error for life in lives))
    whole, expected = whole_state(whole_dir), figures(lives[0].out)
    rng = random.Random(0)
    wrong: list[str] = []
    waits: list[float] = []
    runs = 0
    while len(waits) < kills:
        out_dir = workplace.root / f"lost-{runs}"
        while True:
            lives = _two(workplace, out_dir)
            lives[0].wait_until(lambda lives=lives: lives[0].done)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 8))
            killed = rng.randrange(2)
            lives[killed].process.kill()
            begin = time.monotonic()
            other = lives[1 - killed].end()
            waited = time.monotonic() - begin
            code = lives[killed].end()
            if any(expected.get(key) != value for key, value in figures(lives[0].out).items()):
                wrong.append(f"{out_dir.name}: other figures")
            if (code, other) == (0, 0) or DONE in lives[0].error:
                break
            if code != -signal.SIGKILL:
                wrong.append(f"{out_dir.name}: code {code}: {lives[killed].error[-300:]}")
                break
            waits.append(waited)
            error = lives[1 - killed].error
            if other != 1 or f"error: process {killed} of 2" not in error or waited > 30:
                wrong.append(f"process {killed} lost: code {other} after {waited:.1f} s: {error}")
        runs += 1
        if not same(whole, whole_state(out_dir)) or curves(out_dir) != curves(whole_dir):
            wrong.append(f"{out_dir.name}: another end")
    return Figure(
        "R12",
        "SIGKILL of one of two processes: the other does not end, or the resumed run differs",
        len(waits),
        wrong,
        f"the other ended after at most {max(waits):.1f} s; {runs} runs compared",
    )


def _two(workplace: Workplace, out_dir: Path) -> list[Life]:
    start = workplace.arguments(out_dir=out_dir, **RUN)
    if checkpoint.iterations(out_dir):
        start = ["--resume", "--out-dir", str(out_dir)]
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    place = f"--config.distributed={address},2"
    return [Life([*start, f"{place},{index}"], workplace.root) for index in range(2)]
