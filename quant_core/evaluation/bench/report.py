"""What the figures say: cells, the least possible time, targets, text."""

from . import sections
from .cases import FLUX_TOKENS
from .timing import Timing

# Targets for Hopper at FLUX_TOKENS. Ratios of speed; the int8 ceiling is the measured one.
OPERATOR_WIDE, OPERATOR_NARROW, WIDE, NARROW = 1.5, 1.3, 9216, 3072
GEMM_OF_INT8, GEMM_OF_CEILING = 0.9, 0.65
OPERATOR_OVER_GEMM, SPLIT_OVER_GEMM, LORA_OVER_OPERATOR = 1.12, 1.05, 1.05
TRANSFORM_OVER_QUANTIZE = 1.1


def cell(timing: Timing, flops: int | None, reference_ms: float | None, note: str = "") -> dict:
    """JSON of a number. flops None: not a matrix product, so no rate and no speed-up."""
    rate = None if flops is None else flops / timing.ms / 1e9
    speedup = None if flops is None or reference_ms is None else reference_ms / timing.ms
    return timing.to_json() | {"tflops": rate, "speedup": speedup, "note": note}


def refused(reason: str) -> dict:
    """JSON of a cell without a number."""
    return {"reason": reason}


def least_ms(flops: float, nbytes: float, ceilings: dict) -> float | None:
    """The least time of int8 products on this card: its ceiling of products or of bandwidth, whichever is
    slower."""
    products, bandwidth = ceilings.get("int8_flops"), ceilings.get("bytes_per_s")
    if not products or not bandwidth:
        return None
    return 1000 * max(flops / products, nbytes / bandwidth)


def _ms(row: dict, column: str) -> float | None:
    return row["cells"].get(column, {}).get("ms")


def targets(rows: list[dict], ceilings: dict, arch: int | str) -> list[dict]:
    """One entry a target and shape: {"target", "case", "value", "bound", "met"}; met None where a number is
    missing. Hopper only."""
    rows = [row for row in rows if arch == 90 and row["m"] == FLUX_TOKENS]
    return [
        {"target": text, "case": row["name"], "value": value, "bound": bound, "met": _met(value, bound, most)}
        for row in rows
        for text, value, bound, most in [*_at_least(row, ceilings), *_at_most(row)]
    ]


def _met(value, bound, most):
    return None if value is None else (value <= bound if most else value >= bound)


def _at_least(row, ceilings):
    """(target, value, bound, False) where more is better."""
    torch_ms, gemm_ms, operator_ms = _ms(row, "torch"), _ms(row, "qgemm"), _ms(row, "operator")
    over_torch = _ratio(torch_ms, operator_ms)
    if row["n"] >= WIDE:
        yield f"operator at least {OPERATOR_WIDE} x torch, N >= {WIDE}", over_torch, OPERATOR_WIDE, False
    if row["n"] == NARROW:
        yield f"operator at least {OPERATOR_NARROW} x torch, N = {NARROW}", over_torch, OPERATOR_NARROW, False
    over_int8 = _ratio(_ms(row, "torch int8"), gemm_ms)
    yield f"qgemm at least {GEMM_OF_INT8} x torch int8", over_int8, GEMM_OF_INT8, False
    rate = _ratio(_ratio(2000 * row["m"] * row["n"] * row["k"], gemm_ms), ceilings.get("int8_flops"))
    yield f"qgemm at least {GEMM_OF_CEILING} of the int8 ceiling", rate, GEMM_OF_CEILING, False


def _at_most(row):
    """(target, value, bound, True) where less is better."""
    gemm_ms, operator_ms = _ms(row, "qgemm"), _ms(row, "operator")
    over_gemm = _ratio(operator_ms, gemm_ms)
    yield f"operator at most {OPERATOR_OVER_GEMM} x the time of qgemm", over_gemm, OPERATOR_OVER_GEMM, True
    lora = _ratio(_ms(row, "operator + LoRA"), operator_ms)
    text = f"a LoRA of rank 32 at most {LORA_OVER_OPERATOR} x the time of the operator"
    yield text, lora, LORA_OVER_OPERATOR, True
    learned = _ratio(_ms(row, "quantize transform"), _ms(row, "quantize token"))
    text = f"transform and quantize at most {TRANSFORM_OVER_QUANTIZE} x quantize"
    yield text, learned, TRANSFORM_OVER_QUANTIZE, True
    split = _ratio(_ms(row, "split4"), gemm_ms)
    yield f"split4 at most {SPLIT_OVER_GEMM} x the time of qgemm", split, SPLIT_OVER_GEMM, True


def _ratio(a, b):
    return None if a is None or b is None else a / b


def cell_text(found: dict) -> str:
    """One cell of the long table."""
    if "reason" in found:
        return f"refused: {found['reason']}"
    text = f"{found['ms']:9.4f} ms (min {found['min_ms']:.4f}, p90 {found['p90_ms']:.4f})"
    if found["tflops"] is not None:
        text += f"  {found['tflops']:7.1f} TFLOP/s"
    if found["speedup"] is not None:
        text += f"  {found['speedup']:5.2f} x"
    return text + (f"  [{found['note']}]" if found["note"] else "")


