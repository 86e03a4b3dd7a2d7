"""Footnotes, captions and their marks in old e-texts."""

import pytest

from gothic_jax.text.notes import LONGEST_REST, drop_marks, drop_notes

PROSE = """The fog came down upon the harbour in the evening, and with it came a
sound that none of the fishermen had heard before, and none of them would
name it to the others."""


def without_notes(text: str, rest: str = "") -> str:
    """The paragraphs that are left."""
    return "|".join(
        part.strip() for part in drop_marks(drop_notes(text, rest)).split("\n\n") if part.strip()
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
        ("the beautiful Halcyon {*2},--I sat", "the beautiful Halcyon,--I sat"),
        ("A man{12} ran.\n\n{12}  From Rome.", "A man ran."),
        ("It is all[1.1] here.\n\n[1.1] There.", "It is all here."),
        ("Flux.\n\n118. +Transliteration: panta rhei.", "Flux."),
        ("A.[Footnote 1: One.\n\nTwo [sic] paragraphs.] B.", "A. B."),
        ("the world+ as it were* was.", "the world as it were was."),
        ("my first love,[A] whose", "my first love, whose"),
        ("A.<5> B {image} C.", "A. B  C."),
        ("the cove, [Note: A priest.] and", "the cove,  and"),
        ("A.\n\n[* Footnote: So it is.]", "A."),
        ("A.[7]\n\n[NOTE 7.\n\n_Of_ A:--So.\n\n1. One.\n\n2. Two.]\n\nB.", "A.|B."),
        ("A.\n\n(*Of Troy. [A. R.])\n\nB.", "A.|B."),
        ("A.\n\n     (* See Troy,\n     page 2.)\n\nB.", "A.|B."),
        ("[*: 1890]\n\nA.", "A."),
        ("Herodotus.[+]\n\n     [+] A Spartan.", "Herodotus."),
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
        ("of his thoughts? [*] So\n\n * A case like this.", "of his thoughts? So"),
        ("that (21)Polish saint\n\n(21) So I read.", "that Polish saint"),
        ("cry (3)“fire”\n\n(3) Fire.", "cry “fire”"),
        ("were “(4)of stone”\n\n(4) A play.", "were “of stone”"),
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


# Notes of several paragraphs


def test_a_section_of_notes_ends_at_a_wide_gap() -> None:
    section = (
        "FOOTNOTES\n\n  [16] One.\n\n  [17] Two:\n\n      A verse,\n      and its rhyme.\n\n"
        "    So it ends.\n\n\n\nCHAPTER II.\n\nA verse follows."
    )
    assert (
        without_notes(f"It is so.[16]\n\n\n{section}") == "It is so.|CHAPTER II.|A verse follows."
    )


def test_paters_sections_go_with_their_marks() -> None:
    text = (
        "panta rhei+--it is,+ the burden of no\n+; or so.\n\nNOTES\n\n19. +Transliteration: panta"
        " rhei.\n\n95. *Theogony:\n\n+Translation: it flows.\n\n174. ±Sic.\n\n\n\nNext."
    )
    assert without_notes(text) == "panta rhei--it is, the burden of no; or so.|Next."


def test_where_no_gap_ends_a_section_only_its_notes_go() -> None:
    prose = ["The fog came again." * 20] * (LONGEST_REST // 200)
    text = "\n\n".join(["NOTES", "[1] One.", *prose])
    assert without_notes(text) == "|".join(prose)


@pytest.mark.parametrize(
    "text",
    ["NOTES\n\nHe wrote them in the train.\n\n\n\nNext.", "A note.\n\n1. One.\n\n\n\nNext."],
)
def test_a_chapter_of_that_name_stays(text: str) -> None:
    assert drop_notes(text) == text


def test_paragraphs_that_are_indented_as_their_note_go_with_it() -> None:
    text = (
        f"{PROSE}(1)\n\n  (1) He came first. * * *\n\n"
        "  Then he went, and what he said there is told in the book of Troy.\n\n"
        f"      A verse of it,\n      and its rhyme.\n\n  (2) Of Rome.\n\n{PROSE}"
    )
    assert without_notes(f"{PROSE}(2)\n\n{text}") == f"{PROSE}|{PROSE}|{PROSE}"


def test_what_is_set_off_after_a_note_may_be_the_texts() -> None:
    verse = "    In my end is my beginning,\n    and it began so."
    text = f"{PROSE}(1)\n\n  (1) Of Troy.\n\n{verse}\n\n{PROSE}"
    assert without_notes(text) == f"{PROSE}|{verse.strip()}|{PROSE}"


def test_notes_between_the_stanzas_of_a_poem_go() -> None:
    poem = (
        "          *On the fair Capo, and sprang\n          Upon the steps\n\n"
        "     * On Santa Maura.\n\n"
        "          *And gemmy flower, misnamed\n          In highest stars\n\n"
        "     * The wild bee will not sleep\n     in it."
    )
    assert without_notes(poem) == (
        "On the fair Capo, and sprang\n          Upon the steps"
        "|And gemmy flower, misnamed\n          In highest stars"
    )


def test_items_of_a_list_are_no_notes() -> None:
    text = "He took:\n\n  * The lamp.\n\n  * The key.\n\n  * The book."
    assert drop_notes(text) == text


def test_notes_after_the_end_of_a_work_tell_its_marks() -> None:
    assert without_notes('"Hai!" (1) he said.', "Notes\n\n(1)  Yes.") == '"Hai!" he said.'
    assert without_notes('"Hai!" (1) he said.', "Notes") == '"Hai!" (1) he said.'


def test_prose_is_wrapped_again_where_a_caption_stood_in_it() -> None:
    text = PROSE.replace("and none of them", "[Illustration: a\nsign] and none of them")
    kept = drop_notes(f"{PROSE}\n\n{text}").split("\n\n")[1]
    assert kept.split() == PROSE.split()
    assert max(map(len, kept.split("\n"))) <= 75


def test_verse_keeps_its_lines_where_a_note_stood_in_it() -> None:
    verse = "  A verse[Footnote: so\n  it is] of Rome,\n  and its rhyme."
    assert drop_notes(f"{PROSE}\n\n{verse}").endswith("  A verse of Rome,\n  and its rhyme.")
