import assert from "node:assert/strict";
import { test } from "node:test";
import { inner, newRoot } from "./fake_dom.mjs";

const { Painter, Rendered } = await import("../../src/medusa/serve/page/render.js");
const { safeAddress } = await import("../../src/medusa/serve/page/inline.js");

function shown(source, spans = []) {
  const root = newRoot();
  new Rendered(root).show(source, spans);
  return root;
}

// Without the frame of code blocks and tables, which is ours.
const markup = (source, spans) => inner(shown(source, spans))
  .replace(/<figure class="code"><figcaption><span>(.*?)<\/span>.*?<\/figcaption>(.*?)<\/figure>/gs, "[$1]$2")
  .replace(/<div class="wide">(.*?)<\/div>/gs, "$1");

const link = (href, text) => `<a href="${href}">${text}</a>`;

for (const [source, wanted] of [
  ["", ""],
  ["one\ntwo\n\nthree", "<p>one<br></br>two</p><p>three</p>"],
  ["one\r\n\r\ntwo\r\n", "<p>one</p><p>two</p>"],
  ["# A #\n###### B\n####### C\n#D", "<h3>A</h3><h6>B</h6><p>####### C<br></br>#D</p>"],
  ["a\n***\nb", "<p>a</p><hr></hr><p>b</p>"],
  ["*a* _b_ **c** __d__ ***e*** ~~f~~", "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <em><strong>e</strong></em> <del>f</del></p>"],
  ["**a *b***", "<p><strong>a <em>b</em></strong></p>"],
  ["3 * 4 * 5, snake_case_name, 2 ** 3, ~a~, **open", "<p>3 * 4 * 5, snake_case_name, 2 ** 3, ~a~, **open</p>"],
  ["*over\ntwo lines*", "<p><em>over<br></br>two lines</em></p>"],
  ["`a*b*` ``c`d`` `open", "<p><code>a*b*</code> <code>c`d</code> `open</p>"],
  ["\\*a\\* \\\\ \\q", "<p>*a* \\ \\q</p>"],
  ["- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"],
  ["  1. a\n  2. b", "<ol><li>a</li><li>b</li></ol>"],
  ["1. a\n   more\n2. b\n\n3. c", "<ol><li><p>a<br></br>more</p></li><li><p>b</p></li><li><p>c</p></li></ol>"],
  ["7) a\n8) b\n\n- c", '<ol start="7"><li>a</li><li>b</li></ol><ul><li>c</li></ul>'],
  ["1. a\n   ```py\n   x = 1\n     y\n   ```\n2. b", "<ol><li>a[py]<pre><code>x = 1\n  y</code></pre></li><li>b</li></ol>"],
  ["> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"],
  ["```js\n<b>&amp;\n\n```\nafter", "[js]<pre><code><b>&amp;\n</code></pre><p>after</p>"],
  ["~~~\nopen\n``` still", "[code]<pre><code>open\n``` still</code></pre>"],
  ["| a | b |\n|---|--:|\n| *1* | 2 |\n| 3 |\n\nc", '<table><thead><tr><th class="to-left">a</th><th class="to-right">b</th></tr></thead><tbody><tr><td class="to-left"><em>1</em></td><td class="to-right">2</td></tr><tr><td class="to-left">3</td><td class="to-right"></td></tr></tbody></table><p>c</p>'],
  ["a | b\nno table", "<p>a | b<br></br>no table</p>"],
  ["[a *b*](https://x.org/p_(q)?a=1 \"t\") [c] [d](e", `<p>${link("https://x.org/p_(q)?a=1", "a <em>b</em>")} [c] [d](e</p>`],
  ["see https://x.org/a_b_c. <mailto:a@x.org>", `<p>see ${link("https://x.org/a_b_c", "https://x.org/a_b_c")}. ${link("mailto:a@x.org", "mailto:a@x.org")}</p>`],
  ["[ [a](https://x.org/)", `<p>[ ${link("https://x.org/", "a")}</p>`],
  ["[![i](https://x.org/i.png)](https://x.org/)", `<p>${link("https://x.org/", "![i](https://x.org/i.png)")}</p>`],
]) {
  test(`Markdown: ${JSON.stringify(source).slice(0, 60)}`, () => assert.equal(markup(source), wanted));
}

const HOSTILE = [
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "</pre></div><svg onload=alert(1)>",
  "`<iframe srcdoc='<script>1</script>'>`",
  "```html\n<script>alert(1)</script>\n```",
  "```\"><script>alert(1)</script>\nx\n```",
  "# <b onclick=alert(1)>x</b>",
  "| <i> | b |\n|---|---|\n| <script> | \"onclick=\" |",
  "[x](javascript:alert(1)) [x](JaVaScRiPt:alert(1)) [x](java\nscript:alert(1)) [x](java\tscript:1)",
  "[x](data:text/html,<script>1</script>) [x](vbscript:1) [x](file:///etc/passwd) [x](blob:https://x/1)",
  "[x](//evil.example) [x](/v1/models) [x](?a) [x](#a) [x](\\\\evil) [x](https:evil) [x](https:///evil)",
  "<javascript:alert(1)> <data:text/html,1> javascript:alert(1)",
  "[<img src=x>](https://x.org/\"onmouseover=\"alert(1))",
  "![x](https://evil.example/secret.png) ![x](javascript:1)",
  "&lt;script&gt; &#x3c;script&#x3e; &amp;",
  "[a]: javascript:alert(1)\n\n[a]",
  "<style>*{display:none}</style><link rel=stylesheet href=//evil><base href=//evil><meta http-equiv=refresh>",
  "__proto__ **constructor** [toString](https://x.org/__proto__)",
  "\u202egnp.exe\u0000\u001b[31m\ud800",
];

