// Markdown as models write it (CommonMark and tables, but a line break is one) to DOM nodes.
//
// Text only ever becomes text nodes, and a link needs a scheme from a short list, so nothing that a model writes can
// become code. All work is linear in the length of the text but for bounded factors, and nesting is limited: no text
// can keep the page busy. No regular expression here has two neighbouring parts that can match the same characters.

import { copyButton, element } from "./dom.js";

const MAX_DEPTH = 10;         // of quotes and lists, and of emphasis: what is deeper stays text
const MAX_COLUMNS = 40;       // of a table
const MAX_URL = 2000;         // characters
const SCHEMES = ["http:", "https:", "mailto:"];

const FENCE = /^ {0,3}(?:`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^[ \t]*(?:[-*+]|(\d{1,9})[.)])(?=[ \t]|$)/;
const RULE = /^([-*_])\1{2,}$/;   // of a line without its spaces
const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const AUTOLINK = /https?:\/\/[^\s<>"`]{1,2000}/y;
const BRACKETED = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const TITLE = /^(?:|"[^"]*"|'[^']*')$/;
const BREAK = /<br ?\/?>/iy;

/** Renders a text that grows into `root`: blocks that did not change keep their nodes, and what is selected there. */
export class Markdown {
  #sources = [];

  constructor(root) {
    this.root = root;
  }

  update(text) {
    const blocks = [...split(text.split(/\r?\n/))];
    const sources = blocks.map((block) => `${block.kind}\n${block.lines.join("\n")}`);
    let same = 0;
    while (same < sources.length && sources[same] === this.#sources[same]) same++;
    while (this.root.childNodes.length > same) this.root.lastChild.remove();
    for (const block of blocks.slice(same)) this.root.append(build(block, 0));
    this.#sources = sources;
  }
}

// ---- blocks: {kind, lines, ...} -------------------------------------------------------------------------------------

function* split(lines) {
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const kind = kindOf(lines, at);
    const { end, ...more } = SCANNERS[kind](lines, at);
    yield { kind, lines: lines.slice(at, end), ...more };
    at = end;
  }
}

/** What begins at a line that is not blank. */
function kindOf(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence && !(fence[0].endsWith("`") && line.includes("`", fence[0].length))) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line.replace(/[ \t]/g, ""))) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (MARKER.test(line)) return "list";
  return isTable(lines, at) ? "table" : "paragraph";
}

const SCANNERS = {
  heading: (lines, at) => ({ end: at + 1 }),
  rule: (lines, at) => ({ end: at + 1 }),
  quote: (lines, at) => ({ end: whileLines(lines, at, (line) => QUOTE.test(line)) }),
  table: (lines, at) => ({ end: whileLines(lines, at, (line) => line.includes("|")) }),
  paragraph(lines, at) {
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
    return { end };
  },
  code(lines, at) {
    const fence = FENCE.exec(lines[at])[0].trim();
    const closes = (line) => line.startsWith(fence) && line === fence[0].repeat(line.length);
    const end = whileLines(lines, at + 1, (line) => !closes(line.trim()));
    return { end: Math.min(end + 1, lines.length), closed: end < lines.length };   // the end may still be on its way
  },
  list: scanList,
};

function whileLines(lines, at, holds) {
  while (at < lines.length && holds(lines[at])) at++;
  return at;
}

/** Whether a line ends the paragraph before it. Of numbers only 1 does: others may be part of a sentence. */
function interrupts(lines, at) {
  const kind = kindOf(lines, at);
  return kind !== "paragraph" && (kind !== "list" || (MARKER.exec(lines[at])[1] ?? "1") === "1");
}

/** The items of a list, each as its lines without their indentation. Models indent carelessly: two columns nest. */
function scanList(lines, at) {
  const base = indentOf(lines[at]);
  const first = MARKER.exec(lines[at]);
  const items = [];
  let inner = 0, blank = false, loose = false;
  let end = at;
  for (let i = at; i < lines.length; i++) {
    const line = lines[i], indent = indentOf(line);
    if (!line.trim()) {
      items.at(-1).push("");
      blank = true;
      continue;
    }
    const marker = MARKER.exec(line);
    if (i === at || (marker && indent < base + 2 && kindOf(lines, i) === "list")) {
      if (i > at && (marker[1] === undefined) !== (first[1] === undefined)) break;
      const after = line.slice(marker[0].length), spaces = indentOf(after);
      inner = indent + marker[0].trimStart().length + (spaces > 4 || !after.trim() ? 1 : spaces);
      items.push([after.trimStart()]);
    } else if (indent >= Math.min(inner, base + 2)) {
      items.at(-1).push(dedent(line, inner));
    } else if (!blank && kindOf(lines, i) === "paragraph") {
      items.at(-1).push(line);
    } else {
      break;
    }
    loose ||= blank;
    blank = false;
    end = i + 1;
  }
  return { end, items, loose, start: first[1] };
}

