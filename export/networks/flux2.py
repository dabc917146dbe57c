"""diffusers' `Flux2Transformer2DModel` as the graph that runs once for each step, and the VAE of FLUX.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import Precision, TensorInfo
from ..checkpoints.configs import NUMBER, SCALE
from ..graph import Graph, inward, network_dtype, outward
from .autoencoder import AUTOENCODER_KL
from .autoencoder import LAYOUT as VAE_LAYOUT
from .flux import FLUX_TRANSFORMER, LAYOUT, STACKS
from .packed import Rotary, frequencies, grid, rotary
from .parts import diffusers_part


class Denoiser(nn.Module):
    """The transformer on latents of any size; positions, rotations and embedded numbers are float32."""

    transformer: Any

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.frequencies = frequencies(transformer.config.axes_dims_rope, transformer.config.rope_theta)

    def forward(self, model_input: Tensor, timestep: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Return the prediction [R, C, h, w]."""
        net, inside = self.transformer, self.transformer.dtype
        height, width = model_input.shape[2:]
        image = net.x_embedder(inward(model_input, inside).flatten(2).transpose(1, 2))
        text = net.context_embedder(inward(context, inside))
        embedded = self._embedded(timestep / 1000 * 1000, guidance)  # both are diffusers', and rounded
        turns, length = self._turns(text.shape[1], height, width), text.shape[1]
        beside = (net.double_stream_modulation_img(embedded), net.double_stream_modulation_txt(embedded))
        for block in net.transformer_blocks:
            text, image = block(image, text, *beside, image_rotary_emb=turns)
        both, modulation = torch.cat([text, image], dim=1), net.single_stream_modulation(embedded)
        for block in net.single_transformer_blocks:
            both = block(both, None, modulation, image_rotary_emb=turns)
        tokens = net.proj_out(net.norm_out(both[:, length:], embedded))
        return outward(tokens.transpose(1, 2).unflatten(2, (height, width)))

    def _embedded(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the embedding [R, E] of timesteps, and of guidance scales where the transformer reads them."""
        embed, inside = self.transformer.time_guidance_embed, self.transformer.dtype
        result: Tensor = embed.timestep_embedder(embed.time_proj(timestep).to(inside))
        if guidance is not None:
            result = result + embed.guidance_embedder(embed.time_proj(guidance[:, 0] * 1000).to(inside))
        return result

    def _turns(self, length: int, height: int, width: int) -> Rotary:
        """Return the rotary embedding of text on the last axis and of the picture on rows and columns."""
        rows, columns = (torch.cat([torch.zeros(length), each]) for each in grid(height, width))
        words = torch.cat([torch.arange(length).float(), torch.zeros(height * width)])
        return rotary((torch.zeros_like(rows), rows, columns, words), self.frequencies)


def denoiser_graph(transformer: Any, length: int, precision: Precision) -> Graph:
    """Noisy latents [R, C, h, w], timesteps [R] and conditioning [R, L, E] to the prediction [R, C, h, w].

    A transformer with an embedded guidance scale reads that as well, [R, 1].
    """
    config, dtype = transformer.config, network_dtype(precision)
    latents = ("R", config.in_channels, "h", "w")
    inputs = [
        TensorInfo(name="model_input", dtype=dtype, shape=latents),
        TensorInfo(name="timestep", dtype="float32", shape=("R",)),
        TensorInfo(name="context", dtype=dtype, shape=("R", "L", config.joint_attention_dim)),
    ]
    if config.guidance_embeds:
        inputs.append(TensorInfo(name="guidance", dtype="float32", shape=("R", 1)))
    return Graph(
        "denoiser",
        "step",
        Denoiser(transformer),
        tuple(inputs),
        (TensorInfo(name="prediction", dtype=dtype, shape=latents),),
        limits={"timestep": 1000} | ({"guidance": 10} if config.guidance_embeds else {}),
        usual={"L": length},
    )


class SquaresDecoder(nn.Module):
    """FLUX.2's VAE, the half that decodes, as one with cells of four: `autoencoder.decoder_graph` takes it.

    Its batch norm, which is fixed, stands in the config as mean and deviation of each channel.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.config = type(vae.config)(
            {
                **vae.config,
                "latent_channels": vae.bn.num_features,
                "block_out_channels": [1, *vae.config.block_out_channels],
                "scaling_factor": 1.0,
                "shift_factor": 0.0,
                "latents_mean": vae.bn.running_mean.tolist(),
                "latents_std": (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().tolist(),
            }
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        """Return the pictures [B, 3, H, W] of latents [B, 4·C, h, w]."""
        cells = nn.functional.pixel_shuffle(latents, 2)
        return (self.decoder(cells if self.post_quant_conv is None else self.post_quant_conv(cells)),)


def _without_count(vae: Any) -> nn.Module:
    """Return the VAE without the count of its batch norm, a whole number that nothing reads."""
    vae.bn.num_batches_tracked = None
    network: nn.Module = vae
    return network


FLUX2_TRANSFORMER = diffusers_part(
    "Flux2Transformer2DModel",
    "transformers.transformer_flux2",
    LAYOUT | {"rope_theta": SCALE},
    depth=FLUX_TRANSFORMER.depth,
    stacks=STACKS,
)

FLUX2_VAE = diffusers_part(
    "AutoencoderKLFlux2",
    "autoencoders.autoencoder_kl_flux2",
    VAE_LAYOUT | {"batch_norm_eps": NUMBER},
    mended=_without_count,
    depth=AUTOENCODER_KL.depth,
)
