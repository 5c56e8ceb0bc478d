"""The default calibration prompts."""

from pathlib import Path


def default_prompts() -> list[str]:
    """64 prompts of many subjects, styles and lengths."""
    return (Path(__file__).with_name("prompts.txt")).read_text(encoding="utf-8").splitlines()
