"""Answers as the web UI has them: pictures, the parameters as they were read, and what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

from ..service import Job
from ..service.pictures import Picture
from .fields import ImageToImage
from .samplers import name_of
from .work import Drawing


def rendered(drawing: Drawing, job: Job, pictures: Mapping[int, Picture], *, interrupted: bool = False) -> bytes:
    """Return the answer to a request. Base64 is put in as it is: an encoder would look at each letter."""
    body = drawing.body
    texts = [pictures[index].text for index in sorted(pictures)] if body.send_images else []
    parameters = body.model_dump()
    if isinstance(body, ImageToImage) and not body.include_init_images:
        parameters |= {"init_images": None, "mask": None}
    info = json.dumps(info_of(drawing, job, pictures, interrupted=interrupted), ensure_ascii=False)
    rest = json.dumps({"parameters": parameters, "info": info, "ignored": drawing.ignored}, ensure_ascii=False)
    listed = b",".join(b'"' + text.encode() + b'"' for text in texts)
    return b'{"images":[' + listed + b"]," + rest[1:].encode()


def info_of(
    drawing: Drawing, job: Job, pictures: Mapping[int, Picture], *, interrupted: bool = False
) -> dict[str, Any]:
    """Return what `info` holds: of every picture its prompts, seed and parameters, and what was drawn with."""
    body, indices = drawing.body, sorted(pictures)
    used = job.facts.get("parameters", {})
    width, height = job.size
    seeds = [pictures[index].seed for index in indices]
    sampler, _ = name_of(str(used.get("sampler") or drawing.sampler))
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(indices),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(indices),
        "seed": drawing.seed,
        "all_seeds": seeds,
        "subseed": drawing.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": sampler,
        "cfg_scale": _scale(drawing, used),
        "steps": used.get("num_inference_steps", body.steps),
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": drawing.model.name,
        "sd_model_hash": drawing.model.digest[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": body.denoising_strength if isinstance(body, ImageToImage) else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [infotext(drawing, job, seed) for seed in seeds],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": _version(),
        "job": job.id,
        "interrupted": interrupted,
        "ignored": drawing.ignored,
        "warnings": list(job.facts.get("warnings", ())),
        "timings": job.facts.get("timings", {}),
    }


def infotext(drawing: Drawing, job: Job, seed: int | None) -> str:
    """Return the parameters of a picture as one text, which the web UI and its kin read back."""
    body, used = drawing.body, job.facts.get("parameters", {})
    sampler, scheduler = name_of(str(used.get("sampler") or drawing.sampler))
    said: dict[str, Any] = {
        "Steps": used.get("num_inference_steps", body.steps),
        "Sampler": sampler,
        "Schedule type": scheduler,
        "CFG scale": _scale(drawing, used),
        "Seed": seed,
        "Size": "{}x{}".format(*job.size),
        "Model hash": drawing.model.digest[:10],
        "Model": drawing.model.name,
        "Denoising strength": body.denoising_strength if isinstance(body, ImageToImage) else None,
        "Version": _version(),
    }
    lines = [body.prompt, f"Negative prompt: {body.negative_prompt}" if body.negative_prompt else ""]
    parameters = ", ".join(f"{name}: {_quoted(value)}" for name, value in said.items() if value is not None)
    return "\n".join([line for line in lines if line] + [parameters])


def _scale(drawing: Drawing, used: Mapping[str, Any]) -> float | None:
    given = drawing.body.cfg_scale
    return used.get("guidance_scale") if given is None else given


def _quoted(value: Any) -> str:
    """Return a value of a text of parameters: one with a comma, a colon or a line break stands in quotes."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


@cache  # half a millisecond, for every picture, on the event loop
def _version() -> str:
    return f"latentrt {metadata.version('latentrt')}"


def progress_of(job: Job | None, *, images: int, queued: int, picture: bool) -> dict[str, Any]:
    """Return what /sdapi/v1/progress says of a request, or of none; `queued`: how many requests there are."""
    state: dict[str, Any] = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    if job is None:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    said = job.progress
    done, total = said["steps"], said["total_steps"]
    each = max(1, total // max(1, images))
    state |= {
        "interrupted": job.is_over,
        "job": job.id,
        "job_count": images,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "job_no": said["images"],
        "sampling_step": min(max(0, done - said["images"] * each), each),
        "sampling_steps": each if total else 0,
    }
    before = said["queue_position"]
    text = None if before is None else f"{before} pictures before this one"
    preview = job.preview
    return {
        "progress": min(1.0, max(0.01, done / total if total else 0.0)),
        "eta_relative": said["seconds_left"] or 0.0,
        "state": state,
        "current_image": preview.text if picture and preview is not None else None,
        "textinfo": text if queued < 2 else f"{text or 'drawing'}, of {queued} requests",
    }
