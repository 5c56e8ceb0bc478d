"""The templates about the methods: comparing them, training, budgets, finding blocks."""

from comfyui_nibble.tests.host.templates.describe import Group, Template, node
from comfyui_nibble.tests.host.templates.parts import (
    PROMPT,
    compare,
    flux_calibrate,
    flux_comparison,
    flux_loaders,
    flux_vae,
    help_on,
    picture_size,
    read,
    report_of,
)

CALIBRATION = "read again from *Step by step*, or made, as long as about 58 pictures"


def quantize_all() -> Template:
    load, clip = flux_loaders()
    calibrate, calibration = flux_calibrate(load, clip)
    made = {
        method: node("NibbleQuantize", title, model=load, calibration=calibration, method=method)
        for method, title in (("svdquant_r", "SVDQuant"), ("splitquant", "SplitQuant"), ("robuq", "RobuQ"))
    }
    saves = [
        node("NibbleSaveModel", model=q, filename_prefix=f"diffusion_models/flux1-dev-{method}")
        for method, q in made.items()
    ]
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    guidance, size, vae = node("FluxGuidance", conditioning=prompt), picture_size(), flux_vae()
    closer, ternary = (
        compare([load, *others], guidance, size, vae, title, wide=430)
        for others, title in (
            ((made["svdquant_r"], made["splitquant"]), "SVDQuant and SplitQuant"),
            ((made["robuq"],), "RobuQ"),
        )
    )
    return Template(
        "flux_three_methods",
        "14 Three methods side by side",
        f"""## Three methods, one picture

1. **Load** the 16-bit files.
2. **Calibrate**: {CALIBRATION}.
3. **Prompt**: what all of them draw.
4. **Quantize and save** with SVDQuant, SplitQuant and RobuQ: 6.7, 6.2 and 4.3 GB. The four models take
   about 41 GB of main memory; mute (Ctrl M) what is too much.
5. **Compare** on one seed. SVDQuant is closest; RobuQ has ternary weights, two thirds of the size, and is
   visibly worse.

{help_on("NibbleQuantize", "NibbleCompare")}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                calibrate,
                Group("3 Prompt", [[prompt, guidance], [size, vae]]),
            ],
            [
                Group("4 Quantize and save", [list(pair) for pair in zip(made.values(), saves, strict=True)]),
                Group("5 Compare", [[closer], [ternary]]),
            ],
        ],
    )


def trained() -> Template:
    load, clip = flux_loaders()
    calibrate, calibration = flux_calibrate(load, clip)
    quantize = node(
        "NibbleQuantize",
        "SplitQuant",
        model=load,
        calibration=calibration,
        method="splitquant_4",
        training="standard",
    )
    save = node(
        "NibbleSaveModel", model=quantize, filename_prefix="diffusion_models/flux1-dev-splitquant-trained"
    )
    return Template(
        "flux_splitquant_trained",
        "15 Train SplitQuant",
        f"""## SplitQuant's four slices with training

1. **Load** the 16-bit files; both models take about 30 GB of main memory.
2. **Calibrate**: {CALIBRATION}.
3. **Train and save**: as much as 300 evaluations of the whole network with gradients and 640 without (a
   picture: 20). A stopped run goes on.
4. **Read** what each layer gained.
5. **Compare** with 16 bit.

{help_on("NibbleQuantize", "NibbleCompare")}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                calibrate,
                Group("3 Train and save", [[quantize, save]]),
            ],
            [
                Group("4 Read", [read(quantize)]),
                Group("5 Compare", flux_comparison([load, quantize], clip)),
            ],
        ],
    )


