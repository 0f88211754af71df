"""From scans to a stack: settings, foreground, grids and the builder that training and prediction share."""

from brainfound.data.preprocessing.settings import FILE_NAME, Preprocessing
from brainfound.data.preprocessing.stack import Stack

__all__ = ["FILE_NAME", "Preprocessing", "Stack"]
