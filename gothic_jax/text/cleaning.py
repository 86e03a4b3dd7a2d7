"""From the bytes of a text file to clean text in one typography. Reads and writes no files.

The clean form is the same for every voice, so that a model cannot tell the voices apart by
the habits of their printers:

* one paragraph per line, one blank line between paragraphs; verse keeps its line ends, but not
  its indents;
* straight ASCII quotes, and double quotes around speech: the printers of the two authors
  disagree about both, and straight quotes are what a reader types at a prompt;
* an em dash without spaces for every dash, three dots for an ellipsis;
* no marks of emphasis, no notes and no page furniture. Accents stay: they belong to the words.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from gothic_jax.text import gutenberg, lines
from gothic_jax.text.notes import CUT, drop_marks, drop_notes
from gothic_jax.text.quotes import double_quotes

# A line longer than this was not wrapped by hand or by a formatter.
MAX_WRAP = 100
# No text is taken to be wrapped at fewer columns, or short verse would look like wrapped prose.
MIN_WRAP = 60

# A block is centred where all of its lines are indented by so much.
CENTRED = 8

# Prose in a column narrower than this is not told from a list.
LEAST_PROSE_WIDTH = 45

# Nor where it is only one sentence, that goes on at every line end.
NARROWEST = 38
# Verse of so many lines does not fill its column evenly.
EVEN_LINES = 5
# Few lines of verse are so long and end in a word that belongs to the next one.
LONG_FOR_VERSE = 50
_LEADS_ON = re.compile(
    r"\b(?:an?|the|of|to|in|by|for|with|from|at|on|which|its|my|your|our|their|de|du|di|e|à)$"
)
_SMALL_ENGLISH = re.compile(r"\b(?:the|and|of|to|in|is)\b")
_SENTENCE_ENDS = re.compile(r"[.!?][\"'”’)\]]*(?:\[\d+\])?$|,$")  # noqa: RUF001

MARKER_SEPARATOR = "|"

_UNSPACED = re.compile(f"[{lines.UNSPACED}]")

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
)

_CONTENTS = re.compile(
    r"\W*(?:(?:TABLE OF )?CONTENTS|(?:LIST OF )?ILLUSTRATIONS)\W*", re.IGNORECASE
)
_PAGE_NUMBER = re.compile(r"[\s.]*\b\d+$")

_BRACKETED = re.compile(r"\[(\d{1,4})\]")
LEAST_PAGES = 20
"""So many numbers in brackets can be those of pages."""

# The end of a part, headings of notes that are gone, and printers' names.
_PART = r"(?:VOLUME|VOL\.?|BOOK|PART|ACT|OPERA|MEMOIR)"
_FURNITURE = re.compile(
    r"(?!.*[\"?])\W*(?:THE )?END"
    rf"(?: OF (?:THE )?(?:(?:FIRST|SECOND|THIRD|FOURTH|FIFTH|LAST) )?{_PART}"
    r"(?: (?:[IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH))?| OF THE (?:FIRST|SECOND|THIRD|FOURTH))?\W*"
    r"|~+ ?END OF TEXT ?~+|FINIS\.?"
    r"|(?:FOOTNOTES?|NOTES)(?: TO .{0,60}|(?:—|--).{1,40})?[.:]?"
    r"|PRINTED (?:IN GREAT BRITAIN )?(?:BY|AT) .{3,120}",
    re.IGNORECASE,
)
# Where and when a piece was first printed, as a block of its own: "(Punch, May 1, 1885.)".
_PROVENANCE = re.compile(
    r"\([^()]{0,120}\b1[89]\d\d\.? ?\)"
    rf"|(?:Written on|(?:First p|P)ublished(?: in)?) (?:{_MONTH}\b)[^\n]{{1,100}}"
)
_PROVENANCE_IN_HEADING = re.compile(rf"\s*\((?=[^()]*\b{_MONTH}\b)[^()]{{1,80}}\b1[89]\d\d\.?\)$")
_SMALL_WORD = (
    r"(?:I|AN?|AM|AND|AS|AT|BUT|BY|FOR|FROM|HAD|HAS|HAVE|HE|HER|HIS|HOW|IF|IN|IS|IT|MY|NOT|NOW|OF"
    r"|ON|ONE|SHE|SO|THAT|THE|THERE|THEY|THIS|TO|WAS|WE|WERE|WHAT|WHEN|WHERE|WHILE|WHO|WITH|YOU)"
)
# The capitals after a large initial: "IT was the night", "A YEAR ago", "WITH Syrian oils",
# `"CONSECUTIVE upon`. Where the first word cannot be a speaker's name in a play, also "IT WAS
# expected" and "AND Marius, for". In speech, "I MUST have" is an emphasis.
_DROP_CAP = re.compile(
    r"(?![A-Z]{2,} and [A-Z]{2})(?P<quote>[\"']?)(?P<capitals>"
    rf"{_SMALL_WORD}(?: {_SMALL_WORD})?(?= (?:[A-Z][a-z]+,? )?[a-z])"
    r"|(?:A |(?<![\"'])I )?[A-ZÀ-Þ]{2,}(?= (?:[A-Z][a-z]+ )?[a-z]))"
)

_DOUBLE_QUOTES = "“”„‟«»″"  # fmt: skip
_SINGLE_QUOTES = "‘’‚‛′`´"  # noqa: RUF001 - these are the characters that we replace
_CONTROLS = (chr(c) for c in (*range(10), *range(11, 32), 127))
_CHARACTERS = str.maketrans(
    dict.fromkeys(_CONTROLS, "")
    | dict.fromkeys(_DOUBLE_QUOTES, '"')
    | dict.fromkeys(_SINGLE_QUOTES, "'")
    | {"―": "—", "‒": "-", "–": "-", "‐": "-", "‑": "-", "−": "-"}  # noqa: RUF001
    | {"…": "...", "\u00a0": " ", "\u00ad": "", "\u200b": "", "\ufeff": "", "\t": " "}
)

# How transcribers write what their characters lack: ligatures, accents, raised letters, bold type,
# and how editors mark the punctuation that they have supplied.
_TRANSCRIBED: Sequence[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\[(oe|OE)\]"), lambda m: "œ" if m[1] == "oe" else "Œ"),
    (re.compile(r"\[(ae|AE)\]"), lambda m: "æ" if m[1] == "ae" else "Æ"),
    (re.compile(r"\[[)(=~^'`.:]([A-Za-z])\]"), r"\1"),
    (re.compile(r"(?<=\w)\^(?:\{(\w+)\}|(\w+))"), r"\1\2"),
    (re.compile(r"(?<![\w=])=(?=\w)([^=\n]{1,80})=(?![\w=])"), r"\1"),
    (re.compile(r"(?<![\w~])~(?=\w)([^~\n]{1,80})~(?![\w~])"), r"\1"),
    (re.compile(r"(?<![\w#])#(?=\w)([^#\n]{1,80})#(?![\w#])"), r"\1"),
    (re.compile(r"&#160;"), " "),
    (re.compile(r" ?\[sic\.?\]"), ""),
    (re.compile(r"\[([,;:!?.—]|--)\]"), r"\1"),
    (re.compile(r"\[(?:Greek|Hebrew|Aramaic|Latin): *([^\]]+?) *\]"), r"\1"),
]

# Letters raised or lowered: "y{s}", "C_{2}".
_RAISED = re.compile(r"(?<=\w)(?:_\{(\w{1,4})\}|\{([a-z]{1,3})\})")
# Letters with blanks between them, in place of italics: "I c a n n o t".
_SPACED_OUT = re.compile(r"(?<![\w'])(?<![\s(][a-z] )[A-HJ-Za-z](?: [a-z]){2,9}(?!\w| \w\b)")
# A brace of several lines of a page, such as those of a list of persons.
_LONE_BRACE = re.compile(r"(?:(?<=\s)|^)[{}](?=\s|$)")

_KEPT_BLANK = "\0"
# A dash in place of a name, or of the end or the beginning of one: "the Dean of ---, Mr. ---",
# "Lord L---- was", "the D-- Hotel", "in ----shire". The blanks around it stay as they are.
_NAME_LEFT_OUT = re.compile(
    r" (?<=\S )(?:-{3,}|—{2,})(?: |(?![A-ZÀ-Þ—-]))"
    r"| (?:(?<=\bMr\. )|(?<=\bDr\. )|(?<=\bMrs\. ))(?:--|—) ?"
    r"| (?<=\bof )(?:--|—)(?=[,;.])"
    r"|-(?<=\w-)-{2,} (?=\w)|—(?<=\w—)—+ (?=\w)"
    r"|-(?<=\b[B-HJ-NP-Z]-)- (?=\w)"  # not "I -- I", "A--", "O--"
)
_DASH = re.compile("[-—]+")

# "well- marked", not "half- and quarter-tones".
_PARTED_COMPOUND = re.compile(
    r" (?:(?<=\bhalf- )|(?<=\bwell- )|(?<=\bcross- ))(?!and\b|or\b)(?=[a-z])"
    r"| (?<=ty- )(?=(?:one|two|three|four|five|six|seven|eight|nine)\b)"
)
_FORMULA = re.compile(r"(?<![a-z_])(?:[A-Z][a-z]?(?:_\{\d+\})?){2,}")


class Correction(NamedTuple):
    """A passage that is not the author's though no rule can tell, and what stands in its place."""

    text: str
    """As in the file, but for the width of its blanks; " ... " is whatever comes between."""
    instead: str


