"""Speech in double quotes, whichever use its printer follows.

British printers set speech in single quotes and what is quoted within it in double ones, and
their closing quote is the apostrophe, too. So the quotes of a work are read as a whole: each mark
opens, closes, opens again what goes on from the paragraph before, or is none (an apostrophe, a
misprint). Of all readings in which quotes nest, the cheapest is taken. The prices say how unlikely
a reading of a mark is between the characters beside it; a quote without a partner is the dearest:

* A mark between letters is an apostrophe. So are those of 'tis and 'em, and of words that the work
  writes often with an apostrophe and seldom without ('appen, un'); a mark after a letter is one
  where the quotes around it close without it (labourers' boots, goin').
* What is open at the end of a paragraph goes on in one that opens it again, and in verse.
* Where only the shape of a quote is wrong ('Yes," he said), or its blank ('Yes? 'he said), it has
  its partner. A quote without one stays, and so does a quotation with such a one in it; what has no
  end opens all the same. Two double quotes never meet.

So nothing is changed at one end only.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

# The quotes that may be open, from the outermost. A word that is only set off, the 'bearings' of a
# door, is no speech: it has none within it and ends in its paragraph.
_SET_OFF = "s"
_SETTING_OFF = {stack: stack + _SET_OFF for stack in ("", '"')}
_STACKS = ("", "'", "'\"", "'\"'", '"', "\"'", '"\'"', *_SETTING_OFF.values())

# Prices. A misprint, such as a quote without a partner, is what the others compare with.
_MISPRINT = 4.0
_NEVER = 1000.0
_UNUSUAL = 0.5  # not of the work's use
_DEEP = 5.0  # a quotation within one within another
# A quotation without an end, at the end of its paragraph: a little less than a misprint, since
# some printers do not open again what goes on.
_NO_END = 3.75
# Words that are set off end soon, though it may be in an s.
_NEAR_END = 0.75
_PASSED = 1.0  # a mark that may be their end, and is not taken for it
# A quote with its blank on the wrong side: 'Will you? 'he said.
_WRONG_SIDE = 3.25
# What is not of the work's use seldom goes on over paragraphs.
_ON_UNUSUALLY = 2.0
_ON_TO_VERSE = 2.75
_ON_IN_VERSE = 1.0
# More than a misprint: prose goes on in quotes without opening them again only where two misprints
# would be the alternative.
_ON_IN_PROSE = 4.5

# Words that an apostrophe opens: 'tis, 'em, the '80s; and those that may as well begin a speech.
_ELISION = re.compile(
    r"ng\w*|t(?:is|isn|ain|was|wasn|were|wil|will|won|would|wouldn|wixt|ween)|mid(?:st)?|mongst|gainst|neath|gan|gins|em"
    r"|(?:eigh|nine|six|seven)ties",
    re.IGNORECASE,
)
_WEAK_ELISION = re.compile(
    r"\d\ds?|m|cos|at|ill|av|t|til|till|tother|other|phone|ere|er|im|un|u?[dl]l?|s|r|e|ave|arf|ome|ope|round|bout|cause"
    r"|cept|way|nuff|nough|most|es|n|is|as|ad|ow|ud|oo|specially|ullo|prentices?|scape",
    re.IGNORECASE,
)
# Words at whose end an apostrophe stands for letters.
_CUT = re.compile(
    r".*in|an|th|o|wi|t|d|ha|gi|fro|a|i|mo|lor|po|ol|tha|thro|tho|altho|sha|wa|ca|m|ma|de|to|l|qu",
    re.IGNORECASE,
)
_SET_OFF_LETTER = re.compile(r"(?<!\w)'(?![ntNT])\w'(?!\w)")
_VOWELS = "aeiouAEIOU"
_WORD = re.compile(r"[^\W_]+")
_WORD_BEFORE = re.compile(r"[^\W_]+\Z")
_UNQUOTED_WORD = re.compile(r"(?<![\w'\"])[^\W_]+")
_ELIDED_WORD = re.compile(r"(?<![\w'])'([^\W_]+)(?!['\w])")
_QUOTED_WORD = re.compile(r"(?<![\w'])'([^\W_]+)[.,;:!?]?'(?!\w)")
_CUT_WORD = re.compile(r"(?<![\w'\"])([^\W_]+)'(?!\w)")
_OFTEN = 3
# Not the apostrophes between letters, which are most of the marks.
_QUOTES = re.compile(r"\"|(?<![^\W_])'|'(?![^\W_])")


class _Prices(NamedTuple):
    """What each reading of a mark costs: as no quote, as an opening and as a closing one."""

    none: float
    opens: float
    closes: float


class _Words(NamedTuple):
    """Words of a work, in small letters."""

    known: Collection[str]
    """Those that occur without an apostrophe before them."""
    elided: Collection[str]
    """Those that occur often with one before them, and never without: 'Arry."""
    cut: Collection[str]
    """Those that occur often with one after them, and seldom without: un'."""


