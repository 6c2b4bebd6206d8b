// The chats, kept in this browser: each under a key of its own, so that two tabs do not overwrite each other's.
//
//   chat     {id, title, system, tools?, updated: milliseconds, messages}   title: "" until one was given
//            tools: JSON text, what the model may call; the person answers the calls
//   message  {role: "user" | "assistant" | "tool", content, at?, end?, tokens?, rate?, tool_calls?, tool_call_id?,
//             versions?, version?}
//            at: when it was written, in milliseconds; tool_calls, tool_call_id: as in the OpenAI interface
//            end: how an answer ended: "stop", "tool_calls", "length", "context", "stopped", "broken", "withheld"; none
//            while it comes. versions: see versions.js

import { lasting } from "./storage.js";

const PREFIX = "edgemistral.chat.";
const TITLE_LENGTH = 60;
const ROLES = ["user", "assistant", "tool"];

export const chats = new Map();   // by id

export function loadChats() {
  for (let i = 0; i < lasting.length; i++) {
    const id = idOf(lasting.key(i));
    if (id) readChat(id);
  }
}

/** Take over what storage has under an id, which another tab may have written; damaged entries are left alone. */
export function readChat(id) {
  try {
    const chat = JSON.parse(lasting.getItem(PREFIX + id));
    if (chat === null) chats.delete(id);
    else if (isChat(chat)) chats.set(id, { ...chat, id, messages: chat.messages.filter(hasContent) });
  } catch {
    console.warn(`the chat ${id} in this browser's storage is damaged`);
  }
}

/** The id of a chat in the name of a storage entry, or "". */
export function idOf(key) {
  return key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : "";
}

export function newChat() {
  const id = crypto.getRandomValues(new Uint32Array(2)).join("");
  return { id, title: "", system: "", tools: "", updated: Date.now(), messages: [] };
}

/** False if there is no room. */
export function saveChat(chat) {
  chats.set(chat.id, chat);
  try {
    lasting.setItem(PREFIX + chat.id, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

export function removeChat(chat) {
  chats.delete(chat.id);
  lasting.removeItem(PREFIX + chat.id);
}

/** The latest first; of those with the words in title or text, if words are given. */
export function sortedChats(words = "") {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [...chats.values()].filter((chat) => {
    const text = wanted.length ? textOf(chat).toLowerCase() : "";
    return wanted.every((word) => text.includes(word));
  });
  return found.sort((a, b) => b.updated - a.updated);
}

function textOf(chat) {
  return [chat.title, chat.system, ...chat.messages.map(({ content }) => content)].join("\n");
}

export function titleOf(chat) {
  const line = chat.title || chat.messages[0]?.content.trim().split("\n", 1)[0] || "New chat";
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH)}…` : line;
}

/** Whether there is anything to show. */
export function hasContent({ role, content, tool_calls: calls }) {
  return role === "tool" || Boolean(content) || Boolean(calls?.length);
}

/** What the model reads: the system text and the messages before `end`. */
export function conversation(chat, end = chat.messages.length) {
  const messages = chat.messages.slice(0, end).map(({ role, content, tool_calls: calls, tool_call_id: id }) =>
    ({ role, content, ...(calls?.length && { tool_calls: calls }), ...(id && { tool_call_id: id }) }));
  return chat.system.trim() ? [{ role: "system", content: chat.system }, ...messages] : messages;
}

/** The last of the user's messages, or undefined. */
export function lastUserOf(chat) {
  return chat.messages.findLast(({ role }) => role === "user");
}

export function isChat(chat) {
  return typeof chat.title === "string" && typeof chat.system === "string" && typeof chat.updated === "number"
    && ["string", "undefined"].includes(typeof chat.tools) && Array.isArray(chat.messages) && chat.messages.every(isMessage);
}

function isMessage(message) {
  const { role, content, tool_calls: calls, versions, version } = message;
  const isVersion = (one) => one === null
    || (isMessage({ ...one, role }) && Array.isArray(one.after) && one.after.every(isMessage));
  return ROLES.includes(role) && typeof content === "string" && (calls === undefined || areCalls(calls))
    && ["at", "tokens", "rate"].every((name) => isNumber(message[name]))
    && (versions === undefined || (Array.isArray(versions) && version in versions && versions.every(isVersion)));
}

/** Missing, or one that a date can be. */
function isNumber(value) {
  return value === undefined || (typeof value === "number" && Math.abs(value) <= 8.64e15);
}

/** Whether these are tool calls in the OpenAI shape. */
export function areCalls(calls) {
  return Array.isArray(calls) && calls.every(({ id, function: called }) =>
    typeof id === "string" && typeof called?.name === "string" && typeof called.arguments === "string");
}
