// Text files that are put into a message.

const MAX_FILE = 2 << 20;   // bytes: more than a model reads

/** A file as {name, text}; raises Error with what is wrong. */
export async function readTextFile(file) {
  if (file.size > MAX_FILE) throw new Error(`${file.name} is larger than 2 MiB, more than the model can read.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  const text = decoded(bytes);
  // Control characters other than tab, line ends, form feed and escape: pictures, PDF, Word and the like.
  const isText = text !== null && !/[\0-\x08\x0e-\x1a]/.test(text) && !text.startsWith("%PDF");
  if (!isText) throw new Error(`${file.name} is no text file.`);
  return { name: file.name, text: text.replace(/\r\n?/g, "\n").replace(/\n$/, "") };
}

function decoded(bytes) {
  const utf16 = bytes[0] === 0xff && bytes[1] === 0xfe ? "utf-16le" : bytes[0] === 0xfe && bytes[1] === 0xff ? "utf-16be" : "";
  for (const encoding of utf16 ? [utf16] : ["utf-8", "windows-1252"]) {
    try {
      return new TextDecoder(encoding, { fatal: true }).decode(bytes);
    } catch {
      // the next
    }
  }
  return null;
}

/** A message with its files, as the model reads them: each in a fence longer than any inside. */
export function withFiles(text, files) {
  const parts = files.map(({ name, text: content }) => {
    const longest = Math.max(2, ...(content.match(/`+/g) ?? []).map((run) => run.length));
    const fence = "`".repeat(longest + 1);
    const extension = /\.(\w{1,12})$/.exec(name)?.[1] ?? "";
    return `${name}:\n${fence}${extension}\n${content}\n${fence}`;
  });
  return [text, ...parts].filter(Boolean).join("\n\n");
}
