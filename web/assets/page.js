// All of the page's own JavaScript but a few lines in the modules. Every tab names its parts by the same classes.
const shown = (selector) => [...document.querySelectorAll(selector)].find((element) => element.checkVisibility());
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
// The drawer of a small screen, which lies over the picture; beside it, where there is room, it may stay open.
const sheet = () => {
  const open = shown(".drawer > .open + *");
  return open?.offsetWidth === document.documentElement.clientWidth ? open.previousElementSibling : null;
};
// What opened that which lies over the page, and closes it.
const above = () => shown("#weights [open] > summary, .more > .open, #real-model > .open") ?? sheet();

// Ctrl or Cmd with Enter generates, Esc closes what lies over the page, else cancels, wherever the focus is.
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    shown(".go")?.click();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]") && above()) {
    const opener = above();
    opener.focus();
    opener.click();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]") && shown(".busy")) {
    shown(".busy .cancel")?.click();
  }
}, true);

// The server words its sentences in the language that Gradio shows the page in.
const tellLanguage = () => {
  const secure = location.protocol === "https:" ? "; SameSite=None; Secure; Partitioned" : "; SameSite=Lax";
  document.cookie = `studio-language=${document.documentElement.lang}; path=/${secure}`;
};
tellLanguage();
new MutationObserver(() => {
  tellLanguage();
  if (window.studioReady) dispatchEvent(new Event("studio-language")); // before, nothing was shown in another one
}).observe(document.documentElement, { attributeFilter: ["lang"] });

const word = (key) => document.querySelector(`#word-${key}`).textContent;
const say = (text) => { document.querySelector("#said").textContent = text; };

// The switch: Gradio changes its language by a function of its own; where that is not found, a new start does it.
const speak = async (tag) => {
  try { localStorage.setItem("studio-language", tag); } catch {} // a browser that keeps nothing
  try {
    const core = performance.getEntriesByType("resource").find(({ name }) => /\/core-[^/]*\.js$/.test(name));
    (await import(core.name)).changeLocale(tag);
  } catch {
    location.reload();
  }
};

// What Gradio's components leave out for screen readers and the keyboard. Names are given once, states are kept.
let count = 0;
const idOf = (element) => (element.id ||= `part-${++count}`);
const set = (element, name, value) => element.getAttribute(name) === `${value}` || element.setAttribute(name, value);
const tend = () => {
  // A picture's empty place has a name, and not what the named thing is.
  document.querySelectorAll(".empty[aria-label]:not([role])").forEach((empty) => { empty.role = "img"; });
  // A field's help line is its description, and no part of its name.
  for (const info of document.querySelectorAll(".info-text")) {
    const block = info.closest(".block");
    const label = block.querySelector('[data-testid="block-info"]');
    const fields = block.matches("fieldset") ? [block] : block.querySelectorAll("input, textarea");
    for (const field of fields) {
      set(field, "aria-describedby", idOf(info));
      if (!field.ariaLabel) set(field, "aria-labelledby", idOf(label));
    }
  }
  for (const about of document.querySelectorAll(".about-image p")) {
    about.closest(".side").querySelectorAll(".image :is(button.upload-container, input)").forEach((field) =>
      set(field, "aria-describedby", idOf(about)));
  }
  // Radio buttons are one group, so that the arrow keys choose: Gradio makes each a group of its own.
  for (const group of document.querySelectorAll("fieldset:has(input[type=radio])")) {
    set(group, "role", "radiogroup");
    group.querySelectorAll("input[type=radio]").forEach((radio) => set(radio, "name", idOf(group)));
  }
  // A picture of the strip is called by its prompt and its seed.
  document.querySelectorAll(".strip .thumbnail-item").forEach((entry) => {
    const name = entry.querySelector(".caption-label")?.textContent.trim();
    if (name) set(entry, "aria-label", name);
  });
  document.querySelectorAll(".label-wrap").forEach((fold) => set(fold, "aria-expanded", fold.matches(".open")));
  const language = document.documentElement.lang.split("-")[0];
  document.querySelectorAll("[data-language]").forEach((button) =>
    set(button, "aria-pressed", button.lang.split("-")[0] === language));
};
let due = false;
new MutationObserver(() => {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; tend(); });
}).observe(document.documentElement, { childList: true, subtree: true, attributeFilter: ["class", "lang"] });

