"""Access to the Hugging Face Hub: its cache at once where it does not answer, and faults in a few words."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_REMEMBER_S = 60.0
_FAULTS = {
    "OfflineModeIsEnabled": "offline mode, nothing in the cache",
    "GatedRepoError": "access has to be granted first",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "RevisionNotFoundError": "no such revision",
    "HFValidationError": "not an id of the form owner/name",
    "LocalTokenNotFoundError": "nobody is logged in: hf auth login",
    "HfHubHTTPError": "refused by the Hub",
    "LocalEntryNotFoundError": "nothing in the cache",
}
"""Class of an error → the fault; subclasses before their bases."""
_lock = threading.RLock()
_last_answer: tuple[str, float, bool] = ("", 0.0, False)


@contextmanager
def cache_if_hub_is_away() -> Iterator[None]:
    """Read the cache only, without retries, if the Hub does not answer one request now.

    The request waits for ``HF_HUB_ETAG_TIMEOUT`` seconds (10 by default), and its outcome counts for a minute.
    """
    import datasets.config
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not _is_away():
        yield
        return
    with _lock:
        before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _is_away() -> bool:
    global _last_answer
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    with _lock:
        endpoint, since, away = _last_answer
        if endpoint == constants.ENDPOINT and time.monotonic() - since < _REMEMBER_S:
            return away
        try:
            status = get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT).status_code
        except (HTTPError, OSError):
            status = 503
        _last_answer = constants.ENDPOINT, time.monotonic(), status >= 500
        return _last_answer[2]


def describe_hub_error(error: BaseException) -> str:
    """The fault behind an error of a Hub call, with the errors that caused it, in a few words."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    endpoint, _, away = _last_answer
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    fault = next((text for name, text in _FAULTS.items() if name in names), type(error).__name__)
    is_missing = fault in (_FAULTS["OfflineModeIsEnabled"], _FAULTS["LocalEntryNotFoundError"])
    return f"no answer from {endpoint}, nothing in the cache" if away and is_missing else fault
