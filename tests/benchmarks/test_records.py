from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from latentrt.benchmarks.report import records
from latentrt.benchmarks.report.compare import ALONE, compare, lines
from latentrt.engines.errors import RequestError, StorageError
from latentrt.runtime import cli

from .made_records import STAGES, latency_record, missing_record


def test_records_come_back_as_written_with_seven_digits(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "r.jsonl"
    records.append(path, [{"kind": "a", "x": 1 / 3, "y": [2.0, (1e-9,)]}])
    records.append(path, [{"kind": "b"}])
    assert records.read(path) == [
        {"format": 1, "kind": "a", "x": 0.3333333, "y": [2.0, [1e-9]]},
        {"format": 1, "kind": "b"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1 is no JSON"), ('{"format": 9}', "format 9, this latentrt reads 1"), ("[]", r"\[\]")],
)
def test_damaged_records_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        records.read(path)


def test_one_run_of_a_file_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, [latency_record(1), latency_record(2)])
    assert [r["run"] for r in records.read_run(f"{path}@run2")] == ["run2"]
    assert len(records.read_run(str(path))) == 2
    with pytest.raises(RequestError, match=r"holds no run 'x': it has run1 \(2026-01-02\), run2 \(2026-01-02\)$"):
        records.read_run(f"{path}@x")
    path.write_text("")
    with pytest.raises(RequestError, match="holds no records"):
        records.read_run(f"{path}@x")


def test_a_half_written_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, [{"kind": "a"}])
    with path.open("a") as file:
        file.write('{"format": 1, "ki')
    records.append(path, [{"kind": "b"}, {"kind": "c"}])
    with pytest.raises(RequestError, match="line 2 is no JSON"):
        records.read(path)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in (lines[0], *lines[2:])] == ["a", "b", "c"]


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, [{"kind": "a"}])
    before, write, inode = path.read_bytes(), os.write, path.stat().st_ino

    def full(handle: int, data: bytes) -> int:
        if os.fstat(handle).st_ino != inode:
            return write(handle, data)
        if os.fstat(handle).st_size > len(before):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:7])

    monkeypatch.setattr(records.os, "write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(StorageError, match=r"No space left on device; the records are in (\S+\.jsonl)$") as caught:
        records.append(path, [{"kind": "b"}])
    assert path.read_bytes() == before
    assert records.read(Path(str(caught.value).split()[-1])) == [{"format": 1, "kind": "b"}]


def test_records_that_no_file_takes_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    shown: list[str] = []
    with pytest.raises(StorageError, match="the records are the lines on standard output"):
        records.append(tmp_path / "r.jsonl", [{"kind": "a"}, {"kind": "b"}], show=shown.append)
    assert [json.loads(line)["kind"] for text in shown for line in text.splitlines()] == ["a", "b"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_was_measured_before_an_end_that_came_early_is_kept(tmp_path: Path) -> None:
    path, said = tmp_path / "r.jsonl", list[str]()
    with records.Journal(path, said.append) as journal:
        journal.keep({"kind": "a"})
        assert records.read(journal.path) == [{"format": 1, "kind": "a"}]
        records.append(path, [{"kind": "a"}])
    assert list(tmp_path.iterdir()) == [path] and said == []
    with pytest.raises(KeyboardInterrupt), records.Journal(path, said.append) as journal:
        journal.keep({"kind": "b"})
        raise KeyboardInterrupt
    assert records.read(journal.path) == [{"format": 1, "kind": "b"}] and len(records.read(path)) == 1
    assert said == [f"what was measured until then is in {journal.path}"]
    assert journal.path not in tmp_path.glob("*.jsonl")  # a report does not take it for a whole run


def test_a_file_is_tried_before_it_is_needed(tmp_path: Path) -> None:
    records.check_writable(tmp_path / "new" / "r.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    records.append(tmp_path / "r.jsonl", [{"kind": "a"}])
    records.check_writable(tmp_path / "r.jsonl")
    assert len(records.read(tmp_path / "r.jsonl")) == 1
    with pytest.raises(StorageError, match=r"cannot write .*; choose another --output"):
        records.check_writable(tmp_path / "r.jsonl" / "below")


def test_records_of_a_source_tree_stay_in_it_and_others_go_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[2]
    assert records.results_folder() == root / "benchmarks" / "results"
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site-packages/latentrt/benchmarks/report/records.py"))
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert records.results_folder() == tmp_path / "home" / "records"
    monkeypatch.delenv("LATENTRT_HOME")
    assert records.results_folder() == tmp_path / "data" / "latentrt" / "records"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert records.results_folder() == Path.home() / ".local" / "share" / "latentrt" / "records"


def test_a_file_of_records_is_named_by_its_machine() -> None:
    machine = {"gpu": None, "processor": "AMD EPYC(TM) 9", "cores": 2}
    assert records.default_file(machine).name == "amd-epyc-9-2-cores.jsonl"
    assert records.default_file(machine | {"gpu": {"name": "NVIDIA H200"}}).name == "nvidia-h200.jsonl"


def test_latest_keeps_one_record_of_each_kind_of_work() -> None:
    old, new = latency_record(1), latency_record(2)
    other = latency_record(3, workload=old["workload"] | {"steps": 5})
    assert list(records.latest([old, new, other, missing_record()]).values()) == [new, other]


def test_the_same_contender_twice_shows_no_difference() -> None:
    for noise in (0.002, 0.01, 0.05):
        found = compare([latency_record(1, noise=noise)], [latency_record(2, noise=noise)])
        assert (found.changes, found.compared, found.doubts) == ([], 1, [ALONE])
    assert lines(found)[-1] == "no change beyond noise in 1 contender"


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_ten_percent_in_one_stage_are_found_and_named(stage: str) -> None:
    found = compare([latency_record(1)], [latency_record(2, factors={stage: 1.1})])
    stages = [change for change in found.changes if change.figure != "total"]
    assert [change.figure for change in stages] == [stage]
    assert stages[0].least > 1.05
    assert stages[0].after / stages[0].before == pytest.approx(1.1, abs=0.02)
    assert found.regressed
    assert "% slower" in lines(found)[-1]


def test_what_only_one_process_shows_is_no_change() -> None:
    made = latency_record(2, factors={"decode": 1.1}) | {"launches": [3, 17]}
    assert [c.figure for c in compare([latency_record(1)], [made]).changes] == ["decode"]
    made["samples"]["decode"][:3] = latency_record(1)["samples"]["decode"][:3]
    assert compare([latency_record(1)], [made]).changes == []


def test_noise_that_only_adds_is_no_change() -> None:
    """As on a machine that others use for part of a run: medians are far apart, the fastest requests are not."""
    disturbed = latency_record(2)
    total = disturbed["samples"]["total"]
    disturbed["samples"]["total"] = [value * (1.0 if i % 5 == 0 else 1.4) for i, value in enumerate(total)]
    assert compare([latency_record(1)], [disturbed]).changes == []


def test_what_has_not_changed_tells_of_the_machine() -> None:
    """diffusers of the same version took a tenth longer: so may we; what we took beyond that is a change."""
    theirs: dict[str, Any] = {"contender": "diffusers/eager", "versions": {"torch": "2.13"}}
    slow = dict.fromkeys(STAGES, 1.1)
    before = [latency_record(1), latency_record(3, **theirs)]
    found = compare(before, [latency_record(2, factors=slow), latency_record(4, factors=slow, **theirs)])
    assert (found.changes, found.compared, found.controls) == ([], 1, ["diffusers/eager"])
    assert "diffusers/eager: the same in both, so a measure of the machine, not judged" in lines(found)[1]
    assert re.fullmatch(r"the machine took \+\d+\.\d% for what has not changed: corrected.*", found.doubts[0])
    after = [latency_record(2, factors=slow | {"decode": 1.25}), latency_record(4, factors=slow, **theirs)]
    assert [change.figure for change in compare(before, after).changes] == ["decode"]
    # work that the machine did not slow is not taken for faster
    after = [latency_record(2, factors=slow | {"decode": 1.0}), latency_record(4, factors=slow, **theirs)]
    assert compare(before, after).changes == []
    # another version is judged, and is no measure of the machine
    newer = latency_record(4, factors=slow, contender="diffusers/eager", versions={"torch": "2.14"})
    judged = compare(before, [latency_record(2), newer])
    assert not judged.controls
    assert judged.compared == 2 and {change.contender for change in judged.changes} == {"diffusers/eager"}


def test_an_improvement_is_no_regression() -> None:
    found = compare([latency_record(1)], [latency_record(2, factors={"denoise": 0.8})])
    assert [change.figure for change in found.changes] == ["total", "denoise"]
    assert not found.regressed


def test_more_memory_is_a_regression() -> None:
    found = compare([latency_record(1)], [latency_record(2, peak_bytes=2**28)])
    assert [(change.figure, change.worse) for change in found.changes] == [("peak memory", True)]
    assert "128 → 256 MiB" in lines(found)[-1]


def test_tiny_stages_are_not_reported() -> None:
    found = compare([latency_record(1)], [latency_record(2, factors={"tokenize": 1.2})])
    assert found.changes == []  # 40 microseconds


def test_doubts_are_named() -> None:
    noisy = latency_record(1)["conditions"] | {"quiet": False, "others_share": 0.4}
    found = compare(
        [latency_record(1)], [latency_record(2, conditions=noisy, machine=latency_record()["machine"] | {"cores": 4})]
    )
    assert found.doubts[1:] == [
        "others used 40% of the machine during the second run",
        "the machines differ: cores 2 → 4",
    ]


def test_compare_command_exits_by_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    records.append(a, [latency_record(1)])
    records.append(b, [latency_record(2, factors={"decode": 1.1})])
    records.append(c, [latency_record(2, workload=latency_record()["workload"] | {"steps": 3})])
    assert cli.run(["bench", "compare", str(a), str(a)]) == 0
    assert cli.run(["bench", "compare", str(a), str(b)]) == 1
    assert "decode: 29.33 → 32.7 ms, +11.5% slower" in capsys.readouterr().out
    assert cli.run(["bench", "compare", str(a), str(c)]) == 2
    assert cli.run(["bench", "compare", str(a), str(tmp_path / "none.jsonl")]) == 2
