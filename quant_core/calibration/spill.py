"""Tensors between the blocks of a replayed network: in main memory up to a budget, the others on disk."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..store.safe import open_safetensors


def free_memory() -> int:
    """Bytes of main memory that are free; 4 GiB where nobody says. psutil comes with ComfyUI and with
    accelerate."""
    try:
        import psutil
    except ImportError:
        return 4 << 30
    return psutil.virtual_memory().available


class Spill:
    """{name: tensor on the CPU}, `memory` bytes of them in main memory and what comes after in files of
    `folder`. in_memory, on_disk: bytes held now; `most`: the largest that each has been."""

    def __init__(self, folder: Path, memory: int):
        self.folder, self.memory = Path(folder), memory
        self.in_memory, self.on_disk, self.most = 0, 0, (0, 0)
        self._held: dict[str, torch.Tensor] = {}
        self._files: dict[str, tuple[Path, int]] = {}
        self._written = 0

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self._files

    def put(self, name: str, tensor: torch.Tensor):
        """Takes a tensor that nobody changes any more, in the place of the one of that name. Raises OSError
        where the disk is full."""
        self.drop(name)
        if self.in_memory + tensor.nbytes <= self.memory:
            self._held[name] = tensor
            self.in_memory += tensor.nbytes
        else:
            path = self.folder / f"{self._written}.safetensors"
            self._written += 1
            self._files[name] = path, tensor.nbytes
            try:
                save_file({"x": tensor.contiguous()}, path)
            except Exception as error:  # safetensors has an error of its own for a full disk
                raise OSError(f"{path}: cannot be written ({error})") from error
            self.on_disk += tensor.nbytes
        self.most = max(self.most[0], self.in_memory), max(self.most[1], self.on_disk)

    def get(self, name: str) -> torch.Tensor:
        """A tensor that is not to be changed."""
        return (
            self._held[name] if name in self._held else open_safetensors(self._files[name][0]).get_tensor("x")
        )

    def drop(self, name: str):
        """Forgets a tensor, if it is there."""
        if name in self._held:
            self.in_memory -= self._held.pop(name).nbytes
        elif name in self._files:
            path, size = self._files.pop(name)
            self.on_disk -= size
            path.unlink(missing_ok=True)

    def clear(self):
        """Forgets all."""
        for name in (*self._held, *self._files):
            self.drop(name)
