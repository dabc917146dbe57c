"""Faults of the runtime around the loop that must make a test fail; see `planted`."""

from __future__ import annotations

PIPELINE = "runtime/pipeline.py"
REQUEST = "runtime/request.py"
LOAD = "runtime/pictures/load.py"
SIZES = "runtime/sizes.py"
FINITE = "runtime/finite.py"
CALLBACKS = "runtime/callbacks.py"
DRAWING = "runtime/drawing.py"
DECODING = "runtime/loop/decoding.py"
ARGUMENTS = "runtime/arguments.py"
NUMBERS = "runtime/prompt/numbers.py"
EMBEDDINGS = "runtime/prompt/embeddings.py"
TABLE = "runtime/sampling/step_table.py"
PACK = "runtime/loop/pack.py"

RUNTIME: list[tuple[str, str, str, str]] = [
    # what is closed
    ("pipeline closes nothing", PIPELINE, "        self.session.close()\n", "        pass\n"),
    # a request
    (
        "default steps ignored",
        REQUEST,
        "self.num_inference_steps or manifest.default_num_inference_steps",
        "self.num_inference_steps or 50",
    ),
    (
        "default guidance ignored",
        REQUEST,
        "manifest.default_guidance_scale if self.guidance_scale is None",
        "7.5 if self.guidance_scale is None",
    ),
    (
        "default size ignored",
        REQUEST,
        "width, height = manifest.latent.default_width, manifest.latent.default_height",
        "width, height = 512, 512",
    ),
    ("seeds of a batch alike", REQUEST, "(self.seed + i) % (MAX_SEED + 1)", "self.seed"),
    ("pixel budget of requests ignored", SIZES, "    if width * height > MAX_PIXELS:", "    if False:"),
    ("eta dropped", DRAWING, ', "eta": request.eta}', "}"),
    ("strength dropped", DRAWING, ', "strength": request.strength', ""),
    ("eta dropped in silence", "runtime/call.py", "        if request.eta and not takes_eta:", "        if False:"),
    ("latents not checked for NaN", FINITE, "    if not np.isfinite(latents).all():", "    if False:"),
    ("pixels not checked for NaN", FINITE, "    if not np.isfinite(pixels).all():", "    if False:"),
    ("on_batch pictures kept", PIPELINE, "                if keep_images:\n", "                if True:\n"),
    (
        "negative prompts last",
        "runtime/prompt/tokenizer.py",
        "for text in (*negatives, *prompts)]",
        "for text in (*prompts, *negatives)]",
    ),
    (
        "latents replaced without scale",
        CALLBACKS,
        "            scale = float(table.input_scales[min(index + 1, len(table) - 1)])",
        "            scale = 1.0",
    ),
    (
        "replaced latents not checked",
        CALLBACKS,
        "    if latents.shape != shape or not np.isfinite(latents).all():",
        "    if latents.shape != shape:",
    ),
    # pictures
    ("EXIF ignored", LOAD, "ImageOps.exif_transpose(image)", "image"),
    (
        "pixel budget of pictures ignored",
        LOAD,
        "            if image.width * image.height > MAX_PIXELS:",
        "            if False:",
    ),
    ("16 bits clipped", LOAD, "(values / 257).round()", "values.clip(0, 255)"),
    (
        "mask at cell centres",
        LOAD,
        "[:, ::downscale, ::downscale]",
        "[:, downscale // 2 :: downscale, downscale // 2 :: downscale]",
    ),
    ("mask from any white", LOAD, "/ 255 >= 0.5", "/ 255 > 0"),
    # arguments of diffusers
    (
        "argument refused in silence",
        ARGUMENTS,
        '            raise RequestError(f"{name} is not supported: {argument.meaning}")',
        "            pass",
    ),
    (
        "any value that equals an idle one",
        ARGUMENTS,
        "value is idle or (isinstance(value, type(idle)) and value == idle)",
        "value == idle",
    ),
    ("argument that nothing reads taken", ARGUMENTS, "        if not _reads(manifest, name):", "        if False:"),
    (
        "misspelt argument taken",
        ARGUMENTS,
        "        if argument is None:\n",
        "        if argument is None:\n            continue\n        if False:\n",
    ),
    ("None of some families refused", ARGUMENTS, " and value is not None}", "}"),
    ("other tensors for callbacks", ARGUMENTS, "        if name not in STEP_TENSORS:", "        if False:"),
    # numbers that graphs read
    (
        "width and height swapped",
        NUMBERS,
        "size = (request.height or 0, request.width or 0)",
        "size = (request.width or 0, request.height or 0)",
    ),
    (
        "negative numbers of the prompt",
        NUMBERS,
        "(info.values if info.negative is None else info.negative, negative)",
        "(info.values, negative)",
    ),
    (
        "numbers of the prompt first",
        NUMBERS,
        ", negative), (info.values, positive))",
        ", negative), (info.values, positive))[::-1]",
    ),
    (
        "one negative size is enough",
        NUMBERS,
        "request.negative_original_size is not None and",
        "request.negative_original_size is not None or",
    ),
    (
        "crop of the negative prompt dropped",
        NUMBERS,
        '"crop": request.negative_crops_coords_top_left',
        '"crop": request.crops_coords_top_left',
    ),
    (
        "original size is the target's",
        NUMBERS,
        '"original": request.original_size or size',
        '"original": request.target_size or size',
    ),
    # embeddings
    (
        "embeddings of the first prompt for all",
        EMBEDDINGS,
        "first + count - 1) // self.images_per_prompt",
        "first + count - 1) * 0",
    ),
    (
        "embeddings of the prompt first",
        EMBEDDINGS,
        "sides = (self.negative, self.prompt) if self.negative else",
        "sides = (self.prompt, self.negative) if self.negative else",
    ),
    (
        "negative prompt encoded as a prompt",
        EMBEDDINGS,
        "self.negative or _encoded(negatives, encode, True)",
        "self.negative or _encoded(negatives, encode, False)",
    ),
    ("embeddings of other widths taken", EMBEDDINGS, "    if not fits or any(", "    if not fits and any("),
    ("embeddings not checked for NaN", EMBEDDINGS, "    if not np.isfinite(array).all():", "    if False:"),
    ("pooled embeddings left out", EMBEDDINGS, "    if found and len(found) < len(names):", "    if False:"),
    # tables
    (
        "clip of one row for all",
        TABLE,
        "        self._clip = (self.zero, 0.0)\n",
        "",
    ),
    ("table divides by zero in silence", TABLE, "        if not all(\n", "        if False and not all(\n"),
    ("finished image goes on", PACK, "        next_rows[hold] = hold\n", ""),
    (
        "guidance of the first image for all",
        PACK,
        "branch_weights(table, mix, branches)\n        parts",
        "branch_weights(table, mixes[0], branches)\n        parts",
    ),
    (
        "first noise of several",
        PACK,
        "np.maximum(np.cumsum(table.draws) - 1, 0)",
        "np.maximum(np.cumsum(table.draws) - table.draws, 0)",
    ),
    (
        "network rows image-major",
        PACK,
        "np.tile(np.arange(images), branches)",
        "np.repeat(np.arange(images), branches)",
    ),
    ("cut without its last state", TABLE, "original=self.original[: rows + 1]", "original=self.original"),
    # callbacks
    ("scale of the step before", CALLBACKS, "min(index + 1, len(table) - 1)", "min(index, len(table) - 1)"),
    ("stop unheard", CALLBACKS, "        return listeners.stopped()", "        return False"),
    ("callback sees padding", CALLBACKS, "batch, latents = len(latents), latents[:images]", "batch = len(latents)"),
    ("older callback before replacement", CALLBACKS, "                    latents = replaced\n", ""),
    (
        "other values replaced in silence",
        CALLBACKS,
        "    if others := [name for name in returned if name not in STEP_TENSORS]:",
        "    if others := []:",
    ),
    (
        "steps counted from none",
        CALLBACKS,
        'listeners.progress("denoising", index + 1, len(table))',
        'listeners.progress("denoising", index, len(table))',
    ),
    ("stop of the last request ends the next", PIPELINE, "len(table), False\n", "len(table), self._interrupt\n"),
    ("guidance changed in silence", DRAWING, "        if self._guidance_scale != before:", "        if False:"),
    ("tiles without ramps", DECODING, "np.square(np.sin(np.pi / 2 * position))", "np.round(position)"),
    ("tiles that share too little", DECODING, "OVERLAP, RAMP = 1 / 4, 1 / 8", "OVERLAP, RAMP = 1 / 64, 1 / 64"),
    ("tiny decoder never", DECODING, '"tiny": "tiny_decoder"', '"tiny": "decoder"'),
    ("padding drawn", DRAWING, "output = last.read(stream)[: len(batch.images)]", "output = last.read(stream)"),
    (
        "latents before the last step",
        DRAWING,
        "workspace.loop.latents(trace.steps)\n",
        "workspace.loop.latents(trace.steps + 1)\n",
    ),
]
