"""One typography for one's own texts, and what it changes, counted.

Quotes become straight, as a reader types them at a prompt; every dash is a hyphen or an em dash
without blanks; an ellipsis is three dots; blanks are plain ones, and characters that nobody sees
go. Nothing else changes: letters, case, underscores, guillemets and emoji are the author's, and
code between backticks stays as it is.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

_CODE = re.compile(r"(```.*?```|(?<!\w)`[^`\n]+`(?!\w))", re.DOTALL)

_DOUBLE_QUOTES, _SINGLE_QUOTES = "“”„‟", "‘’‚‛"  # noqa: RUF001 - these are what is replaced
_HYPHENS = "‐‑‒–"  # noqa: RUF001
_NO_BLANK = r"[^\s—―–-]"  # noqa: RUF001

_Rule = tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]]
_RULES: Sequence[_Rule] = (
    ("quotes", re.compile(f"[{_DOUBLE_QUOTES}]"), '"'),
    ("quotes", re.compile(f"[{_SINGLE_QUOTES}]"), "'"),
    ("blanks", re.compile("[\u00a0\u2000-\u200a\u202f\u205f]"), " "),
    (
        "unseen characters",
        re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\ufeff]"),
        "",
    ),
    # Between words: not an option such as --force, nor i-- in code.
    ("dashes", re.compile(r"(?<=\S) -{2,3} (?=\S)|(?<=[\w.,;:!?'\")])-{2,3}(?=\w)"), "—"),
    ("dashes", re.compile(r"(?<=\w)-{2,3}(?=[\"'])|(?<=[\"'])-{2,3}(?=\w)"), "—"),
    ("dashes", re.compile(r"(?<=\S) – (?=\S)|―"), "—"),  # noqa: RUF001
    (
        "dashes",
        re.compile(rf"(?<={_NO_BLANK}) +— *(?={_NO_BLANK})|(?<={_NO_BLANK})— +(?={_NO_BLANK})"),
        "—",
    ),
    ("dashes", re.compile(f"[{_HYPHENS}]"), "-"),
    ("ellipses", re.compile("…"), "..."),
    ("ellipses", re.compile(r" ?\.(?: \.){2,}"), lambda dots: "." * dots[0].count(".")),
)

PLAIN, KEEP = "plain", "keep"
MODES = (PLAIN, KEEP)
"""What `--typography` takes."""


def fit_prompt(prompt: str, known: Callable[[str], bool]) -> str:
    """A prompt in the form of the text that a model was trained on, without blanks at its end.

    `known` says whether that text has a character. Where it has no curly quotes and no ellipses,
    the model has never read them, and the prompt gets the plain form; a line end at its end stays.
    """
    if not any(map(known, f"{_DOUBLE_QUOTES}{_SINGLE_QUOTES}…")):
        prompt, _ = _applied([r for r in _RULES if r[0] != "dashes" or known("—")], prompt)
    return re.sub(r"[^\S\n]+\Z", "", prompt)


def plain(text: str) -> tuple[str, Counter[str]]:
    """The text in the one typography, and how often each kind of change was made."""
    return _applied(_RULES, text)


def _applied(rules: Sequence[_Rule], text: str) -> tuple[str, Counter[str]]:
    changes: Counter[str] = Counter()
    parts = _CODE.split(text)
    for i in range(0, len(parts), 2):  # the others are code
        for kind, pattern, replacement in rules:
            parts[i], count = pattern.subn(replacement, parts[i])
            changes[kind] += count
    text = "".join(parts)
    composed = unicodedata.normalize("NFC", text)
    changes["accents"] += len(text) - len(composed)
    return composed, +changes
