// The chats, kept in this browser: each under a key of its own, so that two tabs do not overwrite each other's.
//
//   chat     {id, title, system, updated: milliseconds, messages}      title: "" until one was given
//   message  {role: "user" | "assistant", content, end?, tokens?, rate?}
//            end: how an answer ended: "stop", "length", "context", "stopped", "broken", "withheld"; none while it comes

import { lasting } from "./storage.js";

const PREFIX = "edgemistral.chat.";
const TITLE_LENGTH = 60;

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
    else if (isChat(chat)) chats.set(id, { ...chat, id, messages: chat.messages.filter(({ content }) => content) });
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
  return { id, title: "", system: "", updated: Date.now(), messages: [] };
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

/** The latest first. */
export function sortedChats() {
  return [...chats.values()].sort((a, b) => b.updated - a.updated);
}

export function titleOf(chat) {
  const line = chat.title || chat.messages[0]?.content.trim().split("\n", 1)[0] || "New chat";
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH)}…` : line;
}

/** What the model reads: the system text and the messages before `end`. */
export function conversation(chat, end = chat.messages.length) {
  const messages = chat.messages.slice(0, end).map(({ role, content }) => ({ role, content }));
  return chat.system.trim() ? [{ role: "system", content: chat.system }, ...messages] : messages;
}

export function asMarkdown(chat) {
  const names = { system: "System", user: "You", assistant: "Model" };
  const parts = conversation(chat).map(({ role, content }) => `## ${names[role]}\n\n${content}\n`);
  return [`# ${titleOf(chat)}\n`, ...parts].join("\n");
}

function isChat(chat) {
  return typeof chat.title === "string" && typeof chat.system === "string" && typeof chat.updated === "number"
    && Array.isArray(chat.messages) && chat.messages.every(
      ({ role, content }) => ["user", "assistant"].includes(role) && typeof content === "string");
}
