// One message on the page. It is built once and then updated as its text grows.

import { copyButton, element, fitHeight, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";

const ENDS = {
  length: "Reached the longest answer",
  context: "The model's context is full",
  stopped: "Stopped",
  broken: "Broke off",
  withheld: "Withheld by a review",
};

export class MessageView {
  #message;
  #body = element("div", { className: "body" });
  #status = element("div", { className: "status" });
  #footer = element("footer");
  #markdown = null;
  #shownText = null;
  #shownState = "";   // what the footer was made of

  /** actions: edit(message, text), regenerate(message), goOn(message). */
  constructor(message, actions) {
    const own = message.role === "user";
    this.#message = message;
    this.actions = actions;
    if (!own) this.#markdown = new Markdown(this.#body);
    this.root = element("article", { className: own ? "user" : "assistant", "aria-label": own ? "You" : "Model" },
      this.#body, this.#status, this.#footer);
  }

  /** job: the work on this message, if it is under way; last: whether it is the last of its role, lastOfAll: of all. */
  update({ job, last, lastOfAll }) {
    const { content, end, tokens, rate } = this.#message;
    if (content !== this.#shownText) {
      this.#shownText = content;
      if (this.#markdown) this.#markdown.update(content);
      else this.#body.textContent = content;
    }
    this.root.ariaBusy = job ? "true" : "false";
    this.root.classList.toggle("last", last);
    this.#showStatus(job);
    const state = [Boolean(job), last, lastOfAll, end, tokens, rate].join();
    if (state !== this.#shownState) {
      this.#shownState = state;
      this.#footer.replaceChildren(...this.#footerNodes(job, last, lastOfAll));
    }
  }

  /** Put a text field in place of the message. */
  edit() {
    const field = element("textarea", { value: this.#message.content, "aria-label": "Your message" });
    const close = () => {
      form.replaceWith(this.#body);
      this.#footer.hidden = false;
      this.#footer.querySelector("button")?.focus();
    };
    const send = () => {
      if (!field.value.trim()) return;
      close();
      this.actions.edit(this.#message, field.value);
    };
    const form = element("form", { className: "edit" }, field,
      element("button", { type: "button", className: "quiet", onclick: close }, "Cancel"),
      element("button", { type: "submit", className: "main" }, "Send"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    field.addEventListener("input", () => fitHeight(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (isSend(event)) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.#footer.hidden = true;
    this.#body.replaceWith(form);
    fitHeight(field);
    field.focus();
  }

  /** What is done before the first word. */
  #showStatus(job) {
    if (!job || this.#message.content) {
      this.#status.replaceChildren();
    } else if (job.progress === null) {
      this.#status.replaceChildren(element("span", { className: "pulse" }, job.waiting ? "Waiting for the model" : "Thinking"));
    } else {
      const percent = Math.floor(100 * job.progress);
      this.#status.replaceChildren(element("span", {}, `Reading the conversation: ${percent} %`),
        element("progress", { max: 100, value: percent, "aria-label": "Reading the conversation" }));
    }
  }

  *#footerNodes(job, last, lastOfAll) {
    const message = this.#message, { edit, regenerate, goOn } = this.actions;
    if (job) return;
    yield copyButton("Copy the message", () => message.content);
    if (message.role === "user") {
      if (last && edit) yield iconButton("edit", "Edit and send again", () => this.edit());
      return;
    }
    if (lastOfAll) yield iconButton("again", "Answer anew", () => regenerate(message));
    if (lastOfAll && message.end !== "stop" && message.end !== "context" && message.end !== "withheld") {
      yield element("button", { type: "button", className: "quiet", onclick: () => goOn(message) }, "Go on");
    }
    yield element("span", {}, describe(message));
  }
}

/** Enter without Shift, and not the Enter that ends the writing of a Chinese or Japanese word. */
export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function describe({ end = "broken", tokens, rate }) {
  const parts = [];
  if (ENDS[end]) parts.push(ENDS[end]);
  if (tokens) parts.push(`${tokens.toLocaleString()} tokens`);
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  return parts.join(" · ");
}
