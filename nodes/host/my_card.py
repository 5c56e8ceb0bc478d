"""A model quantized by a wish: everything that Calibrate, Quantize, Allocate, Guard and Save do, chosen by
`precision.wish`; what Nibble Quantize for My Card does."""

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...kernels.dispatch import takes_components
from ...kernels.target import target_of
from ...quant_core.calibration.prompts import default_prompts
from ...quant_core.charts.summary import amount
from ...quant_core.formats.nibble import PackFile
from ...quant_core.layer.memory import predict
from ...quant_core.layer.row import Row
from ...quant_core.methods import by_name
from ...quant_core.precision.allocate import parse_budget
from ...quant_core.precision.guard_report import guard_text
from ...quant_core.precision.guarding import Asked
from ...quant_core.precision.menu import MixedConfig
from ...quant_core.precision.report import allocation_text
from ...quant_core.precision.wish import RANK, SMALL, Facts, choose, statistics_bytes
from ...quant_core.run.provenance import VERSION
from ...quant_core.run.report import quantization_text, sizes
from ...quant_core.run.verdict import Verdict, verdict
from ...quant_core.store.atomic import NoRoom, require_room
from ...quant_core.store.safe import CheckpointError
from .allocating import allocated_model
from .before_after import pictures, sampled
from .build import ATTACHMENT, load
from .calibrating import calibrate
from .guarding import guarded_model
from .kinds import Kind, empty_latent
from .origin import source_path
from .patcher import NibblePatcher
from .progress import Shown, logged, steps
from .quantized import quantize_model
from .sampling import Sampling
from .saving import named_path, save_model
from .source import ModelSource, feed

NAME = "Nibble Quantize for My Card"
MADE_BY = "my_card"  # of the provenance: the wish, and what decided the outcome
NO_PICTURE = torch.zeros(1, 64, 64, 3)


@dataclass(frozen=True)
class Request:
    """The node's inputs. kind: how to sample, with what the user set in it; conditioning, negative: as in
    ComfyUI, None where they are to be encoded; latent: None where it is to be made."""

    model: ModelPatcher
    wish: str
    kind: Kind
    clip: CLIP | None
    conditioning: list | None
    negative: list | None
    prompts: str
    latent: dict | None
    vae: VAE | None
    before_after: bool
    prompt: str
    file_name: str
    seed: int


@dataclass(frozen=True)
class Done:
    """The node's outputs, and the path of the file."""

    model: NibblePatcher
    verdict: Verdict
    report: str
    pictures: torch.Tensor
    path: Path


def quantized_for_card(asked: Request) -> Done:
    """Does what the wish takes, or finds it done. Raises before the long work: ValueError for inputs that are
    missing, WishError, NoRoom, and the errors of ModelSource."""
    _require_inputs(asked)
    source = ModelSource(asked.model)
    facts = facts_of(asked, source)
    choice = choose(asked.wish, facts)
    path = named_path(asked.file_name or "name")  # refused now, not after hours
    _require_disk(path, choice, facts)
    with logged(NAME, f"{source.family.title}, {choice.wish}"):
        for line in choice.why:
            logging.info(f"{NAME}: {line}")
        sampling = _sampling(asked, choice)
        key = _key(asked, source, choice, sampling)
        picture = _picture_sampling(asked, sampling) if asked.before_after else None
        before = None if picture is None else sampled(asked.model, picture, "Before")
        notes = []
        if found := _made_before(path.parent, key):
            path, model = found, load(found)
            notes = [f"Made before by the same wish, loaded and not made again: {found.name}"]
            logging.info(f"{NAME}: {notes[0]}")
        else:
            model, notes = _made(asked, source, choice, sampling)
            _sign(asked.model, model, choice, key)
            path = named_path(asked.file_name or _automatic_name(asked.model, source, choice, model))
            save_model(model, path)
        shown = NO_PICTURE
        if picture is not None:
            shown = pictures([before, sampled(model, picture, "After")], model, asked.vae)
    return _told(source, choice, model, notes, shown, path)


