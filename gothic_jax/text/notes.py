"""Footnotes, captions of pictures and transcribers' marks, in the forms that old e-texts give them.

A form that nothing else looks like, as `[Footnote 3: ...]` or `{*1}`, is removed wherever it
stands. One that may be an author's own, as `*`, `(1)` or `[A]`, is removed only in pairs: a mark
after a word, and later a line that begins with the same mark, where the note is.

A note may hold several paragraphs, verse or lists. They go with it where the note is in a section
of notes, or where their indent is the note's and the text's is another.
"""

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

from gothic_jax.text.lines import wrap_width

LONGEST = 20_000
"""Characters of a note in brackets; a bracket that closes later than that does not belong to it."""
LONGEST_REST = 6000
"""Characters that may follow the first paragraph of another note before it ends."""
PROSE_WIDTH = 45
"""Lines of prose are longer on average; a block of shorter ones may be verse of the text itself."""

_BRACKETED = re.compile(
    r"\[(?:\* ?)?(?:Illustrations?|Illustrated|Picture|Foo(?:t-?)?note|Sidenote|Greek(?!:)"
    r"|Note(?=:| \d+\.)"
    r"|Device|Decoration|Colophon|Frontispiece|Transcriber|Tr\.? Note|TN|Etext|E-text"
    r"|Publisher['’]s [Dd]evice)\b"  # noqa: RUF001
    r"|\{(?:Painting|Picture|Illustration|Footnote|Transcriber|this paragraph)\b"
    r"|(?<=\n)[ \t]*\(\* ?(?=[\"“‘'_A-Z])",  # noqa: RUF001
    re.IGNORECASE,
)
_CLOSING = {"[": "]", "{": "}", "(": ")"}
# Marks that are never an author's own text.
_SURE_MARK = re.compile(
    r"(?<!_)\{\*?\d+[a-z]?\}|\{\*\}|\(\*\d*\)|\[(?:\d+(?:\.\d+)?|\*+|\+| )\]|\[\*: \d{4}\]"
    r"|\{(?:sic|superscript|image|\d+\*)\}|<\d{1,2}>"
    r"|(?<=[a-zà-ÿ.,;:!?\"'”’)])\[[A-Z+]\](?=[\s.,;:—\"”]|$)"  # noqa: RUF001
    # Of a note that is not there any more; asterisks in a row stand for what is left out.
    r"|(?<=[A-Za-zÀ-ÿ.,!?;:-][A-Za-zÀ-ÿ,.;:!?\"'”’)-])(?:\+|\*(?! ?\*))(?=[\s,;:.—\"”-]|$)"  # noqa: RUF001
)
# Pater's notes begin with the page that they stand on, and their mark.
_SURE_NOTE = re.compile(
    r"\s*(?:(?:\[(?:\d+(?:\.\d+)?|\*+|\+)\]|\{\d+[a-z]?\}):?\s|\{\*\d*\}|\(\*\d*\)"
    r"|\d+(?:-\d+)?\. [*+][^\s*])"
)
_MARK = re.compile(
    r"(?<=[\w.,;:!?\"'“”‘’()\]-])[ \n]?"  # noqa: RUF001
    # Asterisks that a blank parts from others set a passage off.
    r"(?P<mark>\(\d{1,3}\)|\[[A-Z]\]|\[\*{1,3}\]|(?<!\* )(?<!\*)\*{1,3}(?![\w*]| ?\*))"
)
_NOTE = re.compile(
    r"\s*(?P<mark>\(\d{1,3}\)(?=\s)|\[[A-Z]\](?=[\s(])|\*{1,3}(?=\s?[\"“‘'(_A-Z]))"  # noqa: RUF001
)
# Poe's marks stand before a verse; the notes below it are indented by less.
_VERSE_MARK = re.compile(r"^[ \t]+(?P<mark>\*{1,4}|†) ?(?=[\"“‘'_A-Z])", re.MULTILINE)  # noqa: RUF001
_SECTION = re.compile(r"\W*(?:FOOT)?NOTES?\W*", re.IGNORECASE)
_SECTION_NOTE = re.compile(r"\s*(?:[*+]|\[?\d{1,3}(?:-\d+)?[].)]|\(\d{1,3}\))")
_HEADING = re.compile(r"\s*_[^_]*_\s*|[^a-z]*")
# The marks of a text that has notes such as "19. +Transliteration: panta rhei."
_PLUS_NOTE = re.compile(r"^\d+(?:-\d+)?\. \+[A-Z\"]", re.MULTILINE)
_PLUS_MARK = re.compile(r"(?<![\s\d+])(?: *|\n)\+(?![\w+])")
_OPENING = tuple("\"'“‘([_")  # noqa: RUF001
# Before these, no blank stays where a mark was.
_BLANK_BEFORE = re.compile(r" (?=\0[,;:.!?)—-])")
_BLANK_LINES = re.compile(r"(\n(?:[ \t]*\n)+)")
CUT = "\0"
"""Where something within a line was left out; no text has this character."""
WRAPPED_AT = range(40, 101)
"""Columns that texts are wrapped at."""


