"""Random nunchaku files with all that they hold in natural order beside it. Places of single elements,
written from where a warp's lanes keep them (mma.m16n8k64) and how the kernel of the modulation layers takes a
word apart; they take integers and tensors of them."""

import json

import torch
from safetensors.torch import save_file

STACKED = ("to_qkv", "add_qkv_proj", "feed_forward.net.0.proj")  # rows of several layers


def weight_place(n, k, channels):
    """(byte, shift) of the code (n, k) of a layer with so many in-channels."""
    tile = (
        n // 128 * (channels // 64) + k // 64
    )  # 128 x 64 codes are 1024 words, 128 for each 16 out-channels
    lane = n % 8 * 4 + k % 32 // 8  # 32 lanes, with a load of four words each
    register = n % 16 // 8 * 2 + k % 64 // 32
    word = tile * 1024 + n % 128 // 16 * 128 + lane * 4 + register
    return word * 4 + k % 8 // 2, k % 2 * 4


def scale_place(g, n, groups):
    """Index of the scale of group g and out-channel n."""
    lane, pair = (
        n % 128 // 16 * 4 + n % 8 // 2,
        n % 16 // 8 * 2 + n % 2,
    )  # a lane loads 4: channels 2 c, 2 c + 1 and those 8 further
    return (n // 128 * groups + g) * 128 + lane * 4 + pair


def micro_place(n, g, groups):
    """Index of the e4m3 scale of out-channel n and group g of 16 channels: a lane loads four words, of rows
    that are 32 apart, and each has the four scales of 64 channels."""
    tile = n // 128 * (groups // 4) + g // 4  # 32 lanes of 16 bytes
    lane = n % 8 * 4 + n % 32 // 8
    return (tile * 32 + lane) * 16 + n % 128 // 32 * 4 + g % 4


def fragment_place(row, column, block):
    """Index of an element of a matrix of 16 x 16 fragments; block: index of its fragment."""
    lane = row % 8 * 4 + column % 8 // 2
    register = row % 16 // 8 * 2 + column % 16 // 8  # of two 16-bit values
    return block * 256 + lane * 8 + register * 2 + column % 2


def awq_place(n, k, channels):
    """(word, shift) of the code (n, k): rows in fours, 64 channels of each in turn, in halves of 32 that are
    four words."""
    segment = (n // 4 * (channels // 64) + k // 64) * 8 + n % 4 * 2 + k % 64 // 32
    i, word, pair = k % 32 // 8, k % 8 // 2, k % 2
    return segment * 4 + word, 4 * i + 16 * pair


def stored_weight(codes):
    n, k = codes.shape
    byte, shift = weight_place(*_grid(n, k), k)
    return (
        torch.zeros(n * k // 2, dtype=torch.int64)
        .index_add_(0, byte.flatten(), ((codes.long() & 15) << shift).flatten())
        .to(torch.uint8)
        .view(torch.int8)
        .view(n, k // 2)
    )


def stored_scale(scale):
    """(G, N)."""
    out = torch.empty(scale.numel(), dtype=scale.dtype)
    out[scale_place(*_grid(*scale.shape), len(scale)).flatten()] = scale.flatten()
    return out.view_as(scale)


def stored_micro(scale):
    """(N, G) -> nominally (G, N)."""
    n, groups = scale.shape
    out = torch.empty(scale.numel(), dtype=torch.uint8)
    out[micro_place(*_grid(n, groups), groups).flatten()] = scale.view(torch.uint8).flatten()
    return out.view(torch.float8_e4m3fn).view(groups, n)


def stored_down(down):
    """(K, R): ranks are the rows of the fragment."""
    c, r = _grid(*down.shape)
    return _stored_fragments(down, fragment_place(r, c, c // 16 * (down.shape[1] // 16) + r // 16))


def stored_up(up):
    """(N, R)."""
    c, r = _grid(*up.shape)
    return _stored_fragments(up, fragment_place(c, r, c // 16 * (up.shape[1] // 16) + r // 16))


def stored_awq(codes):
    n, k = codes.shape
    word, shift = awq_place(*_grid(n, k), k)
    words = torch.zeros(n * k // 8, dtype=torch.int64).index_add_(
        0, word.flatten(), (codes.long() << shift).flatten()
    )
    return words.to(torch.int32).view(n // 4, k // 2)  # wraps where the top bit is set


def _stored_fragments(matrix, place):
    out = torch.empty(matrix.numel(), dtype=matrix.dtype)
    out[place.flatten()] = matrix.flatten()
    return out.view_as(matrix)


def _grid(*sizes):
    return torch.meshgrid(*(torch.arange(s) for s in sizes), indexing="ij")


class Maker:
    """file: {key: tensor} in new names; natural: {module: its tensors in natural order}. fp4: NVFP4, with
    wcscales where rows of several layers are stacked and wtscale elsewhere, as deepcompressor has it."""

    def __init__(self, seed=0, dtype=torch.bfloat16, rank=16, fp4=False):
        self.g, self.dtype, self.rank, self.file, self.natural = (
            torch.Generator().manual_seed(seed),
            dtype,
            rank,
            {},
            {},
        )
        self.fp4 = fp4

    def randn(self, *shape, std=1.0):
        return (torch.randn(*shape, generator=self.g) * std).to(self.dtype)

    def uniform(self, *shape, low, high):
        return (torch.rand(*shape, generator=self.g) * (high - low) + low).to(self.dtype)

    def linear(self, name, n, k, bias=True, smooth=None, zero_bias=False):
        """A W4A4 module."""
        own = (self._e2m1(name, n, k) if self.fp4 else self._integers(n, k)) | {
            "smooth": self.uniform(k, low=0.5, high=2.0) if smooth is None else smooth,
            "down": self.randn(k, self.rank, std=k**-0.5),
            "up": self.randn(n, self.rank),
        }
        if bias:
            own["bias"] = torch.zeros(n, dtype=self.dtype) if zero_bias else self.randn(n)
        self.natural[name] = own
        if self.fp4:
            self.file[f"{name}.wscales"] = stored_micro(own["micro"])
            stacked = len(own["outer"]) == n
            outer = stored_scale(own["outer"][None])[0] if stacked else own["outer"]
            self.file[f"{name}.{'wcscales' if stacked else 'wtscale'}"] = outer
        else:
            self.file[f"{name}.wscales"] = stored_scale(own["scale"])
        self.file |= {
            f"{name}.qweight": stored_weight(own["codes"]),
            f"{name}.smooth_factor": stored_scale(own["smooth"][None])[0],
            f"{name}.smooth_factor_orig": stored_scale(own["smooth"][None])[0],
            f"{name}.proj_down": stored_down(own["down"]),
            f"{name}.proj_up": stored_up(own["up"]),
        } | ({f"{name}.bias": stored_scale(own["bias"][None])[0]} if bias else {})

    def _integers(self, n, k):
        codes = torch.randint(-8, 8, (n, k), generator=self.g)
        return {"codes": codes, "scale": self.uniform(k // 64, n, low=0.1, high=0.3)}

    def _e2m1(self, name, n, k):
        """outer: (N,), or (1,) of a layer of its own."""
        return {
            "codes": torch.randint(0, 16, (n, k), generator=self.g),
            "micro": self.uniform(n, k // 16, low=40, high=448).to(torch.float8_e4m3fn),
            "outer": self.uniform(n if name.endswith(STACKED) else 1, low=0.0003, high=0.0009),
        }

    def modulation(self, name, n, k, splits, zero_point=7):
        """A W4A16 module; `natural` has its rows in the model's order and the model's bias."""
        scale = self.uniform(n, k // 64, low=0.01, high=0.03)
        points = zero_point if zero_point is not None else torch.randint(0, 16, scale.shape, generator=self.g)
        own = {
            "codes": torch.randint(0, 16, (n, k), generator=self.g),
            "scale": scale,
            "zero": (-scale.float() * points).to(self.dtype),
            "bias": (torch.randint(-64, 65, (n,), generator=self.g) / 128).to(
                self.dtype
            ),  # b and b + 1 exact in bf16
        }
        self.natural[name] = own
        order = [i * (n // splits) + c for c in range(n // splits) for i in range(splits)]
        plus = torch.zeros(splits, n // splits)
        plus[[1, 4] if splits == 6 else [1]] = 1
        self.file |= {
            f"{name}.qweight": stored_awq(own["codes"][order]),
            f"{name}.wscales": own["scale"][order].T.contiguous(),
            f"{name}.wzeros": own["zero"][order].T.contiguous(),
            f"{name}.bias": (own["bias"].float() + plus.flatten())[order].to(self.dtype),
        }

    def plain(self, name, *shape, bias=True, leaf="weight"):
        self.file[f"{name}.{leaf}"] = self.randn(*shape, std=shape[-1] ** -0.5)
        if bias:
            self.file[f"{name}.bias"] = self.randn(shape[0], std=0.1)


def flux(
    hidden=128, double=1, single=1, one_smoothing=True, zero_point=7, seed=0, context=64, pooled=64, fp4=False
):
    """FLUX.1 in the names of nunchaku's Python modules, heads of 128."""
    m, h = Maker(seed, fp4=fp4), hidden
    for name, width in (("x_embedder", 64), ("context_embedder", context)):
        m.plain(name, h, width)
    for name, width in (("timestep", 256), ("text", pooled), ("guidance", 256)):
        m.plain(f"time_text_embed.{name}_embedder.linear_1", h, width)
        m.plain(f"time_text_embed.{name}_embedder.linear_2", h, h)
    m.plain("norm_out.linear", 2 * h, h)
    m.plain("proj_out", 64, h)
    for b in range(double):
        p = f"transformer_blocks.{b}."
        for stream in ("", "_context"):
            m.modulation(f"{p}norm1{stream}.linear", 6 * h, h, 6, zero_point)
            m.linear(f"{p}ff{stream}.net.0.proj", 4 * h, h)
            m.linear(f"{p}ff{stream}.net.2", h, 4 * h)
        for name in ("to_qkv", "add_qkv_proj"):
            m.linear(f"{p}attn.{name}", 3 * h, h)
        for name in ("to_out.0", "to_add_out"):
            m.linear(f"{p}attn.{name}", h, h)
        for name in ("q", "k", "added_q", "added_k"):
            m.plain(f"{p}attn.norm_{name}", 128, bias=False)
    for b in range(single):
        p = f"single_transformer_blocks.{b}."
        m.modulation(f"{p}norm.linear", 3 * h, h, 3, zero_point)
        m.linear(f"{p}attn.to_qkv", 3 * h, h)
        smooth = m.natural[f"{p}attn.to_qkv"]["smooth"] if one_smoothing else None
        m.linear(f"{p}mlp_fc1", 4 * h, h, smooth=smooth)
        m.linear(
            f"{p}attn.to_out", h, h, zero_bias=True
        )  # deepcompressor leaves the bias of the sum to the second
        m.linear(f"{p}mlp_fc2", h, 4 * h)
        for name in ("q", "k"):
            m.plain(f"{p}attn.norm_{name}", 128, bias=False)
    return m


def qwen_image(hidden=128, blocks=1, seed=0, fp4=False):
    m, h = Maker(seed, fp4=fp4), hidden
    for name, shape in {
        "img_in": (h, 64),
        "txt_in": (h, 192),
        "proj_out": (64, h),
        "norm_out.linear": (2 * h, h),
    }.items():
        m.plain(name, *shape)
    m.plain("txt_norm", 192, bias=False)
    m.plain("time_text_embed.timestep_embedder.linear_1", h, 256)
    m.plain("time_text_embed.timestep_embedder.linear_2", h, h)
    for b in range(blocks):
        p = f"transformer_blocks.{b}."
        for stream in ("img", "txt"):
            m.modulation(f"{p}{stream}_mod.1", 6 * h, h, 6)
            m.linear(f"{p}{stream}_mlp.net.0.proj", 4 * h, h)
            m.linear(f"{p}{stream}_mlp.net.2", h, 4 * h)
        for name, n in {"to_qkv": 3 * h, "add_qkv_proj": 3 * h, "to_out.0": h, "to_add_out": h}.items():
            m.linear(f"{p}attn.{name}", n, h)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            m.plain(f"{p}attn.{name}", 128, bias=False)
    return m


def z_image(hidden=128, inner=256, layers=1, refiners=False, seed=0, fp4=False):
    """refiners: whether they are quantized; in 16 bit their MLPs are in nunchaku's form all the same."""
    m, h = Maker(seed, fp4=fp4), hidden
    m.plain("all_x_embedder.2-1", h, 64)
    m.plain("all_final_layer.2-1.linear", 64, h)
    m.plain("all_final_layer.2-1.adaLN_modulation.1", h, 256)
    m.plain("cap_embedder.0", 192, bias=False)
    m.plain("cap_embedder.1", h, 192)
    m.plain("t_embedder.mlp.0", 1024, 256)
    m.plain("t_embedder.mlp.2", 256, 1024)
    for name in ("x_pad_token", "cap_pad_token"):
        m.file[name] = m.randn(1, h)
    stems = {"layers": layers, "noise_refiner": 1, "context_refiner": 1}
    for p, stem in ((f"{s}.{b}.", s) for s, n in stems.items() for b in range(n)):
        if stem == "layers" or refiners:
            m.linear(f"{p}attention.to_qkv", 3 * h, h, bias=False)
            m.linear(f"{p}attention.to_out.0", h, h, bias=False)
            m.linear(f"{p}feed_forward.net.0.proj", 2 * inner, h, bias=False)
            m.linear(f"{p}feed_forward.net.2", h, inner, bias=False)
        else:
            for name, shape in {"to_q": (h, h), "to_k": (h, h), "to_v": (h, h), "to_out.0": (h, h)}.items():
                m.plain(f"{p}attention.{name}", *shape, bias=False)
            m.plain(f"{p}feed_forward.net.0.proj", 2 * inner, h, bias=False)
            m.plain(f"{p}feed_forward.net.2", h, inner, bias=False)
        for name in ("attention.norm_q", "attention.norm_k"):
            m.plain(f"{p}{name}", 128, bias=False)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            m.plain(f"{p}{name}", h, bias=False)
        if stem != "context_refiner":
            m.plain(f"{p}adaLN_modulation.0", 4 * h, 256)
    return m


def sdxl(hidden=128, seed=0, fp4=False):
    """A U-Net of two levels with one transformer each in the second and the middle: too small for ComfyUI,
    whole for its names."""
    m, h = Maker(seed, fp4=fp4), hidden
    convolution = lambda name, out, inp, size=3: m.plain(name, out, inp, size, size)
    convolution("conv_in", h, 4)
    convolution("conv_out", 4, h)
    m.plain("conv_norm_out", h)
    for name in (
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "add_embedding.linear_1",
        "add_embedding.linear_2",
    ):
        m.plain(name, h, h)
    for p in (
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
    ):
        for norm, conv in (("norm1", "conv1"), ("norm2", "conv2")):
            m.plain(f"{p}.{norm}", h)
            convolution(f"{p}.{conv}", h, h)
        m.plain(f"{p}.time_emb_proj", h, h)
    convolution("down_blocks.0.downsamplers.0.conv", h, h)
    for p in ("down_blocks.1.attentions.0", "mid_block.attentions.0"):
        m.plain(f"{p}.norm", h)
        m.plain(f"{p}.proj_in", h, h)
        m.plain(f"{p}.proj_out", h, h)
        t = f"{p}.transformer_blocks.0."
        for name in ("norm1", "norm2", "norm3"):
            m.plain(f"{t}{name}", h)
        m.linear(f"{t}attn1.to_qkv", 3 * h, h, bias=False)
        m.linear(f"{t}attn2.to_q", h, h, bias=False)
        m.plain(f"{t}attn2.to_k", h, 192, bias=False)
        m.plain(f"{t}attn2.to_v", h, 192, bias=False)
        for name, n, k in (
            ("attn1.to_out.0", h, h),
            ("attn2.to_out.0", h, h),
            ("ff.net.0.proj", 8 * h, h),
            ("ff.net.2", h, 4 * h),
        ):
            m.linear(f"{t}{name}", n, k)
    return m


_OLD = {
    "attn.to_qkv": "qkv_proj", "attn.add_qkv_proj": "qkv_proj_context", "attn.to_out.0": "out_proj",
    "attn.to_out": "out_proj",
    "attn.to_add_out": "out_proj_context", "ff.net.0.proj": "mlp_fc1", "ff.net.2": "mlp_fc2",
    "ff_context.net.0.proj": "mlp_context_fc1",
    "ff_context.net.2": "mlp_context_fc2", "attn.norm_q": "norm_q", "attn.norm_k": "norm_k",
    "attn.norm_added_q": "norm_added_q",
    "attn.norm_added_k": "norm_added_k",
}  # fmt: skip
_OLD_LEAVES = {
    "proj_down": "lora_down",
    "proj_up": "lora_up",
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
}


def old_names(file, modules=True):
    """The file's tensors under the names of nunchaku's C++ modules; only their leaves without `modules`."""
    out = {}
    for key, tensor in file.items():
        module, _, leaf = key.rpartition(".")
        stem, block, name = ("", "", module) if "transformer_blocks." not in module else _cut(module)
        name = _OLD.get(name, name) if modules else name
        out[f"{stem}{block}{name}.{_OLD_LEAVES.get(leaf, leaf)}".lstrip(".")] = tensor
    return out


def _cut(module):
    stem, _, rest = module.partition("transformer_blocks.")
    index, _, name = rest.partition(".")
    return stem, f"transformer_blocks.{index}.", name


INT4 = {
    "quantization_config": json.dumps(
        {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 16}
    )
}
FP4 = {
    "quantization_config": json.dumps(
        {
            "method": "svdquant",
            "weight": {
                "dtype": "fp4_e2m1_all",
                "scale_dtype": [None, "fp8_e4m3_nan"],
                "group_size": 16,
            },
            "activation": {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16},
            "rank": 16,
        }
    )
}
D, S = "transformer_blocks.0.", "single_transformer_blocks.0."


def write(folder, file, metadata=INT4, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(
        {k: t.clone(memory_format=torch.contiguous_format) for k, t in file.items()},
        folder / name,
        metadata=metadata,
    )
    return folder / name


def gelu_tokens(k):
    return torch.nn.functional.gelu(
        torch.randn(24, k, generator=torch.Generator().manual_seed(1)), approximate="tanh"
    )


def tokens(k):
    return torch.randn(24, k, generator=torch.Generator().manual_seed(1))
