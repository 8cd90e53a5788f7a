# ruff: noqa: E402  # the server's packages are an extra: without them these tests are skipped
"""The routes of the page: what is served, by which headers, to whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package)

from medusa.serve.site import read_page
from serving import Client, server

FILES = Path(__file__).parent.parent / "src" / "medusa" / "serve" / "page"
NAMES = sorted(file.name for file in FILES.iterdir())


@pytest.fixture(scope="module")
def locked() -> Iterator[Client]:
    with server(keys=["key-1"]) as client:
        yield client


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in NAMES)])
def test_the_page_needs_no_key_and_may_load_nothing_from_elsewhere(locked: Client, path: str) -> None:
    answer = locked.http.get(path)
    assert answer.status_code == 200
    assert answer.content == (FILES / (path.rpartition("/")[2] or "index.html")).read_bytes()
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    kinds = {
        "": "text/html",
        ".html": "text/html",
        ".js": "text/javascript",
        ".css": "text/css",
        ".svg": "image/svg+xml",
    }
    assert answer.headers["content-type"].split(";")[0] == kinds[Path(path).suffix]


def test_a_file_is_sent_again_only_when_it_has_changed(locked: Client) -> None:
    first = locked.http.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = locked.http.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"] != locked.http.get("/").headers["etag"]
    assert locked.http.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200
    head = locked.http.head("/")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["", "nothing.js", "..%2fguard.py", "%2e%2e/guard.py", "app.js%00", "APP.JS"])
def test_nothing_else_is_served(locked: Client, name: str) -> None:
    assert locked.http.get(f"/page/{name}", follow_redirects=False).status_code in (401, 404)


def test_the_page_is_no_part_of_the_api(locked: Client) -> None:
    paths = locked.http.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/page")]
    assert locked.http.post("/").status_code == 405


def test_the_page_names_every_file_and_no_other() -> None:
    named = {"index.html"}
    for name in NAMES:
        text = (FILES / name).read_text(encoding="utf-8")
        named |= set(re.findall(r"""(?:src|href)="page/([^"]+)\"""", text)) | set(
            re.findall(r'from "\./([^"]+)"', text)
        )
    assert named == set(NAMES) == set(read_page())


def test_the_page_has_no_script_or_style_in_its_markup() -> None:
    text = (FILES / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*src=)|javascript:", text)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:for|aria-controls|aria-labelledby|aria-describedby)="([^"]+)"', text):
        assert reference in ids
