"""One's own texts: nothing of them is lost or changed in silence."""

import json
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest

from gothic_jax.commands.data import main
from gothic_jax.text import gutenberg
from gothic_jax.text.lines import unify, unwrap
from gothic_jax.text.own import clean_own
from gothic_jax.text.typography import fit_prompt, plain
from gothic_jax.text.works import split_works

# Line ends

PROSE = (
    "The keeper went down to the harbour before dawn, and found that the boats had turned their"
    " prows toward the open water. He said nothing of it to the others until the tide had gone"
    " out, and the mud lay shining under a low red sun; then he wrote it into a book of such"
    " things, which nobody but the priest was ever shown."
)
SPEECHES = (
    "Keeper:\nThe lamp is lit and the stair is wet, so mind your step.\nWho goes?\n\nBoy:\nOnly me."
)
SONNET = (
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
    "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date;\n"
    "Sometime too hot the eye of heaven shines,\nAnd often is his gold complexion dimm'd;"
)
CHAT = "\n".join(
    f"[10:{n:02}] <{name}> {PROSE[start : start + 7 * n % 80 + 3]}"
    for n, (name, start) in enumerate(zip(("ana", "raj", "zoe") * 20, range(60), strict=True))
)
LIST = (
    "Bring:\n- a lamp and as much of the oil as you are able to carry\n- bread\n- 2. rope\n1) twine"
)
CODE = "def lamp(oil):\n    if oil:\n        return burn(oil)\n    return None"
INDENTED = (
    '    "Who goes?"\n    "Only me," said the boy, who had come up the stair.\n    "Then come."'
)


@pytest.mark.parametrize("width", [40, 60, 72, 120])
def test_a_line_end_that_the_width_forced_goes(width: int) -> None:
    wrapped = "\n\n".join([textwrap.fill(PROSE, width)] * 3)
    assert unwrap(wrapped) == "\n\n".join([PROSE] * 3)


@pytest.mark.parametrize("text", [SPEECHES, SONNET, CHAT, LIST, CODE, INDENTED])
def test_a_line_end_of_the_authors_stays(text: str) -> None:
    assert unwrap(text) == text
    # And in a text that is wrapped elsewhere.
    wrapped = textwrap.fill(PROSE, 72)
    assert unwrap("\n\n".join([wrapped, wrapped, text])) == "\n\n".join([PROSE, PROSE, text])


def test_speeches_that_are_wrapped_keep_the_speakers_name_apart() -> None:
    speech = f"KEEPER.\n{textwrap.fill(PROSE, 60)}\nWho goes?"
    assert unwrap("\n\n".join([speech] * 3)) == "\n\n".join([f"KEEPER.\n{PROSE}\nWho goes?"] * 3)


def test_where_each_line_is_a_paragraph_blank_lines_part_them() -> None:
    assert unwrap(f"{PROSE}\n{PROSE}\nYes.\n{PROSE}") == f"{PROSE}\n\n{PROSE}\n\nYes.\n\n{PROSE}"
    assert (
        unwrap("第一章\n\u3000\u3000他走了。\n\u3000\u3000她来了。")
        == "第一章\n\n他走了。\n\n她来了。"
    )


def test_scripts_without_spaces_get_none_at_a_joint() -> None:
    text = (
        "从前有一个老人住在大森林的边上认识所有的草药和所有的鸟，"
        "孩子们起初怕他后来却喜欢听他讲故事一直听到晚上"
    )
    wrapped = "\n".join(text[i : i + 12] for i in range(0, len(text), 12))
    assert unwrap("\n\n".join([wrapped] * 3)) == "\n\n".join([text] * 3)


def test_a_word_parted_at_its_own_hyphen_gets_no_blank() -> None:
    wrapped = (
        f"{'x' * 30} and then to-\nmorrow he went away from the lighthouse\nand came back again."
    )
    assert "to-morrow" in unwrap("\n\n".join([textwrap.fill(PROSE, 40), wrapped]))


