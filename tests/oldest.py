# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Prints, as constraints for pip, the oldest version that setup.cfg allows of what the core and training need."""

import re
from configparser import ConfigParser
from pathlib import Path


config = ConfigParser()
config.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
extras = config["options.extras_require"]
requirements = "\n".join(
    (config["options"]["install_requires"], extras.get("data", raw=True), extras.get("train", raw=True))
)
for name, version in re.findall(r"^([\w-]+)>=([\d.]+)", requirements, flags=re.MULTILINE):
    print(f"{name}=={version}")
