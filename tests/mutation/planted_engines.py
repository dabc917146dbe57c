"""Faults of the engines, on any device, that must make a test fail; see `planted`."""

from __future__ import annotations

CPU = "engines/onnxruntime/cpu.py"
BUILDER = "engines/tensorrt/builder.py"
CACHE = "engines/cache.py"
FILES = "engines/files.py"
HOST = "engines/host.py"
RECORDS = "engines/bundle/records.py"
SELFCHECK = "engines/selfcheck.py"
RUNS = "engines/bundle/runs.py"

ENGINES: list[tuple[str, str, str, str]] = [
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
    # what is closed
    (
        "session engine closes nothing",
        "engines/onnxruntime/session.py",
        "        self._session = None\n",
        "        pass\n",
    ),
    ("host tensor closes nothing", HOST, "            self._device._bytes -= self.nbytes\n", ""),
    # a request
    ("guidance from one on", "engines/bundle/records.py", "scale <= self.above", "scale < self.above"),
    # what a request becomes
    ("guidance without negative prompt", RECORDS, "(self.needs_negative and not negative_given)", "False"),
    (
        "guidance never off",
        RECORDS,
        "self.above is None or scale <= self.above",
        "self.above is not None and scale <= self.above",
    ),
    ("guidance by the scale alone", RECORDS, "branch.constant + branch.scale * scale", "branch.scale * scale"),
    (
        "begin and end take no room",
        RECORDS,
        "max(0, length - (self.bos_id is not None) - (self.eos_id is not None))",
        "length",
    ),
    ("unknown fields accepted", RECORDS, 'extra="forbid"', 'extra="ignore"'),
    (
        "lengths in any order",
        RECORDS,
        "        if list(self.lengths) != sorted({n for n in self.lengths if n < self.max_length}):",
        "        if False:",
    ),
    # the check of new engines
    ("NaN passes the check", SELFCHECK, "        if not error <= bound:", "        if error > bound:"),
    ("not finite passes the check", SELFCHECK, "        if not np.isfinite(values).all():", "        if False:"),
    (
        "bound of bf16 for all",
        SELFCHECK,
        'bound = max(BOUND[graph.precision or "fp32"], BOUND[self.computes])',
        'bound = BOUND["bf16"]',
    ),
    ("wrong engine left open", SELFCHECK, "        engine.close()\n        raise", "        raise"),
    (
        "passed on one device, passed on all",
        SELFCHECK,
        "graph.name, dict(place.facts), place.bound",
        "graph.name, place.bound",
    ),
    ("check passed for other rows", SELFCHECK, "place.bound(graph), rows]", "place.bound(graph)]"),
    (
        "only the first output checked",
        SELFCHECK,
        "    for spec in graph.outputs:\n        values, origin",
        "    for spec in graph.outputs[:1]:\n        values, origin",
    ),
    ("engine checked at its smallest alone", RUNS, "for shapes in ranges)", "for shapes in ranges[:1])"),
    ("largest batch never checked", RUNS, "BATCHES = (1, 4)", "BATCHES = (1, 1)"),
    # the host
    (
        "host writes what was captured anew",
        HOST,
        "values = array.copy() if queue.capturing else array",
        "values = array",
    ),
    ("host reads a view", HOST, "        return self.array.copy()", "        return self.array"),
    ("resident memory in pages", HOST, " * mmap.PAGESIZE", ""),
    # files and the cache
    ("mode of files ignored", FILES, "    path.chmod(mode & ~UMASK)\n", ""),
    ("leftovers of living processes removed", FILES, "            if not held:\n                return\n", ""),
    ("folder that was replaced not put back", FILES, "                old.rename(target)\n", "                pass\n"),
    ("existing file replaced", FILES, "            os.link(source, target)\n", "            source.replace(target)\n"),
    (
        "built twice by two processes",
        CACHE,
        "                if found := self.find(name, key):  # built",
        "                if found := None:  # built",
    ),
    (
        "engine removed while it is built",
        CACHE,
        "self._lock(folder.name, wait=False) as held:\n            if held:\n                shutil.rmtree(leaving",
        "self._lock(folder.name, wait=False) as held:\n            if True:\n                shutil.rmtree(leaving",
    ),
    ("engine left writable by a group", CACHE, "                    _protect(working)\n", ""),
    ("damaged file never hashed again", CACHE, "        if known and not always:", "        if not always:"),
]
