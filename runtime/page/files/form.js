// The form: what a model can do becomes its choices, and what is chosen becomes a request.

import { $, make } from "./dom.js";
import { read } from "./api.js";
import { tab } from "./store.js";

const TYPED = ["prompt", "negative", "count", "steps", "guidance", "strength", "seed", "width", "height"];
const CHOSEN = ["model", "size", "sampler", "spacing"];
const SPACINGS = { karras: "Karras", exponential: "Exponential", beta: "Beta", lu: "Lu" };
const CUSTOM = "custom";

/** Controls by the fields that a server's errors name. */
const CONTROLS = {
  prompt: "prompt", negative_prompt: "negative", n: "count", num_inference_steps: "steps", guidance_scale: "guidance",
  sampler: "sampler", seed: "seed", strength: "strength", model: "model", image: "file", mask: "mask", size: "size",
};

export class Form {
  /** `failed(error)` is told what went wrong when another model was chosen. */
  constructor(failed) {
    this.models = new Map();
    this.can = null; // what the chosen model can do
    this.turn = 0;
    this.sized = () => {};
    $("model").addEventListener("change", () => this.choose($("model").value).catch(failed));
    $("sampler").addEventListener("change", () => this.#spacings());
    $("any-seed").addEventListener("click", () => { $("seed").value = ""; this.keep(); $("seed").focus(); });
    for (const slide of document.querySelectorAll("[data-for]")) {
      const number = $(slide.dataset.for);
      slide.addEventListener("input", () => { number.value = slide.value; this.keep(); });
      number.addEventListener("input", () => { slide.value = number.value; });
    }
    $("form").addEventListener("input", () => this.keep());
    $("size").addEventListener("change", () => this.#size());
    for (const side of ["width", "height"]) $(side).addEventListener("change", () => this.#size());
  }

  /** Read which models there are, and take up what this tab had chosen. */
  async open() {
    const { data } = await read("v1/models");
    this.models = new Map(data.map((model) => [model.id, model]));
    $("model").replaceChildren(...data.map((model) => new Option(model.id, model.id)));
    $("model-field").hidden = data.length < 2;
    const kept = tab.get("form", {});
    await this.choose(this.models.has(kept.model) ? kept.model : data[0].id);
    this.write(kept);
  }

  /** Whether the form is that of the chosen model. */
  get settled() { return this.can?.id === $("model").value; }

  /** Offer what a model can do, with its defaults; where that is not told, the model before stays. */
  async choose(name) {
    const turn = this.turn += 1;
    $("model").value = name;
    let can;
    try {
      can = await read(`v1/models/${encodeURIComponent(name)}`);
    } catch (error) {
      if (turn !== this.turn) return;
      if (this.can) $("model").value = this.can.id;
      throw error;
    }
    if (turn !== this.turn) return; // another one was chosen meanwhile
    this.can = can;
    const { defaults, limits } = can;
    const sizes = can.sizes.map((size) => new Option(size.replace("x", " × "), size));
    $("size").replaceChildren(...sizes, ...(can.other_sizes ? [new Option("Other…", CUSTOM)] : []));
    for (const side of ["width", "height"]) Object.assign($(side), { step: can.size_multiple, min: can.size_multiple });
    [$("width").value, $("height").value] = defaults.size.split("x");
    $("size").value = can.sizes.includes(defaults.size) ? defaults.size : can.sizes[0];
    $("steps").value = defaults.num_inference_steps;
    $("steps").max = limits.num_inference_steps;
    $("guidance").value = defaults.guidance_scale;
    $("strength").value = defaults.strength ?? 0.75;
    $("count").max = limits.n;
    const own = (defaults.sampler || "").replace(/(Discrete|Multistep|Singlestep)?Scheduler$/, "");
    const flows = (defaults.sampler || "").startsWith("Flow");
    const samplers = can.samplers.filter((each) => each.startsWith("flow_") === flows && !each.endsWith("_inverse"));
    $("sampler").replaceChildren(new Option(`The model's own${own ? ` (${own})` : ""}`, ""), ...samplers.map((each) => new Option(each, each)));
    $("start").hidden = !can.tasks.some((task) => task !== "text-to-image");
    this.#spacings();
    this.#size();
    this.keep();
  }

  /** Return the width and height in pixels that are drawn. */
  size() {
    const text = $("size").value === CUSTOM ? `${$("width").value}x${$("height").value}` : $("size").value;
    const sides = text.split("x").map(Number);
    return sides.every((side) => Number.isInteger(side) && side > 0 && side <= 8192) ? sides : this.can.defaults.size.split("x").map(Number);
  }

  /** Take the size most like a picture's shape, where the model draws any one with as many pixels as its own has. */
  shape(width, height) {
    const { sizes, defaults } = this.can;
    const unlike = (size) => { const [w, h] = size.split("x"); return Math.abs(Math.log((w * height) / (h * width))); };
    const nearest = [$("size").value, ...sizes].filter((size) => size !== CUSTOM).sort((a, b) => unlike(a) - unlike(b))[0];
    if (unlike(nearest) < 0.03 || !this.can.other_sizes) { this.#resize(nearest); return; }
    const [w, h] = (sizes.includes(defaults.size) ? defaults.size : sizes[0]).split("x").map(Number);
    const multiple = this.can.size_multiple;
    const scale = Math.sqrt((w * h) / (width * height));
    const [x, y] = [width, height].map((side) => Math.max(multiple, Math.round((side * scale) / multiple) * multiple));
    this.#resize(`${x}x${y}`);
  }

  /** Return the fields of a request, or throw a text and its control for what no request can hold. */
  read() {
    const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));
    const values = {
      model: $("model").value,
      prompt: $("prompt").value.trim(),
      negative_prompt: $("negative").value.trim() || undefined,
      n: number("count") ?? 1,
      size: $("size").value === CUSTOM ? `${$("width").value}x${$("height").value}` : $("size").value,
      num_inference_steps: number("steps"),
      guidance_scale: number("guidance"),
      sampler: [$("sampler").value, $("spacing").value].filter(Boolean).join("_") || undefined,
      seed: $("seed").value.trim() || undefined,
      partial_images: $("previews").checked ? Math.min(3, this.can.limits.partial_images) : 0,
      strength: number("strength"),
    };
    if (!values.prompt) throw { text: "Write a prompt first.", control: $("prompt") };
    if (values.seed !== undefined) {
      if (!/^\d+$/.test(values.seed) || !Number.isSafeInteger(Number(values.seed))) {
        throw { text: `The seed is a whole number from 0 to ${Number.MAX_SAFE_INTEGER}, or nothing.`, control: $("seed") };
      }
      values.seed = Number(values.seed);
    }
    return values;
  }

  /** Take the values of a request into the controls; those that are not there stay. */
  write(values) {
    for (const id of TYPED) if (values[id] !== undefined) $(id).value = values[id];
    if (values.sampler !== undefined && [...$("sampler").options].some((each) => each.value === values.sampler)) {
      $("sampler").value = values.sampler;
      this.#spacings(values.spacing);
    }
    if (values.previews !== undefined) $("previews").checked = values.previews;
    if (values.size) this.#resize(values.size === CUSTOM ? `${values.width}x${values.height}` : values.size);
    this.keep();
  }

  /** Take what a picture was drawn with. */
  async again(facts) {
    if (this.models.has(facts.model) && facts.model !== $("model").value) await this.choose(facts.model);
    const [sampler, spacing] = this.#parts(facts.sampler || "");
    this.write({
      prompt: facts.prompt, negative: facts.negative_prompt || "", steps: facts.num_inference_steps, seed: facts.seed,
      guidance: facts.guidance_scale, size: facts.size, sampler, spacing, count: 1,
      ...(facts.strength === undefined ? {} : { strength: facts.strength }),
    });
  }

  /** Keep what the controls hold for when the page is loaded again, and let everything follow them. */
  keep() {
    const values = Object.fromEntries([...TYPED, ...CHOSEN].map((id) => [id, $(id).value]));
    tab.set("form", { ...values, previews: $("previews").checked });
    for (const slide of document.querySelectorAll("[data-for]")) slide.value = $(slide.dataset.for).value;
    for (const id of ["prompt", "negative"]) grow($(id));
    const [width, height] = this.can ? this.size() : ["", ""];
    $("summary").textContent = `${width} × ${height}, ${$("steps").value} steps, guidance ${$("guidance").value}`;
  }

  /** Return the control that an error's field is about. */
  control(param) {
    if (param === "size" && !$("custom").hidden) return $("width");
    return $(CONTROLS[param]) || null;
  }

  /** Return an error's text with the name of its field as it is called here. */
  named(text, param) {
    const label = document.querySelector(`label[for="${CONTROLS[param]}"]`)?.textContent;
    return label && text.toLowerCase().startsWith(param) ? label + text.slice(param.length) : text;
  }

  #parts(sampler) {
    const spacing = Object.keys(SPACINGS).find((each) => sampler.endsWith(`_${each}`));
    return spacing ? [sampler.slice(0, -spacing.length - 1), spacing] : [this.can.samplers.includes(sampler) ? sampler : "", ""];
  }

  #spacings(chosen = "") {
    const there = (this.can.spacings || {})[$("sampler").value] || [];
    $("spacing").replaceChildren(new Option("Its own", ""), ...there.map((each) => new Option(SPACINGS[each] || each, each)));
    $("spacing").disabled = !there.length;
    $("spacing").value = there.includes(chosen) ? chosen : "";
  }

  #resize(size) {
    const known = [...$("size").options].some((each) => each.value === size);
    if (!known && !this.can.other_sizes) return;
    $("size").value = known ? size : CUSTOM;
    if (!known) [$("width").value, $("height").value] = size.split("x");
    this.#size();
  }

  #size() {
    $("custom").hidden = $("size").value !== CUSTOM;
    this.sized();
  }
}

/** Make a text's field as high as the text, where the browser does not do so by itself. */
function grow(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** Return what a picture was drawn with as pairs of words. */
export function factsOf(picture) {
  const facts = picture.facts;
  const seconds = facts.seconds ? `${facts.seconds.toFixed(1)} s` : undefined;
  const listed = {
    Model: facts.model, Size: facts.size?.replace("x", " × "), Seed: facts.seed, Steps: facts.num_inference_steps,
    Guidance: facts.guidance_scale, Sampler: facts.sampler?.replace(/Scheduler$/, ""), "Negative prompt": facts.negative_prompt, Strength: facts.strength,
    Took: seconds, Note: facts.warnings?.join(" "),
  };
  return Object.entries(listed).filter(([, value]) => value !== undefined && value !== null && value !== "")
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]);
}
