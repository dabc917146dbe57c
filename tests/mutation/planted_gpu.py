"""Faults of what runs on a GPU that must make a test fail; see `planted`."""

from __future__ import annotations

CUDA = "engines/onnxruntime/cuda.py"
PLAN = "engines/tensorrt/plan.py"
BUILDER = "engines/tensorrt/builder.py"
ENGINE = "engines/tensorrt/engine.py"
CHILD = "engines/tensorrt/child.py"
WORKER = "engines/tensorrt/worker.py"
PLANNER = "engines/tensorrt/planner.py"
RELEASE = "engines/cuda/release.py"

GPU: list[tuple[str, str, str, str]] = [
    # what an engine is kept under
    ("plan key without version", PLAN, '        "version": version,\n', ""),
    ("plan key without builder", PLAN, '        "builder": BUILDER,\n', ""),
    ("plan key without target", PLAN, '        "target": dict(target),\n', ""),
    ("plan key without options", PLAN, '        "options": asdict(options),\n', ""),
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
    # the child that builds plans
    ("child of another GPU taken", CHILD, "if each.use == (backend, gpu)]", "if each.use[0] == backend]"),
    (
        "child kept after a failure",
        CHILD,
        "        child.close()\n        if timing_cache",
        "        _keep(child)\n        if timing_cache",
    ),
    (
        "dead child taken",
        CHILD,
        "            if child.is_alive():\n                return child\n            child.close()",
        "            return child",
    ),
    ("timer of a taken child runs on", CHILD, "                child.timer.cancel()\n", "                pass\n"),
    ("child in the parent's session", CHILD, "                start_new_session=True,\n", ""),
    ("child without the parent's path", CHILD, ", *map(str, sys.path)]", "]"),
    ("timings of a killed child left", CHILD, "                sweep(timing_cache)  #", "                pass  #"),
    ("error of a child loses its kind", CHILD, "    kind = getattr(errors, name)\n", "    kind = EngineError\n"),
    (
        "full disk of a child becomes another error",
        CHILD,
        '        return OSError(answer["errno"], message)',
        "        return OSError(message)",
    ),
    (
        "crash of a child told as an exit",
        CHILD,
        'how = f"crashed ({signal.Signals(-code).name})" if code < 0 else',
        "how =",
    ),
    ("child lives as long as its parent", CHILD, "    timer.start()\n", "    pass\n"),
    (
        "children of the parent used after a fork",
        CHILD,
        "    os.register_at_fork(after_in_child=_idle.clear)",
        "    pass",
    ),
    ("other version built without a word", WORKER, '    if library.version != request["version"]:', "    if False:"),
    ("profile without options", WORKER, 'PlanOptions(**request["options"])', "PlanOptions()"),
    ("child builds on no GPU", WORKER, "activate=None if gpu is None else _context(gpu).activate", "activate=None"),
    ("child builds on the first GPU", WORKER, "_context(gpu).activate", "_context(0).activate"),
    (
        "child without a timing cache",
        WORKER,
        "timing_cache=None if timing_cache is None else Path(timing_cache)",
        "timing_cache=None",
    ),
    ("child's library may print answers", WORKER, "    os.dup2(2, 1)\n", ""),
    ("child outlives its parent", WORKER, "        requests.put(line)\n    os._exit(0)", "        requests.put(line)"),
    ("child leaves a core", WORKER, "    _leave_no_core()\n", ""),
    ("child logs nothing", WORKER, '    logging.getLogger("latentrt").addHandler(_Forward(answer))\n', ""),
    ("child logs all or nothing", WORKER, '    logging.getLogger("latentrt").setLevel(request["log_level"])\n', ""),
    ("plan of the wrong tensors taken", PLANNER, '            check_tensors(graph, facts["tensors"])\n', ""),
    ("driver not part of the target", PLANNER, ', "driver": device.driver_version}', "}"),
    # freeing on a GPU
    (
        "freed in spite of a capture that began",
        RELEASE,
        "            if self._captures:  # one began",
        "            if False:  # one began",
    ),
    ("captures not counted", RELEASE, "            self._captures += 1\n", "            pass\n"),
    (
        "kept for ever after a capture",
        RELEASE,
        "                self._captures -= 1\n            self._drain()",
        "                self._captures -= 1",
    ),
    ("first failure keeps the rest", RELEASE, "                failure = failure or error", "                raise"),
    ("failure of freeing swallowed", RELEASE, "            raise failure", "            pass"),
    (
        "wait failed, memory forgotten",
        RELEASE,
        "            with self.lock:\n                self._waiting[:0] = due\n            raise\n",
        "            raise\n",
    ),
    (
        "marks without the lock",
        RELEASE,
        "        with self.lock:  # no capture can begin",
        "        if True:  # no capture can begin",
    ),
    (
        "frees without the lock",
        RELEASE,
        "        with self.lock:\n            if self._captures:  # one",
        "        if True:\n            if self._captures:  # one",
    ),
    (
        "counts captures without the lock",
        RELEASE,
        "        with self.lock:\n            self._captures += 1",
        "        if True:\n            self._captures += 1",
    ),
    (
        "adds without the lock",
        RELEASE,
        "        with self.lock:\n            self._waiting.append",
        "        if True:\n            self._waiting.append",
    ),
    ("releases of a GPU made twice", RELEASE, "    with _lock:\n", "    if True:\n"),
]
