"""BrainFound train."""
