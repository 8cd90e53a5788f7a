// The draft trees of the last answer, drawn one step at a time.

import { classOf, nameOf } from "./answer.js";
import { $, el, svg } from "./dom.js";
import { HEIGHT, described, layout } from "./treelayout.js";

const PLAY_MS = 700;
const SMALLEST = 0.85; // scale, before the drawing scrolls instead
const [FAINTEST, FULLEST] = [0.04, 0.4]; // of a node's ground, so that its text can be read on it

const percent = (probability) => `${Math.round(100 * probability)}%`;

// A node's outline is of another kind for each drafter, as the marks in the text are.
function chip(source, x, y, width, probability, accepted) {
  const height = HEIGHT;
  const place = { x, y: y - height / 2, width, height, rx: 5 };
  const opacity = (FAINTEST + (FULLEST - FAINTEST) * probability).toFixed(3);
  return [
    accepted ? svg("rect", { class: "ring", x: x - 2.5, y: place.y - 2.5, width: width + 5, height: height + 5, rx: 7 }) : null,
    svg("rect", { ...place, class: `node ${classOf(source)}`, "fill-opacity": opacity }),
  ];
}

export function drawing(tree, text, room = Infinity) {
  const { nodes, width, height } = layout(tree);
  const edges = nodes.filter(({ parent }) => parent >= 0).map(({ x, y, parent, accepted }) => {
    const from = { x: nodes[parent].x + nodes[parent].width, y: nodes[parent].y };
    const middle = (from.x + x) / 2;
    return svg("path", { class: accepted ? "edge accepted" : "edge", d: `M${from.x} ${from.y}C${middle} ${from.y} ${middle} ${y} ${x} ${y}` });
  });
  // The accepted path lies on top of the others.
  edges.sort((a, b) => a.classList.contains("accepted") - b.classList.contains("accepted"));
  const marks = nodes.map(({ x, y, width: own, label, token, probability, source, accepted }, index) => {
    const told = `“${token}” by ${nameOf(source)}, probability ${probability.toFixed(2)}${accepted ? ", accepted" : ""}`;
    return svg("g", {}, svg("title", {}, told), ...chip(source, x, y, own, probability, accepted),
      svg("text", { class: accepted ? "label accepted" : "label", x: x + 6, y: y + 4 }, label),
      index ? svg("text", { class: "share", x: x + own - 5, y: y + 4, "text-anchor": "end" }, percent(probability)) : null);
  });
  const scale = Math.min(1, Math.max(SMALLEST, room / width));
  return svg("svg", { role: "img", width: width * scale, height: height * scale, viewBox: `0 0 ${width} ${height}` },
    svg("title", {}, text), ...edges, ...marks);
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
    const key = (source, text) => el("li", {}, svg("svg", { width: 26, height: 22, "aria-hidden": "true" },
      ...chip(source, 1, 11, 24, 0.6, false)), text);
    $("tree-keys").append(key("heads", "heads"), key("ngram", "n-gram"), key("grammar", "grammar"), key("model", "model"),
      el("li", {}, svg("svg", { width: 22, height: 22, "aria-hidden": "true" }, svg("path", { class: "edge accepted", d: "M1 11h20" })), "accepted"));
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
    $("tree-drawing").replaceChildren(drawing(tree, text, $("tree-drawing").clientWidth));
    $("tree-caption").textContent = text;
    $("tree-step").max = total;
    $("tree-step").value = this.#at + 1;
    $("tree-step").setAttribute("aria-valuetext", text);
    $("tree-play").textContent = this.#playing ? "Pause" : this.#running ? "Follow" : "Play";
    $("tree-previous").disabled = this.#at === 0;
    $("tree-next").disabled = this.#at === total - 1;
  }
}
