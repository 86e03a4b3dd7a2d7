import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gothic_jax.checkpoints.checkpoint import Checkpoint, locate
from gothic_jax.commands import conversation as conversation_module
from gothic_jax.commands import evaluate
from gothic_jax.commands.chat import main
from gothic_jax.commands.conversation import Chat, change, converse
from gothic_jax.commands.index import main as index_main
from gothic_jax.commands.tokenize import main as tokenize_main
from gothic_jax.errors import UserError
from gothic_jax.machine.device import select_device
from gothic_jax.machine.terminal import cells
from gothic_jax.measuring import novelty
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.writing import receipts
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
    converse_in(Chat(writer, where), *lines)
    captured = capsys.readouterr()
    return captured.out + captured.err


def converse_in(chat: Chat, *lines: str) -> None:
    remaining = iter(lines)

    def read_line(_: str) -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        return line

    converse(chat, SETTINGS, read_line)


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


def test_a_text_goes_on_as_a_prompt_of_all_of_it_would(
    writer: Writer, trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(writer, locate(str(trained.out_dir)))
    converse_in(chat, "There are", "/more")
    state = chat.draft.current
    assert state is not None
    assert state.before is not None
    (following,) = writer.write(writer.encode(state.before.text), SETTINGS, 1, 5)
    assert state.added == following.text
    assert capsys.readouterr().out.endswith(f"\u2026{state.added}\n")
    _, receipt = receipts.load(str(trained.out_dir / "samples.jsonl"))
    assert (receipt.prompt, receipt.text) == (state.before.text, state.added)
    assert receipt.prompt.startswith("There are")


def test_undo_and_branches_lead_to_every_text_again(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(writer, where)
    converse_in(chat, "/undo", "/branch", "/more", "There are", "/more", "/seed 6", "/retry")
    told = capsys.readouterr().err
    assert "nothing to undo" in told
    assert told.count("type the beginning") == 2
    converse_in(chat, "/branch", "/undo", "/branch 9", "/branch x", "/branch 3")
    captured = capsys.readouterr()
    assert chat.draft.current is not None
    lines = re.findall(r"^([ *]) ([0-9]) (  )?(\S)", captured.out, re.MULTILINE)
    firsts = [state.added.split()[0][0] for _, state in chat.draft.branches()]
    assert lines == [*zip("   *", "1234", ["", "", "  ", "  "], firsts, strict=True)]
    assert "there is no text 9" in captured.err
    assert "/branch needs a number" in captured.err
    assert "--- text 2 ---" in captured.out
    assert chat.draft.current.number == 3


def test_several_samples_are_branches_of_a_text(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(writer, where, samples=3)
    converse_in(chat, "There are", "/branch")
    shown = capsys.readouterr().out
    assert [depth for depth, _ in chat.draft.branches()] == [0, 1, 1, 1]
    for _, state in chat.draft.branches()[1:]:
        assert f"\n{state.text}\n" in shown


def editor(folder: Path, script: str) -> str:
    """The command of an editor that does what a shell script does with its file, $1."""
    path = folder / "editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_what_the_editor_saves_is_the_text_from_then_on(
    writer: Writer,
    where: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # The editor has an argument of its own, and leaves a file beside the text.
    script = f'cp "$2" {tmp_path}/seen; echo "Nobody saw \u201cit\u201d  " > "$2"; touch "$2~"'
    monkeypatch.setenv("VISUAL", f"{editor(tmp_path, script)} --wait")
    monkeypatch.setenv("EDITOR", "false")
    chat = Chat(writer, where)
    converse_in(chat, "There are", "/edit", "/more")
    _, reply, edit, more = (state for _, state in chat.draft.branches())
    assert (tmp_path / "seen").read_text() == reply.text
    assert edit.text == 'Nobody saw "it"'
    assert more.prompt == edit.text
    assert "typography" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["editor", "seen"]


def test_a_text_can_be_begun_in_the_editor(
    writer: Writer, where: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", editor(tmp_path, 'printf "There\n\nare\n" > "$1"'))
    monkeypatch.delenv("VISUAL", raising=False)
    chat = Chat(writer, where)
    converse_in(chat, "/edit")
    assert chat.draft.current is not None
    assert chat.draft.current.text == "There\n\nare"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 3", "exit code 3"),
        ('echo more >> "$1"; exit 1', "exit code 1"),
        ('rm "$1"', "No such file"),
        ('printf "\\377" > "$1"', "utf-8"),
        ('printf "  \n" > "$1"', "the prompt is empty"),
        ('cat "$1"; true', "the text is as it was"),
        ('echo >> "$1"', "the text is as it was"),
    ],
)
def test_an_edit_that_fails_changes_nothing_and_loses_nothing(
    writer: Writer,
    where: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    told: str,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("VISUAL", editor(tmp_path, script))
    chat = Chat(writer, where)
    converse_in(chat, "There are", "/edit", "/branch")
    captured = capsys.readouterr()
    assert told in captured.out + captured.err
    assert len(chat.draft.branches()) == 2
    kept = [path for path in tmp_path.iterdir() if path.name != "editor"]
    if "more" in script or "377" in script:
        assert f"what the editor saved is in {kept[0]}/text.txt" in captured.err
    else:
        assert kept == []


@pytest.mark.parametrize("command", ["no-such-editor", "'", None])
def test_a_person_without_an_editor_is_told_how_to_name_one(
    writer: Writer,
    where: Checkpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str | None,
) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", command or " ")
    if command is None:
        monkeypatch.setenv("PATH", "")
    out = conversation(writer, where, "/edit", capsys=capsys)
    assert "set VISUAL or EDITOR" in out


def test_alternatives_stand_side_by_side(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(writer, where)
    for lines, place, header in (
        (["/alternatives wilde,none"], "at the beginning of a text", ["wilde", "none"]),
        (["There are", "/alternatives"], "after ", ["lovecraft", "wilde"]),
        (["/voice wilde", "/alternatives"], "after ", ["wilde", "lovecraft"]),
        (
            ["/blend wilde=0.75,lovecraft=0.25", "/alternatives"],
            "after ",
            ["(blend)", "wilde", "lovecraft"],
        ),
    ):
        converse_in(chat, *lines)
        said, names, *rows = capsys.readouterr().out.splitlines()[-12:]
        assert said.startswith(place)
        assert names.split() == header
        assert len(rows) == 10
        text = "" if chat.draft.current is None else chat.draft.current.text
        blends = [change(SETTINGS, "voice", name, writer).blend for name in header[-2:]]
        for column, expected in zip(
            (-2, -1), writer.predictions.next_tokens(text, blends, 10), strict=True
        ):
            shares = [re.findall(r"([0-9.]+%) ", row)[column] for row in rows]
            assert shares == [f"{each.probability:.1%}" for each in expected]
    converse_in(chat, "/alternatives poe")
    assert "lovecraft, wilde" in capsys.readouterr().err


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
    terminal.type("/branch\n")
    terminal.read_until("* 2")  # what was seen of the reply
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


def test_a_text_is_edited_in_the_terminal(trained_once: Workplace, tmp_path: Path) -> None:
    """The editor reads what is typed after it has been opened."""
    script = 'echo "what follows?"; read answer; echo "$answer" > "$1"'
    command = editor(tmp_path, script)
    terminal = chat_at_terminal(trained_once, "--max-tokens", "3", EDITOR=command, VISUAL="")
    terminal.type("There are\n")
    terminal.read_until("seed ")
    terminal.read_until("\n> ")
    terminal.type("/edit\n")
    terminal.read_until("what follows?")
    terminal.type("Nobody saw it\n")
    terminal.read_until("--- text 3 ---\r\nNobody saw it\r\n")
    terminal.type("/undo\n")
    terminal.read_until("--- text 2 ---\r\nThere are")
    terminal.type("/branch 3\n")
    terminal.read_until("--- text 3 ---\r\nNobody saw it\r\n")
    terminal.type("/branch\n")
    terminal.read_until("* 3 edited: Nobody saw it")
    terminal.type("/quit\n")
    assert terminal.process.wait() == 0
    terminal.close()


def chat_at_terminal(workplace: Workplace, *flags: str, **environment: str) -> Terminal:
    arguments = ["--checkpoint", str(workplace.out_dir), "--interactive", *flags]
    command = ["-m", "gothic_jax.commands.chat", *arguments]
    terminal = Terminal(command, workplace.root, **environment)
    terminal.read_until("> ")
    return terminal


def test_style_tells_the_voice_of_the_last_reply(
    writer: Writer, where: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    out = conversation(writer, where, "There are doors", "/style", capsys=capsys)
    assert re.search(r"^(wilde|lovecraft) +\+[0-9]\.[0-9]{2}  ", out, re.MULTILINE)


def test_every_command_that_help_names_is_known(
    writer: Writer,
    where: Checkpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = set(re.findall(r"/[a-z]+", conversation_module.HELP))
    assert named >= {"/help", "/temp", "/topk", "/voice", "/seed", "/retry", "/quit"}
    assert named >= {"/more", "/edit", "/undo", "/branch", "/alternatives"}
    monkeypatch.setenv("VISUAL", "true")
    out = conversation(writer, where, *sorted(named), capsys=capsys)
    assert "unknown command" not in out


def test_an_interactive_prompt_is_answered_first(
    trained_once: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    assert main(arguments(trained_once, "--interactive", "--prompt", "There are doors")) == 0
    assert capsys.readouterr().out.startswith("There are doors")


def test_a_guarded_reply_copies_no_span_and_its_receipt_replays(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    train_file = str(trained.root / "mixed_train.txt")
    assert index_main(["--file", train_file]) == 0
    meta = locate(str(trained.out_dir)).meta
    known = novelty.load_for(meta.config, meta.train_sha256, train_file)
    prompt = "There are doors beneath the harbour that"
    flags = [
        "--copy-guard",
        "3",
        "--train-file",
        train_file,
        "--num-samples",
        "2",
        "--prompt",
        prompt,
        "--temperature",
        "0.2",
    ]
    capsys.readouterr()
    receipts = trained.out_dir / "samples.jsonl"
    before = len(receipts.read_text().splitlines()) if receipts.exists() else 0
    assert main(arguments(trained, *flags, "--blend", "wilde=0.5,lovecraft=0.5")) == 0
    shown = capsys.readouterr().out.split("--- 1 of 2 ---\n")[1].split("--- 2 of 2 ---\n")
    for text in shown:
        longest = known.words.measure(text.removeprefix("There are doors beneath the harbour"))
        assert longest.longest is None or longest.longest.words < 3
    for number, text in enumerate(shown, start=before + 1):
        receipt = f"{trained.out_dir}/samples.jsonl:{number}"
        assert main(["--replay", receipt, "--train-file", train_file]) == 0
        assert capsys.readouterr().out == text
