"""Function-preserving outliers of a PixArt, of another kind than FLUX's in `outliers.py`: factors of
channels with a heavy tail, many of them middling, and text tokens that are massive as those of registers
are."""

import torch

SIZE = 50  # of a massive token at severity 1, in norms of the largest word


def channel_factors(width: int, severity: float, seed: int) -> torch.Tensor:
    """(width,) factors (1 + |t|)^(1.5 severity), t of Student's distribution with two degrees of freedom: at
    severity 1 half are above 2.4 and one in 40 above 20; the largest of 192 is about 90, and in one draw of
    50 above 1,000, as it is at fc1 with seed 0. Severity 0: ones."""
    normal = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    student = normal[0] / (normal[1:].square().mean(0)).sqrt()
    return (1 + student.abs()) ** (1.5 * severity)


def add_outliers(
    state_dict: dict, severity: float, words: torch.Tensor, massive: torch.Tensor, seed: int = 0
) -> dict:
    """A PixArt state dict (ComfyUI's keys) -> one that is equivalent for texts of these words, fp32.

    words: (V, text channels), all rows that a text can have; massive: (V,) bool, which of them become
    massive.

    adaLN-single adds a table of the block to a vector of the time step that all blocks share, so the
    factors of the inputs of qkv, and of fc1, are the same in every block, as the outlier channels of big
    models are: with (1 + table + t) n + shift, channel j is scaled by c with table' = c table + c - 1 and c
    times the rest. Factors of v are undone in the out-projection, in both attentions; those of the text in
    all keys and values. Raises ValueError where the words leave no direction free for what makes tokens
    massive.
    """
    out = {k: v.float().clone() for k, v in state_dict.items()}
    width = out["x_embedder.proj.weight"].shape[0]
    blocks = sorted({".".join(k.split(".")[:2]) for k in out if k.startswith("blocks.")})
    seeds = iter(range(1000 * seed + 1, 1000 * seed + 1000))
    factors = lambda: channel_factors(width, severity, next(seeds))

    def through_adaln(first, consumer):
        """first: of the table's rows, the shift; the scale comes behind it."""
        c = factors()
        for row in (first, first + 1):
            rows = slice(row * width, (row + 1) * width)
            out["t_block.1.weight"][rows] *= c[:, None]
            out["t_block.1.bias"][rows] *= c
            for block in blocks:
                out[f"{block}.scale_shift_table"][row] *= c
        for block in blocks:
            out[f"{block}.scale_shift_table"][first + 1] += c - 1
            out[f"{block}.{consumer}.weight"] /= c

    def through_v(producer, consumer):
        c = factors()
        out[f"{producer}.weight"][-width:] *= c[:, None]
        out[f"{producer}.bias"][-width:] *= c
        out[f"{consumer}.weight"] /= c

    _make_massive(out, [f"{block}.cross_attn.kv_linear" for block in blocks], words, massive, SIZE * severity)
    through_adaln(0, "attn.qkv")
    through_adaln(3, "mlp.fc1")
    for block in blocks:
        through_v(f"{block}.attn.qkv", f"{block}.attn.proj")
        through_v(f"{block}.cross_attn.kv_linear", f"{block}.cross_attn.proj")
    c = factors()
    out["y_embedder.y_proj.fc2.weight"] *= c[:, None]
    out["y_embedder.y_proj.fc2.bias"] *= c
    for block in blocks:
        out[f"{block}.cross_attn.kv_linear.weight"] /= c
    return out


def _make_massive(out, consumers, words, massive, size):
    """Adds a long vector to the embedding of some words, along a direction that no word's embedding has a
    share of: the consumers are made blind to it, and lose nothing. It is the one of these directions that
    is nearest to a channel."""
    if size == 0:
        return
    fc1, fc2 = (
        {k: out[f"y_embedder.y_proj.{n}.{k}"].double() for k in ("weight", "bias")} for n in ("fc1", "fc2")
    )
    hidden = torch.nn.functional.gelu(
        words.double() @ fc1["weight"].T + fc1["bias"],
        approximate="tanh",
    )
    embedded = hidden @ fc2["weight"].T + fc2["bias"]
    _, sizes, directions = torch.linalg.svd(embedded)
    taken = directions[: int((sizes > 1e-9 * sizes[0]).sum())]
    if len(taken) == embedded.shape[1]:
        raise ValueError(f"{len(words)} words leave none of {embedded.shape[1]} directions of the text free")
    free = torch.eye(embedded.shape[1], dtype=torch.float64) - taken.T @ taken
    channel = int(free.diagonal().argmax())
    along = free[channel] / free[channel].norm()
    length = size * embedded.norm(dim=1).max()
    known = torch.cat([hidden, torch.ones(len(words), 1, dtype=torch.float64)], 1)
    answer = torch.linalg.lstsq(
        known,
        length * massive.double()[:, None],
        driver="gelsd",
    ).solution[:, 0]
    out["y_embedder.y_proj.fc2.weight"] = (fc2["weight"] + torch.outer(along, answer[:-1])).float()
    out["y_embedder.y_proj.fc2.bias"] = (fc2["bias"] + along * answer[-1]).float()
    for name in consumers:
        weight = out[f"{name}.weight"].double()
        out[f"{name}.weight"] = (weight - torch.outer(weight @ along, along)).float()
