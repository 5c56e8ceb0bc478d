"""Large weights in chunks of rows, and energies in dB."""

import torch

# Rows are worked on in chunks of 2 M weights, 8 MB in fp32, whatever the width of the layer: small enough for
# the allocator to reuse. A 21504 x 3072 layer takes 12 s on two CPU cores so, 31 s with chunks of 16 M.
CHUNK = 2 * 2**20
# On a card a chunk is a launch, and 128 MB are soon read.
ON_A_CARD = 32 * 2**20


def row_chunks(rows: int, columns: int, *, device: torch.device | None = None) -> list[slice]:
    """Slices of rows of at most CHUNK weights, ON_A_CARD of them on any device but the CPU; None is one."""
    most = CHUNK if device is None or device.type == "cpu" else ON_A_CARD
    step = max(64, most // columns)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def power_db(signal: float, noise: float) -> float:
    """Signal to noise ratio in dB of two energies."""
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-30) / max(noise, 1e-30), dtype=torch.float64)))
