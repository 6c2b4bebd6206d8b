// Runs before the page is drawn, so that it does not flash in the wrong colours.
try {
  document.documentElement.dataset.theme = localStorage.getItem("edgemistral.theme") ?? "auto";
} catch {
  document.documentElement.dataset.theme = "auto";
}
