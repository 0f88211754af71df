"""What went into a store, and whether an input is what a model expects: facts per scan, pictures, contracts."""
