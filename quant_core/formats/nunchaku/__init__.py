"""Files of nunchaku: SVDQuant in INT4 or NVFP4."""
