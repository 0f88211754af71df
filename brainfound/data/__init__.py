"""BrainFound data."""
