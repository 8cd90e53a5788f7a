// One message on the page.

import { Answer, nameOf, round, shares } from "./answer.js";
import { button, copy, el } from "./dom.js";
import { Rendered } from "./render.js";

// How fast an answer was, as a line of text. `summary` is that of an Answer, whole or so far.
export function metaLine(summary, withRate = true) {
  const parts = [
    ...(withRate ? [[round(summary.rate), "tokens/s"]] : []),
    [round(summary.perStep, 2), "tokens per step"],
    [String(summary.tokens), summary.tokens === 1 ? "token" : "tokens"],
  ];
  const nodes = parts.flatMap(([value, unit], index) => [index ? " · " : "", el("b", {}, value), ` ${unit}`]);
  if (summary.wait !== null && summary.wait !== undefined) nodes.push(` · first after ${round(summary.wait, 2)}\u00a0s`);
  const by = shares(summary.shares).map(([source, share]) => `${nameOf(source)} ${Math.round(100 * share)}\u00a0%`);
  if (by.length) nodes.push(` · from ${by.join(", ")}`);
  return nodes;
}

const ENDS = { length: "It ended at the most tokens that are allowed; the settings have that number." };

export class MessageView {
  #message;
  #on;
  #text;
  #meta = el("p", { class: "meta" });
  #trouble = el("p", { class: "trouble" });
  #actions = el("div", { class: "actions" });
  #body;

  // `on`: what the buttons do: { edit(text), again() }, each there where it can be done.
  constructor(message, on) {
    this.#message = message;
    this.#on = on;
    const mine = message.role === "user";
    this.#body = el("div", { class: mine ? "body" : "body text" });
    this.#text = mine ? null : new Rendered(this.#body);
    this.element = el("article", { class: `message ${message.role}` },
      el("h2", {}, mine ? "You" : "Answer"), this.#body, this.#trouble, this.#meta, this.#actions);
    if (mine) this.#body.textContent = message.content;
    this.update();
  }

  // `answer` is there while it is under way.
  update(answer = null) {
    const { content, spans, totals, trouble, stopped } = this.#message;
    if (this.#text) {
      this.#text.show(answer?.text ?? content, answer?.spans ?? spans);
      const nothing = (answer?.text ?? content) === "";
      if (nothing && (answer || !trouble)) {
        this.#text = new Rendered(this.#body);
        this.#body.replaceChildren(el("p", { class: "waiting" }, answer ? "…" : stopped ? "Stopped." : "The answer is empty."));
      }
    }
    const summary = answer instanceof Answer ? answer.summary() : totals;
    this.#meta.replaceChildren(...(summary?.tokens ? metaLine(summary) : []));
    const ended = stopped ? "You stopped it." : ENDS[summary?.finish];
    if (!answer && summary?.tokens && ended) this.#meta.append(el("br"), ended);
    this.#trouble.textContent = trouble ?? "";
    this.#trouble.hidden = !trouble;
    this.#meta.hidden = !this.#meta.firstChild;
    this.#buttons(answer !== null);
  }

  #buttons(running) {
    const { edit, again } = this.#on;
    const mine = this.#message.role === "user";
    const quiet = { class: "quiet" };
    const buttons = running ? [] : [
      this.#message.content && button("Copy", (event) => this.#copy(event.target),
        { ...quiet, "aria-label": mine ? "Copy your message" : "Copy the answer", "aria-live": "polite" }),
      mine && edit && button("Edit", () => this.#edit(), { ...quiet, "aria-label": "Edit your message and answer again" }),
      again && button(this.#message.trouble ? "Try again" : "Answer again", again, quiet),
    ].filter(Boolean);
    const shown = (list) => Array.from(list, (one) => one.textContent).join();
    if (shown(buttons) !== shown(this.#actions.childNodes)) this.#actions.replaceChildren(...buttons);
  }

  // Whether it is the last one changes while it stands there.
  allow(on) {
    this.#on = on;
    this.#actions.replaceChildren();
    this.update();
  }

  async #copy(pressed) {
    pressed.textContent = (await copy(this.#message.content)) ? "Copied" : "Not allowed here";
    setTimeout(() => {
      pressed.textContent = "Copy";
    }, 1500);
  }

  #edit() {
    const area = el("textarea", { "aria-label": "Your message", rows: 4, dir: "auto" });
    area.value = this.#message.content;
    const close = () => {
      form.replaceWith(this.#body);
      this.#actions.hidden = false;
      this.#actions.querySelector("[aria-label^=Edit]")?.focus();
    };
    const save = () => {
      if (area.value.trim() && this.#on.edit) this.#on.edit(area.value);
    };
    const form = el("form", { class: "edit", onsubmit: (event) => {
      event.preventDefault();
      save();
    } }, area, el("p", { class: "row" },
      el("button", { type: "submit", class: "strong" }, "Answer again"), button("Cancel", close)),
    el("p", { class: "help" }, "What follows this message is replaced."));
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === area) {
        event.preventDefault();
        save();
      }
    });
    this.#body.replaceWith(form);
    this.#actions.hidden = true;
    area.focus();
  }
}
