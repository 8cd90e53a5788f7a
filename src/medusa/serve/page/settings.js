// What can be set for an answer: bounds as the server has them, told before anything is sent.

export const DRAFTERS = ["", "union", "heads", "ngram", "none"]; // "" is the server's own

// name -> what it may be, and what is said of it otherwise. An empty field is not sent: the server's default holds.
const NUMBERS = {
  temperature: { good: (v) => v === 0 || (v >= 1e-6 && v <= 1000), rule: "Temperature must be 0 (greedy) or from 0.000001 to 1000." },
  top_p: { good: (v) => v > 0 && v <= 1, rule: "Top-p must be above 0 and at most 1." },
  top_k: { good: (v) => v >= 0 && v <= 1e9, whole: true, rule: "Top-k must be a whole number, 0 (off) or more." },
  min_p: { good: (v) => v >= 0 && v < 1, rule: "Min-p must be at least 0 and below 1." },
  seed: { good: (v) => v >= 0 && v <= Number.MAX_SAFE_INTEGER, whole: true, rule: "Seed must be a whole number from 0 to 9007199254740991." },
  max_tokens: { good: (v) => v >= 1 && v <= 1e9, whole: true, rule: "Most tokens must be a whole number, 1 or more." },
};

export const NAMES = [...Object.keys(NUMBERS), "drafter", "system"];
export const DEFAULTS = { temperature: "0", top_p: "", top_k: "", min_p: "", seed: "", max_tokens: "512", drafter: "", system: "" };

// Texts of the fields -> { body, errors }: what a request says, and a sentence for each field that is wrong.
export function read(fields) {
  const body = {};
  const errors = {};
  for (const [name, { good, whole, rule }] of Object.entries(NUMBERS)) {
    const text = (fields[name] ?? "").trim();
    if (text === "") continue;
    const value = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text) ? Number(text) : NaN;
    if (Number.isFinite(value) && good(value) && (!whole || Number.isInteger(value))) body[name] = value;
    else errors[name] = rule;
  }
  const drafter = fields.drafter ?? "";
  if (!DRAFTERS.includes(drafter)) errors.drafter = "Choose one of the drafters.";
  else if (drafter) body.drafter = drafter;
  return { body, errors };
}

// The messages of a request. An answer of which nothing came is not sent; what was asked before it and after it becomes
// one message, as many chat templates want the two to take turns.
export function messages(system, history) {
  const said = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content } of history) {
    if (content === "") continue;
    if (said.at(-1)?.role === role) said.at(-1).content += `\n\n${content}`;
    else said.push({ role, content });
  }
  return said;
}

export class Settings {
  #storage;
  fields;

  constructor(storage) {
    this.#storage = storage;
    this.fields = { ...DEFAULTS };
    try {
      const kept = JSON.parse(storage.getItem("medusa.settings"));
      for (const name of NAMES) if (typeof kept?.[name] === "string") this.fields[name] = kept[name];
    } catch {
      // none, or none that can be read: the defaults hold
    }
  }

  set(name, text) {
    this.fields[name] = text;
    try {
      this.#storage.setItem("medusa.settings", JSON.stringify(this.fields));
    } catch {
      // they hold until the page is closed
    }
  }

  reset() {
    for (const name of NAMES) this.set(name, DEFAULTS[name]);
  }
}
