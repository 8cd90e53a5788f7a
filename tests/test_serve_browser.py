# ruff: noqa: E402  # the server's packages and Playwright are extras: without them these tests are skipped
"""The page in a browser (Chromium, by Playwright), on a tiny model, or on answers that are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package)
from browsing import answer_with, chromium, ended, events, expect, gated, last, send, tab
from medusa.serve.engine import Engine
from serving import listening, wait_for


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[str, Engine]]:
    with listening() as (url, engine):
        yield url.removesuffix("v1"), engine


@pytest.fixture
def page(browser: Any, there: tuple[str, Engine]) -> Iterator[Any]:
    with tab(browser, there[0]) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        yield page


def test_a_message_is_answered_as_it_comes_and_the_drafts_are_marked(page: Any, there: tuple[str, Engine]) -> None:
    with gated(there[1]) as gate:
        page.fill("#prompt", "Hello")
        page.press("#prompt", "Shift+Enter")
        page.keyboard.type("you")
        page.press("#prompt", "Enter")
        expect(page.locator(".message.user .body")).to_have_text("Hello\nyou")
        expect(page.locator("#stop")).to_be_visible()
        gate.release(4)
        expect(last(page).locator(".meta")).to_contain_text("tokens per step")
        early = last(page).locator(".text").text_content()
        gate.release(8)
        expect(last(page).locator(".text")).not_to_have_text(early)
        expect(page.locator("#meter")).to_contain_text("tokens/s")
        send(page, "Not now")
        expect(page.locator("#notice")).to_contain_text("under way")
        assert last(page).locator(".text").text_content().startswith(early.rstrip()[:-1])
        assert page.locator("#log").get_attribute("aria-live") == "off"
    ended(page)
    expect(last(page).locator(".meta")).to_contain_text("from")
    expect(page.locator("#announcer")).to_contain_text("Answered: ")
    marked = last(page).locator(".by-ngram").first
    assert marked.get_attribute("title") == "drafted by: n-gram"
    line = "element => getComputedStyle(element).textDecorationLine"
    assert marked.evaluate(line) == "underline"
    page.uncheck("#colours")
    assert marked.evaluate(line) == "none"


def test_escape_stops_an_answer_and_keeps_its_text(page: Any, there: tuple[str, Engine]) -> None:
    def finished() -> list[str]:
        """Answers that came to their end, as the server counts them."""
        shown = page.evaluate("fetch('metrics').then(answer => answer.text())")
        return [line for line in shown.splitlines() if line.startswith("medusa_requests_finished_total")]

    before = finished()
    with gated(there[1]) as gate:
        send(page, "Hello")
        gate.release(6)
        expect(last(page).locator(".meta")).to_contain_text("tokens per step")
        page.keyboard.press("Escape")
        ended(page)
        # The server learns of it on the way, long before the answer's end.
        wait_for(lambda: gate.release() or there[1].unfinished == 0)
    assert finished() == before
    said = last(page).locator(".text").text_content()
    expect(last(page).locator(".meta")).to_contain_text("You stopped it.")
    page.reload()
    page.click("#chats .title")
    expect(last(page).locator(".text")).to_have_text(said)


def test_a_message_is_edited_and_an_answer_is_made_anew(page: Any) -> None:
    page.click("#open-settings")
    page.fill("#set-max_tokens", "8")
    page.fill("#set-temperature", "1")
    for text in ("one", "two"):
        send(page, text)
        ended(page)
    before = last(page).locator(".text").text_content()
    last(page).get_by_role("button", name="Answer again").click()
    expect(last(page).locator(".text")).not_to_have_text(before)  # another seed
    ended(page)
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("three")
    page.keyboard.press("Enter")
    ended(page)
    expect(page.locator(".message.user .body")).to_have_text(["three"])
    expect(page.locator(".message.assistant")).to_have_count(1)
    expect(page.locator("#chats .title")).to_have_text(["three"])


def test_settings_are_checked_before_anything_is_sent(page: Any) -> None:
    page.click("#open-settings")
    page.fill("#set-top_p", "2")
    page.click("[data-closes=open-settings]")
    send(page, "Hello")
    expect(page.locator("#wrong-top_p")).to_have_text("Top-p must be above 0 and at most 1.")
    expect(page.locator("#set-top_p")).to_be_focused()
    expect(page.locator(".message")).to_have_count(0)
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    for name, text in {"top_p": "0.5", "seed": "7", "max_tokens": "3", "system": "Be kind"}.items():
        page.fill(f"#set-{name}", text)
    page.select_option("#set-drafter", "none")
    cut = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    answer_with(page, events("Yes", cut))
    page.press("#prompt", "Enter")
    ended(page)
    expected = {"temperature": 0, "top_p": 0.5, "seed": 7, "max_tokens": 3, "drafter": "none", "medusa": "spans"}
    said = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    assert asked == [{**expected, "stream": True, "messages": said}]
    expect(last(page).locator(".meta")).to_contain_text("most tokens that are allowed")


def test_the_race_gives_two_rates_and_says_whether_the_texts_are_identical(page: Any) -> None:
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    page.click("#open-settings")
    page.fill("#set-max_tokens", "60")
    page.fill("#set-temperature", "1")
    page.click("#to-race")
    page.click("#race-start")
    expect(page.locator("#verdict")).to_contain_text("The two texts are identical")
    assert [body.get("drafter") for body in asked] == ["none", None]
    assert asked[0]["seed"] == asked[1]["seed"]
    slow, fast = (page.locator(f".lane.{kind} .text").text_content() for kind in ("slow", "fast"))
    assert slow == fast
    assert float(page.locator(".lane.slow .rate").text_content().split()[0]) > 0
    assert page.locator("#race-replay").text_content() == "Watch both side by side"
    page.click("#race-replay")
    expect(page.locator("#race-replay")).to_have_text("Watch both side by side")
    assert page.locator(".lane.fast .text").text_content() == fast


def test_a_race_that_is_under_way_can_be_stopped_and_has_the_server_to_itself(
    page: Any, there: tuple[str, Engine]
) -> None:
    page.click("#to-race")
    with gated(there[1]) as gate:
        page.press("#race-start", "Enter")
        gate.release(4)
        expect(page.locator(".lane.slow .meta")).to_contain_text("tokens per step")
        page.click("#to-chat")
        send(page, "Hello")
        expect(page.locator("#notice")).to_contain_text("The race is under way")
        expect(page.locator(".message")).to_have_count(0)
        page.click("#to-race")
        page.press("#race-stop", "Enter")
        expect(page.locator("#verdict")).to_have_text("You stopped the race.")
        expect(page.locator("#race-start")).to_be_focused()


def test_the_tree_of_each_step_is_drawn(page: Any) -> None:
    page.click("#open-tree")
    page.click("#open-settings")
    page.fill("#set-max_tokens", "40")
    page.click("#open-tree")
    send(page, "Hello")
    ended(page)
    count = int(page.get_attribute("#tree-step", "max"))
    assert count > 3
    expect(page.locator("#tree-caption")).to_contain_text(f"Step {count} of {count}: after")
    page.focus("#tree-drawing")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tree-caption")).to_contain_text(f"Step {count - 1} of {count}: after")
    page.click("#tree-next")
    expect(page.locator("#tree-next")).to_be_disabled()
    accepted = page.locator("#tree-drawing .ring").count()
    nodes = page.locator("#tree-drawing g").count()
    assert 0 < accepted <= nodes
    assert page.locator("#tree-drawing .edge").count() == nodes - 1
    opacities = page.locator("#tree-drawing .node").evaluate_all("all => all.map(n => n.getAttribute('fill-opacity'))")
    assert all(0 < float(opacity) <= 1 for opacity in opacities)
    page.click("#tree-previous")
    page.click("#tree-play")
    expect(page.locator("#tree-play")).to_have_text("Pause")
    expect(page.locator("#tree-play")).to_have_text("Play")  # the last step ends it


HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

[a](javascript:window.hacked=3) [b](data:text/html,x) ![c](https://evil.example/x.png) [d](https://good.example/)

| <b>x</b> | y |
|---|---|
| <svg onload="window.hacked=4"> | `<i>` |

```html"onload="window.hacked=5
</code></pre><script>window.hacked = 6</script>
```
"""


