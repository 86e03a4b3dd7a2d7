"""TensorBoard's log: whole curves, also after a resume and after the disk failed."""

from pathlib import Path

import pytest
from tensorboardX.record_writer import RecordWriter

from gothic_jax.training.tensorboard import EventLog
from tests.torture.world import points


def test_what_a_resumed_run_logs_again_appears_once(tmp_path: Path) -> None:
    said: list[str] = []
    first = EventLog(tmp_path, 0, said.append)
    for step in range(1, 8):
        first.scalars(step, {"loss": 1.0 / step, "rate": 0.5})
    first.close()
    # Killed at iteration 7, with a checkpoint of iteration 4.
    second = EventLog(tmp_path, 4, said.append)
    for step in range(5, 10):
        second.scalars(step, {"loss": 1.0 / step, "rate": 0.5})
    second.close()
    losses = [(step, value) for name, step, value in points(tmp_path) if name == "loss"]
    assert losses == [(step, pytest.approx(1.0 / step)) for step in range(1, 10)]
    assert said == []


def test_a_full_disk_is_reported_once_and_later_points_come_in_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    log = EventLog(tmp_path, 0, said.append)
    log.scalars(1, {"loss": 1.0})
    log.flush()

    def full(_: RecordWriter) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(RecordWriter, "flush", full)
        for step in (2, 3, 4):
            log.scalars(step, {"loss": 1.0})
            log.flush()
    log.flush()
    log.scalars(5, {"loss": 1.0})
    log.flush()
    assert len(said) == 1
    assert "No space left on device" in said[0]
    with monkeypatch.context() as context:
        context.setattr(RecordWriter, "flush", full)
        log.flush()
    log.close()
    assert len(said) == 2  # writes had succeeded in between
    assert {step for _, step, _ in points(tmp_path)} >= {1, 5}
    assert len([*tmp_path.iterdir()]) > 1


def test_a_log_that_cannot_be_created_does_not_stop_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "logs").write_text("a file where a folder should be")
    log = EventLog(tmp_path / "logs", 0, said.append)
    log.scalars(1, {"loss": 1.0})
    log.flush()
    log.close()
    assert len(said) == 1
