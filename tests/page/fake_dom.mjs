// As much of a document as the renderer uses. What sets markup is not there: who calls it gets an error.

class Text {
  constructor(text) {
    this.textContent = text;
  }
}

class Element {
  constructor(name) {
    this.name = name;
    this.attributes = {};
    this.childNodes = [];
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  addEventListener() {}

  append(...children) {
    for (const child of children) {
      const node = typeof child === "string" ? new Text(child) : child;
      node.parent = this;
      this.childNodes.push(node);
    }
  }

  get lastChild() {
    return this.childNodes.at(-1);
  }

  remove() {
    this.parent.childNodes = this.parent.childNodes.filter((node) => node !== this);
  }

  get textContent() {
    return this.childNodes.map((node) => node.textContent).join("");
  }

  set textContent(text) {
    this.childNodes = [new Text(text)];
  }

  set innerHTML(_) {
    throw new Error("markup was set");
  }

  // All elements below, in order.
  *all() {
    for (const node of this.childNodes) {
      if (node instanceof Element) {
        yield node;
        yield* node.all();
      }
    }
  }

  // <p>text</p>, for what is expected; `class` and `href` only.
  get markup() {
    const shown = ["class", "href", "start"].filter((name) => name in this.attributes);
    const attributes = shown.map((name) => ` ${name}="${this.attributes[name]}"`).join("");
    return `<${this.name}${attributes}>${inner(this)}</${this.name}>`;
  }
}

const inner = (element) => element.childNodes.map((node) => node.markup ?? node.textContent).join("");

globalThis.document = { createElement: (name) => new Element(name), createElementNS: (_, name) => new Element(name) };

export function newRoot() {
  return new Element("div");
}

export { inner };
