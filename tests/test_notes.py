"""Footnotes, captions and their marks in old e-texts."""

import pytest

from gothic_jax.text.notes import drop_marks, drop_notes


def without_notes(text: str) -> str:
    """The paragraphs that are left."""
    return "|".join(
        part.strip() for part in drop_marks(drop_notes(text)).split("\n\n") if part.strip()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "He came[*] late.\n\n     [*] So he said.\n     To me.\n\nThen",
            "He came late.|Then",
        ),
        ("The gods (*1) slept.\n\n(*1) Of Troy.", "The gods  slept."),
        ("Oil{*7} tanks.\n\n{*7}For obvious reasons.", "Oil tanks."),
        ("A man{12} ran.\n\n{12}  From Rome.", "A man ran."),
        ("It is all[1.1] here.\n\n[1.1] There.", "It is all here."),
        ("Flux.\n\n118. +Transliteration: panta rhei.", "Flux."),
        ("A.[Footnote 1: One.\n\nTwo [sic] paragraphs.] B.", "A. B."),
        ("the world+ as it were* was.", "the world as it were was."),
        ("my first love,[A] whose", "my first love, whose"),
        ("A.<5> B {image} C.", "A. B  C."),
        ("the cove, [Note: A priest.] and", "the cove,  and"),
        ("A.\n\n[* Footnote: So it is.]", "A."),
        ("A.\n\n[Illustration: a man\n\nwith a dog]\n\nB.", "A.|B."),
        ("A.\n\n{Painting of Congreve: p0.jpg}\n\nB.", "A.|B."),
    ],
)
def test_forms_that_are_only_notes_go(text: str, expected: str) -> None:
    assert without_notes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hai! (1) he said.\n\n(1)  Yes.", "Hai! he said."),
        ("The Fates.[A] Then\n\n[A] A street.", "The Fates. Then"),
        ("Tankerton,* and **x.\n\n*Pronounced as Tacton.", "Tankerton, and **x."),
        (" into bliss.*\n     *Thomson\n\nShe", "into bliss.|She"),
        ("which Gregory * calls\n\n * J. W. Gregory.\n\nSo", "which Gregory calls|So"),
    ],
)
def test_marks_and_notes_in_pairs_go(text: str, expected: str) -> None:
    assert without_notes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "(1) God is, or\n\n(2) he is not.",
        "An elision * * * of stars.\n\n* * *\n\nMore.",
        "[D]R[E]VI[C]IOP\n\n[I]B[A]SB",
        "Leave him.**** Alone\n\n****Will you not join me?",
        "[Enter Lane.]\n\nLANE. Yes.",
        "of [Greek: phengos] and",
        "53(88)5*;46(;88*96*\n\n8*85;4)485",
    ],
)
def test_what_may_be_the_authors_stays(text: str) -> None:
    assert drop_marks(drop_notes(text)) == text


def test_a_caption_that_is_not_closed_ends_with_its_paragraph() -> None:
    assert without_notes("A.\n\n[Illustration: a man\nwith a dog\n\nB.") == "A.|B."


def test_a_speaker_after_a_mark_stays() -> None:
    assert drop_marks(drop_notes("[2]PRESIDENT. What?")) == "PRESIDENT. What?"
