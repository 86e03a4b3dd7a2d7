"""The encoding of a text file: given by name, by a byte order mark, by UTF-8's form, or detected.

A detected encoding is used only where it is nearly certain; a wrong guess would turn a text into
other letters, which nobody can undo later.
"""

import codecs
import re
import unicodedata
from typing import NamedTuple

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")

SAMPLE_BYTES = 200_000
"""What the detector reads, of the lines that are not ASCII."""
FEW_BYTES = 20
"""With fewer bytes outside ASCII, they are Western European accents and punctuation, or refused."""
UTF8_SHARE = 0.6
"""If so many of the bytes outside ASCII are valid UTF-8, it is damaged UTF-8: in the legacy
encodings of Chinese, where it is highest by chance, it is about a quarter."""
UTF8_CHARACTERS = 6
"""A line of so many characters outside ASCII is not valid UTF-8 by chance."""

_DAMAGED_CURE = (
    "convert the parts to UTF-8 and join them again; or drop such bytes with"
    " `iconv -c -f UTF-8 -t UTF-8 FILE > NEW`"
)
_UNKNOWN_CURE = "save it as UTF-8, or let `gothic-data --add NAME=FILE --encoding NAME` convert it"

# "don’t" of a Macintosh, read as Windows-1252, is "donÕt"; "Łódź" of Windows-1250 is "£ódŸ".  # noqa: RUF003
_CAPITAL_WITHIN = re.compile(r"[a-zß-öø-ÿ][À-ÖØ-ÞŠŽŸ](?![A-ZÀ-ÖØ-ÞŠŽŸ])")
_FOREIGN_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_a-zA-Z]{2,}(?![^\W\d_])")
_BOX_BY_LETTER = re.compile(r"[\u2500-\u259f](?=[^\W\d_])|(?<=[^\W\d_])[\u2500-\u259f]")
_ONE_LETTER = re.compile(r"(?<![^\W\d_])[^\W\d_a-zA-ZàáéèíóòöøåæÀÁÉÈÍÓÒÖØÅÆªº](?![^\W\d_])")


class Decoded(NamedTuple):
    """The text of a file, and the encoding that it was read by."""

    text: str
    encoding: str


def decode(raw: bytes, encoding: str | None = None) -> Decoded:
    """The text of a file's bytes, without a byte order mark; `encoding` is what the user named.

    Raises ValueError, with the byte's offset and a cure, where the bytes are not text in that
    encoding, or where it cannot be told.
    """
    if encoding is not None:
        return _strictly(raw, encoding)
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return _strictly(raw[len(mark) :], name)
    if (zero := raw.find(b"\0")) >= 0:
        return _wide(raw, zero)
    try:
        return Decoded(raw.decode(), "utf-8")
    except UnicodeDecodeError as error:
        return _legacy(raw, error.start)


def known(encoding: str) -> bool:
    """Whether an encoding of text has this name."""
    try:
        # Codecs such as base64 are not of text, and `str` refuses them.
        "".encode(encoding)
    except (LookupError, ValueError):
        return False
    return True


def _strictly(raw: bytes, encoding: str) -> Decoded:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        place = _place(raw, error.start)
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        cure = _DAMAGED_CURE if is_utf8 else "name its encoding with --encoding"
        raise ValueError(f"{place} is not {encoding}; {cure}") from error
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(f"it contains NUL characters, so it is not text in {encoding}")
    return Decoded(text, encoding)


def _wide(raw: bytes, zero: int) -> Decoded:
    """UTF-16 or UTF-32 without a mark: what holds no odd characters, and most blanks."""
    best, most = None, 0
    for name in () if _is_utf8_with_nul(raw) else _WIDE:
        try:
            text = raw.decode(name)
        except UnicodeDecodeError:
            continue
        blanks = text.count(" ") + text.count("\n")
        if blanks > most and not _odd(text):
            best, most = Decoded(text, name), blanks
    if best is None:
        raise ValueError(
            f"{_place(raw, zero)} is NUL, so it is not plain text; save it as UTF-8 text"
        )
    return best


def _is_utf8_with_nul(raw: bytes) -> bool:
    """Whether it is text in UTF-8 but for a few NULs: as UTF-16 it would be other letters."""
    try:
        text = raw.replace(b"\0", b"").decode()
    except UnicodeDecodeError:
        return False
    return 4 * raw.count(b"\0") < len(raw) and not _odd(text)


def _legacy(raw: bytes, invalid: int) -> Decoded:
    """Text in a code page; `invalid` is the first byte that is not UTF-8."""
    # Imported here since most texts are UTF-8.
    import chardet

    lines = [line for line in raw.split(b"\n") if not line.isascii()]
    outside = sum(len(line) - _ascii(line) for line in lines)
    few = outside < FEW_BYTES
    guess = "cp1252" if few else chardet.detect(b"\n".join(lines)[:SAMPLE_BYTES])["encoding"]
    place = _place(raw, invalid)
    text = None
    if guess is not None:
        try:
            text = raw.decode(guess)
        except UnicodeDecodeError:
            text = None
    one_byte_each = text is not None and len(text) == len(raw)
    if _partly_utf8(raw, lines, outside, 1 if one_byte_each else UTF8_CHARACTERS):
        raise ValueError(
            f"{place} is not UTF-8, as other parts of it are: it is damaged there, or was joined"
            f" from files in two encodings; {_DAMAGED_CURE}"
        )
    if text is None or guess is None or not _plausible(text, few=few):
        raise ValueError(
            f"{place} is not UTF-8, and which encoding it is in cannot be told; {_UNKNOWN_CURE}"
        )
    return Decoded(text, guess)


def _partly_utf8(raw: bytes, lines: list[bytes], outside: int, characters: int) -> bool:
    """Whether most of the bytes `outside` ASCII, or a line with so many such characters, is
    valid UTF-8."""
    lone = sum(map("\udc80".__le__, raw.decode(errors="surrogateescape")))
    if outside - lone >= UTF8_SHARE * outside:
        return True
    for line in lines:
        try:
            text = line.decode()
        except UnicodeDecodeError:
            continue
        if sum(c > "\x7f" for c in text) >= characters:
            return True
    return False


def _ascii(line: bytes) -> int:
    return len(line.decode("ascii", "ignore"))


def _plausible(text: str, *, few: bool) -> bool:
    if _odd(text) or _BOX_BY_LETTER.search(text) or _CAPITAL_WITHIN.search(text):
        return False
    if few and _FOREIGN_WORD.search(text):
        return False
    return not _ONE_LETTER.search(_latin(text))


def _latin(text: str) -> str:
    """The text if it is in Latin letters, else nothing: other scripts have words of one letter."""
    letters = [c for c in set(text) if c > "\x7f" and c.isalpha()]
    return text if all("LATIN" in unicodedata.name(c, "") for c in letters) else ""


def _odd(text: str) -> bool:
    """Whether it holds what no text does: control characters, or such as are not assigned."""
    characters = set(text) - set("\t\n\v\f\r\x1a\x85")
    return any(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") for c in characters)


def _place(raw: bytes, offset: int) -> str:
    """Where a byte is, in words."""
    return f"byte {offset:,} (line {raw.count(10, 0, offset) + 1:,})"
