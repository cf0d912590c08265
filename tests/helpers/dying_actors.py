# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""An actor that ends its process, which Ray imports elsewhere."""

import os
import signal
from typing import Any

from modeling_mevit.scale.score import ScoringActor


class DiesOfAnImage(ScoringActor):
    """As a file does that Pillow or the model cannot survive: one that is called killer.png."""

    def _read(self, path: str, content: bytes | None) -> Any:
        if path.endswith("killer.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(path, content)
