// The server's API: requests with the key of this tab, errors as one line, and events of a job.

const KEY = "latentrt.key";

/** What a server answered that did not do what was asked; `message` is one line for people. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, wait = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, wait });
  }
}

export const key = {
  get: () => { try { return sessionStorage.getItem(KEY) || ""; } catch { return ""; } },
  set: (value) => { try { sessionStorage.setItem(KEY, value); } catch { /* it is for this request alone then */ } },
};

const address = (path) => new URL(path, document.baseURI);

/** Return the response to a request; throws `ApiError`. */
export async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key.get()) sent.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) sent["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method, signal, headers: sent, cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer: is it running, and is this device online?");
  }
  if (response.ok) return response;
  let said = {};
  try { said = (await response.json()).error || {}; } catch { /* no JSON: a proxy's own answer */ }
  const wait = Number(response.headers.get("retry-after")) || null;
  const message = said.message || `The server answered ${response.status} ${response.statusText}`.trim();
  throw new ApiError(sentence(message), { status: response.status, code: said.code, param: said.param, wait });
}

export const read = async (path, options) => (await ask(path, options)).json();

/** Yield the events of a job as objects, from the stream of their own that a key can be sent to. */
export async function* eventsOf(id, signal) {
  const response = await ask(`v1/jobs/${id}/events`, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
        const name = lines.find((line) => line.startsWith("event:"))?.slice(6).trim();
        if (data) yield { name, data: JSON.parse(data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return a text with a capital letter, as one that is shown by itself. */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
