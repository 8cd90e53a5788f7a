// The server's answers: events out of bytes, and what went wrong as one sentence that says what to do.

// Reads server-sent events from pieces of text, which may be cut anywhere.
export class EventReader {
  #rest = "";
  #data = [];

  // The data of each event that is whole by now.
  push(text) {
    const events = [];
    this.#rest += text;
    // A CR at the end may be the first half of CRLF: it waits for what follows.
    const lines = this.#rest.split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // comments, and fields that are not ours
    }
    return events;
  }
}

// What is shown to the user. `again` says whether the same request may succeed later, `wait` after how many seconds.
export class Trouble extends Error {
  constructor(message, { status = 0, again = true, wait = 0 } = {}) {
    super(message);
    this.name = "Trouble";
    Object.assign(this, { status, again, wait });
  }
}

// Of a response that is not 200. `body` is what the server said, parsed, where it was JSON.
export function troubleOf(status, body, retryAfter = null) {
  const error = body && typeof body === "object" ? body.error : null;
  const said = error && typeof error.message === "string" ? error.message : "";
  const seconds = /^\d{1,6}$/.test(retryAfter ?? "") ? Number(retryAfter) : 0;
  const later = seconds ? `try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}` : "try again soon";
  if (status === 401) return new Trouble("The server wants a key: enter one it knows.", { status });
  if (status === 429) return new Trouble(`The server is busy: ${later}.`, { status, wait: seconds });
  if (status === 503) return new Trouble(`The server is not ready: ${later}.`, { status, wait: seconds });
  if (status === 413) return new Trouble("The conversation is too long for this server: start a new one.",
    { status, again: false });
  if (error?.code === "context_length_exceeded")
    return new Trouble("The conversation no longer fits into the model's context: start a new one.",
      { status, again: false });
  if (status >= 500)
    return new Trouble(`The server failed${said ? ` (${said})` : ` with status ${status}`}: try again.`, { status });
  const mends = { messages: "change the system prompt or the messages" };
  const mend = error?.param ? mends[error.param] ?? "change that setting" : "change the request";
  return new Trouble(`The server refused the request (${said || `status ${status}`}): ${mend} and try again.`,
    { status, again: false });
}

export function lost() {
  return new Trouble("The connection was lost: check that the server runs, then try again.");
}

function brokenOff(event) {
  const said = typeof event.error.message === "string" ? ` (${event.error.message})` : "";
  return new Trouble(`The answer broke off${said}; the text so far is kept. Try again.`);
}

// Addresses are relative, so that the page also works below a path of a proxy.
export async function ask(path, body, { key = "", signal, fetcher = fetch } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetcher(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw troubleOf(response.status, told, response.headers.get("retry-after"));
}

// The events of a chat completion as they come, until the server says that they are all. Throws a Trouble, or an
// AbortError when the signal says so.
export async function* events(body, options = {}) {
  const response = await ask("v1/chat/completions", { ...body, stream: true }, options);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventReader();
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : lost();
      }
      for (const data of parser.push(part.done ? decoder.decode() : decoder.decode(part.value, { stream: true }))) {
        if (data === "[DONE]") return;
        let event;
        try {
          event = JSON.parse(data);
        } catch {
          throw new Trouble("The server sent what is no answer: check that it is Medusa that runs there.");
        }
        if (event?.error) throw brokenOff(event);
        yield event;
      }
      if (part.done) throw lost();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
