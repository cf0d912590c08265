# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes or reads a checkpoint in a process of its own.

    checkpoint_process.py write DIRECTORY
    checkpoint_process.py read DIRECTORY [--without-package]

Reading fails if any Auto class gives other outputs than those that were written beside the checkpoint.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification


LABELS = {0: "A318", 1: "A319", 2: "A320", 3: "A321", 4: "A330"}


def write(directory: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.helpers.models import tiny_model

    model = tiny_model(id2label=LABELS)
    pixel_values = torch.randn(4, 3, 16, 16)
    model.save_pretrained(directory)
    with torch.no_grad():
        outputs = model(pixel_values)
    arrays = {"logits": outputs.exit_logits, "scores": outputs.exit_scores}
    np.savez(directory / "expected.npz", pixel_values=pixel_values, **arrays)


def read(directory: Path, **trust) -> None:
    expected = np.load(directory / "expected.npz")
    config = AutoConfig.from_pretrained(directory, **trust)
    assert config.exit_layers == [2, 3, 4]
    assert config.id2label[2] == "A320"
    for auto_class in (AutoModel, AutoModelForImageClassification):
        model, loading = auto_class.from_pretrained(directory, output_loading_info=True, **trust)
        assert not any(loading.values()), loading
        assert type(model).__name__ == "MEViTForImageClassification"
        with torch.no_grad():
            outputs = model.eval()(torch.from_numpy(expected["pixel_values"]))
        np.testing.assert_allclose(outputs.exit_logits, expected["logits"], atol=1e-5)
        np.testing.assert_allclose(outputs.exit_scores, expected["scores"], atol=1e-5)


class Blocked:
    """Finds the package's modules first, and has none of them."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_mevit":
            raise ModuleNotFoundError(name)


if __name__ == "__main__":
    command, directory, *options = sys.argv[1:]
    if command == "write":
        write(Path(directory))
    elif options == ["--without-package"]:
        sys.meta_path.insert(0, Blocked())
        read(Path(directory), trust_remote_code=True)
    else:
        import modeling_mevit  # noqa: F401

        read(Path(directory))
    print("passed")
