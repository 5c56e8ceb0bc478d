"""The example workflows' one source: what each template is, written down in Python, from which
workflows/*.json and workflows/api/*.json are computed. `python -m comfyui_nibble.tests.host.templates.write`
writes them."""
