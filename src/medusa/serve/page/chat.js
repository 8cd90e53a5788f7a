// The chat: what is asked, how the answer comes, and the conversation that is kept of both.

import { Answer, round } from "./answer.js";
import { $, announce, button, el } from "./dom.js";
import { MessageView } from "./message.js";
import { messages, read } from "./settings.js";
import { newId, titleOf } from "./store.js";

const NEAR = 60; // pixels from the end, within which the page follows the text
const SAVE_MS = 2000;
const SPOKEN = 800; // characters of an answer that a screen reader is given at once
const EXAMPLES = ["Why is the sky blue?", "Write a Python function that reverses a list.", "Name the days of the week, as a list."];

export class Chat {
  #parts;
  #conversation = null;
  #views = new Map(); // message -> its view
  #running = null; // { conversation, message, answer, controller }
  #frame = 0;
  #near = true; // whether the end of the conversation is seen

  // `parts`: { store, settings, keyring, tree, notice, busy, onchange, onsettings }; `busy` says why nothing can be asked
  // now, where that is so.
  constructor(parts) {
    this.#parts = parts;
    const prompt = $("prompt");
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(prompt.value);
    });
    prompt.addEventListener("input", () => this.#grow());
    prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send(prompt.value);
    });
    $("stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    addEventListener("pagehide", () => this.#save());
    $("log").addEventListener("scroll", () => this.#scrolled());
    new ResizeObserver(() => this.#follow(() => {})).observe($("log"));
    this.open(null);
  }

  get id() {
    return this.#conversation.id;
  }

  get running() {
    return this.#running !== null;
  }

  // The conversation of that id, or a new one.
  open(id) {
    const running = this.#running?.conversation;
    const kept = id === null ? null : running?.id === id ? running : this.#parts.store.get(id);
    this.#conversation = kept ?? { id: newId(), title: titleOf(""), changed: 0, messages: [] };
    this.#near = true;
    this.#follow(() => this.#draw());
    return id === null || kept !== null;
  }

  // Another tab may have changed it; never under an answer that is under way.
  reread() {
    if (this.#running?.conversation === this.#conversation || document.querySelector(".edit")) return;
    const kept = this.#parts.store.get(this.id);
    if (kept && kept.changed > this.#conversation.changed) this.open(this.id);
  }

  rename(id, title) {
    const conversation = id === this.id ? this.#conversation : this.#parts.store.get(id);
    conversation.title = title;
    this.#keep(conversation);
  }

  // Before it is deleted.
  forget(id) {
    if (this.#running?.conversation.id === id) {
      this.#running.deleted = true;
      this.#running.controller.abort();
    }
    if (this.id === id) this.open(null);
  }

  #draw() {
    this.#views.clear();
    const list = this.#conversation.messages;
    $("messages").replaceChildren(...(list.length ? list.map((message) => this.#view(message).element) : [welcome((text) => this.send(text))]));
    this.#allow();
    const running = this.#running;
    if (running?.conversation === this.#conversation) this.#views.get(running.message).update(running.answer);
    this.#tools();
  }

  #view(message) {
    const view = new MessageView(message, {});
    this.#views.set(message, view);
    return view;
  }

  // Which buttons each message has now.
  #allow() {
    const list = this.#conversation.messages;
    list.forEach((message, index) => {
      const last = index === list.length - 1;
      const free = this.#running === null;
      this.#views.get(message).allow({
        edit: free && message.role === "user" ? (text) => this.#edit(index, text) : null,
        again: free && last ? () => this.#again() : null,
      });
    });
  }

  #tools() {
    const lost = document.activeElement === $("stop") && !this.running;
    $("send").hidden = this.running;
    $("stop").hidden = !this.running;
    if (lost) $("prompt").focus();
  }

  #grow() {
    const prompt = $("prompt");
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight + 2}px`;
  }

  send(text) {
    if (!text.trim() || !this.#free()) return;
    const first = this.#conversation.messages.length === 0;
    if (first) this.#conversation.title = titleOf(text);
    this.#conversation.messages.push({ role: "user", content: text });
    $("prompt").value = "";
    this.#grow();
    this.#draw();
    this.#answer();
  }

  // Whether something can be asked: nothing is under way, and the settings are good. Says so where not.
  #free() {
    const reason = this.running ? "An answer is under way: wait for its end, or stop it." : this.#parts.busy();
    if (reason) this.#parts.notice(reason);
    return !reason && this.#settings() !== null;
  }

  // Where the button that was pressed has gone; not on a phone, where that would open its keyboard.
  #refocus() {
    if (document.activeElement === document.body && matchMedia("(pointer: fine)").matches) $("prompt").focus();
  }

  #edit(index, text) {
    if (!this.#free()) return;
    const { messages: list } = this.#conversation;
    list.splice(index, list.length, { role: "user", content: text });
    if (index === 0) this.#conversation.title = titleOf(text);
    this.#draw();
    this.#answer();
  }

  #again() {
    if (!this.#free()) return;
    const { messages: list } = this.#conversation;
    if (list.at(-1).role === "assistant") list.pop();
    this.#draw();
    this.#answer();
  }

  // What the settings say for a request; null where one is wrong, which is then shown.
  #settings() {
    const { body, errors } = read(this.#parts.settings.fields);
    if (!Object.keys(errors).length) return body;
    this.#parts.onsettings(errors);
    return null;
  }

  async #answer() {
    const { tree, keyring, settings } = this.#parts;
    const conversation = this.#conversation;
    const body = {
      ...this.#settings(),
      messages: messages(settings.fields.system, conversation.messages),
      medusa: tree.open ? "tree" : "spans", // trees cost the server time, so they are asked for where they are seen
    };
    const message = { role: "assistant", content: "" };
    const answer = new Answer();
    const controller = new AbortController();
    conversation.messages.push(message);
    const running = { conversation, message, answer, controller, deleted: false };
    this.#running = running;
    tree.begin(answer);
    this.#draw();
    this.#refocus();
    this.#near = true;
    this.#follow(() => {});
    this.#keep(conversation);
    announce("The answer is coming.");
    const saving = setInterval(() => this.#save(), SAVE_MS);
    try {
      for await (const event of keyring.events(body, controller.signal)) {
        answer.push(event);
        this.#soon();
      }
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else if (error.name === "Trouble") message.trouble = error.message;
      else {
        message.trouble = "The page made a mistake: reload it, and try again.";
        console.error(error);
      }
    }
    clearInterval(saving);
    this.#running = null;
    this.#take(running);
    this.#meter(answer);
    tree.end();
    if (running.deleted) return this.#draw();
    this.#keep(conversation);
    if (conversation === this.#conversation) this.#follow(() => {
      this.#views.get(message).update();
      this.#allow();
    });
    this.#tools();
    announce(message.trouble ?? `${message.stopped ? "Stopped" : "Answered"}: ${answer.text.slice(0, SPOKEN)}`);
    return undefined;
  }

  // What has come goes into what is kept.
  #take({ message, answer }) {
    message.content = answer.text;
    message.spans = answer.spans.map((span) => [...span]);
    message.totals = answer.summary();
  }

  #save() {
    if (!this.#running || this.#running.deleted) return;
    this.#take(this.#running);
    this.#parts.store.put(this.#running.conversation);
  }

  #keep(conversation) {
    if (!this.#parts.store.put(conversation))
      this.#parts.notice("The browser's storage is full or closed: this conversation is lost when you leave. Export it, or delete others.");
    this.#parts.onchange();
  }

  // At most once for each picture that the browser draws.
  #soon() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      const running = this.#running;
      if (!running) return;
      this.#parts.tree.grow();
      this.#meter(running.answer);
      if (running.conversation === this.#conversation)
        this.#follow(() => this.#views.get(running.message).update(running.answer));
    });
  }

  // Always in sight, however long the answer is.
  #meter({ rate, perStep }) {
    $("meter").textContent = rate === null ? "" : `${round(rate)} tokens/s · ${round(perStep, 2)} per step`;
  }

  // Changes the page; who read its end still does then.
  #follow(change) {
    change();
    if (this.#near) $("log").scrollTop = $("log").scrollHeight;
  }

  #scrolled() {
    const log = $("log");
    this.#near = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
  }

  stop() {
    this.#running?.controller.abort();
  }
}

function welcome(send) {
  return el("div", { class: "welcome" },
    el("h2", {}, "What would you like to know?"),
    el("p", { class: "muted" }, "Marked text was drafted ahead and accepted by the model; the rest it said itself. Conversations stay in this browser."),
    el("div", { class: "row" }, ...EXAMPLES.map((text) => button(text, () => send(text)))));
}