const ELEMENTS = new Set(["p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "em", "strong", "del", "code", "pre", "a", "br", "hr",
  "blockquote", "figure", "figcaption", "span", "button", "div", "table", "thead", "tbody", "tr", "th", "td"]);
const ATTRIBUTES = new Set(["class", "href", "rel", "target", "title", "type", "tabindex", "role", "scope", "start",
  "aria-label", "aria-live"]);

for (const source of HOSTILE) {
  test(`hostile text stays text: ${JSON.stringify(source).slice(0, 60)}`, () => {
    for (const element of shown(source, [["<b>", 3], ["ngram", source.length]]).all()) {
      assert.ok(ELEMENTS.has(element.name), element.name);
      for (const name of Object.keys(element.attributes)) assert.ok(ATTRIBUTES.has(name), name);
      if (element.name === "a") assert.match(element.attributes.href, /^https:\/\/[a-z.]+\//);
      if (element.attributes.class) assert.match(element.attributes.class, /^[a-z -]+$/);
    }
  });
}

test("nothing that was written in plain lines is lost", () => {
  for (const source of HOSTILE.slice(0, 3)) assert.equal(shown(source).textContent, source);
});

test("addresses are http, https or mailto, or no links", () => {
  assert.equal(safeAddress("HTTPS://X.org/a b"), null);
  assert.equal(safeAddress("HTTPS://X.org/ä"), "https://x.org/%C3%A4");
  assert.equal(safeAddress("http://[bad"), null);
  for (const bad of ["", "x", "ftp://x.org", "mailto:", "https://", "http://\\evil", "\u0001https://x.org", "https://x\u200b.org"])
    assert.equal(safeAddress(bad), null, bad);
});

test("who drafted a piece is marked across emphasis, code and lines, and the model's own is not", () => {
  const source = "ab **cd** ef\n\n```\ngh\nij\n```";
  const spans = [["heads", 4], ["model", 2], ["ngram", 2], ["model", 11], ["grammar", 3], ["model", 5]];
  const by = (name, text) => `<span class="by by-${name}">${text}</span>`;
  assert.equal(markup(source, spans),
    `<p>${by("heads", "ab ")}<strong>c${by("ngram", "d")}</strong> ef</p>` +
    `[code]<pre><code>${source.slice(18, 19)}${by("grammar", "h")}\n${by("grammar", "i")}j</code></pre>`);
});

test("pieces of any slice join to it, whatever the spans say", () => {
  const source = "0123456789";
  for (const spans of [[], [["a", 3]], [["a", 0], ["b", 4], ["c", 0], ["d", 99]], [["a", 10]]])
    for (let from = 0; from <= 10; from += 1)
      for (let to = from; to <= 10; to += 1) {
        const pieces = new Painter(source, spans).pieces(from, to);
        assert.equal(pieces.map(([text]) => text).join(""), source.slice(from, to));
      }
});

test("an answer that grows keeps the elements of what does not change", () => {
  const root = newRoot();
  const rendered = new Rendered(root);
  rendered.show("one\n\ntw");
  const [first, second] = root.childNodes;
  rendered.show("one\n\ntwo\n\n- x");
  assert.equal(root.childNodes[0], first);
  assert.notEqual(root.childNodes[1], second);
  assert.equal(inner(root), "<p>one</p><p>two</p><ul><li>x</li></ul>");
});

test("every beginning of a text is shown as the whole of that beginning would be", () => {
  const source = "# T\n\n1. a **b**\n   - c\n\n> q\n\n| a | b |\n|--|--|\n| `1` | 2 |\n\n```py\nx\n```\n[l](https://x.org/) e";
  const root = newRoot();
  const rendered = new Rendered(root);
  for (let end = 0; end <= source.length; end += 1) {
    rendered.show(source.slice(0, end));
    assert.equal(inner(root), inner(shown(source.slice(0, end))));
  }
});

test("long and deep texts come to an end", () => {
  for (const piece of ["[", "*a ", "`", "> ", "- ", "**", "*`", "_a", "[a](", "| ", "~~a", "<", "1. ", "\\", "![", "[a", "`` `"])
    for (const join of ["", "\n"]) {
      const source = Array.from({ length: 3000 }, () => piece).join(join);
      assert.ok(shown(source).textContent.length <= source.length + 3000 * 20);
    }
});
