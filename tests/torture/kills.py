"""R1, R2, R6, R8: the process is killed, told to stop, or not alone."""

import random
import re
import signal
import time
from pathlib import Path

from gothic_jax.checkpoints import checkpoint
from tests.common import Workplace
from tests.torture.world import (
    LANES,
    Figure,
    Life,
    curves,
    figures,
    finished_run,
    fresh_copy,
    in_lanes,
    same,
    whole_state,
)

RUN = {
    "max_iters": 900,
    "eval_interval": 300,
    "save_interval": 75,
}
DONE = "and --max-iters is"
"""What a run says that was killed after its end, and is resumed."""


def sigkill(workplace: Workplace, kills: int) -> Figure:
    """R1: SIGKILL at a random moment, every other time while a checkpoint is being written.

    A run is killed and resumed until it ends; then parameters, optimizer, every printed loss and
    every point in TensorBoard must be those of a run that nothing disturbed.
    """
    whole_dir, whole_out = finished_run(workplace, "whole", **RUN)
    whole, expected, expected_curves = whole_state(whole_dir), figures(whole_out), curves(whole_dir)
    losts: list[int] = []
    during_saves: list[bool] = []
    runs: list[int] = []

    def lane(number: int) -> list[str]:
        rng = random.Random(number)
        wrong: list[str] = []
        done = 0
        chain = 0
        while done < kills // LANES + (number < kills % LANES):
            out_dir = workplace.root / f"killed-{number}-{chain}"
            chain += 1
            while True:
                held = checkpoint.iterations(out_dir)
                start = (
                    ["--resume", "--out-dir", str(out_dir)]
                    if held
                    else workplace.arguments(out_dir=out_dir, **RUN)
                )
                life = Life(start, workplace.root)
                if done % 2 == 0:
                    _wait_for_saves(life, out_dir, 1 + rng.randrange(3))
                    time.sleep(rng.uniform(0, 0.15))
                else:
                    time.sleep(rng.uniform(0, 6))
                life.process.kill()
                code = life.end()
                if got := {
                    key: value
                    for key, value in figures(life.out).items()
                    if expected.get(key) != value
                }:
                    wrong.append(f"{out_dir.name}: other figures: {got}")
                if code == 0 or (code == 2 and DONE in life.error):
                    break
                if code != -signal.SIGKILL:
                    wrong.append(f"{out_dir.name}: code {code}: {life.error[-300:]}")
                    return wrong
                done += 1
                during_saves.append(bool([*out_dir.glob(".*.tmp")]))
                if life.done:
                    now = max(checkpoint.iterations(out_dir), default=0)
                    losts.append(life.done - now)
            runs.append(1)
            if not same(whole, whole_state(out_dir)):
                wrong.append(f"{out_dir.name}: other parameters or optimizer")
            if curves(out_dir) != expected_curves:
                wrong.append(f"{out_dir.name}: other points in TensorBoard")
            if left := [path.name for path in out_dir.glob(".*") if path.name != ".lock"]:
                wrong.append(f"{out_dir.name}: {left} left behind")
        return wrong

    wrong = in_lanes(lane, LANES)
    return Figure(
        "R1",
        "SIGKILL at a random moment, resume: parameters, optimizer, losses, TensorBoard",
        len(during_saves),
        wrong,
        f"{sum(during_saves)} while a checkpoint was written; {len(runs)} runs compared; at most"
        f" {max(losts, default=0)} iterations lost, saves every {RUN['save_interval']}",
    )


def _wait_for_saves(life: Life, out_dir: Path, count: int) -> None:
    """Waits until the `count`-th save is under way, or the process has ended."""
    for number in range(count):
        if number and not life.wait_until(lambda: not [*out_dir.glob(".*.tmp")]):
            return
        if not life.wait_until(lambda: [*out_dir.glob(".*.tmp")]):
            return


def kill_at_every_call(workplace: Workplace, library: Path | None, limit: int | None) -> Figure:
    """R2: SIGKILL before every rename and fsync of one save (or `limit` of them, spread out)."""
    what = "SIGKILL before each rename and fsync of one save"
    if library is None:
        return Figure("R2", what, 0, [], "not measured: no C compiler")
    settings = {"max_iters": 12, "eval_interval": 4}
    base, _ = finished_run(workplace, "calls-base", **settings | {"max_iters": 8})
    log = workplace.root / "calls.log"

    def faults(out_dir: Path, at: int) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(library),
            "FAULTS_CALLS": "rename,fsync",
            "FAULTS_PATH": f"{out_dir}/",
            "FAULTS_AT": str(at),
            "FAULTS_COUNT": "1",
            "FAULTS_ERROR": "0",
        }

    resume = ["--resume", "--max-iters", "12"]
    counted = fresh_copy(base, workplace.root / "calls-counted")
    life = Life(
        [*resume, "--out-dir", str(counted)], workplace.root,
        **faults(counted, 0), FAULTS_LOG=str(log),
    )  # fmt: skip
    if life.end():
        raise RuntimeError(life.error)
    resumed = whole_state(counted)
    calls = log.read_text().splitlines()
    chosen = range(1, len(calls) + 1)
    if limit is not None and limit < len(calls):
        chosen = sorted({1 + round(k * (len(calls) - 1) / (limit - 1)) for k in range(limit)})

    missed: list[int] = []

    def trial(index: int) -> list[str]:
        at = chosen[index]
        out_dir = fresh_copy(base, workplace.root / f"call-{at}")
        arguments = [*resume, "--out-dir", str(out_dir)]
        made = workplace.root / f"call-{at}.log"
        life = Life(arguments, workplace.root, **faults(out_dir, at), FAULTS_LOG=str(made))
        code = life.end()
        call = calls[at - 1]
        if code == 0 and len(made.read_text().splitlines()) < at:
            missed.append(at)  # its threads came by with fewer calls this time
            return []
        if code != -signal.SIGKILL:
            return [f"call {at} ({call}): code {code}: {life.error[-300:]}"]
        latest = max(checkpoint.iterations(out_dir), default=0)
        if latest < 8:
            return [f"call {at} ({call}): iteration {latest} is the latest"]
        again = Life(arguments, workplace.root)
        code = again.end()
        if code == 2 and latest == 12 and DONE in again.error:
            pass  # the kill came after the last save was whole
        elif code:
            return [f"call {at} ({call}): the resumed run: code {code}: {again.error[-300:]}"]
        if not same(resumed, whole_state(out_dir)):
            return [f"call {at} ({call}): another state at the end"]
        if left := [path.name for path in out_dir.glob(".*.*")]:
            return [f"call {at} ({call}): {left} left behind"]
        return []

    wrong = in_lanes(trial, len(chosen))
    reached = len(chosen) - len(missed)
    return Figure("R2", what, reached, wrong, f"one save makes some {len(calls)} such calls")