class Cleaned(NamedTuple):
    """A clean text, and what was dropped on the way to it."""

    text: str
    dropped: dict[str, int]
    """Words by rule: `corrections`, `gutenberg`, `markers`, `page numbers`, `notes`, `contents`,
    `furniture`."""


def clean(
    raw: bytes, begin: str = "", end: str = "", corrections: Iterable[Correction] = ()
) -> Cleaned:
    """The text of a work: decoded, without its furniture, in the one typography.

    `begin` and `end` say which lines to keep (see `keep_ranges`). Raises ValueError if the
    bytes are not text, or a marker or the text of a correction is not found.
    """
    text = lines.unify(decode(raw))
    counts = {"": len(text.split())}
    text = correct(text, corrections)

    def counted(rule: str, kept: list[str]) -> list[str]:
        counts[rule] = len("\n".join(kept).split())
        return kept

    counted("corrections", text.replace(CUT, "").split("\n"))
    kept = counted("gutenberg", gutenberg.strip(text, outside=False).split("\n"))
    kept = counted("page numbers", drop_page_numbers("\n".join(kept)).split("\n"))
    ranges = find_ranges(kept, begin, end)
    rest = kept[ranges[-1][1] :]  # where the notes may be whose marks are in what is kept
    kept = counted("markers", keep_ranges(kept, begin, end))
    kept = counted("notes", drop_notes("\n".join(kept), "\n".join(rest)).split("\n"))
    kept = counted("contents", drop_contents(kept))
    blocks = [block for block in split_blocks(kept) if not _is_furniture(block)]
    counted("furniture", [line for block in blocks for line in block])
    dropped = {after: counts[before] - counts[after] for before, after in pairwise(counts)}
    paragraphs = [_strip_notes(p) for p in _unwrap_all(blocks)]
    text = _join(_without_half_titles([_tidy(p) for p in paragraphs]))
    return Cleaned(text, {rule: number for rule, number in dropped.items() if number})


