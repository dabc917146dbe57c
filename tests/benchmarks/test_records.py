from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from latentrt.benchmarks.report import page as report
from latentrt.benchmarks.report import records
from latentrt.benchmarks.report.compare import ALONE, compare, lines
from latentrt.engines.errors import RequestError
from latentrt.runtime import cli

from .made_records import STAGES, latency_record, missing_record, scaling_record


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
    with pytest.raises(RequestError, match="no records of run 'x'"):
        records.read_run(f"{path}@x")


def test_latest_keeps_one_record_of_each_kind_of_work() -> None:
    old, new = latency_record(1), latency_record(2)
    other = latency_record(3, workload=old["workload"] | {"steps": 5})
    assert list(records.latest([old, new, other, missing_record()]).values()) == [new, other]


def test_the_same_contender_twice_shows_no_difference() -> None:
    for noise in (0.002, 0.01, 0.05):
        found = compare([latency_record(1, noise=noise)], [latency_record(2, noise=noise)])
        assert (found.changes, found.compared, found.doubts) == ([], 1, [ALONE])
    assert lines(found)[-1] == "no change beyond noise in 1 contenders"


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
    assert (found.changes, found.compared) == ([], 1)
    assert re.fullmatch(r"the machine took \+\d+\.\d% for what has not changed: corrected.*", found.doubts[0])
    after = [latency_record(2, factors=slow | {"decode": 1.25}), latency_record(4, factors=slow, **theirs)]
    assert [change.figure for change in compare(before, after).changes] == ["decode"]
    # work that the machine did not slow is not taken for faster
    after = [latency_record(2, factors=slow | {"decode": 1.0}), latency_record(4, factors=slow, **theirs)]
    assert compare(before, after).changes == []
    # another version is judged, and is no measure of the machine
    newer = latency_record(4, factors=slow, contender="diffusers/eager", versions={"torch": "2.14"})
    judged = compare(before, [latency_record(2), newer])
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


@pytest.fixture
def some_records() -> list[dict[str, Any]]:
    whole = latency_record(
        4, contender="latentrt/onnxruntime-cpu/request", title="latentrt, whole", factors={"encode": 0}
    )
    theirs = latency_record(5, contender="diffusers/eager", title="diffusers", ratio_to_first=2.5)
    return [latency_record(1), whole, theirs, missing_record(1), scaling_record("steps"), scaling_record("pixels")]


def test_text_says_what_the_records_say(some_records: list[dict[str, Any]]) -> None:
    text = report.text(some_records)
    assert "### embedded: 128×128, 20 steps, fp32" in text
    assert (
        "Test CPU, 2 cores, 2 threads pinned, 8 GiB, Linux; weights: random; sampler: PNDMScheduler; 20 rounds after 2"
        in text
    )
    assert "2026-01-02; `latentrt bench embedded`" in text
    assert "Not measured: ONNX Runtime through Optimum: optimum-onnx is not installed." in text
    p50 = some_records[2]["seconds"]["total"]["p50"] * 1e3
    assert re.search(rf"\| diffusers +\| +{p50:.0f} \|.* 2\.50 × \|", text)
    assert re.search(r"\| latentrt, whole .* – \|", text)
    assert re.search(r"\| latentrt +\| +steps \| +1 to 4 \|.*1\.00 ± 0\.01 \| +– \|", text)
    assert "NOT QUIET" not in text
    widths = {len(line) for line in text.splitlines() if line.startswith("| latentrt, whole")}
    assert len(widths) <= 2, "tables of one width read well as plain text"


def test_readme_is_replaced_between_its_markers_only(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale numbers\n{report.END}\nafter\n")
    assert not report.update_readme(readme, some_records, write=False)
    assert "stale" in readme.read_text()
    assert not report.update_readme(readme, some_records)
    assert report.update_readme(readme, some_records)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n### embedded")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "stale" not in text


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END} {report.BEGIN}"])
def test_a_readme_without_its_markers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(RequestError, match="has no place for measurements"):
        report.update_readme(tmp_path / "README.md", [latency_record()])


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    some_records[2]["contender"]["title"] = "<b>diffusers</b>"
    page = report.write_page(some_records, tmp_path / "page.html").read_text()
    assert "<b>diffusers" not in page
    assert "&lt;b&gt;diffusers" in page
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_plots_are_png_files_with_speaking_names(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    paths = report.write_plots(some_records, tmp_path / "plots")
    assert [path.name.removeprefix("test-cpu-embedded-128-128-") for path in paths] == [
        "20-steps-fp32-stages.png",
        "20-steps-fp32-latency.png",
        "fp32-growth-growth-steps.png",
        "fp32-growth-growth-pixels.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
