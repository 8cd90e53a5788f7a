// Where the nodes of a draft tree stand: depth to the right, leaves below each other, a parent beside its first child.

export const HEIGHT = 20; // of a node
const ROW = 27;
const GAP = 18; // between the columns
const EDGE = 6; // of ground around all
const LETTER = 7.3; // the width of one, in the type of the labels
const SHARE = 29; // what a probability takes
const LONGEST = 9; // characters of a token that are shown

// A token as it is drawn: what cannot be seen is made visible.
export function tokenLabel(token) {
  const seen = token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, "�");
  const letters = [...seen];
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST - 1).join("")}…` : seen || "∅";
}

// Columns in that type: scripts of East Asia take two.
const columns = (label) => [...label].reduce((sum, letter) => sum + (letter.codePointAt(0) > 0x10ff && letter > "⿿" ? 2 : 1), 0);

// { nodes: [{ x, y, width, depth, parent, token, label, probability, source, accepted }], width, height }; parents come first.
export function layout(tree) {
  const count = tree.tokens.length;
  const children = Array.from({ length: count }, () => []);
  const depth = new Array(count).fill(0);
  for (let node = 1; node < count; node += 1) {
    const parent = tree.parents[node];
    children[parent].push(node);
    depth[node] = depth[parent] + 1;
  }
  const accepted = new Set(tree.path);
  // The accepted branch is on top, so that it reads as a line; then the likelier ones.
  for (const list of children)
    list.sort((a, b) => accepted.has(b) - accepted.has(a) || tree.probabilities[b] - tree.probabilities[a]);
  const row = new Array(count).fill(0);
  let rows = 0;
  const open = count ? [0] : []; // no recursion: a chain may be as deep as it likes
  while (open.length) {
    const node = open.pop();
    row[node] = children[node].length ? -1 : rows++;
    open.push(...[...children[node]].reverse());
  }
  for (let node = count - 1; node >= 0; node -= 1) if (row[node] < 0) row[node] = row[children[node][0]];
  const labels = tree.tokens.map(tokenLabel);
  const widths = []; // of each depth: as its longest label needs
  labels.forEach((label, node) => {
    const needed = columns(label) * LETTER + (node ? SHARE : 0) + 14;
    widths[depth[node]] = Math.max(widths[depth[node]] ?? 0, needed);
  });
  const starts = [EDGE];
  for (const width of widths) starts.push(starts.at(-1) + width + GAP);
  const nodes = tree.tokens.map((token, node) => ({
    x: starts[depth[node]], // of its left end
    width: widths[depth[node]],
    y: row[node] * ROW + EDGE + HEIGHT / 2, // of its middle
    depth: depth[node],
    parent: tree.parents[node],
    token,
    label: labels[node],
    probability: Math.min(1, Math.max(0, tree.probabilities[node])),
    source: tree.sources[node],
    accepted: accepted.has(node),
  }));
  return { nodes, width: starts.at(-1) - GAP + EDGE, height: Math.max(1, rows) * ROW + EDGE };
}

// One sentence for those who do not see it.
export function described(tree, index, total) {
  const quoted = (token) => `“${token.replace(/\n/g, "⏎").replace(/ /g, "\u00a0")}”`;
  const accepted = tree.path.filter((node) => node > 0).map((node) => quoted(tree.tokens[node]));
  const drafted = tree.tokens.length - 1;
  const kept = accepted.length ? `${accepted.length} accepted: ${accepted.join(", ")}` : "none accepted";
  return `Step ${index + 1} of ${total}: after ${quoted(tree.tokens[0] ?? "")}, ${drafted} drafted, ${kept}.`;
}
