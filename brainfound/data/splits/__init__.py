"""Splits by subject: `dividing` makes them, `split_file` keeps them with a proof."""
