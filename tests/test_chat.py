import json
import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from gothic_jax.checkpoints.checkpoint import Checkpoint, locate
from gothic_jax.commands import conversation as conversation_module
from gothic_jax.commands import evaluate
from gothic_jax.commands.chat import main
from gothic_jax.commands.conversation import Chat, change, converse
from gothic_jax.commands.tokenize import main as tokenize_main
from gothic_jax.errors import UserError
from gothic_jax.machine.device import select_device
from gothic_jax.machine.terminal import cells
from gothic_jax.measuring import novelty
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.writing.sample import Ending, Piece
from gothic_jax.writing.sampler import Sampler
from gothic_jax.writing.settings import Sampling, Settings
from gothic_jax.writing.writer import Writer
from tests.common import DARK, Workplace
from tests.terminal import Terminal

SETTINGS = Settings(Sampling(), max_tokens=20, blend={}, seed=5)


@pytest.fixture(scope="module")
def where(trained_once: Workplace) -> Checkpoint:
    return locate(str(trained_once.out_dir))


@pytest.fixture(scope="module")
def writer(where: Checkpoint) -> Writer:
    return Writer.load(where, select_device("auto"))


class Scripted(Sampler):
    """A sampler that writes given tokens, in given chunks."""

    def __init__(self, chunks: list[list[list[int]]]) -> None:
        self.chunks = chunks

    def stream(
        self, params: object, prompt: np.ndarray, *, weights: list[float], **_: object
    ) -> Iterator[np.ndarray]:
        self.prompt, self.weights = prompt, weights
        yield from (np.array(chunk) for chunk in self.chunks)


def scripted_writer(sampler: Scripted, tokenizer: Tokenizer) -> Writer:
    """A writer that measures nothing."""
    return Writer({}, sampler, tokenizer, lambda *_: jnp.zeros(()), lambda *_: jnp.zeros(()))


def scripted(tokenizer: Tokenizer, chunks: list[list[list[int]]]) -> list[list[Piece]]:
    writer = scripted_writer(Scripted(chunks), tokenizer)
    return list(writer.stream(np.array([0]), SETTINGS, len(chunks[0]), 0))


