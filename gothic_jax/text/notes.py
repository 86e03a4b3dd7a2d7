"""Footnotes, captions of pictures and transcribers' marks, in the forms that old e-texts give them.

A form that nothing else looks like, as `[Footnote 3: ...]` or `{*1}`, is removed wherever it
stands. One that may be an author's own, as `*`, `(1)` or `[A]`, is removed only in pairs: a mark
after a word, and later a line that begins with the same mark, where the note is.
"""

import re
from collections import defaultdict

LONGEST = 5000
"""Characters of a note in brackets; a bracket that closes later than that does not belong to it."""

_BRACKETED = re.compile(
    r"\[(?:\* ?)?(?:Illustrations?|Illustrated|Picture|Foot-?note|Sidenote|Greek(?!:)|Note(?=:)"
    r"|Device|Decoration|Colophon|Frontispiece|Transcriber|Tr\.? Note|TN|Etext|E-text"
    r"|Publisher['’]s [Dd]evice)\b"  # noqa: RUF001
    r"|\{(?:Painting|Picture|Illustration|Footnote|Transcriber|this paragraph)\b",
    re.IGNORECASE,
)
_CLOSING = {"[": "]", "{": "}"}
# Marks that are never an author's own text.
_SURE_MARK = re.compile(
    r"\{\*?\d+[a-z]?\}|\{\*\}|\(\*\d*\)|\[(?:\d+(?:\.\d+)?|\*+| )\]"
    r"|\{(?:sic|superscript|image|\d+\*)\}|<\d{1,2}>"
    r"|(?<=[a-zà-ÿ.,;:!?\"'”’)])\[[A-Z+]\](?=[\s.,;:—\"”]|$)"  # noqa: RUF001
    # Of a note that is not there any more; asterisks in a row stand for what is left out.
    r"|(?<=[A-Za-zÀ-ÿ.,!?;][A-Za-zÀ-ÿ,.;:!?\"'”’)])(?:\+|\*(?! ?\*))(?=[\s,;:.—\"”]|$)"  # noqa: RUF001
)
# Pater's notes begin with the page that they stand on, and their mark.
_SURE_NOTE = re.compile(
    r"\s*(?:(?:\[(?:\d+(?:\.\d+)?|\*+)\]|\{\d+[a-z]?\}):?\s|\{\*\d*\}|\(\*\d*\)|\d+\. [*+][^\s*])"
)
_MARK = re.compile(
    r"(?<=[\w.,;:!?\"'”’)\]])[ \n]?"  # noqa: RUF001
    # Asterisks that a blank parts from others set a passage off.
    r"(?P<mark>\(\d{1,3}\)|\[[A-Z]\]|(?<!\* )(?<!\*)\*{1,3}(?![\w*]| ?\*))"
)
_NOTE = re.compile(
    r"\s*(?P<mark>\(\d{1,3}\)(?=\s)|\[[A-Z]\](?=[\s(])|\*{1,3}(?=\s?[\"“‘'(_A-Z]))"  # noqa: RUF001
)
_OPENING = tuple("\"'“‘([_")  # noqa: RUF001
# Before these, no blank stays where a mark was.
_BLANK_BEFORE = re.compile(r" (?=\0[,;:.!?)—-])")
_BLANK_LINES = re.compile(r"(\n[ \t]*(?:\n[ \t]*)+)")


def drop_notes(text: str) -> str:
    """A text with \\n line ends without captions, notes, and the marks that go in pairs with them.

    `drop_marks` drops the other marks.
    """
    parts = _BLANK_LINES.split(_drop_bracketed(text))
    # Where marks are that no note has followed yet, and those that one has: part, start, end.
    unmatched: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    matched: list[tuple[int, int, int]] = []
    for i in range(0, len(parts), 2):
        lines = [] if _SURE_NOTE.match(parts[i]) else parts[i].split("\n")
        kept = len(lines)
        for n, line in enumerate(lines):
            note = _NOTE.match(line)
            # Within a block, a line that begins with a number or letter may be the prose itself.
            if note and unmatched[note["mark"]] and (n == 0 or note["mark"][0] == "*"):
                matched.append(unmatched[note["mark"]].pop())
                kept = min(kept, n)
            elif n == 0:
                for mark in _MARK.finditer(parts[i]):
                    unmatched[mark["mark"]].append((i, *mark.span()))
        parts[i] = "\n".join(lines[:kept])
    for i, start, end in sorted(matched, reverse=True):
        parts[i] = _without_mark(parts[i], start, end)
    return "".join(parts)


def _without_mark(text: str, start: int, end: int) -> str:
    """A text without the mark and the blank or line end before it, if they part no words."""
    # Both are empty where a note that follows within the block has been dropped.
    first, after = text[start : start + 1], text[end : end + 1]
    if first == "\n" and after not in ("", "\n"):
        # The line before would get too long if its end went.
        return text[: start + 1] + text[end:].lstrip(" ")
    parts_words = first.isspace() and (after.isalnum() or after in _OPENING)
    return text[: start + parts_words] + text[end:]


def drop_marks(paragraph: str) -> str:
    """A paragraph without the marks that only notes have.

    It is apart from `drop_notes` since a line without its mark is shorter, and would seem to end
    before the width of the page.
    """
    return _BLANK_BEFORE.sub("", _SURE_MARK.sub("\0", paragraph)).replace("\0", "")


def _drop_bracketed(text: str) -> str:
    kept, position = [], 0
    for start in _BRACKETED.finditer(text):
        if start.start() >= position:
            kept.append(text[position : start.start()])
            position = _closing(text, start.start())
    return "".join([*kept, text[position:]])


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
