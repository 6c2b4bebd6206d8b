// The chat page: what is shown, and what keys and buttons do.

import { Answers, rateOf } from "./answers.js";
import { chats, conversation, idOf, lastUserOf, loadChats, newChat, readChat, removeChat, saveChat, titleOf } from "./chats.js";
import { watchColours } from "./colours.js";
import { Composer } from "./composer.js";
import { announce, element, toast } from "./dom.js";
import { watchDrops } from "./drop.js";
import { MessageView } from "./message.js";
import { countTokens, Failure } from "./server.js";
import { Settings } from "./settings.js";
import { Server } from "./state.js";
import { Sidebar } from "./sidebar.js";
import { problemOf } from "./tools.js";
import { addVersion, showVersion } from "./versions.js";

const NEAR_END = 40;   // pixels above the end at which the page still follows a growing answer
const COUNT_WITHIN = 3000;   // ms: when counting takes longer, a message is sent uncounted
const TOOLS_HINT = "A JSON list as in the OpenAI interface. What the model calls is shown as a card, and you write the result.";
const EXAMPLES = [
  "Explain in three sentences why the sky is blue.", "Write a short poem about the first snow.",
  "What should I see on a weekend in Paris?", "Write a Python function that checks whether a word is a palindrome.",
];

const $ = (id) => document.getElementById(id);
const [scroll, log, system, tools] = ["scroll", "log", "system", "tools"].map($);

let current = newChat();      // the chat on the page; kept once it has a message
let follow = true;            // the growing answer
let planned = false;          // a drawing of the page
let submitting = false;       // a message whose tokens are being counted
const used = new Map();       // by the id of a chat: tokens of the conversation and the draft, once they were counted
const notices = new Map();    // by the id of a chat: a Failure
const views = new WeakMap();  // by message

const server = new Server({ changed: plan, ready: () => { measureSoon(); retryLocked(); } });
const answers = new Answers(new Settings($("settings")), {
  changed: (chat) => { if (chat === current) plan(); },
  failed(chat, failure) {
    const unanswered = isUnanswered(chat);
    if (failure.code !== "stopped" || unanswered) notices.set(chat.id, failure);   // a part of an answer says it itself
    server.failed(failure);
  },
  ended(chat, message) {
    save(chat);
    const calls = (message.tool_calls ?? []).map(({ function: { name } }) => `Calls ${name}`);
    if (chat === current) announce(`Answer: ${[message.content.slice(0, 5000), ...calls].join(" ")}`);
    measureSoon();
    plan();
  },
});
const composer = new Composer({
  submit,
  stop: () => answers.stop(current),
  changed() {
    if (notices.get(current.id)?.code === "too_long") notices.delete(current.id);
    measureSoon();
    plan();
  },
  editLast() {
    const last = lastUserOf(current);
    if (last) views.get(last).edit();
  },
});
const sidebar = new Sidebar({
  renamed(chat) { save(chat); plan(); },
  remove,
  imported(found) {
    found.forEach(save);
    location.hash = found[0].id;
    plan();
  },
  changed: plan,
});
const actions = {
  async edit(message, text) {
    const chat = current, before = conversation(chat, chat.messages.indexOf(message));
    if (!await fits(chat, [...before, { role: "user", content: text }], "too_long_edit")) return false;
    ask(chat, () => {
      addVersion(chat, message);
      Object.assign(message, { content: text, at: Date.now() });
    });
    return true;
  },
  correct(message, text) {
    change(current, () => { message.content = text; });
  },
  remove(message) {
    const chat = current, before = [...chat.messages], count = countOfTurn(chat, message);
    change(chat, () => chat.messages.splice(chat.messages.indexOf(message), count));
    const withAnswer = message.role === "user" && count > 1;
    toast(withAnswer ? "Deleted the message and its answer." : "Deleted the message.", "Undo", () => {
      change(chat, () => { chat.messages = before; });
    });
  },
  regenerate(message) {
    const chat = current;
    ask(chat, () => addVersion(chat, message), { into: message });
  },
  show(message, version) {
    const chat = current;
    change(chat, () => showVersion(chat, message, version));
  },
  answerCall(message, call, text) {
    const chat = current, result = { role: "tool", tool_call_id: call.id, content: text, at: Date.now() };
    const insert = () => chat.messages.push(result);
    const results = resultsOf(chat);
    const isLast = message.tool_calls.every(({ id }) => id === call.id || results.has(id));
    if (isLast) ask(chat, insert);
    else change(chat, insert);
  },
  goOn: () => ask(current, () => {}, { goOn: true }),
};

// ---- what happens ---------------------------------------------------------------------------------------------------

/** Change a chat and let the model answer it. */
async function ask(chat, alter, options = {}) {
  await answers.stop(chat);
  alter();
  notices.delete(chat.id);
  chat.updated = Date.now();
  follow = true;
  save(chat);
  if (chat === current) history.replaceState(null, "", `#${chat.id}`);
  answers.start(chat, { context: server.context, ...options });
}

/** Change a chat, and ask nothing. */
async function change(chat, alter) {
  await answers.stop(chat);
  alter();
  notices.delete(chat.id);
  save(chat);
  measureSoon();
  plan();
}

