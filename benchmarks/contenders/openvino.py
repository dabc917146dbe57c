"""OpenVINO as a contender: the three networks converted from PyTorch and compiled, inside diffusers' pipeline.

This is what `optimum-intel` does, without that package, which pins other versions of PyTorch and transformers. Shapes
are fixed to the workload's before compiling, as its documentation recommends.
"""

from __future__ import annotations

import time
from typing import Any

from ...engines.errors import EngineError
from ...engines.openvino.library import load_openvino
from . import diffusers as contender_diffusers


class Contender(contender_diffusers.Contender):
    """A diffusers pipeline whose networks run in OpenVINO."""

    def __init__(self, variant: str, options: dict[str, Any]) -> None:
        """Load the checkpoint, convert and compile; the conversion is the `build` time. `variant` is a precision."""
        self._inference = variant or "f32"
        super().__init__("eager", options)
        self.settings |= {"performance_hint": "LATENCY", "inference_precision": self._inference, "shapes": "static"}

    def _load(self, options: dict[str, Any]) -> Any:
        import torch

        self.versions["openvino"] = load_openvino().__version__
        pipe = super()._load(options)
        if not type(pipe).__name__.startswith("StableDiffusionPipeline"):
            raise EngineError(f"{type(pipe).__name__} is not converted here: only Stable Diffusion 1 and 2 are")
        start = time.perf_counter()
        rows, batch = 2 * options["batch"], options["batch"]
        height, width = options["height"] // pipe.vae_scale_factor, options["width"] // pipe.vae_scale_factor
        channels, length = pipe.unet.config.in_channels, pipe.tokenizer.model_max_length
        latents = torch.zeros(1, channels, height, width)
        ids = torch.zeros(1, length, dtype=torch.int64)
        context = torch.zeros(rows, length, pipe.text_encoder.config.hidden_size)
        settings = {
            "INFERENCE_NUM_THREADS": options["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._inference,
        }
        encode = _compiled(_wrapped(pipe.text_encoder), (ids,), settings)
        sample = latents.expand(rows, -1, -1, -1)
        denoise = _compiled(_wrapped(pipe.unet), (sample, torch.tensor(1.0), context), settings)
        decode = _compiled(_wrapped(pipe.vae, "decode"), (latents.expand(batch, -1, -1, -1),), settings)
        # The pipeline calls the modules as before; what they compute is done by OpenVINO.
        pipe.text_encoder.forward = lambda ids, **_: (encode(ids),)
        pipe.unet.forward = lambda sample, timestep, encoder_hidden_states, **_: (
            denoise(sample, timestep.float(), encoder_hidden_states),
        )
        pipe.vae.decode = lambda latents, **_: (decode(latents),)
        for module in (pipe.text_encoder, pipe.unet, pipe.vae):
            for parameter in module.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype)  # OpenVINO has its own copy
        self._build = time.perf_counter() - start
        return pipe


def _compiled(module: Any, example: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """Return a function from tensors to a tensor that runs a module in OpenVINO, for the example's shapes only."""
    import torch

    openvino = load_openvino()

    with torch.no_grad():
        model = openvino.convert_model(module.eval(), example_input=example)
    model.reshape({i: list(tensor.shape) for i, tensor in enumerate(example)})
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(*inputs: Any) -> Any:
        return torch.from_numpy(request.infer([x.contiguous().numpy() for x in inputs])[0].copy())

    return run


def _wrapped(inner: Any, method: str = "__call__") -> Any:
    """Return a module that takes tensors and returns the first output of a method of `inner`."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: Any) -> Any:
            return getattr(self.inner, method)(*tensors, return_dict=False)[0]

    return Wrapped()
