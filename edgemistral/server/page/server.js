// What the page asks of the server it came from. Addresses are relative: the application may be mounted under a path.

import { session } from "./storage.js";

const KEY = "edgemistral.key";   // of sessionStorage: gone with the tab

/** A refusal or a failure in one line. status: of HTTP, 0 without an answer; code: the server's, "unreachable" or "broken". */
export class Failure extends Error {
  constructor(message, { status = 0, code = "", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export function setKey(key) {
  session.setItem(KEY, key);
}

/** A response; raises Failure, or what aborting raises. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  const key = session.getItem(KEY);
  if (key && /^[ -~]+$/.test(key)) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST", body: JSON.stringify(body), headers, signal, cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure("The server does not answer. Is it still running?", { code: "unreachable" });
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

/** {status: "ok" | "loading", model}; raises Failure when nobody answers. */
export async function health() {
  try {
    return await (await call("health")).json();
  } catch (error) {
    if (error.status === 503) return { status: "loading", model: "" };
    throw error;
  }
}

/** Tokens that the model reads for a conversation. */
export async function countTokens(messages, signal) {
  return (await (await call("tokenize", { body: { messages }, signal })).json()).count;
}

/** The events of an answer: {waiting}, {progress: 0 to 1}, {text}, {calls: parts of tool calls}, {finish} and at the end
 * {usage, timings}. */
export async function* streamChat(body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", { body: request, signal });
  for await (const line of linesOf(response.body, signal)) {
    if (line === "data: [DONE]") return;
    const progress = /^: ?prompt (\d+)\/(\d+)/.exec(line);
    if (progress) {
      yield { progress: Number(progress[1]) / Number(progress[2]) };
    } else if (line.startsWith(":")) {
      yield { waiting: true };
    } else if (line.startsWith("data: ")) {
      const { error, choices, usage, timings } = JSON.parse(line.slice(6));
      if (error) throw new Failure(sentence(error.message), { status: 200, code: error.code });
      if (usage) yield { usage, timings };
      for (const { delta, finish_reason: finish } of choices) {
        if (delta.content) yield { text: delta.content };
        if (delta.tool_calls?.length) yield { calls: delta.tool_calls };
        if (finish) yield { finish };
      }
    }
  }
  throw new Failure("The answer broke off.", { code: "broken" });
}

async function* linesOf(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      yield* lines;
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Failure("The connection to the server broke.", { code: "broken" });
  } finally {
    reader.cancel().catch(() => {});   // of a connection that is broken already
  }
}

async function failureOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not from our server, or cut off
  }
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  const again = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  const known = {
    401: "The server wants an API key.",
    429: `Too many requests are waiting.${again}`,
    503: `${sentence(error.message || "the server is not ready")}${again}`,
  };
  const message = error.code === "context_length_exceeded"
    ? `This conversation is too long for the model: ${error.message}. Shorten it or begin a new chat.`
    : known[response.status] ?? sentence(error.message || `The server answered ${response.status}`);
  return new Failure(message, { status: response.status, code: error.code ?? "", retryAfter });
}

function sentence(text) {
  return text[0].toUpperCase() + text.slice(1).replace(/\.$/, "") + ".";
}
