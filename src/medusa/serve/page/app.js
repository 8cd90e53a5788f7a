// The page: its parts, and which of them are seen.

import { SOURCES, classOf, nameOf } from "./answer.js";
import { Chat } from "./chat.js";
import { $, button, el } from "./dom.js";
import { Keyring } from "./keyring.js";
import { Race } from "./race.js";
import { Settings } from "./settings.js";
import { SettingsForm } from "./settingsform.js";
import { Sidebar } from "./sidebar.js";
import { Store, storageOf } from "./store.js";
import { TreeView } from "./treeview.js";

const narrow = matchMedia("(max-width: 900px)");

function notice(text, again = null) {
  const close = () => {
    $("notice").hidden = true;
  };
  $("notice").replaceChildren(el("span", {}, text),
    ...(again ? [button("Try again", () => {
      close();
      again();
    })] : []), button("Close", close, { class: "quiet" }));
  $("notice").hidden = false;
}

// --- what is seen ---

const tree = new TreeView();

function views(name) {
  for (const view of ["chat", "race"]) {
    $(view).hidden = view !== name;
    if (view === name) $(`to-${view}`).setAttribute("aria-current", "page");
    else $(`to-${view}`).removeAttribute("aria-current");
  }
  if (name === "race" && !$("tree-panel").hidden) toggle("open-tree", false); // it is of the chat
  $("open-tree").disabled = name === "race";
  $("skip").setAttribute("href", name === "race" ? "#race-prompt" : "#prompt");
}

const PANELS = { "open-tree": "tree-panel", "open-settings": "settings-panel", "open-sidebar": "sidebar" };

// Opens or closes a panel by its button. In a small window a panel that covers the rest takes the focus.
function toggle(opener, open) {
  const panel = $(PANELS[opener]);
  if (open) for (const other of Object.keys(PANELS)) if (other !== opener) toggle(other, false);
  const had = panel.contains(document.activeElement);
  if (opener === "open-sidebar") panel.classList.toggle("open", open);
  else panel.hidden = !open;
  document.body.classList.toggle("tree-open", tree.open);
  $(opener).setAttribute("aria-expanded", String(open));
  const covered = narrow.matches && Object.values(PANELS).some((id) => $(id).classList.contains("cover") && isOpen(id));
  for (const view of ["chat", "race"]) $(view).inert = covered;
  if (open && opener === "open-tree") tree.show();
  if (open) panel.querySelector("button, input, textarea").focus();
  else if (had) $(opener).focus();
}

const isOpen = (id) => (id === "sidebar" ? $(id).classList.contains("open") : !$(id).hidden);

for (const [opener, id] of Object.entries(PANELS)) {
  $(opener).addEventListener("click", () => toggle(opener, !isOpen(id)));
  $(id).addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isOpen(id)) {
      event.stopPropagation();
      toggle(opener, false);
    }
  });
}
for (const closer of document.querySelectorAll("[data-closes]"))
  closer.addEventListener("click", () => toggle(closer.dataset.closes, false));
narrow.addEventListener("change", () => toggle("open-sidebar", false));
$("to-chat").addEventListener("click", () => views("chat"));
$("to-race").addEventListener("click", () => views("race"));

// --- who drafted ---

const local = storageOf("localStorage");

function marked(on) {
  document.body.classList.toggle("marked", on);
  $("colours").checked = on;
  try {
    local.setItem("medusa.marked", on ? "1" : "0");
  } catch {
    // it holds until the page is closed
  }
}

let shown = true;
try {
  shown = local.getItem("medusa.marked") !== "0";
} catch {
  // no storage
}
marked(shown);
$("colours").addEventListener("change", (event) => marked(event.target.checked));
$("legend").append(...SOURCES.map((source) => el("li", {},
  source === "model" ? "unmarked: model" : el("span", { class: `by ${classOf(source)}` }, nameOf(source)))));

// --- the parts ---

const settings = new Settings(local);
const form = new SettingsForm(settings);
const store = new Store(local);
const keyring = new Keyring(storageOf("sessionStorage"));

function onsettings() {
  toggle("open-settings", true);
  form.show()?.focus();
}

let [sidebar, race] = [null, null];
const busy = () => (race.running ? "The race is under way: wait for its end, or stop it." : "");
const chat = new Chat({ store, settings, keyring, tree, notice, busy, onsettings, onchange: () => sidebar?.draw() });
sidebar = new Sidebar(store, chat, () => {
  views("chat");
  toggle("open-sidebar", false);
  $("prompt").focus();
});
race = new Race({ settings, keyring, chat, onsettings });

keyring.onwanted = () => {
  $("open-key").hidden = false;
};
$("open-key").addEventListener("click", async () => {
  if (await keyring.enter()) meet();
});
addEventListener("storage", (event) => {
  if (event.key === null || event.key.startsWith("medusa.chat.")) {
    chat.reread();
    sidebar.draw();
  }
});

// Which model answers, and whether the server wants a key.
async function meet() {
  try {
    const { data } = await keyring.get("v1/models");
    $("model").textContent = data[0].id;
    document.title = `Medusa: ${data[0].id}`;
  } catch (trouble) {
    notice(trouble.message ?? "The server did not answer as expected.", meet);
  }
}

await meet();
if (!document.querySelector("dialog[open]") && !narrow.matches) $("prompt").focus();