// The viewer: the picture fills the screen, at a press it has its real size; the arrows go through this visit's pictures.
const picturesOf = (columns) => {
  const strip = [...columns.querySelectorAll(".strip img")];
  // Of a picture beside the one that it was made from, the later one.
  const large = [...columns.querySelectorAll(".picture img, #compared img")].at(-1);
  const at = strip.findIndex(({ src }) => src === large.src);
  return at < 0 ? [[large], 0] : [strip, at];
};
const view = (columns) => {
  let [pictures, at] = picturesOf(columns);
  const enlarged = columns.querySelector(".enlarged img:not(.grid *)"), enlargedAt = at;
  const dialog = document.createElement("dialog");
  dialog.className = "viewer";
  const image = new Image();
  const fill = () => { // in its real size a picture is the file itself
    const real = dialog.classList.contains("real");
    image.src = (enlarged && at === enlargedAt && !real ? enlarged : pictures[at]).src;
    image.alt = pictures[at].alt;
  };
  const show = (number) => {
    at = (number + pictures.length) % pictures.length;
    dialog.classList.remove("real");
    fill();
  };
  const button = (key, sign, press) => {
    const made = document.createElement("button");
    Object.assign(made, { type: "button", className: key, textContent: sign, ariaLabel: word(key), onclick: press });
    dialog.append(made);
  };
  image.onclick = () => { dialog.classList.toggle("real"); fill(); };
  dialog.ariaLabel = word("picture");
  dialog.append(image);
  button("close", "×", () => dialog.close());
  if (pictures.length > 1) {
    button("before", "‹", () => show(at - 1));
    button("after", "›", () => show(at + 1));
  }
  dialog.addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft") show(at - 1);
    else if (key === "ArrowRight") show(at + 1);
  });
  dialog.addEventListener("close", () => dialog.remove());
  show(at);
  document.body.append(dialog);
  dialog.showModal();
};

const copy = async (button) => {
  const [pictures, at] = picturesOf(button.closest(".columns"));
  try {
    const file = fetch(pictures[at].src).then((answer) => answer.blob());
    await navigator.clipboard.write([new ClipboardItem({ "image/png": file })]);
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1500);
    say(word("copied"));
  } catch {
    say(word("refused")); // the visitor's browser does not allow it
  }
};

addEventListener("click", (event) => {
  const at = (selector) => event.target.closest?.(selector);
  // What lies over the page goes away with a press beside it.
  document.querySelectorAll("#weights details[open]").forEach((open) => { open.open = open.contains(event.target); });
  if (!at("#real-model")) shown("#real-model > .open")?.click();
  // On a small screen the open drawer lies over the picture: a press beside it, or one that draws, closes it.
  if (at(".go") || !at(".controls")) sheet()?.click();
  if (at(".go")) {
    // The picture comes into view, with how far it is, when it is begun.
    shown(".stage")?.scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  } else if (at(".copy")) {
    copy(at(".copy"));
  } else if (at(".copy-text")) {
    navigator.clipboard?.writeText(at(".copy-text").previousElementSibling.textContent)
      .then(() => say(word("copied")), () => say(word("refused")));
  } else if (at(".known button")) {
    // One of the things that the weights know joins the prompt.
    const prompt = shown(".controls .prompt textarea:enabled");
    if (prompt) {
      prompt.value = `${prompt.value.trimEnd()} ${event.target.textContent}`.trimStart();
      prompt.dispatchEvent(new Event("input", { bubbles: true }));
    }
  } else if (at("[data-language]")) {
    speak(at("[data-language]").dataset.language);
  } else if (at(".view") || at(".picture .image-container > button")?.querySelector("img")) {
    view(at(".columns"));
  }
});

addEventListener("input", ({ target }) => {
  if (!target.matches(".known input")) return;
  const wanted = target.value.trim().toLowerCase();
  target.nextElementSibling.childNodes.forEach((thing) => { thing.hidden = !thing.textContent.includes(wanted); });
});

// What is dropped beside the fields for files, web/dropped.py finds the place for; the browser would leave the page for it.
const fields = "[id$=-image], .lora";
const files = (event) => event.dataTransfer?.types.includes("Files");
const elsewhere = (event) => files(event) && !event.target.closest?.(fields);
const dragging = (on) => document.body.classList.toggle("dragging", on);
addEventListener("dragover", (event) => {
  if (!files(event)) return;
  document.body.dataset.drop = word("drop");
  dragging(true);
  if (elsewhere(event)) event.preventDefault();
});
addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || dragging(false));
addEventListener("drop", (event) => {
  dragging(false);
  if (!elsewhere(event)) return;
  event.preventDefault();
  const input = document.querySelector("#dropped")?.previousElementSibling; // Gradio puts a button's field before it
  if (!input || !event.dataTransfer.files.length) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}, true);

// A file that the browser cannot show, or that is no picture, leaves no broken image: the text beside it says what it is.
for (const [type, broken] of [["error", true], ["load", false]])
  addEventListener(type, ({ target }) => target.matches?.(".image img") && target.classList.toggle("unseen", broken), true);
