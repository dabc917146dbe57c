"""Samplers by the names of AUTOMATIC1111's web UI. The reference is its own table, as release 1.10 has it."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import LatentRTError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sdapi import samplers
from latentrt.runtime.sdapi.samplers import name_of, sampler_of
from latentrt.runtime.service.errors import RefusedError

DIFFUSION = {"_class_name": "PNDMScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}

WEB_UI = {
    "DPM++ 2M": "dpmpp_2m_karras",
    "DPM++ 2M SDE": "dpmpp_2m_sde_exponential",
    "DPM++ 3M SDE": "dpmpp_3m_sde_exponential",
    "Euler a": "euler_a",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm_2_karras",
    "DPM2 a": "dpm_2_a_karras",
    "DDIM": "ddim",
    "PLMS": "plms",
    "UniPC": "unipc",
    "LCM": "lcm",
}
"""Names in its menus, and what they mean with the scheduler "Automatic" there."""


@pytest.mark.parametrize("name", WEB_UI)
def test_automatic_is_what_the_web_ui_takes(name: str) -> None:
    for scheduler in (None, "", "Automatic", "automatic"):
        assert sampler_of(name, scheduler, DIFFUSION) == WEB_UI[name]
    assert sampler_of(name.upper(), None, DIFFUSION) == WEB_UI[name]


@pytest.mark.parametrize(
    ("name", "scheduler", "short"),
    [
        ("DPM++ 2M Karras", None, "dpmpp_2m_karras"),
        ("DPM++ 2M SDE Karras", "Automatic", "dpmpp_2m_sde_karras"),
        ("DPM++ 3M SDE Exponential", None, "dpmpp_3m_sde_exponential"),
        ("k_dpmpp_2m_ka", None, "dpmpp_2m_karras"),
        ("k_euler_a", None, "euler_a"),
        ("DPM++ 2M Karras", "Exponential", "dpmpp_2m_exponential"),
        ("Euler", "Karras", "euler_karras"),
        ("Euler", "polyexponential", "euler_exponential"),
        ("Euler", "Beta", "euler_beta"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m"),
        ("dpmpp_2m", "Uniform", "dpmpp_2m"),
        ("dpmpp_2m_karras", None, "dpmpp_2m_karras"),
        ("", None, None),
        (None, "Automatic", None),
    ],
)
def test_names_and_schedulers(name: str | None, scheduler: str | None, short: str | None) -> None:
    assert sampler_of(name, scheduler, DIFFUSION) == short


def test_on_a_flow_the_names_mean_its_samplers() -> None:
    assert [sampler_of(name, None, FLOW) for name in ("Euler", "Heun", "LCM")] == [
        "flow_euler",
        "flow_heun",
        "flow_lcm",
    ]
    assert name_of("flow_euler") == ("Euler", "Uniform")


@pytest.mark.parametrize("scheduler", ["Karras", "Exponential", "Beta", "Uniform", "Automatic"])
@pytest.mark.parametrize("listed", samplers.listed(), ids=lambda each: each["name"])
def test_what_is_listed_can_be_drawn_or_is_refused_in_one_line(listed: dict[str, object], scheduler: str) -> None:
    config = Bundle.open(ensure_bundle()).manifest.scheduler
    try:
        short = sampler_of(str(listed["name"]), scheduler, config)
    except RefusedError as error:
        assert scheduler not in ("Uniform", "Automatic")
        assert "\n" not in str(error) and "choose Automatic" in str(error)
    else:
        assert len(step_table(config, 12, sampler=short)) >= 12
        assert name_of(str(short))[0] == listed["name"]


@pytest.mark.parametrize("name", ["DPM++ SDE", "DPM++ SDE Karras", "DPM++ 2S a Karras", "DPM adaptive", "Restart"])
def test_what_is_not_here_names_the_nearest(name: str) -> None:
    with pytest.raises(RefusedError, match=r"is not served here: .*the nearest is"):
        sampler_of(name, None, DIFFUSION)


@pytest.mark.parametrize("scheduler", ["SGM Uniform", "KL Optimal", "Align Your Steps", "Simple", "DDIM", "x" * 1000])
def test_other_schedulers_are_refused(scheduler: str) -> None:
    with pytest.raises(RefusedError, match="choose Automatic, Uniform, ") as raised:
        sampler_of("Euler", scheduler, DIFFUSION)
    assert raised.value.param == "scheduler" and len(str(raised.value)) < 200


def test_a_scheduler_without_a_sampler_is_refused() -> None:
    with pytest.raises(RefusedError, match="without sampler_name"):
        sampler_of(None, "Karras", DIFFUSION)


def test_an_unknown_name_is_left_to_the_pipeline() -> None:
    name = sampler_of("Eulr", None, DIFFUSION)
    with pytest.raises(LatentRTError, match="sampler 'Eulr' is not known: near are euler"):
        step_table({**DIFFUSION, "num_train_timesteps": 1000}, 4, sampler=name)
