"""Project Gutenberg's own words around its books, in files of every age, with one book or several.

What is removed is what these markers and sentences are known to enclose. All else is kept: the
text of every book, and text outside of the books that is not a licence or a header.
"""

import re

_ANY_GUTENBERG = r"(?:PROJECT|PROJEKT|PROJET|PROYECTO|PROGETTO|PROJETO)[ \t]+GUTENBERG"
# A line between asterisks may be wrapped before those that close it.
_TO_ASTERISKS = r"(?:[^\n]*\*{3}|[^\n]*(?:\n[^\n*]+){1,2}\*{3}|[^\n]*)[ \t]*$"
_START = re.compile(
    rf"^[ \t]*\*{{3}}[ \t]*START OF (?:THE |THIS )?PROJECT GUTENBERG{_TO_ASTERISKS}",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(
    r"^[ \t]*(?:THE )?(?:END|FIN|FINE|ENDE|EINDE|SLUT|LOPPU)\b[^\n]{0,30}?"
    # It may be wrapped, too: the last line of its paragraph belongs to it.
    rf"{_ANY_GUTENBERG}[^\n]*(?:\n[^\n*]+(?=\n[ \t]*\n|\n?\Z))?$"
    rf"|^[ \t]*\*{{3}}[ \t]*END OF (?:THE |THIS )?PROJECT GUTENBERG{_TO_ASTERISKS}",
    re.MULTILINE | re.IGNORECASE,
)
# The licence of files up to about 2003. It stands before the book, and in files of 2002 and 2003
# after it; where its first line is missing, its last line alone marks it.
_SMALL_PRINT = re.compile(
    r"^[ \t*]*START\W{1,3}THE SMALL PRINT!.{0,20000}?\*END\*[^\n]*$"
    r"|^[ \t]*\*END[^\n]*SMALL PRINT[^\n]*$",
    re.MULTILINE | re.IGNORECASE | re.DOTALL,
)
_LICENCE = re.compile(
    r"This file should be named|This and all associated files|Updated editions will replace"
    r"|Creating the works from|FULL LICENSE|FULL PROJECT GUTENBERG|Most people start at our"
    r"|digit in the filename|filename 10234|Copyright laws are changing|hear about new e-?books"
    r"|how to make donations to the Project Gutenberg|The Legal Small Print"
    r"|send you information by email|first posted in|\(Three Pages\)",
    re.IGNORECASE,
)
_HEADER_FIRST = re.compile(
    r"\W*(?:The |This |\[The )?Project Gutenberg"
    r"(?:['’]s\b|(?:-tm|™)?\s+(?:E-?text|E-?book|Edition)\b)"  # noqa: RUF001
    r"|(?:Title|Author)[ \t]*:[^\n]*(?:\n[^\n]*)*?\n(?:Author|Release Date|Language)[ \t]*:",
    re.IGNORECASE,
)
_GUTENBERGS = re.compile(
    r"Project Gutenberg|Gutenberg-tm|gutenberg\.(?:org|net)|the small print"
    r"|Plain Vanilla Electronic Texts|Readable By Both Humans and By Computers"
    r"|(?:Etexts|eBooks) Were Prepared By (?:Hundreds|Thousands) of",
    re.IGNORECASE,
)
_CREDITS = re.compile(
    r"\W*(?:Produced by|Transcribed (?:from|by)|E-?text (?:prepared|produced) by|Prepared by"
    r"|This e-?(?:text|book) was (?:prepared|produced|transcribed)|HTML version by"
    r"|Credits[ \t]*:|Scanned and proofed by|Updated by|Transcriber.?s? note)",
    re.IGNORECASE,
)
CREDITS_WITHIN = 13
"""Credits are among so many first blocks of a book; the same words later may be the author's."""

_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")


def strip(text: str, *, outside: bool) -> str:
    """A text with \\n line ends without Gutenberg's markers, headers, credits and licences.

    With `outside`, text around and between the books is kept where it is not Gutenberg's.
    """
    markers = sorted(
        [
            *((m.start(), m.end(), "start") for m in _START.finditer(text)),
            *((m.start(), m.end(), "end") for m in _END.finditer(text)),
            *((m.start(), m.end(), "small print") for m in _SMALL_PRINT.finditer(text)),
        ]
    )
    if not markers:
        return text
    kept: list[str] = []
    position, inside, ended = 0, False, False
    for start, stop, kind in markers:
        if start < position:
            continue  # within the one before
        part = text[position:start]
        if inside or (kind == "end" and not ended):
            kept += _book(part)
        elif outside:
            kept += _outside(part, before_book=kind != "end")
        position = stop
        ended = kind == "end"
        # The small print is part of a header, or stands after the end of a book.
        inside = kind == "start" or (kind == "small print" and (inside or not kept))
    rest = text[position:]
    if inside:
        kept += _book(rest)
    elif outside:
        kept += _outside(rest, before_book=False)
    return "\n\n".join(kept)


def _blocks(text: str) -> list[str]:
    return [block.strip("\n") for block in _BLANK_LINES.split(text) if block.strip()]


def _book(text: str) -> list[str]:
    """A book without the credits among its first blocks. Its blank lines stay as they are."""
    blocks = re.split(r"(\n[ \t]*(?:\n[ \t]*)+)", text.strip("\n"))
    kept = [b for i, b in enumerate(blocks) if i >= 2 * CREDITS_WITHIN or not _CREDITS.match(b)]
    book = "".join(kept).strip("\n")
    return [book] if book.strip() else []


def _outside(text: str, *, before_book: bool) -> list[str]:
    """What of a text outside the books is not Gutenberg's."""
    blocks = _blocks(text)
    if before_book:
        header = next((i for i, block in enumerate(blocks) if _HEADER_FIRST.match(block)), None)
        blocks = blocks[:header]
    licence = [i for i, block in enumerate(blocks) if _LICENCE.search(block)]
    if licence:
        del blocks[licence[0] : licence[-1] + 1]
    return [b for b in blocks if not (_GUTENBERGS.search(b) or _CREDITS.match(b))]
