"""`nibble judge`: methods compared on a user's own pipeline and prompts."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from ..calibration.file import Calibration
from ..diffusers_host.pipeline import pipeline_bytes
from ..evaluation import pipelines
from ..evaluation.pipelines import FULL, Sampling
from ..formats.checkpoint import Checkpoint
from ..formats.nibble import PackFile
from ..methods import by_name
from ..run.provenance import provenance
from ..store.atomic import require_output
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from .quantize import quantize_file


def judge_pipeline(
    pipeline: Path,
    out: Path,
    methods: list[str],
    calibration: Calibration,
    prompts: list[str],
    *,
    steps: int,
    size: int | None,
    seed: int,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda unit: silent,
    say: Callable[[str], None] = lambda line: None,
    workers: Workers = HERE,
) -> str:
    """Quantizes the pipeline's transformer by each method into `out`, samples every prompt by each and in
    full precision, and returns the table; `out` gets judge.json and judge.png beside the files and pictures.

    The first method is what the others are compared with. A stopped run goes on: files and pictures that are
    there are taken where they were made of the same. Raises ValueError for fewer than two prompts or no
    method, and the errors of `quantize_file`, before anything is sampled.
    """
    pipeline, out = Path(pipeline).absolute(), Path(out).absolute()
    if not methods or len(prompts) < 2:
        raise ValueError(
            f"{len(methods)} methods, {len(prompts)} prompts: expected at least one method and two prompts"
        )
    table, sheet = out / "judge.json", out / "judge.png"
    checkpoint = Checkpoint(pipeline)
    for path in (table, sheet):
        require_output(path, [*checkpoint.inputs, *calibration.files])
    fingerprint = checkpoint.fingerprint()
    calibration.require_model(fingerprint)
    files: dict[str, Path | None] = {FULL: None}
    for name, method in {name: by_name(name) for name in methods}.items():
        path = out / f"{name}.safetensors"
        made_as = provenance(fingerprint, name, method.config, calibration)
        if _made_as(path, made_as):
            say(f"{path.name}: is there, made of the same; taken as it is")
        else:
            say(f"{name}: quantizing")
            quantize_file(
                pipeline, path, method, method.config, calibration, device, progress("layer"), say=say,
                workers=workers,
            )  # fmt: skip
        files[name] = path
    pictures = out / f"pictures-{_key(prompts, steps, size, seed, calibration)}"
    sampling = Sampling(pipeline, pictures, files, prompts, steps, size, seed, device)
    pipelines.sample_all(sampling, progress("task"), workers, pipeline_bytes(pipeline, device))
    found = pipelines.judged(sampling, methods[0])
    pipelines.write(sampling, found, methods[0], table, sheet)
    sizes = {name: path.stat().st_size for name, path in files.items() if path is not None}
    return pipelines.judged_text(found, methods[0], sizes)


def _made_as(path, made_as) -> bool:
    if not path.is_file():
        return False
    about = PackFile(path).provenance
    return all(about.get(key) == value for key, value in _comparable(made_as).items())


def _comparable(about):
    return {key: value for key, value in json.loads(json.dumps(about)).items() if key != "source"}


def _key(prompts, steps, size, seed, calibration) -> str:
    """Pictures of other settings lie in other folders."""
    text = json.dumps([prompts, steps, size, seed, calibration.hash])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
