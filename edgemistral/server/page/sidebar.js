// The list of chats by date, with the menu of each, the search, and the way in and out for files.

import { chats as kept, sortedChats, titleOf } from "./chats.js";
import { element, iconButton, toast } from "./dom.js";
import { exportAll, exportJson, exportMarkdown, readChats } from "./transfer.js";

const DAY = 24 * 3600 * 1000;   // ms

export class Sidebar {
  #list = document.getElementById("chats");
  #menu = document.getElementById("chat-menu");
  #dialog = document.getElementById("rename");
  #find = document.getElementById("find");
  #chat = null;   // whose menu is open
  #shown = "";

  /** actions: renamed(chat), remove(chat), imported(chats), changed(): there is more to show. */
  constructor(actions) {
    this.actions = actions;
    this.#menu.addEventListener("click", ({ target }) => this.#choose(target.dataset.action));
    const [cancel] = this.#dialog.querySelectorAll("button");
    cancel.addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("submit", () => {
      this.#chat.title = document.getElementById("new-title").value.trim();
      actions.renamed(this.#chat);
    });
    this.#find.addEventListener("input", () => actions.changed());
    const picker = document.getElementById("pick-chats");
    document.getElementById("import").addEventListener("click", () => picker.click());
    document.getElementById("export").addEventListener("click", () => exportAll());
    picker.addEventListener("change", () => {
      this.import([...picker.files]);
      picker.value = "";
    });
  }

  /** Take over the chats of files; says what came of it. */
  async import(files) {
    const found = [], problems = [];
    for (const file of files) {
      try {
        found.push(...await readChats(file));
      } catch (error) {
        problems.push(error.message);
      }
    }
    if (found.length) this.actions.imported(found);
    const done = found.length === 1 ? "Imported a chat." : `Imported ${found.length} chats.`;
    toast([...problems, ...(found.length ? [done] : [])].join(" "));
  }

  /** current: the chat on the page; busy(chat): whether an answer to it is under way. */
  update(current, busy) {
    const chats = sortedChats(this.#find.value);
    const parts = chats.map((chat) => [chat.id, titleOf(chat), dayOf(chat), busy(chat)]);
    const shown = JSON.stringify([this.#find.value, current.id, parts]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const focused = this.#list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    const rows = chats.flatMap((chat, i) => [
      ...(i && dayOf(chats[i - 1]) === dayOf(chat) ? [] : [element("li", { className: "day" }, dayOf(chat))]),
      this.#row(chat, chat.id === current.id, busy(chat)),
    ]);
    if (!rows.length && this.#find.value.trim()) rows.push(element("li", { className: "day" }, "Nothing found"));
    this.#list.replaceChildren(...rows);
    document.getElementById("export").disabled = !kept.size;
    if (focused) this.#list.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  }

  #row(chat, current, busy) {
    const title = titleOf(chat);
    const link = element("a", { href: `#${chat.id}`, title: `${title}\n${new Date(chat.updated).toLocaleString()}` }, title);
    link.dataset.id = chat.id;
    if (current) link.setAttribute("aria-current", "page");
    if (busy) link.append(element("span", { className: "pulse", "aria-label": "is being answered" }));
    const more = iconButton("more", `More on ${title}`, () => this.#open(chat, more));
    more.setAttribute("aria-haspopup", "true");
    return element("li", {}, link, more);
  }

  #open(chat, button) {
    this.#chat = chat;
    this.#menu.showPopover();
    const { right, bottom, top } = button.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#menu;
    this.#menu.style.left = `${Math.max(8, Math.min(right - width, innerWidth - width - 8))}px`;
    this.#menu.style.top = `${bottom + height < innerHeight ? bottom : Math.max(8, top - height)}px`;
  }

  #choose(action) {
    const chat = this.#chat;
    if (!action) return;
    this.#menu.hidePopover();
    if (action === "rename") {
      document.getElementById("new-title").value = titleOf(chat);
      this.#dialog.showModal();
      document.getElementById("new-title").select();
    } else if (action === "remove") {
      this.actions.remove(chat);
    } else if (action === "markdown") {
      exportMarkdown(chat);
    } else {
      exportJson(chat);
    }
  }
}

/** Under which date a chat stands in the list. */
function dayOf({ updated }) {
  const now = new Date(), midnight = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime();
  if (updated >= midnight) return "Today";
  if (updated >= midnight - DAY) return "Yesterday";
  if (updated >= midnight - 7 * DAY) return "The last 7 days";
  return new Date(updated).toLocaleDateString([], { month: "long", year: "numeric" });
}