def _unwrap_all(blocks: Sequence[Sequence[str]]) -> list[str]:
    width = wrap_width(blocks)
    return [unwrap(block, width) for block in blocks]


def _join(paragraphs: Sequence[str]) -> str:
    return "\n\n".join(double_quotes([p for p in paragraphs if any(map(str.isalnum, p))]))


def _without_half_titles(paragraphs: Sequence[str]) -> list[str]:
    """Keeps one of two equal headings in a row: a title page's and that of the text itself."""
    pairs = pairwise(["", *paragraphs])
    return [text for before, text in pairs if not (text == before and text.isupper())]


def words(text: str) -> list[str]:
    """The words of a text for counting and comparing: no case, accents or punctuation.

    In scripts without spaces between words each character counts as one.
    """
    text = text.lower().replace("'", "")
    if not text.isascii():
        text = text.replace("’", "").replace("æ", "ae").replace("œ", "oe")  # noqa: RUF001
        text = unicodedata.normalize("NFKD", text)
        text = re.sub("[\u0300-\u036f]+", "", text)  # the accents, now apart from their letters
        if _UNSPACED.search(text):
            text = _UNSPACED.sub(r" \g<0> ", text)
    return re.findall(r"[^\W_]+", text)


def decode(raw: bytes) -> str:
    """UTF-8 (with or without BOM), else Windows-1252, which contains ISO-8859-1's letters.

    Raises ValueError if the bytes are not text.
    """
    if b"\0" in raw:
        raise ValueError("it contains NUL bytes, so it is not text in UTF-8 or Latin-1")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def correct(text: str, corrections: Iterable[Correction]) -> str:
    """The text after corrections, with a cut after each.

    Raises ValueError if the text of one is not found.
    """
    for correction in corrections:
        parts = (map(re.escape, part.split(" ")) for part in correction.text.split(" ... "))
        pattern = r"(?s:.{0,4000}?)".join(r"\s+".join(part) for part in parts)
        text, count = re.subn(pattern, correction.instead.replace("\\", r"\\") + CUT, text)
        if not count:
            raise ValueError(f"no passage {correction.text!r}")
    return text