/** Columns of white space at the beginning; a tab counts 4. */
function indentOf(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns++;
    else if (character === "\t") columns += 4;
    else break;
  }
  return columns;
}

/** A line without up to so many columns of white space. */
function dedent(line, columns) {
  let at = 0;
  for (let gone = 0; gone < columns && " \t".includes(line[at] || "-"); at++) gone += line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}

// ---- blocks to nodes ------------------------------------------------------------------------------------------------

function build(block, depth) {
  return BUILDERS[depth < MAX_DEPTH ? block.kind : "paragraph"](block, depth);
}

const BUILDERS = {
  paragraph: ({ lines }) => element("p", {}, inline(lines.map((line) => line.trim()).join("\n"))),
  rule: () => element("hr"),
  heading({ lines }) {
    const level = HEADING.exec(lines[0])[1].length;   // the page itself has the first two
    return element(`h${Math.min(level + 2, 6)}`, {}, inline(lines[0].trimStart().slice(level).trim()));
  },
  quote({ lines }, depth) {
    const inner = lines.map((line) => line.replace(QUOTE, ""));
    return element("blockquote", {}, Array.from(split(inner), (block) => build(block, depth + 1)));
  },
  list({ items, loose, start }, depth) {
    const nodes = items.map((lines) => element("li", {}, [...itemNodes(lines, loose, depth + 1)]));
    return start === undefined ? element("ul", {}, nodes) : element("ol", { start: Number(start) }, nodes);
  },
  code({ lines, closed }) {
    const fence = FENCE.exec(lines[0])[0], indent = fence.length - fence.trimStart().length;
    const language = lines[0].slice(fence.length).trim().split(/\s/, 1)[0].slice(0, 40);
    const text = lines.slice(1, closed ? -1 : undefined).map((line) => dedent(line, indent)).join("\n");
    return element("div", { className: "code" },
      element("div", {}, element("span", {}, language || "text"), copyButton("Copy the code", () => text)),
      element("pre", { tabIndex: 0 }, element("code", {}, text)));
  },
  table({ lines }) {
    const head = cells(lines[0]);
    const align = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
    const row = (name, texts) => element("tr", {}, texts.slice(0, head.length).map(
      (text, i) => element(name, { className: align[i] }, inline(text))));
    return element("div", { className: "table", tabIndex: 0 }, element("table", {},
      element("thead", {}, row("th", head)),
      element("tbody", {}, lines.slice(2).map((line) => row("td", cells(line))))));
  },
};

/** The contents of a list item: without paragraphs around its texts unless there are blank lines in the list. */
function* itemNodes(lines, loose, depth) {
  const box = /^\[([ xX])\] /.exec(lines[0]);
  const rest = box ? [(box[1] === " " ? "☐ " : "☑ ") + lines[0].slice(4), ...lines.slice(1)] : lines;
  for (const block of split(rest)) {
    const node = build(block, depth);
    if (node.localName === "p" && !loose) yield* [...node.childNodes];
    else yield node;
  }
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return false;
  const columns = cells(lines[at + 1]);
  return columns.every((cell) => /^:?-+:?$/.test(cell)) && columns.length <= MAX_COLUMNS
    && cells(lines[at]).length === columns.length;
}

function cells(line) {
  const parts = [];
  let part = "";
  const text = line.trim().replace(/^\|/, "");
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") part += text[++i];
    else if (text[i] !== "|") part += text[i];
    else {
      parts.push(part.trim());
      part = "";
    }
  }
  return part.trim() ? [...parts, part.trim()] : parts;
}

// ---- inside a block -------------------------------------------------------------------------------------------------

/** The nodes of a text with emphasis, code, links and line breaks. */
function inline(text, links = true) {
  const emphasis = new Emphasis();
  const unclosed = new Set();   // lengths of runs of backticks without a partner further on
  const partners = links ? matchBrackets(text) : [];
  let at = 0, plain = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    at = found.index;
    const marks = "*_~".includes(text[at]);
    const part = marks ? null : special(text, at, links, partners, unclosed);
    const end = part?.end ?? at + ("`*_~".includes(text[at]) ? runLength(text, at) : 1);
    if (part || marks) {
      emphasis.add(text.slice(plain, at));
      if (part) emphasis.add(part.node);
      else emphasis.mark(text, at, end);
      plain = end;
    }
    at = end;
  }
  emphasis.add(text.slice(plain));
  return emphasis.nodes;
}

/** What a special character begins, as {node, end}; null if it is only itself. */
function special(text, at, links, partners, unclosed) {
  switch (text[at]) {
    case "\n":
      return { node: element("br"), end: at + 1 };
    case "\\":
      if (text[at + 1] === "\n") return { node: "", end: at + 1 };
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return codeSpan(text, at, unclosed);
    case "<": {
      const end = sticky(BREAK, text, at);
      return end ? { node: element("br"), end: end.index + end[0].length } : links ? bracketed(text, at) : null;
    }
    case "!":
    case "[":
      return namedLink(text, text[at] === "!" ? at + 1 : at, partners);
    default:
      return links && !/\w/.test(text[at - 1] ?? " ") ? bareLink(text, at) : null;
  }
}

