// The panel of how answers are drawn: one set for all chats, kept in the browser.

import { element } from "./dom.js";
import { lasting } from "./storage.js";

const KEY = "edgemistral.settings";
const LENGTHS = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, null];   // null: until the model ends or the context is full
const SLIDERS = [
  { name: "temperature", label: "Temperature", hint: "0 always takes the likeliest word; more is more varied",
    initial: 0.7, max: 2, step: 0.05 },
  { name: "top_p", label: "Top-p", hint: "Only the likeliest words that together reach this probability",
    initial: 1, max: 1, step: 0.01 },
  { name: "top_k", label: "Top-k", hint: "Only so many of the likeliest words", initial: 0, max: 200, step: 1,
    shown: (value) => value || "all" },
  { name: "min_p", label: "Min-p", hint: "Only words at least this fraction as likely as the likeliest",
    initial: 0, max: 0.5, step: 0.01 },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "More makes repeating words less likely",
    initial: 1, min: 1, max: 1.5, step: 0.01 },
  { name: "max_tokens", label: "Longest answer", hint: "In tokens: about three quarters of a word each",
    initial: LENGTHS.length - 1, max: LENGTHS.length - 1, step: 1, shown: (value) => LENGTHS[value] ?? "no limit" },
];

export class Settings {
  #values;
  #inputs = new Map();

  /** root: where the controls go. */
  constructor(root) {
    this.#values = read();
    const sliders = SLIDERS.map((slider) => this.#slider(slider));
    const seed = element("input", { type: "number", id: "seed", min: 0, step: 1, placeholder: "a new one each time" });
    seed.addEventListener("input", () => this.#set("seed", seed.value.trim()));
    const guardrail = element("input", { type: "checkbox", id: "safe_prompt" });
    guardrail.addEventListener("change", () => this.#set("safe_prompt", guardrail.checked));
    const reset = element("button", { type: "button", className: "quiet" }, "Reset all to the defaults");
    reset.addEventListener("click", () => {
      this.#values = {};
      this.#store();
    });
    this.#inputs.set("seed", () => { seed.value = this.#values.seed ?? ""; });
    this.#inputs.set("safe_prompt", () => { guardrail.checked = this.#values.safe_prompt ?? false; });
    root.append(...sliders,
      element("div", { className: "field" },
        element("label", { htmlFor: "seed", title: "The same seed gives the same answer" }, "Seed"), seed),
      element("label", { className: "check", title: "Puts Mistral's recommended guardrail before the conversation" },
        guardrail, "Guardrail: answer with care, respect and truth"),
      reset);
    this.#show();
  }

  /** For the body of a request. */
  parameters() {
    const values = Object.fromEntries(SLIDERS.map(({ name, initial }) => [name, this.#values[name] ?? initial]));
    const seed = /^\d{1,15}$/.test(this.#values.seed ?? "") ? Number(this.#values.seed) : null;
    return { ...values, max_tokens: LENGTHS[values.max_tokens], seed, safe_prompt: this.#values.safe_prompt ?? false };
  }

  #slider({ name, label, hint, initial, min = 0, max, step, shown = String }) {
    const input = element("input", { type: "range", id: name, min, max, step, title: hint });
    const output = element("output", { htmlFor: name });
    input.addEventListener("input", () => this.#set(name, Number(input.value)));
    this.#inputs.set(name, () => {
      const value = this.#values[name] ?? initial;
      input.value = value;
      output.value = shown(value);
      input.setAttribute("aria-valuetext", output.value);
    });
    return element("div", { className: "field" },
      element("label", { htmlFor: name, title: hint }, label), output, input);
  }

  #set(name, value) {
    this.#values[name] = value;
    this.#store();
  }

  #store() {
    try {
      lasting.setItem(KEY, JSON.stringify(this.#values));
    } catch {
      // full: they hold until the page is closed
    }
    this.#show();
  }

  #show() {
    for (const show of this.#inputs.values()) show();
  }
}

/** What was stored, as far as it is in range. */
function read() {
  let stored;
  try {
    stored = JSON.parse(lasting.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
  const values = { safe_prompt: stored.safe_prompt === true, seed: String(stored.seed ?? "") };
  for (const { name, min = 0, max } of SLIDERS) {
    if (stored[name] >= min && stored[name] <= max) values[name] = Number(stored[name]);
  }
  return values;
}
