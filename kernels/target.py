"""The machine that kernels are chosen and compiled for."""

import importlib.metadata
import os
import platform
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cards import Card, card_of

MIN_TRITON = (3, 4)
MIN_INT4 = (3, 6)  # the compiler hook of native INT4, and Gluon as Turing's kernel uses it


@dataclass(frozen=True)
class Target:
    """backend: "cuda", "hip" or "cpu". arch: 89 for sm_89, "gfx942", "int8" for a CPU with such instructions,
    "". triton: (major, minor), None where
    it cannot be used and `trouble` says why, if it is installed. interpreted: see `interpreter`."""

    backend: str
    arch: int | str = ""
    triton: tuple[int, int] | None = None
    name: str = ""
    interpreted: bool = False
    trouble: str = ""

    if TYPE_CHECKING:  # set below

        @property
        def fields(self) -> tuple: ...

    def __post_init__(self):
        # Target(*fields) is this one again: for torch.compile, to which a tuple of constants is a constant,
        # and for caches, to which its hash is cheap.
        fields = self.backend, self.arch, self.triton, self.name, self.interpreted, self.trouble
        object.__setattr__(self, "fields", fields)

    @cached_property
    def card(self) -> Card:
        return card_of(self.backend, self.arch)

    @property
    def shared_bytes(self) -> int:
        return 1024 * (64 if self.backend == "cpu" else self.card.shared_kib)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of x that the kernels take. Turing has no bf16."""
        return (torch.float16, torch.bfloat16) if self.card.products_16 else (torch.float16,)

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The 16-bit type of the matrix units that has the range of fp32; fp16 on Turing, which lacks it."""
        return self.dtypes[-1]

    def __str__(self):
        return self.name or {"cuda": f"sm_{self.arch}", "hip": str(self.arch)}.get(self.backend, "the CPU")


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the installed Triton, also under the names of its ROCm and Windows builds."""
    for package in ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows", "triton-xpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    return None


def target_of(device) -> Target:
    """The Target of a torch device, its index or its name."""
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _gpu(index)
    return Target("cpu", "int8" if device.type == "cpu" and _multiplies_int8() else "", triton_version())


def interpreter() -> Target:
    """Triton's interpreter on the CPU, for tests: it is asked for by name, `target_of` never gives it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "the kernels run on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before triton "
            "is imported"
        )
    return Target("cpu", triton=triton_version(), interpreted=True)


@lru_cache(maxsize=64)
def kernel_target(device: torch.device) -> Target:
    """The Target that a kernel on tensors of this device is launched for. On CPU tensors kernels exist for
    the interpreter only."""
    return interpreter() if device.type == "cpu" else target_of(device)


@lru_cache(maxsize=16)
def _gpu(index: int) -> Target:
    properties, version = torch.cuda.get_device_properties(index), triton_version()
    trouble = _trouble(index) if version else ""
    version = None if trouble else version
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], version, properties.name, trouble=trouble)
    return Target("cuda", 10 * properties.major + properties.minor, version, properties.name, trouble=trouble)


INT8 = {"avx512_vnni", "avx_vnni", "amx_int8"}  # as Linux calls them


@lru_cache(maxsize=1)
def _multiplies_int8() -> bool:
    """Whether `torch._int_mm` is fast and gives the exact sums on this CPU, which x86 has instructions for:
    VNNI, AMX.

    Without them oneDNN adds products of 8 bits in 16, where the largest do not fit, or takes ten times as
    long as the eager path (AMD's Zen 3: 4.2 s in place of 0.42 for two steps of the small FLUX). Only Linux
    says what a CPU has.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    with suppress(OSError):
        if not INT8 & set(Path("/proc/cpuinfo").read_text().split()):
            return False
    ends = torch.tensor([127, -127, 1, -128], dtype=torch.int8)
    codes = torch.cartesian_prod(*[ends] * 4).repeat(1, 16)  # (256, 64): pairs of ends are neighbours
    try:
        found = torch._int_mm(codes, codes.T)
    except RuntimeError:
        return False
    return torch.equal(found, (codes.double() @ codes.double().T).int())


def _trouble(index: int) -> str:
    """Why Triton cannot be used on this device, "" if it can: a kernel of one line is compiled and run, once
    a process."""
    try:
        from .probe import add_one

        with torch.cuda.device(index):
            x = torch.zeros(16, device="cuda")
            add_one[(1,)](x)
            return "" if bool((x == 1).all()) else "Triton's first kernel gave a wrong result"
    except Exception as e:
        # A compiler, a driver, a C compiler for the launcher: whatever it is, the eager path works.
        line = (str(e).strip() or type(e).__name__).splitlines()[0]
        reason = f"Triton cannot run here ({type(e).__name__}: {line})"
        warnings.warn(f"{reason}; quantized layers take the slower eager path", stacklevel=2)
        return reason
