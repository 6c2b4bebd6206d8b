// Blocks of code: highlight.js finds the words, here they become nodes.

import { copyButton, element } from "./dom.js";
import highlighter from "./vendor/highlight.js";

const MAX_LENGTH = 50_000;       // characters that are coloured
const MAX_GROWING = 4000;        // while more is to come: every piece colours the block anew

/** What highlight.js calls while it reads a code; private there, but kept stable for libraries like this. */
class Emitter {
  constructor() {
    this.root = element("code");
    this.stack = [this.root];
  }

  addText(text) {
    this.stack.at(-1).append(text);
  }

  startScope(scope) {
    const node = element("span", { className: `h-${String(scope).split(".", 1)[0]}` });
    this.stack.at(-1).append(node);
    this.stack.push(node);
  }

  endScope() {
    if (this.stack.length > 1) this.stack.pop();
  }

  openNode(scope) { this.startScope(scope); }
  closeNode() { this.endScope(); }
  __addSublanguage(emitter) { this.stack.at(-1).append(...emitter.root.childNodes); }
  finalize() {}
  toHTML() { return ""; }
}

highlighter.configure({ __emitter: Emitter });

/** A block of code with its language and a button that copies it. */
export function codeBlock(text, language, growing) {
  const code = text.length > (growing ? MAX_GROWING : MAX_LENGTH) ? element("code", {}, text) : coloured(text, language);
  return element("div", { className: "code" },
    element("div", {}, element("span", {}, language || "text"), copyButton("Copy the code", () => text)),
    element("pre", { tabIndex: 0 }, code));
}

/** A `code` element. A language that is not known stays plain: guessing would often be wrong. */
export function coloured(text, language) {
  if (highlighter.getLanguage(language)) {
    try {
      const { _emitter: emitter } = highlighter.highlight(text, { language, ignoreIllegals: true });
      if (emitter?.root.textContent === text) return emitter.root;
    } catch {
      // a language's rules failed on this text
    }
  }
  return element("code", {}, text);
}
