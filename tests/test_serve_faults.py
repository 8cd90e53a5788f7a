# ruff: noqa: E402  # the server's packages are an extra: without them these tests are skipped
"""Whatever is sent, the server tells what is wrong with it, and goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package)

from serving import Client, server

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
BODIES = {
    "nothing": b"",
    "cut JSON": b'{"messages":[{"role":"us',
    "a list": b"[1]",
    "all bytes": bytes(range(256)),
    "invalid UTF-8": b'{"prompt":"\xff\xfe\xc0"}',
    "10 MB": b'{"prompt":"' + b"a" * 10_000_000 + b'"}',
    "deep lists": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a long number": b'{"max_tokens":' + b"9" * 5000 + b"}",
}
NUMBERS = ["-1", "1e999", "-1e999", "NaN", "1" + "0" * 400, "-" + "9" * 4000, "2.5", "true", '"1"', "[]", "{}", "9e18"]
FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "stop", "logprobs", "top_logprobs"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stream", "drafter", "epsilon"),
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with server(max_tokens=4) as client:
        yield client


def refused(client: Client, path: str, body: bytes) -> int:
    """The status; an error has OpenAI's shape."""
    answer = client.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
    return answer.status_code


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_broken_body_is_refused_and_the_next_answer_is_whole(client: Client, path: str, body: bytes) -> None:
    assert refused(client, path, body) in (400, 413)
    assert client.chat(max_tokens=2)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("field", FIELDS)
def test_a_number_of_any_size_and_kind_is_taken_or_refused(client: Client, field: str) -> None:
    for number in NUMBERS:
        given = f'"max_tokens":2,"{field}":{number}' if field != "max_tokens" else f'"max_tokens":{number}'
        refused(client, ROUTES[0], f'{{"messages":[{{"role":"user","content":"Hi"}}],"seed":1,{given}}}'.encode())


def test_a_schema_of_any_kind_is_compiled_or_refused(client: Client) -> None:
    deep = b'{"type":"object","properties":{"a":' * 60 + b"{}" + b"}}" * 60
    head = b'{"messages":[{"role":"user","content":"Hi"}],"response_format":{"type":"json_schema","json_schema":'
    for schema in (deep, b'{"$ref":"#"}', b'{"enum":[]}', b'{"pattern":"(a"}', b'{"minimum":1e400}', b"{}", b"[]"):
        refused(client, ROUTES[0], head + b'{"name":"x","schema":' + schema + b"}}}")
