"""What the figures were taken on."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ....kernels.target import Target
from ....kernels.tuning import cache_for
from .baselines import kitchen_version

ROOT = Path(__file__).resolve().parents[3]


def describe(device: torch.device, target: Target) -> dict:
    """JSON: the card and the versions of everything that compiles or runs."""
    out = {
        "device": platform.processor() or platform.machine(),
        "backend": target.backend,
        "arch": target.arch,
        "interpreted": target.interpreted,
        "driver": "",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"),
        "comfy_kitchen": kitchen_version(),
        "python": platform.python_version(),
        "commit": commit(ROOT),
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        out |= {
            "device": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "processors": p.multi_processor_count,
            "driver": _driver(device),
            "measured_tiles": len(cache_for(target).tiles),
        }
    return out


def _version(*packages) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


def _driver(device) -> str:
    """The driver's version, and the card's power limit and top clock, as nvidia-smi has them; "" without
    it."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    lines, index = done.stdout.strip().splitlines(), device.index or 0
    return lines[index] if done.returncode == 0 and index < len(lines) else ""


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
