"""One run in several processes: real ones on this machine, joined over its network."""

import os
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gothic_jax.checkpoints import checkpoint
from gothic_jax.commands import train
from gothic_jax.config import get_config, parse_overrides
from gothic_jax.errors import UserError
from gothic_jax.machine import processes
from gothic_jax.machine.hosts import Place, find_place
from gothic_jax.machine.processes import ALONE, Team
from gothic_jax.training.run import Request, prepare
from gothic_jax.training.step import data_mesh, divided
from tests.common import Workplace, ends, run, team, wait_for
from tests.torture.world import points, same, whole_state

SETTINGS = {"max_iters": 40, "eval_interval": 20, "batch_size": 4}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            Place("a:1", 2, 1),
        ),
        (
            # A pod of an indexed Job of Kubernetes.
            {
                "JAX_COORDINATOR_ADDRESS": "run-0-0.run:1",
                "JAX_NUM_PROCESSES": "4",
                "JOB_COMPLETION_INDEX": "3",
            },
            Place("run-0-0.run:1", 4, 3),
        ),
        (
            {
                "SLURM_JOB_ID": "5000",
                "SLURM_STEP_NODELIST": "gpu[07-09,12]",
                "SLURM_STEP_NUM_NODES": "4",
                "SLURM_NTASKS": "4",
                "SLURM_PROCID": "2",
                "SLURM_LOCALID": "0",
            },
            Place(f"gpu07:{2**16 - 4096 + 5000 - 4096}", 4, 2),
        ),
        (
            # Two tasks on each host: each takes the device of its number there.
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "alpha,beta",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_NTASKS": "4",
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1",
                "JAX_COORDINATOR_PORT": "9",
            },
            Place("alpha:9", 4, 3, device=1),
        ),
        # A batch file runs its own lines once, whatever the number of tasks.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            },
            Place(f"10.96.0.1:{2**16 - 4096 + 373920 % 4096}", 2, 0),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({}, None),
    ],
)
def test_a_process_finds_its_place_in_what_its_launcher_sets(
    environment: dict[str, str], place: Place | None
) -> None:
    environment.setdefault("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    assert find_place("", environment) == place
    assert find_place("off", environment) is None
    assert find_place("b:2,3,1", environment) == Place("b:2", 3, 1)


@pytest.mark.parametrize(
    ("setting", "environment", "cure"),
    [
        ("node1:7000", {}, "HOST:PORT,COUNT,INDEX"),
        ("node1:7000,2,x", {}, "HOST:PORT,COUNT,INDEX"),
        ("node1:7000,2,2", {}, "give each its own index"),
        ("node1,2,0", {}, "HOST:PORT"),
        ("", {"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES"),
        ("", {"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
        ("", {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_PROCESS_ID"),
        ("", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "JAX_COORDINATOR_ADDR"),
    ],
)
def test_half_a_place_is_refused_with_what_is_missing(
    setting: str, environment: dict[str, str], cure: str
) -> None:
    environment |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(UserError, match=cure):
        find_place(setting, environment)


def test_an_ill_formed_place_is_one_line_and_code_2(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train(distributed="node1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "HOST:PORT,COUNT,INDEX" in error
    assert not workplace.out_dir.exists()


def test_one_process_agrees_with_itself_at_once() -> None:
    assert ALONE.agree(3, 0) == [3, 0]
    assert [ALONE.told(1), ALONE.told(2)] == [[1], [2]]
    assert ALONE.same("a")


def test_processes_that_do_not_meet_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ARRIVAL", 0.2)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use; name another"):
            Team.join(Place(f"localhost:{port}", 3, 0), "gothic-train")
    with pytest.raises(UserError, match="of 3 processes, 1, 2 did not come"):
        Team.join(Place(f"localhost:{port}", 3, 0), "gothic-train")
    with pytest.raises(UserError, match="process 2 of 3 does not reach the first one"):
        Team.join(Place(f"localhost:{port}", 3, 2), "gothic-train")


def losses(out_dir: Path) -> list[float | str]:
    return [value for name, _, value in points(out_dir / "logs") if name == "train/loss"]


def test_two_processes_train_as_one_and_stop_and_resume_bit_for_bit(workplace: Workplace) -> None:
    one, two, parted = (workplace.root / name for name in ("one", "two", "parted"))
    alone = run("train", workplace.arguments(out_dir=one, **SETTINGS), workplace.root)
    assert alone.returncode == 0, alone.stderr
    first, second = ends(team(2, workplace.arguments(out_dir=two, **SETTINGS), workplace.root))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "2 x cpu in 2 processes" in first.stdout
    assert second.stdout == ""
    assert len([*(two / "logs").iterdir()]) == 1
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-6)
    scores = [checkpoint.locate(f"{path}/latest").meta.val_loss for path in (one, two)]
    np.testing.assert_allclose(*scores, rtol=1e-6)

    # A signal at any process stops all of them at the same iteration.
    started = team(2, workplace.arguments(out_dir=parted, **SETTINGS), workplace.root,
                   PYTHONUNBUFFERED="1")  # fmt: skip
    wait_for("10/40", started[0])
    os.kill(started[1].pid, signal.SIGTERM)
    first, second = ends(started)
    assert (first.returncode, second.returncode) == (143, 143), first.stderr + second.stderr
    stopped_at = checkpoint.iterations(parted)[-1]
    assert f"stopped at iteration {stopped_at};" in first.stdout
    resume = ["--resume", "--out-dir", str(parted)]
    first, second = ends(team(2, resume, workplace.root))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"resuming at iteration {stopped_at}" in first.stdout
    assert "written elsewhere" not in first.stderr + second.stderr
    assert same(whole_state(two), whole_state(parted))
    assert losses(two) == losses(parted)

    # With another number of processes it goes on, too, and says so.
    other = run("train", [*resume, "--max-iters", "42"], workplace.root)
    assert other.returncode == 0, other.stderr
    assert "devices 2 x cpu in 2 processes -> 1 x cpu" in other.stderr


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_process_ends_the_others(workplace: Workplace, killed: int) -> None:
    settings = SETTINGS | {"max_iters": 10_000, "save_interval": 5}
    started = team(2, workplace.arguments(**settings), workplace.root, PYTHONUNBUFFERED="1")
    wait_for("8/10000", started[0])
    while not checkpoint.iterations(workplace.out_dir):
        assert started[0].poll() is None
        time.sleep(0.01)
    started[killed].kill()
    started[1 - killed].wait(30)  # raises after so many seconds
    done = ends(started)
    assert done[killed].returncode == -signal.SIGKILL
    assert done[1 - killed].returncode == 1, done[1 - killed].stderr
    assert f"gothic-train: error: process {killed} of 2" in done[1 - killed].stderr
    assert "--resume" in done[1 - killed].stderr
    assert checkpoint.locate(f"{workplace.out_dir}/latest").iteration >= 5


@pytest.mark.long
def test_four_processes_train_as_one(workplace: Workplace) -> None:
    one, four = (workplace.root / name for name in ("one", "four"))
    assert workplace.train(out_dir=one, **SETTINGS) == 0
    done = ends(team(4, workplace.arguments(out_dir=four, **SETTINGS), workplace.root))
    assert [each.returncode for each in done] == [0] * 4, done[0].stderr
    np.testing.assert_allclose(losses(one), losses(four), rtol=1e-6)


@pytest.mark.long
def test_what_is_wrong_with_one_process_ends_all_with_its_reason(workplace: Workplace) -> None:
    assert workplace.train() == 0
    # What the first process is refused ends the others.
    for done in ends(team(2, workplace.arguments(), workplace.root)):
        assert done.returncode == 2
        assert "already holds a run" in done.stderr
    tuned = workplace.root / "tuned"
    arguments = [*workplace.arguments(out_dir=tuned), "--init-from", str(workplace.out_dir)]
    seeds = [["--config.seed=1"], ["--config.seed=2"]]
    for done in ends(team(2, arguments, workplace.root, own=seeds)):
        assert done.returncode == 2
        assert "different settings" in done.stderr
        assert "Traceback" not in done.stderr
    assert not checkpoint.iterations(tuned)
    # A run begins from the weights of another, with any number of processes.
    for done in ends(team(2, arguments, workplace.root)):
        assert done.returncode == 0, done.stderr
    assert workplace.train("--init-from", str(workplace.out_dir), out_dir=workplace.root / "1") == 0
    for one, other in zip(
        workplace.params(out_dir=tuned), workplace.params(out_dir=workplace.root / "1"), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_parts_of_a_state_train_and_open_as_a_whole(workplace: Workplace) -> None:
    # This process has two devices, of which each holds half of every matrix and its moments.
    whole, parts = workplace.root / "whole", workplace.root / "parts"
    settings = SETTINGS | {"eval_interval": 40}
    assert workplace.train(out_dir=whole, **settings) == 0
    assert workplace.train(out_dir=parts, shard="fsdp", **settings) == 0
    np.testing.assert_allclose(losses(whole), losses(parts), rtol=1e-6)
    # Resumed in halves, and then with a copy on each device.
    resume = ["--resume", "--out-dir", str(parts), "--max-iters"]
    assert train.main([*resume, "41"]) == 0
    assert train.main([*resume, "42", "--config.shard=none"]) == 0
    assert workplace.train("--resume", out_dir=whole, **settings | {"max_iters": 42}) == 0
    for one, other in zip(
        workplace.params(out_dir=whole), workplace.params(out_dir=parts), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_device_holds_its_part_of_matrices_and_moments(workplace: Workplace) -> None:
    given = parse_overrides(workplace.arguments(shard="fsdp"))
    state = prepare(Request(get_config(), None, given)).initial_state()
    held = {leaf.ndim: 0 for leaf in jax.tree.leaves(state)}
    for leaf in jax.tree.leaves(state):
        part = leaf.addressable_shards[0].data.size
        assert part == (leaf.size // 2 if leaf.ndim == 2 else leaf.size)
        held[leaf.ndim] += 1
    assert held[2] == 3 * (1 + 4)  # embedding and a layer's four kernels, with two moments each

    mesh = data_mesh(jax.devices()[:2])
    matrix, odd, vector = (np.zeros(shape, np.float32) for shape in ((6, 4), (3, 5), (8,)))
    cut = [divided(mesh, leaf).shard_shape(leaf.shape) for leaf in (matrix, odd, vector)]
    assert cut == [(3, 4), (3, 5), (8,)]


@pytest.mark.long
def test_two_processes_write_their_parts_of_one_checkpoint(workplace: Workplace) -> None:
    one, two = (workplace.root / name for name in ("one", "two"))
    settings = SETTINGS | {"max_iters": 20, "eval_interval": 10}
    assert workplace.train(out_dir=one, **settings) == 0
    arguments = workplace.arguments(out_dir=two, shard="fsdp", **settings)
    for done in ends(team(2, arguments, workplace.root)):
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-6)
    assert [*(two / "20" / "params").glob("ocdbt.process_1/d/*")]
    for left, right in zip(
        workplace.params(out_dir=one), workplace.params(out_dir=two), strict=True
    ):
        np.testing.assert_allclose(left, right, atol=1e-4)
    resume = ["--resume", "--out-dir", str(two), "--max-iters", "22"]
    for done in ends(team(2, resume, workplace.root)):
        assert done.returncode == 0, done.stderr
    assert train.main(["--resume", "--out-dir", str(two), "--max-iters", "24"]) == 0