function codeSpan(text, at, unclosed) {
  const length = runLength(text, at), start = at + length;
  if (unclosed.has(length)) return null;
  for (let close = text.indexOf("`", start); close >= 0;) {
    const run = runLength(text, close);
    if (run === length) {
      const code = text.slice(start, close).replaceAll("\n", " ");
      const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
      return { node: element("code", {}, padded ? code.slice(1, -1) : code), end: close + length };
    }
    close = text.indexOf("`", close + run);
  }
  unclosed.add(length);
  return null;
}

/** [text](target "title"), and an image as a link: nothing is loaded from elsewhere. */
function namedLink(text, at, partners) {
  const close = partners[at];
  if (text[at] !== "[" || !close || text[close + 1] !== "(") return null;
  const limit = Math.min(text.length, close + 2 + MAX_URL);
  for (let i = close + 2, open = 0; i < limit && text[i] !== "\n"; i++) {
    if (text[i] === "(") open++;
    else if (text[i] === ")" && open-- === 0) {
      const inside = text.slice(close + 2, i).trim();
      const target = inside.split(/\s/, 1)[0];
      const url = checkedUrl(target.startsWith("<") ? target.slice(1, -1) : target);
      return url && TITLE.test(inside.slice(target.length).trim()) && { node: link(url, text.slice(at + 1, close) || url.href), end: i + 1 };
    }
  }
  return null;
}

function bracketed(text, at) {
  const found = sticky(BRACKETED, text, at);
  const url = found && checkedUrl(found[1]);
  return url && { node: link(url, found[1]), end: at + found[0].length };
}

function bareLink(text, at) {
  let target = sticky(AUTOLINK, text, at)?.[0] ?? "";
  let unopened = target.split(")").length - target.split("(").length;
  while (".,;:!?'*_~)]".includes(target.at(-1) ?? " ") && !(target.endsWith(")") && unopened <= 0)) {
    if (target.endsWith(")")) unopened--;
    target = target.slice(0, -1);
  }
  const url = checkedUrl(target);
  return url && { node: link(url, target), end: at + target.length };
}

/** The target of a link, or null if it is none that may be followed. */
function checkedUrl(target) {
  const url = target.length <= MAX_URL && URL.canParse(target) ? new URL(target) : null;
  return url && SCHEMES.includes(url.protocol) ? url : null;
}

/** A link that shows where it leads. */
function link(url, label) {
  const where = url.host || url.pathname;
  const node = element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href },
    inline(label, false));
  return label.includes(where) ? node : element("span", {}, node, element("small", {}, ` (${where})`));
}

/** The position of the ] that belongs to each [, by the position of the [. */
function matchBrackets(text) {
  const partners = [], open = [];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) partners[open.pop()] = i;
  }
  return partners;
}

function sticky(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return end - at;
}

/** Collects nodes; a mark that closes puts those since its partner into an element. */
class Emphasis {
  nodes = [];
  #open = [];   // {character, count, index: of its text in nodes}

  add(node) {
    if (node !== "") this.nodes.push(node);
  }

  /** A run of *, _ or ~ in text[at:end]. */
  mark(text, at, end) {
    const character = text[at], before = text[at - 1] ?? " ", after = text[end] ?? " ";
    const inWord = character === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
    if (inWord || end - at > 3 || (character === "~" && end - at !== 2)) {
      this.add(text.slice(at, end));
      return;
    }
    const count = /\s/.test(before) ? end - at : this.#close(character, end - at);
    this.add(character.repeat(count));
    if (count && !/\s/.test(after)) {
      if (this.#open.length === MAX_DEPTH) this.#open.shift();   // the outermost stays text
      this.#open.push({ character, count, index: this.nodes.length - 1 });
    }
  }

  /** How many of the characters found no partner. */
  #close(character, count) {
    while (count) {
      let i = this.#open.length - 1;
      while (i >= 0 && this.#open[i].character !== character) i--;
      if (i < 0) break;
      const opener = this.#open[i];
      const used = Math.min(2, count, opener.count);
      const inner = this.nodes.splice(opener.index + 1);
      if (!inner.length) break;   // ** is no empty emphasis
      const name = character === "~" ? "del" : used === 2 ? "strong" : "em";
      this.#open.length = i;
      this.nodes.pop();
      opener.count -= used;
      if (opener.count) {
        this.nodes.push(character.repeat(opener.count));
        this.#open.push(opener);
      }
      this.nodes.push(element(name, {}, inner));
      count -= used;
    }
    return count;
  }
}
