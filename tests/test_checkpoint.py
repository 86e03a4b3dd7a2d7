"""What is kept, what it is called, and what may go on from it."""

from pathlib import Path

import numpy as np
import pytest

from gothic_jax.checkpoints import checkpoint, saver
from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.commands import chat, evaluate, train
from gothic_jax.errors import UserError
from gothic_jax.machine import environment
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.works import split_works
from tests.common import TEXT, Workplace


def failing(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], *flags: str, **settings: object
) -> str:
    """The one line that a failing `gothic-train` prints."""
    capsys.readouterr()
    assert workplace.train(*flags, **settings) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_latest_and_best_are_kept_and_every_name_leads_to_them(workplace: Workplace) -> None:
    workplace.train()
    # This learning rate spoils the model.
    workplace.train("--resume", learning_rate=10.0, max_iters=10, eval_interval=2)
    run = workplace.out_dir
    held = checkpoint.iterations(run)
    losses = {n: Checkpoint.open(run, n).meta.val_loss for n in held}
    best = min(held, key=losses.__getitem__)
    assert held == sorted({best, 8, 10})
    assert best != 10
    for name, iteration in (
        (run, best), (run / "best", best), (run / "latest", 10), (run / str(best), best),
        (run / "10", 10),
    ):  # fmt: skip
        assert checkpoint.locate(str(name)) == Checkpoint.open(run, iteration)


def test_a_checkpoint_that_is_not_there_is_told(trained: Workplace, tmp_path: Path) -> None:
    for name in (tmp_path / "none", tmp_path / "none" / "best", trained.out_dir / "best.pt"):
        with pytest.raises(UserError, match="gothic-train"):
            checkpoint.locate(str(name))
    with pytest.raises(UserError, match="6, not 5"):
        checkpoint.locate(str(trained.out_dir / "5"))


def test_it_holds_config_scores_and_the_tokenizer(trained: Workplace) -> None:
    found = checkpoint.locate(str(trained.out_dir))
    meta = found.meta
    assert meta.iteration == 6
    assert meta.config["learning_rate"] == 1e-2
    assert meta.scores is not None
    assert meta.scores["all"]["loss"] == meta.best_val_loss
    (trained.root / "tokenizer.json").unlink()
    assert found.tokenizer.vocab_size == meta.model_config.vocab_size


