"""The modules that are traced: a network with the conversions at its border, and attention as one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """CLIP's last hidden state, after the final layer norm."""

    encoder: Any

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the conditioning [R, L, E] of token ids [R, L]."""
        return self.encoder(token_ids, return_dict=False)[0]


class Denoiser(nn.Module):
    """The U-Net; its timestep embedding is computed in float32 whatever its own precision."""

    unet: Any

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, model_input: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Return the prediction [R, C, h, w]."""
        return self.unet(model_input, timestep, context, return_dict=False)[0]


class Decoder(nn.Module):
    """The VAE's decoder with everything between latents and a picture."""

    vae: Any

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None  # the other half of the weights
        self.vae = vae
        self.scale: float = vae.config.scaling_factor
        self.shift: float = vae.config.shift_factor or 0.0

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pictures of latents [B, C, h, w]: bytes and floats in [0, 1], both [B, H, W, 3]."""
        latents = latents / self.scale + self.shift if self.shift else latents / self.scale
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        pixels = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (pixels * 255).round().to(torch.uint8), pixels


class ImageEncoder(nn.Module):
    """The VAE's encoder with everything between a picture and the moments of its latents."""

    vae: Any

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.decoder = vae.post_quant_conv = None  # the other half of the weights
        self.vae = vae
        self.scale: float = vae.config.scaling_factor
        self.shift: float = vae.config.shift_factor or 0.0

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [B, C, h, w] of the latents of pictures [B, H, W, 3] in bytes."""
        pixels = (image.float() / 255 * 2 - 1).permute(0, 3, 1, 2)
        moments = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        mean, std = moments.mean.float(), moments.std.float()
        return (mean - self.shift) * self.scale if self.shift else mean * self.scale, std * self.scale


class WholeAttention:
    """A diffusers attention processor that is traced to one ONNX `Attention` node on [R, L, heads·size] tensors."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return softmax(q·kᵀ/√size)·v after its projections; pictures [R, C, h, w] are attended to pixel by pixel."""
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention.group_norm is not None:
            hidden_states = attention.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attention.to_q(hidden_states)
        hidden_states = torch.onnx.ops.symbolic(
            "Attention",
            (query, attention.to_k(context), attention.to_v(context)),
            attrs={"q_num_heads": attention.heads, "kv_num_heads": attention.heads},
            dtype=query.dtype,
            shape=query.shape,
            version=23,
        )
        hidden_states = attention.to_out[0](hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attention.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attention.rescale_output_factor
