// The form of the settings: each is checked as it is typed, and kept.

import { $, button, el } from "./dom.js";
import { DRAFTERS, read } from "./settings.js";

const FIELDS = [
  ["system", "System prompt", "Said to the model before each conversation."],
  ["temperature", "Temperature", "0 always takes the likeliest token; empty is the server's default."],
  ["top_p", "Top-p", "Sample from the likeliest tokens of this total; empty or 1 is off."],
  ["top_k", "Top-k", "Sample from the likeliest K tokens; empty or 0 is off."],
  ["min_p", "Min-p", "Drop tokens below this share of the likeliest one; empty or 0 is off."],
  ["seed", "Seed", "The same seed gives the same text again; empty draws one each time."],
  ["max_tokens", "Most tokens", "Of an answer; empty goes on until the model ends it."],
];
const DRAFTER_TEXTS = {
  "": "the server's own", union: "union: heads and n-gram", heads: "heads", ngram: "n-gram", none: "none: plain decoding",
};

export class SettingsForm {
  #settings;

  constructor(settings) {
    this.#settings = settings;
    const form = $("settings");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(
      ...FIELDS.map(([name, label, help]) => field(name, label, help,
        name === "system" ? el("textarea", { rows: 3 }) : el("input", { inputmode: "decimal", autocomplete: "off" }))),
      field("drafter", "Drafter", "Who proposes tokens. It changes the speed, not the text.",
        el("select", {}, ...DRAFTERS.map((name) => el("option", { value: name }, DRAFTER_TEXTS[name])))),
      button("Back to the defaults", () => {
        settings.reset();
        this.#fill();
      }),
    );
    form.addEventListener("input", (event) => {
      settings.set(event.target.id.slice("set-".length), event.target.value);
      this.show();
    });
    this.#fill();
  }

  #fill() {
    for (const [name, value] of Object.entries(this.#settings.fields)) $(`set-${name}`).value = value;
    this.show();
  }

  // What is wrong, beside its field. Gives the first field that is, where one is.
  show() {
    const { errors } = read(this.#settings.fields);
    let first = null;
    for (const name of Object.keys(this.#settings.fields)) {
      const input = $(`set-${name}`);
      const wrong = errors[name] ?? "";
      $(`wrong-${name}`).textContent = wrong;
      input.setAttribute("aria-invalid", wrong ? "true" : "false");
      if (wrong) first ??= input;
    }
    return first;
  }
}

function field(name, label, help, input) {
  input.id = `set-${name}`;
  input.setAttribute("aria-describedby", `help-${name} wrong-${name}`);
  return el("div", { class: "field" }, el("label", { for: input.id }, label), input,
    el("p", { class: "help", id: `help-${name}` }, help),
    el("p", { class: "wrong", id: `wrong-${name}`, role: "status" }));
}
