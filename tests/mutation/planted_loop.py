"""Faults of the loop and of what it shares that must make a test fail; see `planted`."""

from __future__ import annotations

SESSION = "runtime/loop/session.py"
WORKSPACE = "runtime/loop/workspace.py"
DENOISE = "runtime/loop/denoise.py"
INPUTS = "runtime/loop/inputs.py"
SLOTS = "runtime/batcher/slots.py"

LOOP: list[tuple[str, str, str, str]] = [
    # what is closed
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
        "model input not replaced",
        DENOISE,
        '        state["model_input"].write(rows.astype(state["model_input"].dtype), stream)',
        "        pass",
    ),
    (
        "stale tables",
        DENOISE,
        "            elif self._unchanged.get(name) is not array:",
        "            elif name not in self._unchanged:",
    ),
    ("replayed the wrong way round", DENOISE, "self._enqueue_step(index % 2, self", "self._enqueue_step(0, self"),
    (
        "masked picture draws no noise",
        INPUTS,
        "            masked[i] = generator.randn(shape)  # diffusers does",
        "            masked[i] = 0.0  # diffusers does",
    ),
    ("picture's deviation dropped", INPUTS, "initial.std[which] * draws.encoder", "0 * draws.encoder"),
    (
        "one noise for all images",
        INPUTS,
        "        generators.start(generator, source)\n        if encoder",
        "        generators.start(generator, sources[0])\n        if encoder",
    ),
    # pictures
    ("low memory keeps engines", WORKSPACE, "        self._release(stage)\n", ""),
    ("memory budget ignored", SESSION, "device.bytes_taken() > self._budget", "False"),
    # callbacks
    (
        "budget of a session in the default",
        SESSION,
        "default_budget(backend) if memory_budget is None else memory_budget",
        "default_budget(backend)",
    ),
    ("preview over the running step", WORKSPACE, "free = self.loop.steps_done + 1", "free = self.loop.steps_done"),
    (
        "failure keeps engines of a stage",
        WORKSPACE,
        "                    self._let_go(stage, stream)\n            raise",
        "                    pass\n            raise",
    ),
    ("session closes before its fork", SESSION, "        if os.getpid() != self._process:\n            return\n", ""),
    (
        "used workspace let go of first",
        SESSION,
        "            self._workspaces.move_to_end(key)\n",
        "            pass\n",
    ),
    (
        "least recently used stays",
        SESSION,
        "            self._workspaces.popitem(last=False)[1].close()\n            self.evictions",
        "            self._workspaces.popitem()[1].close()\n            self.evictions",
    ),
    (
        "bound graphs leak",
        "runtime/loop/shared.py",
        "            for key in [key for key in self._bound if key not in used]:",
        "            for key in []:",
    ),
    ("generator of the caller left behind", "runtime/loop/generators.py", "    source.set_state(state)\n", ""),
    ("tables of another picture", INPUTS, "which = images % len(initial.mean)", "which = images * 0"),
    # slots
    ("step of fewer slots than are in use", SLOTS, "needed = 1 + max(self._taken) if", "needed = len(self._taken) if"),
    ("shapes of a warm-up go", SESSION, "math.inf if self._keepers else self.kept - room", "self.kept - room"),
]
