"""The forms in which people keep texts."""

import io
import json
import zipfile
from pathlib import Path

import pytest

from gothic_jax.commands.data import main
from gothic_jax.text.forms import documents


def read(name: str, content: str | bytes, column: str = "") -> list[str]:
    raw = content.encode() if isinstance(content, str) else content
    return documents(Path(name), raw, None, column)[0]


def test_documents_between_start_and_end_tokens_are_apart() -> None:
    text = "<|startoftext|>One.\n\nMore.<|endoftext|>\n<|startoftext|>\nTwo.\n<|endoftext|>\n"
    assert [part.strip() for part in read("x.txt", text) if part.strip()] == [
        "One.\n\nMore.",
        "Two.",
    ]


def test_a_token_within_a_line_is_text() -> None:
    text = "It writes <|endoftext|> last, and <|startoftext|> first."
    assert read("x.txt", text) == [text]


def test_json_lines() -> None:
    lines = [{"text": "One.\nMore."}, {"text": "Two.", "source": "x"}]
    assert read("x.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n") == ["One.\nMore.", "Two."]


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2 is not JSON"), ('{"body": "x"}', "line 2 has no text")]
)
def test_an_odd_json_line_is_named(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("x.jsonl", f'{{"text": "One."}}\n{line}\n')


def test_a_csv_column() -> None:
    table = 'id,poem\n1,"One, and\n""more""."\n2,Two.\n'
    assert read("x.csv", table, "poem") == ['One, and\n"more".', "Two."]
    with pytest.raises(ValueError, match=r"say with --column which .* id, poem"):
        read("x.csv", table)
    with pytest.raises(ValueError, match="no column 'text'; it has id, poem"):
        read("x.csv", table, "text")


HTML = """<html><head><title>No</title><style>p {}</style></head><body><h1>I</h1>
<p>A <em>dark</em> night;\n  the wind<br>blew.</p><hr/><p>&ldquo;Caf&eacute;&rdquo;</p>
<script>no()</script></body></html>"""


def paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def test_html_is_its_text() -> None:
    (text,) = read("x.html", HTML)
    assert paragraphs(text) == ["I", "A dark night; the wind\nblew.", "* * *", "“Café”"]


def test_markdown_is_its_text() -> None:
    (text,) = read(
        "x.md", "---\ntitle: no\n---\n# I\n\nA *dark* night;\nthe `wind_x`\\\nblew.\n\n***\n\nCafé"
    )
    assert paragraphs(text) == ["I", "A dark night; the wind_x\nblew.", "* * *", "Café"]


def epub(**more: str) -> bytes:
    pages = {
        "META-INF/container.xml": "<container "
        'xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="O/book.opf"/></rootfiles></container>',
        "O/book.opf": '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
        '<item id="b" href="t/b%20b.xhtml"/><item id="a" href="a.xhtml"/>'
        '<item id="n" href="nav.xhtml" properties="nav"/></manifest>'
        '<spine><itemref idref="n"/><itemref idref="a"/><itemref idref="b"/></spine></package>',
        "O/a.xhtml": "<html><body><p>First.</p></body></html>",
        "O/t/b b.xhtml": "<html><body><p>Second.</p></body></html>",
        "O/nav.xhtml": "<html><body><p>Contents</p></body></html>",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as book:
        for name, content in (pages | more).items():
            book.writestr(name, content)
    return file.getvalue()


def test_an_epub_is_read_in_its_order() -> None:
    (text,) = read("x.epub", epub())
    assert paragraphs(text) == ["First.", "Second."]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"PK no", "not a sound EPUB"),
        (epub(**{"META-INF/container.xml": "<"}), "not a sound EPUB"),
        (epub(**{"META-INF/encryption.xml": "<x/>"}), "protected against copying"),
    ],
)
def test_an_epub_that_cannot_be_read_says_why(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("x.epub", raw)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("x.rtf", b"{\\rtf1 Text}", r"it is RTF, which is not read here; save it as plain text"),
        ("x.txt", b"{\\rtf1 Text}", "it is RTF"),
        ("x.srt", b"", "subtitles"),
        ("x.txt", b"\xef\xbb\xbf1\r\n00:00:01,000 --> 00:00:02,000\r\nHello.", "subtitles"),
        ("x.docx", b"PK", "a Word document"),
        ("x.json", b"[]", r"one JSON value.*one object a line"),
    ],
)
def test_other_forms_are_refused_by_name(name: str, raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(name, raw)


def test_documents_become_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = [f"The tale of number {n}.\n\nIt ended after {n * n} words." for n in range(40)]
    table = tmp_path / "tales.csv"
    table.write_text("tale\n" + "".join(f'"{story}"\n' for story in stories))
    data = tmp_path / "D"
    arguments = ["--voices", "none", "--data-dir", str(data), "--add", f"me={table}"]
    assert main(arguments) == 2
    assert "say with --column which column is the text; it has tale" in capsys.readouterr().err
    assert main([*arguments, "--column", "tale"]) == 0
    assert "has 40 documents" in capsys.readouterr().out
    counts = json.loads((data / "processed/report.json").read_text())["counts"]["me"]
    assert {split: cell["works"] for split, cell in counts.items()} == {
        "train": 36,
        "val": 2,
        "test": 2,
    }
