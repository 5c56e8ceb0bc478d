"""Global memory of separate buffers, and one CTA's shared memory; every access is checked."""

from dataclasses import dataclass

import numpy as np

from comfyui_nibble.tests.ptx.errors import MemoryFault

# Fills what was never written. As a float it is huge (bf16 and f32 1.3e36), as an integer large, as int4
# codes 7 and -5: it shows.
POISON = 0x7B

# Addresses above 2^32 show arithmetic that loses the upper half of a pointer.
FIRST_ADDRESS = 0x7F20_0000_0000
# Free space after each buffer, so that one buffer's overrun is not the next one's first bytes.
GAP = 1 << 20


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _check_alignment(addresses: np.ndarray, alignment: int, what: str):
    wrong = addresses % alignment != 0
    if wrong.any():
        raise MemoryFault(f"{what} at {int(addresses[wrong][0]):#x} is not aligned to {alignment} bytes")


def _check_count(addresses: np.ndarray, data: np.ndarray, what: str):
    if len(addresses) != len(data):
        raise ValueError(f"{what}: {len(addresses)} addresses for {len(data)} values")


@dataclass(frozen=True)
class Buffer:
    """One kernel argument: its bytes (the caller's array itself, not a copy) and the address the kernel
    sees."""

    name: str
    address: int
    data: np.ndarray
    writable: bool

    @property
    def end(self) -> int:
        return self.address + len(self.data)

    def distance(self, address: int, size: int) -> int:
        """How far an access reaches out of this buffer, in bytes."""
        return max(self.address - address, address + size - self.end, 0)


class GlobalMemory:
    """Buffers at addresses that lie far apart. Bytes are in and out as (accesses, size) arrays of uint8."""

    def __init__(self):
        self.buffers: list[Buffer] = []
        self._starts = np.zeros(0, np.int64)

    def add(self, array: np.ndarray, name: str) -> int:
        """The address of a new buffer; the kernel's stores change `array` itself."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: a buffer must be C-contiguous")
        address = FIRST_ADDRESS
        if self.buffers:
            address = (self.buffers[-1].end + GAP + 255) // 256 * 256
        self.buffers.append(Buffer(name, address, _as_bytes(array), bool(array.flags.writeable)))
        self._starts = np.array([b.address for b in self.buffers], np.int64)
        return address

    def load(self, addresses: np.ndarray, size: int, alignment: int | None = None) -> np.ndarray:
        """`size` bytes from each address, which must be a multiple of `alignment` (of `size` if not
        given)."""
        out = np.empty((len(addresses), size), np.uint8)
        for buffer, lanes in self._owners(addresses, size, alignment or size, "global load"):
            out[lanes] = buffer.data[self._places(buffer, addresses[lanes], size)]
        return out

    def store(self, addresses: np.ndarray, data: np.ndarray):
        """One row of `data` to each address."""
        _check_count(addresses, data, "global store")
        size = data.shape[1]
        for buffer, lanes in self._owners(addresses, size, size, "global store"):
            if not buffer.writable:
                raise MemoryFault(
                    f"global store of {size} bytes into {buffer.name}, whose array is read-only"
                )
            buffer.data[self._places(buffer, addresses[lanes], size)] = data[lanes]

    @staticmethod
    def _places(buffer: Buffer, addresses: np.ndarray, size: int) -> np.ndarray:
        return (addresses - buffer.address)[:, None] + np.arange(size)

    def _owners(self, addresses: np.ndarray, size: int, alignment: int, what: str):
        """Pairs of a buffer and the accesses that fall into it, after the checks."""
        if not len(addresses):
            return
        _check_alignment(addresses, alignment, what)
        owner = np.searchsorted(self._starts, addresses, side="right") - 1
        for index in np.unique(owner):
            lanes = slice(None) if (owner == index).all() else owner == index
            inside = addresses[lanes]
            if index < 0 or inside.max() + size > self.buffers[index].end:
                outside = inside.min() if index < 0 else inside.max()
                raise MemoryFault(self._outside(int(outside), size, what))
            yield self.buffers[index], lanes

    def _outside(self, address: int, size: int, what: str) -> str:
        message = f"{what} of {size} bytes at {address:#x} is outside any buffer"
        if not self.buffers:
            return message
        near = min(self.buffers, key=lambda b: b.distance(address, size))
        side = "begins {} bytes before it" if address < near.address else "reaches {} bytes past its end"
        where = side.format(near.distance(address, size))
        return (
            f"{message}; the nearest is {near.name} ({len(near.data)} bytes at {near.address:#x}), and the "
            f"access {where}"
        )


class SharedMemory:
    """One CTA's shared memory, from address 0, full of poison at the start."""

    def __init__(self, size: int):
        self.data = np.full(size, POISON, np.uint8)

    def load(self, addresses: np.ndarray, size: int, alignment: int | None = None) -> np.ndarray:
        self.check(addresses, size, alignment or size, "shared load")
        return self.data[addresses[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, data: np.ndarray):
        _check_count(addresses, data, "shared store")
        size = data.shape[1]
        self.check(addresses, size, size, "shared store")
        self.data[addresses[:, None] + np.arange(size)] = data

    def check(self, addresses: np.ndarray, size: int, alignment: int, what: str):
        """Raise for an access that is misaligned or not wholly inside."""
        if not len(addresses):
            return
        _check_alignment(addresses, alignment, what)
        wrong = (addresses < 0) | (addresses + size > len(self.data))
        if wrong.any():
            address = int(addresses[wrong][0])
            raise MemoryFault(
                f"{what} of {size} bytes at {address:#x} is outside the {len(self.data)} bytes of shared "
                "memory"
            )
