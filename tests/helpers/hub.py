# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The Hub's client without the Hub: what would be created and uploaded."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects


@dataclass
class RecordedHub:
    """What the Hub was asked for.

    Args:
        repositories: that were created, by the names that were asked for.
        kinds: arguments of their creation.
        uploads: arguments of each upload, and `files`: relative path → content of what it really sends.
    """

    repositories: list[str] = field(default_factory=list)
    kinds: list[dict[str, Any]] = field(default_factory=list)
    uploads: list[dict[str, Any]] = field(default_factory=list)

    def whoami(self) -> dict[str, str]:
        return {"name": "someone"}

    def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        self.repositories.append(repo_id)
        self.kinds.append(kwargs)
        return SimpleNamespace(repo_id="someone/colours")

    def upload_folder(self, **kwargs: Any) -> Future:
        folder = Path(kwargs["folder_path"])
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        patterns = {name: kwargs.get(name) for name in ("allow_patterns", "ignore_patterns")}
        sent = filter_repo_objects(names, **patterns)
        self.uploads.append({**kwargs, "files": {name: (folder / name).read_bytes() for name in sent}})
        done: Future = Future()
        done.set_result(None)
        return done


def record_hub(monkeypatch: pytest.MonkeyPatch) -> RecordedHub:
    """Puts a record in place of the Hub for one test."""
    hub = RecordedHub()
    monkeypatch.setattr(HfApi, "whoami", lambda self: hub.whoami())
    for name in ("create_repo", "upload_folder"):  # Transformers 5 calls the client's methods, 4 has names of its own
        call = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda self, *args, call=call, **kwargs: call(*args, **kwargs))
        monkeypatch.setattr(f"transformers.trainer.{name}", call, raising=False)
    return hub
