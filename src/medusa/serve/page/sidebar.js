// The list of conversations, and what can be done with them.

import { $, announce, button, download, el } from "./dom.js";

const fileName = (title) => `medusa-${title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "chat"}.json`;

export class Sidebar {
  #store;
  #chat;
  #onopen;
  #renaming = null;
  #damaged = null; // of a damaged one, that was chosen

  constructor(store, chat, onopen) {
    this.#store = store;
    this.#chat = chat;
    this.#onopen = onopen;
    $("new-chat").addEventListener("click", () => this.#open(null));
    $("export-all").addEventListener("click", () => download("medusa-conversations.json", store.export(store.list().map(({ id }) => id))));
    this.draw();
  }

  #open(id) {
    this.#renaming = this.#damaged = null;
    if (!this.#chat.open(id)) this.#damaged = id;
    this.draw();
    if (!this.#damaged) this.#onopen();
  }

  draw() {
    const list = this.#store.list();
    const focused = document.activeElement?.dataset?.focus;
    $("chats").replaceChildren(...list.map((entry) => this.#item(entry)));
    $("export-all").disabled = !list.length;
    if (focused) $("chats").querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
  }

  #item(entry) {
    const { id, title, damaged, unsaved } = entry;
    const current = id === this.#chat.id || id === this.#damaged;
    const head = this.#renaming === id ? this.#nameField(entry)
      : button(title, () => this.#open(id), { class: "title", "aria-current": current ? "true" : null, title, "data-focus": `open ${id}` });
    const action = (text, onclick) => button(text, onclick, { class: "quiet", "aria-label": `${text}: ${title}`, "data-focus": `${text} ${id}` });
    const actions = current && this.#renaming !== id ? el("div", { class: "row" },
      damaged ? null : action("Rename", () => this.#rename(id)),
      action("Export", () => download(fileName(title), this.#store.export([id]))),
      action("Delete", () => this.#delete(id, title))) : null;
    const mark = damaged ? "It cannot be read; export what is left of it, or delete it." : unsaved ? "Not saved in the browser." : null;
    return el("li", { class: current ? "current" : null }, head, mark && (current || unsaved) ? el("p", { class: "mark" }, mark) : null, actions);
  }

  #nameField({ id, title }) {
    const input = el("input", { "aria-label": "Title of the conversation", maxlength: 200 });
    input.value = title;
    let open = true;
    const end = (keep) => {
      if (!open) return;
      open = false;
      this.#renaming = null;
      const name = input.value.trim();
      if (keep && name && name !== title) this.#chat.rename(id, name);
      this.draw();
      $("chats").querySelector(`[data-focus="${CSS.escape(`Rename ${id}`)}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    input.addEventListener("blur", () => end(true));
    return input;
  }

  #rename(id) {
    this.#renaming = id;
    this.draw();
    const input = $("chats").querySelector("input");
    input.focus();
    input.select();
  }

  async #delete(id, title) {
    if (!(await confirmed("Delete this conversation?", `“${title}” will be gone for good.`))) return;
    this.#damaged = null;
    this.#chat.forget(id);
    this.#store.remove(id);
    this.draw();
    announce("The conversation is deleted.");
    $("new-chat").focus();
  }
}

function confirmed(title, text) {
  const dialog = $("confirm-dialog");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true });
  });
}

$("confirm-no").addEventListener("click", () => $("confirm-dialog").close(""));
$("confirm-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("confirm-dialog").close("yes");
});
