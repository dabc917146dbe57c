// What stays: pictures in this browser's own database, and what the form holds in this tab.

const NAME = "latentrt";
/** So many pictures are kept: of more, the oldest go. */
export const MOST = 500;

const memory = new Map();
let last = 0;
let opening;

function opened() {
  opening ||= new Promise((resolve) => {
    let request;
    try { request = indexedDB.open(NAME, 1); } catch { resolve(null); return; }
    request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
    request.onblocked = () => resolve(null);
  });
  return opening;
}

/** Run something on the database; null where the browser has none to give, as in some private windows. */
async function on(mode, work) {
  const database = await opened();
  if (!database) return null;
  return new Promise((resolve) => {
    try {
      const change = database.transaction("pictures", mode);
      const request = work(change.objectStore("pictures"));
      change.oncomplete = () => resolve({ value: request.result });
      change.onerror = () => resolve(null);
      change.onabort = () => resolve(null);
    } catch { resolve(null); }
  });
}

export const pictures = {
  /** Keep a picture, and return its id; one that the browser has no room for stays until the page is left. */
  async add(picture) {
    const kept = await on("readwrite", (store) => store.add(picture));
    if (kept) return kept.value;
    last -= 1;
    memory.set(last, { ...picture, id: last });
    return last;
  },
  /** Return all pictures, the newest first, but those that are too many. */
  async all() {
    const found = await on("readonly", (store) => store.getAll());
    const listed = [...(found?.value || []), ...memory.values()].sort((a, b) => b.at - a.at || b.id - a.id);
    for (const old of listed.splice(MOST)) await pictures.remove(old.id);
    return listed;
  },
  async remove(id) {
    memory.delete(id);
    await on("readwrite", (store) => store.delete(id));
  },
  async clear() {
    memory.clear();
    await on("readwrite", (store) => store.clear());
  },
};

/** Things of this tab, as JSON. */
export const tab = {
  get(name, otherwise) {
    try { return JSON.parse(sessionStorage.getItem(`${NAME}.${name}`)) ?? otherwise; } catch { return otherwise; }
  },
  set(name, value) {
    try { sessionStorage.setItem(`${NAME}.${name}`, JSON.stringify(value)); } catch { /* it is not kept then */ }
  },
};
