"""The command nibble."""
