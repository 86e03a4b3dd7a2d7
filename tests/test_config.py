"""Settings: where they come from, which wins, and what is refused."""

import re
from pathlib import Path

import pytest

from gothic_jax.checkpoints import checkpoint
from gothic_jax.commands import train
from gothic_jax.config import changed_by, get_config, load_config, parse_overrides, validate
from gothic_jax.model.shape import ModelConfig
from tests.common import Workplace

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def test_defaults_are_those_documented() -> None:
    config = get_config()
    assert (config.max_iters, config.batch_size, config.gradient_accumulation_steps) == (
        6000,
        16,
        4,
    )
    assert (config.learning_rate, config.warmup_iters, config.weight_decay) == (3e-4, 500, 0.1)
    assert (config.beta1, config.beta2, config.grad_clip, config.min_lr_ratio) == (
        0.9,
        0.95,
        1,
        0.1,
    )
    assert (config.eval_interval, config.patience) == (250, 0)
    assert ModelConfig(**config.model) == ModelConfig("gemma", 384, 4096, 8, 8, 512, 0.1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_is_valid(path: Path) -> None:
    config = load_config(str(path))
    validate(config)
    assert config.to_dict().keys() == get_config().to_dict().keys()


def test_an_override_changes_one_setting_and_not_the_base() -> None:
    base = get_config()
    config = changed_by(
        base, parse_overrides(["--config.learning_rate=1e-4", "--config.model.n_layer", "6"])
    )
    assert (config.learning_rate, config.model.n_layer) == (1e-4, 6)
    assert (base.learning_rate, base.model.n_layer) == (3e-4, 8)


def test_flags_override_the_file(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    file = workplace.root / "mine.py"
    file.write_text(
        "from gothic_jax.config import get_config as base\n"
        "def get_config():\n"
        "    config = base()\n"
        "    config.max_iters = 50\n"
        "    config.learning_rate = 5e-3\n"
        "    return config\n"
    )
    settings = workplace.arguments("--config", str(file), "--lr", "1e-3")
    settings = [s for s in settings if "learning_rate" not in s]  # max_iters=6 stays
    assert train.main(settings) == 0
    assert "6/6  loss" in capsys.readouterr().out
    meta = checkpoint.locate(str(workplace.out_dir)).meta
    assert meta.config["learning_rate"] == 1e-3
    assert meta.config["max_iters"] == 6


def test_a_file_need_only_name_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "short.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({'max_iters': 5, 'model': {'n_layer': 3}})\n"
    )
    config = load_config(str(file))
    assert (config.max_iters, config.model.n_layer, config.model.n_embd) == (5, 3, 512)


def test_help_lists_the_flags_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        train.main(["--help"])
    assert leaving.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for flag, default in (
        ("--data-dir", "data/processed"), ("--train-file", "mixed_train.txt"),
        ("--val-file", "mixed_val.txt"), ("--tokenizer", "data/tokenizer.json"),
        ("--out-dir", "checkpoints"), ("--max-iters", "6000"), ("--batch-size", "16"),
        ("--grad-accum", "4"), ("--lr", "0.0003"), ("--compile", "True"),
    ):  # fmt: skip
        described = re.search(rf"{flag}(?: [A-Z_]+|, --no-compile) .*?\(default: (.*?)\)", out)
        assert described, flag
        assert described[1] == default
    for flag in ("--resume", "--no-compile", "--config", "--init-from"):
        assert flag in out


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        ("x = (", "SyntaxError"),
        ("", "get_config"),
        ("def get_config(): return 3", "ConfigDict"),
        ("def get_config(): return undefined", "NameError"),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config(): return ConfigDict({'max_iters': 1.5})\n",
            "max_iters",
        ),
        (
            "from gothic_jax.config import get_config as base\n"
            "def get_config():\n"
            "    config = base()\n"
            "    config.learning_rat = 1\n"
            "    return config\n",
            "learning_rat",
        ),
    ],
)
def test_a_broken_config_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, cure: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(content)
    assert train.main([f"--config={file}"]) == 2
    error = capsys.readouterr().err
    assert cure in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--config.learning_rat=1"], "did you mean learning_rate?"),
        (["--config.model.n_layers=1"], "did you mean model.n_layer?"),
        (["--config.zzz=1"], "settings: batch_size"),
        (["--config.max_iters=1.5"], "ill-typed"),
        (["--config.learning_rate=fast"], "ill-typed"),
        (["--config.model=3"], "unknown setting model"),
        (["--config.max_iters"], "Missing value"),
        (["--learning-rate=1"], "--help"),
        (["stray"], "stray"),
        (["--config=nowhere.py"], "no such file"),
        (["--max-iters", "many"], "--help"),
        (["--max-iters", "0"], "max_iters"),
        (["--batch-size", "-1"], "batch_size"),
        (["--config.save_minutes=-1"], "save_minutes"),
        (["--config.model.n_embd=1000000"], "n_embd"),
        (["--config.max_iters=4294967296"], "max_iters"),
        (["--out-dir", "a\0b"], "NUL"),
        (["--lr", "nan"], "learning_rate"),
        (["--lr", "inf"], "finite"),
        (["--config.weight_decay=nan"], "finite"),
        (["--config.seed", "-1"], "seed"),
        (["--config.voice_dropout=1.5"], "voice_dropout"),
        (["--config.beta1=1.0"], "beta1"),
        (["--config.warmup_iters=-1"], "warmup_iters"),
        (["--config.seed=-1"], "seed"),
        (["--config.compute_dtype=float64"], "bfloat16 or float32"),
        (["--config.model.architecture=llama"], "gemma, gpt2"),
        (["--config.model.n_head=7"], "multiple"),
        (["--resume", "--init-from=x"], "not allowed"),
        (["--init-from", "nowhere"], "gothic-train"),
        (["--tokenizer", "nowhere.json"], "gothic-tokenize"),
        (["--train-file", "nowhere.txt"], "gothic-data"),
        (["--val-file", "nowhere.txt"], "gothic-data"),
        (["--config.model.vocab_size=300"], "--config.model.vocab_size=320"),
        (["--config.batch_size=3"], "2 devices"),
        pytest.param(["--config.model.block_size=100000"], "block_size", marks=pytest.mark.long),
        (["--config.voice_weights=wilde"], "wilde=0.3,lovecraft=0.7"),
        (["--config.voice_weights=wilde=-1,lovecraft=1"], "below 0"),
        (["--config.voice_weights=wilde=1"], "lovecraft, wilde"),
        (["--config.patience=None"], "ill-typed"),
        (["--config.learning_rate=1e39"], "below 1e+38"),
        (["--resume", "--overwrite"], "one of them"),
        (["--train-file", "x" * 300], "cannot be read"),
    ],
)
def test_mistakes_are_one_line_that_names_the_cure_and_nothing_is_written(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], flags: list[str], cure: str
) -> None:
    named = {flag.partition("=")[0] for flag in flags} | {
        f"--config.{train.FLAGS[flag].setting}" for flag in flags if flag in train.FLAGS
    }
    settings = [s for s in workplace.arguments() if s.partition("=")[0] not in named]
    assert train.main([*settings, *flags]) == 2
    captured = capsys.readouterr()
    assert cure in captured.err
    assert captured.err.count("\n") == 1
    assert not workplace.out_dir.exists()


def test_a_text_with_voices_unknown_to_the_tokenizer_names_the_command(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    file = workplace.root / "poe.txt"
    file.write_text("<|poe|>\n" + "Once upon a midnight dreary\n" * 30 + "<|endoftext|>\n")
    assert workplace.train(train_file=file) == 2
    error = capsys.readouterr().err
    assert f"gothic-tokenize --files {file}" in error
    assert "poe" in error


def test_voices_are_read_by_their_weights(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train(voice_weights="wilde=1,lovecraft=3") == 0
    assert "voices: lovecraft 75%, wilde 25% of the windows" in capsys.readouterr().out


def test_out_of_memory_names_the_batch(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    def exhausted(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    for place in ("gothic_jax.training.run.init_params", "gothic_jax.training.loop.Loop.go"):
        with monkeypatch.context() as context:
            context.setattr(place, exhausted)
            assert workplace.train() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--batch-size" in error
        assert "--grad-accum" in error


def test_a_bug_of_ours_keeps_its_traceback(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("gothic_jax.training.loop.Loop.go", broken)
    with pytest.raises(ZeroDivisionError):
        workplace.train()
