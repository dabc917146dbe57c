from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from latentrt.benchmarks.measure import bench
from latentrt.benchmarks.measure.workloads import workload
from latentrt.benchmarks.report import page as report
from latentrt.benchmarks.report import plots, records, summary
from latentrt.benchmarks.report.tables import conditions, sections
from latentrt.engines.errors import RequestError
from latentrt.runtime import cli

from .made_records import STAGES, latency_record, missing_record, scaling_record


@pytest.fixture
def some_records() -> list[dict[str, Any]]:
    name = "latentrt/onnxruntime-cpu/request"
    whole = latency_record(4, contender=name, title="latentrt, whole", factors={"encode": 0}, run="run1")
    theirs = latency_record(5, contender="diffusers/eager", title="diffusers", ratio_to_first=2.5, run="run1")
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
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert len(tables) == 4 and all(len(set(map(len, table.splitlines()))) == 1 for table in tables)


def test_tables_are_replaced_between_their_markers_only(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text(f"before\n{report.BEGIN}\nstale numbers\n{report.END}\nafter\n")
    assert not report.update_tables(document, some_records, write=False)
    assert "stale" in document.read_text()
    assert not report.update_tables(document, some_records)
    assert report.update_tables(document, some_records)
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n### embedded")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "stale" not in text


def test_the_summary_shows_what_may_stand_in_place_of_the_first_mode_and_no_lossy_run(
    tmp_path: Path, some_records: list[dict[str, Any]]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.SUMMARY_BEGIN}\n{report.SUMMARY_END}\n")
    title = "latentrt (openvino, bf16, step)"
    ours = latency_record(8, contender="latentrt/openvino-bf16/step", title=title, run="run1")
    ours["contender"]["options"] = {"precision": "bf16"}
    name = "latentrt/onnxruntime-cpu/step"
    longer = workload("embedded").but(steps=30).as_request()
    lossy = [
        latency_record(9 + n, contender=f"{name}{forecast}", workload=longer, date="2027-01-01T00:00:00+00:00")
        for n, forecast in enumerate(("", "+taylor"))
    ]
    longer = workload("embedded").but(steps=40).as_request()
    lossy.append(latency_record(8, contender=f"{name}-parts", workload=longer, date="2027-01-01T00:00:00+00:00"))
    report.update_summary(readme, [*some_records, ours, *lossy])
    rows = [row.split("|")[1:3] for row in readme.read_text().splitlines() if row.startswith("|")][2:]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["latentrt", "fp32"],
        ["≈ latentrt, openvino-bf16", "bf16"],
        ["diffusers", "fp32"],
    ]
    assert set(re.findall(r"\d+ steps", readme.read_text())) == {"20 steps"}


def test_the_summary_is_one_table_of_both_workloads(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.SUMMARY_BEGIN}\n{report.SUMMARY_END}\n")
    openvino = latency_record(6, contender="openvino", title="OpenVINO in diffusers", run="run1")
    openvino["contender"]["options"] = {"inference_precision": "bf16", "precision": "fp32"}
    large = latency_record(
        7,
        workload=workload("sd15-512").but(steps=2).as_request(),
        command="latentrt bench sd15-512 --steps 2",
        factors=dict.fromkeys(STAGES, 100.0),
        cold={"seconds": {"p50": 18.9}, "peak_bytes": 2**30},
        peak_bytes=6 * 2**30,
    )
    assert not report.update_summary(readme, [*some_records, openvino, large])
    assert report.update_summary(readme, [*some_records, openvino, large])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in readme.read_text().splitlines() if "|" in row]
    assert [row[0] for row in rows[2:]] == ["latentrt", "diffusers", "OpenVINO in diffusers"]
    assert [row[1] for row in rows[2:]] == ["fp32", "fp32 / –", "bf16 / –"]
    p50 = [record["seconds"]["total"]["p50"] for record in (some_records[0], large)]
    assert rows[2][2:] == [f"{p50[0] * 1e3:.3g} ms / {p50[1]:.3g} s", "–", "128 MiB / 6.00 GiB", "– / 18.9 s", "–"]
    text = readme.read_text()
    assert "`ran in`: what networks computed in. ≈: not exact, see `pixels`." in text
    assert "Test CPU, 2 cores, 2026-01-02: `latentrt bench embedded` / `latentrt bench sd15-512 --steps 2`." in text


