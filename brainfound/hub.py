"""Access to the Hugging Face Hub: its cache at once where it does not answer, and faults in a few words."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
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
_DISK_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
}
"""Numbers of errors of this machine's disk; those of the network are others."""
_lock = threading.RLock()
_last_answer: tuple[str, float, bool] = ("", 0.0, False)


class SharedChange:
    """A change of settings of the process, held by any number of threads: the first makes it, the last undoes it.

    ``change`` makes the change, and returns the function that undoes it.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change, self._lock, self._num_holders = change, threading.RLock(), 0

    @contextmanager
    def hold(self, is_needed: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Hold the change if another thread does, or if it is needed."""
        with self._lock:
            holds = self._num_holders > 0 or is_needed()
            if holds and not self._num_holders:
                self._undo = self._change()
            self._num_holders += holds
        try:
            yield
        finally:
            with self._lock:
                self._num_holders -= holds
                if holds and not self._num_holders:
                    self._undo()


@contextmanager
def cache_if_hub_is_away() -> Iterator[None]:
    """Read the cache only, without retries, if the Hub does not answer one request now.

    The request waits for ``HF_HUB_ETAG_TIMEOUT`` seconds (10 by default), and its outcome counts for a minute.
    """
    from huggingface_hub import constants

    with _offline.hold(lambda: not constants.HF_HUB_OFFLINE and _is_away()):
        yield


def _go_offline() -> Callable[[], None]:
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True

    def undo() -> None:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before

    return undo


_offline = SharedChange(_go_offline)


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


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors that calls of the Hub raise: its own, those of the network and the disk, and refused arguments."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    return (HTTPError, EntryNotFoundError, DatasetsError, OSError, ValueError, RuntimeError)


def describe_hub_error(error: BaseException, remedy: str) -> tuple[str, str]:
    """The fault behind an error of a Hub call, with the errors that caused it, in a few words; and its remedy.

    ``remedy`` is that of faults of the Hub or the network; a fault of this machine's disk has its own.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, OSError) and link.errno in _DISK_FAULTS:
            disk_remedy = "Set HF_HOME to a folder that you may write, on a disk with free space"
            return os.strerror(link.errno), disk_remedy
    endpoint, _, away = _last_answer
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    fault = next((text for name, text in _FAULTS.items() if name in names), type(error).__name__)
    is_missing = fault in (_FAULTS["OfflineModeIsEnabled"], _FAULTS["LocalEntryNotFoundError"])
    return (f"no answer from {endpoint}, nothing in the cache" if away and is_missing else fault), remedy
