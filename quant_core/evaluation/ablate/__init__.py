"""`nibble ablate`: what each choice of a method costs and brings on the small FLUX."""
