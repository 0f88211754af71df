"""BrainFound train/objectives."""