def facts_of(asked: Request, source: ModelSource) -> Facts:
    """What the choice is made of, on this machine."""
    device = comfy.model_management.get_torch_device()
    shape = _latent(asked, full=True)["samples"].shape
    passes = 1 if asked.kind.cfg == 1 else 2
    # ComfyUI's own estimate with flash attention in 16 bit, and no less than it always keeps free.
    area = passes * shape[0] * prod(shape[2:])
    room = area * 0.02 * getattr(asked.model.model, "memory_usage_factor", 1.0) * 2**20
    return Facts(
        source.layers,
        source.shapes,
        asked.kind.steps,
        int(max(room, 0.8 * 2**30)),
        comfy.model_management.get_total_memory(device),
        comfy.model_management.is_device_cpu(device),
        takes_components(target_of(device)) and _dtype(asked.model.model) != torch.float16,
    )


def _dtype(model):
    """What ComfyUI computes in."""
    return getattr(model, "manual_cast_dtype", None) or model.get_dtype()


def _require_inputs(asked):
    if asked.clip is not None and asked.conditioning is not None:
        raise ValueError(
            f"{NAME}: clip and conditioning are both connected. Connect clip to let the node encode its "
            "prompts, or conditioning with prompts of your own, and not both."
        )
    without = asked.clip is None and asked.conditioning is None
    if without and (asked.wish != "fast" or asked.before_after):
        raise ValueError(
            f"{NAME}: neither clip nor conditioning is connected. Connect the model's text encoder to clip "
            "(Load CLIP, or the CLIP output of Load Checkpoint). Only the wish fast, with "
            "show_before_and_after off, needs none."
        )
    if asked.conditioning is not None and not asked.conditioning:
        raise ValueError(f"{NAME}: conditioning holds no prompt. Connect the output of a text encoder.")
    if asked.kind.cfg != 1 and asked.negative is None and asked.clip is None and not without:
        raise ValueError(
            f"{NAME}: this model is sampled with cfg {asked.kind.cfg:g}, which takes a negative prompt, and "
            "none is connected. Connect one to negative, or clip in place of conditioning, or set cfg to 1."
        )


def _require_disk(path, choice, facts):
    """What a calibration, unfinished work and the file take together."""
    statistics = statistics_bytes(facts.layers) if choice.samples else 0
    needed = statistics + 2 * choice.size
    try:
        require_room(Path(folder_paths.get_output_directory()) / "file", needed)
    except NoRoom as error:
        raise NoRoom(
            error.errno,
            f"{NAME}: {statistics / 1e9:.1f} GB of measurements and {2 * choice.size / 1e9:.1f} GB for the "
            f"model, finished and under way: {error} The wish fast takes no measurements.",
        ) from error


def _latent(asked, full):
    """full: for pictures, and the room that they take; else for examples, of which half the side is "
    "enough."""
    if asked.latent is not None:
        return asked.latent
    side = asked.kind.side if full else asked.kind.side // 2
    return empty_latent(asked.model, side, asked.kind.frames if full else asked.kind.frames // 2 + 1)


def _sampling(asked, choice) -> Sampling | None:
    """Of the examples; None where there are none."""
    if not choice.samples:
        return None
    if asked.clip is None:
        prompts = [[entry] for entry in asked.conditioning]
    else:
        lines = [line.strip() for line in asked.prompts.splitlines() if line.strip()] or default_prompts()
        lines = lines[: choice.samples]
        prompts = [_encoded(asked.clip, line) for line in steps(lines, len(lines))]
    kind = asked.kind
    return Sampling(
        prompts,
        _negative(asked, prompts[0]),
        _latent(asked, full=choice.wish == "best"),
        kind.sampler,
        kind.scheduler,
        choice.steps,
        kind.cfg,
        asked.seed,
    )


def _picture_sampling(asked, sampling) -> Sampling:
    prompt = asked.conditioning[:1] if asked.clip is None else _encoded(asked.clip, asked.prompt)
    kind, cpu = asked.kind, comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device())
    latent = _latent(asked, full=not cpu)
    negative = sampling.negative if sampling else _negative(asked, prompt)
    return Sampling(
        [prompt], negative, latent, kind.sampler, kind.scheduler, kind.steps, kind.cfg, asked.seed + 1000
    )


