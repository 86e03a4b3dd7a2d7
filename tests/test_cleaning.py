"""Cleaning: what a reader sees of each kind of file, before and after."""

import csv
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gothic_jax.text.cleaning import Correction, clean, decode, words

WRAPPED = """The fog came down upon the harbour in the evening, and with it came a
sound that none of the fishermen had heard before, and none of them would
name it to the others."""


def cleaned(text: str, begin: str = "", end: str = "") -> str:
    return clean(text.encode(), begin, end).text


# Decoding and line ends


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252"])
def test_accents_survive_in_every_encoding(encoding: str) -> None:
    assert clean("Salomé dined at the café.".encode(encoding)).text == "Salomé dined at the café."


def test_windows_quotes_are_decoded() -> None:
    assert decode(b"\x93Art\x94 \x97 only") == "“Art” — only"


def test_nul_bytes_are_no_text() -> None:
    with pytest.raises(ValueError, match="NUL"):
        clean(b"PNG\0\0")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_are_unified(end: str) -> None:
    assert cleaned(f"One.{end}{end}{end}Two.{end}") == "One.\n\nTwo."


# Gutenberg and other furniture


def test_gutenberg_header_credits_and_licence_go() -> None:
    text = (
        "The Project Gutenberg eBook of X\n\nTitle: X\n\n"
        "*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\n\n"
        "Produced by A. Nobody\nand the Distributed Proofreaders\n\n\n"
        "X\n\nThe story.\n\n\n"
        "End of the Project Gutenberg EBook of X, by Y\n\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\n\nA long licence.\n"
    )
    assert cleaned(text) == "X\n\nThe story."


def test_old_small_print_header_goes() -> None:
    text = (
        "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy?\n"
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
        "The story.\n\nEnd of Project Gutenberg's Etext of X\n"
    )
    assert cleaned(text) == "The story."


def test_contents_end_where_their_first_entry_returns() -> None:
    text = "X\n\nCONTENTS:\n\nI. The Door\nII. The Key\n\nI. The Door\n\nIt was shut."
    assert cleaned(text) == "X\n\nI. The Door\n\nIt was shut."


def test_contents_with_page_numbers_end_at_the_gap() -> None:
    text = "Contents\n                PAGE\nTHE DOOR           1\n\nTHE KEY     31\n\n\n\nA word.\n"
    assert cleaned(text) == "A word."


def test_notes_pictures_and_their_marks_go() -> None:
    text = (
        "[Illustration: A GHOST]\n\nHe saw it{12a} then.[3]  The word ([Greek text]) was old.\n\n"
        "       *       *       *       *       *\n\n"
        "{12a}  See page 9.\n\n[3] Not so.\n\n(Pall Mall Gazette, March 7, 1885.)\n\nTHE END"
    )
    assert cleaned(text) == "He saw it then. The word was old."


def test_a_dedication_goes() -> None:
    assert cleaned("THE TALE\n\n     TO\n A FRIEND\n\nIt began.") == "THE TALE\n\nIt began."


@pytest.mark.parametrize(
    "line",
    ["END OF ACT I.", "End of Vol. II", "[End of Vol. I]", "THE END OF THE FIRST VOLUME.",
     "END OF THE FOURTH",
     "Notes—Berenice", "~~~ End of Text ~~~", "PRINTED IN GREAT BRITAIN BY R. & R. CLARK"],
)  # fmt: skip
def test_ends_of_parts_and_printers_go(line: str) -> None:
    assert cleaned(f"It ended.\n\n{line}\n\nIt began.") == "It ended.\n\nIt began."


@pytest.mark.parametrize(
    "line",
    ["The end of the road.", '"The end?"', "NOTE", "Notes were sung.", "Printed words",
     "(1822. The original was of 1788.)"],
)  # fmt: skip
def test_prose_that_begins_like_them_stays(line: str) -> None:
    assert cleaned(f"It ended.\n\n{line}") == f"It ended.\n\n{line}"


def test_stage_directions_stay() -> None:
    text = "[_Enter_ PARKER.]\n\nPARKER.  [_Bowing_.]  My lady."
    assert cleaned(text) == "[Enter PARKER.]\n\nPARKER. [Bowing.] My lady."


