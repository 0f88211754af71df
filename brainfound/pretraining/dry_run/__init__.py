"""The dry run: speed and memory of a pretraining run, measured here and estimated for other GPUs."""
