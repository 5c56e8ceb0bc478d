"""Small pipelines as diffusers saves them."""

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.evaluation.demo.pictures import TEXT_DIM

PROMPTS = ["small red circle", "large blue ring left on striped white background", "green cross"]
SPECIAL = ["<pad>", "</s>", "<unk>"]


WORDS = [*SPECIAL, *sorted({w for p in PROMPTS for w in p.split()})]


def tokenizer(length):
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **names)


def t5(width):
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )


def clip(width):
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    sizes = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), hidden_size=width, **sizes, **ids))


def vae(channels):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"latent_channels": channels, "block_out_channels": (4,) * 4, "norm_num_groups": 2}
    return AutoencoderKL(shift_factor=0.1, **sizes, **blocks)


def flux(state):
    transformer = tiny_flux.build()
    transformer.load_state_dict(tiny_flux.to_diffusers(state))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(16),
        text_encoder=clip(TEXT_DIM),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(TEXT_DIM),
        tokenizer_2=tokenizer(512),
        transformer=transformer,
    )


def pixart(state, layers=2):
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=layers,
        cross_attention_dim=128,
        caption_channels=32,
        sample_size=32,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(300),
        text_encoder=t5(32),
        vae=vae(4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