@pytest.fixture
def lossy_records() -> list[dict[str, Any]]:
    """An exact run of 20 calls, a forecast of 10 that takes half its loop, one in bf16, and a rival."""
    near = {"against": "latentrt/onnxruntime-cpu/step", "pictures": 40, "latents_relative_error": None}
    figures = {"max_pixel_difference": 13, "psnr": 41.25, "least_psnr": 30.5, "ssim": 0.98765, "haarpsi": 0.91234}
    forecast = latency_record(
        contender="latentrt/onnxruntime-cpu/step+taylor",
        title="latentrt (onnxruntime-cpu, step, forecast taylor)",
        factors={"denoise": 0.5},
        noise=0,
        quality=near | figures,
        oracle={"single": 0.995, "pair": 0.98, "count": 400},
    )
    half = latency_record(contender="diffusers/eager-bf16", title="diffusers in bf16", noise=0)
    half["quality"] = near | figures | {"psnr": None, "least_psnr": None}
    exact = latency_record(title="latentrt, step", noise=0)
    for record, calls in ((exact, 20), (forecast, 10), (half, 20)):
        record["roofline"]["denoiser"]["runs"] = calls
    return [exact, forecast, half, latency_record(contender="diffusers/eager", title="diffusers", noise=0)]


def test_what_is_not_exact_is_marked_and_its_quality_stands_beside_the_exact_run(
    lossy_records: list[dict[str, Any]],
) -> None:
    text = report.text(lossy_records)
    latency, quality = text.partition("**Quality**")[0], text.partition("**Quality**")[2].partition("**")[0]
    marked = [line.split("|")[1].strip() for line in latency.splitlines() if line.startswith("| ≈")]
    assert marked == ["≈ latentrt (onnxruntime-cpu, step, forecast taylor)", "≈ diffusers in bf16"]
    assert "to diffusers in fp32 with the same noise. ≈: not exact." in latency
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in quality.splitlines() if line.startswith("|")]
    total = sum(STAGES.values())
    judged = "99.5% single, 98.0% pairs"
    saved = f"{(total - STAGES['denoise'] / 2) / total:.2f} ×"
    assert rows[2:] == [
        ["latentrt, step", "1.00 ×", "1.00 ×", "20", "1.00 ×", "exact", *["–"] * 5],
        [marked[0], saved, "0.50 ×", "10", "1.00 ×", "41.2", "30.5", "0.9877", "0.9123", "13", judged],
        [marked[1], "1.00 ×", "1.00 ×", "20", "1.00 ×", "equal", *["–"] * 5],
    ]
    assert "40 pictures of the same prompts and noise" in quality
    assert "**Quality**" not in report.text([lossy_records[0], lossy_records[3]])


def test_times_of_another_run_are_not_set_against_the_exact_run(lossy_records: list[dict[str, Any]]) -> None:
    lossy_records[1]["run"] = "later"
    assert re.search(r"\| ≈ latentrt .*\| +– \| +– \| +10 \| +– \| +41.2 \|", report.text(lossy_records))


