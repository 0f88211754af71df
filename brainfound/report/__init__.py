"""BrainFound report."""
