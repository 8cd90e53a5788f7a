// A tree of Markdown -> elements. Every text goes in as text; names of elements and attributes are those below and no
// others; addresses of links have been checked by `safeAddress`.

import { classOf, nameOf } from "./answer.js";
import { button, copy, el } from "./dom.js";
import { parse } from "./markdown.js";

const COPIED_MS = 1500;

// Shows an answer that grows: blocks that no longer change keep their elements, and with them selection and focus.
export class Rendered {
  #root;
  #shown = []; // the key of each block on the page

  constructor(root) {
    this.#root = root;
  }

  show(source, spans = []) {
    const painter = new Painter(source, spans);
    const blocks = parse(source);
    const keys = blocks.map(({ from, to }) => `${from} ${source.slice(from, to)}`);
    let same = 0;
    while (same < keys.length && keys[same] === this.#shown[same]) same += 1;
    while (this.#root.childNodes.length > same) this.#root.lastChild.remove();
    for (const block of blocks.slice(same)) this.#root.append(blockElement(block, painter));
    this.#shown = keys;
  }
}

// Cuts slices of the source where another drafter begins.
export class Painter {
  #source;
  #ends = []; // where each span ends in the source, and whose it is

  constructor(source, spans) {
    this.#source = source;
    let end = 0;
    for (const [by, length] of spans) this.#ends.push([(end += length), by]);
  }

  text(from, to) {
    return this.#source.slice(from, to);
  }

  // [[text, source or null], ...]
  pieces(from, to) {
    const found = [];
    let [low, high] = [0, this.#ends.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#ends[middle][0] > from) high = middle;
      else low = middle + 1;
    }
    for (; from < to; low += 1) {
      const [end, by] = this.#ends[low] ?? [to, null];
      found.push([this.text(from, Math.min(end, to)), by]);
      from = end;
    }
    return found;
  }

  // What the model decided by itself has no mark, nor has what cannot be seen.
  nodes(from, to) {
    return this.pieces(from, to).map(([text, by]) =>
      by === null || by === "model" || text.trim() === "" ? text
        : el("span", { class: `by ${classOf(by)}`, title: `drafted by: ${nameOf(by)}` }, text));
  }
}

function blockElement(block, painter) {
  switch (block.type) {
    case "heading": // the page's own headings come first
      return el(`h${Math.min(6, block.level + 2)}`, {}, ...inlineNodes(block.content, painter));
    case "paragraph":
      return el("p", {}, ...inlineNodes(block.content, painter));
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, ...block.blocks.map((inner) => blockElement(inner, painter)));
    case "list":
      return listElement(block, painter);
    case "table":
      return tableElement(block, painter);
    default:
      return codeElement(block, painter);
  }
}

function listElement(block, painter) {
  const items = block.items.map((blocks) => {
    // A tight list has no paragraphs in it.
    const children = blocks.flatMap((inner) => inner.type === "paragraph" && !block.loose
      ? inlineNodes(inner.content, painter) : [blockElement(inner, painter)]);
    return el("li", {}, ...children);
  });
  if (block.start === null) return el("ul", {}, ...items);
  return el("ol", { start: block.start === 1 ? null : block.start }, ...items);
}

function tableElement(block, painter) {
  const cell = (name, content, column) =>
    el(name, { class: `to-${block.align[column]}`, scope: name === "th" ? "col" : null },
      ...inlineNodes(content, painter));
  const head = el("tr", {}, ...block.head.map((content, column) => cell("th", content, column)));
  const rows = block.rows.map((row) => el("tr", {}, ...row.map((content, column) => cell("td", content, column))));
  // A wide table scrolls by itself, by keyboard too.
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" },
    el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function codeElement(block, painter) {
  const lines = block.lines.flatMap(({ from, to }, index) => [...(index ? ["\n"] : []), ...painter.nodes(from, to)]);
  const whole = () => block.lines.map(({ from, to }) => painter.text(from, to)).join("\n");
  const copier = button("Copy", async () => {
    copier.textContent = (await copy(whole())) ? "Copied" : "Not allowed here";
    setTimeout(() => {
      copier.textContent = "Copy";
    }, COPIED_MS);
  }, { class: "quiet", "aria-label": "Copy the code" });
  copier.setAttribute("aria-live", "polite");
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", {}, block.language || "code"), copier),
    el("pre", { tabindex: 0 }, el("code", {}, ...lines)));
}

function inlineNodes(nodes, painter) {
  return nodes.flatMap((node) => {
    switch (node.type) {
      case "text":
        return painter.nodes(node.from, node.to);
      case "code":
        return [el("code", {}, ...painter.nodes(node.from, node.to))];
      case "break":
        return [el("br")];
      case "link":
        return [el("a", { href: node.href, rel: "noopener noreferrer nofollow", target: "_blank", title: node.href },
          ...inlineNodes(node.content, painter))];
      default: // "strong", "em" or "del"
        return [el(node.type, {}, ...inlineNodes(node.content, painter))];
    }
  });
}
