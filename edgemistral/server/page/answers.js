// Answers under way. Each belongs to a chat and goes on whichever chat is on the page.

import { conversation, hasContent, saveChat } from "./chats.js";
import { Failure, streamChat } from "./server.js";
import { toolsOf } from "./tools.js";
import { dropVersion } from "./versions.js";

const SAVE_EVERY = 1000;   // ms: what a reload in the middle may lose is saved before it, a crash loses this much

export class Answers {
  #jobs = new Map();   // by the id of the chat: {message, abort, waiting, progress, pieces, since}

  /** settings.parameters(): for the requests. changed(chat): there is more to show. Then failed(chat, failure) if it did,
   * and ended(chat, message). */
  constructor(settings, { changed, ended, failed }) {
    Object.assign(this, { settings, changed, ended, failed });
  }

  /** The work on a chat's answer, if there is any. */
  job(chat) {
    return this.#jobs.get(chat.id);
  }

  /** Let the model answer, or go on with the last answer. context: tokens there is room for. into: an answer to write
   * anew, an empty version by now; if nothing comes, its version before comes back. */
  async start(chat, { context, goOn = false, into }) {
    await this.stop(chat);
    const message = into ?? (goOn ? chat.messages.at(-1) : { role: "assistant", content: "" });
    const asked = conversation(chat, into ? chat.messages.indexOf(into) : undefined);
    if (!goOn && !into) chat.messages.push(message);
    const job = { message, abort: new AbortController(), waiting: false, progress: null, pieces: 0, since: 0 };
    job.before = message.tokens ?? 0;
    message.at = Date.now();
    delete message.end;
    this.#jobs.set(chat.id, job);
    job.over = this.#run(chat, job, asked, context);
    await job.over;
  }

  /** Until it has stopped. */
  async stop(chat) {
    const job = this.#jobs.get(chat.id);
    job?.abort.abort();
    await job?.over;
  }

  /** What has come so far outlives the page. */
  saveAll(chats) {
    for (const id of this.#jobs.keys()) saveChat(chats.get(id));
  }

  async #run(chat, job, messages, context) {
    const { message } = job;
    let saved = Date.now(), failure = null;
    this.changed(chat);
    try {
      const body = { ...this.settings.parameters(), ...toolsOf(chat), messages };
      for await (const event of streamChat(body, job.abort.signal)) {
        this.#take(job, event, context);
        if (Date.now() - saved > SAVE_EVERY) {
          saveChat(chat);
          saved = Date.now();
        }
        this.changed(chat);
      }
    } catch (error) {
      if (!job.abort.signal.aborted && !(error instanceof Failure)) console.error(error);
      failure = job.abort.signal.aborted ? new Failure("Stopped.", { code: "stopped" }) : error;
      message.end = failure.code === "stopped" || failure.code === "cancelled" ? "stopped" : "broken";
      message.tokens = job.before + job.pieces;
    }
    this.#jobs.delete(chat.id);
    if (!hasContent(message) && message.end !== "withheld") {   // nothing came: there is no answer
      if (message.versions) dropVersion(chat, message);
      else chat.messages.splice(chat.messages.indexOf(message), 1);
      failure ??= new Failure("The model answered nothing.", { code: "empty" });
    }
    chat.updated = Date.now();
    if (failure) this.failed(chat, failure);
    this.ended(chat, message);
  }

  #take(job, event, context) {
    const { message } = job;
    if (event.text) {
      job.since ||= performance.now();
      job.pieces++;
      message.content += event.text;
    } else if (event.calls) {
      job.since ||= performance.now();
      job.pieces++;
      addCalls(message, event.calls);
    } else if (event.finish) {
      message.end = event.finish === "content_filter" ? "withheld" : event.finish;
    } else if (event.usage) {
      message.tokens = job.before + event.usage.completion_tokens;
      message.rate = event.timings.tokens_per_second;
      if (message.end === "length" && event.usage.total_tokens >= context) message.end = "context";
    } else {
      job.waiting = event.waiting ?? false;
      job.progress = event.progress ?? job.progress;
    }
  }
}

/** Take over what a piece of the stream adds to the tool calls. */
function addCalls(message, parts) {
  message.tool_calls ??= [];
  for (const { index, id, function: called } of parts) {
    const at = Math.min(index ?? 0, message.tool_calls.length);
    const call = message.tool_calls[at] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
    call.id ||= id ?? "";
    call.function.name += called?.name ?? "";
    call.function.arguments += called?.arguments ?? "";
  }
}

/** Tokens per second so far. Pieces are about tokens: the server joins those that come faster than they are read. */
export function rateOf(job) {
  const seconds = (performance.now() - job.since) / 1000;
  return job.pieces > 1 && seconds > 0.2 ? (job.pieces - 1) / seconds : 0;
}
