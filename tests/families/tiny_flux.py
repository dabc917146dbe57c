"""Tiny checkpoints of diffusers' FLUX pipelines with random weights, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers

from .tiny import clip, clip_tokenizer, vae

TEXTS = ("a red circle on a blue background", "a photo of a star, a square and a triangle", "two circles of glass")


def t5_tokenizer() -> Any:
    """Return a T5 tokenizer of a small unigram model: padding 0, end 1, unknown 2, and no begin."""
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.normalizer = tokenizers.normalizers.NFKC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(TEXTS * 4, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.T5TokenizerFast(tokenizer_object=model, extra_ids=0, model_max_length=512)


def t5(vocab_size: int, **options: Any) -> Any:
    """Return a T5 encoder of the kind that FLUX has: gated, with a table of distances."""
    config = transformers.T5Config(
        vocab_size=vocab_size,
        **{"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, **options},
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


def flux(folder: Path, *, guided: bool = True, **options: Any) -> Path:
    """Write a tiny FLUX.1: dev, which reads a guidance scale, or schnell."""
    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    tokenizer_2 = t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guided,
        **options,
    ).eval()
    pipeline = diffusers.FluxPipeline(
        text_encoder=clip(size),
        text_encoder_2=t5(len(tokenizer_2)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        vae=vae(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
    )
    pipeline.save_pretrained(folder)
    return folder


CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""The part of Qwen3's chat template that a prompt goes through."""


def qwen_tokenizer() -> Any:
    """Return a Qwen tokenizer of a small byte-level vocabulary with the tokens of a conversation."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXTS * 4, trainer)
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    model.add_special_tokens(added)
    model.add_tokens(["<think>", "</think>"])
    tokenizer = transformers.Qwen2TokenizerFast(tokenizer_object=model, pad_token=added[0], eos_token=added[2])
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(vocab_size: int, layers: int, **options: Any) -> Any:
    """Return a Qwen3 language model whose queries share keys."""
    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        **{
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            **options,
        },
    )
    return transformers.Qwen3ForCausalLM(config).eval()


SAID = (
    "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' }}{%- else %}{{- '[INST]' }}{%- endif %}"
    "{%- for block in message['content'] %}{{- block['text'] }}{%- endfor %}"
    "{%- if message['role'] == 'system' %}{{- '[/SYSTEM_PROMPT]' }}{%- else %}{{- '[/INST]' }}{%- endif %}{%- endfor %}"
)
"""The part of Mistral's chat template that a system message and a prompt go through."""


def mistral_tokenizer(side: str) -> Any:
    """Return a tokenizer of a small byte-level vocabulary with Mistral's tokens of a conversation."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXTS * 4, trainer)
    added = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    model.add_special_tokens(added)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=added[0],
        bos_token=added[1],
        eos_token=added[2],
        padding_side=side,
        chat_template=SAID,
    )


def mistral3(vocab_size: int, layers: int) -> Any:
    """Return a Mistral3, which sees pictures too, whose queries share keys."""
    text = {
        "model_type": "mistral",
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": None,
    }
    sight = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=sight, image_token_index=3)
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def flux2_dev(folder: Path, *, side: str = "left") -> Path:
    """Write a tiny FLUX.2-dev, whose tokenizer fills rows up on a side."""
    torch.manual_seed(0)
    tokenizer = mistral_tokenizer(side)
    pipeline = diffusers.Flux2Pipeline(
        text_encoder=mistral3(len(tokenizer), 31),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=True),
        vae=flux2_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipeline.save_pretrained(folder)
    return folder


def flux2_transformer(**options: Any) -> Any:
    """Return a transformer that reads three layers of 16 numbers each."""
    return diffusers.Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        **options,
    ).eval()


def flux2_vae() -> Any:
    """Return a VAE with a batch norm that changes its latents."""
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=8,
        sample_size=64,
    ).eval()
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return autoencoder


def klein(folder: Path, *, distilled: bool = False, **options: Any) -> Path:
    """Write a tiny FLUX.2-klein: the base, or distilled."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    pipeline = diffusers.Flux2KleinPipeline(
        text_encoder=qwen3(len(tokenizer), 28),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=False, **options),
        vae=flux2_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=distilled,
    )
    pipeline.save_pretrained(folder)
    return folder
