// Conversations in the browser: each under a key of its own, so that one that cannot be read or written harms no other.

const START = "medusa.chat.";
const LONGEST_TITLE = 60;

export function newId() {
  const random = crypto.getRandomValues(new Uint32Array(2));
  return `${Date.now().toString(36)}-${random[0].toString(36)}${random[1].toString(36)}`;
}

// Of the first thing that was asked.
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1)}…` : line || "New conversation";
}

export class Store {
  #storage;
  #unsaved = new Map(); // id -> conversation that the browser would not keep; it lives as long as the page

  // `storage` is the browser's, or null where it allows none.
  constructor(storage) {
    this.#storage = storage;
  }

  // [{ id, title, changed, damaged, unsaved }], the newest first.
  list() {
    const found = new Map();
    for (const key of this.#keys()) {
      const id = key.slice(START.length);
      const kept = this.#read(id);
      found.set(id, kept ? { id, title: kept.title, changed: kept.changed, damaged: false, unsaved: false }
        : { id, title: "Damaged conversation", changed: 0, damaged: true, unsaved: false });
    }
    for (const [id, { title, changed }] of this.#unsaved)
      found.set(id, { id, title, changed, damaged: false, unsaved: true });
    return [...found.values()].sort((a, b) => b.changed - a.changed);
  }

  #keys() {
    try {
      return Array.from({ length: this.#storage.length }, (_, index) => this.#storage.key(index))
        .filter((key) => key?.startsWith(START));
    } catch {
      return []; // no storage
    }
  }

  get(id) {
    return this.#unsaved.get(id) ?? this.#read(id);
  }

  // As it stands in the storage, for one that is damaged.
  raw(id) {
    try {
      return this.#storage.getItem(START + id);
    } catch {
      return null;
    }
  }

  #read(id) {
    try {
      return checked(JSON.parse(this.raw(id)), id);
    } catch {
      return null;
    }
  }

  // Whether it is kept beyond this page. Never makes room by deleting what the user has.
  put(conversation) {
    conversation.changed = Date.now();
    const { id } = conversation;
    try {
      this.#storage.setItem(START + id, JSON.stringify(conversation));
      this.#unsaved.delete(id);
      return true;
    } catch {
      this.#unsaved.set(id, conversation);
      return false;
    }
  }

  remove(id) {
    this.#unsaved.delete(id);
    try {
      this.#storage.removeItem(START + id);
    } catch {
      // no storage, so it is not in there
    }
  }

  // For a file. What is damaged goes along as the text that it is.
  export(ids) {
    const conversations = ids.map((id) => this.get(id) ?? { id, damaged: this.raw(id) });
    return { format: "medusa-conversations", version: 1, conversations };
  }
}

// A conversation with the fields that the page relies on. Throws where it is none.
function checked(kept, id) {
  const good = kept && typeof kept === "object" && Array.isArray(kept.messages) && kept.messages.every((message) =>
    message && ["user", "assistant"].includes(message.role) && typeof message.content === "string");
  if (!good) throw new TypeError("not a conversation");
  for (const message of kept.messages) {
    if (message.spans !== undefined && !goodSpans(message)) delete message.spans;
    if (typeof message.totals !== "object") delete message.totals;
    if (typeof message.trouble !== "string") delete message.trouble;
  }
  return {
    ...kept,
    id,
    title: typeof kept.title === "string" && kept.title.trim() ? kept.title.slice(0, 200) : "Conversation",
    changed: Number.isFinite(kept.changed) ? kept.changed : 0,
  };
}

const goodSpans = (message) => Array.isArray(message.spans) && message.spans.every((span) =>
  Array.isArray(span) && typeof span[0] === "string" && Number.isInteger(span[1]) && span[1] >= 0);

// The browser's storage of a kind; null where it allows none.
export function storageOf(kind) {
  try {
    return window[kind];
  } catch {
    return null;
  }
}