class _Mark(NamedTuple):
    """A mark that is read as a quote, and the one before it."""

    before: "_Mark | None"
    place: int
    depth: int
    """How many quotes are open within it, from 1."""
    opens: bool
    """It opens a quote, for the first time."""
    single: bool
    """The outermost of the open quotes is a single one."""


class _Path(NamedTuple):
    cost: float
    last: _Mark | None


def double_quotes(paragraphs: Sequence[str]) -> list[str]:
    """Paragraphs with speech in double quotes, and quotes within it in single ones.

    What stands in double quotes already is left. In a work of American use, where most of the
    paragraphs that begin with a quote begin with a double one, so is what stands in single quotes
    after double ones in the same paragraph: it is no speech.
    """
    words = _words_of(paragraphs)
    first = [text[0] for text in paragraphs if text.startswith('"') or _opens_single(text, words)]
    british = 2 * first.count("'") > len(first)
    changes: list[dict[int, str]] = [{} for _ in paragraphs]
    left = False
    for n, marks in enumerate(_read(paragraphs, words, british)):
        after_double = False
        for span in _spans(marks):
            changed = {mark.place: _changed(paragraphs[n], mark) for mark in span}
            # One that goes on from the paragraph before shares its fate.
            left = (left and not span[0].opens) or (after_double and span[0].single)
            unsound = span[0].single and (
                _meet(paragraphs[n], changed) or _has_misprint(paragraphs[n], changed, words)
            )
            if not (left or unsound):
                changes[n].update(changed)
            after_double |= not british and not span[0].single
    return [_replaced(text, changed) for text, changed in zip(paragraphs, changes, strict=True)]


def _replaced(text: str, changes: Mapping[int, str]) -> str:
    chars = list(text)
    for place, quote in changes.items():
        chars[place] = quote
    return "".join(chars)


def _words_of(paragraphs: Sequence[str]) -> _Words:
    text = "\n".join(paragraphs).lower()
    plain = Counter(_UNQUOTED_WORD.findall(text))
    elided = Counter(_ELIDED_WORD.findall(text))
    cut = Counter(_CUT_WORD.findall(text))
    other = {*plain, *_QUOTED_WORD.findall(text)}
    return _Words(
        known=plain.keys(),
        elided={word for word, n in elided.items() if n >= _OFTEN and word not in other},
        # The plain ones are among them.
        cut={word for word, n in cut.items() if n >= _OFTEN and 3 * n >= plain[word]},
    )


def _spans(marks: Sequence[_Mark]) -> list[list[_Mark]]:
    """The marks of each quotation that no other one contains."""
    spans: list[list[_Mark]] = []
    for mark in marks:
        if not spans or (mark.depth == 1 and mark.opens):
            spans.append([])
        spans[-1].append(mark)
    return spans


def _meet(text: str, changed: Mapping[int, str]) -> bool:
    """Whether two double quotes would stand side by side, of which one is a misprint."""
    return any(
        quote == '"' == changed.get(beside, text[beside : beside + 1])
        for i, quote in changed.items()
        for beside in (i - 1, i + 1)
        if beside >= 0
    )


def _has_misprint(text: str, read: Collection[int], words: _Words) -> bool:
    """Whether a quote without a partner stands among those that are read."""
    return any(
        mark.start() not in read and _prices(text, mark.start(), words).none >= _MISPRINT
        for mark in _QUOTES.finditer(text, min(read), max(read))
    )


def _opens_single(text: str, words: _Words) -> bool:
    if not text.startswith("'"):
        return False
    prices = _prices_of_single(text, 0, words)
    return prices.opens < prices.none


