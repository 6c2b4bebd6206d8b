// The list of chats, with the menu of each.

import { asMarkdown, conversation, sortedChats, titleOf } from "./chats.js";
import { element, iconButton } from "./dom.js";

export class Sidebar {
  #list = document.getElementById("chats");
  #menu = document.getElementById("chat-menu");
  #dialog = document.getElementById("rename");
  #chat = null;   // whose menu is open
  #shown = "";

  /** actions: renamed(chat), remove(chat). */
  constructor(actions) {
    this.actions = actions;
    this.#menu.addEventListener("click", ({ target }) => this.#choose(target.dataset.action));
    const [cancel] = this.#dialog.querySelectorAll("button");
    cancel.addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("submit", () => {
      this.#chat.title = document.getElementById("new-title").value.trim();
      actions.renamed(this.#chat);
    });
  }

  /** current: the chat on the page; busy(chat): whether an answer to it is under way. */
  update(current, busy) {
    const chats = sortedChats();
    const shown = JSON.stringify([current.id, chats.map((chat) => [chat.id, titleOf(chat), busy(chat)])]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const focused = this.#list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    this.#list.replaceChildren(...chats.map((chat) => this.#row(chat, chat.id === current.id, busy(chat))));
    if (focused) this.#list.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  }

  #row(chat, current, busy) {
    const title = titleOf(chat);
    const link = element("a", { href: `#${chat.id}`, title }, title);
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
      download(`${fileName(chat)}.md`, "text/markdown", asMarkdown(chat));
    } else {
      download(`${fileName(chat)}.json`, "application/json", JSON.stringify({ messages: conversation(chat) }, null, 2));
    }
  }
}

function fileName(chat) {
  return titleOf(chat).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "chat";
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
