// Markdown -> a tree of blocks. Pure data: no part of it is markup, and `render.js` builds elements of a fixed set from
// it. Every text is a slice [from, to) of the source, so that the page can tell who wrote which character.
//
// What models write is read: headings, lists, quotes, tables, rules, code, emphasis, links. HTML, images and references
// are not: they stay the text that they are.

import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})[.)])(?:([ \t]+)(?=\S)|[ \t]*$)/;
const QUOTE = /^ {0,3}> ?/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 12; // of quotes and lists in each other; what is deeper stays text

// [{ type, from, to, ... }]: from and to are where the block stands in the source.
export function parse(source) {
  const lines = [];
  for (let from = 0; from <= source.length; ) {
    const end = source.indexOf("\n", from);
    const to = end < 0 ? source.length : end;
    lines.push({ from, to: source[to - 1] === "\r" && to > from ? to - 1 : to });
    from = to + 1;
  }
  return blocks(source, lines, 0);
}

const textOf = (source, line) => source.slice(line.from, line.to);
const blank = (source, line) => textOf(source, line).trim() === "";

function blocks(source, lines, depth) {
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (blank(source, lines[i])) {
      i += 1;
      continue;
    }
    const [block, next] = blockAt(source, lines, i, depth);
    found.push({ ...block, from: lines[i].from, to: lines[next - 1].to });
    i = next;
  }
  return found;
}

function blockAt(source, lines, i, depth) {
  const text = textOf(source, lines[i]);
  if (FENCE.test(text)) return code(source, lines, i);
  if (HEADING.test(text)) return [heading(source, lines[i]), i + 1];
  if (RULE.test(text)) return [{ type: "rule" }, i + 1];
  if (depth < DEEPEST && QUOTE.test(text)) return quote(source, lines, i, depth);
  if (depth < DEEPEST && ITEM.test(text)) return list(source, lines, i, depth);
  if (isTable(source, lines, i)) return table(source, lines, i);
  return paragraph(source, lines, i, depth);
}