def _changed(text: str, mark: _Mark) -> str:
    quote = "'" if mark.depth == 2 else '"'
    if quote == '"' == text[mark.place]:
        return quote
    # One mark may stand for both: 'Tis true,' he said.
    elided = mark.opens and quote == '"' and _elided(text, mark.place)
    return "\"'" if elided else quote


def _elided(text: str, i: int) -> bool:
    word = _WORD.match(text, i + 1)
    return bool(word and _ELISION.fullmatch(word[0]) and text[i] == "'")


def _read(paragraphs: Sequence[str], words: _Words, british: bool) -> list[list[_Mark]]:
    """The marks of each paragraph that are quotes, in the cheapest reading of the work."""
    paths = [_Path(0.0 if not stack else _NEVER, None) for stack in _STACKS]
    offsets = []
    offset = 0
    for before, text in pairwise(["", *paragraphs]):
        ended = min(paths, key=lambda path: path.cost)
        paths = [
            _Path(path.cost + _price_of_going_on(stack, before, text, british), path.last)
            for stack, path in zip(_STACKS, paths, strict=True)
        ]
        if ended.cost + _NO_END < paths[0].cost:
            paths[0] = _Path(ended.cost + _NO_END, ended.last)
        for mark in _QUOTES.finditer(text):
            paths = _after(paths, text, mark.start(), offset, words, british)
        offsets.append(offset)
        offset += len(text)
    ends = [
        path.cost + (_MISPRINT if stack else 0) for stack, path in zip(_STACKS, paths, strict=True)
    ]
    last = paths[ends.index(min(ends))].last
    found: list[list[_Mark]] = [[] for _ in paragraphs]
    while last:
        n = bisect_right(offsets, last.place) - 1
        found[n].append(last._replace(place=last.place - offsets[n]))
        last = last.before
    return [marks[::-1] for marks in found]


def _price_of_going_on(stack: str, before: str, text: str, british: bool) -> float:
    if stack.endswith(_SET_OFF):
        return _NEVER
    if not stack:
        return 0.0
    if text.startswith((stack[0], stack[-1])):
        return _ON_UNUSUALLY * ((stack[0] == "'") != british)
    verse = ("\n" in before) + ("\n" in text)
    return (_ON_IN_PROSE, _ON_TO_VERSE, _ON_IN_VERSE)[verse]


def _after(
    paths: Sequence[_Path], text: str, i: int, offset: int, words: _Words, british: bool
) -> list[_Path]:
    """The cheapest reading up to the mark at `i` for each stack."""
    char = text[i]
    price = _prices(text, i, words)
    best = [_Path(path.cost + price.none, path.last) for path in paths]
    if char == "'" and price.closes < _NEVER and price.none >= _PASSED:
        for n in map(_STACKS.index, _SETTING_OFF.values()):
            best[n] = _Path(best[n].cost + _PASSED, best[n].last)

    def offer(cost: float, to: str, mark: _Mark) -> None:
        n = _STACKS.index(to)
        # Of two openings without an end between them, the later one is sound.
        if cost < best[n].cost or (mark.opens and cost == best[n].cost):
            best[n] = _Path(cost, mark)

    for stack, path in zip(_STACKS, paths, strict=True):
        if path.cost >= _NEVER:
            continue
        single = (stack or char)[0] != '"'
        depth = len(stack)

        def mark(depth: int, opens: bool = False) -> _Mark:
            return _Mark(path.last, offset + i, depth, opens, single)  # noqa: B023 - used at once

        if stack + char in _STACKS:
            cost = path.cost + price.opens + _DEEP * (depth == 2)
            cost += _UNUSUAL * (not stack and (char == "'") != british)
            within = _is_within_clause(text, i)
            offer(cost + 1.5 * within, stack + char, mark(depth + 1, opens=True))
            if within and stack in _SETTING_OFF and char == "'":
                offer(cost, _SETTING_OFF[stack], mark(depth + 1, opens=True))
        if stack.endswith(_SET_OFF) and char == "'":
            in_s = text[i - 1] in "sxz" and price.closes < _NEVER
            closes = min(price.closes, _NEAR_END) if in_s else price.closes
            offer(path.cost + closes, stack[:-1], mark(depth))
        elif stack.endswith(char):
            offer(path.cost + price.closes, stack[:-1], mark(depth))
        elif depth == 1 and stack != _SET_OFF:
            offer(path.cost + price.closes + _MISPRINT, "", mark(depth))
        if stack and (again := _opened_again(text, i, stack)):
            offer(path.cost, stack, mark(again))
    return best


