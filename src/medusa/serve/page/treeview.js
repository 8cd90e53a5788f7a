// The draft trees of the last answer, drawn one step at a time.

import { classOf, nameOf } from "./answer.js";
import { $, el, svg } from "./dom.js";
import { described, layout } from "./treelayout.js";

const PLAY_MS = 700;
const MARK = 5; // half the width of a node
const LEAST_OPACITY = 0.12;

// Another shape for each drafter, so that it is not told by colour alone.
function mark(source, x, y, opacity) {
  const attributes = { class: `node ${classOf(source)}`, "fill-opacity": opacity };
  if (source === "ngram") return svg("rect", { ...attributes, x: x - MARK + 0.5, y: y - MARK + 0.5, width: 2 * MARK - 1, height: 2 * MARK - 1 });
  if (source === "grammar") return svg("path", { ...attributes, d: `M${x} ${y - MARK - 1}l${MARK + 1} ${MARK + 1}l${-MARK - 1} ${MARK + 1}l${-MARK - 1} ${-MARK - 1}z` });
  return svg("circle", { ...attributes, cx: x, cy: y, r: MARK });
}

export function drawing(tree, text) {
  const { nodes, width, height } = layout(tree);
  const edges = nodes.filter(({ parent }) => parent >= 0).map(({ x, y, parent, accepted }) => {
    const from = nodes[parent];
    const middle = from.x + 40;
    return svg("path", { class: accepted ? "edge accepted" : "edge", d: `M${from.x} ${from.y}C${middle + 20} ${from.y} ${middle} ${y} ${x} ${y}` });
  });
  // The accepted path lies on top of the others.
  edges.sort((a, b) => a.classList.contains("accepted") - b.classList.contains("accepted"));
  const marks = nodes.map(({ x, y, label, token, probability, source, accepted }) => {
    const opacity = Math.max(LEAST_OPACITY, probability).toFixed(3);
    const told = `“${token}” by ${nameOf(source)}, probability ${probability.toFixed(2)}${accepted ? ", accepted" : ""}`;
    return svg("g", {}, svg("title", {}, told),
      accepted ? svg("circle", { class: "ring", cx: x, cy: y, r: MARK + 4 }) : null,
      svg("circle", { class: "ground", cx: x, cy: y, r: MARK }), mark(source, x, y, opacity),
      svg("text", { class: accepted ? "label accepted" : "label", x: x + MARK + 5, y: y + 13 }, label));
  });
  return svg("svg", { role: "img", width, height, viewBox: `0 0 ${width} ${height}` }, svg("title", {}, text), ...edges, ...marks);
}

export class TreeView {
  #trees = [];
  #at = 0;
  #following = true; // the newest step, while there are new ones
  #running = false;
  #timer = 0;

  constructor() {
    $("tree-previous").addEventListener("click", () => this.#go(this.#at - 1));
    $("tree-next").addEventListener("click", () => this.#go(this.#at + 1));
    $("tree-play").addEventListener("click", () => (this.#playing ? this.#pause() : this.#play()));
    $("tree-step").addEventListener("input", (event) => this.#go(Number(event.target.value) - 1));
    $("tree-drawing").addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      this.#go(this.#at + by);
    });
    const key = (source, text) => el("li", {}, svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, mark(source, 7, 7, 1)), text);
    $("tree-keys").append(key("heads", "heads"), key("ngram", "n-gram"), key("grammar", "grammar"), key("model", "model"),
      el("li", {}, svg("svg", { width: 22, height: 14, "aria-hidden": "true" }, svg("path", { class: "edge accepted", d: "M1 7h20" })), "accepted"),
      el("li", {}, "fuller: likelier"));
  }

  get open() {
    return !$("tree-panel").hidden;
  }

  get #playing() {
    return this.#running ? this.#following : this.#timer !== 0;
  }

  // A new answer: its trees are drawn as they come.
  begin(answer) {
    this.#pause();
    this.#trees = answer.trees;
    this.#at = 0;
    this.#running = this.#following = true;
    this.show();
  }

  grow() {
    if (this.#following) this.#at = this.#trees.length - 1;
    this.show();
  }

  end() {
    this.#running = false;
    this.grow();
  }

  #go(step) {
    this.#pause();
    this.#at = Math.min(Math.max(0, step), this.#trees.length - 1);
    this.show();
  }

  #pause() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.#following = false;
    this.show();
  }

  // While an answer comes, its newest step; after it, one step after the other.
  #play() {
    this.#following = this.#running;
    if (!this.#running) {
      if (this.#at >= this.#trees.length - 1) this.#at = 0;
      this.#timer = setInterval(() => {
        if (this.#at >= this.#trees.length - 1) this.#pause();
        else {
          this.#at += 1;
          this.show();
        }
      }, PLAY_MS);
    }
    this.show();
  }

  show() {
    if (!this.open) return;
    const total = this.#trees.length;
    $("tree-tools").hidden = total === 0;
    $("tree-empty").hidden = total > 0;
    if (!total) return;
    this.#at = Math.max(0, this.#at);
    const tree = this.#trees[this.#at];
    const text = described(tree, this.#at, total);
    $("tree-drawing").replaceChildren(drawing(tree, text));
    $("tree-caption").textContent = text;
    $("tree-step").max = total;
    $("tree-step").value = this.#at + 1;
    $("tree-step").setAttribute("aria-valuetext", text);
    $("tree-play").textContent = this.#playing ? "Pause" : this.#running ? "Follow" : "Play";
    $("tree-previous").disabled = this.#at === 0;
    $("tree-next").disabled = this.#at === total - 1;
  }
}
