// What stands inside a line of Markdown -> leaves and the few elements around them. Every leaf is a slice of the source.

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const DEEPEST = 8; // of emphasis and links in each other
const ADDRESS = /https?:\/\/[^\s<>"'`*]+/y;

// The address if the page may link to it, else null: no script, no data, nothing of this server.
export function safeAddress(text) {
  // Browsers drop control characters and spaces, so that "java\nscript:" would be a script.
  if (/[\u0000-\u0020\u007f-\u009f\u200b-\u200f\u2028-\u202f\u2066-\u2069\ufeff\\]/.test(text)) return null;
  if (!/^(?:https?:\/\/[^/?#]|mailto:.)/i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

// [{ type: "text", from, to } | { type: "code", from, to } | { type: "break" } | { type: "strong" | "em" | "del" |
// "link", content, href? }]
export function inline(source, from, to, depth = 0) {
  const found = [];
  let start = from; // of text that has not been given yet
  const flush = (end) => {
    if (end > start) found.push({ type: "text", from: start, to: end });
  };
  // Where nothing closes a mark once, nothing closes it later: the search is not made again.
  const hopeless = new Set();
  for (let i = from; i < to; ) {
    const element = at(source, i, from, to, depth, hopeless);
    if (element === null) {
      i += 1;
      continue;
    }
    flush(i);
    if (element.node) found.push(element.node);
    i = element.next;
    start = element.keep ?? i;
  }
  flush(to);
  return found;
}

// The element that begins at i: { node, next, keep }; null where there is none. `keep`: text goes on from there.
function at(source, i, from, to, depth, hopeless) {
  const letter = source[i];
  if (letter === "\\" && i + 1 < to && PUNCTUATION.test(source[i + 1])) return { next: i + 2, keep: i + 1 };
  if (letter === "\n") return { node: { type: "break" }, next: skip(source, i + 1, to) };
  if (letter === "`") return codeSpan(source, i, to, hopeless);
  if (depth >= DEEPEST) return null;
  if (letter === "*" || letter === "_" || letter === "~") return emphasis(source, i, from, to, depth, hopeless);
  if (letter === "[") return link(source, i, to, depth);
  if (letter === "<") return angled(source, i, to);
  if (letter === "h" && (i === from || !/\w/.test(source[i - 1]))) return bare(source, i, to);
  return null;
}

function skip(source, i, to) {
  while (i < to && (source[i] === " " || source[i] === "\t")) i += 1;
  return i;
}

const runOf = (source, i, to) => {
  let end = i;
  while (end < to && source[end] === source[i]) end += 1;
  return end - i;
};

function codeSpan(source, i, to, hopeless) {
  const length = runOf(source, i, to);
  const mark = `code ${length}`;
  if (!hopeless.has(mark)) {
    for (let j = i + length; j < to; ) {
      if (source[j] !== "`") {
        j += 1;
        continue;
      }
      const run = runOf(source, j, to);
      if (run === length) {
        let [start, end] = [i + length, j];
        if (end - start > 2 && source[start] === " " && source[end - 1] === " ") [start, end] = [start + 1, end - 1];
        return { node: { type: "code", from: start, to: end }, next: j + run };
      }
      j += run;
    }
    hopeless.add(mark);
  }
  return { next: i + length, keep: i };
}

function emphasis(source, i, from, to, depth, hopeless) {
  const letter = source[i];
  const run = runOf(source, i, to);
  const none = { next: i + run, keep: i };
  const opens = i + run < to && !/\s/.test(source[i + run]);
  const inWord = letter === "_" && i > from && /\w/.test(source[i - 1]);
  if (!opens || inWord || (letter === "~" && run !== 2) || run > 3) return none;
  const mark = letter.repeat(run);
  if (hopeless.has(mark)) return none;
  const end = closing(source, i + run, to, letter, run, hopeless);
  if (end < 0) {
    hopeless.add(mark);
    return none;
  }
  const content = inline(source, i + run, end, depth + 1);
  const type = letter === "~" ? "del" : run === 1 ? "em" : "strong";
  const node = run === 3 ? { type: "em", content: [{ type: "strong", content }] } : { type, content };
  return { node, next: end + run };
}

// Where a run of `length` marks closes; -1 where none does. Code is stepped over.
function closing(source, start, to, letter, length, hopeless) {
  for (let j = start; j < to; ) {
    if (source[j] === "\\") j += 2;
    else if (source[j] === "`") j = codeSpan(source, j, to, hopeless).next;
    else if (source[j] === letter) {
      const run = runOf(source, j, to);
      const after = source[j + run] ?? "";
      const closes = j > start && !/\s/.test(source[j - 1]) && !(letter === "_" && j + run < to && /\w/.test(after));
      if (closes && run === length) return j;
      if (closes && run === 3 && length < 3) return j + 3 - length; // **a *b*** and *a **b***
      j += run;
    } else j += 1;
  }
  return -1;
}

function link(source, i, to, depth) {
  if (source[i - 1] === "!") return null; // an image: its text stays
  let open = 0;
  let close = i;
  for (const most = Math.min(to, i + 1000); close < most; close += 1) {
    if (source[close] === "\\") close += 1;
    else if (source[close] === "[") open += 1;
    else if (source[close] === "]" && (open -= 1) === 0) break;
  }
  if (source[close + 1] !== "(") return null;
  const target = /^\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(
    source.slice(close + 1, Math.min(to, close + 2100)),
  );
  const href = target && safeAddress(target[1]);
  if (!href) return null;
  const content = plain(inline(source, i + 1, close, depth + 1));
  return { node: { type: "link", href, content }, next: close + 1 + target[0].length };
}

// A link in a link is no link.
const plain = (nodes) =>
  nodes.flatMap((node) => node.type === "link" ? plain(node.content)
    : node.content ? [{ ...node, content: plain(node.content) }] : [node]);

function angled(source, i, to) {
  const found = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/i.exec(source.slice(i, Math.min(to, i + 2100)));
  const href = found && safeAddress(found[1]);
  if (!href) return null;
  const content = [{ type: "text", from: i + 1, to: i + 1 + found[1].length }];
  return { node: { type: "link", href, content }, next: i + found[0].length };
}

function bare(source, i, to) {
  ADDRESS.lastIndex = i;
  const found = ADDRESS.exec(source)?.[0].slice(0, to - i).replace(/[.,;:!?\])}]+$/, "");
  const href = found && found.length > 8 && found.length <= 2000 && safeAddress(found);
  if (!href) return null;
  return { node: { type: "link", href, content: [{ type: "text", from: i, to: i + found.length }] }, next: i + found.length };
}
