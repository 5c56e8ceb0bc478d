"""What the figures were taken on."""

import platform
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import xxhash

from ....kernels.target import Target
from ....kernels.tuning import cache_for
from .baselines import kitchen_version
from .sensors import Sensors

ROOT = Path(__file__).resolve().parents[3]


def describe(device: torch.device, target: Target, sensors: Sensors) -> dict:
    """JSON: the machine, the card and the versions of everything that compiles or runs."""
    out = {
        "host": platform.node(),
        "device": processor(),
        "uuid": "",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "backend": target.backend,
        "arch": target.arch,
        "interpreted": target.interpreted,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"),
        "comfy_kitchen": kitchen_version(),
        "python": platform.python_version(),
        "pack": pack_version(),
        "commit": commit(ROOT),
        "sources": sources_hash(ROOT),
    }
    if device.type != "cuda":
        return out | {"driver": "", "sensors": sensors.reason}
    p = torch.cuda.get_device_properties(device)
    return (
        out
        | sensors.facts()
        | {
            "device": p.name,
            "uuid": str(getattr(p, "uuid", "")),
            "compute_capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "processors": p.multi_processor_count,
            "measured_tiles": len(cache_for(target).tiles),
            "sensors": sensors.reason,
        }
    )


def processor() -> str:
    """The CPU's own name where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def pack_version() -> str:
    """Of the installed package, else of the pyproject.toml beside the sources."""
    if (ROOT / "pyproject.toml").is_file():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        return project["project"]["version"]
    return _version("nibble-quant")


def sources_hash(root: Path) -> str:
    """Of the code that figures depend on: kernels, layers, and what measures them."""
    folders = ("kernels", "quant_core/layer", "quant_core/methods", "quant_core/evaluation/bench")
    digest = xxhash.xxh3_64()
    for file in sorted(file for folder in folders for file in (root / folder).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(*packages) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


def commit(root: Path) -> str:
    """The commit checked out at `root`, "" where that is no git checkout."""
    git = root / ".git"
    if git.is_file():  # a worktree: "gitdir: PATH"
        git = root / git.read_text().split(":", 1)[1].strip()
    if not (git / "HEAD").is_file():
        return ""
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    shared = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
    for folder in (git, shared):
        if (folder / name).is_file():
            return (folder / name).read_text().strip()
    packed = shared / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")