def signals(workplace: Workplace, count: int, *, timed: bool) -> Figure:
    """R6: SIGTERM or SIGINT at a random moment; every fifth time twice.

    If `timed`, the process must end in time: not for a machine with other work.
    """
    settings = RUN | {"save_interval": 0}
    whole_dir, whole_out = finished_run(workplace, "signalled-whole", **settings)
    whole, expected = whole_state(whole_dir), figures(whole_out)
    waits: list[float] = []

    def trial(index: int) -> list[str]:
        rng = random.Random(1000 + index)
        number, code_of = rng.choice([(signal.SIGTERM, 143), (signal.SIGINT, 130)])
        out_dir = workplace.root / f"signalled-{index}"
        life = Life(workplace.arguments(out_dir=out_dir, **settings), workplace.root)
        if index % 3:
            life.wait_until(lambda: life.said("compiled in"))
            time.sleep(rng.uniform(0, 2.5))
        else:
            time.sleep(rng.uniform(0.3, 5))
        sent = time.monotonic()
        life.process.send_signal(number)
        if twice := index % 5 == 4:
            time.sleep(0.05)
            life.process.send_signal(number)
        code = life.end()
        waited = time.monotonic() - sent
        waits.append(waited)
        wrong = []
        if timed and waited > (1.5 if twice else 5):
            wrong.append(f"signal {index}: it took {waited:.1f} s")
        # A shell shows the kernel's own end by a signal as 128 + its number, too.
        if code not in ({0, code_of, -number}):
            wrong.append(f"signal {index}: code {code}: {life.error[-300:]}")
        stopped = re.search(r"stopped at iteration (\d+)", life.out)
        latest = max(checkpoint.iterations(out_dir), default=0)
        if code == code_of and (stopped is None or int(stopped[1]) != latest):
            wrong.append(f"signal {index}: {latest} is the latest checkpoint")
        finished = latest == settings["max_iters"]
        if code == 0 and not finished:
            wrong.append(f"signal {index}: code 0 at iteration {latest}")
        if code == -number and not twice and life.done and not finished:
            wrong.append(f"signal {index}: nothing was saved after {life.done} iterations")
        start = ["--resume", "--out-dir", str(out_dir)]
        if not latest:
            start = workplace.arguments(out_dir=out_dir, **settings)
        if not finished or stopped:
            again = Life(start, workplace.root)
            if again.end():
                wrong.append(f"signal {index}: the resumed run: {again.error[-300:]}")
            parts = figures(life.out) | figures(again.out)
            if parts.items() - expected.items():
                wrong.append(f"signal {index}: other figures")
        if not same(whole, whole_state(out_dir)):
            wrong.append(f"signal {index}: another state at the end")
        return wrong

    wrong = in_lanes(trial, count)
    return Figure(
        "R6",
        "SIGTERM and SIGINT at random moments, and what the resumed run ends with",
        count,
        wrong,
        f"the process ended after at most {max(waits):.2f} s",
    )


def neighbours(workplace: Workplace, count: int, *, timed: bool) -> Figure:
    """R8: a second trainer on one folder; then the first is killed and a third takes over.

    If `timed`, the second must be refused in time: not for a machine with other work.
    """
    settings = RUN | {"max_iters": 100_000, "save_interval": 50, "eval_interval": 1000}
    out_dir = workplace.root / "shared"
    waits: list[float] = []

    def trial(index: int) -> list[str]:
        start = ["--resume", "--out-dir", str(out_dir)]
        if not checkpoint.iterations(out_dir):
            start = workplace.arguments(out_dir=out_dir, **settings)
        holder = Life(start, workplace.root)
        holder.wait_until(lambda: holder.done > 60)
        began = time.monotonic()
        second = Life(start, workplace.root)
        code = second.end()
        waits.append(time.monotonic() - began)
        alive = holder.process.poll() is None
        holder.process.kill()
        holder.end()
        wrong = []
        if code != 2 or f"PID {holder.process.pid}" not in second.error:
            wrong.append(f"second {index}: code {code}: {second.error[-300:]}")
        if timed and waits[-1] > 2:
            wrong.append(f"second {index}: refused after {waits[-1]:.1f} s")
        if not alive:
            wrong.append(f"second {index}: the first died of it: {holder.error[-300:]}")
        return wrong

    wrong = [failure for index in range(count) for failure in trial(index)]
    return Figure(
        "R8",
        "a second trainer on one folder is refused by PID; the lock dies with its holder",
        count,
        wrong,
        f"refused after at most {max(waits):.2f} s from its start",
    )
