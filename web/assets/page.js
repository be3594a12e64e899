// All of the page's own JavaScript but a few lines in the modules. Every tab names its parts by the same classes.
const shown = (selector) => [...document.querySelectorAll(selector)].find((element) => element.checkVisibility());
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Ctrl or Cmd with Enter generates, Esc closes what lies over the page, else cancels, wherever the focus is.
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    shown(".go")?.click();
  } else if (event.key === "Escape" && document.querySelector(".api-docs .backdrop")) {
    // Gradio's dialogs, which take a press beside them only; what is drawn goes on.
    document.querySelector(".api-docs .backdrop").click();
    document.querySelector(".language")?.focus();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]") && shown(".busy")) {
    shown(".busy .cancel")?.click();
  }
}, true);

// The arrow keys choose among radio buttons: Gradio gives each a name of its own, which makes it a group of one.
const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
addEventListener("keydown", (event) => {
  if (!(event.key in STEPS) || event.target.type !== "radio") return;
  const group = [...event.target.closest("fieldset").querySelectorAll("input[type=radio]")];
  const next = group.at((group.indexOf(event.target) + STEPS[event.key]) % group.length);
  event.preventDefault();
  next.focus();
  next.click();
});

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

// Gradio names the place of a picture that is not there yet, and forgets to say what the named thing is.
const nameEmpty = () => document.querySelectorAll(".empty[aria-label]:not([role])").forEach((empty) => { empty.role = "img"; });
new MutationObserver(nameEmpty).observe(document.documentElement, { childList: true, subtree: true });

// The picture as it is: at its real size, over the page.
const enlarge = (picture) => {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  const large = new Image();
  large.src = picture.src;
  large.alt = picture.alt;
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "×";
  close.ariaLabel = document.querySelector("#close").textContent;
  dialog.append(close, large);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
};

const copy = async (button) => {
  // Of a picture beside the one that it was made from, the later one.
  const picture = [...button.closest(".columns").querySelectorAll(".picture img, #compared img")].at(-1);
  const words = button.textContent;
  try {
    const file = fetch(picture.src).then((answer) => answer.blob());
    await navigator.clipboard.write([new ClipboardItem({ "image/png": file })]);
    button.textContent = "✓";
  } catch {
    button.textContent = "×"; // the visitor's browser does not allow it
  }
  setTimeout(() => { button.textContent = words; }, 1500);
};

addEventListener("click", (event) => {
  const at = (selector) => event.target.closest?.(selector);
  if (at(".go")) {
    // On a narrow screen the picture lies below the form: it comes into view, with how far it is, when it is begun.
    shown(".now")?.scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  } else if (at(".copy")) {
    copy(at(".copy"));
  } else if (at(".language")) {
    document.querySelector("footer .settings")?.click();
  } else if (at(".picture .image-container > button")?.querySelector("img")) {
    enlarge(at(".picture .image-container > button").querySelector("img"));
  }
});

// A picture that is dropped beside the fields for files restores its settings; the browser would leave the page for it.
const elsewhere = (event) => event.dataTransfer?.types.includes("Files") && !event.target.closest?.("[id$=-image], .lora");
addEventListener("dragover", (event) => elsewhere(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!elsewhere(event)) return;
  event.preventDefault();
  const input = document.querySelector("#above input[type=file]");
  if (!input || !event.dataTransfer.files.length) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
