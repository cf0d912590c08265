# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Exports a tiny model in a process of its own, which may have another version of Transformers.

    export_process.py DIRECTORY

Writes exits 2 and 4, images and what PyTorch makes of them, and the model cut at exit 2; prints the version.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers


sys.path.insert(0, str(Path(__file__).parents[2]))

from modeling_mevit import export
from modeling_mevit.data.image_processing import image_processor_for
from tests.helpers.models import tiny_model


directory = Path(sys.argv[1])
model = tiny_model()
processor = image_processor_for(16, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], resize_size=20)
export(model, processor, directory, exits=[2, 4])
model.truncate(2).save_pretrained(directory / "cut")  # another version would draw other weights
pixel_values = torch.randn(4, 3, 16, 16)
with torch.no_grad():
    logits = model(pixel_values, early_exit=False).exit_logits
np.savez(directory / "expected.npz", pixel_values=pixel_values, exit_2=logits[:, 0], exit_4=logits[:, 2])
print(transformers.__version__)
