// LaTeX in Markdown: found by its delimiters, drawn as MathML by Temml, kept as it was written where that fails.

import { element } from "./dom.js";
import temml from "./vendor/temml.js";

const MAX_LENGTH = 4000;   // characters of a formula that is drawn
const ENVIRONMENT = /^\\begin\{((?:equation|align|gather|multline|eqnarray|split|aligned|cases|[bpvV]?matrix)\*?)\}/;
const MONEY = /^[\d.,;:)]+\s+\p{L}{2}/u;   // "$5 and 10$": a price, not a formula

/** A formula as a node. open: its end has not come yet. */
export function mathNode(tex, display, open = false) {
  const node = element(display ? "div" : "span", { className: "math" });
  if (!open && tex.length <= MAX_LENGTH) {
    try {
      temml.render(tex, node, { displayMode: display, throwOnError: true, trust: false, maxSize: [30, 15], maxExpand: 300 });
      tame(node);
      if (display) node.tabIndex = 0;   // it may be wider than the page: its box scrolls, also by keys
      return node;
    } catch {
      // no LaTeX that is known here, or nested too deeply
    }
  }
  node.replaceChildren(element("code", {}, tex));
  return node;
}

/** Take away what would reach out of the formula: names that the page's own elements have, and addresses. */
function tame(root) {
  for (const node of root.querySelectorAll("[id], [href], [src]")) {
    for (const name of ["id", "href", "src"]) node.removeAttribute(name);
  }
}

/** The rules for markdown-it: $...$ and \(...\) inside a line; $$...$$, \[...\] and \begin{...} as blocks and inside. */
export function mathRules(parser) {
  parser.inline.ruler.before("escape", "math", inlineMath);
  parser.block.ruler.before("fence", "math", blockMath, { alt: ["paragraph", "reference", "blockquote", "list"] });
}

function inlineMath(state, silent) {
  const { src, pos, posMax } = state;
  const two = src.slice(pos, pos + 2);
  if (two[0] !== "$" && two[0] !== "\\") return false;
  const close = { "$$": "$$", "\\(": "\\)", "\\[": "\\]" }[two] ?? (two[0] === "$" ? "$" : "");
  if (!close) return false;
  const begin = pos + (close === "$" ? 1 : 2), end = find(state, close, begin);
  if (end < 0 || end + close.length > posMax) return false;
  const tex = src.slice(begin, end);
  if (!tex.trim() || (close === "$" && !isFormula(src[pos - 1], tex, src[end + 1]))) return false;
  if (!silent) push(state, tex, close !== "$" && close !== "\\)");
  state.pos = end + close.length;
  return true;
}

/** Where `close` stands at or after `begin`, or -1; found out once for a text that has none. */
function find(state, close, begin) {
  state.noMore ??= {};
  if (state.noMore[close] <= begin) return -1;
  const end = state.src.indexOf(close, begin);
  if (end < 0) state.noMore[close] = begin;
  return end;
}

/** Whether what stands between two dollars is meant as one: as pandoc decides it, and no price such as US$5 or 10$. */
function isFormula(before, tex, next) {
  return !/^\s|\s$|\\$/.test(tex) && !/\w/.test(before ?? "") && !/\d/.test(next ?? "") && !MONEY.test(tex);
}

function blockMath(state, startLine, endLine, silent) {
  if (state.sCount[startLine] - state.blkIndent >= 4) return false;
  const first = lineOf(state, startLine);
  const environment = ENVIRONMENT.exec(first);
  const close = first.startsWith("$$") ? "$$" : first.startsWith("\\[") ? "\\]" : environment && `\\end{${environment[1]}}`;
  if (!close) return false;
  const lines = [];
  for (let line = startLine; line < endLine; line++) {
    const text = line === startLine && !environment ? first.slice(2) : lineOf(state, line);
    if (line > startLine && (state.isEmpty(line) || state.sCount[line] < state.blkIndent)) return false;
    const at = text.indexOf(close);
    if (at >= 0) {
      if (text.slice(at + close.length).trim()) return false;   // more of the line follows: a formula inside a paragraph
      lines.push(text.slice(0, environment ? at + close.length : at));
      return end(line + 1, false);
    }
    lines.push(text);
  }
  // The text ends inside the formula. Of dollars alone in a line only: others may be no formula.
  return close === "$$" && lines[0].trim() ? false : end(endLine, true);

  function end(line, open) {
    const tex = lines.join("\n");
    if (!tex.trim() && !open) return false;
    if (!silent) push(state, open && !environment ? `${first.slice(0, 2)}${tex}` : tex, true, open);
    state.line = line;
    return true;
  }
}

function lineOf(state, line) {
  return state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
}

function push(state, tex, display, open = false) {
  const token = state.push("math", "", 0);
  Object.assign(token, { content: tex, meta: { display, open }, block: display });
}
