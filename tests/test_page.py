"""The page of gothic-serve, in a browser, as a person uses it, before the real server.

Every test fails on any message in the browser's console and on any request to another host.
"""

import json
import re
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gothic_jax.checkpoints.release import GOTHIC_DANDY
from tests.common import DARK, WITTY, Workplace, process, run, text_of, wait_for

pytestmark = pytest.mark.long

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's tests need playwright: pip install playwright"
)
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the page's tests need Debian's chromium", allow_module_level=True)

AXE = "4.14.1"
BEGINNING = "The old house on the hill was dark."
COPIED = WITTY.split(";")[0]  # of the training text
SLOW = 30_000  # milliseconds that the first request may take, which compiles
DEEP = "<img src=x onerror=\"console.error('ran')\"><script>console.error('ran')</script>"


# ---- The server and the browser ----


class Server:
    """`gothic-serve` on one port, in a folder of texts."""

    def __init__(self, checkpoint: Path, texts: Path, *options: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._texts = texts
        self._arguments = ["--checkpoint", str(checkpoint), "--port", str(self.port)]
        self._arguments += options

    def start(self) -> None:
        self._process = process("serve", self._arguments, self._texts)
        wait_for(self.url, self._process)

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(trained_once: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the tiny model and an index of its training text."""
    texts = tmp_path_factory.mktemp("texts")  # of its own: other tests want a run without an index
    shutil.copy(trained_once.root / "mixed_train.txt", texts)
    (texts / "held_out.txt").write_text(text_of(9))  # long enough for a passage
    files = ["--file", str(texts / "mixed_train.txt"), "--held-out", str(texts / "held_out.txt")]
    indexed = run("index", files, texts)
    assert indexed.returncode == 0, indexed.stderr
    train_file = ["--train-file", str(texts / "mixed_train.txt")]
    started = Server(trained_once.out_dir / "latest", texts, *train_file)
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


# A stream can be held after its first words, so that no test depends on how fast the model is.
HOLD = r"""
const plain = window.fetch;
window.fetch = async (...request) => {
  const response = await plain(...request);
  if (!window.holding || !String(request[0]).endsWith("/v1/completions")) return response;
  const gate = new Promise((open) => { window.letGo = open; });
  let before = "";
  const held = new TransformStream({
    async transform(piece, stream) {
      const first = /^[^]*?"text": ?"[^"][^]*?\n\n/.exec(before + piece);
      const passes = before === null ? "" : first ? first[0].slice(before.length) : piece;
      stream.enqueue(passes);
      before = before === null || first ? null : before + piece;
      if (before !== null) return;
      await gate;
      stream.enqueue(piece.slice(passes.length));
    },
  });
  const text = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(held);
  return new Response(text.pipeThrough(new TextEncoderStream()), response);
};
"""


class Desk:
    """A tab with the page, and what a writer does there."""

    def __init__(self, context: Any, url: str) -> None:
        self.url = url
        self.messages: list[str] = []
        self.expected = "(?!)"  # a pattern of the messages that a test provokes
        self.hosts: set[str] = set()
        self.fakes: dict[str, Callable[[Any], None]] = {}  # by path, in place of the server
        self.page = context.new_page()
        # Before the page opens: Chromium may let the first requests after it pass.
        self.page.route(re.compile("/(v1|gothic)/"), self._route)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url))
        self.open()

    def _hear(self, message: Any) -> None:
        self.messages.append(f"{message.type}: {message.text}")

    def _route(self, route: Any) -> None:
        path = route.request.url.removeprefix(self.url)
        self.fakes.get(path, lambda route: route.continue_())(route)

    def open(self) -> None:
        self.page.goto(self.url)
        expect(self.page.locator("#model")).to_contain_text("it reads", timeout=SLOW)

    def check(self) -> None:
        assert [m for m in self.messages if not re.search(self.expected, m)] == []
        assert {u for u in self.hosts if not u.startswith((self.url, "data:", "blob:"))} == set()

    @property
    def text(self) -> Any:
        return self.page.get_by_role("textbox", name="Text")

    @property
    def words(self) -> str:
        return self.text.input_value()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def press(self, keys: str) -> None:
        self.page.keyboard.press(keys)

    def type(self, text: str) -> None:
        self.text.focus()
        self.press("Control+End")
        self.page.keyboard.type(text)

    def caret(self, place: int) -> None:
        self.text.evaluate(
            "(area, place) => { area.focus(); area.setSelectionRange(place, place) }", place
        )

    def set(self, **settings: object) -> None:
        """Sets fields of "How it writes"."""
        self.page.get_by_text("How it writes").click()
        for name, value in settings.items():
            self.page.locator(f"#{name}").fill(str(value))
            self.page.locator(f"#{name}").blur()
        self.page.get_by_text("How it writes").click()

    def says(self, part: str) -> None:
        expect(self.page.get_by_role("status")).to_contain_text(part, timeout=SLOW)

    def warns(self, part: str) -> None:
        expect(self.page.get_by_role("alert")).to_contain_text(part, timeout=SLOW)

    def continues(self, keys: str = "Control+Enter") -> str:
        """Lets the model continue; the whole text then."""
        self.press(keys)
        self.says("words written")
        return self.words

    @property
    def branches(self) -> Any:
        return self.page.locator("#branches button")

    @property
    def current(self) -> Any:
        return self.page.locator("#branches [aria-current]")

    @property
    def here(self) -> Any:
        return self.page.locator("#here")

    @property
    def measures(self) -> Any:
        return self.page.locator("#measures")

    def measured(self) -> None:
        expect(self.measures).to_contain_text("the model reads", timeout=SLOW)

    def marked(self, name: str) -> list[str]:
        """The words under a mark, strong or weak."""
        return self.page.evaluate(
            """(name) => [...CSS.highlights].filter(([key]) => key.startsWith(name))
                .flatMap(([, ranges]) => [...ranges]).map((range) =>
                range.startContainer.data.slice(range.startOffset, range.endOffset))""",
            name,
        )

    def awaits(self, name: str, words: str | None) -> None:
        """Waits until a mark covers these words, or none if there are none."""
        for _ in range(200):
            marked = self.marked(name)
            if any(words in part for part in marked) if words else not marked:
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{words!r}: what is marked as {name} is {marked}")

    def hold(self) -> None:
        """Holds the next streams after their first words."""
        self.page.evaluate("window.holding = true")

    def let_go(self) -> None:
        self.page.evaluate("window.holding = false; window.letGo?.()")

    def starts_writing(self) -> str:
        """Starts a stream that is held; the text with its first words."""
        before = self.words
        self.hold()
        self.press("Control+Enter")
        expect(self.button("Stop")).to_be_visible()
        expect(self.text).not_to_have_value(before, timeout=SLOW)
        return self.words

    def open_file(self, name: str, content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.page.locator("#file").set_input_files(
            {"name": name, "mimeType": "text/markdown", "buffer": data}
        )

    def download(self) -> str:
        with self.page.expect_download() as started:
            self.button("Download").click()
        return Path(started.value.path()).read_text()

    def drop(self, name: str, content: str) -> None:
        self.page.evaluate(
            """([name, content]) => {
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([content], name));
                for (const kind of ["dragover", "drop"])
                    document.body.dispatchEvent(
                        new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
            }""",
            [name, content],
        )


@contextmanager
def desk_in(browser: Any, url: str, script: str = "", **options: Any) -> Iterator[Desk]:
    options.setdefault("viewport", {"width": 1280, "height": 800})
    context = browser.new_context(**options)
    context.add_init_script(HOLD + script)
    try:
        desk = Desk(context, url)
        yield desk
        desk.check()
    finally:
        context.close()


@pytest.fixture
def desk(browser: Any, server: Server) -> Iterator[Desk]:
    with desk_in(browser, server.url) as opened:
        opened.set(max_tokens=24, seed=1)
        yield opened


def block(markdown: str) -> dict[str, Any]:
    """The pieces and receipts of a Markdown file."""
    return json.loads(markdown.rsplit("```gothic-receipts\n", 1)[1].removesuffix("\n```\n"))


# ---- Writing ----


def test_a_beginning_is_continued_in_a_mix_of_voices(desk: Desk) -> None:
    expect(desk.button("Undo")).to_be_disabled()
    desk.type(BEGINNING)
    whole = desk.continues()
    assert whole.startswith(BEGINNING)
    assert len(whole) > len(BEGINNING)
    expect(desk.current).to_contain_text("Wilde 0.5, Lovecraft 0.5")
    expect(desk.here).to_contain_text("written as Wilde 0.5, Lovecraft 0.5")
    assert desk.page.evaluate("document.activeElement.selectionStart") == len(whole)


def test_without_words_nothing_is_asked_of_the_model(desk: Desk) -> None:
    desk.press("Control+Enter")
    desk.says("Write some words first")
    desk.press("Control+.")
    desk.says("Put the caret behind some words")


def test_the_slider_moves_in_mid_text_and_each_part_keeps_its_weights(desk: Desk) -> None:
    desk.type(BEGINNING)
    first = desk.continues()
    slider = desk.page.get_by_role("slider", name="From Wilde to Lovecraft")
    slider.focus()
    for _ in range(4):
        desk.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "Wilde 0.3, Lovecraft 0.7")
    second = desk.continues()
    assert second.startswith(first)
    expect(desk.here).to_contain_text("Wilde 0.3, Lovecraft 0.7")
    desk.caret(len(BEGINNING) + 2)
    expect(desk.here).to_contain_text("Wilde 0.5, Lovecraft 0.5")
    desk.caret(3)
    expect(desk.here).to_contain_text("written by you")
    slider.focus()
    desk.press("End")
    expect(slider).to_have_attribute("aria-valuetext", "Wilde -0.5, Lovecraft 1.5")
    desk.continues()
    blends = [piece.get("blend") for piece in block(desk.download())["pieces"]]
    assert blends == [
        None,
        {"wilde": 0.5, "lovecraft": 0.5},
        {"wilde": 0.3, "lovecraft": 0.7},
        {"wilde": -0.5, "lovecraft": 1.5},
    ]


def test_voices_are_taken_out_and_added_and_weighed(desk: Desk) -> None:
    desk.button("Without Wilde").click()
    expect(desk.page.locator("#between")).to_be_hidden()
    expect(desk.page.locator("#rest")).to_contain_text("0.5, goes to no voice")
    desk.page.get_by_label("Weight of Lovecraft", exact=True).fill("1.25")
    expect(desk.page.locator("#rest")).to_contain_text("-0.25, goes to no voice")
    desk.type(BEGINNING)
    desk.continues()
    expect(desk.current).to_contain_text("Lovecraft 1.25")
    desk.button("Without Lovecraft").click()
    desk.continues()
    expect(desk.current).to_contain_text("no voice")
    desk.page.get_by_label("Add a voice").select_option("wilde")
    desk.continues()
    expect(desk.current).to_contain_text("Wilde")


def test_three_voices_are_mixed_compared_and_told_apart(browser: Any, tmp_path: Path) -> None:
    started = Server(GOTHIC_DANDY, tmp_path)
    started.start()
    try:
        with desk_in(browser, started.url) as desk:
            desk.set(max_tokens=24, seed=1)
            desk.page.get_by_label("Add a voice").select_option("poe")
            expect(desk.page.locator("#between")).to_be_hidden()
            for voice, weight in (("Wilde", "0.25"), ("Lovecraft", "0.25"), ("Poe", "0.5")):
                desk.page.get_by_label(f"Weight of {voice}", exact=True).fill(weight)
            desk.type(BEGINNING)
            desk.continues()
            expect(desk.current).to_contain_text("Wilde 0.25, Lovecraft 0.25, Poe 0.5")
            desk.measured()
            expect(desk.measures).to_contain_text("Poe: ")
            desk.press("Control+.")
            for voice in ("Wilde", "Lovecraft", "Poe"):
                expect(desk.page.locator("#choices-columns")).to_contain_text(voice, timeout=SLOW)
            (piece,) = [one for one in block(desk.download())["pieces"] if "blend" in one]
            assert piece["blend"] == {"wilde": 0.25, "lovecraft": 0.25, "poe": 0.5}
    finally:
        started.stop()


def test_a_browser_asks_for_the_key_and_writes_with_it(
    browser: Any, trained_once: Workplace, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("the-key-of-the-house-on-the-hill\n")
    options = ["--api-key-file", str(tmp_path / "key")]
    started = Server(trained_once.out_dir / "latest", tmp_path, *options)
    started.start()
    try:
        context = browser.new_context()
        # The browser asks for a password; nobody answers.
        with pytest.raises(playwright.Error, match="INVALID_AUTH_CREDENTIALS"):
            context.new_page().goto(started.url)
        context.close()
        # What a person types into the browser's prompt.
        key = {"username": "", "password": "the-key-of-the-house-on-the-hill"}
        with desk_in(browser, started.url, http_credentials=key) as desk:
            desk.set(max_tokens=24, seed=1)
            desk.type(BEGINNING)
            assert len(desk.continues()) > len(BEGINNING)
    finally:
        started.stop()


def test_moving_the_slider_while_it_writes_goes_on_with_the_new_mix(desk: Desk) -> None:
    desk.type(BEGINNING)
    first = desk.starts_writing()
    desk.page.evaluate("window.holding = false")
    desk.page.get_by_role("slider", name="From Wilde to Lovecraft").press("ArrowRight")
    desk.says("words written as Wilde 0.45, Lovecraft 0.55")
    assert desk.words.startswith(first)
    assert desk.words != first


def test_stopping_keeps_what_came_and_how_to_write_it_again(desk: Desk) -> None:
    desk.type(BEGINNING)
    begun = desk.starts_writing()
    desk.press("Escape")
    desk.says("Stopped")
    desk.let_go()
    expect(desk.button("Continue")).to_be_visible()
    assert desk.words == begun
    written = block(desk.download())["pieces"][1]
    assert written["receipt"]["prompt"] == BEGINNING
    assert written["receipt"]["text"] == written["text"]


def test_blanks_at_the_end_are_the_models_to_write(desk: Desk) -> None:
    desk.type(f"{BEGINNING} ")
    desk.set(seed=7)
    desk.continues()
    receipt = block(desk.download())["pieces"][1]["receipt"]
    assert desk.words == BEGINNING + receipt["text"]
    assert receipt["seed"] == 7


def test_the_best_of_several_is_kept(desk: Desk) -> None:
    desk.type(BEGINNING)
    desk.set(best_of=3)
    desk.button("Best of 3").click()
    desk.says("words written")
    assert desk.words.startswith(BEGINNING)
    assert "receipt" in block(desk.download())["pieces"][1]


# ---- Editing, undo and branches ----


def test_one_edits_anywhere_and_undoes_and_redoes_it(desk: Desk) -> None:
    desk.type(BEGINNING)
    written = desk.continues()
    desk.caret(len("The old"))
    desk.page.keyboard.type("est \U0001f600")
    edited = written.replace("The old", "The oldest \U0001f600", 1)
    assert desk.words == edited
    desk.press("Control+z")
    expect(desk.text).to_have_value(written)
    desk.press("Control+z")
    expect(desk.text).to_have_value(BEGINNING)
    desk.press("Control+z")
    expect(desk.text).to_have_value("")
    for expected in (BEGINNING, written, edited):
        desk.press("Control+Shift+z")
        expect(desk.text).to_have_value(expected)
    desk.button("Undo").click()
    expect(desk.text).to_have_value(written)


def test_undo_goes_back_by_sentences_and_pasted_texts(desk: Desk) -> None:
    desk.type("One. Two")
    desk.page.keyboard.insert_text("!")
    desk.press("Backspace")
    desk.press("Control+a")
    desk.press("Control+x")
    assert desk.words == ""
    desk.press("Control+v")
    desk.press("Control+v")
    for expected in ("One. TwoOne. Two", "One. Two", "", "One. Two", "One. ", ""):
        expect(desk.text).to_have_value(expected)
        desk.press("Control+z")


def test_an_input_method_is_left_to_finish_its_word(desk: Desk) -> None:
    desk.type("At ")
    method = desk.page.context.new_cdp_session(desk.page)
    for part in ("k", "\u304b", "\u304b\u3093"):
        method.send(
            "Input.imeSetComposition", {"text": part, "selectionStart": 1, "selectionEnd": 1}
        )
    method.send("Input.insertText", {"text": "\u6f22\u5b57"})
    assert desk.words == "At \u6f22\u5b57"
    desk.type(" he sat.")
    desk.continues()
    assert desk.words.startswith("At \u6f22\u5b57 he sat.")


def test_another_branch_and_back_to_the_first(desk: Desk) -> None:
    desk.type(BEGINNING)
    first = desk.continues()
    desk.set(seed=99)
    desk.text.focus()
    second = desk.continues("Control+Shift+Enter")
    assert second.startswith(BEGINNING)
    assert second != first
    expect(desk.branches).to_have_count(4)  # the beginning, what was typed, two branches
    desk.branches.nth(2).click()
    expect(desk.text).to_have_value(first)
    expect(desk.branches.nth(2)).to_have_attribute("aria-current", "true")
    expect(desk.branches.nth(2)).to_be_focused()
    desk.branches.nth(3).press("Enter")
    expect(desk.text).to_have_value(second)
    desk.button("Undo").click()
    desk.button("Redo").click()
    expect(desk.text).to_have_value(second)  # redo goes where one was last


def test_next_words_by_voice_and_one_chosen_as_a_branch(desk: Desk) -> None:
    desk.type(BEGINNING)
    whole = desk.continues()
    desk.caret(len("The old house"))
    desk.press("Control+.")
    columns = desk.page.locator("#choices-columns > section")
    expect(columns).to_have_count(3, timeout=SLOW)
    for column, name in enumerate(("The mix", "Wilde", "Lovecraft")):
        expect(columns.nth(column).get_by_role("heading")).to_have_text(name)
        shares = columns.nth(column).locator("li span:last-child").all_inner_texts()
        assert len(shares) == 10
        numbers = [float(share.rstrip("%")) for share in shares]
        assert numbers == sorted(numbers, reverse=True)
    expect(desk.page.locator("#choices-place")).to_contain_text("The old house")
    chosen = columns.nth(1).get_by_role("button").first
    chosen.press("Enter")
    expect(desk.text).not_to_have_value(whole)
    assert desk.words.startswith("The old house")
    assert len(desk.words) < len(whole)
    expect(desk.current).to_contain_text("Next word")
    expect(desk.text).to_be_focused()
    expect(columns).to_have_count(3)  # those after the new word
    desk.press("Escape")
    expect(desk.page.locator("#choices")).to_be_hidden()
    desk.press("Control+z")
    expect(desk.text).to_have_value(whole)


# ---- What the model says of the text ----


def test_copied_words_are_marked_with_their_work_beside_the_held_out_works(desk: Desk) -> None:
    desk.type(f"\U0001f600 I said this myself. {COPIED}")
    desk.awaits("copied", COPIED)
    line = desk.measures.get_by_role("list", name="Copied passages").get_by_role("button")
    expect(line).to_contain_text(re.compile(r"words of .*\(Wilde\), from word \d"))
    row = desk.measures.get_by_role("row", name=re.compile("copied, 8 or more"))
    assert float(row.get_by_role("cell").first.inner_text().rstrip("%")) > 50
    expect(desk.here).to_contain_text("copied:")  # the caret is in it
    desk.caret(4)
    expect(desk.here).not_to_contain_text("copied:")
    line.click()
    selected = desk.text.evaluate(
        "(area) => area.value.slice(area.selectionStart, area.selectionEnd)"
    )
    assert selected == COPIED
    desk.caret(4)
    inside = desk.page.evaluate(
        """() => { const [range] = CSS.highlights.get("copied"); const live = new Range();
            live.setStart(range.startContainer, range.startOffset);
            live.setEnd(range.startContainer, range.endOffset);
            const box = live.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2]; }"""
    )
    desk.page.mouse.move(*inside)
    expect(desk.here).to_contain_text("Under the pointer: written by you; copied:")
    desk.page.get_by_label("copied", exact=True).uncheck()
    desk.awaits("copied", None)


def test_sentences_are_coloured_by_voice(desk: Desk) -> None:
    desk.type(f"{WITTY} {DARK}")
    desk.measured()
    desk.page.locator("#measures li").first.wait_for()
    marked = desk.marked("voice1") + desk.marked("voice2")
    assert any("no tide has opened" in sentence for sentence in marked)
    counts = desk.measures.get_by_role("list", name="Voices of the sentences").get_by_role(
        "listitem"
    )
    expect(counts).to_have_count(2)
    desk.caret(10)
    expect(desk.here).to_contain_text("sentence nearest to")
    desk.page.get_by_label("voice of each sentence").uncheck()
    desk.awaits("voice1", None)
    desk.awaits("voice2", None)


def test_what_the_model_no_longer_reads_is_shaded(desk: Desk) -> None:
    desk.type("A short one.")
    desk.measured()
    expect(desk.measures).to_contain_text("reads all 3 words")
    expect(desk.page.locator("#unread")).to_be_hidden()
    desk.page.keyboard.insert_text(f" {DARK}" * 3)
    expect(desk.measures).to_contain_text("reads only the last", timeout=SLOW)
    expect(desk.page.locator("#unread")).to_be_visible()
    assert desk.marked("unread")[0].startswith("A short one.")
    last = desk.words.removeprefix(desk.marked("unread")[0])
    assert 0 < len(last) < len(desk.words)


def test_marks_stay_with_their_words_while_one_types_before_them(desk: Desk) -> None:
    desk.type(COPIED)
    desk.awaits("copied", COPIED)
    desk.fakes["gothic/measure"] = lambda route: None  # no new answer comes
    desk.caret(0)
    desk.page.keyboard.insert_text("He said: \U0001f600 ")
    desk.awaits("copied", COPIED)
    desk.caret(len(desk.words) - 4)
    desk.page.keyboard.type("x")
    desk.awaits("copied", None)  # whether the changed passage is copied is unknown


# ---- Files ----


def test_a_download_opens_again_with_its_receipts(desk: Desk) -> None:
    desk.type(f"{BEGINNING} caf\u00e9 \U0001f600\n\n```\ncode\n```\n")
    whole = desk.continues()
    file = desk.download()
    assert file.startswith(f"{whole}\n\n```gothic-receipts\n")
    pieces = block(file)["pieces"]
    assert "".join(piece["text"] for piece in pieces) == whole
    assert pieces[-1]["receipt"]["text"] == pieces[-1]["text"]
    desk.button("New").click()
    expect(desk.text).to_have_value("")
    desk.open_file("again.md", file)
    desk.says("again.md is open")
    assert desk.words == whole
    assert block(desk.download())["pieces"] == pieces
    desk.press("Control+z")
    assert whole.startswith(desk.words)
    assert desk.words != whole
    # As another editor might leave it: other line ends, and a word more.
    desk.open_file("edited.md", file.replace("The old", "The very old", 1).replace("\n", "\r\n"))
    desk.says("edited.md is open")
    assert desk.words == whole.replace("The old", "The very old")
    assert block(desk.download())["pieces"][-1]["receipt"] == pieces[-1]["receipt"]


def test_the_text_is_copied_with_its_receipts(desk: Desk) -> None:
    desk.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    desk.type(BEGINNING)
    desk.continues()
    desk.button("Copy").click()
    desk.says("Copied")
    copied = desk.page.evaluate("navigator.clipboard.readText()")
    assert copied == desk.download()


def test_files_without_receipts_or_with_damaged_ones_open_as_text(desk: Desk) -> None:
    desk.drop("plain.md", "Dropped.\r\nLines.")
    desk.says("plain.md is open")
    assert desk.words == "Dropped.\nLines."
    for damage in (
        "{",
        "[]",
        '{"pieces": [{"text": 1}]}',
        '{"pieces": [{"text": "a", "kind": "__proto__"}]}',
    ):
        content = f"Words.\n\n```gothic-receipts\n{damage}\n```\n"
        desk.open_file("damaged.md", content)
        desk.says("its receipts cannot be read")
        assert desk.words == content
    desk.open_file("binary.md", b"\xff\xfe\x00")
    desk.warns("binary.md is not text in UTF-8")


# ---- Drafts ----


def test_drafts_survive_a_reload_and_one_chooses_among_them(desk: Desk) -> None:
    desk.type("The first draft.")
    desk.button("New").click()
    desk.type("The second one.")
    whole = desk.continues()
    desk.page.get_by_role("slider", name="From Wilde to Lovecraft").press("Home")
    desk.open()
    assert desk.words == whole
    expect(desk.page.locator("#between-first")).to_have_text("Wilde 1.50")
    expect(desk.branches).to_have_count(3)
    drafts = desk.page.get_by_role("combobox", name="Draft")
    expect(drafts.locator("option")).to_contain_text(["The second one.", "The first draft."])
    drafts.select_option("The first draft.")
    expect(desk.text).to_have_value("The first draft.")
    desk.page.once("dialog", lambda dialog: dialog.accept())
    desk.button("Delete").click()
    expect(desk.text).to_have_value(whole)
    expect(drafts.locator("option")).to_have_count(1)


def test_a_server_that_goes_and_comes_again(desk: Desk, server: Server) -> None:
    desk.type(BEGINNING)
    kept = desk.continues()
    desk.expected = "ERR_|Failed to load"
    server.stop()
    try:
        desk.press("Control+Enter")
        desk.warns("The server does not answer")
        assert desk.words == kept
        desk.type(" More.")
    finally:
        server.start()
    assert desk.continues().startswith(f"{kept} More.")
    desk.open()
    assert desk.words.startswith(f"{kept} More.")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "Storage.prototype.setItem = () => {"
            " throw new DOMException('', 'QuotaExceededError') };",
            "storage is full",
        ),
        (
            "for (const name of ['localStorage', 'sessionStorage'])"
            " Object.defineProperty(window, name,"
            " { get() { throw new DOMException('', 'SecurityError') } });",
            "cannot be used",
        ),
    ],
)
def test_without_storage_one_is_told_and_can_write(
    browser: Any, server: Server, script: str, message: str
) -> None:
    with desk_in(browser, server.url, script) as desk:
        desk.type("Words.")
        desk.warns(message)
        desk.button("New").click()
        desk.type("Others.")
        desk.page.get_by_role("combobox", name="Draft").select_option("Words.")
        assert desk.download().startswith("Words.\n\n```gothic-receipts")


def test_two_tabs_on_one_draft_keep_the_branches_of_both(desk: Desk) -> None:
    desk.type(BEGINNING)
    first = desk.continues()
    desk.open()  # it is stored now
    other = Desk(desk.page.context, desk.url)
    assert other.words == first
    other.set(seed=5)
    other.text.focus()
    second = other.continues("Control+Shift+Enter")
    expect(desk.branches).to_have_count(4)  # as soon as the other tab has saved
    assert desk.words == first
    desk.type(" Mine.")
    expect(other.branches).to_have_count(5)
    assert other.words == second
    other.check()


# ---- Races and errors ----


def test_typing_stops_the_writing_and_nothing_comes_after(desk: Desk) -> None:
    desk.type(BEGINNING)
    begun = desk.starts_writing()
    desk.caret(0)
    desk.page.keyboard.type("So: ")
    desk.let_go()
    assert desk.words == f"So: {begun}"
    expect(desk.button("Continue")).to_be_visible()
    desk.press("Control+z")
    expect(desk.text).to_have_value(begun)


def test_a_stream_does_not_go_into_another_branch_or_draft(desk: Desk) -> None:
    desk.type(BEGINNING)
    begun = desk.starts_writing()
    desk.branches.nth(1).click()
    desk.let_go()
    expect(desk.text).to_have_value(BEGINNING)
    desk.button("Redo").click()
    expect(desk.text).to_have_value(begun)
    begun = desk.starts_writing()
    desk.button("New").click()
    desk.let_go()
    expect(desk.text).to_have_value("")
    desk.page.get_by_role("combobox", name="Draft").select_option(index=1)
    expect(desk.text).to_have_value(begun)


def test_errors_are_shown_and_change_nothing(desk: Desk) -> None:
    desk.type(f"{BEGINNING} ")
    desk.expected = "status of 429"
    busy = {"error": {"message": "8 texts are being written; try again soon", "type": "busy"}}
    desk.fakes["v1/completions"] = lambda route: route.fulfill(status=429, json=busy)
    desk.press("Control+Enter")
    desk.warns("8 texts are being written; try again soon")
    assert desk.words == f"{BEGINNING} "
    expect(desk.branches).to_have_count(2)
    desk.fakes.clear()
    desk.continues()
    expect(desk.page.get_by_role("alert")).to_be_hidden()


def fake_stream(route: Any, *texts: str, end: str = "data: [DONE]\n\n") -> None:
    chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
    route.fulfill(content_type="text/event-stream", body=body)


def test_a_stream_that_breaks_off_keeps_what_came(desk: Desk) -> None:
    desk.type(BEGINNING)
    desk.fakes["v1/completions"] = lambda route: fake_stream(route, " And\r", "\nthen", end="")
    desk.press("Control+Enter")
    desk.warns("broke off")
    assert desk.words == f"{BEGINNING} And\nthen"


def test_html_never_runs(desk: Desk) -> None:
    page = desk.page
    desk.fakes["v1/completions"] = lambda route: fake_stream(route, f" {DEEP}", f"\n{DEEP}")
    words = {"alternatives": [[{"text": f" {DEEP}", "probability": 0.5}]] * 3}
    desk.fakes["gothic/alternatives"] = lambda route: route.fulfill(json=words)
    span = {"start": 0, "end": 40, "words": 8, "work": DEEP, "voice": DEEP, "place": 1}
    copied = {"words": 9, "share": 1, "longest": span, "spans": [span]}
    answer = {"tokens": 9, "read_from": 9, "copied": copied, "sentences": None}
    desk.fakes["gothic/measure"] = lambda route: route.fulfill(json=answer)
    desk.type(f"{DEEP} ")
    desk.continues()
    desk.press("Control+.")
    expect(page.locator("#choices-columns button")).to_have_count(3)
    page.locator("#choices-columns button").first.click()
    expect(desk.measures).to_contain_text(DEEP)
    piece = {"text": DEEP, "kind": "written", "blend": {DEEP: 1, "__proto__": 1}, "receipt": {}}
    hostile = {"version": 1, "mix": {DEEP: 1}, "pieces": [piece]}
    desk.open_file(
        f"{DEEP}.md".replace("/", ""), f"{DEEP}\n\n```gothic-receipts\n{json.dumps(hostile)}\n```\n"
    )
    desk.says("is open")
    expect(desk.current).to_contain_text("<img src=x")
    desk.open()
    assert page.locator("img, body script").count() == 0


# ---- For everyone ----


def test_every_control_is_reached_by_keyboard_with_a_visible_focus(desk: Desk) -> None:
    desk.type(BEGINNING)
    desk.continues()
    wanted = desk.page.locator("button:enabled:visible, select, summary, input:visible").count()
    reached: set[str] = set()
    for _ in range(wanted + 3):
        desk.press("Tab")
        name, outline = desk.page.evaluate(
            """() => { const at = document.activeElement; const style = getComputedStyle(at);
                return [at.outerHTML.slice(0, 160), style.outlineStyle + style.outlineWidth]; }"""
        )
        if not name.startswith(("<body", "<textarea")):
            assert outline == "solid2px", name
            reached.add(name)
    assert len(reached) >= wanted
    desk.text.focus()
    assert desk.page.locator("#sheet").evaluate("(e) => getComputedStyle(e).boxShadow") != "none"


@pytest.mark.parametrize("width", [360, 820, 1280, 2560])
def test_it_fits_and_the_marks_lie_under_their_words(
    browser: Any, server: Server, width: int
) -> None:
    with desk_in(browser, server.url, viewport={"width": width, "height": 800}) as desk:
        desk.text.focus()
        desk.page.keyboard.insert_text(f"{WITTY}\n\n\U0001f600\t{DARK}\n" * 8 + "x" * 400 + "\n")
        desk.measured()
        root = desk.page.locator("html")
        assert root.evaluate("(e) => e.scrollWidth") <= width
        sizes = "(e) => [e.clientWidth, e.scrollHeight, getComputedStyle(e).font]"
        assert desk.text.evaluate(sizes) == desk.page.locator("#marks").evaluate(sizes)
        expect(desk.button("Continue")).to_be_in_viewport()


def test_nothing_moves_where_less_motion_is_wished(browser: Any, server: Server) -> None:
    with desk_in(browser, server.url, reduced_motion="reduce") as desk:
        moving = desk.page.evaluate(
            """() => [...document.querySelectorAll("*")].filter((e) => {
                const style = getComputedStyle(e);
                return parseFloat(style.transitionDuration) || style.animationName !== "none";
            }).length"""
        )
        assert moving == 0


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which checks a page for what shuts people out."""
    folder = tmp_path_factory.mktemp("axe")
    try:
        subprocess.run(
            ["npm", "pack", "--silent", f"axe-core@{AXE}"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=120,
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"axe-core cannot be fetched with npm: {error}")
    with tarfile.open(folder / f"axe-core-{AXE}.tgz") as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_axe_finds_nothing(browser: Any, server: Server, axe: str, scheme: str, width: int) -> None:
    size = {"width": width, "height": 800}
    options = {"color_scheme": scheme, "viewport": size, "bypass_csp": True}
    with desk_in(browser, server.url, **options) as desk:
        desk.type(f"{BEGINNING} {COPIED}")
        desk.continues()
        desk.continues("Control+Shift+Enter")
        desk.measured()
        for summary in desk.page.locator("summary").all():
            summary.click()
        desk.text.focus()
        desk.press("Control+.")
        expect(desk.page.locator("#choices")).to_be_visible(timeout=SLOW)
        desk.page.evaluate(axe)
        found = desk.page.evaluate("axe.run()")["violations"]
        faults = [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]
        assert faults == []