def test_what_a_model_writes_never_becomes_markup(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    tree = {
        "tokens": ["<b>", "</title><script>window.hacked=7</script>"],
        "parents": [-1, 0],
        "probabilities": [1, 0.5],
    }
    detail = {"spans": [], "tokens": 0, "tree": {**tree, "sources": ["model", '"><b>'], "path": [0, 1]}}
    answer_with(page, events(*HOSTILE.splitlines(keepends=True), {"choices": [], "medusa": detail}))
    page.click("#open-tree")
    send(page, "<b>bold</b><script>window.hacked = 8</script>")
    ended(page)
    text = last(page).locator(".text")
    for piece in ("<script>window.hacked = 1</script>", "<b>x</b>", "<script>window.hacked = 6</script>", "![c]"):
        expect(text).to_contain_text(piece)
    assert text.locator("script, img, svg, b, i").count() == 0
    hrefs = text.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert hrefs == ["https://evil.example/x.png", "https://good.example/"]
    expect(page.locator("#chats .title")).to_contain_text("<b>bold</b>")
    expect(page.locator("#tree-caption")).to_contain_text("</title><script>")
    assert page.evaluate("window.hacked") is None
    assert not [url for url in asked if "example" in url]


@pytest.mark.parametrize(
    ("status", "body", "headers", "said", "kept"),
    [
        (429, "{}", {"retry-after": "3"}, "The server is busy: try again in 3 seconds.", ""),
        (500, '{"error":{"message":"see the log"}}', {}, "The server failed (see the log): try again.", ""),
        (200, events("Half", {"error": {"message": "it broke"}}, end=""), {}, "broke off (it broke)", "Half"),
        (200, events("Half", end=""), {}, "The connection was lost", "Half"),
    ],
)  # fmt: skip
def test_an_error_is_told_and_the_text_so_far_is_kept(
    page: Any, status: int, body: str, headers: dict[str, str], said: str, kept: str
) -> None:
    answer_with(page, body, status, **headers)
    send(page, "Hello")
    ended(page)
    expect(last(page).locator(".trouble")).to_contain_text(said)
    expect(last(page).locator(".text")).to_have_text(kept)
    answer_with(page, events("All ", "of it"))
    last(page).get_by_role("button", name="Try again").click()
    expect(last(page).locator(".text")).to_have_text("All of it")
    expect(last(page).locator(".trouble")).to_be_hidden()
    expect(page.locator(".message")).to_have_count(2)


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any) -> None:
    with listening(keys=["key-1"]) as (url, _), tab(browser, url.removesuffix("v1")) as page:
        expect(page.locator("#key-dialog")).to_be_visible()
        expect(page.locator("#key-input")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-text")).to_contain_text("does not know the key")
        page.keyboard.type("key-1")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        assert page.evaluate("[sessionStorage.length, localStorage.getItem('medusa.key')]") == [1, None]
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny")
        page.evaluate("sessionStorage.clear()")
        page.reload()
        page.click("#key-cancel")
        expect(page.locator("#notice")).to_contain_text("wants a key")
        send(page, "Hello")
        page.fill("#key-input", "key-1")
        page.keyboard.press("Enter")
        expect(last(page).locator(".meta")).to_contain_text("tokens/s")


def test_conversations_last_are_renamed_exported_and_deleted(page: Any) -> None:
    answer_with(page, events("Yes"))
    for text in ("first", "second"):
        page.click("#new-chat")
        send(page, text)
        ended(page)
    page.evaluate("localStorage.setItem('medusa.chat.bad', '{')")
    page.reload()
    titles = page.locator("#chats .title")
    expect(titles).to_have_text(["second", "first", "Damaged conversation"])
    titles.nth(2).click()
    expect(page.locator("#chats .mark")).to_contain_text("cannot be read")
    titles.nth(1).click()
    expect(page.locator(".message .body")).to_have_text(["first", "Yes"])
    page.get_by_role("button", name="Rename: first").click()
    page.keyboard.type("A new name")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["A new name", "second", "Damaged conversation"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export: A new name").click()
    assert download.value.suggested_filename == "medusa-A-new-name.json"
    kept = json.loads(download.value.path().read_text())["conversations"][0]
    assert [message["content"] for message in kept["messages"]] == ["first", "Yes"]
    page.get_by_role("button", name="Delete: A new name").click()
    page.keyboard.press("Escape")
    expect(titles).to_have_count(3)
    page.get_by_role("button", name="Delete: A new name").click()
    page.click("#confirm-yes")
    expect(titles).to_have_text(["second", "Damaged conversation"])
    page.reload()
    expect(titles).to_have_text(["second", "Damaged conversation"])


def test_a_full_storage_loses_nothing_while_the_page_is_open(page: Any) -> None:
    answer_with(page, events("Yes"))
    send(page, "kept")
    ended(page)
    page.evaluate("for (let n = 2 ** 22; n >= 1; n /= 2) try { localStorage['x' + n] = 'x'.repeat(n) } catch {}")
    page.click("#new-chat")
    send(page, "not kept")
    ended(page)
    expect(page.locator("#notice")).to_contain_text("storage is full")
    titles = page.locator("#chats .title")
    titles.nth(1).click()
    expect(page.locator(".message .body")).to_have_text(["kept", "Yes"])
    titles.nth(0).click()
    expect(page.locator(".message .body")).to_have_text(["not kept", "Yes"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, there: tuple[str, Engine], scheme: str) -> None:
    with tab(browser, there[0], viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
        wide = "| " + " | ".join(["column"] * 30) + " |\n" + "|---" * 30 + "|\n"
        long = ["x" * 300, "\n\n", wide, "\n```\n" + "y" * 300 + "\n```\n", "https://x.org/" + "z" * 200]
        answer_with(page, events(*long))
        send(page, "w" * 300)
        ended(page)
        overflow = "[document.documentElement.scrollWidth, document.getElementById('log').scrollWidth]"
        assert max(page.evaluate(overflow)) <= 390
        for opener in ("open-tree", "open-settings", "open-sidebar", "to-race"):
            page.click(f"#{opener}")
            assert max(page.evaluate(overflow)) <= 390
            outside = "all => all.filter(e => e.getBoundingClientRect().right > 391).map(e => e.id)"
            assert page.locator("button:visible, input:visible, textarea:visible").evaluate_all(outside) == []


def test_everything_that_can_be_pressed_is_reached_by_keyboard_and_has_a_name(page: Any) -> None:
    answer_with(page, events("Yes\n\n```\nx\n```"))
    send(page, "Hello")
    ended(page)
    page.click("#open-tree")
    page.evaluate("document.activeElement.blur(); document.getElementById('skip').focus()")
    reached = set()
    mark = """(() => {
        const element = document.activeElement;
        return [element.id || element.textContent || element.tagName, getComputedStyle(element).outlineStyle];
    })()"""
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(mark)
        assert outline != "none" or name.startswith("\n"), name  # the body, after the last
        reached.add(name)
    wanted = {
        "new-chat",
        "prompt",
        "send",
        "colours",
        "to-race",
        "open-settings",
        "Copy",
        "Edit",
        "Answer again",
        "Rename",
    }
    assert wanted <= reached
    nameless = """all => all.map(e => [e.id, e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length])
        .filter(([, name]) => !name)"""
    assert page.locator("button, input, select, textarea").evaluate_all(nameless) == []
