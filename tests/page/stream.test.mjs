import assert from "node:assert/strict";
import { test } from "node:test";

const { EventReader, Trouble, ask, events, troubleOf } = await import("../../src/medusa/serve/page/stream.js");
const { Answer, classOf, nameOf, round, shares } = await import("../../src/medusa/serve/page/answer.js");

const encoded = (text) => new TextEncoder().encode(text);

// A server that sends these pieces; an Error among them breaks the connection.
function serving(pieces, { status = 200, headers = {} } = {}) {
  return async () => new Response(new ReadableStream({
    pull(controller) {
      const piece = pieces.shift();
      if (piece === undefined) controller.close();
      else if (piece instanceof Error) controller.error(piece);
      else controller.enqueue(piece);
    },
  }), { status, headers });
}

async function read(pieces, options) {
  const found = [];
  try {
    for await (const event of events({}, { fetcher: serving(pieces, options) })) found.push(event);
  } catch (error) {
    return [found, error];
  }
  return [found, null];
}

const SAID = ': ping\r\n\r\nevent: x\r\ndata: {"a":"ä€𝄞"}\r\n\r\nid: 3\ndata:{"b":\ndata: 2}\n\n\n\ndata: {"c":3}\r\rdata: [DONE]\n\n';

test("events are the same wherever the bytes are cut", async () => {
  const wanted = [{ a: "ä€𝄞" }, { b: 2 }, { c: 3 }];
  const bytes = encoded(SAID);
  for (let cut = 0; cut <= bytes.length; cut += 1)
    assert.deepEqual(await read([bytes.slice(0, cut), bytes.slice(cut)]), [wanted, null]);
  assert.deepEqual(await read(Array.from(bytes, (byte) => Uint8Array.of(byte))), [wanted, null]);
});

test("an event that is not whole is not given", () => {
  const reader = new EventReader();
  assert.deepEqual(reader.push("data: 1\n"), []);
  assert.deepEqual(reader.push("\n"), ["1"]);
  assert.deepEqual(reader.push("data: 2"), []);
});

test("a stream that ends before the server said so has lost its connection", async () => {
  for (const pieces of [[], [encoded('data: {"a":1}\n\n')], [encoded('data: {"a":1}\n\n'), new TypeError("network")]]) {
    const sent = Math.min(1, pieces.length);
    const [found, trouble] = await read(pieces);
    assert.equal(found.length, sent);
    assert.match(trouble.message, /connection was lost.*try again/);
  }
});

test("an error in the middle of a stream is told, after the text so far", async () => {
  const [found, trouble] = await read([encoded('data: {"a":1}\n\ndata: {"error":{"message":"it broke"}}\n\n')]);
  assert.deepEqual(found, [{ a: 1 }]);
  assert.match(trouble.message, /it broke.*text so far is kept/);
  const [, none] = await read([encoded('data: {"error":{}}\n\n')]);
  assert.match(none.message, /broke off; the text/);
});

test("what is no JSON is no answer", async () => {
  const [, trouble] = await read([encoded("data: <html>\n\n")]);
  assert.match(trouble.message, /no answer/);
});

test("a server that cannot be reached, and one that was told to stop", async () => {
  await assert.rejects(ask("x", {}, { fetcher: () => Promise.reject(new TypeError("refused")) }), /connection was lost/);
  const aborted = new DOMException("stopped", "AbortError");
  await assert.rejects(ask("x", {}, { fetcher: () => Promise.reject(aborted) }), (error) => error === aborted);
});

