// All of the page's own JavaScript but a few lines in the modules. Every tab names its parts by the same classes.
const shown = (selector) => [...document.querySelectorAll(selector)].find((one) => one.checkVisibility());
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Ctrl or Cmd with Enter generates, Esc cancels, wherever the focus is.
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    shown(".go")?.click();
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
new MutationObserver(tellLanguage).observe(document.documentElement, { attributeFilter: ["lang"] });

// Gradio names the place of a picture that is not there yet, and forgets to say what the named thing is.
const nameEmpty = () => document.querySelectorAll(".empty[aria-label]:not([role])").forEach((one) => { one.role = "img"; });
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
  close.ariaLabel = "Close";
  dialog.append(close, large);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
};

const copy = async (button) => {
  const picture = button.closest(".columns").querySelector(".picture img");
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