@pytest.mark.parametrize("end", ["\r\n", "\r\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_every_kind_of_line_end_is_one(end: str) -> None:
    assert unify(f"page one{end}page two") == "page one\npage two"


# Project Gutenberg

HEADER = "The Project Gutenberg eBook of The {0}\n\nTitle: The {0}\n\nLanguage: English\n"
START = "*** START OF THE PROJECT GUTENBERG EBOOK THE {0} ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK THE {0} ***"
LICENCE = (
    "Updated editions will replace the previous one.\n\n*** START: FULL LICENSE ***\n\n"
    "1.A. By reading any part of this work you agree.\n\nMost people start at our site, to"
    " subscribe to our newsletter to hear about new eBooks."
)


def book(name: str, start: str = START, end: str = END) -> str:
    story = f"THE {name.upper()}\n\nThe story of the {name}."
    parts = (HEADER, start, story, end, LICENCE)
    return "\n\n".join(part.format(name) for part in parts)


def test_every_book_of_a_file_is_kept_and_what_is_between_if_it_is_ones_own() -> None:
    own = "My own story.\n\nIt goes on."
    text = "\n\n".join([own, book("lamp"), own, book("bell"), book("hive"), own])
    stories = [f"THE {n.upper()}\n\nThe story of the {n}." for n in ("lamp", "bell", "hive")]
    assert gutenberg.strip(text, outside=True) == "\n\n".join(
        [own, stories[0], own, *stories[1:], own]
    )


@pytest.mark.parametrize(
    "start",
    [
        "***START OF THE PROJECT GUTENBERG EBOOK THE {0}***",
        "*** START OF THIS PROJECT GUTENBERG EBOOK THE VERY LONG TITLE OF\nTHE {0} ***",
        "*** START OF THE PROJECT GUTENBERG EBOOK THE {0} ***\n\nProduced by A. Nobody\nand others",
        "*** START OF THE PROJECT GUTENBERG EBOOK THE {0} ***\n\n[Transcriber's note: as printed.]",
        "*START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this here?\n\nYou"
        " know: lawyers.\n\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
        "You know: lawyers.\n\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
    ],
)
def test_headers_of_every_age_go(start: str) -> None:
    assert (
        gutenberg.strip(book("lamp", start), outside=True) == "THE LAMP\n\nThe story of the lamp."
    )


@pytest.mark.parametrize(
    "end",
    [
        "End of the Project Gutenberg EBook of The {0}, by\nA. Nobody",
        "The End of the Project Gutenberg Etext of The {0}",
        "End of this Project Gutenberg Etext of The {0}",
        "Ende dieses Project Gutenberg Etextes The {0}",
        "Fin du Projet Gutenberg de The {0}",
        "End of Project Gutenberg's The {0}\n\n***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN"
        " EBOOKS**START***\nWhy is this here?\n\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN"
        " EBOOKS*Ver.02/11/02*END*",
    ],
)
def test_ends_of_every_age_go(end: str) -> None:
    assert (
        gutenberg.strip(book("lamp", end=end), outside=True) == "THE LAMP\n\nThe story of the lamp."
    )


def test_a_text_that_follows_an_end_without_a_blank_line_is_kept() -> None:
    text = book("lamp").replace("***\n\nUpdated", "***\nMy own story.\n\nUpdated")
    text += "\n" + book("bell").replace("\n\n", "\n")
    stripped = gutenberg.strip(text, outside=True)
    for kept in ("The story of the lamp.", "My own story.", "The story of the bell."):
        assert kept in stripped


def test_a_text_without_markers_is_kept_whole() -> None:
    text = "Produced by me.\n\nTitle: Mine\n\nI read it at Project Gutenberg.\n\nContents\n\n[1] A"
    assert gutenberg.strip(text, outside=True) == text


# Characters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("“Yes,” he said, ‘no’.", "\"Yes,\" he said, 'no'."),
        ("a word — a word—a word -- one--two – three", "a word—a word—a word—one—two—three"),
        ("1914–18, to‐day", "1914-18, to-day"),
        ("well… and . . . then", "well... and... then"),
        ("no\u00a0break, co\u00adop, \ufeffmark\u200b", "no break, coop, mark"),
        ("e\u0301te\u0301", "été"),
    ],
)
def test_quotes_dashes_dots_and_blanks_have_one_form(text: str, expected: str) -> None:
    assert plain(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "NASA launched it.\n\nXIV was his number.\n\nHMS Victory lay at anchor.",
        "snake_case_name, __init__ and _emphasis_",
        "« Où ? » 👩\u200d🚀 5′ 3″—Oui.",
        "use --force; `a -- “b”`; i-- > 0",
        "```\nx = “y”  -- comment…\n```",
        "- one\n-- two\n--- three",
        "It's the boys' hats; 'tis so.",
        "می\u200cخواهم",
    ],
)
def test_all_other_characters_are_the_authors(text: str) -> None:
    assert clean_own(text)[0] == text


