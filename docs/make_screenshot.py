"""Takes docs/page.png: the page of `medusa serve` with an answer of the default model and the tree of one step.

pip install '.[demo,serve,browser]', a Chromium, and then: python docs/make_screenshot.py
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain how it works."
PICTURE = Path(__file__).with_name("page.png")
MOST_BYTES = 200_000
SECONDS = 120


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medusa.cli", "serve", "--port", str(port)]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url, end = f"http://127.0.0.1:{port}/", time.monotonic() + SECONDS
    try:
        while True:
            try:
                urllib.request.urlopen(url + "ready").close()
                break
            except urllib.error.URLError:
                if running.poll() is not None or time.monotonic() > end:
                    sys.exit("the server did not start: `medusa serve` says why")
                time.sleep(0.2)
        yield url
    finally:
        running.terminate()
        running.wait()


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("install Chromium first")
    with serving() as url, sync_playwright() as playwright:
        # Without a sandbox, which containers do not grant: it sees no page but ours.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(url)
        page.click("#open-settings")
        page.fill("#set-max_tokens", "180")
        page.click("#open-tree")
        page.fill("#prompt", PROMPT)
        page.press("#prompt", "Enter")
        page.locator(".meta", has_text="from").wait_for(timeout=SECONDS * 1000)
        # A step of several drafters of which much was accepted, and with much beside it.
        best = (0, 0, 0, 0)
        for step in range(1, int(page.get_attribute("#tree-step", "max") or 1) + 1):
            page.fill("#tree-step", str(step))
            drawing = page.locator("#tree-drawing")
            drafters = sum(drawing.locator(f".by-{name}").count() > 0 for name in ("heads", "ngram"))
            accepted = min(4, drawing.locator(".ring").count())
            best = max(best, (drafters, accepted, drawing.locator(".node").count(), step))
        page.fill("#tree-step", str(best[-1]))
        page.locator("#log").evaluate("log => { log.scrollTop = 0; }")
        page.locator("body").click(position={"x": 5, "y": 795})
        page.screenshot(path=PICTURE)
        browser.close()
    size = PICTURE.stat().st_size
    print(f"{PICTURE}: {size} bytes")
    if size > MOST_BYTES:
        sys.exit(f"that is more than {MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
