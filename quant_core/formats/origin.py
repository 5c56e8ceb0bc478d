"""What a source says of its model beside the network's weights: header entries, tensors outside of the
network, and ComfyUI's class.

Without it the prediction type, the latent format or a config that the weights do not show would be guessed
anew from the names of the tensors, and a v-prediction SDXL would come out as an EPS one.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from ..store import digests
from ..store.safe import CheckpointError

# Names under which trainers and ComfyUI keep tensors of the model beside the network's; in a file of the
# network alone they stand among its own.
_NAMES = re.compile(
    r"v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_(max|min)|cc_projection\.(weight|bias)"
    r"|conditioner\.conditioners\.(seconds_\w+|prompt)\..+"
)
# Text encoders, VAEs and copies of the network in whole checkpoints, which are no part of the diffusion
# model.
_OTHER_MODELS = re.compile(
    r"(first_stage_model|cond_stage_model|conditioner\.embedders|text_encoders?|text_encoder_\d|vae|pretransform|model_ema|clip_vision"
    r"|audio_vae|vocoder|tokenizer)[._].*"
)
BESIDE_BYTES = 64 * 2**20  # Stable Audio's embedders have 0.4 MB, Zero123's projection 4.7 MB in fp32
METADATA_BYTES = 2**20  # a config has some kB; workflows and thumbnails in headers up to megabytes
_OWN = ("format", "nibble", "nibble_calibration", "nibble_export", digests.ENTRY, "_quantization_metadata")


@dataclass(frozen=True)
class Origin:
    """metadata: the source's header entries. host: what ComfyUI made of it, of `nodes.host.origin`; {} where
    no ComfyUI was there. beside: {name in a whole checkpoint: tensor} of the model outside of its network, on
    the CPU. dropped: sentences on what was left out.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    host: Mapping = field(default_factory=dict)
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @classmethod
    def of_header(cls, metadata: Mapping[str, str] | None, **more) -> "Origin":
        """With the entries of a safetensors header, the smallest first, up to METADATA_BYTES; not those that
        speak of the file's own format."""
        kept, used, dropped = {}, 0, []
        for key, text in sorted((metadata or {}).items(), key=lambda item: (len(item[1]), item[0])):
            if key in _OWN:
                continue
            used += len(key.encode()) + len(text.encode())
            if used > METADATA_BYTES:
                dropped.append(
                    f"header entry {key[:80]!r} ({len(text)} characters) is not kept: {METADATA_BYTES} "
                    "bytes are, in all"
                )
            else:
                kept[key] = text
        return cls(metadata=kept, dropped=tuple(dropped), **more)

    def to_json(self) -> dict:
        """Without the tensors, which are named."""
        return {
            "metadata": dict(self.metadata),
            "host": encoded(dict(self.host)),
            "beside": sorted(self.beside),
        }

    @classmethod
    def from_json(cls, value, read) -> "Origin":
        """read(name): a tensor of `beside`. Raises CheckpointError for what `to_json` does not write."""
        value = value if isinstance(value, dict) else {"": value}
        metadata, host, beside = (value.get(k, {}) for k in ("metadata", "host", "beside"))
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"'origin', metadata: expected texts by name, found {str(metadata)[:80]!r}")
        if not isinstance(host, dict):
            raise CheckpointError(f"'origin', host: expected an object, found {str(host)[:80]!r}")
        beside = beside or []
        if (
            set(value) - {"metadata", "host", "beside"}
            or not isinstance(beside, list)
            or not all(isinstance(n, str) for n in beside)
        ):
            raise CheckpointError(
                f"'origin': expected metadata, host and a list of names beside, found {str(value)[:80]!r}"
            )
        return cls(metadata, decoded(host), {name: read(name) for name in beside})


def is_beside(key: str) -> bool:
    """Whether a tensor of this name, without any prefix, is the model's and not its network's."""
    return _NAMES.fullmatch(key) is not None


def is_of_another_model(key: str) -> bool:
    """Whether a tensor in a whole checkpoint is a text encoder's, a VAE's or of a copy of the network."""
    return _OTHER_MODELS.fullmatch(key) is not None


def size(view) -> int:
    """Bytes of a tensor that safetensors has not read yet, at 4 a value."""
    return 4 * prod(view.get_shape())


def outside(sizes: Mapping[str, int]) -> tuple[list[str], tuple[str, ...]]:
    """(names to keep, sentences on the others) of a whole checkpoint's tensors outside of the network; sizes:
    {name: bytes}.

    Text encoders and VAEs are files of their own in ComfyUI and are left out without a word; of the rest,
    known names come first, then the smallest, up to BESIDE_BYTES.
    """
    kept, used, dropped = [], 0, []
    for key in sorted(
        (k for k in sizes if not is_of_another_model(k)), key=lambda k: (not is_beside(k), sizes[k], k)
    ):
        if used + sizes[key] > BESIDE_BYTES:
            dropped.append(key)
            continue
        used += sizes[key]
        kept.append(key)
    if not dropped:
        return kept, ()
    more = ", ..." * (len(dropped) > 3)
    return kept, (
        f"{len(dropped)} tensors outside of the diffusion model are not kept: {', '.join(dropped[:3])}{more}",
    )


def encoded(value):
    """JSON of a config: numbers, texts, lists and dicts as they are, tuples and dtypes in a dict of one
    entry. Raises TypeError for the rest."""
    if isinstance(value, tuple):
        return {"tuple": [encoded(v) for v in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return (
            {"dict": [[encoded(k), encoded(v)] for k, v in value.items()]}
            if _ambiguous(value)
            else {k: encoded(v) for k, v in value.items()}
        )
    if isinstance(value, (list, torch.Size)):
        return [encoded(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    raise TypeError(f"{type(value).__name__} {str(value)[:80]!r} has no form in a file")


_FORMS = ("tuple", "dtype", "dict", "float")


def _ambiguous(value: Mapping) -> bool:
    return any(not isinstance(k, str) for k in value) or (len(value) == 1 and next(iter(value)) in _FORMS)


def decoded(value):
    """The inverse of `encoded`. Raises CheckpointError for a form that it does not write."""
    if isinstance(value, list):
        return [decoded(v) for v in value]
    if not isinstance(value, dict):
        return value
    form, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
    if form in _FORMS and not isinstance(inner, list if form in ("tuple", "dict") else str):
        raise CheckpointError(
            f"'origin', host: {form} {str(inner)[:80]!r} cannot be read (a {type(inner).__name__})"
        )
    try:
        if form == "tuple":
            return tuple(decoded(v) for v in inner)
        if form == "dtype":
            found = getattr(torch, inner)
            if not isinstance(found, torch.dtype):
                raise TypeError(inner)
            return found
        if form == "float":
            return float(inner)
        if form == "dict":
            return {decoded(k): decoded(v) for k, v in inner}
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"'origin', host: {form} {str(inner)[:80]!r} cannot be read ({error})"
        ) from error
    return {k: decoded(v) for k, v in value.items()}


def names_text(names: Iterable[str], most: int = 6) -> str:
    """Names for a sentence, the first `most` of them."""
    names = sorted(names)
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)
