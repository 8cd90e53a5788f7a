// One answer as it comes: its text, who proposed which part of it, and how fast it was.

export const SOURCES = ["heads", "ngram", "grammar", "model"];
const NAMES = { heads: "heads", ngram: "n-gram", grammar: "grammar", model: "model" };

// How a source is called on the page; one we do not know keeps its name.
export function nameOf(source) {
  return Object.hasOwn(NAMES, source) ? NAMES[source] : String(source).slice(0, 40);
}

// The class that paints it.
export function classOf(source) {
  return SOURCES.includes(source) ? `by-${source}` : "by-other";
}

export class Answer {
  text = "";
  spans = []; // [source, number of characters]: they follow each other from the start of the text
  tokens = 0;
  steps = 0; // passes that verified a draft, or decoded one token; not the pass that read the prompt
  trees = [];
  times = []; // [seconds since the request, length of the text by then], of each event with text
  finish = null; // "stop" or "length", as the server has it
  totals = null; // the server's own counts, which come last
  #begun;
  #first = null; // seconds, and the tokens that had come by then
  #last = 0;

  constructor(now = performance.now()) {
    this.#begun = now;
  }

  push(event, now = performance.now()) {
    const at = (now - this.#begun) / 1000;
    const choice = event.choices?.[0];
    const told = event.medusa ?? {};
    const added = choice?.delta?.content ?? "";
    this.text += added;
    if (added) this.times.push([at, this.text.length]);
    if (told.spans) this.#count(told, at);
    if (told.steps !== undefined) this.totals = told;
    if (choice?.finish_reason) this.finish = choice.finish_reason;
  }

  #count(told, at) {
    for (const [text, source] of told.spans) this.#span(source, text.length);
    this.tokens += told.tokens;
    if (this.#first === null) this.#first = [at, this.tokens];
    else this.steps += 1;
    this.#last = at;
    if (told.tree) this.trees.push(told.tree);
  }

  #span(source, length) {
    const last = this.spans.at(-1);
    if (last?.[0] === source) last[1] += length;
    else if (length) this.spans.push([source, length]);
  }

  // Seconds until the first token.
  get wait() {
    return this.#first?.[0] ?? null;
  }

  // Tokens a second from the first token on: how long the prompt took to read is no matter of decoding.
  get rate() {
    if (this.#first === null || this.#last <= this.#first[0]) return null;
    return (this.tokens - this.#first[1]) / (this.#last - this.#first[0]);
  }

  get perStep() {
    if (this.totals) return this.totals.tokens_per_step;
    return this.steps ? (this.tokens - this.#first[1]) / this.steps : null;
  }

  // What is kept of it with a conversation.
  summary() {
    const { tokens, totals, rate, perStep, wait, finish } = this;
    const shares = totals?.by_drafter ?? null;
    return { tokens, steps: totals?.steps ?? this.steps, rate, perStep, wait, finish, shares, seed: totals?.seed };
  }
}

export function round(value, digits = 1) {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}

// Who proposed the tokens, as shares of them: [[source, share], ...], the largest first.
export function shares(byDrafter) {
  const counts = Object.entries(byDrafter ?? {}).filter(([, count]) => count > 0);
  const all = counts.reduce((sum, [, count]) => sum + count, 0);
  return counts.map(([source, count]) => [source, count / all]).sort((a, b) => b[1] - a[1]);
}
