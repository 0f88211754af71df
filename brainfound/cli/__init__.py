"""BrainFound cli."""
