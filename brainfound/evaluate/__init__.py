"""BrainFound evaluate."""