def _encoded(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _negative(asked, prompt):
    if asked.negative is not None:
        return asked.negative
    if asked.clip is not None:
        return _encoded(asked.clip, "")
    return [[torch.zeros_like(prompt[0][0]), prompt[0][1]]]  # at cfg 1 nothing of it is used


def _key(asked, source, choice, sampling) -> str:
    """Of all that decides the outcome but the machine."""
    digest = hashlib.sha256()
    decided = asdict(replace(choice, memory=0, size=0, why=()))
    feed(digest, [source.fingerprint(), decided, VERSION, asked.seed])
    if sampling is not None:
        feed(
            digest, [sampling.settings(True), sampling.prompts, sampling.negative, sampling.latent["samples"]]
        )
        feed(digest, vars(asked.model.get_model_object("model_sampling")))
    return digest.hexdigest()[:16]


def _made_before(folder, key) -> Path | None:
    """A file in the folder that the same wish has made of the same model."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            provenance = PackFile(path).provenance
        except (CheckpointError, ValueError):
            continue  # somebody else's, or damaged: made again
        made = provenance.get(MADE_BY)
        if isinstance(made, dict) and made.get("key") == key:
            return path
    return None


def _made(asked, source, choice, sampling) -> tuple[NibblePatcher, list[str]]:
    """(the model, lines for the report)."""
    calibration, notes = None, []
    if sampling is not None:
        shown = Shown("Calibrating", "steps")
        calibration = calibrate(asked.model, sampling, choice.samples, choice.memory, True, shown)
        if not shown.begun:
            notes.append("The example runs were there already, with the same settings: they are used again.")
    if choice.budget:
        config, budget = MixedConfig(SMALL, RANK), parse_budget(choice.budget)
        made, done = allocated_model(asked.model, source, calibration, budget, config, use_gains=True)
        return made.model, [*notes, *made.notes, "", allocation_text(done, "Precision of each layer")]
    method = by_name(choice.method)
    made = quantize_model(asked.model, source, method, method.config, calibration)
    model, notes = made.model, notes + made.notes
    if choice.guard:
        guard = Asked(choice.guard, choice.limit, allowed=choice.raised).beside(made.rows, source.shapes)
        if guard.needed(made.rows):
            model, decision, _, _ = guarded_model(source, model, calibration, guard)
            notes += ["", guard_text(decision, "Layers raised afterwards")]
    return model, notes


def _sign(original, model, choice, key):
    """Says in the provenance, and so in the file, what made it, and of which file."""
    info, path = model.attachments[ATTACHMENT], source_path(original)
    made = {"wish": choice.wish, "key": key, "why": list(choice.why), "of": path.name if path else ""}
    model.set_attachments(ATTACHMENT, info | {"provenance": info["provenance"] | {MADE_BY: made}})


def _automatic_name(model, source, choice, made) -> str:
    """E.g. flux1-dev-balanced-6.8GB."""
    path = source_path(model)
    stem = path.stem if path else source.family.name
    with_lora = "-lora" * bool(model.patches)
    size, _ = sizes(_rows(made), source.shapes)
    return f"{stem}{with_lora}-{choice.short}-{amount(size).replace(' ', '')}"


def _rows(model) -> list[Row]:
    return [Row.from_json(row) for row in model.attachments[ATTACHMENT]["report"]]


def _told(source, choice, model, notes, shown, path) -> Done:
    rows, layers = _rows(model), dict(model.packed_layers())
    specs = {name: (module.original or module.layer(name)).spec for name, module in layers.items()}
    found = verdict(rows, source.shapes)
    rest = sizes(rows, source.shapes)[0] - sum(row.nbytes for row in rows)
    target = target_of(comfy.model_management.get_torch_device())
    lines = [
        f"{source.family.title}, {NAME}, {choice.wish}",
        found.text,
        "",
        "What was chosen, and why:",
        *(f"* {line}" for line in choice.why),
        "",
        f"File: {path}",
        *predict(specs, rest, target).lines(),
        *notes,
        "",
        quantization_text(rows, "Layers", shapes=source.shapes),
    ]
    return Done(model, found, "\n".join(lines), shown, path)
