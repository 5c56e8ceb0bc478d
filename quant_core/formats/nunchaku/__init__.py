"""Files of nunchaku: SVDQuant INT4."""