@pytest.mark.parametrize(
    ("prompt", "known", "expected"),
    [
        ("“It’s late” – he said ", "—", '"It\'s late"—he said'),
        ("“It’s late” – he said ", "", '"It\'s late" – he said'),
        ("“It’s late” ", "’—", "“It’s late”"),
        ("He waited… \n", "", "He waited... \n"),
        ("", "", ""),
    ],
)
def test_a_prompt_gets_only_characters_that_the_model_has_read(
    prompt: str, known: str, expected: str
) -> None:
    assert fit_prompt(prompt, lambda character: character in known) == expected


def test_typography_can_be_kept() -> None:
    text = "“Yes” — no…"
    assert clean_own(text, mode="keep")[0] == text


@pytest.mark.parametrize("mode", ["plain", "keep"])
def test_a_voice_token_in_prose_stays_text(mode: str) -> None:
    text = "The line\n<|wilde|>\nand <|endoftext|> within a line.\n<|endoftext|>"
    body, _, _ = clean_own(text, mode=mode)
    assert body.split() == text.split()
    assert [work.text for work in split_works(f"<|me|>\n{body}\n<|endoftext|>\n")] == [body]


# The command says what it did

RUN = ["--voices", "none", "--data-dir", "D", "--add"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_was_done_to_a_file_is_said_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{HEADER}\n{START}\n\n“It’s a café – or was…”\n\n{PROSE}\n\nDone.\n\n{END}\n"
    Path("book.txt").write_bytes(text.format("lamp").encode("cp1252"))
    assert main([*RUN, "me=book.txt"]) == 0
    said = (
        "book.txt: read as cp1252; left out 28 words of Project Gutenberg's headers and"
        " licences; changed 3 quotes, 1 dashes, 1 ellipses (--typography keep leaves them)."
    )
    assert said in capsys.readouterr().out
    assert json.loads(Path("D/processed/report.json").read_text())["own"] == [
        {
            "path": "book.txt",
            "voice": "me",
            "encoding": "cp1252",
            "documents": 1,
            "gutenberg_words": 28,
            "changes": {"quotes": 3, "dashes": 1, "ellipses": 1},
        }
    ]


def test_an_encoding_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.txt").write_bytes("Łódź płynie. Tak. Nie. Może.".encode("cp1250"))
    assert main([*RUN, "me=short.txt"]) == 2
    assert "short.txt: byte 0 (line 1) is not UTF-8" in capsys.readouterr().err
    assert main([*RUN, "me=short.txt", "--encoding", "cp1250"]) == 0
    assert "Łódź płynie." in Path("D/processed/me_train.txt").read_text()


def test_a_folder_means_its_text_files(capsys: pytest.CaptureFixture[str]) -> None:
    for n, name in enumerate(("a.txt", "deep/b.TXT", "._a.txt", "notes.pdf", "c.md")):
        Path("own", name).parent.mkdir(parents=True, exist_ok=True)
        Path("own", name).write_text(f"{PROSE[:: n + 1]}\n\nThe end of {name}.")
    Path("own/empty.txt").touch()
    assert main([*RUN, "me=own"]) == 0
    err = capsys.readouterr().err
    assert "skipped own/._a.txt: a hidden file" in err
    assert "skipped own/empty.txt: an empty file" in err
    works = json.loads(Path("D/processed/report.json").read_text())["works"]
    assert {work["title"] for work in works} == {"a", "b", "c"}


# The real cases and books


@pytest.fixture
def books(mirror: Path) -> list[str]:
    """Whole books of several printers and ages."""
    paths = sorted((mirror / "library").glob("*/*.txt"))[::25]
    if not paths:
        pytest.skip("the mirror has no library")
    return [
        gutenberg.strip(unify(path.read_bytes().decode("utf-8", "replace")), outside=False)
        for path in paths
    ]


def test_real_books_lose_no_word_to_line_ends(books: list[str]) -> None:
    for text in books:
        joined = unwrap(text)
        assert "".join(joined.split()) == "".join(text.split())
        # Prose is unwrapped: few lines are left that another one follows.
        before, after = (
            sum(bool(a.strip() and b.strip()) for a, b in pairwise(t.split("\n")))
            for t in (text, joined)
        )
        assert after < 0.2 * before, text[:100]
