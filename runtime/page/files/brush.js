// A picture to start from, and the paint over what should change, by pointer, finger or keyboard.

import { $, say } from "./dom.js";

const UNDO = 20;

export class Board {
  /** `changed` is called when a picture comes or goes, `size` returns the width and height of what is drawn. */
  constructor(size, changed) {
    Object.assign(this, { size, changed, picture: null, erasing: false, past: [], at: [0.5, 0.5], showCursor: false });
    this.source = $("source");
    this.mask = $("mask");
    this.paint = document.createElement("canvas"); // the strokes alone; #mask shows them with the cursor
    this.paint.getContext("2d", { willReadFrequently: true });
    this.#listen();
  }

  /** Take a file, a blob or nothing; throws what is no picture. */
  async load(file) {
    const picture = file ? await createImageBitmap(file) : null;
    this.picture?.close();
    this.picture = picture;
    this.past = [];
    $("drop").hidden = Boolean(picture);
    $("edit").hidden = !picture;
    this.changed(picture);
    this.fit(true);
  }

  /** Lay the picture out at the size that is drawn, cut to its shape; strokes are kept where they can be. */
  fit(anew = false) {
    if (!this.picture) return;
    const [width, height] = this.size();
    if (!anew && this.source.width === width && this.source.height === height) return;
    const strokes = anew ? null : copyOf(this.paint);
    for (const canvas of [this.source, this.mask, this.paint]) Object.assign(canvas, { width, height });
    const scale = Math.max(width / this.picture.width, height / this.picture.height);
    const [w, h] = [this.picture.width * scale, this.picture.height * scale];
    const context = this.source.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fff"; // behind what is transparent
    context.fillRect(0, 0, width, height);
    context.drawImage(this.picture, (width - w) / 2, (height - h) / 2, w, h);
    if (strokes?.width) this.paint.getContext("2d").drawImage(strokes, 0, 0, width, height);
    if (!anew) this.past = [];
    this.show();
  }

  /** Return the fields of a request: the picture as base64, and where something is painted the mask.
   *  With room around the mask for the whole picture, what is drawn is pasted into it: the rest stays as it is. */
  data() {
    if (!this.picture) return {};
    const [width, height] = [this.paint.width, this.paint.height];
    const pixels = this.paint.getContext("2d").getImageData(0, 0, width, height).data;
    let painted = false;
    for (let i = 3; i < pixels.length && !painted; i += 4) painted = pixels[i] > 127;
    if (!painted) return { image: base64(this.source) };
    const white = softened(this.paint);
    const context = white.getContext("2d");
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    return { image: base64(this.source), mask: base64(white), padding_mask_crop: Math.max(width, height) };
  }

  get radius() {
    const share = Number($("brush").value) / 100;
    return Math.max(1, 0.5 * share * share * Math.max(this.paint.width, this.paint.height));
  }