# Line breaks: prose is joined, verse is not


def test_wrapped_prose_becomes_one_line() -> None:
    assert cleaned(f"{WRAPPED}\n\nShort.") == " ".join(WRAPPED.split()) + "\n\nShort."


def test_words_broken_at_their_own_hyphen_are_mended() -> None:
    text = (
        WRAPPED
        + "\n\n"
        + "It was a thing of the night and of the cold water, until it came to-\nday."
    )
    assert cleaned(text).endswith("until it came to-day.")


def test_unwrapped_paragraphs_without_blank_lines_stay_apart() -> None:
    long = "word " * 30
    assert cleaned(f"{long}a.\n{long}b.").count("\n\n") == 1


def test_verse_keeps_its_lines_and_loses_its_indent() -> None:
    verse = "   And all men kill the thing they love,\n      By all let this be heard,\n"
    assert cleaned(f"{WRAPPED}\n\n{verse}").endswith(
        "And all men kill the thing they love,\nBy all let this be heard,"
    )


def test_a_verse_too_long_for_its_page_is_mended() -> None:
    verse = (
        "   In a dim corner of my room for longer than my fancy thinks\n"
        "   A beautiful and silent Sphinx has watched me through the shifting\n"
        "   gloom.\n"
    )
    last = cleaned(f"{WRAPPED}\n\n{verse}").split("\n\n")[-1]
    assert last.split("\n")[1].endswith("shifting gloom.")
    assert last.count("\n") == 1


def test_prose_in_a_narrow_column_is_joined() -> None:
    direction = (
        "     (Nicola comes back with the coat and brings it to\n"
        "     the major, who can hardly believe his eyes, and\n"
        "     puts it on.)\n"
    )
    last = cleaned(f"{WRAPPED}\n\n{direction}\n").split("\n\n")[-1]
    assert last == (
        "(Nicola comes back with the coat and brings it to the major, who can hardly believe his"
        " eyes, and puts it on.)"
    )


def test_ends_of_verses_that_did_not_fit_are_mended() -> None:
    verse = (
        "    The evening fell, an evening of the\n"
        "      autumn,\n"
        "    The fair ones, leaning dreaming on our\n"
        "      arms,\n"
        "    Then uttered words so specious, and\n"
        "      secret,\n"
        "    That since that time our soul is amazed.\n"
    )
    assert cleaned(f"{WRAPPED}\n\n{verse}").split("\n\n")[-1].split("\n") == [
        "The evening fell, an evening of the autumn,",
        "The fair ones, leaning dreaming on our arms,",
        "Then uttered words so specious, and secret,",
        "That since that time our soul is amazed.",
    ]


@pytest.mark.parametrize(
    "sentence",
    [
        "At last the day of the opera\ncame round, and it was cold.",
        "    He promised with an oath to give to her\n    whatsoever she would ask.",
        "    I hope that I can soon present to you Mademoiselle de\n    Beaugarde, and remain,",
        "  (The letters of Saint Catherine, in the edition of the\n  Bollandists.)",
        "     I was in Rome when this book was first printed.\n"
        "     A year later I visited London, and there found\n"
        "     that most of my friends and acquaintances said\n"
        "     to me Zu-like-a, a name that I hardly knew and\n"
        "     wholly disapproved. I had always thought of the\n"
        "     lady otherwise.",
    ],
)
def test_a_sentence_of_short_lines_is_joined(sentence: str) -> None:
    assert cleaned(f"{WRAPPED}\n\n{sentence}").split("\n\n")[-1] == " ".join(sentence.split())


@pytest.mark.parametrize(
    "verse",
    [
        "I have been here before,\nbut when or how I cannot tell.",
        "Of all the thoughts of God that are\nBorne inward unto souls afar,",
        "the lamp that was lit in the house,\nthe book of the dead,\nand the key.",
        "THE KEEPER\nwho has not slept, and will not.",
    ],
)
def test_short_verse_and_lists_are_not_joined(verse: str) -> None:
    assert cleaned(f"{WRAPPED}\n\n{verse}").endswith(verse)


