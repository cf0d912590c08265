# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny model for some steps, as one of any number of processes, and writes what came of it:
`torchrun --nproc_per_node N distributed_process.py DIRECTORY`. The global batch is 8, whatever N is."""

import json
import os
import sys
from pathlib import Path

import torch


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # in place of this folder, whose modules have common names

from tests.helpers.trainers import make_trainer


def train(directory: Path, world_size: int) -> None:
    """Trains as one of `world_size` processes. The main one writes `report.json` and the model."""
    trainer = make_trainer(
        directory,
        optim="sgd",
        per_device_train_batch_size=8 // world_size,
        num_random_exits=1,
        gradient_checkpointing=True,
        learning_rate=0.05,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(directory)
        report = {
            "world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
            "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "accuracy": metrics["eval_accuracy/exit_2"],
        }
        (directory / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]))
