"""Function-preserving outliers: the model computes the same, but its activations are as hard to quantize as a
big model's."""

import torch


def channel_factors(width: int, severity: float, seed: int) -> torch.Tensor:
    """(width,) log-normal factors with sigma 0.5 severity; one channel in 64 at (20 to 100)^severity.
    Severity 0: ones."""
    g = torch.Generator().manual_seed(seed)
    log = 0.5 * severity * torch.randn(width, generator=g)
    few = torch.randperm(width, generator=g)[: max(2, width // 64)]
    log[few] = severity * torch.empty(len(few)).uniform_(20, 100, generator=g).log()
    return log.exp()


def add_outliers(state_dict: dict, severity: float, seed: int = 0) -> dict:
    """A FLUX state dict (ComfyUI's keys) -> an equivalent one, fp32, with outlier channels at the inputs of
    qkv, mlp.0, linear1 (through adaLN's scale and shift) and proj, linear2 (through v).

    adaLN gives (1 + scale) n + shift: scaling channel j by c needs scale' = c scale + c - 1 and shift' = c
    shift, undone in column j of the next weight. The rows of v are scaled and the columns of the
    out-projection divided.
    """
    out = {k: v.float().clone() for k, v in state_dict.items()}
    width = out["img_in.weight"].shape[0]
    seeds = iter(range(1000 * seed + 1, 1000 * seed + 1000))

    def through_adaln(modulation, index, consumer):
        c = channel_factors(width, severity, next(seeds))
        shift = slice(index * width, (index + 1) * width)
        scale = slice((index + 1) * width, (index + 2) * width)
        for rows in (shift, scale):
            out[f"{modulation}.weight"][rows] *= c[:, None]
            out[f"{modulation}.bias"][rows] *= c
        out[f"{modulation}.bias"][scale] += c - 1
        out[f"{consumer}.weight"] /= c

    def through_v(producers, consumers):
        c = channel_factors(width, severity, next(seeds))
        for name in producers:
            out[f"{name}.weight"][2 * width : 3 * width] *= c[:, None]
            out[f"{name}.bias"][2 * width : 3 * width] *= c
        for name in consumers:
            out[f"{name}.weight"][:, :width] /= c

    for block in sorted({".".join(k.split(".")[:2]) for k in out if k.startswith("double_blocks.")}):
        for stream in ("img", "txt"):
            through_adaln(f"{block}.{stream}_mod.lin", 0, f"{block}.{stream}_attn.qkv")
            through_adaln(f"{block}.{stream}_mod.lin", 3, f"{block}.{stream}_mlp.0")
        through_v(
            [f"{block}.{s}_attn.qkv" for s in ("img", "txt")],
            [f"{block}.{s}_attn.proj" for s in ("img", "txt")],
        )
    for block in sorted({".".join(k.split(".")[:2]) for k in out if k.startswith("single_blocks.")}):
        through_adaln(f"{block}.modulation.lin", 0, f"{block}.linear1")
        through_v([f"{block}.linear1"], [f"{block}.linear2"])
    return out
