"""Parts of the bench's report: the whole model, the caller's thread, a CPU's layers, fits, tuning, faults."""

from .answers import DONE

NOT_OURS = ("tune", "baseline")  # kinds of cases that may fail without anything wrong with what users run


def sensors_text(doc: dict) -> list[str]:
    """Clocks, power and temperature over all that was timed, or why they are not known."""
    m = doc["machine"]
    if not doc["timed"]:
        return [f"{m['threads']} threads of {m['processor']}"]
    if m.get("sensors"):
        return [f"clocks, power and temperature: {m['sensors']}"]
    cells = [cell for row in doc["rows"] for cell in row["cells"].values()]
    steps = [entry["result"] for entry in doc["model"].values() if entry["state"] == DONE]
    read = [found["sensors"] for found in (*cells, *steps) if "sensors" in found]
    out = []
    for name, unit in (
        ("sm_mhz", "MHz"),
        ("memory_mhz", "MHz of memory"),
        ("power_w", "W"),
        ("celsius", "C"),
    ):
        values = [v for r in read for v in r.get(name, ()) if isinstance(v, int | float)]
        out += [f"{min(values):.0f} to {max(values):.0f} {unit}"] if values else []
    limit = m.get("power_limit_w")
    limits = f"; limit {limit:.0f} W" if isinstance(limit, int | float) else ""
    return [f"while timing: {', '.join(out)}{limits}"] if out else []


def model_text(doc: dict) -> list[str]:
    """Steps of the model, each beside the one in 16 bit (on a CPU in fp32) of the same size."""
    entries = doc["model"]
    if not entries:
        return []
    lines = ["", "One step of a model of FLUX.1's shape, random weights; LayerNorm and modulation by torch"]
    sizes = lambda entry: (tuple(entry["given"]["size"].items()), entry["given"].get("dtype") == "bfloat16")
    base = {
        sizes(e)[0]: e["result"]["ms"]
        for e in reversed(entries.values())
        if e["given"]["grain"] is None and e["state"] == DONE
    }
    width = max(map(len, entries))
    for name, entry in entries.items():
        if entry["state"] != DONE:
            lines.append(f"  {name:{width}} {entry['state']}: {entry['reason']}")
            continue
        found, plain = entry["result"], base.get(sizes(entry)[0])
        ratio = f"  {plain / found['ms']:5.2f} x" if plain else ""
        memory = f"peak {found['peak_bytes'] / 2**30:.2f} GiB, blocks {found['block_bytes'] / 2**30:.2f} GiB"
        runs = "".join(f"; {count} {path}" for path, count in found["paths"].items())
        lines.append(f"  {name:{width}} {found['ms']:9.1f} ms{ratio}  {memory}{runs}")
    return lines


def host_text(doc: dict) -> list[str]:
    lines = []
    for entry in doc["host"].values():
        if entry["state"] != DONE:
            lines.append(f"  {entry['state']}: {entry['reason']}")
            continue
        found = entry["result"]
        for label in ("plain", "LoRA"):
            each = ", ".join(f"{name} {us:.0f}" for name, us in found[label]["us"].items())
            lora = " with a LoRA" if label == "LoRA" else ""
            lines.append(
                f"  {found['target']}: {found[label]['ms']:.1f} ms a step of FLUX.1, "
                f"{found[label]['layers']} layers{lora}; us a layer: {each}"
            )
    head = "The caller's thread in front of launches, without Triton's own (CPU time, kernels left out)"
    return ["", head, *lines] if lines else []


def cpu_text(doc: dict) -> list[str]:
    """Layers on a CPU, each beside the fp32 linear."""
    if not doc["cpu"]:
        return []
    lines = ["", "Layers on this CPU, medians of wall clock, x in fp32 but for torch bf16"]
    for name, entry in doc["cpu"].items():
        lines.append(name.removeprefix("cpu "))
        if entry["state"] != DONE:
            lines.append(f"  {entry['state']}: {entry['reason']}")
            continue
        base = entry["result"]["torch fp32"]["ms"]
        for cell, found in entry["result"].items():
            note = f"  [{found['note']}]" if "note" in found else ""
            lines.append(f"  {cell:18} {found['ms']:9.2f} ms  {base / found['ms']:5.2f} x{note}")
    return lines


def fits_text(doc: dict) -> list[str]:
    lines = []
    for name, entry in doc["fits"].items():
        found = entry.get("result")
        if entry["state"] != DONE:
            lines.append(f"  {name}: {entry['state']}: {entry['reason']}")
        elif entry["kind"] == "fit":
            error = f", {found['sqnr_db']:.2f} dB" if "sqnr_db" in found else ""
            lines.append(f"  {name}: {found['seconds']:.2f} s, {found['bits']:.3f} bits{error}")
        else:
            each = ", ".join(f"{width} in-channels {ms:.1f} ms" for width, ms in found.items())
            lines.append(f"  {name}, statistics of one input a step: {each}")
    return ["", "Fits and calibration on the device", *lines] if lines else []


def tuned_text(doc: dict) -> list[str]:
    """The fastest tile of each product that was tuned, beside the default."""
    groups: dict[str, list[dict]] = {}
    for entry in doc["tuned"].values():
        if entry["state"] == DONE:
            groups.setdefault(entry["group"], []).append(entry)
    lines = []
    for name, entries in groups.items():
        best = min(entries, key=lambda e: e["result"]["ms"])["result"]
        default = next((e["result"]["ms"] for e in entries if e["given"]["default"]), None)
        ratio = f", {default / best['ms']:.2f} x the default" if default else ""
        lines.append(f"  {name}: {best['tile']}, {best['ms']:.4f} ms{ratio}, of {len(entries)}")
    return ["", "Tuned", *lines] if lines else []


def faults_text(doc: dict) -> list[str]:
    """Cases that a later run does not try again, and how many are left."""
    lines = [
        f"{name}: {entry['state']}, {entry['reason']}" + (f", at {entry['at']}" if entry.get("at") else "")
        for name, entry in doc["faults"].items()
    ]
    head = [f"{len(lines)} cases ended without a right answer and are not tried again:"] if lines else []
    left = [f"{doc['left']} cases are left for the next run with this file"] if doc["left"] else []
    return [*head, *(f"  {line}" for line in lines), *left]
