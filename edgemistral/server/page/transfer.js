// Chats out of the browser and back: files of one chat or of all.

import { areCalls, chats, conversation, hasContent, isChat, newChat, sortedChats, titleOf } from "./chats.js";
import { element } from "./dom.js";

const MAX_FILE = 50 << 20;   // bytes

export function exportMarkdown(chat) {
  const names = { system: "System", user: "You", assistant: "Model", tool: "Tool" };
  const parts = conversation(chat).map(({ role, content, tool_calls: calls }) => {
    const called = (calls ?? []).map(({ function: { name, arguments: json } }) => `\`\`\`json\n${name}(${json})\n\`\`\`\n`);
    return [`## ${names[role]}\n`, ...(content ? [`${content}\n`] : []), ...called].join("\n");
  });
  download(`${fileName(chat)}.md`, "text/markdown", [`# ${titleOf(chat)}\n`, ...parts].join("\n"));
}

/** As other programs take a conversation, `/load` of the chat in the terminal among them. */
export function exportJson(chat) {
  const data = { title: titleOf(chat), messages: conversation(chat) };
  download(`${fileName(chat)}.json`, "application/json", JSON.stringify(data, null, 2));
}

/** Everything, with dates and versions. */
export function exportAll() {
  const day = new Date().toISOString().slice(0, 10);
  download(`edgemistral-chats-${day}.json`, "application/json", JSON.stringify({ chats: sortedChats() }, null, 2));
}

/** The chats of a file that was exported here, or that holds {"messages": [...]}; raises Error with what is wrong. */
export async function readChats(file) {
  if (file.size > MAX_FILE) throw new Error(`${file.name} is larger than 50 MiB.`);
  let data;
  try {
    data = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is no JSON file. Chats come from “Export as JSON” or “Export all”.`);
  }
  const found = Array.isArray(data?.chats) ? data.chats : [Array.isArray(data) ? { messages: data } : data];
  if (!found.length) throw new Error(`${file.name} has no chats in it.`);
  return found.map((one, i) => chatOf(one, `${file.name}${found.length > 1 ? `, chat ${i + 1}` : ""}`));
}

function chatOf(data, where) {
  const fresh = newChat();
  try {
    if (isChat(data)) {   // one of ours: under its own id, so that importing twice makes no second copy
      const there = chats.get(data.id), isSame = there && JSON.stringify(there.messages) === JSON.stringify(data.messages);
      if (isSame) return there;
      const isFree = !there && /^\w{1,40}$/.test(data.id ?? "");   // else a new one: no chat is written over
      return { ...fresh, ...data, id: isFree ? data.id : fresh.id };
    }
  } catch {
    // a message that is no object
  }
  if (!Array.isArray(data?.messages)) throw new Error(`${where} has no list of messages.`);
  const messages = data.messages.map((message, i) => messageOf(message, `${where}, message ${i + 1}`));
  const system = messages.filter(({ role }) => role === "system").map(({ content }) => content).join("\n\n");
  const kept = messages.filter((message) => message.role !== "system" && hasContent(message));
  if (!kept.length) throw new Error(`${where} has no messages in it.`);
  const updated = new Date(data.updated ?? Date.now()).getTime() || Date.now();
  return { ...fresh, title: typeof data.title === "string" ? data.title : "", system, updated, messages: kept };
}

function messageOf(message, where) {
  let { role, content } = message ?? {};
  if (role === "developer") role = "system";
  if (!["system", "user", "assistant", "tool"].includes(role)) throw new Error(`${where} has no role that is known.`);
  if (Array.isArray(content)) {
    if (!content.every((part) => typeof part?.text === "string")) throw new Error(`${where} has more than text in it.`);
    content = content.map(({ text }) => text).join("\n");
  }
  const calls = message.tool_calls?.length ? message.tool_calls : undefined;
  if (calls && !areCalls(calls)) throw new Error(`${where} has tool calls that cannot be read.`);
  if (typeof (content ?? "") !== "string") throw new Error(`${where} has no text.`);
  return { role, content: content ?? "", ...(role === "assistant" && { end: "stop" }), ...(calls && { tool_calls: calls }),
    ...(typeof message.tool_call_id === "string" && { tool_call_id: message.tool_call_id }) };
}

function fileName(chat) {
  return titleOf(chat).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "chat";
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