test("each refusal is one sentence that says what to do", async () => {
  const error = (message, more) => ({ error: { message, ...more } });
  for (const [status, body, after, wanted, again] of [
    [401, error("x"), null, /wants a key: enter one/, true],
    [429, error("x"), "7", /busy: try again in 7 seconds/, true],
    [429, null, "1", /in 1 second\./, true],
    [429, "text", "Wed, 21 Oct", /busy: try again soon/, true],
    [503, null, "2", /not ready: try again in 2 seconds/, true],
    [413, null, null, /too long for this server: start a new one/, false],
    [400, error("x", { code: "context_length_exceeded" }), null, /context: start a new one/, false],
    [400, error("top_p must be less", { param: "top_p" }), null, /top_p must be less.*change that setting/, false],
    [400, error("no system", { param: "messages" }), null, /no system.*change the system prompt/, false],
    [404, null, null, /status 404/, false],
    [500, error("see the log"), null, /failed \(see the log\): try again/, true],
    [502, null, null, /status 502: try again/, true],
  ]) {
    const trouble = troubleOf(status, body, after);
    assert.match(trouble.message, wanted);
    assert.equal(trouble.message.split(/[.] /).length, 1);
    assert.equal(trouble.again, again);
  }
  const fetcher = serving([encoded('{"error":{"message":"no"}}')], { status: 429, headers: { "Retry-After": "3" } });
  await assert.rejects(ask("x", {}, { fetcher }), (told) => told instanceof Trouble && told.wait === 3);
});

test("the key and the body are sent where there are some", async () => {
  const asked = [];
  const fetcher = async (path, options) => asked.push([path, options]) && new Response("{}");
  await ask("v1/models", undefined, { fetcher });
  await ask("v1/x", { a: 1 }, { fetcher, key: "k" });
  assert.deepEqual(asked.map(([path, o]) => [path, o.method, o.headers, o.body]), [
    ["v1/models", "GET", {}, undefined],
    ["v1/x", "POST", { Authorization: "Bearer k", "Content-Type": "application/json" }, '{"a":1}'],
  ]);
});

const chunk = (content, spans, tokens, more = {}) =>
  ({ choices: [{ delta: { content }, finish_reason: null }], medusa: { spans, tokens, ...more } });

test("an answer counts its text, its spans, its steps and its rate from the first token on", () => {
  const answer = new Answer(1000);
  assert.deepEqual([answer.rate, answer.perStep, answer.wait], [null, null, null]);
  answer.push({ choices: [{ delta: { role: "assistant", content: "" } }] }, 1100);
  answer.push(chunk("a", [["a", "model"]], 1), 1500);
  answer.push(chunk("bcd", [["b", "heads"], ["c", "heads"], ["d", "model"]], 3, { tree: { tokens: ["a"] } }), 2000);
  answer.push(chunk("", [], 1), 2250); // half a character
  answer.push(chunk("é", [["é", "model"]], 2), 2500);
  assert.equal(answer.text, "abcdé");
  assert.deepEqual(answer.spans, [["model", 1], ["heads", 2], ["model", 2]]);
  assert.deepEqual([answer.tokens, answer.steps, answer.wait, answer.rate, answer.perStep], [7, 3, 0.5, 6, 2]);
  assert.equal(answer.trees.length, 1);
  assert.deepEqual(answer.times, [[0.5, 1], [1, 4], [1.5, 5]]);
  answer.push({ choices: [{ delta: {}, finish_reason: "length" }] }, 2600);
  answer.push({ choices: [], medusa: { steps: 3, tokens_per_step: 2.1, by_drafter: { heads: 2, model: 5 }, seed: 9 } }, 2700);
  const { finish, perStep, seed, steps } = answer.summary();
  assert.deepEqual([finish, perStep, seed, steps], ["length", 2.1, 9, 3]);
});

test("shares are of all tokens, the largest first, and names of strangers are theirs", () => {
  assert.deepEqual(shares({ heads: 1, model: 2, ngram: 1, x: 0 }).map(([by]) => by), ["model", "heads", "ngram"]);
  assert.deepEqual(shares(null), []);
  assert.deepEqual([nameOf("ngram"), nameOf("toString"), classOf("heads"), classOf('"x')], ["n-gram", "toString", "by-heads", "by-other"]);
  assert.deepEqual([round(null), round(NaN), round(1.25, 1)], ["–", "–", "1.3"]);
});
