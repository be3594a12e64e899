// All of the page's own JavaScript but a few lines in ui_parts.py. Every tab names its parts by the same classes.
const shown = (selector) => [...document.querySelectorAll(selector)].find((one) => one.checkVisibility());

// Ctrl or Cmd with Enter generates, Esc cancels, wherever the focus is.
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    shown(".go")?.click();
  } else if (event.key === "Escape" && shown(".busy")) {
    shown(".busy .cancel")?.click();
  }
}, true);

// On a narrow screen the picture lies below the form: it comes into view, with how far it is, when its drawing begins.
addEventListener("click", (event) => {
  if (event.target.closest?.(".go")) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    shown(".now")?.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
  }
});
