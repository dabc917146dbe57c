"""Faults that must make a test fail: for each a name, a path, what stands there, and what it becomes."""

from __future__ import annotations

CPU, CUDA = "engines/onnxruntime/cpu.py", "engines/onnxruntime/cuda.py"
PLAN, BUILDER, ENGINE = "engines/tensorrt/plan.py", "engines/tensorrt/builder.py", "engines/tensorrt/engine.py"
CACHE, FILES, HOST, RELEASE = "engines/cache.py", "engines/files.py", "engines/host.py", "engines/cuda/release.py"
PIPELINE, SESSION, WORKSPACE = "runtime/pipeline.py", "runtime/loop/session.py", "runtime/loop/workspace.py"
DENOISE, INPUTS, REQUEST = "runtime/loop/denoise.py", "runtime/loop/inputs.py", "runtime/request.py"
LOAD, CALLBACKS, SIZES, FINITE = (
    "runtime/pictures/load.py",
    "runtime/callbacks.py",
    "runtime/sizes.py",
    "runtime/finite.py",
)

PLANTED: list[tuple[str, str, str, str]] = [
    # what an engine is kept under
    ("cache key without processor", CPU, '            "cpu": processor_identity(),\n', ""),
    (
        "cache key without version",
        CPU,
        '            "onnxruntime": onnxruntime.__version__,\n            "cpu"',
        '            "cpu"',
    ),
    ("cache key without builder", CPU, '            "builder": BUILDER,\n', ""),
    ("cache key without graph", CPU, '            "graph": bundle.digest(graph),\n', ""),
    ("plan key without version", PLAN, '        "version": version,\n', ""),
    ("plan key without builder", PLAN, '        "builder": BUILDER,\n', ""),
    ("plan key without target", PLAN, '        "target": dict(target),\n', ""),
    ("plan key without options", PLAN, '        "options": asdict(options),\n', ""),
    (
        "sidecar ignored",
        CACHE,
        '        if sidecar is None or sidecar.get("key") != _plain(key):',
        "        if sidecar is None:",
    ),
    ("damage ignored", CACHE, "        if problem := _damage(folder, sidecar):", "        if problem := None:"),
    ("others' cache trusted", CACHE, "        check_trusted(self.root, folder)\n        sidecar", "        sidecar"),
    ("engine lock not taken", CACHE, "            with self._lock(entry):\n", "            if True:\n"),
    # files
    ("temporary name predictable", FILES, "{secrets.token_hex(4)}", "{os.getpid():08x}"),
    (
        "file not flushed",
        FILES,
        "        file.flush()\n        os.fsync(file.fileno())\n    path.chmod",
        "        file.flush()\n    path.chmod",
    ),
    ("folder not flushed", FILES, "            os.fsync(handle)\n", "            pass\n"),
    ("lock not waited for", FILES, "timeout=-1 if wait else 0", "timeout=0"),
    # bundles
    (
        "hash not checked",
        "engines/bundle/reader.py",
        "            if sha256_of(path) != info.sha256:",
        "            if False:",
    ),
    ("size not checked", "engines/bundle/reader.py", "!= info.size:", "< 0:"),
    (
        "external data location not checked",
        "engines/onnx_graph.py",
        "        if place is not None and place not in beside:",
        "        if False:",
    ),
    (
        "paths may leave the bundle",
        "engines/bundle/manifest.py",
        "            if outside or not path.parts:",
        "            if not path.parts:",
    ),
    # the processor
    (
        "quota of cpu.max ignored",
        "engines/machine.py",
        'quota, _, period = _text(group / "cpu.max").partition(" ")',
        'quota, _, period = "", "", ""',
    ),
    (
        "quota of version 1 ignored",
        "engines/machine.py",
        'quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")',
        "return None",
    ),
    ("hyperthreads counted", "engines/machine.py", "    return text or str(number)", "    return str(number)"),
    # TensorRT
    (
        "scratch too small by half",
        ENGINE,
        "loaded.arena.block(self._scratch)",
        "loaded.arena.block(self._scratch // 2)",
    ),
    ("scratch not announced", ENGINE, "        loaded.arena.reserve(self._scratch)\n", ""),
    (
        "kernels never saved",
        ENGINE,
        "        if first:\n            loaded.save_kernels()",
        "        if False:\n            loaded.save_kernels()",
    ),
    ("kernels never loaded", ENGINE, "        if self._kernels_file.is_file():", "        if False:"),
    (
        "foreign timing cache",
        BUILDER,
        "    if not config.set_timing_cache(timings, False):",
        "    if not config.set_timing_cache(timings, True):",
    ),
    (
        "timing cache of all targets",
        "engines/tensorrt/planner.py",
        "timings-{self.library.version}-{self._name()}.cache",
        "timings.cache",
    ),
    ("timings never saved", BUILDER, "    if timings is not None and timing_cache is not None:", "    if False:"),
    ("graphs not strongly typed", BUILDER, "0 if strongly_typed is None else 1 << int(strongly_typed)", "0"),
    (
        "TF32 inverted in plans",
        BUILDER,
        "config.set_flag(tf32) if options.tf32 else config.clear_flag(tf32)",
        "config.clear_flag(tf32) if options.tf32 else config.set_flag(tf32)",
    ),
    (
        "weight streaming flag inverted",
        BUILDER,
        "    if options.weight_streaming:\n",
        "    if not options.weight_streaming:\n",
    ),
    ("attention may fail a build", BUILDER, "            layer.attention.decomposable = True\n", "            pass\n"),
    ("plan closed never", ENGINE, "        self.device.release(lambda _: _let_go(held))\n", ""),
    (
        "binding closes nothing",
        ENGINE,
        "        if held := self._free.detach():\n            _free(*held[2])\n\n\ndef _free",
        "        self._free.detach()\n\n\ndef _free",
    ),
    ("TF32 inverted in sessions", CUDA, '"1" if tf32 else "0"', '"0" if tf32 else "1"'),
    (
        "graphs inverted in sessions",
        CUDA,
        '"enable_cuda_graph": "1" if graphs == "onnxruntime" else "0"',
        '"enable_cuda_graph": "0" if graphs == "onnxruntime" else "1"',
    ),
    (
        "runs wait for the GPU",
        CUDA,
        'options.add_run_config_entry("disable_synchronize_execution_providers", "1")',
        "pass",
    ),
    ("runs not behind the caller's stream", CUDA, "        self._stream.follow(queue)\n", ""),
    ("callers not behind the run", CUDA, "            queue.follow(self._stream)", "            pass"),
    # what is closed
    (
        "session engine closes nothing",
        "engines/onnxruntime/session.py",
        "        self._session = None\n",
        "        pass\n",
    ),
    ("host tensor closes nothing", HOST, "            self._device._bytes -= self.nbytes\n", ""),
    ("stream closes nothing", "engines/cuda/stream.py", "        self._context.drop_stream(self.handle)\n", ""),
    (
        "graph closes nothing",
        "engines/cuda/graph.py",
        "            self._context.release(lambda driver: driver.cuGraphExecDestroy(handle))",
        "            pass",
    ),
    (
        "tensor closes nothing",
        "engines/cuda/memory.py",
        "            self._context.release(lambda driver: driver.cuMemFree(pointer))",
        "            pass",
    ),
    ("context closes nothing", "engines/cuda/context.py", "        driver.cuDevicePrimaryCtxRelease(self._gpu)\n", ""),
    (
        "workspace closes nothing",
        WORKSPACE,
        '        """Free all memory; calling it again does nothing."""\n        self._memory.close()',
        '        """Free all memory; calling it again does nothing."""',
    ),
    ("session closes no engines", SESSION, "                closing.callback(self._shared.close)\n", ""),
    ("session closes no stream", SESSION, "                closing.callback(self.stream.close)\n", ""),
    (
        "session closes no workspaces",
        SESSION,
        "                    closing.callback(self._workspaces.popitem()[1].close)",
        "                    self._workspaces.popitem()",
    ),
    ("pipeline closes nothing", PIPELINE, "        self.session.close()\n", "        pass\n"),
    (
        "freed before the work is done",
        RELEASE,
        "            for wait in waits:\n                wait()\n",
        "            pass\n",
    ),
    (
        "freed during a capture",
        RELEASE,
        "            if self._captures or not self._waiting:",
        "            if not self._waiting:",
    ),
    # turns
    (
        "backend lock not taken",
        SESSION,
        "        with self.backend.lock:\n            if self._closed:",
        "        if True:\n            if self._closed:",
    ),
    (
        "nested request allowed",
        SESSION,
        '            if self._busy:\n                raise RequestError(\n                    "a callback asked',
        '            if False:\n                raise RequestError(\n                    "a callback asked',
    ),
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
    ("guidance from one on", "engines/bundle/records.py", "scale <= self.above", "scale < self.above"),
    ("eta dropped", PIPELINE, ', "eta": request.eta}', "}"),
    ("strength dropped", PIPELINE, ', "strength": request.strength', ""),
    ("eta dropped in silence", "runtime/call.py", "        if request.eta and not takes_eta:", "        if False:"),
    ("latents not checked for NaN", FINITE, "    if not np.isfinite(latents).all():", "    if False:"),
    ("pixels not checked for NaN", FINITE, "        if not np.isfinite(pixels).all():", "        if False:"),
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
        "model input not replaced",
        DENOISE,
        '        state["model_input"].write(rows.astype(state["model_input"].dtype), stream)',
        "        pass",
    ),
    (
        "replaced latents not checked",
        CALLBACKS,
        "    if latents.shape != shape or not np.isfinite(latents).all():",
        "    if latents.shape != shape:",
    ),
    (
        "stale tables",
        DENOISE,
        "            elif self._unchanged.get(name) is not array:",
        "            elif name not in self._unchanged:",
    ),
    ("replayed the wrong way round", DENOISE, "partial(self._enqueue_step, 1))]", "partial(self._enqueue_step, 0))]"),
    (
        "masked picture draws no noise",
        INPUTS,
        "            generator.randn(shape)  # diffusers also",
        "            pass  # diffusers also",
    ),
    ("picture's deviation dropped", INPUTS, "initial.std[which] * draws.encoder", "0 * draws.encoder"),
    (
        "one noise for all images",
        INPUTS,
        "        generators.start(generator, source)\n        if encoder",
        "        generators.start(generator, sources[0])\n        if encoder",
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
        "binary[None, ::downscale, ::downscale]",
        "binary[None, downscale // 2 :: downscale, downscale // 2 :: downscale]",
    ),
    ("mask from any white", LOAD, "/ 255 >= 0.5", "/ 255 > 0"),
    ("low memory keeps engines", WORKSPACE, "        self._release(stage)\n", ""),
    ("memory budget ignored", SESSION, "device.bytes_taken() > self._budget", "False"),
]
