"""The short layer of `python -m tests.torture`: the same trials, fewer of them."""

from pathlib import Path

import pytest

from tests.common import Workplace
from tests.torture import damage, foreign, inputs, kills, numbers
from tests.torture.world import Figure, bound, faults_library

pytestmark = pytest.mark.long


@pytest.fixture
def library(tmp_path: Path) -> Path:
    found = faults_library(tmp_path)
    if found is None:
        pytest.skip("no C compiler: faults cannot be injected")
    return found


def kept(figure: Figure, trials: int) -> None:
    assert figure.failures == []
    assert figure.trials >= trials


def test_a_killed_run_ends_like_one_that_nothing_disturbed(workplace: Workplace) -> None:
    kept(kills.sigkill(workplace, 10), 10)


def test_a_kill_at_any_rename_or_fsync_of_a_save_is_survived(
    workplace: Workplace, library: Path
) -> None:
    kept(kills.kill_at_every_call(workplace, library, 3), 2)


def test_signals_save_and_leave(workplace: Workplace) -> None:
    kept(kills.signals(workplace, 4, timed=False), 4)


def test_two_trainers_do_not_share_a_folder(workplace: Workplace) -> None:
    kept(kills.neighbours(workplace, 2, timed=False), 2)


def test_a_step_gets_its_name_when_all_of_it_is_on_the_disk(workplace: Workplace) -> None:
    figure = damage.power_loss(workplace)
    if figure.trials == 0:
        pytest.skip(figure.notes)
    kept(figure, 30)


def test_no_damage_loads_silently(workplace: Workplace) -> None:
    kept(damage.damaged_files(workplace, 100, 50, 50, 20), 220)


def test_commands_name_the_damaged_file_and_go_back(workplace: Workplace) -> None:
    kept(damage.damaged_commands(workplace, 3), 3)


def test_a_full_disk_is_told_and_the_run_goes_on(workplace: Workplace, library: Path) -> None:
    kept(damage.failing_disk(workplace, library, 2), 3)


def test_hostile_folders_are_refused(workplace: Workplace) -> None:
    kept(damage.hostile_folders(workplace, every=4, timed=False), 5)


def test_what_is_not_finite_is_skipped_and_counted(workplace: Workplace) -> None:
    kept(numbers.not_finite(workplace, 20, 2), 22)


def test_the_same_command_gives_the_same_hash(workplace: Workplace) -> None:
    kept(numbers.twice(workplace, 2), 2)


def test_more_devices_change_no_loss(workplace: Workplace) -> None:
    kept(numbers.devices(workplace), 80)


def test_batches_go_on_from_every_iteration(workplace: Workplace) -> None:
    kept(numbers.data_positions(workplace, 30), 30)


def test_mutated_tokenizers_work_or_are_refused(workplace: Workplace) -> None:
    kept(inputs.tokenizers(workplace, 200), 200)


@pytest.mark.parametrize("name", foreign.NUMBERS)
def test_mutated_folders_of_other_programs_open_soundly_or_are_refused(
    workplace: Workplace, name: str
) -> None:
    kept(foreign.folders(workplace, name, 40), 40)


def test_settings_of_any_kind_are_taken_or_refused(workplace: Workplace) -> None:
    kept(inputs.settings(workplace, 500), 500)


def test_texts_of_any_bytes_are_read_exactly_or_refused(workplace: Workplace) -> None:
    kept(inputs.texts(workplace, 500, long=False), 500)


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    assert bound(0, 200) == pytest.approx(1 - 0.05 ** (1 / 200))
    # The 95% point of Beta(3, 8), from tables.
    assert bound(2, 10) == pytest.approx(0.5069, abs=1e-4)
    assert bound(5, 5) == 1.0