def _is_within_clause(text: str, i: int) -> bool:
    return i > 1 and text[i - 1].isspace() and text[i - 2].isalnum()


def _opened_again(text: str, i: int, stack: str) -> int:
    """The depth of the quote that the mark opens again at the start of a paragraph, or 0."""
    if text[: i + 1] == stack[: i + 1]:
        return i + 1
    return len(stack) if i == 0 and text[0] == stack[-1] else 0


def _around(text: str, i: int) -> tuple[str, str]:
    """The characters before and after a mark and the other marks beside it; blanks at the ends."""
    start, stop = i, i + 1
    while start and text[start - 1] in "\"'":
        start -= 1
    while stop < len(text) and text[stop] in "\"'":
        stop += 1
    return text[start - 1 : start] or " ", text[stop : stop + 1] or " "


def _prices(text: str, i: int, words: _Words) -> _Prices:
    return _prices_of_single(text, i, words) if text[i] == "'" else _prices_of_double(text, i)


def _prices_of_double(text: str, i: int) -> _Prices:
    before, after = _around(text, i)
    if before.isdigit() and after.isspace():
        return _Prices(1.0, _NEVER, 0.0)  # inches
    return _Prices(_MISPRINT, _opening(before, after), _closing(before, after))


def _opening(before: str, after: str) -> float:
    if after.isspace():
        return 2.0 if before.isspace() else _NEVER
    if before.isspace() or before in "([{—-":
        return 0.0
    if not after.isalnum():
        return _NEVER
    return 1.5 if before.isalnum() else 1.0  # a blank is missing


def _closing(before: str, after: str) -> float:
    if before.isspace():
        return 2.0 if not after.isalnum() else _NEVER
    if after.isalnum():
        return 1.5  # a blank is missing
    return 0.0 if before not in "([{" else _NEVER


def _prices_of_single(text: str, i: int, words: _Words) -> _Prices:
    before, after = _around(text, i)
    word = _WORD.match(text, i + 1)
    if word and before == "." and word[0] == "s":  # "Co.'s"
        return _Prices(0.0, _NEVER, _NEVER)
    opening, closing = _opening(before, after), _closing(before, after)
    if _SET_OFF_LETTER.match(text, i) or _SET_OFF_LETTER.match(text, max(0, i - 2)):
        return _Prices(_MISPRINT, opening, closing)
    if opening < _NEVER and word:
        if text[i - 1 : i] == "'":  # an elision within quotes: ''Arry
            return _Prices(0.0, opening + 3.5, closing)
        if _ELISION.fullmatch(word[0]):
            opening = _NEVER if _is_within_clause(text, i) else opening + 3.5
            return _Prices(0.0, opening, closing + 1.0)
        if _WEAK_ELISION.fullmatch(word[0]):
            # At the start of a paragraph, most begin a speech.
            return _Prices(0.5, opening + 1.5, closing + 1.0) if i else _Prices(3.0, 0.0, _NEVER)
        if word[0].lower() in words.elided:
            return _Prices(0.5, opening + 1.0, closing)
        if word[0][0] in _VOWELS and word[0].lower() not in words.known:
            return _Prices(1.5, opening + 1.0, closing)
        if before.isspace() and text[max(0, i - 2) : i - 1] in tuple(",.?!"):
            closing = _WRONG_SIDE
        return _Prices(_MISPRINT if word[0][0].isupper() else 3.0, opening, closing)
    cut = _WORD_BEFORE.search(text, 0, i)
    if cut:
        if cut[0].isdigit():
            return _Prices(0.5, opening, closing + 0.5)  # feet, or minutes of arc
        if cut[0].lower() in words.cut or _CUT.fullmatch(cut[0]):
            return _Prices(0.2, opening, closing + 0.8)
        # More words follow "labourers' boots" than the end of a quotation.
        ends = 0.5 if after.isspace() else 0.0
        if cut[0][-1] in "sxz":
            return _Prices(1.5 - ends, opening, closing + 3 * ends)
        if cut[0].lower() not in words.known:  # graoun' is never without it
            return _Prices(1.0, opening, closing + ends)
        return _Prices(3.0, opening, closing + ends)
    return _Prices(_MISPRINT, opening, closing)
