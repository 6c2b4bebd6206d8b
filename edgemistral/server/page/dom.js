// Small helpers to build the page. Strings become text, never HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties (or attributes, where it has no such property) and children, also in arrays. */
export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  for (const child of children.flat()) node.append(child);   // one by one: a call takes only so many arguments
  return node;
}

/** One of the drawings in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that shows an icon; its label is for screen readers and the tooltip. */
export function iconButton(name, label, onclick) {
  return element("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick }, icon(name));
}

/** A button that copies what `text()` gives, and says so for a moment. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "check" : "cross"));
    announce(copied ? "Copied" : "The browser does not allow copying");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);   // not there where the page came over plain HTTP from another computer
    return true;
  } catch {
    const area = element("textarea", { value: text, className: "hidden" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** Let screen readers say a text. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Show a line for some seconds, with a button if there is an action. */
export function toast(text, action = "", onclick = () => {}) {
  const box = document.getElementById("toast");
  const hide = () => box.replaceChildren();
  box.replaceChildren(element("p", {}, text));
  if (action) {
    box.firstChild.append(element("button", { type: "button", onclick: () => { hide(); onclick(); } }, action));
  }
  clearTimeout(toast.timer);
  toast.timer = setTimeout(hide, 8000);
}

/** As high as its text, as far as the style lets it. */
export function fitHeight(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight + textarea.offsetHeight - textarea.clientHeight}px`;
}

/** Enter without Shift, and not the Enter that ends the writing of a Chinese or Japanese word. On a phone, whose keyboard
 * has no Shift+Enter, Enter begins a line and a button sends. */
export function isSend(event) {
  if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return false;
  return event.ctrlKey || event.metaKey || !(event.shiftKey || hasTouchKeyboard());
}

export function hasTouchKeyboard() {
  return matchMedia("(hover: none) and (pointer: coarse)").matches;
}

/** A moment as a short text, with the whole date as its tooltip. */
export function timeNode(milliseconds) {
  const moment = new Date(milliseconds), now = new Date();
  const year = moment.getFullYear() === now.getFullYear() ? {} : { year: "numeric" };
  const date = moment.toDateString() === now.toDateString() ? {} : { day: "numeric", month: "short", ...year };
  return element("time", { dateTime: moment.toISOString(), title: moment.toLocaleString() },
    moment.toLocaleString([], { ...date, hour: "numeric", minute: "2-digit" }));
}