def test_a_new_run_does_not_overwrite_an_old_one_unasked(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained.params()
    assert "--overwrite" in failing(trained, capsys)
    for old, now in zip(before, trained.params(), strict=True):
        np.testing.assert_array_equal(old, now)
    assert trained.train("--overwrite", max_iters=3) == 0
    assert checkpoint.iterations(trained.out_dir) == [3]


def test_overwriting_spares_the_old_run_until_the_new_one_is_sure_to_begin(
    trained: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(trained, capsys, "--overwrite", batch_size=-1)
    with monkeypatch.context() as context:
        context.setattr("gothic_jax.training.loop.make_train_step", None)
        with pytest.raises(TypeError):
            trained.train("--overwrite")
    assert checkpoint.iterations(trained.out_dir) == [3, 6]
    (trained.out_dir / "notes").mkdir()
    assert trained.train("--overwrite", max_iters=3) == 0
    assert checkpoint.iterations(trained.out_dir) == [3]
    assert (trained.out_dir / "notes").is_dir()


def test_a_folder_of_years_is_not_taken_for_checkpoints(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    year = workplace.out_dir / "2024"
    year.mkdir(parents=True)
    assert "2024" in failing(workplace, capsys)
    assert year.is_dir()


def test_a_run_does_not_overwrite_the_weights_it_starts_from(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained.out_dir)
    code = train.main(["--init-from", f"{run}/best", "--out-dir", run, "--overwrite"])
    assert code == 2
    assert "--out-dir" in capsys.readouterr().err
    assert checkpoint.iterations(trained.out_dir) == [3, 6]


def test_a_run_goes_on_with_its_own_tokenizer_where_the_file_is_gone(workplace: Workplace) -> None:
    assert workplace.train() == 0
    (workplace.root / "tokenizer.json").unlink()
    assert train.main(["--resume", "--out-dir", str(workplace.out_dir), "--max-iters", "7"]) == 0


@pytest.mark.long
def test_a_run_goes_on_with_its_own_tokenizer_where_the_file_is_another_by_now(
    workplace: Workplace,
) -> None:
    assert workplace.train() == 0
    other = Tokenizer.train(split_works(TEXT[:1500] + TEXT[-1500:]), 320, 1)
    (workplace.root / "tokenizer.json").write_text(other.to_json())
    assert train.main(["--resume", "--out-dir", str(workplace.out_dir), "--max-iters", "7"]) == 0


@pytest.mark.parametrize("flag", ["--tokenizer", "--config.tokenizer"])
def test_fine_tuning_with_another_tokenizer_is_refused_however_it_is_named(
    trained: Workplace, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    other = trained.root / "other.json"
    (other).write_text(Tokenizer.train(split_works(TEXT[:1500] + TEXT[-1500:]), 320, 1).to_json())
    tuned = str(trained.root / "tuned")
    start = ["--init-from", f"{trained.out_dir}/best", "--out-dir", tuned]
    assert train.main([*start, f"{flag}={other}"]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_diverged_run_is_told_and_leaves_the_good_checkpoints(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained.params("best")
    settings = {"learning_rate": 1e30, "max_iters": 40, "max_skipped": 3}
    error = failing(trained, capsys, "--resume", **settings)
    assert "4 iterations in a row" in error
    assert "--lr" in error
    assert checkpoint.locate(str(trained.out_dir)).iteration == 6
    for old, now in zip(before, trained.params("best"), strict=True):
        np.testing.assert_array_equal(old, now)
    for iteration in checkpoint.iterations(trained.out_dir):
        assert all(np.isfinite(leaf).all() for leaf in trained.params(str(iteration)))


def test_nothing_to_resume_is_told(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no checkpoint to resume" in failing(workplace, capsys, "--resume")
    assert not workplace.out_dir.exists()


def test_a_finished_run_is_not_resumed_but_goes_on_with_more_iterations(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--max-iters" in failing(trained, capsys, "--resume")
    assert trained.train("--resume", max_iters=8) == 0
    assert "max_iters 6 -> 8" in capsys.readouterr().out
    assert checkpoint.iterations(trained.out_dir)[-1] == 8


@pytest.mark.parametrize(
    ("name", "value"), [("n_layer", 3), ("n_embd", 64), ("n_head", 4), ("block_size", 16)]
)
def test_resuming_with_another_shape_is_refused_by_name(
    trained: Workplace, capsys: pytest.CaptureFixture[str], name: str, value: int
) -> None:
    setting = f"model.{name}"
    assert setting in failing(trained, capsys, "--resume", max_iters=9, **{setting: value})


def test_resuming_with_another_text_or_tokenizer_is_refused_by_name(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    other = trained.root / "other.txt"
    other.write_text(TEXT + "And one line more.\n")
    assert "train_file" in failing(trained, capsys, "--resume", train_file=other)
    assert "val_file" in failing(trained, capsys, "--resume", val_file=other)
    path = trained.root / "other.json"
    for size in (320, 300):
        (path).write_text(
            Tokenizer.train(split_works(TEXT[:1500] + TEXT[-1500:]), size, 1).to_json()
        )
        assert "another tokenizer" in failing(trained, capsys, "--resume", tokenizer=path)


def test_resume_takes_the_settings_of_the_run(trained: Workplace) -> None:
    code = train.main(["--resume", "--out-dir", str(trained.out_dir), "--max-iters", "7"])
    assert code == 0
    meta = checkpoint.locate(f"{trained.out_dir}/latest").meta
    assert meta.iteration == 7
    assert meta.config["learning_rate"] == 1e-2


def test_fine_tuning_starts_a_new_run_from_old_weights(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = trained.root / "mine.txt"
    # As `gothic-data --add me=...` makes it: the checkpoint knows no such voice.
    diary = "A diary of small weathers, kept by the harbour master.\n" * 40
    mine.write_text(f"<|me|>\n{diary}<|endoftext|>\n")
    tuned = trained.root / "tuned"
    code = train.main(
        ["--init-from", f"{trained.out_dir}/best", "--out-dir", str(tuned), "--lr", "1e-12",
         "--train-file", str(mine), "--val-file", str(mine), "--max-iters", "2",
         "--batch-size", "2", "--grad-accum", "1", "--config.sample_tokens=2",
         "--config.weight_decay=0.0"]
    )  # fmt: skip
    assert code == 0
    assert "new voices: me" in capsys.readouterr().out
    assert checkpoint.iterations(tuned) == [2]
    before, after = (checkpoint.locate(str(run)) for run in (trained.out_dir, tuned))
    assert after.tokenizer.vocab_size == before.tokenizer.vocab_size + 1
    assert after.tokenizer.openers == before.tokenizer.openers | {"me": 320}
    assert after.tokenizer.encode(diary).tolist() == before.tokenizer.encode(diary).tolist()
    # Hardly anything was learned at this rate: these are the old weights, and the new voice's row.
    old, now = before.named_params(), after.named_params()
    row = old["token_embedding"][before.tokenizer.any_voice]
    old["token_embedding"] = np.concatenate([old["token_embedding"], row[None]])
    for name, array in now.items():
        np.testing.assert_allclose(array, old[name], atol=1e-6)
    assert chat.main(["--checkpoint", str(tuned), "--voice", "me", "--max-tokens", "4"]) == 0
    more = ["--resume", "--out-dir", str(tuned), "--max-iters", "3"]
    assert train.main(more) == 0
    capsys.readouterr()
    again = ["--init-from", f"{trained.out_dir}/best", "--out-dir", str(tuned), "--overwrite"]
    assert train.main([*again, "--config.model.n_layer=3"]) == 2
    assert "n_layer" in capsys.readouterr().err


@pytest.mark.long
def test_checkpoints_between_evaluations_come_by_iterations_and_by_minutes(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "KEPT", 100)
    assert workplace.train(max_iters=7, eval_interval=5, save_interval=2) == 0
    held = checkpoint.iterations(workplace.out_dir)
    assert held == [2, 4, 5, 6, 7]
    metas = {n: Checkpoint.open(workplace.out_dir, n).meta for n in held}
    assert [n for n in held if metas[n].scores is not None] == [5, 7]
    by_clock = workplace.root / "by-clock"
    settings = {"max_iters": 4, "eval_interval": 4, "save_minutes": 1e-9}
    assert workplace.train(out_dir=by_clock, **settings) == 0
    assert checkpoint.iterations(by_clock) == [1, 2, 3, 4]


def test_resuming_elsewhere_is_told_by_name(
    trained: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment.facts()
    other = here | {"threads": "96", "jaxlib": "9.9"}
    monkeypatch.setattr(environment, "facts", lambda: other)
    monkeypatch.setattr(environment, "versions", lambda names: {n: other[n] for n in names})
    assert trained.train("--resume", max_iters=7) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"threads {here['threads']} -> 96" in error
    assert f"jaxlib {here['jaxlib']} -> 9.9" in error
    assert chat.main(["--checkpoint", f"{trained.out_dir}/6", "--max-tokens", "2"]) == 0
    error = capsys.readouterr().err
    assert "jaxlib" in error
    assert "threads" not in error  # a text is often written on another machine


def test_the_seal_names_what_differs(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ["--checkpoint", str(trained.out_dir), "--verify"]
    assert evaluate.main(verify) == 0
    told = capsys.readouterr().out
    meta = checkpoint.locate(str(trained.out_dir)).meta
    for fact in (meta.tokenizer_sha256, meta.train_sha256, meta.val_sha256):
        assert fact in told
    assert "threads" in told
    assert "XLA_FLAGS" in told
    # The settings name the folder that the fixture was trained in; its text is changed there.
    text = Path(meta.config["data_dir"]) / "mixed_val.txt"
    content = text.read_text()
    try:
        text.write_text(content + "\nOne line more.\n")
        assert evaluate.main(verify) == 0
        assert f"DIFFERS: {text} is another text" in capsys.readouterr().out
        text.write_bytes(b"no text \xff any more")
        assert evaluate.main(verify) == 0
        told = capsys.readouterr().out
        assert f"DIFFERS: {text}: byte 8 (line 1) is not UTF-8" in told
        assert "XLA_FLAGS" in told  # all the rest is told, too
        assert evaluate.main([*verify, "--json"]) == 2
    finally:
        text.write_text(content)
    (trained.out_dir / "6" / "meta.json").write_text("{}")
    assert evaluate.main([*verify[:1], f"{trained.out_dir}/6", "--verify"]) == 2
    assert "6/meta.json is damaged" in capsys.readouterr().err


def test_a_replaced_checkpoint_survives_a_kill_between_the_two_renames(trained: Workplace) -> None:
    run = trained.out_dir
    before = trained.params("6")
    # As a kill leaves it: the old one set aside, the new one not yet in its place.
    (run / "6").rename(run / ".6.old")
    (run / ".6.tmp").mkdir()
    saver.tidy(run)
    for old, now in zip(before, trained.params("6"), strict=True):
        np.testing.assert_array_equal(old, now)
    assert not [*run.glob(".6.*")]


def test_a_damaged_best_checkpoint_is_reported_and_kept_aside(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    # The best is made first; the learning rate that follows spoils the model.
    workplace.train(max_iters=4, eval_interval=2)
    workplace.train("--resume", learning_rate=10.0, max_iters=10, eval_interval=2)
    run = workplace.out_dir
    best = checkpoint.locate(str(run)).iteration
    assert best < 8
    content = (run / str(best) / "meta.json").read_text()
    (run / str(best) / "meta.json").write_text(content[:-9])
    capsys.readouterr()
    assert workplace.train("--resume", max_iters=12, eval_interval=2) == 0
    captured = capsys.readouterr()
    assert f"{best}/meta.json is damaged" in captured.err
    assert f"moved to {run}/{best}.damaged" in captured.err
    assert (run / f"{best}.damaged" / "meta.json").read_text() == content[:-9]
    remaining = {n: Checkpoint.open(run, n).meta.val_loss for n in checkpoint.iterations(run)}
    now = checkpoint.locate(str(run))
    assert now.meta.val_loss == min(remaining.values())
    assert f"best ({now})" in captured.out
    latest = checkpoint.locate(f"{run}/latest").meta
    assert latest.best_val_loss == now.meta.val_loss
    assert latest.evaluations_since_best == (latest.iteration - now.iteration) // 2


def test_a_run_that_has_done_more_than_is_asked_for_says_how_many(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failing(trained, capsys, "--resume", max_iters=4)
    assert "has done 6 iterations, and --max-iters is 4" in error


def test_a_resumed_run_counts_the_tokens_that_are_left(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert trained.train("--resume", max_iters=8, batch_size=4) == 0
    # 2 iterations of 2 micro-batches of 4 windows of 32 tokens
    assert "2 more iterations of 256 are 512 tokens" in capsys.readouterr().out


def test_a_resumed_run_sets_damaged_later_checkpoints_aside(trained: Workplace) -> None:
    meta = trained.out_dir / "6" / "meta.json"
    meta.write_text(meta.read_text().replace("6", "7", 1))
    damaged = meta.read_text()
    assert trained.train("--resume", max_iters=6) == 0
    assert (trained.out_dir / "6.damaged" / "meta.json").read_text() == damaged
    assert checkpoint.locate(f"{trained.out_dir}/6").meta.iteration == 6
