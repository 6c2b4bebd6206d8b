// Versions of a message, and what followed each. A message holds the version that is shown, as its own fields; the others
// lie in `message.versions`, where the shown one has null in its place:
//
//   version  {content, at, end, tokens, rate, tool_calls, after}       after: the messages that followed it

const FIELDS = ["content", "at", "end", "tokens", "rate", "tool_calls"];

/** Put the message aside as a version, with all that follows it, and begin an empty one. */
export function addVersion(chat, message) {
  message.versions ??= [null];
  message.version ??= 0;
  putAside(chat, message);
  message.versions.push(null);
  message.version = message.versions.length - 1;
  for (const field of FIELDS) delete message[field];
  message.content = "";
}

/** Show another version of a message, and what followed that. */
export function showVersion(chat, message, index) {
  if (!message.versions?.[index]) return;
  putAside(chat, message);
  take(chat, message, index);
}

/** Forget the version that is shown, and show the one before it. */
export function dropVersion(chat, message) {
  if (!message.versions || message.versions.length < 2) return;
  chat.messages.length = chat.messages.indexOf(message) + 1;
  message.versions.splice(message.version, 1);
  take(chat, message, Math.max(0, message.version - 1));
}

function putAside(chat, message) {
  const after = chat.messages.splice(chat.messages.indexOf(message) + 1);
  message.versions[message.version] = { ...Object.fromEntries(FIELDS.map((field) => [field, message[field]])), after };
}

function take(chat, message, index) {
  const { after, ...fields } = message.versions[index];
  for (const field of FIELDS) {
    if (fields[field] === undefined) delete message[field];
    else message[field] = fields[field];
  }
  message.versions[index] = null;
  message.version = index;
  if (message.versions.length === 1) {
    delete message.versions;
    delete message.version;
  }
  chat.messages.push(...after);
}
