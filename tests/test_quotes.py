"""Quotes of British use become double, and no apostrophe or misprint is taken for one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gothic_jax.text.quotes import double_quotes


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("'Rise,' he said; 'go.'", '"Rise," he said; "go."'),
        ("He said, 'It is the \"god.\"'", "He said, \"It is the 'god.'\""),
        ('\'She said, "No." Then, "Go."\'', "\"She said, 'No.' Then, 'Go.'\""),
        ("'I like the boys' hats.' So he said.", '"I like the boys\' hats." So he said.'),
        ("'Bring 'em in, d'ye hear!'", "\"Bring 'em in, d'ye hear!\""),
        ("\"He cried 'Stop!' twice.\"", "\"He cried 'Stop!' twice.\""),
        ("a 'square meal' of the town", 'a "square meal" of the town'),
        ("'I came--' he began.", '"I came--" he began.'),
        ("'You and I—'and he wept.", '"You and I—"and he wept.'),
        ("the 'bearings' of the 'a' and 'b'", 'the "bearings" of the "a" and "b"'),
        ("in the 'land o' cakes' again", 'in the "land o\' cakes" again'),
        ("He cried ''Arry!' twice.", 'He cried "\'Arry!" twice.'),
    ],
)
def test_british_quotes_become_double(before: str, after: str) -> None:
    assert double_quotes([before]) == [after]


@pytest.mark.parametrize(
    "text",
    [
        "'Tis late, and I can't.",
        "the boys' hats",
        "'Arry and 'Arriet eat oranges.",
        "It's five o'clock, an' th' moon's nigh; the '80s, ma'am.",
        "The Morrison Co.'s ship in S. Latitude 34°21', W. Longitude 152°17'.",
    ],
)
def test_apostrophes_stay(text: str) -> None:
    assert double_quotes([text]) == [text]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "'They answer 'yes'; the great labourers' boots are gone. He goes.'",
            None,  # nobody can say which of these pair
        ),
        (
            "words 'whiter than Venus' doves, and softer than the down of their wings'—virginal",
            'words "whiter than Venus\' doves, and softer than the down of their wings"—virginal',
        ),
        (
            "'Earls' sons do not,' he said, 'kill people.'",
            '"Earls\' sons do not," he said, "kill people."',
        ),
        (
            "Watch 'Arry and 'Arriet. 'Not we alone have passions,' sings a poet.",
            "Watch 'Arry and 'Arriet. \"Not we alone have passions,\" sings a poet.",
        ),
    ],
)
def test_apostrophes_within_quotes_stay(before: str, after: str | None) -> None:
    (got,) = double_quotes([before])
    if after is None:
        assert got.count('"') % 2 == 0
        assert "labourers' boots" in got
    else:
        assert got == after


def test_the_words_of_a_dialect_are_known_by_their_work() -> None:
    speech = "'I wer un' this; 'appen un' that, 'appen un' more.'"
    later = "'Git thy dog un' goa, 'appen he'll come.'"
    assert double_quotes([speech, later]) == [
        "\"I wer un' this; 'appen un' that, 'appen un' more.\"",
        "\"Git thy dog un' goa, 'appen he'll come.\"",
    ]


def test_a_speech_of_two_paragraphs_opens_both() -> None:
    assert double_quotes(["He: 'One.", "'Two.'"]) == ['He: "One.', '"Two."']


def test_verse_within_speech_belongs_to_it() -> None:
    american = [
        '"Yes," he said. "Listen:',
        "'Where the coiled cobra gloats,\nAnd panthers stalk the goats.'\"",
        '"Well!"',
    ]
    assert double_quotes(american) == american
    british = ["'Yes,' he said. 'Listen:", '"Where the cobra gloats,\nStalk goats."\'', "'Well!'"]
    assert double_quotes(british) == [
        '"Yes," he said. "Listen:',
        "'Where the cobra gloats,\nStalk goats.'\"",
        '"Well!"',
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A shape that does not fit its partner.
        ("'Yes,\" he said. 'No.'", '"Yes," he said. "No."'),
        # A blank on the wrong side.
        ("'Will you, Tom? 'he said.", '"Will you, Tom? "he said.'),
        # No end.
        ("'Sit here. It is late.", '"Sit here. It is late.'),
        # A misprint within.
        ("'Yes, \"he said. No.'", "'Yes, \"he said. No.'"),
        # No partner: only it stays.
        ("'Yes, he said. 'No.' 'So.'", '\'Yes, he said. "No." "So."'),
        ("Yes,' he said. 'No.' 'So.'", 'Yes,\' he said. "No." "So."'),
        ("It was one of those 'things.'\"", "It was one of those 'things.'\""),
    ],
)
def test_a_misprint_changes_no_other_quotes(before: str, after: str) -> None:
    around = ["'One,' he said.", "She went.", before, "She came.", "'Two,' he said."]
    got = double_quotes(around)
    assert got[2] == after
    assert got[::4] == ['"One," he said.', '"Two," he said.']


def test_single_quotes_of_american_use_stay() -> None:
    text = ["\"Yes,\" he said of the 'thing'.", '"No," she said.']
    assert double_quotes(text) == text


def test_words_set_off_within_speech_that_goes_on_stay() -> None:
    text = [
        "\"The 'Straw Platters' business was like the 'Searcher' case.",
        "\"It was what I might term 'curious' then.",
        '"That is all," he said.',
    ]
    assert double_quotes(text) == text


def test_a_name_that_is_often_in_quotes_is_no_elision() -> None:
    names = ["'Manchester Street'", "'Manchester Hall'", "'Manchester Road'", "'Manchester'"]
    text = [f"It was {name} that he meant." for name in names]
    assert double_quotes(text) == [line.replace("'", '"') for line in text]


def test_sounds_that_no_word_begins_with_are_no_speech() -> None:
    chant = "Y'AI 'NG'NGAH, YOG-SOTHOTH\nH'EE—L'GEB 'NGAH'NG AI'Y ZHRO!"
    text = ["'Yes,' he said.", chant, "'No,' he said."]
    assert double_quotes(text)[1] == chant


@settings(deadline=None)
@given(st.lists(st.text(alphabet="aBs.,—'\" \n", min_size=1, max_size=30), max_size=6))
def test_nothing_but_quotes_changes(paragraphs: list[str]) -> None:
    paragraphs = [text.replace("\n\n", "\n") for text in paragraphs]
    got = double_quotes(paragraphs)
    letters = str.maketrans("", "", "\"'")
    assert [t.translate(letters) for t in got] == [t.translate(letters) for t in paragraphs]
