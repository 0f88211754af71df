"""Model folders (config.json and safetensors) and Hub ids (owner/name): checks, load errors, loading, replacement."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from brainfound.errors import ModelError, closest_folder, mistaken_for
from brainfound.hub import SharedChange, cache_if_hub_is_away, describe_hub_error, hub_errors

LOAD_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
"""Errors that transformers or the file system raises for an unreadable source."""
_PREVIOUS = ".previous"
"""Ending of the name of content that is being replaced."""


def is_hub_id(source: str) -> bool:
    """Whether a source looks like owner/name and is not a local path."""
    path = Path(source)
    is_path = path.is_absolute() or source.startswith((".", "~")) or path.exists()
    return source.count("/") == 1 and not is_path


def require_findable(source: str) -> None:
    """Refuse a path that does not exist before the Hub is queried."""
    path = Path(source)
    if not is_hub_id(source) and not path.is_dir():
        what = mistaken_for(path, "a model folder") if path.is_file() else "no such model folder"
        remedy = _suggest_folder(source) or "Give a folder with config.json and safetensors, or a Hub id"
        raise ModelError(what, where=source, remedy=remedy, usage=True)


def _suggest_folder(source: str) -> str | None:
    """A sentence with the model folder of a similar path, if there is one."""

    def holds_model(folder: Path) -> bool:
        return any((folder / name).exists() for name in ("config.json", "bundle.json", "export"))

    close = closest_folder(source, holds_model)
    return f"Did you mean {close}?" if close else None


@contextmanager
def reading_model(source: str) -> Iterator[None]:
    """Turn errors of reading a model into `unreadable_model_error`; without the Hub its cache is read at once."""
    is_local = Path(source).is_dir()
    failures = LOAD_FAILURES if is_local else (*LOAD_FAILURES, *hub_errors())
    try:
        with nullcontext() if is_local else cache_if_hub_is_away():
            yield
    except failures as error:
        raise unreadable_model_error(source, error) from error


def find_file(source: str, name: str, **hub_options: Any) -> Path | None:
    """A file of a folder or of a Hub id; None if there is no such file.

    OSError: the Hub does not answer, and its cache does not know.
    """
    if not is_hub_id(source):
        file = Path(source) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        with cache_if_hub_is_away():
            return Path(hf_hub_download(source, name, **hub_options))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:
        places = {key: hub_options[key] for key in ("cache_dir", "revision") if key in hub_options}
        if try_to_load_from_cache(source, name, **places) is None:
            raise
        return None  # its absence is in the cache


def unreadable_model_error(source: str, error: Exception) -> ModelError:
    """The error for a model that cannot be read, with the remedy that fits the files of `source`."""
    folder = Path(source)
    if not folder.is_dir():
        close = _suggest_folder(source)
        got, remedy = describe_hub_error(error, close or "Check the name and the connection, or give a local folder")
        what = "neither a folder nor a model that can be fetched from the Hugging Face Hub"
        return ModelError(what, where=source, got=got, remedy=remedy, usage=close is not None)
    has_config, export, usage = (folder / "config.json").is_file(), folder / "export", True
    if not has_config and (folder / "adapter_config.json").is_file():
        what = "this is an adapter without the model that it was trained on"
        remedy = "Load that model and give both to peft.PeftModel.from_pretrained, or save a bundle"
    elif not has_config:
        what = mistaken_for(folder, "a model (it has no config.json)")
        remedy = f"Give its export: {export}" if export.is_dir() else "Give a folder that holds a model"
        if runs := sorted(file.parent for file in folder.glob("*/export")):
            remedy = f"Give one of its runs, such as {runs[0]}"
    elif (folder / "bundle.json").is_file():
        what = "this is what a fine-tuning exported, not a model to start from"
        remedy = "Give the model that it was fine-tuned from"
    elif not any(folder.glob("*.safetensors")):
        what = "this folder has no safetensors weights"
        remedy = "Convert the weights to safetensors; pickled weights are refused because they can run code"
    else:
        what, remedy = f"the model cannot be read: {first_line(error)}", "Check that the files are whole"
        usage = False
    return ModelError(what, where=source, remedy=remedy, usage=usage)


def first_line(error: Exception) -> str:
    """The first line of an error's message, cut to 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def require_coverage(source: str, missing: Iterable[str], total: int) -> None:
    """Refuse a checkpoint that lacks weights of the model."""
    missing = sorted(missing)
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} of the model's {total} weights: {list_keys(missing)}",
            where=source,
            remedy="Give a complete checkpoint of this model",
        )


@torch.no_grad()
def require_finite(source: object, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights with an infinite or undefined value; the error names them."""
    # A finite sum, the quick test, has finite terms; only an infinite one may have too, after an overflow.
    broken = [
        name
        for name, values in weights.items()
        if values.is_floating_point() and not values.is_meta
        if not (values.sum().isfinite() or values.isfinite().all())
    ]
    if broken:
        raise ModelError(
            f"{len(broken)} of {len(weights)} weights hold infinite or undefined values: {list_keys(broken)}",
            where=source,
            expected="finite numbers",
            remedy="Take an earlier or whole copy; a conversion to half precision may have overflowed",
        )


def list_keys(keys: Iterable[str]) -> str:
    """The first few of many keys, in one line."""
    keys = sorted(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _silence() -> Callable[[], None]:
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def undo() -> None:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()

    return undo


_silent = SharedChange(_silence)


def silence_transformers() -> AbstractContextManager[None]:
    """Silence progress bars and load reports of transformers, which would alarm users who want a new head."""
    return _silent.hold()


def make_draft_name(folder: Path) -> Path:
    """A new name next to a folder, for its content until `replace_folder`."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")


def replace_folder(folder: Path, draft: Path) -> None:
    """Rename a finished draft to its folder; the previous content stays whole until then, and after a failure."""
    previous = draft.with_name(f"{draft.name}{_PREVIOUS}")
    try:
        if folder.exists():
            folder.rename(previous)
        draft.rename(folder)
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Clear what a killed process left next to a folder; previous content goes back if the folder is gone."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(writing|previous|[0-9a-f]{{8}}(\.previous)?)")
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    for path in sorted(path for path in siblings if path.is_dir() and pattern.fullmatch(path.name)):
        if path.name.endswith(_PREVIOUS) and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)
