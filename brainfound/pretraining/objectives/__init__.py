"""Self-supervised objectives: one file each with a line in `registry`; `losses` holds the pure loss functions."""