function code(source, lines, i) {
  const [, mark, language] = FENCE.exec(textOf(source, lines[i]));
  const indent = indentOf(textOf(source, lines[i]));
  const close = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*$`);
  const body = [];
  let next = i + 1;
  for (; next < lines.length && !close.test(textOf(source, lines[next])); next += 1) {
    const { from, to } = lines[next];
    body.push({ from: from + Math.min(indent, indentOf(textOf(source, lines[next]))), to });
  }
  // While it streams it may not be closed yet.
  return [{ type: "code", language: language.slice(0, 40), lines: body }, Math.min(next + 1, lines.length)];
}

const indentOf = (text) => text.length - text.trimStart().length;

function heading(source, line) {
  const text = textOf(source, line);
  const [start, marks] = HEADING.exec(text);
  const rest = text.slice(start.length).replace(/(?:^|[ \t]+)#*[ \t]*$/, "");
  const from = line.from + start.length;
  return { type: "heading", level: marks.length, content: inline(source, from, from + rest.length) };
}

function quote(source, lines, i, depth) {
  const inner = [];
  let next = i;
  for (; next < lines.length; next += 1) {
    const mark = QUOTE.exec(textOf(source, lines[next]));
    if (!mark) break;
    inner.push({ from: lines[next].from + mark[0].length, to: lines[next].to });
  }
  return [{ type: "quote", blocks: blocks(source, inner, depth + 1) }, next];
}

function list(source, lines, i, depth) {
  const kind = (mark) => mark[3] === undefined ? mark[2] : mark[2].at(-1);
  const first = ITEM.exec(textOf(source, lines[i]));
  const items = [];
  let loose = false;
  let next = i;
  for (let mark = first; mark && kind(mark) === kind(first); ) {
    if (RULE.test(textOf(source, lines[next]))) break;
    const [inner, after, apart] = itemAt(source, lines, next, mark);
    items.push(blocks(source, inner, depth + 1));
    loose ||= apart;
    next = after;
    let following = next;
    while (following < lines.length && blank(source, lines[following])) following += 1;
    mark = following < lines.length ? ITEM.exec(textOf(source, lines[following])) : null;
    if (mark && kind(mark) === kind(first) && following > next) loose = true;
    if (mark && kind(mark) === kind(first)) next = following;
  }
  return [{ type: "list", start: first[3] === undefined ? null : Number(first[3]), loose, items }, Math.max(next, i + 1)];
}

// The lines of one item, without its mark and indent; the line after it; whether a blank line parts it.
function itemAt(source, lines, i, mark) {
  const gap = mark[4] === undefined || mark[4].length > 4 ? 1 : mark[4].length; // more is code, which is kept as text
  const width = mark[1].length + mark[2].length + gap;
  const from = Math.min(lines[i].from + width, lines[i].to);
  const inner = [{ from, to: lines[i].to }];
  let apart = false;
  let next = i + 1;
  for (; next < lines.length; next += 1) {
    const text = textOf(source, lines[next]);
    if (text.trim() === "") {
      inner.push({ from: lines[next].to, to: lines[next].to });
      continue;
    }
    const indent = indentOf(text);
    const parted = blank(source, lines[next - 1]);
    // Models indent what belongs to an item by two or three columns, whatever its mark.
    if (indent >= mark[1].length + 2) {
      apart ||= parted;
      inner.push({ from: lines[next].from + Math.min(indent, width), to: lines[next].to });
    } else if (!parted && !starts(source, lines, next)) {
      inner.push({ from: lines[next].from + indent, to: lines[next].to });
    } else break;
  }
  while (next > i + 1 && blank(source, lines[next - 1])) {
    next -= 1;
    inner.pop();
  }
  return [inner, next, apart];
}

// Whether a line ends the paragraph before it.
function starts(source, lines, i) {
  const text = textOf(source, lines[i]);
  return text.trim() === "" || [FENCE, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(text));
}

const isTable = (source, lines, i) =>
  i + 1 < lines.length && textOf(source, lines[i]).includes("|") && textOf(source, lines[i + 1]).includes("-") &&
  DELIMITER.test(textOf(source, lines[i + 1])) &&
  cells(source, lines[i]).length === cells(source, lines[i + 1]).length;

// Slices of a row's cells, without the space around them.
function cells(source, line) {
  const found = [];
  let { from } = line;
  const add = (to) => {
    while (from < to && /\s/.test(source[from])) from += 1;
    let end = to;
    while (end > from && /\s/.test(source[end - 1])) end -= 1;
    found.push({ from, to: end });
  };
  for (let i = line.from; i < line.to; i += 1) {
    if (source[i] === "\\") i += 1;
    else if (source[i] === "|") {
      add(i);
      from = i + 1;
    }
  }
  add(line.to);
  if (found.length > 1 && found[0].from === found[0].to) found.shift();
  if (found.length > 1 && found.at(-1).from === found.at(-1).to) found.pop();
  return found;
}

function table(source, lines, i) {
  const align = cells(source, lines[i + 1]).map(({ from, to }) => {
    const [left, right] = [source[from] === ":", source[to - 1] === ":"];
    return right ? (left ? "center" : "right") : "left";
  });
  const row = (line) => {
    const found = cells(source, line).map(({ from, to }) => inline(source, from, to));
    return align.map((_, column) => found[column] ?? []);
  };
  const rows = [];
  let next = i + 2;
  for (; next < lines.length && textOf(source, lines[next]).includes("|"); next += 1) rows.push(row(lines[next]));
  return [{ type: "table", align, head: row(lines[i]), rows }, next];
}

function paragraph(source, lines, i, depth) {
  let next = i + 1;
  while (next < lines.length && !starts(source, lines, next) && !isTable(source, lines, next)) next += 1;
  const content = [];
  for (const line of joined(source, lines.slice(i, next), depth)) content.push(...line);
  return [{ type: "paragraph", content }, next];
}

// Emphasis may run over lines. Where they follow each other in the source they are read as one text.
function joined(source, lines, depth) {
  const from = lines[0].from + indentOf(textOf(source, lines[0]));
  if (depth === 0) return [inline(source, from, lines.at(-1).to)];
  return lines.map((line, index) => {
    const start = index === 0 ? from : line.from;
    const read = inline(source, start, line.to);
    return index + 1 < lines.length ? [...read, { type: "break" }] : read;
  });
}