def test_a_list_of_short_lines_is_not_joined() -> None:
    lines = "the key of the cellar\nthe lamp\nthe book of the dead\n"
    assert cleaned(f"{WRAPPED}\n\n{lines}").endswith(lines.strip())


def test_a_dash_parted_at_the_end_of_a_line_is_one_dash() -> None:
    text = WRAPPED.replace("a\nsound that none", "a-\n-sound that none")
    assert "with it came a—sound that" in cleaned(text)


# Page numbers


def test_page_numbers_within_the_prose_go() -> None:
    text = "\n\n".join(f"The fog of day {i} [{i}] came again." for i in range(1, 40))
    assert cleaned(text).startswith("The fog of day 1 came again.\n\nThe fog of day 2 came")


def test_marks_of_notes_are_no_page_numbers() -> None:
    marked = "\n\n".join(f"The fog came.[{i}] Then it went." for i in range(1, 40))
    notes = "\n\n".join(f"[{i}] So says the clerk of parish {i}." for i in range(1, 40))
    assert cleaned(marked).count("The fog came. Then it went.") == 39
    assert cleaned(f"{marked}\n\n{notes}") == cleaned(marked)


# Typography


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("“Yes,” she said—or sighed.", '"Yes," she said—or sighed.'),
        ("Yes -- or no--or both.", "Yes—or no—or both."),
        ("He _never_ came.", "He never came."),
        ("Wait . . . there.  Now. . . .", "Wait... there. Now...."),
        ("the end...a beginning", "the end... a beginning"),
        ("IT was the night.", "It was the night."),
        ("A YEAR ago I came.", "A year ago I came."),
        ("IT WAS expected.", "It was expected."),
        ("AS I viewed it.", "As I viewed it."),
        ("I HAD no doubt.", "I had no doubt."),
        ("AND Marius, for once,", "And Marius, for once,"),
        ("“CONSECUTIVE upon it.”", '"Consecutive upon it."'),
        ("MIRABELL and FAINALL rising.", "MIRABELL and FAINALL rising."),
        ("WHAT I heard was this.", "What I heard was this."),
        ("I SHOULD have gone.", "I should have gone."),
        ("WIT, n. The salt of it.", "WIT, n. The salt of it."),
        ("THOMAS Ay, ay.", "THOMAS Ay, ay."),
        ("ELSIE I will be true.", "ELSIE I will be true."),
        ("Lord L---- was there.", "Lord L— was there."),
        ("on the ---- day of ----, I", "on the — day of —, I"),
        ("Mr. ---, the late Dean of ---.", "Mr. —, the late Dean of —."),
        ("Mr. ---'s house in ----shire", "Mr. —'s house in —shire"),
        ("Mr. -- came; the Prince of --, too.", "Mr. — came; the Prince of —, too."),
        ("Ransack the D-- Hotel.", "Ransack the D— Hotel."),
        ("The fact----it is so----I -- I know.", "The fact—it is so—I—I know."),
        ("'Welcome.' ----Then he went.", '"Welcome."—Then he went.'),
        ("D_____ was here.", "D— was here."),
        ("of [Greek: phengos x] and", "of phengos x and"),
        ("1927–28", "1927-28"),
        ("Dear Sir:- Come.", "Dear Sir:—Come."),
        ("April 2d.-To-day it rained.", "April 2d.—To-day it rained."),
        ("M. C.-A. Sainte-Beuve", "M. C.-A. Sainte-Beuve"),
        ("a well- marked half- or quarter-tone", "a well-marked half- or quarter-tone"),
        ("the letter #A#, or # 3", "the letter A, or # 3"),
        ("I c a n n o t, y o u're so d e a r!", "I cannot, you're so dear!"),
        (
            "the line a b c, and a o i d h n r s t u y c f",
            "the line a b c, and a o i d h n r s t u y c f",
        ),
        ("a straiter [sic] likeness (sic)", "a straiter likeness (sic)"),
        ("C_{2}HCl_{3}O and H_{2}O!", "C2HCl3O and H2O!"),
        ("it _is_ so.{2}", "it is so."),
        ("two  spaces , and\ta tab", "two spaces, and a tab"),
        ("the letter #A.# It is", "the letter A. It is"),
        ("D# minor and C# minor", "D# minor and C# minor"),
        ("made twelve [sic] in all", "made twelve in all"),
        ("allowance[--]Sir Benjamin", "allowance—Sir Benjamin"),
        ("C_{2}HCl_{3} on y{s} daye", "C2HCl3 on ys daye"),
        ("Shall { we } submit?", "Shall we submit?"),
        ("[Greek: enti pikros,\nkai chola].", "enti pikros,\nkai chola."),
        ("It was so&#160;!", "It was so!"),
    ],
)
def test_typography(before: str, after: str) -> None:
    assert cleaned(before) == after


