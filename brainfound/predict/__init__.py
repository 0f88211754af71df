"""BrainFound predict."""
