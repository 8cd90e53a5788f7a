import assert from "node:assert/strict";
import { test } from "node:test";

const { DEFAULTS, Settings, messages, read } = await import("../../src/medusa/serve/page/settings.js");
const { Store, titleOf } = await import("../../src/medusa/serve/page/store.js");
const { described, layout, tokenLabel } = await import("../../src/medusa/serve/page/treelayout.js");

// As the browser's, of a size.
class FakeStorage {
  constructor(room = 1e6) {
    this.kept = new Map();
    this.room = room;
  }
  get length() {
    return this.kept.size;
  }
  key(index) {
    return [...this.kept.keys()][index] ?? null;
  }
  getItem(key) {
    return this.kept.get(key) ?? null;
  }
  setItem(key, text) {
    if (text.length > this.room) throw new DOMException("full", "QuotaExceededError");
    this.kept.set(key, text);
  }
  removeItem(key) {
    this.kept.delete(key);
  }
}

const talk = (id, text = "hello", more = {}) => ({ id, title: titleOf(text), messages: [{ role: "user", content: text }], ...more });

test("a conversation is kept, found again, exported and deleted", () => {
  const storage = new FakeStorage();
  const store = new Store(storage);
  assert.equal(store.put(talk("a", "hi", { messages: [{ role: "assistant", content: "x", spans: [["heads", 1]] }] })), true);
  storage.setItem("another", "thing");
  const again = new Store(storage);
  assert.deepEqual(again.list().map(({ id, title, damaged }) => [id, title, damaged]), [["a", "hi", false]]);
  assert.deepEqual(again.get("a").messages[0].spans, [["heads", 1]]);
  const { format, conversations } = JSON.parse(JSON.stringify(again.export(["a"])));
  assert.deepEqual([format, conversations[0].title], ["medusa-conversations", "hi"]);
  again.remove("a");
  assert.deepEqual([store.list(), store.get("a"), storage.length], [[], null, 1]);
});

test("one that is damaged harms no other, and is still exported as it is", () => {
  const storage = new FakeStorage();
  const store = new Store(storage);
  store.put(talk("good"));
  const bad = ['{"id":', "null", "3", '{"messages":3}', '{"messages":[{"role":"system","content":"x"}]}', '{"messages":[{"role":"user"}]}'];
  bad.forEach((text, index) => storage.setItem(`medusa.chat.bad${index}`, text));
  const list = store.list();
  assert.equal(list.length, bad.length + 1);
  assert.deepEqual(list.filter(({ damaged }) => !damaged).map(({ id }) => id), ["good"]);
  assert.equal(store.get("bad0"), null);
  assert.equal(store.export(["bad0"]).conversations[0].damaged, bad[0]);
});

test("parts of a conversation that make no sense are left out", () => {
  const storage = new FakeStorage();
  storage.setItem("medusa.chat.a", JSON.stringify({ id: "other", changed: "x", title: " ",
    messages: [{ role: "assistant", content: "x", spans: [["a", -1]], totals: 3, trouble: {} }] }));
  assert.deepEqual(new Store(storage).get("a"),
    { id: "a", changed: 0, title: "Conversation", messages: [{ role: "assistant", content: "x" }] });
});

test("where the storage is full the conversation lives on in the page, and the others stay", () => {
  const storage = new FakeStorage(300);
  const store = new Store(storage);
  assert.equal(store.put(talk("a")), true);
  assert.equal(store.put(talk("b", "x".repeat(400))), false);
  assert.deepEqual(store.list().map(({ id, unsaved }) => [id, unsaved]).sort(), [["a", false], ["b", true]]);
  assert.equal(store.get("b").messages[0].content.length, 400);
  assert.equal(store.put(talk("b", "short")), true);
  assert.deepEqual(store.list().filter(({ unsaved }) => unsaved), []);
});

test("without any storage all is kept as long as the page", () => {
  const store = new Store(null);
  assert.deepEqual([store.list(), store.put(talk("a")), store.get("a").title, store.list().length], [[], false, "hello", 1]);
  store.remove("a");
  assert.deepEqual(store.list(), []);
  assert.equal(new Settings(null).fields.max_tokens, DEFAULTS.max_tokens);
});

