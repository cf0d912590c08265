# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Keeps what runs gave in one small table: settings, seed, accuracy of every exit, time.

    python training/collect_runs.py training/results/grocery_store --runs runs/vit runs/mevit

Each run is an output directory of `train.py`; its name is the directory's. `runs.json` holds all of `metrics.json`;
`runs.md` shows the settings that differ between the runs. Runs that the table already has under the same name are
replaced, others stay.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from modeling_mevit.reports.tables import markdown_table, measured_splits


@dataclass
class CollectArguments:
    """Which runs are added."""

    runs: list[str] = field(metadata={"help": "Output directories of train.py."})


def read_run(directory: str) -> dict[str, Any]:
    """What `metrics.json` of a run says, under the name of its directory."""
    file = Path(directory, "metrics.json")
    if not file.is_file():
        raise ValueError(f"a run must be the output directory of a finished run, with metrics.json, got {directory}")
    return {"run": Path(directory).resolve().name, **json.loads(file.read_text(encoding="utf-8"))}


def table_of(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for each run with the settings that differ, its first and last exit, and its minutes."""
    names = dict.fromkeys(name for run in runs for name in run["recipe"])
    varying = [name for name in names if len({json.dumps(run["recipe"].get(name)) for run in runs}) > 1]
    splits = [split for split in ("validation", "test") if any(split in measured_splits(run["exits"]) for run in runs)]
    ends = [(split, end) for split in splits for end in ("first", "last")]
    header = ["run", *varying, *(f"{split}, {end} exit (%)" for split, end in ends), "minutes"]
    rows = []
    for run in runs:
        settings = [_cell(run["recipe"].get(name)) for name in varying]
        accuracies = [run["exits"][0 if end == "first" else -1].get(f"{split}_accuracy") for split, end in ends]
        per_cent = [None if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in accuracies]
        seconds = run["training_seconds"]
        rows.append([run["run"], *settings, *per_cent, None if seconds is None else f"{seconds / 60:.0f}"])
    return markdown_table(header, rows)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Adds runs to the table of a directory. Returns all of its runs."""
    parser = HfArgumentParser(CollectArguments)
    parser.add_argument("directory", type=Path, help="Where runs.json and runs.md are.")
    arguments, known = parser.parse_args_into_dataclasses(argv)
    table = known.directory / "runs.json"
    runs = {run["run"]: run for run in json.loads(table.read_text(encoding="utf-8"))} if table.is_file() else {}
    added = [read_run(directory) for directory in arguments.runs]
    if len({run["run"] for run in added}) < len(added):
        raise ValueError(f"--runs must be directories of different names, got {' '.join(arguments.runs)}")
    runs |= {run["run"]: run for run in added}
    in_order = [runs[name] for name in sorted(runs)]
    known.directory.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(in_order, indent=1) + "\n", encoding="utf-8")
    (known.directory / "runs.md").write_text(table_of(in_order) + "\n", encoding="utf-8")
    return in_order


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


if __name__ == "__main__":
    main()
