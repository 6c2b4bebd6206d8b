// What the model may call, and a card for each call. The page runs nothing: whoever reads it writes what a call gave.

import { coloured } from "./code.js";
import { element, fitHeight, icon, isSend } from "./dom.js";
import { Failure } from "./server.js";

/** The part of a request that names the tools of a chat; raises Failure if they cannot be read. */
export function toolsOf(chat) {
  const problem = problemOf(chat.tools ?? "");
  if (problem) throw new Failure(`The tools of this chat cannot be used: ${problem}`, { code: "bad_tools" });
  return chat.tools?.trim() ? { tools: JSON.parse(chat.tools) } : {};
}

/** What is wrong with the text of a chat's tools, or "". */
export function problemOf(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    if (!Array.isArray(tools)) return "they must be a JSON list, as in the OpenAI interface.";
    const bad = tools.findIndex((tool) => typeof tool?.function?.name !== "string");
    return bad < 0 ? "" : `number ${bad + 1} must have a function with a name.`;
  } catch (error) {
    return `${error.message}.`;
  }
}

/** The cards of a message's calls. results: messages by the id of their call. answer(call, text): what it gave; null where
 * nothing is asked for. */
export function callCards(calls, results, answer) {
  return calls.map((call) => {
    const result = results.get(call.id);
    return element("section", { className: "call", "aria-label": `Call of ${call.function.name}` },
      element("header", {}, icon("tool"), element("b", {}, call.function.name || "…"),
        element("span", {}, result ? "answered" : answer ? "waits for a result" : "")),
      block("Arguments", call.function.arguments),
      result ? block("Result", result.content) : "",
      !result && answer ? resultForm((text) => answer(call, text)) : "");
  });
}

function block(label, text) {
  const pretty = indented(text);
  return element("div", { className: "part" }, element("small", {}, label),
    element("pre", { tabIndex: 0 }, pretty === null ? element("code", {}, text) : coloured(pretty, "json")));
}

/** JSON with line ends, or null if it is none (yet). */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return null;
  }
}

function resultForm(done) {
  const field = element("textarea", { rows: 1, placeholder: "What the call gave", "aria-label": "Result of the call" });
  const form = element("form", {}, field, element("button", { type: "submit", className: "main" }, "Give the result"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) done(field.value);
  });
  field.addEventListener("input", () => fitHeight(field));
  field.addEventListener("keydown", (event) => {
    if (!isSend(event)) return;
    event.preventDefault();
    form.requestSubmit();
  });
  return form;
}
