# ruff: noqa: E402  # who imports this is skipped where Playwright or Chromium is missing
"""A browser (Chromium, by Playwright) at the page of a server, for its tests."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium", allow_module_level=True)

from medusa.serve.engine import Engine
from serving import wait_for

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 20_000  # milliseconds, for a machine that is busy
expect = playwright.expect


@contextmanager
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as running, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        expect.set_options(timeout=PATIENCE)
        # Their own home: no settings of the user's browser, and nothing left behind.
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, env={"HOME": home})
        yield browser
        browser.close()


@contextmanager
def tab(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A fresh profile at the page. Whatever the page does, the browser has nothing to complain of: no error, nothing
    that the policy forbade."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.goto(url)
    try:
        yield page
        assert [line for line in complaints if "Failed to load resource" not in line] == []
    finally:
        context.close()


@contextmanager
def gated(engine: Engine) -> Iterator[threading.Semaphore]:
    """Each step waits until it may go on."""
    step, gate, opened = engine.lm.stepper.step, threading.Semaphore(0), threading.Event()

    def waiting(rows: Any) -> Any:
        while not opened.is_set() and not gate.acquire(timeout=0.02):
            pass
        return step(rows)

    engine.lm.stepper.step = waiting  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        opened.set()
        wait_for(lambda: engine.unfinished == 0)
        engine.lm.stepper.step = step  # type: ignore[method-assign]


def send(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()


def last(page: Any) -> Any:
    return page.locator(".message.assistant").last


def events(*pieces: Any, end: str = "data: [DONE]\n\n") -> str:
    """The body of a stream: texts, each drafted by the n-gram drafter, or events as they are."""
    body = ""
    for piece in pieces:
        event = piece
        if isinstance(piece, str):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            event = {"choices": [choice], "medusa": {"spans": [[piece, "ngram"]], "tokens": 1}}
        body += f"data: {json.dumps(event)}\n\n"
    return body + end


def answer_with(page: Any, body: str = "", status: int = 200, **headers: str) -> None:
    kind = "text/event-stream" if status == 200 else "application/json"
    page.unroute("**/v1/chat/completions")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=status, body=body, headers={"content-type": kind, **headers}),
    )
