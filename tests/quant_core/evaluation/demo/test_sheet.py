"""The contact sheet: where each picture and each figure lies."""

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_nibble.quant_core.evaluation.demo import sheet

pytestmark = pytest.mark.quick

SHADES = {"reference": 0.2, "good": 0.4, "bad": 0.8}
SCORES = {"mild": {"good": 41.0, "bad": 25.0}, "hard": {"good": 38.2, "bad": 9.0}}
BLUE, AMBER, RED = (86, 180, 233), (240, 180, 41), (239, 106, 75)


def test_rows_columns_and_marks(tmp_path):
    shown = {
        severity: {name: torch.full((8, 16, 16, 3), shade) for name, shade in SHADES.items()}
        for severity in SCORES
    }
    reports = {
        severity: {
            "methods": {n: {"image_psnr_db": v, "block_bits_per_weight": 4.5} for n, v in scores.items()}
        }
        for severity, scores in SCORES.items()
    }
    sheet.contact_sheet(tmp_path / "sheet.png", shown, reports, {"good": "A method", "bad": "Another"})
    pixels = np.array(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    block = sheet.SCORE + sheet.SHOWN * (sheet.CELL + sheet.GAP)
    step = sheet.CELL + sheet.GAP
    assert pixels.shape[0] == sheet.HEAD + 3 * step + sheet.FOOT
    assert pixels.shape[1] == sheet.SIDE + 2 * block + 2 * sheet.GAP
    for column in range(2):
        left = sheet.SIDE + column * block + sheet.SCORE
        for row, shade in enumerate(SHADES.values()):
            for i in range(sheet.SHOWN):
                middle = pixels[sheet.HEAD + row * step + sheet.CELL // 2, left + i * step + sheet.CELL // 2]
                assert abs(middle - round(255 * shade)).max() <= 1
        assert (pixels[sheet.HEAD :, left - 2] == (0x15, 0x17, 0x1C)).all()
    marks = {"mild": (BLUE, AMBER), "hard": (BLUE, RED)}
    for column, severity in enumerate(SCORES):
        right = sheet.SIDE + column * block + sheet.SCORE
        for row, mark in enumerate(marks[severity]):
            top = sheet.HEAD + (row + 1) * step
            cell = pixels[top : top + sheet.CELL, right - sheet.SCORE : right]
            assert (cell == mark).all(-1).sum() > 50
