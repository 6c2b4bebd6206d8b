// One message on the page. It is built once and then updated as its text grows.

import { copyButton, element, fitHeight, icon, iconButton, isSend, timeNode } from "./dom.js";
import { Markdown } from "./markdown.js";
import { callCards } from "./tools.js";

const ENDS = {
  length: "Reached the longest answer",
  context: "The model's context is full",
  stopped: "Stopped",
  broken: "Broke off",
  withheld: "Withheld by a review",
};
const WHOLE = ["stop", "tool_calls", "context", "withheld"];   // ends after which there is nothing to go on with
const NAMES = { user: "You", assistant: "Model", tool: "Tool" };

export class MessageView {
  #message;
  #body = element("div", { className: "body" });
  #calls = element("div", { className: "calls" });
  #status = element("div", { className: "status" });
  #footer = element("footer");
  #markdown = null;
  #shownText = "";
  #shownCalls = "";
  #shownState = "";   // what the footer was made of

  /** actions: edit(message, text): and ask again, false if that cannot be; correct(message, text), remove(message),
   * regenerate(message), goOn(message), show(message, version), answerCall(message, call, text). */
  constructor(message, actions) {
    const { role } = message;
    this.#message = message;
    this.actions = actions;
    if (role === "assistant") this.#markdown = new Markdown(this.#body);
    this.root = element("article", { className: role, "aria-label": NAMES[role] },
      this.#body, this.#calls, this.#status, this.#footer);
  }

  /** job: the work on this message, if it is under way; idle: none is in this chat; last: whether it is the last of its
   * role, lastOfAll: of all; results: of tool calls, by their ids. */
  update({ job, idle, last, lastOfAll, results }) {
    const { content, end, tokens, rate, at, version, versions } = this.#message;
    const growing = Boolean(job);
    const shown = `${growing}${content}`;
    if (shown !== this.#shownText) {
      this.#shownText = shown;
      if (this.#markdown) this.#markdown.update(content, growing);
      else this.#body.textContent = content;
    }
    this.#body.hidden = !content && this.#message.role === "assistant";
    this.root.ariaBusy = job ? "true" : "false";
    this.root.classList.toggle("last", last);
    this.#showStatus(job);
    this.#showCalls(idle, results);
    const state = [growing, last, lastOfAll, end, tokens, rate, at, version, versions?.length].join();
    if (state !== this.#shownState) {
      this.#shownState = state;
      this.#footer.replaceChildren(...this.#footerNodes(job, last, lastOfAll));
    }
  }

  /** Put a text field in place of the message. */
  edit() {
    const own = this.#message.role === "user";
    const label = own ? "Your message" : "The model's answer";
    const field = element("textarea", { value: this.#message.content, "aria-label": label });
    const close = () => {
      form.replaceWith(this.#body);
      this.#footer.hidden = false;
      this.#footer.querySelector("button")?.focus();
    };
    const done = async (act) => {
      if (field.value.trim() && await act(this.#message, field.value) !== false) close();
    };
    const { edit, correct } = this.actions;
    const form = element("form", { className: "edit" }, field,
      element("button", { type: "button", className: "quiet", onclick: close }, "Cancel"),
      element("button", { type: "button", className: own ? "quiet" : "main", onclick: () => done(correct) }, "Save"),
      own ? element("button", { type: "submit", className: "main" }, "Send") : "");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      done(edit);
    });
    field.addEventListener("input", () => fitHeight(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (own ? isSend(event) : isSend(event) && (event.ctrlKey || event.metaKey)) done(own ? edit : correct);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.#footer.hidden = true;
    this.#body.hidden = false;
    this.#body.replaceWith(form);
    fitHeight(field);
    field.focus();
  }

  /** What is done before the first word. */
  #showStatus(job) {
    if (!job || this.#message.content || this.#message.tool_calls) {
      this.#status.replaceChildren();
    } else if (job.progress === null) {
      this.#status.replaceChildren(element("span", { className: "pulse" }, job.waiting ? "Waiting for the model" : "Thinking"));
    } else {
      const percent = Math.floor(100 * job.progress);
      this.#status.replaceChildren(element("span", {}, `Reading the conversation: ${percent} %`),
        element("progress", { max: 100, value: percent, "aria-label": "Reading the conversation" }));
    }
  }

  #showCalls(idle, results) {
    const message = this.#message, calls = message.tool_calls ?? [];
    const shown = JSON.stringify([idle, calls, calls.map(({ id }) => results.get(id)?.content)]);
    if (shown === this.#shownCalls) return;
    this.#shownCalls = shown;
    const answer = idle ? (call, text) => this.actions.answerCall(message, call, text) : null;
    this.#calls.replaceChildren(...callCards(calls, results, answer));
  }

  *#footerNodes(job, last, lastOfAll) {
    const message = this.#message, { regenerate, goOn, remove } = this.actions;
    if (job) return;
    if (message.versions) yield this.#switch();
    yield copyButton("Copy the message", () => message.content || JSON.stringify(message.tool_calls));
    if (message.role === "user") {
      yield iconButton("edit", last ? "Edit and send again" : "Edit", () => this.edit());
    } else if (message.role === "assistant") {
      if (message.content) yield iconButton("edit", "Edit the answer", () => this.edit());
      yield iconButton("again", lastOfAll ? "Answer anew" : "Answer anew from here", () => regenerate(message));
    }
    yield iconButton("bin", "Delete the message", () => remove(message));
    if (message.role === "assistant" && lastOfAll && !WHOLE.includes(message.end)) {
      yield element("button", { type: "button", className: "quiet", onclick: () => goOn(message) }, "Go on");
    }
    if (message.at) yield timeNode(message.at);
    if (message.role === "assistant") yield element("span", {}, describe(message));
  }

  /** Which version is shown, and buttons to those beside it. */
  #switch() {
    const { version, versions } = this.#message, { show } = this.actions;
    const button = (name, label, index) => element("button", {
      type: "button", className: "icon", title: label, "aria-label": label, disabled: !(index in versions),
      onclick: () => show(this.#message, index),
    }, icon(name));
    return element("span", { className: "versions", role: "group", "aria-label": "Versions" },
      button("left", "The version before", version - 1),
      element("span", { "aria-live": "polite" }, `${version + 1}/${versions.length}`),
      button("right", "The next version", version + 1));
  }
}

function describe({ end = "broken", tokens, rate }) {
  const parts = [];
  if (ENDS[end]) parts.push(ENDS[end]);
  if (tokens) parts.push(`${tokens.toLocaleString()} tokens`);
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  return parts.join(" · ");
}
