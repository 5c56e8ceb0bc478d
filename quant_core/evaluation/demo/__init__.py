"""`nibble demo`: the small trained models, their pictures, their outliers and the side-by-side run."""
