// What was drawn: a grid of pictures, and one of them large with all that it was drawn with.

import { $, make, say } from "./dom.js";
import { factsOf } from "./form.js";
import { MOST, pictures as store } from "./store.js";

export class Gallery {
  /** `again(picture)` and `from(picture)` do what their buttons say. */
  constructor(again, from) {
    this.all = [];
    this.shown = null;
    const shut = (work) => () => { const picture = this.shown; $("viewer").close(); work(picture); };
    $("again").addEventListener("click", shut(again));
    $("from-this").addEventListener("click", shut(from));
    $("close").addEventListener("click", () => $("viewer").close());
    $("delete").addEventListener("click", () => this.#remove(this.shown));
    $("previous").addEventListener("click", () => this.#move(-1));
    $("next").addEventListener("click", () => this.#move(1));
    $("clear").addEventListener("click", () => $("sure").showModal());
    $("sure").addEventListener("close", () => { if ($("sure").returnValue === "yes") this.#clear(); });
    $("viewer").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#move(-1);
      else if (event.key === "ArrowRight") this.#move(1);
    });
    $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
    $("viewer").addEventListener("close", () => { (this.shown?.button || $("pictures")).focus(); });
  }

  /** Show what this browser has. */
  async open() {
    for (const picture of (await store.all()).reverse()) this.#put(picture);
    this.#count();
  }

  /** Take new pictures, the first of them to the first place. */
  async add(pictures) {
    for (const picture of [...pictures].reverse()) {
      picture.id = await store.add(picture);
      this.#put(picture);
    }
    for (const old of this.all.slice(MOST)) {
      this.#drop(old);
      await store.remove(old.id);
    }
    this.#count();
    const seeds = pictures.map(({ facts }) => facts.seed).join(", ");
    say(`${pictures.length > 1 ? `${pictures.length} pictures are` : "The picture is"} there, seed ${seeds}`);
  }

  #put(picture) {
    picture.url = URL.createObjectURL(picture.blob);
    const label = picture.facts.prompt || "Without a prompt";
    picture.button = make("button", { type: "button", "aria-haspopup": "dialog", onclick: () => this.#show(picture) },
      make("img", { src: picture.url, alt: `${label}, seed ${picture.facts.seed}`, loading: "lazy", decoding: "async" }),
      make("span", { "aria-hidden": "true" }, label));
    picture.item = make("li", {}, picture.button);
    this.all.unshift(picture);
    $("gallery").prepend(picture.item);
  }

  #show(picture) {
    this.shown = picture;
    const { facts } = picture;
    const [width] = (facts.size || "512").split("x").map(Number);
    $("viewer-image").style.maxWidth = `${Math.round(width * (width < 300 ? 4 : 1.5))}px`; // small ones are hard to see
    $("viewer-image").src = picture.url;
    $("viewer-image").alt = facts.prompt;
    $("viewer-title").textContent = facts.prompt;
    $("viewer-facts").replaceChildren(...factsOf(picture));
    const words = facts.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) || ["picture"];
    $("download").href = picture.url;
    $("download").download = `${words.join("-").slice(0, 60)}-${facts.seed}.${(picture.blob.type.split("/")[1] || "png").replace("jpeg", "jpg")}`;
    const place = this.all.indexOf(picture);
    $("previous").disabled = place === 0;
    $("next").disabled = place === this.all.length - 1;
    if (!$("viewer").open) $("viewer").showModal();
  }

  #move(by) {
    const picture = this.all[this.all.indexOf(this.shown) + by];
    if (!picture) return;
    const focused = document.activeElement;
    this.#show(picture);
    if (focused?.disabled) $("close").focus();
    say(`${picture.facts.prompt}, seed ${picture.facts.seed}`);
  }

  async #remove(picture) {
    const place = this.all.indexOf(picture);
    if (place < 0) return; // it goes already
    this.#drop(picture);
    await store.remove(picture.id);
    this.#count();
    const next = this.all[Math.min(place, this.all.length - 1)];
    if (next) this.#show(next);
    else { this.shown = null; $("viewer").close(); }
    say("Deleted");
  }

  async #clear() {
    for (const picture of [...this.all]) this.#drop(picture);
    this.shown = null;
    await store.clear();
    this.#count();
    $("pictures").focus();
    say("All pictures are deleted");
  }

  #drop(picture) {
    this.all.splice(this.all.indexOf(picture), 1);
    picture.item.remove();
    URL.revokeObjectURL(picture.url);
  }

  #count() {
    const many = this.all.length;
    $("empty").hidden = many > 0;
    $("clear").hidden = many === 0;
    $("pictures-count").textContent = many ? String(many) : "";
  }
}
