"""Checks that scans are as a model expects: its input `contract`, the `rules`, and the `check` of whole sessions."""
