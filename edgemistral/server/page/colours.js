// The button that chooses light or dark colours; theme.js shows the choice before the page is drawn.

import { icon } from "./dom.js";
import { lasting } from "./storage.js";

const NAMES = { auto: "as the system", light: "light", dark: "dark" };

export function watchColours() {
  const button = document.getElementById("theme"), themes = Object.keys(NAMES), root = document.documentElement.dataset;
  const show = (theme) => {
    const label = `Colours: ${NAMES[theme]}`;
    root.theme = theme;
    button.title = label;
    button.setAttribute("aria-label", label);
    button.replaceChildren(icon(theme));
  };
  button.addEventListener("click", () => {
    show(themes[(themes.indexOf(root.theme) + 1) % themes.length]);
    try {
      lasting.setItem("edgemistral.theme", root.theme);
    } catch {
      // full: it holds until the page is closed
    }
  });
  show(root.theme in NAMES ? root.theme : "auto");
}
