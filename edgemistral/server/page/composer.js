// Where messages are written: the draft, which outlives the page, and files that are sent with it.

import { chats } from "./chats.js";
import { element, fitHeight, hasTouchKeyboard, icon, iconButton, isSend, toast } from "./dom.js";
import { readTextFile, withFiles } from "./files.js";
import { lasting } from "./storage.js";

const PREFIX = "edgemistral.draft.";
const MAX_KEPT = 200_000;   // characters of a draft that outlive the page

export class Composer {
  #draft = document.getElementById("draft");
  #send = document.getElementById("send");
  #chips = document.getElementById("files");
  #files = new Map();   // by the id of a chat: [{name, text}]
  #chat = null;

  /** actions: submit(), stop(), changed(): of the draft, editLast(). */
  constructor(actions) {
    this.actions = actions;
    const form = document.getElementById("composer"), picker = document.getElementById("pick");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) actions.stop();
      else actions.submit();
    });
    this.#draft.addEventListener("keydown", (event) => {
      if (isSend(event)) {
        event.preventDefault();
        if (!this.busy) actions.submit();
      } else if (event.key === "ArrowUp" && !this.#draft.value && !this.busy) {
        event.preventDefault();
        actions.editLast();
      }
    });
    this.#draft.addEventListener("input", () => this.#changed());
    this.#draft.addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.addFiles(event.clipboardData.files);
    });
    document.getElementById("attach").addEventListener("click", () => picker.click());
    picker.addEventListener("change", () => {
      this.addFiles(picker.files);
      picker.value = "";
    });
    if (hasTouchKeyboard()) this.#draft.enterKeyHint = "enter";
  }

  /** What would be sent, or "". */
  get content() {
    return withFiles(this.#draft.value.trim(), this.#files.get(this.#chat?.id) ?? []);
  }

  /** Show the draft of a chat. */
  open(chat) {
    this.#chat = chat;
    this.#draft.value = lasting.getItem(keyOf(chat)) ?? "";
    this.#showFiles();
    fitHeight(this.#draft);
    if (!hasTouchKeyboard()) this.#draft.focus();   // the keyboard would cover half of a phone
  }

  /** Put a text where the draft is. */
  fill(text) {
    this.#draft.value = text;
    this.#changed();
    this.#draft.focus();
  }

  /** A chat's draft was sent, or the chat is gone. isNew: it was not kept yet when its draft was written. */
  clear(chat, isNew = false) {
    lasting.removeItem(isNew ? `${PREFIX}new` : keyOf(chat));
    this.#files.delete(chat.id);
    if (chat !== this.#chat) return;
    this.#draft.value = "";
    this.#showFiles();
    fitHeight(this.#draft);
  }

  /** Take the draft and the files along into another chat. */
  move(from, to) {
    const text = this.#draft.value;
    this.#files.set(to.id, this.#files.get(from.id) ?? []);
    this.clear(from);
    this.open(to);
    this.fill(text);
  }

  focus() {
    this.#draft.focus();
  }

  /** job: whether an answer is under way; ready: whether one can be asked for. */
  update({ job, ready }) {
    this.busy = job;
    const label = job ? "Stop (Esc)" : "Send (Enter)";
    this.#send.disabled = !job && (!ready || !this.content);
    if (this.#send.title === label) return;
    this.#send.title = label;
    this.#send.setAttribute("aria-label", label);
    this.#send.replaceChildren(icon(job ? "stop" : "send"));
  }

  async addFiles(files) {
    const chat = this.#chat;
    for (const file of files) {
      try {
        const read = await readTextFile(file);
        this.#files.set(chat.id, [...(this.#files.get(chat.id) ?? []), read]);
      } catch (error) {
        toast(error.message);
      }
    }
    this.#showFiles();
    this.actions.changed();
    this.#draft.focus();
  }

  #changed() {
    fitHeight(this.#draft);
    try {
      const text = this.#draft.value;
      if (text && text.length <= MAX_KEPT) lasting.setItem(keyOf(this.#chat), text);
      else lasting.removeItem(keyOf(this.#chat));
    } catch {
      // full: the draft holds until the page is closed
    }
    this.actions.changed();
  }

  #showFiles() {
    const files = this.#files.get(this.#chat.id) ?? [];
    this.#chips.hidden = !files.length;
    this.#chips.replaceChildren(...files.map((file) => element("span", { className: "chip", title: file.name },
      icon("file"), element("span", {}, file.name), element("small", {}, sizeOf(file.text)),
      iconButton("cross", `Take out ${file.name}`, () => {
        this.#files.set(this.#chat.id, files.filter((other) => other !== file));
        this.#showFiles();
        this.actions.changed();
        this.#draft.focus();
      }))));
  }
}

function keyOf(chat) {
  return PREFIX + (chats.has(chat.id) ? chat.id : "new");
}

function sizeOf(text) {
  return text.length < 1000 ? `${text.length} characters` : `${Math.round(text.length / 1000).toLocaleString()} kB`;
}