async function submit() {
  const chat = current, content = composer.content;
  if (!content || submitting) return;
  if (!server.ready) {
    toast("The model is not ready yet.");
    return;
  }
  submitting = true;
  const message = { role: "user", content };
  const isRoom = await fits(chat, [...conversation(chat), message], "too_long");
  submitting = false;
  if (!isRoom) return;
  composer.clear(chat, !chats.has(chat.id));
  ask(chat, () => chat.messages.push({ ...message, at: Date.now() }));
}

/** Whether the model has room for these messages and an answer; if not, the page says so, and nothing is sent. */
async function fits(chat, messages, code) {
  const tokens = await countTokens(messages, AbortSignal.timeout(COUNT_WITHIN)).catch(() => 0);   // the answer will tell
  if (tokens < server.context) return true;
  const [all, limit, over] = [tokens, server.context, tokens - server.context + 1].map((n) => n.toLocaleString());
  notices.set(chat.id, new Failure(`This conversation is too long for the model: ${all} tokens, and it reads and writes at `
    + `most ${limit}. Shorten your message by ${over} tokens or more, or begin a new chat.`, { code }));
  plan();
  return false;
}

/** How many messages belong to one that is deleted: a question takes its answer along, an answer the results of its calls. */
function countOfTurn({ messages }, message) {
  const at = messages.indexOf(message);
  if (message.role === "tool") return 1;
  const ends = message.role === "user" ? ["user"] : ["user", "assistant"];
  const next = messages.findIndex(({ role }, i) => i > at && ends.includes(role));
  return (next < 0 ? messages.length : next) - at;
}

/** Whether it is the model's turn. */
function isUnanswered(chat) {
  const { role } = chat.messages.at(-1) ?? { role: "assistant" }, results = resultsOf(chat);
  const calls = chat.messages.findLast((message) => message.role === "assistant")?.tool_calls ?? [];
  return role === "user" || (role === "tool" && calls.every(({ id }) => results.has(id)));
}

/** The messages that hold what tool calls gave, by the ids of the calls. */
function resultsOf(chat) {
  return new Map(chat.messages.filter(({ role }) => role === "tool").map((message) => [message.tool_call_id, message]));
}

function save(chat) {
  if (!saveChat(chat)) toast("The browser's storage is full: delete old chats, or this one is lost when the page closes.");
}

async function remove(chat) {
  await answers.stop(chat);
  composer.clear(chat);
  removeChat(chat);
  notices.delete(chat.id);
  if (chat.id === current.id) location.hash = "";
  toast(`Deleted “${titleOf(chat)}”.`, "Undo", () => {
    save(chat);
    location.hash = chat.id;
    plan();
  });
  plan();
}

/** Show the chat that the address names, or a new one. */
function open() {
  const chat = chats.get(location.hash.slice(1)) ?? newChat();
  if (chat.id !== current.id) show(chat);
}

function show(chat) {
  current = chat;
  follow = true;
  system.value = chat.system;
  tools.value = chat.tools ?? "";
  checkTools();
  log.replaceChildren();
  closeSide();
  measureSoon();
  draw();
  composer.open(chat);
  draw();
}

/** A new chat, on the page at once: what is typed next belongs to it. */
function begin(withDraft = false) {
  // Not by the event that a change of location.hash brings, which comes later.
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  const before = current;
  if (chats.has(before.id)) {
    current = newChat();
    if (withDraft) composer.move(before, current);
    show(current);
  }
  closeSide();
  composer.focus();
}

/** After a key was given: ask again what was refused. */
function retryLocked() {
  if (notices.get(current.id)?.status === 401) ask(current, () => {});
}

/** Count the tokens of the conversation a moment after the last change. */
function measureSoon() {
  clearTimeout(measureSoon.timer);
  measureSoon.timer = setTimeout(measure, 300);
}

async function measure() {
  measure.abort?.abort();
  measure.abort = new AbortController();
  const chat = current, text = composer.content;
  if (answers.job(chat) || !server.ready) return;
  const messages = text ? [...conversation(chat), { role: "user", content: text }] : conversation(chat);
  try {
    const tokens = chat.messages.length || text ? await countTokens(messages, measure.abort.signal) : 0;
    used.set(chat.id, tokens);
    plan();
  } catch {
    // another one is on its way, or asking will tell what is wrong
  }
}

// ---- what is shown --------------------------------------------------------------------------------------------------

/** Draw once before the next frame. */
function plan() {
  if (!planned) requestAnimationFrame(draw);
  planned = true;
}

