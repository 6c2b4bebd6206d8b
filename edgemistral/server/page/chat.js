// The chat page: what is shown, and what keys and buttons do.

import { Answers, rateOf } from "./answers.js";
import { chats, conversation, idOf, loadChats, newChat, readChat, removeChat, saveChat, titleOf } from "./chats.js";
import { announce, element, fitHeight, icon, toast } from "./dom.js";
import { isSend, MessageView } from "./message.js";
import { countTokens } from "./server.js";
import { Settings } from "./settings.js";
import { Server } from "./state.js";
import { Sidebar } from "./sidebar.js";
import { lasting } from "./storage.js";

const THEMES = ["auto", "light", "dark"];
const NEAR_END = 40;   // pixels above the end at which the page still follows a growing answer

const $ = (id) => document.getElementById(id);
const [scroll, log, draft, send, system] = ["scroll", "log", "draft", "send", "system"].map($);

let current = newChat();      // the chat on the page; kept once it has a message
let follow = true;            // the growing answer
let used = 0;                 // tokens of the conversation and the draft
let planned = false;          // a drawing of the page
const drafts = new Map();     // of the other chats
const notices = new Map();    // by the id of a chat: a Failure
const views = new WeakMap();  // by message

const server = new Server({ changed: plan, ready: () => { measureSoon(); retryLocked(); } });
const answers = new Answers(new Settings($("settings")), {
  changed: (chat) => { if (chat === current) plan(); },
  failed(chat, failure) {
    const unanswered = chat.messages.at(-1)?.role === "user";
    if (failure.code !== "stopped" || unanswered) notices.set(chat.id, failure);   // a part of an answer says it itself
    server.failed(failure);
  },
  ended(chat, message) {
    save(chat);
    if (chat === current) announce(`Answer: ${message.content.slice(0, 5000)}`);
    measureSoon();
    plan();
  },
});
const sidebar = new Sidebar({ renamed(chat) { save(chat); plan(); }, remove });
const actions = {
  edit(message, text) {
    const chat = current;
    ask(chat, () => {
      chat.messages.length = chat.messages.indexOf(message) + 1;
      message.content = text;
    });
  },
  regenerate(message) {
    const chat = current;
    ask(chat, () => chat.messages.splice(chat.messages.indexOf(message), 1), { instead: message });
  },
  goOn: () => ask(current, () => {}, { goOn: true }),
};

// ---- what happens ---------------------------------------------------------------------------------------------------

/** Change a chat and let the model answer it. */
async function ask(chat, change, options = {}) {
  await answers.stop(chat);
  change();
  notices.delete(chat.id);
  chat.updated = Date.now();
  follow = true;
  save(chat);
  if (chat === current) history.replaceState(null, "", `#${chat.id}`);
  answers.start(chat, { context: server.context, ...options });
}

function submit() {
  const text = draft.value.trim();
  if (!text) return;
  if (!server.ready) {
    toast("The model is not ready yet.");
    return;
  }
  draft.value = "";
  fitHeight(draft);
  ask(current, () => current.messages.push({ role: "user", content: text }));
}

function save(chat) {
  if (!saveChat(chat)) toast("The browser's storage is full: delete old chats, or this one is lost when the page closes.");
}