def test_time_is_drawn_against_quality_where_anything_is_not_exact(
    tmp_path: Path, lossy_records: list[dict[str, Any]]
) -> None:
    names = [path.name.rpartition("-")[2] for path in report.write_plots(lossy_records, tmp_path)]
    assert names == ["stages.png", "latency.png", "quality.png"]
    assert (tmp_path / "test-cpu-embedded-128-128-20-steps-fp32-quality.png").read_bytes().startswith(b"\x89PNG")
    points = [(60.0, 100.0), (40.0, 100.0), (60.0, 101.0), (60.0, 200.0)]
    assert plots.beside(points, 60.0, 1.0) == [(60.0, 100.0), (40.0, 100.0), (61.0, 101.0), (60.0, 200.0)]


def test_rows_of_another_run_are_told_apart(some_records: list[dict[str, Any]]) -> None:
    assert "another run" not in report.text(some_records) + summary.summary(some_records)
    early = {"run": "before", "date": "2026-01-01T00:00:00+00:00", "command": "latentrt bench embedded --quick"}
    some_records[2] |= early
    said = "Of another run (2026-01-01; `latentrt bench embedded --quick`): diffusers.\n"
    assert f"`latentrt bench embedded`. {said}" in report.text(some_records)
    text = summary.summary(some_records)
    assert re.search(r"^\| diffusers¹ ", text, re.MULTILINE) and re.search(r"^\| latentrt  ", text, re.MULTILINE)
    assert text.endswith(" ¹ `embedded`: another run, 2026-01-01.")


def test_commands_of_older_records_are_shown_as_they_can_be_given_now() -> None:
    record = latency_record(command="python -m latentrt.benchmarks.replay --steps 5")
    assert conditions(record).endswith("`python -m latentrt.benchmarks.measure.replay --steps 5`")


def test_each_machine_has_tables_of_its_own(some_records: list[dict[str, Any]]) -> None:
    gpus = [{"name": "A GPU", "clock_mhz": clock} for clock in (1000, 2000)]
    machines = [latency_record()["machine"] | {"gpu": gpu} for gpu in (None, *gpus)]
    found = [latency_record(number, machine=machine) for number, machine in enumerate(machines)]
    assert [[r["run"] for r in section.records] for section in sections(found)] == [["run0"], ["run2"]]


def test_sections_that_differ_in_guidance_alone_say_so() -> None:
    work = latency_record()["workload"]
    found = sections([latency_record(1), latency_record(2, workload=work | {"guidance": 3.0})])
    assert [section.title for section in found] == [found[0].title, f"{found[0].title}, guidance 3"]


def test_the_summary_takes_the_newest_machine_and_leaves_other_work_out() -> None:
    work = latency_record()["workload"]
    old, new = latency_record(1), latency_record(2, date="2026-02-03T00:00:00+00:00")
    new["machine"] = new["machine"] | {"processor": "Newer CPU"}
    others = [latency_record(3, workload=work | change) for change in ({"batch": 4}, {"precision": "fp16"})]
    theirs = latency_record(4, contender="diffusers/eager", machine=new["machine"])
    bf16 = latency_record(6, contender="diffusers/eager-bf16", machine=new["machine"])
    request = latency_record(5, contender="latentrt/onnxruntime-cpu/request", machine=new["machine"])
    made = [
        latency_record(7, contender=f"latentrt/onnxruntime-cpu/step-{how}", machine=new["machine"])
        for how in ("parts", "winograd")
    ]
    assert summary.chosen([*made, new, theirs, bf16, request, old, *others], "embedded") == [new, theirs, bf16]
    assert summary.chosen([latency_record(contender="diffusers/eager")], "embedded") == []
    with pytest.raises(RequestError, match="run `latentrt bench embedded` first"):
        summary.summary(others)
    with pytest.raises(RequestError, match="run `latentrt bench embedded` first"):
        report.write_chart(Path("never.png"), others)