function draw() {
  planned = false;
  const job = answers.job(current), { messages } = current;
  const lastUser = lastUserOf(current), results = resultsOf(current);
  const called = new Set(messages.flatMap(({ tool_calls: calls }) => calls ?? []).map(({ id }) => id));
  const shown = messages.filter(({ role, tool_call_id: id }) => role !== "tool" || !called.has(id));   // others: on a card
  for (const message of shown) {
    if (!views.has(message)) views.set(message, new MessageView(message, actions));
    const lastOfAll = message === shown.at(-1);
    const own = job?.message === message ? job : null, last = lastOfAll || message === lastUser;
    views.get(message).update({ job: own, idle: !job && lastOfAll, last, lastOfAll, results });
  }
  const roots = shown.map((message) => views.get(message).root);
  if (roots.length !== log.children.length || roots.some((root, i) => root !== log.children[i])) log.replaceChildren(...roots);
  $("empty").hidden = messages.length > 0;
  $("title").textContent = titleOf(current);
  document.title = messages.length ? `${titleOf(current)} – edgemistral` : "edgemistral";
  $("system-shown").hidden = !current.system.trim();
  $("system-shown").textContent = `System text: ${current.system.trim()}`;
  drawNotice(job);
  composer.update({ job: Boolean(job), ready: server.ready });
  drawContext(job);
  sidebar.update(current, (chat) => Boolean(answers.job(chat)));
  if (follow) scroll.scrollTop = scroll.scrollHeight;
}

function drawNotice(job) {
  const failure = notices.get(current.id), unanswered = isUnanswered(current), tooMuch = failure?.code === "too_long";
  const text = job ? "" : failure?.message ?? (unanswered ? "This message has no answer yet." : "");
  if ($("notice").dataset.text === text) return;
  $("notice").dataset.text = text;
  $("notice").className = failure && failure.code !== "stopped" ? "error" : "";
  $("notice").replaceChildren(...(text ? [element("span", {}, text)] : []));
  const add = (label, onclick) => $("notice").append(element("button", { type: "button", className: "quiet", onclick }, label));
  if (tooMuch && current.messages.length) add("New chat with this message", () => begin(true));
  else if (text && unanswered && !tooMuch) add(failure ? "Try again" : "Answer it", () => ask(current, () => {}));
}

function drawContext(job) {
  const rate = job ? rateOf(job) : 0;
  $("rate").textContent = rate ? `${rate.toFixed(1)} tokens/s` : "";
  const tokens = (used.get(current.id) ?? 0) + (job?.pieces ?? 0), share = tokens / server.context;
  const meter = $("context"), text = `${tokens.toLocaleString()} of ${server.context.toLocaleString()} tokens`;
  meter.hidden = !server.context || !used.has(current.id);
  meter.title = share > 1 ? "Too long for the model: shorten it or begin a new chat" : "Of the model's context";
  meter.classList.toggle("full", share > 0.9);
  meter.setAttribute("aria-valuenow", tokens);
  meter.setAttribute("aria-valuemax", server.context);
  meter.setAttribute("aria-valuetext", text);
  meter.querySelector("b").style.width = `${Math.min(100, 100 * share)}%`;
  meter.lastChild.textContent = text;
}

function checkTools() {
  const problem = problemOf(tools.value);
  tools.setCustomValidity(problem);
  $("tools-hint").textContent = problem ? `This cannot be used: ${problem}` : TOOLS_HINT;
  $("tools-hint").classList.toggle("bad", Boolean(problem));
}

function closeSide() {
  document.body.classList.remove("side-open");
  $("menu").setAttribute("aria-expanded", "false");
}

// ---- keys, buttons, and the rest of the browser ---------------------------------------------------------------------

system.addEventListener("input", () => {
  current.system = system.value;
  if (chats.has(current.id)) save(current);
  measureSoon();
  plan();
});
tools.addEventListener("input", () => {
  current.tools = tools.value;
  checkTools();
  if (chats.has(current.id)) save(current);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector(":popover-open, dialog[open]")) return;
  if (document.body.classList.contains("side-open")) {
    closeSide();
    $("menu").focus();
  } else {
    answers.stop(current);
  }
});
$("new").addEventListener("click", () => begin());
$("menu").addEventListener("click", (event) => {
  event.stopPropagation();
  const isOpen = document.body.classList.toggle("side-open");
  $("menu").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("new").focus();
});
document.querySelector("main").addEventListener("click", closeSide);
$("down").addEventListener("click", () => {
  follow = true;
  draw();
});
scroll.addEventListener("scroll", () => {
  const below = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
  follow = below < NEAR_END;
  $("down").hidden = follow;
});
watchDrops({ addFiles: (files) => composer.addFiles(files), importFiles: (files) => sidebar.import(files) });
window.addEventListener("hashchange", open);
window.addEventListener("pagehide", () => answers.saveAll(chats));
window.addEventListener("storage", ({ key }) => {   // another tab's doing
  const id = idOf(key);
  if (!id || (chats.has(id) && answers.job(chats.get(id)))) return;
  readChat(id);
  if (id === current.id) current = chats.get(id) ?? current;
  plan();
});

$("where").textContent = ["127.0.0.1", "localhost", "[::1]"].includes(location.hostname)
  ? "The model runs on this computer, and what you write stays here. Its answers can be wrong."
  : `The model runs on ${location.hostname}. Its answers can be wrong.`;
watchColours();
$("examples").append(...EXAMPLES.map((text) =>
  element("button", { type: "button", className: "quiet", onclick: () => composer.fill(text) }, text)));
loadChats();
show(chats.get(location.hash.slice(1)) ?? current);
server.watch();
