"""Text that is wrapped on a terminal, and what a stream that is none gets."""

import contextlib
import io
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gothic_jax.machine.terminal import cells, wrapped


class Screen(io.StringIO):
    """Keeps what a terminal is sent."""

    def isatty(self) -> bool:
        return True


def shown(text: str, width: int, pieces: int = 1) -> str:
    """What a terminal of that width is sent of a text that comes in so many pieces."""
    cuts = sorted(random.Random(pieces).choices(range(len(text) + 1), k=pieces - 1))
    screen = Screen()
    with pytest.MonkeyPatch.context() as patch, wrapped(screen) as write:
        patch.setenv("COLUMNS", str(width))
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            write(text[begin:end])
    return screen.getvalue()


TEXT = (
    "There are doors beneath the harbour that no tide has opened,  and the old men of the quay"
    " will not speak of what the dredgers heard.\n\nI set down what follows."
)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("pieces", [1, 7, 300])
def test_lines_are_broken_between_words_and_are_as_long_as_they_can_be(
    width: int, pieces: int
) -> None:
    lines = shown(TEXT, width, pieces).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(TEXT.split())
    assert max(map(len, lines)) <= width
    for line, following in itertools.pairwise(lines):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > width


def rows_of_words(sent: str, width: int) -> list[list[int]]:
    """For each word the rows of a terminal in which its cells are."""
    row, column = 0, 0
    words: list[list[int]] = [[]]
    for character in sent:
        size = 0 if character == "\n" else cells(character)
        if character == "\n" or column + size > width:
            row, column = row + 1, 0
        column += size
        if character in " \n":
            words.append([])
        else:
            words[-1] += [row] * cells(character)
    return [word for word in words if word]


@given(
    st.lists(st.text("ab\u6d77e\u0301 \n\u2014", max_size=12)),
    st.integers(1, 12),
    st.integers(1, 9),
)
def test_no_word_is_lost_or_split_however_the_text_comes(
    parts: list[str], width: int, pieces: int
) -> None:
    text = " ".join(parts)
    sent = shown(text, width, pieces)
    assert sent.split() == text.split()
    assert sent == shown(text, width)
    for rows in rows_of_words(sent, width):
        assert len(set(rows)) == 1 or len(rows) > width


def test_a_line_end_of_the_text_begins_a_new_line() -> None:
    assert shown("aaa bbb\ncc ddd", 7) == "aaa bbb\ncc ddd"
    assert shown("aaa  \n\n  bbb", 7) == "aaa\n\n  bbb"
    assert shown("aaaa \r bb cc", 7) == "aaaa\r bb cc"


def test_characters_count_by_their_cells() -> None:
    assert shown("\u6d77\u6d77 \u6d77 a", 6) == "\u6d77\u6d77\n\u6d77 a"
    assert shown("e\u0301e\u0301e\u0301 bb", 6) == "e\u0301e\u0301e\u0301 bb"
    assert shown("\U0001f30a\U0001f30a bb", 6) == "\U0001f30a\U0001f30a\nbb"
    assert shown("\x1b[7maaa\x1b[0m bb", 6) == "\x1b[7maaa\x1b[0m bb"
    assert shown("a\tbb", 10) == "a\tbb"
    assert shown("a\tbbb", 10) == "a\nbbb"


def test_a_word_wider_than_the_terminal_is_left_to_it() -> None:
    assert shown("a bbbbbbbbbbb cc", 8) == "a\nbbbbbbbbbbb cc"
    assert shown("a bbbbbbbbbbb cccccc", 8) == "a\nbbbbbbbbbbb\ncccccc"


def test_a_word_is_held_until_it_ends_and_is_there_when_the_writing_stops() -> None:
    screen = Screen()
    with contextlib.suppress(KeyboardInterrupt), wrapped(screen) as write:
        write("The tide w")
        assert screen.getvalue() == "The tide"
        write("as o")
        assert screen.getvalue() == "The tide was"
        raise KeyboardInterrupt
    assert screen.getvalue() == "The tide was o"


def test_a_pipe_gets_the_text_as_it_is() -> None:
    pipe = io.StringIO()
    with wrapped(pipe) as write:
        write(TEXT[:50])
        write(TEXT[50:] + " \t\n ")
    assert pipe.getvalue() == TEXT + " \t\n "
