"""All templates, in the order in which they are listed."""

from comfyui_nibble.tests.host.templates import methods, ready, steps

TEMPLATES = sorted(
    [*ready.TEMPLATES, *steps.TEMPLATES, *methods.TEMPLATES], key=lambda template: template.title
)
