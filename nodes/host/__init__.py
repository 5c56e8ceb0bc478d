"""The bridge to ComfyUI: operations, model patcher, building models, reading weights out of them."""
