"""Inference: predictors, predictions in native space, evaluation and explanations."""
