// The page: its parts put together, what keys do, and how the server is.

import { $, complain, say } from "./dom.js";
import { ApiError, ask, key, sentence } from "./api.js";
import { Board } from "./brush.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";

const SECONDS = { wait: 1.5, ready: 20, bad: 4 };
const narrow = matchMedia("(max-width: 900px)");

const form = new Form(failed);
const board = new Board(() => form.size(), (picture) => { if (picture) form.shape(picture.width, picture.height); });
const gallery = new Gallery((picture) => use(picture), (picture) => begin(picture.blob));
const jobs = new Jobs((pictures) => gallery.add(pictures), failed);
form.sized = () => board.fit();
let opened = false;

/** Show what went wrong, and ask for a key where that is it. */
function failed(error) {
  if (error instanceof ApiError && error.status === 401) {
    askForKey(key.get() ? "This server does not know the key." : "This server needs a key.");
    return;
  }
  const about = error instanceof ApiError && error.param ? form.control(error.param) : null;
  const wait = error.wait > 1 ? `; wait ${error.wait} s` : "";
  complain(`${sentence(form.named(error.message || String(error), error.param))}${wait}`, about);
}

async function draw(event) {
  event.preventDefault();
  complain();
  if (!opened || !form.settled) { complain("The server is not ready yet: wait a moment."); return; }
  try {
    const values = form.read();
    await jobs.start(values, board.data());
    if (narrow.matches) $("jobs").scrollIntoView({ block: "start" });
  } catch (error) {
    if (error.text) complain(error.text, error.control);
    else failed(error);
  }
}

async function use(picture) {
  try {
    await form.again(picture.facts);
  } catch (error) {
    failed(error);
    return;
  }
  $("prompt").focus();
  say("The form holds what the picture was drawn with");
}

async function begin(file) {
  complain();
  try {
    await board.load(file);
    $("strength").focus();
    $("start").scrollIntoView({ block: "nearest" });
  } catch {
    complain("This is no picture that a browser can read: choose a PNG, JPEG or WebP file.", $("file"));
  }
}

function askForKey(why) {
  $("key-title").textContent = why || "API key";
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

/** Say how the server is, and once it is ready open the form. */
async function look() {
  let [state, text] = ["bad", "Not reachable"];
  try {
    await ask("health");
    [state, text] = ["ready", "Ready"];
  } catch (error) {
    if (error.status === 503) [state, text] = ["wait", "Loading"];
  }
  if (state === "ready" && !opened) {
    try {
      await form.open();
      opened = true;
      complain();
      jobs.resume();
    } catch (error) {
      if (error.status === 401) [state, text] = ["bad", "Needs a key"];
      if (error.status !== 401 || !$("key-dialog").open) failed(error);
    }
  }
  if ($("server-text").textContent !== text) say(`Server: ${text}`);
  $("server").dataset.state = state;
  $("server-text").textContent = text;
  clearTimeout(look.next);
  if (text !== "Needs a key") look.next = setTimeout(look, SECONDS[state] * 1000);
}

$("form").addEventListener("submit", draw);
for (const id of ["prompt", "negative"]) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault(); // Shift and Enter begin a new line
    $("form").requestSubmit();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.defaultPrevented && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    $("form").requestSubmit();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]") && jobs.cancelNewest()) {
    event.preventDefault();
  }
});

$("file").addEventListener("change", () => { if ($("file").files[0]) begin($("file").files[0]); $("file").value = ""; });
$("remove").addEventListener("click", () => { board.load(null); $("file").focus(); say("The picture is removed"); });
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file && opened && !$("start").hidden) { event.preventDefault(); begin(file); }
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
for (const end of ["dragleave", "drop"]) document.addEventListener(end, () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (file && opened && !$("start").hidden) begin(file);
});

$("key-button").addEventListener("click", () => askForKey());
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", () => { key.set($("key").value.trim()); look(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });

if (narrow.matches) $("settings").open = false;
gallery.open();
look();
