"""Silence for a library that talks while it loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """No progress bars and no load reports of transformers inside; what was set before is set again after.

    The reports would alarm where a head is meant to be new; what is missing and must not be is an error of ours.
    """
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