def check_text(name: str, check: dict) -> str:
    if "reason" in check:
        return f"  {name}: {check['reason']}"
    state = "ok" if check["ok"] else "FAILED"
    nan = "" if check["finite"] else ", NOT FINITE"
    number = lambda v: "-" if v is None else f"{v:.2g}"
    return (
        f"  {name}: {state}, relative error {number(check['error'])}, worst element "
        f"{number(check['worst'])} rms{nan}"
    )


def _row_text(row: dict) -> list[str]:
    least = (
        ""
        if row["least_ms"] is None
        else f"; at least {row['least_ms']:.4f} ms on this card's int8 products and memory"
    )
    lines = ["", row["name"] + least]
    checks = [(f"{c} against {k}", v) for c, found in row["checks"].items() for k, v in found.items()]
    bad = [(name, check) for name, check in checks if not check.get("ok")]
    errors = [check["error"] for _, check in checks if check.get("ok")]
    if errors:
        lines.append(
            f"  {len(errors)} of {len(checks)} comparisons hold, relative error at most {max(errors):.2g}"
        )
    lines += [check_text(name, check) for name, check in bad]
    return lines + [f"  {name:17} {cell_text(found)}" for name, found in row["cells"].items()]


def _overview(rows: list[dict]) -> list[str]:
    names = list(
        dict.fromkeys(
            name for row in rows for name in row["cells"] if name.split()[0] != "quantize" and name != "torch"
        )
    )
    if not names:
        return []
    width = max(len(row["name"]) for row in rows)
    head = " ".join(f"{name:>16}" for name in ("torch, ms", *names, "limit"))
    lines = [
        "",
        "Speed relative to torch's 16-bit linear (limit: the roofline of int8 products); - : no number",
        f"{'':{width}} {head}",
    ]
    for row in rows:
        base = _ms(row, "torch")
        ratios = [row["cells"].get(name, {}).get("speedup") for name in names]
        ratios.append(base / row["least_ms"] if base and row["least_ms"] else None)
        numbers = [base if base is None else f"{base:.4f}"] + [
            None if r is None else f"{r:.2f}" for r in ratios
        ]
        lines.append(f"{row['name']:{width}} " + " ".join(f"{n or '-':>16}" for n in numbers))
    return lines


def _target_text(stated: list[dict]) -> list[str]:
    lines = ["", f"Targets (Hopper, M {FLUX_TOKENS})"] if stated else []
    for name in dict.fromkeys(t["target"] for t in stated):
        of = [t for t in stated if t["target"] == name]
        lines.append(f"{name}: met at {sum(t['met'] is True for t in of)} of {len(of)} shapes")
        word = {True: "met", False: "NOT MET", None: "not measured"}
        lines += [
            (
                f"  {t['case']:28} {'-' if t['value'] is None else format(t['value'], '.3f'):>7}  "
                f"{word[t['met']]}"
            )
            for t in of
        ]
    return lines


def benchmark_text(doc: dict) -> str:
    """The whole report."""
    m, c = doc["machine"], doc["ceilings"]
    lines = [
        f"{m['device']}, sm_{m['arch']}" if m["backend"] == "cuda" else f"{m['device']} {m['arch']}".rstrip()
    ]
    lines.append(
        f"driver {m['driver'] or '-'}; torch {m['torch']}, triton {m['triton'] or '-'}, CUDA "
        f"{m['cuda'] or '-'}, "
    )
    lines[-1] += f"comfy-kitchen {m['comfy_kitchen'] or '-'}; commit {m['commit'] or '-'}"
    lines.append(f"{doc['date']}: {doc['command']}")
    lines += sections.sensors_text(doc)
    if not doc["timed"]:
        lines.append(
            "No kernel was timed: there is no GPU. They were compared on Triton's interpreter, at tiny "
            "shapes."
        )
    if c:
        number = lambda key, factor: "-" if c.get(key) is None else f"{c[key] / factor:.1f}"
        rates = (
            f"{number('bf16_flops', 1e12)} TFLOP/s in {doc['dtype']}, {number('int8_flops', 1e12)} in int8"
        )
        lines.append(f"Measured ceilings: {rates}, {number('bytes_per_s', 1e9)} GB/s copied")
    for row in doc["rows"]:
        lines += _row_text(row)
    lines += _overview(doc["rows"])
    lines += sections.model_text(doc) + sections.host_text(doc) + sections.cpu_text(doc)
    lines += sections.fits_text(doc) + sections.tuned_text(doc) + _target_text(doc["targets"])
    failed = [row["name"] for row in doc["rows"] if row["failed"]]
    lines += [
        "",
        f"{len(doc['rows'])} cases, {len(failed)} with a wrong output"
        + "".join(f"\n  {name}" for name in failed),
    ]
    return "\n".join([*lines, *sections.faults_text(doc)]) + "\n"
