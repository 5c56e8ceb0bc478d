"""What reading a file raises."""


class CheckpointError(ValueError):
    """A file that is not a readable safetensors checkpoint, or not a sound one of its kind."""
