// All of the page's own JavaScript but two lines in ui.py; every part of the page is named by its id there.

// Ctrl or Cmd with Enter generates, Esc cancels, wherever the focus is.
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.getElementById("generate")?.click();
  } else if (event.key === "Escape" && document.body.classList.contains("busy")) {
    document.getElementById("cancel")?.click();
  }
}, true);

// On a narrow screen the picture lies below the form: it comes into view, with how far it is, when its drawing begins.
addEventListener("click", (event) => {
  if (event.target.closest?.("#generate")) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    document.getElementById("now")?.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
  }
});