def test_the_chart_shows_each_contender_once(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    small = report.write_chart(tmp_path / "images" / "small.png", some_records[:1])
    large = report.write_chart(tmp_path / "images" / "large.png", some_records)
    heights = [struct.unpack(">I", path.read_bytes()[20:24])[0] for path in (small, large)]
    assert heights[1] - heights[0] == 88  # one more bar


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END} {report.BEGIN}"])
def test_a_document_without_its_markers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    for update in (report.update_tables, report.update_summary):
        with pytest.raises(RequestError, match="has no place for what was measured: add the lines <!-- "):
            update(tmp_path / "README.md", [latency_record()])


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    some_records[2]["contender"]["title"] = "<b>diffusers</b>"
    page = report.write_page(some_records, tmp_path / "page.html").read_text()
    assert "<b>diffusers" not in page
    assert "&lt;b&gt;diffusers" in page
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_the_page_begins_with_what_it_comes_to_and_its_contents(
    tmp_path: Path, some_records: list[dict[str, Any]]
) -> None:
    some_records[0]["run"] = some_records[2]["run"]  # the ratio of one run's rounds counts, not that of medians
    some_records[2]["memory"]["peak_bytes"] = 2**28
    page = report.write_page(some_records, tmp_path / "page.html").read_text()
    begin = page.partition("<h2")[0]
    said = "2.50 × as fast as diffusers with 0.50 × its memory"
    assert f'<p class="lead">embedded: 128×128, 20 steps, fp32: latentrt is {said}.</p>' in begin
    links = re.findall(r'href="#([^"]+)"', begin)
    assert len(links) == 2 and links == re.findall(r'<h2 id="([^"]+)"', page)
    labels = re.findall(r'<td data-label="([^"]*)">', page.partition("<h3>Latency")[2].partition("</tr>\n")[0])
    assert labels[:2] == ["", "request p50"]  # on a phone each number stands beside its column's name


def test_plots_are_png_files_with_speaking_names(tmp_path: Path, some_records: list[dict[str, Any]]) -> None:
    paths = report.write_plots(some_records, tmp_path / "plots")
    assert [path.name.removeprefix("test-cpu-embedded-128-128-") for path in paths] == [
        "20-steps-fp32-stages.png",
        "20-steps-fp32-latency.png",
        "fp32-growth-growth-steps.png",
        "fp32-growth-growth-pixels.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_report_names_what_it_cannot_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.append(tmp_path / "r.jsonl", [latency_record(1)])
    readme, tables, chart = tmp_path / "README.md", tmp_path / "tables.md", tmp_path / "chart.png"
    options = ["--readme", str(readme), "--tables", str(tables), "--chart", str(chart)]
    assert cli.run(["bench", "report", str(tmp_path / "r.jsonl"), *options]) == 2
    assert "README.md cannot be read" in capsys.readouterr().err
    readme.write_text(f"{report.SUMMARY_BEGIN}\n{report.SUMMARY_END}\n")
    tables.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert cli.run(["bench", "report", str(tmp_path / "r.jsonl"), *options, "--check"]) == 1
    assert not chart.exists()
    assert cli.run(["bench", "report", str(tmp_path / "r.jsonl"), *options]) == 0
    written = capsys.readouterr().out.split()
    assert (
        str(tmp_path / "r.html") in written and str(chart) in written and all(Path(path).exists() for path in written)
    )
    assert cli.run(["bench", "report", str(tmp_path / "r.jsonl"), *options, "--check"]) == 0
    assert cli.run(["bench", "report", str(tmp_path / "r.jsonl"), "--check"]) == 2
    assert "nothing to check" in capsys.readouterr().err
    assert cli.run(["bench", "report", str(tmp_path / "r.jsonl")]) == 0  # a page and plots beside it, nothing else
    written = capsys.readouterr().out.split()
    assert written and all(Path(path).is_relative_to(tmp_path) for path in written)


def test_a_file_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("it measures already"))
    (tmp_path / "file").touch()
    assert cli.run(["bench", "embedded", "--output", str(tmp_path / "file" / "r.jsonl")]) == 1
    assert "choose another --output" in capsys.readouterr().err


def test_bench_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: ") and "compare" in out
