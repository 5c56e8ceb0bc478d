"""Small pipelines as diffusers saves them."""

from diffusers import (
    AutoencoderKL,
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
    return AutoencoderKL(latent_channels=channels, block_out_channels=(4,) * 4, norm_num_groups=2, **blocks)
