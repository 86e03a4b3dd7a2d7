"""Released models: what they hold, what opens them, and what leaves them alone."""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from gothic_jax.checkpoints import release
from gothic_jax.checkpoints.arrays import WEIGHTS, read_safetensors
from gothic_jax.checkpoints.checkpoint import leaf_name, locate
from gothic_jax.commands import chat, evaluate
from gothic_jax.errors import UserError
from gothic_jax.machine import manifest
from gothic_jax.model.gpt import abstract_params
from tests.common import TINY, Workplace, run


@pytest.fixture(scope="module")
def released_once(trained_once: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released run, made of the best checkpoint of a finished one."""
    folder = tmp_path_factory.mktemp("released") / "model"
    release.release(locate(str(trained_once.out_dir)), folder)
    return folder


@pytest.fixture
def released(released_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(released_once, tmp_path / "model"))


def test_the_weights_are_those_of_the_checkpoint_rounded_to_bfloat16(
    trained: Workplace, released: Path
) -> None:
    opened = locate(str(released))
    assert opened.meta.iteration == 6
    weights = opened.params(SingleDeviceSharding(jax.devices()[0]))
    for before, after in zip(trained.params("best"), jax.tree.leaves(weights), strict=True):
        assert after.dtype == np.float32
        np.testing.assert_array_equal(before.astype(ml_dtypes.bfloat16), np.asarray(after))


def test_a_mean_of_two_checkpoints_has_the_mean_of_their_weights(
    trained: Workplace, tmp_path: Path
) -> None:
    assert trained.train("--resume", max_iters=8) == 0
    later, earlier = locate(str(trained.out_dir / "8")), locate(str(trained.out_dir / "6"))
    assert release.release(later, tmp_path / "mean", earlier) == tmp_path / "mean" / "8"
    mean = locate(str(tmp_path / "mean"))
    both = later.named_params(), earlier.named_params()
    for name, array in mean.named_params().items():
        want = ((both[0][name] + both[1][name]) / 2).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, want.astype(np.float32))
    assert mean.meta.scores is None
    assert mean.meta.best_val_loss is None


def test_it_holds_no_path_and_others_can_read_it(trained: Workplace, released: Path) -> None:
    files = [path for path in released.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "meta.json", "tokenizer.json", "manifest.json", WEIGHTS,
    }  # fmt: skip
    for path in files:
        assert str(trained.root.parent.parent).encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o044 == 0o044
    config = json.loads((released / "6" / "meta.json").read_text())["config"]
    assert [config[name] for name in ("data_dir", "train_file", "out_dir")] == [
        "data/processed", "mixed_train.txt", "checkpoints",
    ]  # fmt: skip


def test_it_is_verified_scored_and_writes_with_receipts(
    trained: Workplace, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(released), "--verify"]) == 0
    text = ["--file", str(trained.root / "mixed_val.txt"), "--json"]
    losses = []
    for model in (trained.out_dir, released):
        capsys.readouterr()
        assert evaluate.main(["--checkpoint", str(model), *text]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
    for flags in (["--voice", "wilde"], ["--blend", "wilde=0.5,lovecraft=0.5"]):
        assert chat.main(["--checkpoint", str(released), "--max-tokens", "9", *flags]) == 0
        assert chat.main(["--replay", str(released / "samples.jsonl")]) == 0
        assert "the same text" in capsys.readouterr().err


def test_training_starts_from_it_and_leaves_it_alone(
    trained: Workplace, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (released / "6").iterdir()}

    before = files()
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert trained.train(*flags, out_dir=released) == 2
        assert f"--init-from {released / '6'}" in capsys.readouterr().err
    new = trained.root / "new"
    assert trained.train("--init-from", str(released), out_dir=new) == 0
    assert locate(str(new / "latest")).iteration == 6
    # A run in the folder above it, new and tidied up; a model of another program is there, too.
    (released.parent / "hf").mkdir()
    (released.parent / "hf" / WEIGHTS).write_bytes(b"")
    assert trained.train("--overwrite", out_dir=released.parent) == 0
    assert files() == before


def test_a_model_that_is_there_is_not_released_again(trained: Workplace, released: Path) -> None:
    with pytest.raises(UserError, match="holds checkpoints already"):
        release.release(locate(str(trained.out_dir)), released)


def test_without_a_checkpoint_the_model_of_the_clone_writes_and_says_so(
    released: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "GOTHIC_DANDY", released)
    assert chat.main(["--max-tokens", "4", "--prompt", "There"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("There")
    assert f"{released / '6'} writes" in captured.err
    monkeypatch.setattr(release, "GOTHIC_DANDY", released / "none")
    assert chat.main(["--max-tokens", "4"]) == 2
    assert "gothic-train" in capsys.readouterr().err


def test_a_clone_writes_in_all_voices_from_any_folder(tmp_path: Path) -> None:
    for flags in (["--voice", "wilde"], ["--blend", "lovecraft=0.5,poe=0.5"]):
        done = run("chat", [*flags, "--prompt", "The moon", "--max-tokens", "20"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("The moon")
        assert f"checkpoints{os.sep}gothic-dandy" in done.stderr
    assert [*tmp_path.iterdir()] == []


class Bomb:
    """What no one may unpickle."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a pickle was read",)


def other_shape(path: Path) -> None:
    save_file({name: a[..., :-1].copy() for name, a in load_file(path).items()}, path)


def other_type(path: Path) -> None:
    save_file({name: a.astype(np.float32) for name, a in load_file(path).items()}, path)


def one_missing(path: Path) -> None:
    save_file(dict([*load_file(path).items()][1:]), path)


def one_more(path: Path) -> None:
    save_file(load_file(path) | {"extra": np.zeros(3, np.float32)}, path)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


@pytest.mark.parametrize(
    "change", [other_shape, other_type, one_missing, one_more, huge_header, cut_off, a_pickle]
)
def test_hostile_weights_are_refused_in_one_line(
    released: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    change(released / "6" / WEIGHTS)
    (released / "6" / manifest.NAME).unlink()
    with ThreadPoolExecutor(1) as pool:
        manifest.write(released / "6", {}, pool)
    assert chat.main(["--checkpoint", str(released), "--max-tokens", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be read" in error


def test_whatever_bytes_are_changed_what_is_read_has_the_shapes_wanted(released: Path) -> None:
    folder = released / "6"
    wanted = {
        leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract_params(TINY))
    }
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    random_numbers = random.Random(1)
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(random_numbers.randint(1, 4)):
            changed[random_numbers.randrange(header)] = random_numbers.randrange(256)
        (folder / WEIGHTS).write_bytes(changed)
        try:
            read = read_safetensors(folder, wanted)
        except ValueError:
            refused += 1
        else:
            assert {name: array.shape for name, array in read.items()} == {
                name: leaf.shape for name, leaf in wanted.items()
            }
    assert refused > 200


def test_the_command_says_how_large_the_model_is(
    trained: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.release import main

    capsys.readouterr()
    assert main([f"{trained.out_dir}/best", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out' / '6'}: ")
    assert main([f"{trained.out_dir}/best", str(tmp_path / "out")]) == 2
