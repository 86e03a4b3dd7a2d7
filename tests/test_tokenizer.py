import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gothic_jax.commands.tokenize import main
from gothic_jax.errors import UserError
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.works import END_OF_TEXT, Work, split_works
from tests.common import TEXT

SHARED = Tokenizer.train(split_works(TEXT), 320, 2)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_valid_text_comes_back_exactly(text: str) -> None:
    ids = SHARED.encode(text).tolist()
    assert SHARED.decode(ids) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    table = SHARED.token_bytes
    ids = SHARED.encode(text).tolist()
    assert b"".join(table[index] for index in ids) == text.encode()


def test_voices_of_the_text_and_end_of_text_become_special() -> None:
    assert set(SHARED.special_tokens) == {
        "<|endoftext|>", "<|any|>", "<|wilde|>", "<|lovecraft|>",
    }  # fmt: skip
    assert set(SHARED.voices) == {"wilde", "lovecraft"}
    table = SHARED.token_bytes
    assert all(table[index] == b"" for index in SHARED.special_tokens.values())


def test_markers_inside_a_line_are_words_not_structure() -> None:
    works = split_works("Before.\n<|wilde|>\nHe wrote <|lovecraft|> once.\n<|endoftext|>\n")
    assert works == [Work("", "Before."), Work("wilde", "He wrote <|lovecraft|> once.")]


def test_a_marker_within_a_text_is_read_as_plain_characters() -> None:
    ids = SHARED.encode("He wrote <|lovecraft|> once.").tolist()
    assert not set(ids) & set(SHARED.special_tokens.values())


def test_a_voice_cannot_take_a_name_that_stands_for_something_else() -> None:
    with pytest.raises(UserError, match="all"):
        Tokenizer.train([Work("all", "Everyone spoke at once.")], 300, 2)


def test_every_voice_needs_no_code_of_its_own() -> None:
    works = split_works("<|poe|>\nNevermore, nevermore.\n<|endoftext|>\n")
    assert list(Tokenizer.train(works, 300, 2).voices) == ["poe"]


def test_command_writes_a_tokenizer_and_says_what_it_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "mine.txt", tmp_path / "deep" / "tokenizer.json"
    text.write_text(TEXT)
    assert main(["--files", str(text), "--vocab-size", "300", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert Tokenizer.load(output).vocab_size == 300
    n_bytes = sum(len(work.text.encode()) for work in split_works(TEXT))
    assert f"{n_bytes:,} bytes" in out
    assert "bytes a token" in out
    assert "longest tokens" in out


def test_a_bare_name_is_looked_up_in_data_processed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed_train.txt").write_text("a stray file")
    (tmp_path / "data" / "processed").mkdir(parents=True)
    (tmp_path / "data" / "processed" / "mixed_train.txt").write_text(TEXT)
    assert main(["--vocab-size", "300"]) == 0
    assert Tokenizer.load(tmp_path / "data" / "tokenizer.json").voices


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--files", "nowhere.txt"], "gothic-data"),
        (["--vocab-size", "100"], "256"),
        (["--min-frequency", "0"], "at least 1"),
        (["--vocab-size", "many"], "--help"),
        (["--nonsense"], "--help"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], cure: str
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    text.write_text(TEXT)
    defaults = ["--files", str(text), "--output", str(output)]
    assert main([*defaults, *arguments]) == 2
    error = capsys.readouterr().err
    assert cure in error
    assert error.count("\n") == 1
    assert not output.exists()


def crafted(**changes: object) -> str:
    content = json.loads(SHARED.to_json())
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[" * 100_000, "null", crafted(model=None), crafted(added_tokens=[]),
     crafted(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}),
     crafted(added_tokens=[*json.loads(SHARED.to_json())["added_tokens"],
         {"id": 320, "content": "  ", "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False, "special": False}])],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_told(content: str) -> None:
    with pytest.raises(UserError, match="gothic-tokenize"):
        Tokenizer.parse(content.encode(), "tokenizer.json")


def test_a_missing_tokenizer_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gothic-tokenize"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.corpus
def test_the_real_corpus_fills_the_vocabulary(mirror: Path) -> None:
    files = sorted(mirror.glob("*/*.txt"))
    text = "\n".join(path.read_bytes().decode("latin-1") for path in files)
    trained = Tokenizer.train([Work("", text)], 4096, 2)
    assert isinstance(trained, Tokenizer)
    assert trained.vocab_size == 4096
    assert END_OF_TEXT in trained.special_tokens


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab'!1_ \n\t\x1c\u00e9\u00b2\u0301\u2003"), max_size=200))
def test_a_text_word_by_word_has_the_tokens_that_it_has_as_a_whole(text: str) -> None:
    whole = tokenizers.Tokenizer.from_str(SHARED.to_json())
    whole.encode_special_tokens = True
    assert SHARED.encode(text).tolist() == whole.encode(text).ids
