// What is being drawn: a card for each job, that follows its events to the end.

import { $, blobOf, make, say, spoken } from "./dom.js";
import { ApiError, ask, eventsOf, read } from "./api.js";
import { tab } from "./store.js";

const OVER = ["succeeded", "failed", "cancelled"];
const pause = (seconds) => new Promise((resolve) => { setTimeout(resolve, seconds * 1000); });

export class Jobs {
  /** `drawn(pictures)` takes what a job leaves, `failed(error)` what went wrong. */
  constructor(drawn, failed) {
    Object.assign(this, { drawn, failed, cards: [] });
  }

  /** Send a request, and show its job; throws `ApiError`. */
  async start(values, picture) {
    const letters = [...crypto.getRandomValues(new Uint8Array(16))].map((each) => each.toString(16).padStart(2, "0"));
    const { strength, ...rest } = values;
    const body = picture.image ? { ...rest, ...picture, strength } : rest;
    const job = await read("v1/jobs", { method: "POST", body, headers: { "idempotency-key": letters.join("") } });
    this.#follow(job.id, picture.image ? values : rest);
  }

  /** Go on with the jobs that this tab had when it was left. */
  resume() {
    for (const { id, values } of tab.get("jobs", [])) this.#follow(id, values);
  }

  /** Cancel the newest job that is not over; tells whether there is one. */
  cancelNewest() {
    const card = this.cards.at(-1);
    card?.cancel();
    return Boolean(card);
  }

  async #follow(id, values) {
    const card = new Card(id, values);
    this.cards.push(card);
    $("jobs").append(card.element);
    this.#keep();
    say("Taken");
    let job = null;
    try {
      job = await card.follow();
    } catch (error) {
      this.failed(error);
    }
    const focused = card.element.contains(document.activeElement);
    this.cards.splice(this.cards.indexOf(card), 1);
    this.#keep();
    const pictures = await card.pictures(job);
    if (pictures.length) await this.drawn(pictures);
    card.element.remove();
    if (focused) (this.cards.at(-1)?.button || $("draw")).focus();
    if (job?.state === "failed") this.failed(new ApiError(job.error.message, job.error));
    else if (job?.state === "cancelled") say("Cancelled");
  }

  #keep() {
    tab.set("jobs", this.cards.map(({ id, values }) => ({ id, values })));
  }
}

class Card {
  constructor(id, values) {
    Object.assign(this, { id, values, blobs: new Map(), said: 0, state: "queued", cancelling: false });
    this.text = make("p", { class: "note" }, "Waiting");
    this.bar = make("progress", { max: 1, value: 0, "aria-label": "Steps done" });
    this.button = make("button", { type: "button", onclick: () => this.cancel() }, "Cancel");
    this.button.setAttribute("aria-label", `Cancel: ${values.prompt}`);
    const [width, height] = values.size.split("x");
    this.tiles = Array.from({ length: values.n }, () => {
      const tile = make("div", { class: "tile" });
      tile.style.aspectRatio = `${width} / ${height}`;
      return tile;
    });
    this.element = make("article", { class: "job waiting" },
      make("div", { class: "line" },
        make("div", { class: "what" }, make("p", { class: "prompt" }, values.prompt), this.text), this.button),
      this.bar,
      make("div", { class: "tiles" }, ...this.tiles));
  }

  async cancel() {
    if (this.cancelling) return;
    this.cancelling = true; // a disabled button would lose the focus, and the keyboard its place
    this.button.setAttribute("aria-disabled", "true");
    this.text.textContent = "Cancelling";
    try {
      await ask(`v1/jobs/${this.id}/cancel`, { method: "POST" });
    } catch {
      this.cancelling = false;
      this.button.removeAttribute("aria-disabled");
    }
  }

  /** Follow the job to its end, over broken connections too; returns it. Throws where the server forgot it. */
  async follow() {
    for (let failures = 0; ; failures += 1) {
      try {
        for await (const { name, data } of eventsOf(this.id)) {
          failures = 0;
          if (name === "job.progress") this.#progress(data);
          else if (name === "job.preview") this.#show(data.index, blobOf(data.b64_json));
          else if (name === "job.image") await this.#fetch(data.index);
          else if (data.state) this.#state(data);
          if (OVER.includes(data.state)) return data;
        }
      } catch (error) {
        if (error instanceof ApiError && error.status >= 400 && error.status < 500) throw error;
        this.text.textContent = "The connection is gone, trying again";
        if (failures > 60) throw error;
      }
      await pause(Math.min(5, 0.5 * (failures + 1)));
    }
  }

  /** Return the pictures that came, each with what it was drawn with. */
  async pictures(job) {
    if (job?.state === "succeeded") {
      for (let index = 0; index < this.tiles.length; index += 1) await this.#fetch(index).catch(() => {});
    }
    const { n, partial_images: _, ...asked } = this.values;
    const used = { ...job?.parameters, model: job?.model || asked.model, size: job?.size || asked.size };
    const facts = { warnings: job?.warnings, seconds: job?.timings?.total };
    return [...this.blobs.entries()].sort(([a], [b]) => a - b).map(([, { blob, seed }]) => (
      { blob, at: Date.now(), facts: { ...asked, ...used, ...facts, seed } }));
  }

  async #fetch(index) {
    if (this.blobs.has(index)) return;
    const response = await ask(`v1/jobs/${this.id}/images/${index}`);
    const blob = await response.blob();
    const seed = response.headers.get("x-seed");
    this.blobs.set(index, { blob, seed: seed === null ? undefined : Number(seed) });
    this.#show(index, blob);
    this.tiles[index].classList.add("drawn");
    if (this.tiles.length > 1) say(`Picture ${index + 1} of ${this.tiles.length} is there`);
  }

  #show(index, blob) {
    const image = make("img", { alt: "", src: URL.createObjectURL(blob) });
    this.element.classList.remove("waiting");
    const before = this.tiles[index].querySelectorAll("img");
    image.onload = () => { URL.revokeObjectURL(image.src); before.forEach((each) => each.remove()); };
    this.tiles[index].append(image);
  }

  #state(job) {
    this.state = job.state;
    this.#progress(job.progress);
  }

  #progress({ steps, total_steps: total, queue_position: before, seconds_left: left, images, total_images: all }) {
    const share = total ? steps / total : 0;
    this.bar.value = share;
    if (steps) this.element.classList.remove("waiting");
    const when = left > 0 ? `, ${spoken(left)} left` : "";
    if (this.cancelling) return;
    if (!steps && this.state === "loading") this.text.textContent = "Opening the model";
    else if (!steps && before > 0) this.text.textContent = `${before} ${before > 1 ? "pictures" : "picture"} before this one${when}`;
    else if (!steps) this.text.textContent = `Waiting${when}`;
    else if (steps >= total) this.text.textContent = "Finishing";
    else this.text.textContent = `Step ${steps} of ${total}${all > 1 ? `, ${images} of ${all} pictures` : ""}${when}`;
    const quarter = Math.floor(share * 4);
    if (quarter > this.said && quarter < 4) say(`${quarter * 25} percent`);
    this.said = quarter;
  }
}
