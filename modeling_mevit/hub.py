# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a model lies. Whether the Hub can be reached is asked once for each name, and before anything is imported that
takes seconds."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


_TIMEOUT = 4.0  # seconds


@cache
def locate(checkpoint: str) -> str:
    """Where to load a checkpoint from: its name, or its directory in the Hub's cache where the Hub does not answer.

    Raises:
        ValueError: where the Hub does not answer and its cache lacks the checkpoint.
    """
    if Path(checkpoint).exists() or answers(checkpoint):
        return checkpoint
    cached = try_to_load_from_cache(checkpoint, "config.json")
    if not isinstance(cached, str):
        raise ValueError(
            f"the Hub cannot be reached, and {checkpoint} is neither a local directory nor in the Hub's cache."
        )
    return str(Path(cached).parent)


def is_export(name_or_path: str | Path) -> bool:
    """Whether a name is that of a directory with the cascade of an export."""
    return Path(name_or_path, "cascade.json").is_file()


@contextmanager
def told_as_os_errors() -> Iterator[None]:
    """Turns what the Hub's client raises where it has no connection into an `OSError`: its versions use three packages
    for HTTP, with exceptions of their own."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"the Hub cannot be reached: {type(error).__name__}: {error}") from error


@cache
def answers(name: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the Hub answers, asked once for a model or a data set; Transformers and Datasets would ask for each file
    of it, and again, for minutes. Where the Hub is set to be offline, it is not asked, and nothing waits for it."""
    if constants.HF_HUB_OFFLINE:
        return True
    answered = threading.Event()

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=_TIMEOUT)
        except (HfHubHTTPError, HFValidationError):
            pass  # an answer too, that the library which loads it puts into words
        except Exception:  # no connection
            return
        answered.set()

    # in a thread, since nothing else limits how long looking up the host's address takes
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    return answered.is_set()