def test_a_character_of_several_tokens_is_never_broken(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("naïve — ☃ 🜏").tolist()
    pieces = scripted(tokenizer, [[[token]] for token in ids])
    assert "".join(piece.text for (piece,) in pieces) == "naïve — ☃ 🜏"
    assert all("\ufffd" not in piece.text for (piece,) in pieces)


def test_a_reply_cut_within_a_character_leaves_it_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a ☃").tolist()
    assert len(ids) > 3
    pieces = scripted(tokenizer, [[ids[:-1]], [[ids[0]]]])
    assert "".join(piece.text for (piece,) in pieces) == "a a"


def test_a_sample_ends_where_its_work_does_and_the_others_go_on(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_tokens["<|endoftext|>"]
    a, b = (int(tokenizer.encode(letter)[0]) for letter in "ab")
    pieces = scripted(tokenizer, [[[a, end], [b, b]], [[a, a], [b, end]], [[a, a], [b, b]]])
    texts = ["".join(piece.text for piece in parts) for parts in zip(*pieces, strict=True)]
    assert texts == ["a", "bbb"]
    assert [piece.ending for piece in pieces[0]] == [Ending.END, None]
    assert [piece.ending for piece in pieces[-1]] == [Ending.END, Ending.END]


def test_the_prompt_is_opened_by_its_voices(tokenizer: Tokenizer) -> None:
    wilde, lovecraft, anyone = (
        tokenizer.special_tokens[f"<|{voice}|>"] for voice in ("wilde", "lovecraft", "any")
    )
    sampler = Scripted([])
    writer = scripted_writer(sampler, tokenizer)
    prompt = writer.encode("The sea")
    assert tokenizer.decode(list(prompt)) == "The sea"
    for blend, openers, weights in (
        ({}, [anyone], [1]),
        ({"wilde": 1.0}, [wilde], [1]),
        ({"wilde": 0.25, "lovecraft": 0.75}, [wilde, lovecraft], [0.25, 0.75]),
        ({"lovecraft": 1.5}, [lovecraft, anyone], [1.5, -0.5]),
    ):
        list(writer.stream(prompt, SETTINGS._replace(blend=blend), 2, 0))
        assert sampler.prompt.tolist() == [[opener, *prompt] for opener in openers] * 2
        assert sampler.weights == weights


def arguments(trained: Workplace, *extra: str) -> list[str]:
    return ["--checkpoint", f"{trained.out_dir}/best", "--max-tokens", "12", *extra]


def test_command_prints_prompt_and_text_and_the_seed_that_gives_it_again(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(trained_once, "--prompt", "There are doors")) == 0
    first = capsys.readouterr()
    assert first.out.startswith("There are doors")
    seed = first.err.split("seed ")[1].split()[0]
    assert main(arguments(trained_once, "--prompt", "There are doors", "--seed", seed)) == 0
    assert capsys.readouterr().out == first.out


def test_several_samples_the_first_as_if_alone(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--seed", "3", "--temperature", "1.2", "--voice", "wilde"]
    assert main(arguments(trained_once, *flags)) == 0
    alone = capsys.readouterr().out
    assert main(arguments(trained_once, *flags, "--num-samples", "3")) == 0
    out = capsys.readouterr().out
    assert alone in out
    assert [f"--- {i} of 3 ---" in out for i in (1, 2, 3)] == [True] * 3


def test_a_long_prompt_keeps_its_end_and_says_so(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(trained_once, "--prompt", "the tide " * 200)) == 0
    assert "reads the last 31" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "  \n"], "prompt is empty"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "1e39"], "from 0 to 1,000"),
        (["--top-k", "-1"], "top-k"),
        (["--top-p", "0"], "top-p"),
        (["--top-p", "1.5"], "top-p"),
        (["--max-tokens", "0"], "max-tokens"),
        (["--num-samples", "0"], "num-samples"),
        (["--num-samples", "1000000000000"], "65,536"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**32)], "seed"),
        (["--voice", "poe"], "lovecraft, wilde"),
        (["--blend", "poe=1"], "lovecraft, wilde"),
        (["--blend", "wilde"], "the voices are lovecraft, wilde"),
        (["--blend", "wilde=x"], "wilde=0.3,lovecraft=0.7"),
        (["--blend", "wilde=nan"], "wilde=0.3,lovecraft=0.7"),
        (["--blend", "wilde=1e9"], "at most 100"),
        (["--blend", "wilde=1,"], "wilde=0.3,lovecraft=0.7"),
        (["--blend", "wilde=1,wilde=1"], "twice"),
        (["--blend", "wilde=0,lovecraft=0"], "another"),
        (["--voice", "wilde", "--blend", "wilde=1"], "not allowed with"),
        (["--best-of", "2", "--num-samples", "2"], "not allowed with"),
        (["--best-of", "0"], "best-of"),
        (["--best-of", "2"], "gothic-index"),
        (["--train-file", "x.txt"], "--novelty"),
        (["--device", "abacus"], "auto, cpu or cuda"),
        (["--checkpoint", "nowhere/best"], "gothic-train"),
        (["--tokenizer", "nowhere.json"], "gothic-tokenize"),
        (["--prompt", "a\ud800b"], "Unicode"),
        (["--nonsense"], "--help"),
    ],
)
def test_mistakes_are_one_line_that_names_the_cure(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str], flags: list[str], cure: str
) -> None:
    assert main(arguments(trained_once, *flags)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert cure in captured.err
    assert captured.err.count("\n") == 1


def test_the_voice_none_is_no_voice(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(trained_once, "--seed", "3")) == 0
    unnamed = capsys.readouterr().out
    assert main(arguments(trained_once, "--seed", "3", "--voice", "none")) == 0
    assert capsys.readouterr().out == unnamed


def test_a_replay_takes_no_other_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--voice", "wilde"], ["--max-tokens=200"], ["--novelty"]):
        assert main(["--replay", "samples.jsonl", *option]) == 2
        assert f"{option[0].partition('=')[0]} cannot be given" in capsys.readouterr().err


def test_a_blend_of_one_voice_is_that_voice(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--seed", "3", "--temperature", "1.2"]
    texts = []
    for who in (["--voice", "wilde"], ["--blend", "wilde=1"], ["--blend", "wilde=1,lovecraft=0"]):
        assert main(arguments(trained_once, *flags, *who)) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_a_text_without_markers_trains_and_writes_as_a_single_voice(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (workplace.root / f"mixed_{split}.txt").write_text(f"{DARK}\n\n" * 12)
    flags = ["--files", str(workplace.root / "mixed_train.txt"), "--vocab-size", "320"]
    assert tokenize_main([*flags, "--output", str(workplace.root / "tokenizer.json")]) == 0
    assert workplace.train() == 0
    capsys.readouterr()
    where = ["--checkpoint", str(workplace.out_dir), "--max-tokens", "12"]
    assert main(where) == 0
    assert main([*where, "--voice", "wilde"]) == 2
    assert "without voices" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(workplace.out_dir), "--style", "x"]) == 2
    novelty.build(workplace.root / "mixed_train.txt", None)
    capsys.readouterr()
    assert main([*where, "--best-of", "2"]) == 0
    assert "of 2 ---" in capsys.readouterr().out
    (workplace.root / "story.txt").write_text(DARK)
    style = ["--checkpoint", str(workplace.out_dir), "--style", str(workplace.root / "story.txt")]
    assert evaluate.main(style) == 2
    assert "two or more" in capsys.readouterr().err


def test_cuda_without_cuda_is_told(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    import jax

    if jax.default_backend() == "gpu":
        pytest.skip("there is a CUDA GPU")
    assert main(arguments(trained_once, "--device", "cuda")) == 2
    assert "jax[cuda12]" in capsys.readouterr().err


def test_another_tokenizer_than_the_checkpoints_is_refused(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained.root / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    path.write_text(json.dumps(content))
    assert main(arguments(trained, "--tokenizer", str(path))) == 2
    assert "another tokenizer" in capsys.readouterr().err
    # The checkpoint's own is still there.
    assert main(arguments(trained)) == 0


def test_commands_change_the_settings(writer: Writer) -> None:
    settings = SETTINGS
    for line in ("temp 0.5", "topk 7", "topp 0.8", "max 9", "voice wilde", "seed 4"):
        name, _, value = line.partition(" ")
        settings = change(settings, name, value, writer)
    assert settings == Settings(Sampling(0.5, 7, 0.8), max_tokens=9, blend={"wilde": 1.0}, seed=4)
    settings = change(change(settings, "voice", "none", writer), "seed", "random", writer)
    assert (settings.blend, settings.seed) == ({}, None)
    settings = change(settings, "blend", "wilde=0.5, lovecraft=0.5", writer)
    assert settings.blend == {"wilde": 0.5, "lovecraft": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("temp", "warm", "number"),
        ("temp", "-1", "temperature"),
        ("topk", "1.5", "number"),
        ("topp", "0", "top-p"),
        ("max", "0", "max-tokens"),
        ("voice", "poe", "lovecraft, wilde"),
        ("blend", "poe=1", "lovecraft, wilde"),
        ("blend", "", "wilde=0.3,lovecraft=0.7"),
        ("seed", "x", "number"),
        ("sing", "", "/help"),
    ],
)
def test_a_wrong_command_changes_nothing_and_says_why(
    writer: Writer, name: str, value: str, cure: str
) -> None:
    with pytest.raises(UserError, match=cure):
        change(SETTINGS, name, value, writer)


def conversation(
    writer: Writer, where: Checkpoint, *lines: str, capsys: pytest.CaptureFixture[str]
) -> str:
    remaining = iter(lines)

    def read_line(_: str) -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        return line

    converse(Chat(writer, where), SETTINGS, read_line)
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_a_conversation_writes_retries_and_outlives_mistakes(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/retry", "/style", "/voice poe", "", "There are", "/retry", "/quit", "never"]
    out = conversation(writer, where, *lines, capsys=capsys)
    assert "nothing to retry" in out
    assert "nothing has been written" in out
    assert "there is no voice 'poe'" in out
    replies = [line for line in out.splitlines() if line.startswith("There are")]
    assert len(replies) == 2
    assert replies[0] == replies[1]  # the seed is fixed in these settings
    assert "never" not in out


def test_the_prompt_of_the_command_line_can_be_retried(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/retry", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    flags = ["--interactive", "--prompt", "There are doors", "--seed", "3"]
    assert main(arguments(trained_once, *flags)) == 0
    out = capsys.readouterr().out
    assert out.count("There are doors") == 2


def test_two_slashes_begin_a_text_with_one(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    out = conversation(writer, where, "//voice of the sea", "/sea", capsys=capsys)
    assert "\n/voice of the sea" in out
    assert "unknown command /sea" in out
    assert "//" in out.split("unknown command")[1]


def test_piped_lines_have_no_marks_of_windows(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["\ufeffThere are\r", "/max 4\r", "/quit\r"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(arguments(trained_once, "--interactive")) == 0
    captured = capsys.readouterr()
    assert "\nThere are" in captured.out
    assert "max 4 tokens" in captured.out
    assert "\r" not in captured.out + captured.err
    assert "\ufeff" not in captured.out


def test_a_sample_says_why_it_ended_and_never_shows_what_it_stopped_at(
    tokenizer: Tokenizer,
) -> None:
    words = "The tide was out. The boats"
    ids = tokenizer.encode(words).tolist()
    for chunks in ([[ids]], [[[token]] for token in ids]):
        for stop, text, ending in (
            (["out"], "The tide was ", Ending.STOP),
            (["boats are", ". T"], "The tide was out", Ending.STOP),
            (["night", "boats are"], words, Ending.LENGTH),
        ):
            writer = scripted_writer(Scripted(chunks), tokenizer)
            settings = SETTINGS._replace(max_tokens=len(ids))
            pieces = list(writer.stream(np.array([0]), settings, 1, 0, stop))
            assert "".join(piece.text for (piece,) in pieces) == text
            assert pieces[-1][0].ending is ending
            assert all(piece.ending is None for (piece,) in pieces[:-1])


def test_ctrl_c_stops_the_reply_and_not_the_program(trained_once: Workplace) -> None:
    """The real program at a real terminal."""
    terminal = chat_at_terminal(trained_once, "--max-tokens", "1000000")
    terminal.type("There are\n")
    terminal.read_until("seed ")
    terminal.read_until("There are")
    seen = ""
    while len(seen) < 200:
        seen += next(terminal.read())
    terminal.type("\x03")
    terminal.read_until("(stopped)")
    terminal.type("/temp 0.25\n")
    terminal.read_until("temperature 0.25")
    terminal.type("/quit\n")
    assert terminal.process.wait() == 0
    terminal.close()


def test_several_pasted_lines_are_one_beginning(trained_once: Workplace) -> None:
    terminal = chat_at_terminal(trained_once, "--max-tokens", "3")
    terminal.type("\x1b[200~There are doors\nbeneath the harbour\x1b[201~\n")
    terminal.read_until("seed ")
    terminal.read_until("There are doors\r\nbeneath the harbour")
    terminal.read_until("\n> ")
    terminal.type("/quit\n")
    rest = "".join(terminal.read())
    assert "seed" not in rest
    assert terminal.process.wait() == 0
    terminal.close()


def test_a_terminal_of_any_width_breaks_lines_between_words_only(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--seed", "1", "--max-tokens", "90"]
    beginning = "There are doors beneath the harbour"
    assert main(arguments(trained_once, *flags, "--prompt", beginning)) == 0
    piped = capsys.readouterr().out
    terminal = chat_at_terminal(trained_once, *flags)
    for columns in (20, 40, 80, 200):
        terminal.resize(columns)
        terminal.type(f"{beginning}\n")
        terminal.read_until("seed 1\r\n")
        # Before each prompt readline asks for pasted text to be marked.
        reply = terminal.read_until("\r\n\x1b[?2004h").removesuffix("\r\n\x1b[?2004h")
        assert reply.split() == piped.split()
        lines = reply.split("\r\n")
        assert len(lines) > len(piped) / columns
        for line in lines:
            # The terminal itself breaks a word that is wider than all of it.
            assert cells(line) <= columns or cells(line.split()[0]) > columns
    terminal.type("/quit\n")
    assert terminal.process.wait() == 0
    terminal.close()


def chat_at_terminal(workplace: Workplace, *flags: str) -> Terminal:
    arguments = ["--checkpoint", str(workplace.out_dir), "--interactive", *flags]
    terminal = Terminal(["-m", "gothic_jax.commands.chat", *arguments], workplace.root)
    terminal.read_until("> ")
    return terminal


def test_style_tells_the_voice_of_the_last_reply(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    out = conversation(writer, where, "There are doors", "/style", capsys=capsys)
    assert re.search(r"^(wilde|lovecraft) +\+[0-9]\.[0-9]{2}  ", out, re.MULTILINE)


def test_every_command_that_help_names_is_known(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    named = set(re.findall(r"/[a-z]+", conversation_module.HELP))
    assert named >= {"/help", "/temp", "/topk", "/voice", "/seed", "/retry", "/quit"}
    out = conversation(writer, where, *sorted(named), capsys=capsys)
    assert "unknown command" not in out


def test_an_interactive_prompt_is_answered_first(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    assert main(arguments(trained_once, "--interactive", "--prompt", "There are doors")) == 0
    assert capsys.readouterr().out.startswith("There are doors")