test("settings are read into a request, and each that is wrong is told", () => {
  assert.deepEqual(read(DEFAULTS), { body: { temperature: 0, max_tokens: 512 }, errors: {} });
  const all = { temperature: " 0.7", top_p: ".9", top_k: "40", min_p: "1e-2", seed: "0", max_tokens: "9", drafter: "none" };
  assert.deepEqual(read(all).body, { temperature: 0.7, top_p: 0.9, top_k: 40, min_p: 0.01, seed: 0, max_tokens: 9, drafter: "none" });
  const wrong = { temperature: "-1", top_p: "0", top_k: "1.5", min_p: "1", seed: "9007199254740993", max_tokens: "0", drafter: "x" };
  assert.deepEqual(Object.keys(read(wrong).errors), Object.keys(wrong));
  for (const text of ["x", "0x10", "1,5", "Infinity", "1e999", "--1", "1e-9"])
    assert.match(read({ temperature: text }).errors.temperature, /^Temperature must be .*\.$/, text);
});

test("settings last, and those that make no sense do not", () => {
  const storage = new FakeStorage();
  new Settings(storage).set("top_p", "0.5");
  assert.equal(new Settings(storage).fields.top_p, "0.5");
  storage.setItem("medusa.settings", '{"top_p":3,"seed":"7","x":"y"}');
  const { fields } = new Settings(storage);
  assert.deepEqual([fields.top_p, fields.seed, fields.x], ["", "7", undefined]);
  storage.setItem("medusa.settings", "{");
  assert.deepEqual(new Settings(storage).fields, DEFAULTS);
});

test("roles take turns in what is sent, and an answer of which nothing came is not sent", () => {
  const user = (content) => ({ role: "user", content });
  assert.deepEqual(messages(" ", [user("a"), { role: "assistant", content: "", trouble: "x" }, user("b")]), [user("a\n\nb")]);
  assert.deepEqual(messages("be", [{ ...user("a"), spans: [] }]), [{ role: "system", content: "be" }, user("a")]);
});

const TREE = {
  tokens: ["a", " b", "\n", "c", "d"], parents: [-1, 0, 0, 1, 2], probabilities: [1, 0.9, 0.5, 0.4, 1.2],
  sources: ["model", "heads", "ngram", "heads", "ngram"], path: [0, 2, 4],
};

test("a tree stands by depth, its accepted branch on top, and no two nodes share a place", () => {
  const { nodes, width, height } = layout(TREE);
  assert.deepEqual(nodes.map(({ depth }) => depth), [0, 1, 1, 2, 2]);
  assert.deepEqual(nodes.filter(({ accepted }) => accepted).map(({ y }) => y), [16, 16, 16]);
  assert.equal(new Set(nodes.map(({ x, y }) => `${x} ${y}`)).size, 5);
  assert.ok(nodes.every(({ x, y, width: own, probability }) => x + own < width && y < height && probability <= 1));
  assert.equal(nodes[2].label, "⏎");
});

test("a chain of 20,000 nodes is laid out too", () => {
  const tokens = Array.from({ length: 20000 }, () => "x");
  const chain = { tokens, parents: tokens.map((_, i) => i - 1), probabilities: tokens.map(() => 1), sources: tokens, path: [0] };
  assert.equal(layout(chain).nodes.at(-1).depth, 19999);
});

test("labels show what cannot be seen, and do not grow", () => {
  assert.deepEqual([" a", "", "\u202e", "abcdefghijklmn", "𝄞".repeat(12)].map(tokenLabel),
    ["␣a", "∅", "�", "abcdefgh…", `${"𝄞".repeat(8)}…`]);
});

test("a step is described in words", () => {
  assert.equal(described(TREE, 1, 3), "Step 2 of 3: after “a”, 4 drafted, 2 accepted: “⏎”, “d”.");
  assert.match(described({ ...TREE, path: [0] }, 0, 1), /none accepted\.$/);
});