def drop_notes(text: str, rest: str = "") -> str:
    """A text with \\n line ends without captions, notes, and the marks that go in pairs with them.

    `drop_marks` drops the other marks. `rest` is what followed the text, and is not returned: the
    notes of the marks may be there.
    """
    text = _drop_bracketed(text)
    if _PLUS_NOTE.search(text):
        text = _PLUS_MARK.sub(CUT, text)
    parts = _drop_verse_notes(_drop_sections(_BLANK_LINES.split(text)))
    size = len(parts)
    parts += ["\n\n", *_BLANK_LINES.split(rest)] if rest else []
    # Where marks are that no note has followed yet, and those that one has: part, start, end.
    unmatched: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    matched: list[tuple[int, int, int]] = []
    notes: list[int] = []
    for i in range(0, len(parts), 2):
        if _SURE_NOTE.match(parts[i]):
            notes.append(i)
            continue
        lines = parts[i].split("\n")
        kept = len(lines)
        for n, line in enumerate(lines):
            note = _NOTE.match(line)
            # Within a block, a line that begins with a number or letter may be the prose itself.
            if note and unmatched[note["mark"]] and (n == 0 or note["mark"][0] == "*"):
                matched.append(unmatched[note["mark"]].pop())
                kept = min(kept, n)
            elif n == 0:
                for mark in _MARK.finditer(parts[i]):
                    name = mark["mark"].strip("[]") if "*" in mark["mark"] else mark["mark"]
                    unmatched[name].append((i, *mark.span()))
        if kept == 0:
            notes.append(i)
        parts[i] = "\n".join(lines[:kept]) if kept else parts[i]
    rests = _rests_of_notes(parts, notes, {i for i, _, _ in matched})
    for i, start, end in sorted(matched, reverse=True):
        parts[i] = _without_mark(parts[i], start, end)
    for i in (*notes, *rests):
        parts[i] = ""
    return wrap_again("".join(parts[:size]))


def _without_mark(text: str, start: int, end: int) -> str:
    """A text without the mark and the blank or line end before it, if they part no words."""
    # Both are empty where a note that follows within the block has been dropped.
    first, after = text[start : start + 1], text[end : end + 1]
    if first == "\n" and after not in ("", "\n"):
        # The line before would get too long if its end went.
        return text[: start + 1] + CUT + text[end:].lstrip(" ")
    parts_words = first.isspace() and (after.isalnum() or after in _OPENING)
    return text[: start + parts_words] + CUT + text[end:]


def drop_marks(paragraph: str) -> str:
    """A paragraph without the marks that only notes have.

    It is apart from `drop_notes` since a line without its mark is shorter, and would seem to end
    before the width of the page.
    """
    return _BLANK_BEFORE.sub("", _SURE_MARK.sub("\0", paragraph)).replace("\0", "")


def _drop_sections(parts: Sequence[str]) -> list[str]:
    """The parts without sections of notes: from a heading to a gap of two blank lines.

    Where no such gap is near, only what begins with a number or a mark belongs to it.
    """
    kept = list(parts)
    for heading in range(0, len(parts) - 2, 2):
        if not _SECTION.fullmatch(parts[heading]) or not _SECTION_NOTE.match(parts[heading + 2]):
            continue
        last = heading
        end = len(parts)
        for i in range(heading + 2, len(parts), 2):
            if _SECTION_NOTE.match(parts[i]):
                last = i
            elif parts[i - 1].count("\n") > 2:
                end = i
                break
            elif len("".join(parts[last:i])) > LONGEST_REST:
                end = last + 2
                break
        kept[heading:end:2] = [""] * len(kept[heading:end:2])
    return kept