async function remove(chat) {
  await answers.stop(chat);
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
  if (chat.id === current.id) return;
  drafts.set(current.id, draft.value);
  current = chat;
  follow = true;
  draft.value = drafts.get(chat.id) ?? "";
  system.value = chat.system;
  log.replaceChildren();
  closeSide();
  measureSoon();
  draw();
  fitHeight(draft);
  draft.focus();
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
  const chat = current, text = draft.value.trim();
  const messages = text ? [...conversation(chat), { role: "user", content: text }] : conversation(chat);
  if (answers.job(chat) || !server.ready) return;
  try {
    const count = chat.messages.length || text ? await countTokens(messages, measure.abort.signal) : 0;
    if (chat === current) used = count;
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
  const lastUser = messages.findLast(({ role }) => role === "user");
  for (const message of messages) {
    if (!views.has(message)) views.set(message, new MessageView(message, actions));
    const lastOfAll = message === messages.at(-1);
    views.get(message).update({ job: job?.message === message ? job : null, last: lastOfAll || message === lastUser, lastOfAll });
  }
  const roots = messages.map((message) => views.get(message).root);
  if (roots.length !== log.children.length || roots.some((root, i) => root !== log.children[i])) log.replaceChildren(...roots);
  $("empty").hidden = messages.length > 0;
  $("title").textContent = titleOf(current);
  document.title = messages.length ? `${titleOf(current)} – edgemistral` : "edgemistral";
  $("system-shown").hidden = !current.system.trim();
  $("system-shown").textContent = `System text: ${current.system.trim()}`;
  drawNotice(job);
  drawSend(job);
  drawContext(job);
  sidebar.update(current, (chat) => Boolean(answers.job(chat)));
  if (follow) scroll.scrollTop = scroll.scrollHeight;
}

function drawNotice(job) {
  const failure = notices.get(current.id), unanswered = current.messages.at(-1)?.role === "user";
  const text = job ? "" : failure?.message ?? (unanswered ? "This message has no answer yet." : "");
  if ($("notice").dataset.text === text) return;
  $("notice").dataset.text = text;
  $("notice").className = failure && failure.code !== "stopped" ? "error" : "";
  $("notice").replaceChildren(...(text ? [element("span", {}, text)] : []));
  if (text && unanswered) {
    const again = element("button", { type: "button", className: "quiet" }, failure ? "Try again" : "Answer it");
    again.addEventListener("click", () => ask(current, () => {}));
    $("notice").append(again);
  }
}

function drawSend(job) {
  const label = job ? "Stop (Esc)" : "Send (Enter)";
  send.disabled = !job && (!server.ready || !draft.value.trim());
  if (send.title === label) return;
  send.title = label;
  send.setAttribute("aria-label", label);
  send.replaceChildren(icon(job ? "stop" : "send"));
}

function drawContext(job) {
  const rate = job ? rateOf(job) : 0;
  $("rate").textContent = rate ? `${rate.toFixed(1)} tokens/s` : "";
  const tokens = used + (job?.pieces ?? 0), share = tokens / server.context;
  const meter = $("context"), text = `${tokens.toLocaleString()} of ${server.context.toLocaleString()} tokens`;
  meter.hidden = !server.context;
  meter.title = share > 1 ? "Too long for the model: shorten it or begin a new chat" : "Of the model's context";
  meter.classList.toggle("full", share > 0.9);
  meter.setAttribute("aria-valuenow", tokens);
  meter.setAttribute("aria-valuemax", server.context);
  meter.setAttribute("aria-valuetext", text);
  meter.querySelector("b").style.width = `${Math.min(100, 100 * share)}%`;
  meter.lastChild.textContent = text;
}

function drawTheme(theme) {
  const label = `Colours: ${{ auto: "as the system", light: "light", dark: "dark" }[theme]}`;
  document.documentElement.dataset.theme = theme;
  $("theme").title = label;
  $("theme").setAttribute("aria-label", label);
  $("theme").replaceChildren(icon(theme));
}

function closeSide() {
  document.body.classList.remove("side-open");
  $("menu").setAttribute("aria-expanded", "false");
}

// ---- keys, buttons, and the rest of the browser ---------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answers.job(current)) answers.stop(current);
  else submit();
});
draft.addEventListener("keydown", (event) => {
  if (isSend(event)) {
    event.preventDefault();
    if (!answers.job(current)) submit();
  } else if (event.key === "ArrowUp" && !draft.value && !answers.job(current)) {
    const last = current.messages.findLast(({ role }) => role === "user");
    if (last) views.get(last).edit();
    event.preventDefault();
  }
});
draft.addEventListener("input", () => {
  fitHeight(draft);
  measureSoon();
  plan();
});
system.addEventListener("input", () => {
  current.system = system.value;
  if (chats.has(current.id)) save(current);
  measureSoon();
  plan();
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
$("new").addEventListener("click", () => {
  // Opened at once, not at the event that a change of location.hash brings: what is typed next belongs to the new chat.
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  open();
  closeSide();
  draft.focus();
});
$("menu").addEventListener("click", (event) => {
  event.stopPropagation();
  const isOpen = document.body.classList.toggle("side-open");
  $("menu").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("new").focus();
});
document.querySelector("main").addEventListener("click", closeSide);
$("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  lasting.setItem("edgemistral.theme", theme);
  drawTheme(theme);
});
$("down").addEventListener("click", () => {
  follow = true;
  draw();
});
scroll.addEventListener("scroll", () => {
  const below = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
  follow = below < NEAR_END;
  $("down").hidden = follow;
});
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
drawTheme(document.documentElement.dataset.theme);
loadChats();
open();
server.watch();