  stroke(from, to) {
    const context = this.paint.getContext("2d");
    context.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--paint");
    context.lineWidth = 2 * this.radius;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.001, to[1]); // a line without length is not drawn
    context.stroke();
    this.show();
  }

  remember() {
    this.past.push(copyOf(this.paint));
    if (this.past.length > UNDO) this.past.shift();
  }

  undo() {
    const before = this.past.pop();
    if (before) this.#replace(before);
    say(before ? "Undone" : "Nothing to undo");
  }

  clear() {
    this.remember();
    this.#replace(null);
    say("The paint is gone");
  }

  show() {
    const context = this.mask.getContext("2d");
    context.clearRect(0, 0, this.mask.width, this.mask.height);
    context.drawImage(this.paint, 0, 0);
    if (!this.showCursor) return;
    for (const [style, wide] of [["#000", 3], ["#fff", 1.2]]) {
      context.beginPath();
      context.arc(...this.#cursor(), this.radius, 0, 7);
      context.strokeStyle = style;
      context.lineWidth = wide * this.mask.width / Math.max(1, this.mask.clientWidth);
      context.stroke();
    }
  }

  erase(on) {
    this.erasing = on;
    $("paint").setAttribute("aria-pressed", String(!on));
    $("erase").setAttribute("aria-pressed", String(on));
  }

  #cursor() { return [this.at[0] * this.paint.width, this.at[1] * this.paint.height]; }

  #replace(strokes) {
    const context = this.paint.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, this.paint.width, this.paint.height);
    if (strokes) context.drawImage(strokes, 0, 0);
    this.show();
  }

  #listen() {
    let before = null;
    const place = (event) => {
      const box = this.mask.getBoundingClientRect();
      this.at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      return this.#cursor();
    };
    this.mask.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault(); // no selection, no scrolling
      this.mask.setPointerCapture(event.pointerId);
      this.remember();
      before = place(event);
      this.stroke(before, before);
    });
    this.mask.addEventListener("pointermove", (event) => {
      this.showCursor = event.pointerType !== "touch";
      for (const each of before ? event.getCoalescedEvents?.() || [event] : []) {
        const now = place(each);
        this.stroke(before, now);
        before = now;
      }
      place(event);
      this.show();
    });
    for (const end of ["pointerup", "pointercancel"]) this.mask.addEventListener(end, () => { before = null; });
    this.mask.addEventListener("pointerleave", () => { this.showCursor = false; this.show(); });
    this.mask.addEventListener("focus", () => { this.showCursor = this.mask.matches(":focus-visible"); this.show(); });
    this.mask.addEventListener("blur", () => { this.showCursor = false; this.show(); });
    this.mask.addEventListener("keydown", (event) => this.#key(event));
    $("paint").addEventListener("click", () => this.erase(false));
    $("erase").addEventListener("click", () => this.erase(true));
    $("undo").addEventListener("click", () => this.undo());
    $("clear-mask").addEventListener("click", () => this.clear());
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) {
      if (event.key.toLowerCase() === "z" && !event.altKey) { event.preventDefault(); this.undo(); }
      return;
    }
    const step = event.shiftKey ? 0.1 : 0.02;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const brush = $("brush");
    if (event.key in moves) {
      this.at = this.at.map((each, axis) => Math.min(1, Math.max(0, each + moves[event.key][axis])));
      say(`${Math.round(this.at[0] * 100)}, ${Math.round(this.at[1] * 100)} percent`);
    } else if (event.key === " ") {
      this.remember();
      this.stroke(this.#cursor(), this.#cursor());
      say(this.erasing ? "Erased" : "Painted");
    } else if (event.key.toLowerCase() === "x") {
      this.erase(!this.erasing);
      say(this.erasing ? "Erasing" : "Painting");
    } else if (event.key === "[" || event.key === "]") {
      brush.value = Number(brush.value) + (event.key === "]" ? 5 : -5);
    } else {
      return;
    }
    event.preventDefault();
    this.showCursor = true;
    this.show();
  }
}

function copyOf(canvas) {
  const copy = document.createElement("canvas");
  Object.assign(copy, { width: canvas.width, height: canvas.height });
  if (canvas.width && canvas.height) copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}

/** Return a copy with edges softened by some pixels of a large picture, so that no seam is seen. */
function softened(canvas) {
  const scale = Math.max(1, Math.round(Math.max(canvas.width, canvas.height) / 200));
  const small = document.createElement("canvas");
  Object.assign(small, { width: Math.ceil(canvas.width / scale), height: Math.ceil(canvas.height / scale) });
  small.getContext("2d").drawImage(canvas, 0, 0, small.width, small.height);
  const soft = document.createElement("canvas");
  Object.assign(soft, { width: canvas.width, height: canvas.height });
  soft.getContext("2d").drawImage(small, 0, 0, canvas.width, canvas.height);
  return soft;
}

const base64 = (canvas) => canvas.toDataURL("image/png").split(",")[1];
