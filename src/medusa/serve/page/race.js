// The race: one prompt plainly and with Medusa, one after the other, by the same settings and the same seed.

import { Answer, round } from "./answer.js";
import { $, announce, el, svg } from "./dom.js";
import { metaLine } from "./message.js";
import { Rendered } from "./render.js";
import { messages, read } from "./settings.js";

const PROMPT = "Explain how a bicycle stays upright, in a few short paragraphs.";
const SEEDS = 2 ** 53;

class Lane {
  #rate = el("p", { class: "rate" });
  #done = svg("rect", { class: "done", height: 6, rx: 3, width: 0 });
  #meta = el("p", { class: "meta" });
  #body = el("div", { class: "text", tabindex: 0, role: "region" });
  #text = new Rendered(this.#body);
  answer = null;
  ended = false;

  constructor(title, kind) {
    this.#body.setAttribute("aria-label", `Text of ${title}`);
    this.element = el("section", { class: `lane ${kind}` }, el("h3", {}, title), this.#rate,
      svg("svg", { class: "speed", "aria-hidden": "true" }, svg("rect", { class: "track", width: "100%", height: 6, rx: 3 }), this.#done),
      this.#meta, this.#body);
    this.clear("");
  }

  clear(word) {
    this.answer = null;
    this.ended = false;
    this.#text.show("");
    this.#rate.replaceChildren("– ", el("small", {}, "tokens/s"));
    this.#meta.textContent = word;
    this.bar(0);
  }

  // Of the faster one's rate, from 0 to 1.
  bar(share) {
    this.#done.setAttribute("width", `${(100 * Math.min(1, share)).toFixed(2)}%`);
  }

  show() {
    this.#rate.replaceChildren(`${round(this.answer.rate)} `, el("small", {}, "tokens/s"));
    this.#meta.replaceChildren(...metaLine(this.answer.summary(), false));
    this.#text.show(this.answer.text, this.answer.spans);
    this.#body.scrollTop = this.ended ? 0 : this.#body.scrollHeight;
  }

  // As it was after so many seconds; whether it was done by then.
  showAt(seconds) {
    const { text, spans, times } = this.answer;
    let [low, high] = [0, times.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle][0] <= seconds) low = middle + 1;
      else high = middle;
    }
    this.#text.show(text.slice(0, low ? times[low - 1][1] : 0), spans);
    this.#body.scrollTop = this.#body.scrollHeight;
    return low === times.length;
  }
}

// What the race has shown.
export function verdict(plain, fast) {
  const times = fast.rate / plain.rate;
  const speed = Number.isFinite(times) && times > 0 ? `Medusa was ${times.toFixed(2)} times as fast. ` : "Too few tokens came to tell the rates. ";
  if (plain.text === fast.text) return `${speed}The two texts are identical, all ${fast.tokens} tokens.`;
  let at = 0;
  while (plain.text[at] === fast.text[at]) at += 1;
  return `${speed}The two texts differ from character ${at + 1} on: on this engine the width of a pass changes how sums are rounded.`;
}

export class Race {
  #parts;
  #plain = new Lane("Plain decoding", "slow");
  #fast = new Lane("With Medusa", "fast");
  #controller = null;
  #replay = 0;

  // `parts`: { settings, keyring, chat, onsettings }
  constructor(parts) {
    this.#parts = parts;
    $("lanes").append(this.#plain.element, this.#fast.element);
    $("race-prompt").value = PROMPT;
    $("race-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run($("race-prompt").value);
    });
    $("race-stop").addEventListener("click", () => this.#controller?.abort());
    $("race-replay").addEventListener("click", () => (this.#replay ? this.#still() : this.#again()));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.#controller?.abort();
    });
  }

  get running() {
    return this.#controller !== null;
  }

  #say(text) {
    $("verdict").textContent = text;
  }

  async #run(prompt) {
    const { settings, chat, onsettings } = this.#parts;
    const { body, errors } = read(settings.fields);
    if (Object.keys(errors).length) return onsettings(errors);
    if (!prompt.trim()) return this.#say("Write a prompt first.");
    if (chat.running) return this.#say("An answer is under way in the chat: wait for its end, or stop it, so that the race has the machine to itself.");
    this.#still();
    this.#controller = new AbortController();
    const seed = body.seed ?? Math.floor(Math.random() * SEEDS);
    const said = { ...body, seed, messages: messages(settings.fields.system, [{ role: "user", content: prompt }]), medusa: "spans" };
    const { drafter, ...own } = said;
    const medusa = drafter === undefined || drafter === "none" ? own : said; // else the server's own drafter
    this.#tools(true);
    this.#plain.clear("Running …");
    this.#fast.clear("Its turn comes next.");
    this.#say("");
    announce("The race has begun.");
    try {
      await this.#lane(this.#plain, { ...own, drafter: "none" });
      await this.#lane(this.#fast, medusa);
      const best = Math.max(this.#plain.answer.rate, this.#fast.answer.rate);
      for (const lane of [this.#plain, this.#fast]) lane.bar(lane.answer.rate / best);
      this.#say(verdict(this.#plain.answer, this.#fast.answer));
      $("race-replay").hidden = false;
    } catch (error) {
      if (error.name === "AbortError") this.#say("You stopped the race.");
      else if (error.name === "Trouble") this.#say(error.message);
      else throw error;
    } finally {
      this.#controller = null;
      this.#tools(false);
    }
    return undefined;
  }

  async #lane(lane, body) {
    lane.clear("Running …");
    lane.answer = new Answer();
    let frame = 0;
    const { signal } = this.#controller;
    for await (const event of this.#parts.keyring.events(body, signal)) {
      lane.answer.push(event);
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        if (lane.answer) lane.show();
      });
    }
    cancelAnimationFrame(frame);
    lane.ended = true;
    lane.show();
  }

  #tools(running) {
    const lost = [$("race-start"), $("race-stop")].includes(document.activeElement);
    $("race-start").hidden = running;
    $("race-stop").hidden = !running;
    if (running) $("race-replay").hidden = true;
    if (lost) (running ? $("race-stop") : $("race-start")).focus({ preventScroll: true });
  }

  // Both as they came, from the same moment on.
  #again() {
    const begun = performance.now();
    $("race-replay").textContent = "Show the whole texts";
    const frame = () => {
      const seconds = (performance.now() - begun) / 1000;
      const ended = [this.#plain, this.#fast].map((lane) => lane.showAt(seconds));
      if (ended.every(Boolean)) this.#still();
      else this.#replay = requestAnimationFrame(frame);
    };
    this.#replay = requestAnimationFrame(frame);
  }

  #still() {
    cancelAnimationFrame(this.#replay);
    this.#replay = 0;
    $("race-replay").textContent = "Watch both side by side";
    for (const lane of [this.#plain, this.#fast]) if (lane.answer) lane.show();
  }
}
