"""`nibble demo`: the small trained FLUX, its pictures, its outliers and the side-by-side run."""