def _rests_of_notes(parts: Sequence[str], notes: Sequence[int], marked: set[int]) -> list[int]:
    """The parts after the first of each note that are its own: those that are indented as it is.

    Blocks that are indented by more are verse or lists. They are the note's if more of its
    prose, or another note, follows them, and no mark is in them. `marked` are the parts that
    have marks of notes.
    """
    starts = {*notes}
    sizes: Counter[int] = Counter()
    for part in parts[::2]:
        sizes[_indent(part)] += len(part)
    usual = sizes.most_common(1)[0][0]
    rests: list[int] = []
    for note in notes:
        indent = _indent(parts[note])
        if indent < 2 or indent == usual:
            continue
        rest: list[int] = []
        own = 0
        for i in range(note + 2, len(parts), 2):
            if i in starts:
                own = len(rest)
                break
            short_gap = parts[i - 1].count("\n") <= 2
            near = len("".join(parts[note : i + 1])) <= LONGEST_REST
            has_mark = i in marked or _SURE_MARK.search(parts[i])
            if not (short_gap and near and _indent(parts[i]) >= indent) or has_mark:
                break
            rest.append(i)
            lines = [line.strip() for line in parts[i].split("\n")]
            prose = sum(map(len, lines)) > PROSE_WIDTH * len(lines)
            if _indent(parts[i]) == indent and prose and not _HEADING.fullmatch(parts[i]):
                own = len(rest)
        rests += rest[:own]
    return rests


def _indent(part: str) -> int:
    return min(len(line) - len(line.lstrip()) for line in part.split("\n"))


def _drop_verse_notes(parts: Sequence[str]) -> list[str]:
    """The parts without notes to verse whose marks stand at the start of its lines.

    The notes are indented by less, which tells them from the items of a list.
    """
    kept = list(parts)
    unmatched: defaultdict[str, list[tuple[int, re.Match[str]]]] = defaultdict(list)
    matched: list[tuple[int, int, int]] = []
    for i in range(0, len(parts), 2):
        note = _VERSE_MARK.match(parts[i])
        marks = unmatched[note["mark"]] if note else []
        if note and marks and _indent(note[0]) < _indent(marks[-1][1][0]):
            part, mark = marks.pop()
            matched.append((part, *mark.span("mark")))
            kept[i] = ""
        else:
            for mark in _VERSE_MARK.finditer(parts[i]):
                unmatched[mark["mark"]].append((i, mark))
    for part, start, end in sorted(matched, reverse=True):
        kept[part] = kept[part][:start] + kept[part][end:]
    return kept


def _drop_bracketed(text: str) -> str:
    kept, position = [], 0
    for start in _BRACKETED.finditer(text):
        opening = start.end() - len(start[0].lstrip())
        if opening >= position:
            kept.append(text[position:opening])
            position = _closing(text, opening)
            kept.append(CUT)
    return "".join([*kept, text[position:]])


def wrap_again(text: str) -> str:
    """A text without its cuts, where paragraphs of prose that have one are wrapped as before.

    Else a line that became longer or shorter would no longer look like wrapped prose.
    """
    if CUT not in text:
        return text
    rows = text.split("\n")
    width = wrap_width([pair for pair in pairwise(rows) if all(pair) and CUT not in "".join(pair)])
    parts = _BLANK_LINES.split(text)
    return "".join(_wrapped_again(part, width) if CUT in part else part for part in parts)


def _wrapped_again(paragraph: str, width: int) -> str:
    rows = paragraph.split("\n")
    whole = [pair for pair in pairwise(rows) if all(pair) and CUT not in "".join(pair)]
    forced = sum(len(row) + 1 + len(after.split()[0]) > width - 2 for row, after in whole)
    judged = [row for row in rows[:-1] if CUT not in row] or rows[:-1]
    filled = all(len(row) > 0.75 * width for row in judged)
    if width not in WRAPPED_AT or not (2 * forced >= len(whole) if whole else filled):
        return paragraph.replace(CUT, "")
    first = next(n for n, row in enumerate(rows) if CUT in row)
    indent = rows[first][: len(rows[first]) - len(rows[first].lstrip())]
    rest = "\n".join(rows[first:]).replace(CUT, "")
    wrapped = textwrap.wrap(
        re.sub(r"\n\s*", " ", re.sub(r"(\w-)\n\s*", r"\1", rest)),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join([*rows[:first], *wrapped])


def _closing(text: str, start: int) -> int:
    """The end of what opens at `start`; that of its paragraph where no bracket closes it."""
    opening = text[start]
    brackets = re.compile(re.escape(opening) + "|" + re.escape(_CLOSING[opening]))
    depth = 0
    for bracket in brackets.finditer(text, start, start + LONGEST):
        depth += 1 if bracket[0] == opening else -1
        if not depth:
            return bracket.end()
    end = _BLANK_LINES.search(text, start)
    return end.start() if end else len(text)