def keep_ranges(lines: Sequence[str], begin: str, end: str) -> list[str]:
    """The lines from each `begin` marker (kept) to its `end` marker (dropped)."""
    kept: list[str] = []
    for start, stop in find_ranges(lines, begin, end):
        kept += [*lines[start:stop], "", "", ""]
    return kept


def find_ranges(lines: Sequence[str], begin: str, end: str) -> list[tuple[int, int]]:
    """The ranges of lines from each `begin` marker to the line before its `end` marker.

    Both hold markers separated by "|", taken in pairs and found one after the other. A marker is
    a whole line in clean typography; one that ends in "..." is the start of a line. With " #2"
    after it, it means the second such line. An empty one means the start or end of the text.
    Raises ValueError if one is missing.
    """
    begins, ends = begin.split(MARKER_SEPARATOR), end.split(MARKER_SEPARATOR)
    if len(begins) < len(ends):
        raise ValueError(f"{len(begins)} begin markers for {len(ends)} end markers")
    ends += [""] * (len(begins) - len(ends))
    ranges: list[tuple[int, int]] = []
    position = 0
    for first, last in zip(begins, ends, strict=True):
        start = _find_marker(lines, first.strip(), position) if first.strip() else position
        stop = _find_marker(lines, last.strip(), start + 1) if last.strip() else len(lines)
        ranges.append((start, stop))
        position = stop
    return ranges


def _find_marker(lines: Sequence[str], marker: str, start: int) -> int:
    wanted = marker
    marker, _, count = marker.partition(" #")
    remaining = int(count or 1)
    prefix = marker.removesuffix("...")
    longest_word = max(re.findall(r"[a-z]+", prefix.lower()), key=len, default="")
    for i in range(start, len(lines)):
        if longest_word not in lines[i].lower():
            continue  # only for speed
        line = _tidy(lines[i])
        remaining -= line == marker or (prefix != marker and line.startswith(prefix))
        if not remaining:
            return i
    raise ValueError(f"no line {wanted!r} after line {start}")


