"""Draws the pictures of gothic-serve's page, docs/page/*.png, in Debian's chromium.

scripts/install.sh dev
.venv/bin/python scripts/page_pictures.py

The model of the repository writes in them, with fixed seeds. Its training text and the index must
be there: docs/writers.md has the commands.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "page"
BEGINNING = "Lord Henry opened the letter from Arkham, and laid down his cigarette."
OWN_WORDS = "He rang for the hansom."
COPIED = (
    "He had thought of the studio all morning. The studio was filled with the rich odour of roses,"
    " and when the light summer wind stirred amidst the trees of the garden, he set down his"
    " pen.\n\nThe most merciful thing in the world, I think, is the inability of the human mind to"
    " correlate all its contents; so his uncle used to say, and then ask for more tea."
)
SLOW = 60_000  # milliseconds that the first answer may take


@contextlib.contextmanager
def served() -> Iterator[str]:
    """A server of the model of the repository; gives its address."""
    command = [sys.executable, "-m", "gothic_jax.commands.serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(word for word in process.stdout.readline().split() if "://" in word)
        finally:
            process.terminate()


def write(page: Any, keys: str = "Control+Enter") -> None:
    """Lets the model write, and waits for its last word."""
    page.get_by_role("textbox", name="Text").focus()
    page.keyboard.press(keys)
    expect(page.get_by_role("status")).to_contain_text("words written", timeout=SLOW)
    page.evaluate("document.querySelector('[role=status]').textContent = ''")


def mix(page: Any, wilde: float) -> None:
    """Sets the slider between the two voices."""
    page.locator("#between-range").fill(str(round(1 - wilde, 2)))


def add(page: Any, words: str) -> None:
    """Writes a paragraph at the end of the text."""
    text = page.get_by_role("textbox", name="Text")
    parted = not text.input_value() or text.input_value().endswith("\n\n")
    text.focus()
    page.keyboard.press("Control+End")
    page.keyboard.insert_text(words if parted else f"\n\n{words}")


def shoot(page: Any, name: str, scroll: int = 0) -> None:
    """Saves a picture, once everything is measured and nothing moves."""
    expect(page.locator("#measures")).to_contain_text("the model reads", timeout=SLOW)
    page.evaluate(f"document.querySelector('aside').scrollTop = {scroll}")
    page.wait_for_timeout(2000)
    page.screenshot(path=FOLDER / f"{name}.png")
    print(FOLDER / f"{name}.png")


def new_page(browser: Any, address: str, **options: Any) -> Any:
    """A tab with an empty page, whose texts have a fixed seed."""
    options.setdefault("viewport", {"width": 1280, "height": 800})
    page = browser.new_context(**options).new_page()
    page.goto(address)
    expect(page.locator("#model")).to_contain_text("it reads", timeout=SLOW)
    page.get_by_text("How it writes").click()
    page.locator("#seed").fill("1")
    page.locator("#max_tokens").fill("80")
    page.locator("#max_tokens").blur()
    page.get_by_text("How it writes").click()
    return page


def story(page: Any) -> None:
    """A text with branches in several mixes."""
    add(page, BEGINNING)
    write(page)
    mix(page, 0.2)
    write(page)
    page.get_by_text("How it writes").click()
    page.locator("#seed").fill("2")
    page.locator("#seed").blur()
    page.get_by_text("How it writes").click()
    write(page, "Control+Shift+Enter")
    page.get_by_role("button", name="Undo", exact=True).click()
    add(page, OWN_WORDS)
    mix(page, 0.8)
    write(page)


def main() -> None:
    """Draws all of them."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with served() as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = new_page(browser, address)
        story(page)
        shoot(page, "page-light")
        page.keyboard.press("Control+.")
        expect(page.locator("#choices-columns")).to_contain_text("Lovecraft", timeout=SLOW)
        shoot(page, "page-alternatives")
        page = new_page(browser, address, color_scheme="dark")
        story(page)
        shoot(page, "page-dark")
        telephone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
        page = new_page(browser, address, **telephone)
        story(page)
        shoot(page, "page-phone")
        page = new_page(browser, address)
        add(page, COPIED)
        expect(page.locator("#measures")).to_contain_text("longest copied run", timeout=SLOW)
        shoot(page, "page-copied", scroll=600)
        browser.close()


if __name__ == "__main__":
    main()
