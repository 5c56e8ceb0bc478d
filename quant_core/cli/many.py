"""`nibble quantize-all`: the models and recipes of a list, one after the other. A stopped run goes on, and a
model that fails does not stop the others."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..calibration.file import Calibration
from ..formats.checkpoint import Checkpoint
from ..formats.nibble import PackFile
from ..methods import by_name
from ..precision.wish import WISHES
from ..run.verdict import verdict
from ..store.own_json import short
from ..store.progress import Progress, silent
from ..store.table import Table
from ..store.workers import HERE, Workers
from .quantize import quantize_file, require_place
from .wish import quantize_by_wish


@dataclass(frozen=True)
class Recipe:
    """One model of the list. wish: in place of method and options, "" for none; calibration: "" for none."""

    source: str
    destination: str
    method: str = "svdquant_r"
    wish: str = ""
    calibration: str = ""
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Result:
    """What became of a recipe. told: the verdict, or the error where `failed`."""

    recipe: dict
    told: str
    failed: bool = False
    nbytes: int = 0
    seconds: float = 0.0


def recipes_of(path: Path) -> list[Recipe]:
    """The recipes of a YAML file: a list under `models`, or the file itself, of objects with the fields of
    Recipe (`options` an object); relative paths are relative to the file. Raises ValueError naming the file,
    the number of the entry and what is wrong with it, ImportError without PyYAML."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "quantize-all needs PyYAML: python -m pip install 'nibble-quant[cluster]'"
        ) from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    entries = found.get("models") if isinstance(found, dict) else found
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of models, found {short(entries)}")
    recipes = [_recipe(path, number, entry) for number, entry in enumerate(entries, 1)]
    places = [recipe.destination for recipe in recipes]
    if twice := [place for place in places if places.count(place) > 1]:
        raise ValueError(f"{path}: two models are to be written to {twice[0]}")
    return recipes


def _recipe(path, number, entry) -> Recipe:
    known = {f.name for f in fields(Recipe)}
    where = f"{path}, model {number}"
    if not isinstance(entry, dict) or not {"source", "destination"} <= set(entry):
        raise ValueError(f"{where}: expected an object with source and destination, found {short(entry)}")
    if unknown := set(entry) - known:
        raise ValueError(
            f"{where}: unknown {sorted(map(str, unknown))[0]}; known are {', '.join(sorted(known))}"
        )
    options = entry.get("options", {})
    texts = {k: v for k, v in entry.items() if k != "options"}
    if not isinstance(options, dict) or not all(isinstance(v, str) for v in texts.values()):
        raise ValueError(f"{where}: expected text, and an object as options, found {short(entry)}")
    for name in ("source", "destination", "calibration"):
        if texts.get(name):
            texts[name] = str((path.parent / texts[name]).absolute())
    recipe = Recipe(**texts, options=tuple(sorted(options.items())))
    if recipe.wish and ("method" in entry or options):
        raise ValueError(f"{where}: a wish chooses method and options itself: give one of the two")
    if recipe.wish and recipe.wish not in WISHES:
        raise ValueError(f"{where}: unknown wish {recipe.wish!r}. Wishes: {', '.join(WISHES)}.")
    try:
        by_name(recipe.method).configured(**dict(recipe.options))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return recipe


def quantize_all(
    path: Path,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda unit: silent,
    say: Callable[[str], None] = lambda line: None,
    workers: Workers = HERE,
) -> list[Result]:
    """Quantizes every model of the list at `path`, in its order, and keeps what became of each in
    `<path>.results.json`. Models that are finished there, with the same recipe and their file in place, are
    left out; those that failed are tried again. say(line): told as each one is done.

    Raises ValueError for a list that is none, and the errors of a source, a calibration or a destination that
    cannot be used, before the first model is begun.
    """
    recipes = recipes_of(path)
    for recipe in recipes:
        _require(recipe)
    table = Table(Path(f"{path}.results.json"), {"list": "models"}, "results")
    known = {json.dumps(row["recipe"]): Result(**row) for row in table.rows}
    results = []
    for recipe in recipes:
        asked = json.loads(json.dumps(asdict(recipe)))
        found = known.get(json.dumps(asked))
        if found is None or found.failed or not Path(recipe.destination).is_file():
            found = _done(recipe, asked, device, progress, say, workers)
            table.add(asdict(found))
        results.append(found)
        say(f"{Path(recipe.destination).name}: {found.told.splitlines()[0]}")
    return results


def _require(recipe):
    calibration = Calibration(Path(recipe.calibration)) if recipe.calibration else None
    checkpoint = Checkpoint(Path(recipe.source))
    require_place(Path(recipe.destination), checkpoint, calibration)
    if calibration is not None:
        calibration.require_model(checkpoint.fingerprint())


def _done(recipe, asked, device, progress, say, workers) -> Result:
    started = time.monotonic()
    source, destination = Path(recipe.source), Path(recipe.destination)
    try:
        calibration = Calibration(Path(recipe.calibration)) if recipe.calibration else None
        if recipe.wish:
            _, rows = quantize_by_wish(
                source, destination, recipe.wish, calibration, device, progress, say=say, workers=workers
            )
        else:
            method = by_name(recipe.method)
            config = method.configured(**dict(recipe.options))
            rows = quantize_file(
                source, destination, method, config, calibration, device, progress("layer"), say=say,
                workers=workers,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        return Result(asked, f"{error}", failed=True, seconds=time.monotonic() - started)
    shapes = PackFile(destination).logical_shapes()
    told = verdict(rows, shapes).text
    return Result(asked, told, False, destination.stat().st_size, time.monotonic() - started)


def results_text(results: list[Result]) -> str:
    """A line for each model."""
    lines = []
    for result in results:
        name = Path(result.recipe["destination"]).name
        how = result.recipe["wish"] or result.recipe["method"]
        what = "FAILED" if result.failed else f"{result.nbytes / 1e6:,.1f} MB"
        lines.append(f"{name}  {how}  {what}  {result.seconds:.0f} s  {result.told.splitlines()[0]}")
    return "\n".join(lines)
