"""The line ends of a text: which of them are the author's, and which the width of a page forced.

A line end is removed only where the next word would not have fitted into the width that the text
is wrapped at, and only in a text, or a block of lines, that is wrapped. All others stay.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

LINE_END = re.compile("\r*\n|\r|[\v\f\x1c-\x1e\x85\u2028\u2029]")
"""As `str.splitlines` has them; a \\r\\r\\n is what some programs make of \\r\\n."""

WRAPPED_SHARE = 0.5
"""A text is wrapped if the width forced at least this share of the line ends within blocks."""
CONTINUED_SHARE = 0.3
"""And if the sentence goes on after at least this share of those: not so in verse."""
LONE_BREAKS = 3
"""In other texts a block of lines is wrapped if all of its line ends, at least so many, are."""
LONG = 100
"""Columns. Where most lines are longer, each is a paragraph."""

# Han, kana, Bopomofo, Thai, Lao, Khmer, Burmese, and the punctuation that goes with them.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3100-\u312f\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff"
)
"""Scripts that are written without spaces between words, as the inside of a character class."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_SENTENCE_END = re.compile("[。！？!?…」』”》）)]$")  # noqa: RUF001
_ITEM = re.compile(r"\s*(?:[-*+•·–—>|#]|\(?(?:\d{1,3}[.)]|[a-zA-Z]\)))\s")  # noqa: RUF001


class _Break(NamedTuple):
    """The end of a line within a block."""

    forced: bool
    continued: bool
    """The sentence goes on: after it comes a small letter, or nothing ended before it."""
    nearly: bool = False
    """The next word would have fitted, but would have left less than a tenth of the width."""


def unify(text: str) -> str:
    """The text with \\n for every kind of line end, and no blanks before it."""
    return "\n".join(line.rstrip() for line in LINE_END.sub("\n", text).split("\n"))


def unwrap(text: str) -> str:
    """A text with \\n line ends without those that its width forced.

    Blank lines part paragraphs. Lines of prose that were wrapped become one line; other lines
    stay as they are, with their indents. Where each line is a paragraph, and no blank line parts
    them, one does afterwards.
    """
    blocks = [
        list(lines)
        for blank, lines in groupby(text.split("\n"), key=lambda line: not line.strip())
        if not blank
    ]
    if len(blocks) == 1 and _paragraph_a_line(blocks[0]):
        return "\n\n".join(line.strip() for line in blocks[0])
    width = wrap_width([pair for block in blocks for pair in pairwise(block)])
    breaks = [[_break(*pair, width) for pair in pairwise(block)] for block in blocks]
    wrapped = _wrapped([each for block in breaks for each in block])
    return "\n\n".join(
        _joined(block, ends, wrapped or (len(ends) >= LONE_BREAKS and _all_forced(ends)))
        for block, ends in zip(blocks, breaks, strict=True)
    )


def columns(line: str) -> int:
    """How wide a line is on a screen: ideographs take two columns, combining marks none."""
    if line.isascii():
        return len(line)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    return len(line) + wide - sum(map(bool, map(unicodedata.combining, line)))


def wrap_width(pairs: Sequence[tuple[str, str]]) -> int:
    """The width in columns that explains most line ends; `pairs` are lines and those after them.

    A line end is explained by a width that the line fits into, but not with one more word. Of
    equal widths it is the largest; 0 where there are no lines.
    """
    starts: Counter[int] = Counter()
    for line, after in pairs:
        starts[columns(line)] += 1
        starts[_needed(line, after)] -= 1
    best, most, explained = 0, 0, 0
    for width in sorted(starts):
        if explained >= most:
            best, most = width - 1, explained
        explained += starts[width]
    return best


def _paragraph_a_line(lines: Sequence[str]) -> bool:
    """Whether the lines of a text without blank lines are its paragraphs."""
    if len(lines) == 1:
        return True
    long = sum(columns(line) > LONG for line in lines)
    if 2 * long > len(lines):
        return True
    # Chinese and Japanese texts indent paragraphs, or end each with a full stop.
    if not _UNSPACED.search("".join(lines[:100])):
        return False
    ends = sum(
        bool(_SENTENCE_END.search(line) or after.startswith(("\u3000", "  ")))
        for line, after in pairwise(lines)
    )
    return 10 * ends >= 8 * (len(lines) - 1)


def _needed(line: str, after: str) -> int:
    """The columns of a line with the next word."""
    first = after.lstrip()
    if _are_unspaced(line, first):
        return columns(line) + columns(first[0])
    return columns(line) + 1 + columns(first.split()[0])


def _are_unspaced(line: str, after: str) -> bool:
    return bool(_UNSPACED.match(after) and _UNSPACED.search(line[-1:]))


def _break(line: str, after: str, width: int) -> _Break:
    first, needed = after.lstrip(), _needed(line, after)
    if _ITEM.match(after) or _deeper(line, after):
        return _Break(False, False)
    if _are_unspaced(line, first):
        # A line may be two columns short, so that no full stop begins the next one.
        ended = bool(_SENTENCE_END.search(line))
        return _Break(needed > width - 2 and not ended, not ended)
    # A line much wider than the others, or one before it, was not wrapped with them.
    unlike = max(columns(line), columns(after)) > width + width // 10
    letter = re.search(r"[^\W\d_]", first)
    caseless = letter is not None and letter[0].lower() == letter[0].upper()
    ended = line.endswith((".", "!", "?", "؟", "۔"))  # noqa: RUF001
    continued = first[0].islower() or (caseless and not ended)
    nearly = width - width // 10 < needed <= width
    return _Break(needed > width and not unlike, continued, nearly)


def _deeper(line: str, after: str) -> bool:
    """Whether a line is indented by more than the one before, as a paragraph's first line is.

    The further lines of an item in a list are indented, too.
    """
    return _indent(after) > _indent(line) and not _ITEM.match(line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _wrapped(breaks: Sequence[_Break]) -> bool:
    forced = [each for each in breaks if each.forced]
    continued = sum(each.continued for each in forced)
    return (
        len(forced) >= WRAPPED_SHARE * len(breaks) > 0
        and continued >= CONTINUED_SHARE * len(forced) > 0
    )


def _all_forced(breaks: Sequence[_Break]) -> bool:
    return all(each.forced for each in breaks) and _wrapped(breaks)


def _joined(block: Sequence[str], breaks: Sequence[_Break], wrapped: bool) -> str:
    if not wrapped or not any(each.forced for each in breaks):
        return "\n".join(block) if len(block) > 1 else block[0].strip()
    text = block[0].strip()
    for line, each in zip(block[1:], breaks, strict=True):
        # Old texts were wrapped by hand: within prose, a line may be a little short.
        if not (each.forced or (each.nearly and each.continued)):
            text += "\n" + line.rstrip()
            continue
        line = line.strip()
        hyphenated = re.search(r"\w-$", text) and line[0].isalnum()
        unspaced = _UNSPACED.search(text[-1]) and _UNSPACED.match(line)
        text += ("" if hyphenated or unspaced else " ") + line
    return text
