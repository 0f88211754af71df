"""Experiments: fine-tuning over folds, seeds, shots, systems and subsets of the contrasts, and their pages."""