def drop_page_numbers(text: str) -> str:
    """Drops bracketed numbers where they are those of pages: `[3]` within the prose.

    They count up, each occurs once, and a blank stands before them; a footnote's number follows
    its word, and occurs at its note, too.
    """
    marks = [*_BRACKETED.finditer(text)]
    numbers = [int(mark[1]) for mark in marks]
    steps = sum(after == before + 1 for before, after in pairwise(numbers))
    attached = sum(mark.start() > 0 and not text[mark.start() - 1].isspace() for mark in marks)
    if (
        len(numbers) < LEAST_PAGES
        or 10 * steps < 9 * len(numbers)
        or 10 * len({*numbers}) < 9 * len(numbers)
        or 2 * attached > len(numbers)
    ):
        return text
    return re.sub(r"\[\d{1,4}\](?: (?=\S))?", "", text)


def drop_contents(lines: Sequence[str]) -> list[str]:
    """Drops tables of contents and lists of illustrations.

    A table starts at its heading and ends at a wide gap, at a line too long to be an entry, or
    where an entry occurs for the second time, as the heading of its chapter.
    """
    kept: list[str] = []
    i = 0
    while i < len(lines):
        heads = i == 0 or not lines[i - 1].strip()
        if heads and _CONTENTS.fullmatch(lines[i].strip() or "-"):
            i = _end_of_contents(lines, i + 1)
        else:
            kept.append(lines[i])
            i += 1
    return kept


def _end_of_contents(lines: Sequence[str], start: int) -> int:
    seen: set[str] = set()
    gap = 0
    for i in range(start, len(lines)):
        entry = _PAGE_NUMBER.sub("", lines[i].strip()).casefold()
        if not lines[i].strip():
            gap += 1
            continue
        if (seen and gap > 1) or entry in seen or len(lines[i]) > MAX_WRAP:
            return i
        seen.add(entry)
        gap = 0
    return len(lines)


def split_blocks(lines: Sequence[str]) -> list[list[str]]:
    """Runs of lines between blank lines. A line that was never wrapped is a block of its own."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        long = len(line) > MAX_WRAP
        if not line.strip() or long:
            blocks.append([])
        if line.strip():
            blocks[-1].append(line)
        if long:
            blocks.append([])
    return [block for block in blocks if block]


def _is_furniture(block: Sequence[str]) -> bool:
    """Whether a block is the printer's or the editor's, not the author's."""
    text = " ".join(line.strip().replace("_", "") for line in block)
    return bool(
        not any(map(str.isalnum, text))
        or _FURNITURE.fullmatch(text)
        or _PROVENANCE.fullmatch(text)
        or (text.startswith("TO ") and block[0].strip("_ ") == "TO" and len(block) < 8)
    )


