"""From files to tensors: cohorts, scans, preprocessing, stacks, stores, splits, and the phantom."""
