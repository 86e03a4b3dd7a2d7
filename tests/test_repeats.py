"""Paragraphs repeated within train, and held-out works that share text with train."""

from gothic_jax.text.repeats import Text, drop_repeats, find_overlaps
from tests.test_corpus import prose


def text(body: str, split: str = "train", name: str = "a") -> Text:
    return Text("wilde", f"wilde/{name}.txt", name, split, body)


def test_a_paragraph_of_an_earlier_work_is_dropped_whatever_its_typography() -> None:
    body = "The café—it was “late”—stood empty, and nobody at all had come to dine there."
    again = "THE CAFE: it was 'late'; stood empty and nobody at all had come to dine there!"
    kept, repeats = drop_repeats([text(body), text(f"{again}\n\nA new one.", name="b")])
    assert [t.body for t in kept] == [body, "A new one."]
    assert [(r.file, r.paragraphs, r.words) for r in repeats] == [("wilde/b.txt", 1, 16)]


def test_a_printers_change_hides_no_repeat() -> None:
    body = prose(1, paragraphs=1, length=60)
    changed = body.replace(body.split()[50], "misprint")
    kept, _ = drop_repeats([text(body), text(f"{changed}\n\nA new one.", name="b")])
    assert kept[1].body == "A new one."


def test_headings_within_a_repeated_passage_go_with_it() -> None:
    one, two, new = prose(1, 1), prose(2, 1), prose(3, 1)
    passage = f"{one}\n\nCHAPTER II\n\n{two}"
    kept, _ = drop_repeats([text(passage), text(f"{passage}\n\nCHAPTER II\n\n{new}", name="b")])
    assert kept[1].body == f"CHAPTER II\n\n{new}"


def test_a_heading_whose_text_is_gone_goes_too() -> None:
    passage = f"{prose(1, 1)}\n\nA NEW TITLE\n\n{prose(2, 1)}"
    works = [text(f"{prose(1, 1)}\n\n{prose(2, 1)}"), text(f"{passage}\n\nYes.", name="b")]
    assert drop_repeats(works)[0][1].body == "Yes."


def test_short_paragraphs_and_repeats_within_a_work_stay() -> None:
    refrain, new = prose(1, 1), prose(2, 1)
    works = [text(f"Yes.\n\n{refrain}\n\n{refrain}"), text(f"Yes.\n\n{new}", name="b")]
    assert drop_repeats(works) == (works, [])


def test_a_work_that_stands_whole_in_an_earlier_one_is_gone() -> None:
    kept, repeats = drop_repeats([text(prose(1)), text(prose(1), name="b")])
    assert [t.title for t in kept] == ["a"]
    assert repeats[0].paragraphs == 3


def test_overlap_counts_the_13_word_sequences_that_stand_in_train() -> None:
    shared = prose(1, paragraphs=1, length=20)
    val = f"{prose(2, 1)} {shared} {prose(3, 1)}"
    overlap = find_overlaps([text(shared), text(val, split="val", name="v")])[0]
    assert (overlap.sequences, overlap.in_train) == (100 - 12, 20 - 12)
    assert overlap.passages == [shared.lower().rstrip(".")]
    assert overlap.leak