def wrap_width(blocks: Sequence[Sequence[str]]) -> int:
    """The column at which the prose of a text is wrapped.

    It is the width that explains most line ends, if that is a third of them. Otherwise it is a
    width that few lines exceed, which in a text with other wide lines is too large.
    """
    lengths = sorted(len(line) for block in blocks for line in block if len(line) <= MAX_WRAP)
    few_exceed = max(MIN_WRAP, lengths[len(lengths) * 98 // 100]) if lengths else MIN_WRAP
    pairs = [pair for block in blocks for pair in pairwise(block)]
    explaining = lines.wrap_width([pair for pair in pairs if len(pair[0]) <= MAX_WRAP])
    explained = [_explained(pairs, width) for width in (few_exceed, explaining)]
    better = explaining >= MIN_WRAP and 3 * explained[1] >= len(pairs)
    return explaining if better and explained[1] > explained[0] else few_exceed


def _explained(pairs: Sequence[tuple[str, str]], width: int) -> int:
    """Line ends where the line fits into a width, but not with the next word."""
    return sum(len(line) <= width < len(line) + 1 + len(a.split()[0]) for line, a in pairs)


def unwrap(block: Sequence[str], width: int) -> str:
    """A block of prose as one line; one of verse, or of a few short lines, with its line ends.

    A line of prose ends where the next word would not have fitted; one of verse ends earlier.
    """
    pairs = list(pairwise(block))
    forced = [len(line) + 1 + len(after.split()[0]) > width - 2 for line, after in pairs]
    broken_sentence = [after.lstrip(" _")[:1].islower() for _, after in pairs]
    indent = min(len(line) - len(line.lstrip()) for line in block)
    if _is_verse(forced, broken_sentence, indent) and not _is_narrow_prose(block, broken_sentence):
        turned_over = _turned_over(block, broken_sentence)
        joined = [
            t or (f and b) for t, f, b in zip(turned_over, forced, broken_sentence, strict=True)
        ]
    else:
        joined = [True] * len(pairs)
    text = block[0].strip()
    for (_, line), join in zip(pairs, joined, strict=True):
        # These texts break words only at hyphens that are their own: "to-|morrow".
        # A dash of two hyphens may be parted: "-|-".
        after = line.strip()
        hyphenated = re.search(r"\w-$", text) and (after[0].isalnum() or after[0] == "-")
        text += ("\n" if not join else "" if hyphenated else " ") + after
    return text


def _is_verse(forced: Sequence[bool], broken_sentence: Sequence[bool], indent: int) -> bool:
    breaks = len(forced)
    if indent >= CENTRED and any(broken_sentence) and breaks < 4:
        return False  # a centred stage direction
    if 2 * sum(forced) < breaks:
        return True
    # Long lines of verse: set off by an indent, each with a capital, save what did not fit.
    return indent >= 2 and (
        not any(broken_sentence) or (not all(forced) and 10 * sum(broken_sentence) <= 7 * breaks)
    )


def _turned_over(block: Sequence[str], broken_sentence: Sequence[bool]) -> list[bool]:
    """Which line ends of a stanza its column forced: a few small words follow that did not fit.

    The other lines begin with capitals, and where lines are indented, not as they are.
    """
    lines = [line.strip() for line in block]
    indents = [len(line) - len(line.lstrip()) for line in block]
    begin = [True, *(not broken for broken in broken_sentence)]
    own = {indent for indent, begins in zip(indents, begin, strict=True) if begins}
    width = max(map(len, lines))
    few = len(block) > 2 and 2 * sum(broken_sentence) <= len(block)
    return [
        few
        and not begin[i + 1]
        and (indents[i + 1] <= indents[i] or indents[i + 1] not in own)
        and lines[i][-1].isalnum()
        and 2 * len(lines[i + 1]) <= width
        and _is_filled(lines[i : i + 2], width - 1)
        for i in range(len(broken_sentence))
    ]


def _is_narrow_prose(block: Sequence[str], broken_sentence: Sequence[bool]) -> bool:
    """Whether it is wrapped as prose, though in a column narrower than that of the text.

    Verse begins its lines with capitals, or does not fill them; lists have shorter lines, tables
    columns.
    """
    lines = [line.strip() for line in block]
    if len(lines) < 2 or any(re.search(r"\S {3,}\S", line) for line in lines):
        return False
    average = sum(map(len, lines[:-1])) / len(broken_sentence)
    # What is not indented is seldom verse.
    least = 7 if any(line[0].isspace() for line in block) else 3
    if average >= LEAST_PROSE_WIDTH and 10 * sum(broken_sentence) >= least * len(broken_sentence):
        return True
    if _is_cut_sentence(block, broken_sentence):
        return True
    # No verse is so even; by hand, prose is not set more evenly.
    even = len(lines) >= EVEN_LINES and 10 * sum(broken_sentence) >= 3 * len(broken_sentence)
    width = max(map(len, lines)) - 2 * even
    filled = width >= LEAST_PROSE_WIDTH and _is_filled(lines, width)
    return filled and any(broken_sentence)


def _is_filled(lines: Sequence[str], width: int) -> bool:
    """Whether each line would be wider than that with the next word."""
    return all(len(line) + 1 + len(after.split()[0]) > width for line, after in pairwise(lines))


def _is_cut_sentence(block: Sequence[str], broken_sentence: Sequence[bool]) -> bool:
    """Whether a block is one or more sentences of prose, though its lines are short.

    Its lines end within a clause, the last one ends a sentence, and a capital stands where a name
    begins.
    """
    lines = [line.strip(" _") for line in block]
    within = all(line[-1:].isalnum() and not line.isupper() for line in lines[:-1])
    if not within or not _SENTENCE_ENDS.search(lines[-1]):
        return False
    if all(broken_sentence):
        # Greek verse, too, begins with small letters.
        if not _SMALL_ENGLISH.search(" ".join(lines)):
            return False
        width = max(map(len, lines))
        narrow = width >= NARROWEST and _is_filled(lines, width)
        return narrow or not any(line[0].isspace() for line in block)
    return all(
        broken or (len(line) >= LONG_FOR_VERSE and _LEADS_ON.search(line))
        for line, broken in zip(lines, broken_sentence, strict=False)
    )


def _strip_notes(text: str) -> str:
    text = _FORMULA.sub(lambda m: re.sub(r"_\{(\d+)\}", r"\1", m[0]), text)
    text = _PROVENANCE_IN_HEADING.sub("", drop_marks(text))
    return re.sub(r"\s*\(\s*\)", "", text)


def _without_blanks(spaced: re.Match[str]) -> str:
    word = spaced[0].replace(" ", "")
    # Not the letters of the alphabet themselves: "the line a b c".
    return spaced[0] if word in string.ascii_lowercase else word


def _tidy(text: str) -> str:
    """One typography, for one line or several: quotes, dashes, dots, spaces, no emphasis."""
    text = unicodedata.normalize("NFC", text.translate(_CHARACTERS))
    text = re.sub("_{3,}", "---", text)
    if "}" in text:
        text = _RAISED.sub(lambda m: m[1] or m[2], text)
        text = _LONE_BRACE.sub("", text)
    text = _SPACED_OUT.sub(_without_blanks, text.replace("_", ""))
    if any(sign in text for sign in "[^=~#"):  # few paragraphs have one
        for pattern, replacement in _TRANSCRIBED:
            text = pattern.sub(replacement, text)
    text = re.sub(r"<\|(\S*?)\|>", r"<\1>", text)  # such a line would end a work in our files
    if "--" in text or "—" in text:
        text = _NAME_LEFT_OUT.sub(lambda m: _DASH.sub("—", m[0]).replace(" ", _KEPT_BLANK), text)
        text = re.sub(r"-{2,}|—{2,}", "—", text)
    if "-" in text:
        text = re.sub(r"(:)-(?=\s|$)|(\d(?:st|nd|rd|th|d)\.)-(?=[A-Z])", r"\1\2—", text)
        text = _PARTED_COMPOUND.sub("", text)
    if "—" in text:
        text = re.sub(r"(?<=[^\s—]) *— *(?=[^\s—])", "—", text)
    text = re.sub(r" ?\.(?: \.){2,}", lambda dots: "." * dots[0].count("."), text)
    text = re.sub(r"(\.{3,})(?=\w)", r"\1 ", text)
    text = re.sub(r" +", " ", text.replace(_KEPT_BLANK, " "))
    text = re.sub(r" (?=[,;:.!?](?:\s|$))", "", text)
    lines = (line.strip(" |") for line in text.split("\n"))
    text = "\n".join(line for line in lines if line.strip("-—+="))  # no rules and boxes
    opening = _DROP_CAP.match(text)
    if not opening:
        return text
    first, *rest = opening["capitals"].split()
    lowered = [first.capitalize(), *(word if word == "I" else word.lower() for word in rest)]
    return opening["quote"] + " ".join(lowered) + text[opening.end() :]
