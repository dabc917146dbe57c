"""Architectures of the models that are deployed most, as their authors publish them."""

from __future__ import annotations

from .architectures import SCHEDULER, SD15_TEXT, SD_VAE, Architecture, Config, Network, clip

SDXL_UNET: Config = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_G: Config = SD15_TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = Network(
    "transformers",
    "T5EncoderModel",
    {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "T5Config",
)
QWEN3_4B: Config = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
FLOW_VAE: Config = SD_VAE | {
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLOW: Config = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
DYNAMIC: Config = FLOW | {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"

LARGE: dict[str, Architecture] = {
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        {
            "text_encoder": clip(SD15_TEXT),
            "text_encoder_2": clip(CLIP_G, "CLIPTextModelWithProjection"),
            "unet": Network("diffusers", "UNet2DConditionModel", SDXL_UNET),
            "vae": Network("diffusers", "AutoencoderKL", SD_VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
        },
        {"tokenizer": "clip", "tokenizer_2": "clip!"},
        ("EulerDiscreteScheduler", SCHEDULER | {"prediction_type": "epsilon", "timestep_spacing": "leading"}),
        {"force_zeros_for_empty_prompt": True},
        "fp16",
    ),
    "flux1-dev": Architecture(
        "FluxPipeline",
        {
            "text_encoder": clip(SD15_TEXT),
            "text_encoder_2": T5_XXL,
            "transformer": Network(
                "diffusers",
                "FluxTransformer2DModel",
                {
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                    "axes_dims_rope": [16, 56, 56],
                },
            ),
            "vae": Network("diffusers", "AutoencoderKL", FLOW_VAE),
        },
        {"tokenizer": "clip", "tokenizer_2": "t5"},
        (FLOW_SCHEDULER, DYNAMIC),
        {},
        "bf16",
    ),
    "flux2-klein-4b": Architecture(
        "Flux2KleinPipeline",
        {
            "text_encoder": Network("transformers", "Qwen3ForCausalLM", QWEN3_4B, "Qwen3Config"),
            "transformer": Network(
                "diffusers",
                "Flux2Transformer2DModel",
                {
                    "in_channels": 128,
                    "num_layers": 5,
                    "num_single_layers": 20,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 7680,
                    "guidance_embeds": False,
                },
            ),
            "vae": Network("diffusers", "AutoencoderKLFlux2", {"sample_size": 1024}),
        },
        {"tokenizer": "qwen"},
        (FLOW_SCHEDULER, DYNAMIC),
        {"is_distilled": True},
        "bf16",
    ),
    "z-image-turbo": Architecture(
        "ZImagePipeline",
        {
            "text_encoder": Network("transformers", "Qwen3Model", QWEN3_4B, "Qwen3Config"),
            "transformer": Network("diffusers", "ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),
            "vae": Network("diffusers", "AutoencoderKL", FLOW_VAE),
        },
        {"tokenizer": "qwen"},
        (FLOW_SCHEDULER, FLOW),
        {},
        "bf16",
    ),
    "sd35-medium": Architecture(
        "StableDiffusion3Pipeline",
        {
            "text_encoder": clip(SD15_TEXT | {"projection_dim": 768}, "CLIPTextModelWithProjection"),
            "text_encoder_2": clip(CLIP_G, "CLIPTextModelWithProjection"),
            "text_encoder_3": T5_XXL,
            "transformer": Network(
                "diffusers",
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "caption_projection_dim": 1536,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": list(range(13)),
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": Network("diffusers", "AutoencoderKL", FLOW_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        },
        {"tokenizer": "clip", "tokenizer_2": "clip!", "tokenizer_3": "t5"},
        (FLOW_SCHEDULER, FLOW),
        {},
        "fp16",
    ),
}
"""SDXL base; FLUX.1-dev; FLUX.2-klein with 4 billion weights; Z-Image-Turbo; Stable Diffusion 3.5 medium."""
