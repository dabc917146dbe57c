"""`latentrt bench serve` and `latentrt plan`, from the command line to records and tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from latentrt.benchmarks.report import page, records
from latentrt.benchmarks.report.serving_tables import serving_sections
from latentrt.benchmarks.serving import bench, load, process, real
from latentrt.benchmarks.serving.arrivals import Arrivals
from latentrt.benchmarks.serving.mixes import MIXES, Mix
from latentrt.benchmarks.serving.simulate import simulate
from latentrt.engines.errors import EngineError, RequestError
from latentrt.runtime import cli

SHORT = Mix(name="short", steps={2: 1, 4: 1}, guided=0.5)
QUICK = {"curve": "a100-sd15", "scale": 0.001}


def run(place: process.Place, **options: Any) -> list[records.Record]:
    kept: list[records.Record] = []
    given = {"mixes": [SHORT], "seconds": 1e-4, "command": "latentrt bench serve", **options}
    made = bench.run(place, bench.Options(**given), lambda line: None, kept.append)
    assert [*map(id, kept)] == [*map(id, made)]
    return made


def test_every_point_is_a_record_that_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr(bench, "SIMULATED", 100)
    monkeypatch.setattr(bench, "LEAST", 40)
    made = run(process.Place("in-flight", **QUICK), http=False, policies=bench.POLICIES[:3])
    assert [(record["policy"], record["point"], record.get("load")) for record in made] == [
        *((policy, "saturation", None) for policy in bench.POLICIES[:3]),
        *(
            (policy, point, share)
            for policy in bench.POLICIES[:3]
            for point, share in (("load", 0.7), ("load", 0.9), ("bounded", None))
        ),
    ]
    for record in made:
        said = {"name": "a100-sd15", "kind": "published", "scale": 0.001}
        assert record["conditions"]["device"] == "paced"
        assert {name: record["curve"][name] for name in said} == said
        assert record["engines"]["paced"] and record["over"] == "in process" and record["server"]["queue"] == 32
        assert record["mix"]["steps"] == {2: 1, 4: 1}
        for figures in (record["seen"], record["simulated"]):
            assert figures["requests"] == 40 and figures["counted"] == 36
    best = max(record["seen"]["images_per_second"] for record in made[1:3])
    assert [record["rate"] for record in made[3:5]] == pytest.approx([0.7 * best, 0.9 * best])
    text = page.text(made)
    assert "Serving: paced by the curve a100-sd15 (published), mix short" in text
    assert "Of these, steps of fewer than 2 rows are extrapolated, not published." in text
    assert "No engine ran" in text and "32 may wait" in text and "**in flight**" in text


def test_policies_take_turns_at_a_rate() -> None:
    pytest.importorskip("psutil")
    made = run(
        process.Place("in-flight", **QUICK),
        http=False,
        policies=bench.POLICIES[:2],
        points=(),
        rates=((0.5, None), (1.0, "in-flight")),
        seconds=0.12,
        turns=3,
        seed=5,
    )
    points = [("in-flight", 0.5), ("one at a time", 0.5), ("in-flight", 1.0)]
    assert [(r["policy"], r["rate"], r["turns"]) for r in made] == [(*point, 3) for point in points]
    for record in made:
        assert record["point"] == "load" and record["load"] is None and record["seed"] == 5
        for figures in (record["seen"], record["simulated"]):
            requests = {0.5: 3 * 20, 1.0: 3 * 40}[record["rate"]]
            assert (figures["requests"], figures["counted"]) == (requests, 0.9 * requests)
    parts = [
        simulate("in-flight", process.Place("in-flight", **QUICK).setup, SHORT, 1e3, requests=40, seed=seed)
        for seed in (5, 6, 7)
    ]
    latencies = [entry.latency for part in parts for entry in part.entries[4:]]
    assert made[2]["simulated"]["latency"]["p50"] == pytest.approx(
        1e3 * np.percentile(latencies, 50, method="inverted_cdf")
    )


@pytest.mark.parametrize(("given", "said"), [("", None), ("64X96", "64x96")])
def test_a_record_says_the_size_in_one_way(given: str, said: str | None) -> None:
    pytest.importorskip("psutil")
    place = process.Place("in-flight", **QUICK, size=given)
    made = run(place, http=False, policies=bench.POLICIES[:1], points=(), rates=((1.0, None),))
    assert [record["engines"]["size"] for record in made] == [said]


def test_rates_of_a_policy() -> None:
    assert bench.rate("1.5") == (1.5, None)
    assert bench.rate("one at a time=2") == (2.0, "one at a time")
    for bad in ("", "x", "0", "nan", "1e9", "in-flight=", "in-flight=-1"):
        with pytest.raises(RequestError, match=re.escape(f"--rate is {bad!r}: give a number above 0")):
            bench.rate(bad)
    with pytest.raises(RequestError, match="policy is 'static': choose in-flight"):
        bench.rate("static=1")


def test_a_rate_of_a_policy_that_is_left_out_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--rate is static equal=1\.5: --policy leaves static equal out"):
        bench.Options(mixes=[SHORT], policies=("in-flight",), points=(), rates=((1.5, "static equal"),))


def test_tables_hold_the_newest_of_each_point_apart_by_device() -> None:
    figures: dict[str, Any] = {"latency": {"p50": 1.0, "p90": 2.0, "p99": None}, "within_bound_share": 0.5}
    common: dict[str, Any] = {
        "kind": "serving",
        "date": "2026-11-29T12:00:00",
        "command": "latentrt bench serve",
        "machine": {
            "processor": "P",
            "cores": 2,
            "gpu": None,
            "memory_gib": 1,
            "system": "Linux",
        },
        "conditions": {"device": "paced", "threads": 2, "quiet": True},
        "curve": {"name": "c", "kind": "model", "title": "C", "scale": 1.0, "extrapolated": None},
        "mix": {"name": "m"},
        "over": "http",
        "server": {"slots": 4, "rows": 8, "queue": 32},
        "engines": {"paced": True, "bundle": "embedded", "backend": None},
        "bound": 8.0,
    }

    def saturated(policy: str, rate: float, **more: Any) -> records.Record:
        seen = {**figures, "images_per_second": rate}
        return {**common, "policy": policy, "point": "saturation", "seen": seen, "simulated": seen, **more}

    found = [saturated("one at a time", 9.0), saturated("one at a time", 2.0), saturated("in-flight", 3.0)]
    found.append({**common, "policy": "in-flight", "point": "load", "load": 0.9, "seen": figures, "simulated": figures})
    found.append({**found[-1], "load": None, "rate": 1.25})
    bounded = {"bounded_rate": 1.5, "simulated_bounded_rate": 1.6}
    again = {"command": "latentrt bench serve --point bounded"}
    found.append({**found[-1], "point": "bounded", "load": None, **bounded, **again})
    found.append(saturated("in-flight", 3.0, engines={"paced": False, "bundle": "b", "backend": "x"}))
    on_cpu = {"engines": {"paced": False, "bundle": "b", "backend": "x", "size": "64x96"}}
    for threads in (1, 2):
        state = {"device": "cpu", "threads": threads, "quiet": True}
        found.append(saturated("in-flight", 3.0, conditions=state, **on_cpu))
    first, second, *others = serving_sections(found)
    assert [each.title for each in others] == [
        "Serving: b at 64×96 on x, 1 thread, mix m",
        "Serving: b at 64×96 on x, 2 threads, mix m",
    ]
    assert first.tables[0].rows == [
        ["one at a time", "2 (2)", "1.00", *["–"] * 7],
        ["**in flight**", "3 (3)", "1.50", *["–"] * 3, "1 (1)", "refused (refused)", "50% (50%)", "1.5 (1.6)"],
    ]
    assert "`latentrt bench serve`" in first.conditions and f"`{again['command']}`" in first.conditions
    assert "In bounds at 1.25 images/s: in-flight 50.0% (50.0%)." in first.tables[0].note
    assert second.title == "Serving: b on x, mix m" and "No engine ran" not in second.tables[0].note


def test_load_goes_over_http_to_a_server_of_its_own() -> None:
    pytest.importorskip("fastapi")
    place = process.Place("in-flight", "a100-sd15", scale=0.5, slots=4, rows=4, queue=4)
    with process.ServerProcess(place) as server, load.OverHttp(server.port) as ask:
        outcome = load.run(ask, Arrivals(SHORT.draw(20, 0), place.setup.curve, 1e5, queue=4), capacity=1.0)
        refused = sum(entry.ended != entry.ended for entry in outcome.entries)
        assert 0 < refused < 20, "a queue of four took all of twenty at once"
        refusal = json.dumps({"prompt": "x", "sampler": "none"})
        with load.OverHttp(server.port) as again:
            status, body = again.post("/v1/images/generations", refusal)
            late, _ = again.post(
                "/v1/images/generations", json.dumps({"prompt": "x", "num_inference_steps": 151, "timeout": 0.01})
            )
        assert status == 400 and b"none" in body
        assert late == 504, "a mix may have more than the 150 steps that a server takes by itself"
        assert server.resident_bytes > 2**20
    used = sum(entry.rows * entry.work.steps for entry in outcome.entries if entry.ended == entry.ended)
    assert server.stats["device_seconds"] >= used * 0.5 * 0.138 / 16, "steps were skipped"


@pytest.mark.parametrize("ready", [True, False])
def test_a_server_ends_with_the_process_that_started_it(ready: bool) -> None:
    pytest.importorskip("fastapi")
    start = (
        "from latentrt.benchmarks.serving.process import Place, ServerProcess\n"
        "server = ServerProcess(Place('in-flight', 'a100-sd15', slots=1, rows=2))\n"
        "print(server._process.pid, flush=True)\n"
        "import time; time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        if ready:
            server = psutil.Process(int(starter.stdout.readline()))
        else:
            while not (children := psutil.Process(starter.pid).children()):
                time.sleep(0.001)
            server = children[0]
        starter.kill()
        server.wait(60)


def test_a_server_that_does_not_start_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match="did not start"):
        process.ServerProcess(process.Place("in-flight", "no such curve"))
    assert "choose a100-sd15" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": ("peak",)}, "point is 'peak': choose saturation, load, bounded"),
        ({"points": ("load",)}, "give --base"),
        ({"policies": ("in-flight",), "points": ("saturation", "load")}, "give --base"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        bench.Options(mixes=[MIXES["equal"]], **options)
    with pytest.raises(RequestError, match="policy is 'none': choose in-flight, "):
        bench.policies(["none"])


def test_plans_are_made_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from latentrt.benchmarks.serving import planner, plot

    monkeypatch.setattr(planner, "REQUESTS", 300)
    monkeypatch.setattr(plot, "REQUESTS", 200)
    monkeypatch.setattr(plot, "POINTS", 3)
    words = ["plan", "--rate", "4", "--p99", "8", "--curve", "a100-sd15"]
    assert cli.run([*words, "--json", "--plot", str(tmp_path / "p.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["serve"] == ["--slots", "16", "--rows", "16", "--max-waiting", "32"]
    assert found["devices"] >= 2 and found["latency"]["p99"] <= 8 and found["curve"]["kind"] == "published"
    assert found["curve"]["extrapolated"] == "steps of fewer than 2 rows are extrapolated, not published"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert cli.run([*words, "--rows", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["serve"] == ["--slots", "8", "--rows", "8", "--max-waiting", "32"]
    for more, message in (
        (["--p99", "0.5"], "idle device"),
        (["--slots", "16", "--rows", "8"], "rows is 8: give a whole number from 16"),
        (["--curve", "x"], "curve is 'x'"),
        (["--mix", "x"], "mix is 'x'"),
    ):
        assert cli.run([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_slots_are_no_more_than_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(place: process.Place, say: object) -> Any:
        raise EngineError(f"{place.slots} slots on {place.rows} rows")

    monkeypatch.setattr(real, "measured", measured)
    words = ["bench", "serve", "-o", str(tmp_path / "r.jsonl"), "--rows", "8"]
    for more, said in (([], "8 slots on 8 rows"), (["--slots", "16"], "rows is 8: give a whole number from 16")):
        assert cli.run([*words, *more]) != 0
        assert said in capsys.readouterr().err


def test_a_size_that_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["bench", "serve", "-o", str(tmp_path / "r.jsonl"), "--size"]
    for given, more, message in (
        ("64x13", [], "the height of --size is 13: this bundle needs a multiple of 8; try 8 or 16"),
        ("64", [], "size is '64': give WIDTHxHEIGHT in pixels"),
        ("64x64", ["--curve", "a100-sd15"], "a paced device has no engines; leave --size out"),
        ("64x13", ["--save-curve", str(tmp_path / "c.json")], "the height of --size is 13"),
        (
            "",
            ["--curve", "cpu-embedded", "--save-curve", str(tmp_path / "c.json"), "--threads", "1"],
            "--curve is cpu-embedded: a paced device has no engines; leave --threads and --save-curve out",
        ),
    ):
        assert cli.run([*words, given, *more]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_times_of_real_engines_are_not_scaled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["bench", "serve", "--scale", "0.5", "-o", str(tmp_path / "r.jsonl")]) == 2
    assert "scale is 0.5: real engines take their own time" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
