// Elements, by hand: texts are set as texts, so nothing that a user or a server wrote becomes markup.

export const $ = (id) => document.getElementById(id);

/** Return a new element with properties and children; `data-…`, `aria-…` and `role` are attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "class") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

let saying;

/** Say something to those who hear the page, the latest thing if there are several at once. */
export function say(text) {
  clearTimeout(saying);
  saying = setTimeout(() => { $("status").textContent = text; }, 60);
}

/** Show one line about what went wrong, and mark the control that it is about; without a text, show nothing. */
export function complain(text, control) {
  document.querySelectorAll("[aria-invalid]").forEach((each) => {
    each.removeAttribute("aria-invalid");
    each.removeAttribute("aria-errormessage");
  });
  $("error").hidden = !text;
  $("error").textContent = text || "";
  if (text && control) {
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", "error");
    const settings = control.closest("details");
    if (settings) settings.open = true;
    control.focus({ preventScroll: true });
    control.scrollIntoView({ block: "center" }); // not behind what stands at the bottom of a phone
  }
}

/** Return seconds as people say them. */
export function spoken(seconds) {
  if (seconds < 90) return `about ${Math.max(1, Math.round(seconds))} s`;
  return `about ${Math.round(seconds / 60)} min`;
}

/** Return a picture's bytes from base64; a browser tells their kind by itself. */
export function blobOf(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i += 1) bytes[i] = letters.charCodeAt(i);
  return new Blob([bytes]);
}
