"""Tiny pipelines of diffusers with random weights, of several classes, saved as folders."""

import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

WORDS = ("a", "red", "blue", "apple", "house", "photo", "of", "dog", "boat", "tree", "cat", "sea")
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_pipeline(kind: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Save a pipeline: `sd`, `sdxl`, `flux`, `sana`, `z-image` or `pixart`."""
    import torch

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = PIPELINES[kind](**options)
        spread(pipeline, seed)
        pipeline.save_pretrained(folder)
    return folder


def spread(pipeline: Any, seed: int) -> None:
    """Make the weights of the decoder so large that pictures are not all gray."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    layer = pipeline.vae.decoder.conv_out
    layer = getattr(layer, "conv", layer)
    with torch.no_grad():
        layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=generator))


def tokenizer(length: int = 16) -> Any:
    """Make a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<unk>", "<s>", "</s>", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
    )
    made.chat_template = CHAT
    return made


def clip_text(projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=32, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, pad_token_id=0)
    )


def kl_autoencoder(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": [8, 8], "in_channels": 3, "out_channels": 3, "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 32, **options,
        }
    )  # fmt: skip


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 16, "in_channels": 4,
            "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, "norm_num_groups": 2,
            "attention_head_dim": 4, **options,
        }
    )  # fmt: skip


def stable_diffusion(safety_checker: Any = None) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=kl_autoencoder(), text_encoder=clip_text(), tokenizer=tokenizer(), unet=unet(),
        scheduler=DDIMScheduler(), safety_checker=safety_checker and safety_checker[0],
        feature_extractor=safety_checker and safety_checker[1], requires_safety_checker=safety_checker is not None,
    )  # fmt: skip


def flagging_checker(flags: bool) -> Any:
    """Make a safety checker that flags everything, or nothing; and its feature extractor."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    config = CLIPConfig(
        projection_dim=16,
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8, "projection_dim": 16,
        },
    )  # fmt: skip
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        for name in ("concept_embeds_weights", "special_care_embeds_weights"):
            getattr(checker, name).fill_(-2.0 if flags else 2.0)
    return checker, CLIPImageProcessor(crop_size=16, size={"shortest_edge": 16})


def stable_diffusion_xl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=kl_autoencoder(), text_encoder=clip_text(), text_encoder_2=clip_text(projection=True),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), scheduler=EulerDiscreteScheduler(),
        unet=unet(
            cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80, transformer_layers_per_block=1, use_linear_projection=True,
        ),
        add_watermarker=False,
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=clip_text(), text_encoder_2=t5_text(),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), vae=kl_autoencoder(shift_factor=0.0, scaling_factor=1.0),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        ),
    )  # fmt: skip


def sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    return SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=32, hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, head_dim=8, pad_token_id=0, max_position_embeddings=32,
            )
        ),
        vae=AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
            downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
            decoder_act_fns="silu", scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
            sample_size=16,
        ),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    )  # fmt: skip


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_autoencoder(shift_factor=0.0, scaling_factor=1.0, latent_channels=16),
        tokenizer=tokenizer(64),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
            )
        ),
        transformer=ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=1, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0,
            axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
    )  # fmt: skip


PIPELINES = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "flux": flux,
    "sana": sana,
    "z-image": z_image,
}
