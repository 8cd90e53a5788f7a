// The key that a server may want: asked for once, kept in the tab alone.

import { $ } from "./dom.js";
import { ask, events } from "./stream.js";

const NAME = "medusa.key";

export class Keyring {
  #storage;
  #key = "";
  #asking = null;
  onwanted = () => {}; // told when the server has asked for a key

  constructor(storage) {
    this.#storage = storage;
    try {
      this.#key = storage.getItem(NAME) ?? "";
    } catch {
      // none is kept
    }
    $("key-cancel").addEventListener("click", () => $("key-dialog").close(""));
    $("key-dialog").querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const key = $("key-input").value.trim();
      if (/^[\x21-\x7e]+$/.test(key)) $("key-dialog").close(key);
      else $("key-text").textContent = "A key is made of letters, digits and signs, without spaces. Enter it again.";
    });
  }

  #keep(key) {
    this.#key = key;
    try {
      this.#storage.setItem(NAME, key);
    } catch {
      // it holds until the page is closed
    }
  }

  // Whether a key was entered. Two that ask at once get the same answer.
  enter() {
    this.#asking ??= new Promise((done) => {
      const dialog = $("key-dialog");
      $("key-text").textContent = this.#key ? "The server does not know the key that was sent. Enter another one."
        : "Enter a key that the server knows. It is kept in this tab until you close it.";
      $("key-input").value = "";
      dialog.returnValue = "";
      dialog.showModal();
      dialog.addEventListener("close", () => {
        this.#asking = null;
        if (dialog.returnValue) this.#keep(dialog.returnValue);
        done(dialog.returnValue !== "");
      }, { once: true });
    });
    return this.#asking;
  }

  async #wanted(trouble) {
    if (trouble.status !== 401) return false;
    this.onwanted();
    return this.enter();
  }

  // As `ask` and `events` of stream.js, with the key; one that the server does not know is asked for.
  async get(path) {
    for (;;) {
      try {
        return await (await ask(path, undefined, { key: this.#key })).json();
      } catch (trouble) {
        if (!(await this.#wanted(trouble))) throw trouble;
      }
    }
  }

  async *events(body, signal) {
    for (;;) {
      try {
        yield* events(body, { key: this.#key, signal });
        return;
      } catch (trouble) { // a 401 comes before the first event
        if (!(await this.#wanted(trouble)) || signal.aborted) throw trouble;
      }
    }
  }
}
