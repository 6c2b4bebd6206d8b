// Markdown as models write it, to DOM nodes. markdown-it finds the structure; here its tokens become nodes.
//
// Text only ever becomes text nodes, elements and attributes come from the lists below, and a link needs a scheme from a
// short list, so nothing that a model writes can become code.

import { codeBlock } from "./code.js";
import { element } from "./dom.js";
import { mathNode, mathRules } from "./math.js";
import MarkdownIt from "./vendor/markdown-it.js";

const MAX_URL = 2000;         // characters
const SCHEMES = ["http:", "https:", "mailto:"];
const BREAK = /<br ?\/?>/iy;
const LONG_RUN = /([*_~])\1{39,}/y;
const TASK = /^\[([ xX])\] /;

// What the tokens become; headings are two levels lower, because the page has two of its own.
const ELEMENTS = {
  paragraph: "p", blockquote: "blockquote", bullet_list: "ul", ordered_list: "ol", list_item: "li", thead: "thead",
  tbody: "tbody", tr: "tr", th: "th", td: "td", em: "em", strong: "strong", s: "del",
};

const parser = new MarkdownIt({ html: false, breaks: true, linkify: true });
parser.core.ruler.disable("linkify");   // the rule of the same name inside lines finds what has a scheme
const { linkify } = parser, matchAtStart = linkify.matchAtStart.bind(linkify);
linkify.matchAtStart = (text) => matchAtStart(text.slice(0, MAX_URL + 1));   // else endless addresses take endless time
parser.validateLink = (url) => urlOf(url) !== null;
parser.use(mathRules);
parser.inline.ruler.before("autolink", "br", (state, silent) => {
  BREAK.lastIndex = state.pos;
  if (!BREAK.test(state.src)) return false;
  if (!silent) state.push("hardbreak", "br", 0);
  state.pos = BREAK.lastIndex;
  return true;
});

parser.inline.ruler.before("emphasis", "long_run", (state, silent) => {   // markdown-it takes long over runs of thousands
  LONG_RUN.lastIndex = state.pos;
  const [run] = LONG_RUN.exec(state.src) ?? [];
  if (!run) return false;
  if (!silent) state.pending += run;
  state.pos += run.length;
  return true;
});

/** Renders a text that grows into `root`: blocks that did not change keep their nodes, and what is selected there. */
export class Markdown {
  #keys = [];

  constructor(root) {
    this.root = root;
  }

  /** growing: more is to come, so that a long block of code at the end is not coloured again and again. */
  update(text, growing = false) {
    const blocks = split(parser.parse(text, {}));
    const lastPlain = growing ? blocks.length - 1 : -1;
    const keys = blocks.map((tokens, i) => `${i === lastPlain}\n${keyOf(tokens)}`);
    let same = 0;
    while (same < keys.length && keys[same] === this.#keys[same]) same++;
    while (this.root.childNodes.length > same) this.root.lastChild.remove();
    blocks.slice(same).forEach((tokens, i) => new Builder(same + i === lastPlain).build(tokens, this.root));
    this.#keys = keys;
  }
}

/** The tokens of each block that stands by itself; each becomes one node. */
function split(tokens) {
  const blocks = [];
  let depth = 0;
  for (const token of tokens) {
    if (depth === 0) blocks.push([]);
    blocks.at(-1).push(token);
    depth += token.nesting;
  }
  return blocks;
}

/** The same for blocks that look the same. */
function keyOf(tokens) {
  return JSON.stringify(tokens, ["type", "tag", "info", "content", "attrs", "hidden", "meta", "display", "open", "children"]);
}

class Builder {
  #stack = [];
  #inItem = false;   // right after the beginning of a list's item

  constructor(growing) {
    this.growing = growing;
  }

  build(tokens, root) {
    this.#stack = [root];
    for (const token of tokens) this.#take(token);
  }

  get #parent() {
    return this.#stack.at(-1);
  }

  #take(token) {
    const { type, nesting, content } = token;
    if (nesting < 0) {
      const closed = this.#stack.pop();
      if (type === "link_close") closed.finish?.();
    } else if (nesting > 0) {
      this.#stack.push(token.hidden ? this.#parent : this.#open(token, type.slice(0, -"_open".length)));
      if (type === "list_item_open") this.#inItem = true;
    } else if (type === "inline") {
      this.#inline(token);
    } else if (type === "text") {
      this.#parent.append(content);
    } else if (type === "softbreak" || type === "hardbreak") {
      this.#parent.append(element("br"));
    } else if (type === "code_inline") {
      this.#parent.append(element("code", {}, content));
    } else if (type === "fence" && /^(math|katex)$/.test(token.info.trim())) {
      this.#parent.append(mathNode(content, true));
    } else if (type === "fence" || type === "code_block") {
      this.#parent.append(codeBlock(content.replace(/\n$/, ""), token.info.trim().split(/\s/, 1)[0], this.growing));
    } else if (type === "math") {
      this.#parent.append(mathNode(content, token.meta.display, token.meta.open));
    } else if (type === "image") {   // as a link: the page loads nothing from elsewhere
      const link = this.#link(token.attrGet("src"), "");
      link.label.append(content || token.attrGet("src"));
      link.finish();
    } else if (type === "hr") {
      this.#parent.append(element("hr"));
    } else {
      this.#parent.append(content);   // a kind that we do not know stays text
    }
  }

  #inline({ children, content }) {
    const task = this.#inItem && TASK.exec(content);
    this.#inItem = false;
    if (task && children[0]?.type === "text") {
      children[0].content = children[0].content.replace(TASK, task[1] === " " ? "☐ " : "☑ ");
    }
    for (const child of children) this.#take(child);
  }

  /** The node that what follows goes into. */
  #open(token, name) {
    if (name === "link") return this.#link(token.attrGet("href"), token.markup || token.info);
    const node = element(name === "heading" ? `h${Math.min(6, Number(token.tag[1]) + 2)}`
      : name === "table" ? "table" : ELEMENTS[name] ?? "span");
    if (name === "ordered_list") node.setAttribute("start", token.attrGet("start") ?? 1);
    const align = /^text-align:(right|center)$/.exec(token.attrGet("style") ?? "");
    if (align) node.className = align[1];
    // A table may be wider than the page: its box scrolls, also by keys.
    this.#parent.append(name === "table" ? element("div", { className: "table", tabIndex: 0 }, node) : node);
    return node;
  }

  /** A link that says where it leads, unless its text is the address. */
  #link(href, markup) {
    const url = urlOf(href);
    if (!url) {
      const span = element("span");
      this.#parent.append(span);
      return Object.assign(span, { label: span, finish() {} });
    }
    const label = element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href });
    const isAddress = markup === "linkify" || markup === "autolink" || markup === "auto";
    this.#parent.append(isAddress ? label : element("span", {}, label));
    label.label = label;
    label.finish = () => {
      if (!isAddress) label.after(element("small", {}, ` (${url.host || url.protocol})`));
    };
    return label;
  }
}

/** An address that a link may lead to, or null. */
function urlOf(address) {
  if (address.length > MAX_URL || !/^(https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    const url = new URL(address);
    return SCHEMES.includes(url.protocol) ? url : null;
  } catch {
    return null;
  }
}
