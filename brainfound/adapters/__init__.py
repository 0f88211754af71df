"""BrainFound adapters."""