@pytest.mark.parametrize("marker", ["<|endoftext|>", "<|wilde|>"])
def test_no_line_can_be_a_marker(marker: str) -> None:
    assert "<|" not in cleaned(f"Before.\n\n{marker}\n\nAfter.")


@given(st.text(alphabet="aAé \n\r\t'\"‘’“”—-_.*[]{}|<>()1", max_size=200))
def test_any_text_comes_out_tidy(text: str) -> None:
    body = cleaned(text)
    assert body == body.strip("\n")
    assert "\n\n\n" not in body
    assert "  " not in body
    assert not set("_\r\t“”‘’") & set(body)
    assert all(line == line.strip() for line in body.split("\n"))


def test_control_characters_go() -> None:
    assert cleaned("The end\nof\x07 it.\n\x1a") == "The end\nof it."


def test_braces_of_a_list_of_persons_go() -> None:
    assert (
        cleaned("ULF         }\nOOGNO       } Beggars\nTHAHN       }")
        == "ULF\nOOGNO Beggars\nTHAHN"
    )


# Corrections


def corrected(text: str, *corrections: tuple[str, str]) -> str:
    return clean(text.encode(), corrections=[Correction(*each) for each in corrections]).text


def test_a_correction_takes_the_place_of_a_passage() -> None:
    text = "He was single of [at] fifty. [Mabbott states\nthat it is\nso.] He went."
    corrections = [("of [at] fifty", "at fifty"), (" [Mabbott states ... so.]", "")]
    assert corrected(text, *corrections) == "He was single at fifty. He went."


def test_prose_stays_one_paragraph_around_a_correction() -> None:
    text = WRAPPED.replace("and none of them", "and none [comma\nadded] of them")
    assert corrected(f"{WRAPPED}\n\n{text}", (" [comma added]", "")) == cleaned(
        f"{WRAPPED}\n\n{WRAPPED}"
    )


def test_lines_that_were_not_wrapped_stay_around_a_correction() -> None:
    speeches = "DOOLITTLE {exclaiming Bly me!\nHIGGINS {simul- What!"
    body = corrected(
        f"{WRAPPED}\n\n{speeches}", ("{exclaiming", "[exclaiming]"), ("{simul-", "[too]")
    )
    assert body.endswith("\n\nDOOLITTLE [exclaiming] Bly me!\nHIGGINS [too] What!")


def test_a_passage_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="twelve"):
        corrected("It was eleven.", ("It was twelve.", ""))


# Markers


TOLD = "TITLE\n\nBy a hand\n\nI.\n\nOne.\n\nNOTE BY THE EDITOR\n\nII.\n\nTwo.\n\nPrinted in 1900"


def test_ranges_run_from_begin_kept_to_end_dropped() -> None:
    begin, end = "TITLE | I. | II.", "By a hand | NOTE BY... | Printed in 1900"
    assert cleaned(TOLD, begin, end) == "TITLE\n\nI.\n\nOne.\n\nII.\n\nTwo."


def test_an_empty_marker_is_an_end_of_the_text() -> None:
    assert cleaned(TOLD, "", "I.") == "TITLE\n\nBy a hand"
    assert cleaned(TOLD, "II.", "") == "II.\n\nTwo.\n\nPrinted in 1900"


def test_a_missing_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="'III'"):
        cleaned(TOLD, "III")


# Words


def test_typography_does_not_change_words() -> None:
    assert words("“Don’t—Salomé, the Æsthetic!”") == words("don't salome The AESTHETIC")


def test_a_character_of_a_script_without_spaces_is_a_word() -> None:
    assert words("灯塔 is 100 m high。กา") == ["灯", "塔", "is", "100", "m", "high", "ก", "า"]


