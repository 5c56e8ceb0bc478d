"""Work on several machines or GPUs, by Ray."""