def budget() -> Template:
    load, clip = flux_loaders()
    calibrate, calibration = flux_calibrate(load, clip)
    allocate = node(
        "NibbleAllocateBits", model=load, calibration=calibration, budget="A3", menu="robuq", use_gains=True
    )
    save = node("NibbleSaveModel", model=allocate, filename_prefix="diffusion_models/flux1-dev-robuq-A3")
    plot = node("PreviewImage", "Bits of each layer", fill=True, images=(allocate, "plot"))
    return Template(
        "flux_robuq_budget",
        "16 A budget of bits",
        f"""## RobuQ with 3 activation bits on average

1. **Load** the 16-bit files; both models take about 28 GB of main memory.
2. **Calibrate**: {CALIBRATION}.
3. **Allocate and save**: each of 228 layers gets 1 to 8 activation bits. With *use_gains* it first runs
   the network 2300 times (a picture: 20). Try a *budget* of A2.5 or A4.
4. **Look** at the bits.
5. **Compare**: ternary weights are visibly worse than 4 bit, in 4.3 GB.

{help_on("NibbleAllocateBits", "NibbleCompare")}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                calibrate,
                Group("3 Allocate and save", [[allocate, save]]),
            ],
            [
                Group("4 Look", [[plot, report_of(allocate)]]),
                Group("5 Compare", flux_comparison([load, allocate], clip)),
            ],
        ],
    )


def find_blocks() -> Template:
    load, clip = flux_loaders()
    calibrate, calibration = flux_calibrate(load, clip)
    quantize = node("NibbleQuantize", model=load, calibration=calibration)
    swap = node("NibbleSwapBlocks", model_a=quantize, model_b=load, blocks="double 0-4", fill=True)
    guard = node("NibbleGuard", model=load, quantized=quantize, calibration=calibration, quality_db=24.0)
    save = node("NibbleSaveModel", model=guard, filename_prefix="diffusion_models/flux1-dev-4bit-guarded")
    return Template(
        "flux_find_blocks",
        "13 Find the blocks that hurt",
        f"""## Which blocks lose most at 4 bit?

1. **Load** the 16-bit files.
2. **Calibrate**: {CALIBRATION}.
3. **Quantize and swap**: *blocks* come from 16 bit. If the picture comes closer, they hurt. Go on with
   double 5-9, then single 0-9, and halve what helps.
4. **Guard** measures instead: it raises layers below *quality_db* to 8 or 16 bit, and says which.
5. **Compare** 16 bit, 4 bit and swapped on one seed. Both models take about 31 GB of main memory.

{help_on("NibbleSwapBlocks", "NibbleGuard", "NibbleCompare")}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                calibrate,
                Group("3 Quantize and swap", [[quantize, swap]]),
            ],
            [
                Group("4 Guard", [[guard], [save, report_of(guard)]]),
                Group("5 Compare", flux_comparison([load, quantize, swap], clip)),
            ],
        ],
    )


def export() -> Template:
    load, clip = flux_loaders()
    calibrate, calibration = flux_calibrate(load, clip)
    quantize = node("NibbleQuantize", model=load, calibration=calibration, method="native")
    written = node(
        "NibbleExportModel",
        model=quantize,
        format="native",
        filename_prefix="diffusion_models/flux1-dev-native",
    )
    return Template(
        "flux_export_native",
        "17 Export for ComfyUI without Nibble",
        f"""## A 4-bit file that needs no pack

1. **Load** the 16-bit files; both models take 32 to 36 GB of main memory.
2. **Calibrate**: {CALIBRATION}.
3. **Quantize and export**: the method native takes ComfyUI's own formats, the cheapest that reaches 20 dB
   in each layer. The file has 7.7 to 12 GB; *Load Diffusion Model* of ComfyUI 0.31 loads it.
4. **Read**: it must say that nothing is lost.
5. **Compare** with 16 bit.

{help_on("NibbleExportModel", "NibbleQuantize", "NibbleCompare")}
""",
        [
            [
                Group("1 Load", [[load, clip]]),
                calibrate,
                Group("3 Quantize and export", [[quantize, written]]),
            ],
            [
                Group("4 Read", [[report_of(quantize), report_of(written, "What was written")]]),
                Group("5 Compare", flux_comparison([load, quantize], clip)),
            ],
        ],
    )


TEMPLATES = [find_blocks(), quantize_all(), trained(), budget(), export()]
