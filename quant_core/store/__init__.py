"""Files that are written whole or not at all, locked, hashed and read with care, whatever they hold."""