def test_hyphens_and_dashes_part_words() -> None:
    assert words("to-day—or never, 1890") == ["to", "day", "or", "never", "1890"]


# The real texts: before and after


def real(mirror: Path, name: str) -> tuple[str, str]:
    """A real work, raw (in Latin-1, to show the bytes) and clean."""
    manifest = resources.files("gothic_jax").joinpath("text/works.csv").read_text(encoding="utf-8")
    row = next(r for r in csv.DictReader(manifest.splitlines()) if r["file"] == name)
    raw = (mirror / name).read_bytes()
    return raw.decode("latin-1").replace("\r\n", "\n"), clean(raw, row["begin"], row["end"]).text


REAL = [
    pytest.param(
        "wilde/pg174.txt",
        "easily--their bolts were old.",
        "easily—their bolts were old.",
        "THE PREFACE",
        "they recognized who it was.",
        id="novel",
    ),
    pytest.param(
        "wilde/pg854.txt",
        "GERALD.  Hallo, mother, whose glove is this?  You have had a visitor.\nWho was it?",
        "GERALD. Hallo, mother, whose glove is this? You have had a visitor. Who was it?",
        "A WOMAN OF\nNO IMPORTANCE",
        "A man of no importance.\n\nCURTAIN",
        id="play",
    ),
    pytest.param(
        "wilde/pg301.txt",
        "               He did not wear his scarlet coat,\n                 For blood and wine",
        "He did not wear his scarlet coat,\nFor blood and wine are red,",
        "THE BALLAD OF READING GAOL\n\nI.",
        "The brave man with a sword!",
        id="poem",
    ),
    pytest.param(
        "wilde/pg1017.txt",
        "THE chief advantage that would result from the establishment of Socialism\nis,",
        "The chief advantage that would result from the establishment of Socialism is,",
        "THE SOUL OF MAN",
        "The new Individualism is the new Hellenism.",
        id="essay",
    ),
    pytest.param(
        "wilde/pg42704.txt",
        "There was a bitter taste on thy lips. Was it the taste of\nblood?",
        "There was a bitter taste on thy lips. Was it the taste of blood?",
        "SALOMÉ",
        "Princess of Judæa.]\n\nCURTAIN.",
        id="latin-1",
    ),
    pytest.param(
        "lovecraft/dunwich.txt",
        "'Oh, oh, great Gawd...that...that...'",
        '"Oh, oh, great Gawd... that... that..."',
        "THE DUNWICH HORROR",
        'it looked more like the father than he did."',
        id="story",
    ),
    pytest.param(
        "lovecraft/lurking_fear.txt",
        "CONTENTS:",
        "THE LURKING FEAR\n\nI. The Shadow On The Chimney\n\nThere was thunder",
        "THE LURKING FEAR",
        "terrible and thunder-crazed house of Martense.",
        id="contents",
    ),
]


@pytest.mark.corpus
@pytest.mark.parametrize(("name", "before", "after", "head", "tail"), REAL)
def test_real_works(mirror: Path, name: str, before: str, after: str, head: str, tail: str) -> None:
    raw, body = real(mirror, name)
    assert before in raw
    assert after in body
    assert before not in body
    assert body.startswith(head)
    assert body.endswith(tail)


@pytest.mark.corpus
@pytest.mark.parametrize(
    "name",
    ["wilde/pg14240.txt", "wilde/pg1308.txt", "wilde/pg2061.txt", "wilde/pg41806.txt"],
)
def test_editors_and_transcribers_are_not_the_voice(mirror: Path, name: str) -> None:
    raw, body = real(mirror, name)
    for phrase in (
        "Project Gutenberg",
        "Transcribed from",
        "prepared by",
        "ROBERT ROSS",
        "Stuart Mason",
    ):
        assert phrase not in body
    assert "Gutenberg" in raw


@pytest.mark.corpus
def test_the_scene_that_another_poet_added_is_left_out(mirror: Path) -> None:
    raw, body = real(mirror, "wilde/pg1308.txt")
    assert "Sturge Moore" in raw
    assert "Sturge Moore" not in body
    assert "A FLORENTINE TRAGEDY\n\n[The door opens" in body
