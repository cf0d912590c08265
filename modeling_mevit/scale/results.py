# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What scoring leaves behind: a directory of Parquet files, each written whole, and a sentence."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ..early_exit.monitoring import Verdict
from . import files


COLUMNS = pa.schema(
    [
        ("path", pa.string()),  # of the image
        ("label", pa.string()),  # null, like the four below, where the image could not be scored
        ("probability", pa.float32()),  # of the label
        ("exit_layer", pa.int32()),  # where the image left
        ("score", pa.float32()),  # of that exit, low where it is sure
        ("full_label", pa.string()),  # of the full run; null where the image was not audited
        ("error", pa.string()),  # why the image could not be scored, else null
    ]
)
_MODEL = b"mevit"  # key, in a file's metadata, of what scored it
_PARTS = ("part-", ".parquet")
_READERS = 8  # threads
_NO_NAMES = pa.chunked_array([], pa.string())


@dataclass
class Summary:
    """What became of some images; of many blocks by adding up.

    Args:
        images: how many were scored or could not be.
        errors: how many could not be.
        first_error: of them.
        exit_counts: exit layer → how many left there.
    """

    images: int = 0
    errors: int = 0
    first_error: str | None = None
    exit_counts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, results: pa.Table) -> "Summary":
        """That of rows as `COLUMNS` says."""
        reasons = results["error"].drop_null()
        layers = Counter(results["exit_layer"].drop_null().to_pylist())
        first = reasons[0].as_py() if len(reasons) else None
        return cls(len(results), len(reasons), first, dict(sorted(layers.items())))

    def add(self, other: "Summary") -> None:
        """Counts other images in."""
        self.images += other.images
        self.errors += other.errors
        self.first_error = self.first_error or other.first_error
        self.exit_counts = dict(sorted((Counter(self.exit_counts) + Counter(other.exit_counts)).items()))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        content = json.loads(text)
        counts = {int(layer): count for layer, count in content.pop("exit_counts").items()}
        return cls(**content, exit_counts=counts)

    def mean_cost(self, costs: Mapping[int, float]) -> float:
        """Mean cost of the images that were scored, by what leaving at each exit costs; NaN of none."""
        scored = sum(self.exit_counts.values())
        return sum(costs[layer] * n for layer, n in self.exit_counts.items()) / scored if scored else float("nan")


@dataclass(frozen=True)
class ScoringReport:
    """What a run of `score` did, as a sentence.

    Args:
        source: of the images, as given.
        output: directory, as given.
        summary: of the images of this run.
        before: how many images of the source were in `output` already.
        seconds: of the whole run, and
        running: of them, since the first actor had its model.
        costs: exit layer → cost of an image that leaves there, relative to the plain ViT.
        disagreement: what the audited images of this run tell; None where none were to be audited.
    """

    source: str
    output: str
    summary: Summary
    before: int
    seconds: float
    running: float
    costs: dict[int, float]
    disagreement: Verdict | None = None

    @property
    def images_per_second(self) -> float:
        """While the actors ran."""
        return self.summary.images / self.running if self.running else float("nan")

    def __str__(self) -> str:
        summary = self.summary
        already = f"; {self.before:,} more were there already" if self.before else ""
        if not summary.images:
            unaudited = "" if self.disagreement is None else ", and none was audited"
            return f"All {self.before:,} images of {self.source} are in {self.output} already{unaudited}."
        left = [f"{count:,} left at exit {layer}" for layer, count in summary.exit_counts.items()]
        text = (
            f"Scored {summary.images - summary.errors:,} images in {self.seconds:.0f} s "
            f"({self.images_per_second:.1f} a second while the actors ran)"
        )
        if left:
            text += f": {', '.join(left)}, at a mean cost of {summary.mean_cost(self.costs):.3f} of the plain ViT's"
        if summary.errors:
            text += f"; {summary.errors:,} could not be scored, first: {summary.first_error}"
        text = f"{text.removesuffix('.')}. The rows are in {self.output}{already}."
        return text if self.disagreement is None else f"{text} {self._audit(self.disagreement)}"

    def _audit(self, verdict: Verdict) -> str:
        """What the audited images tell, as a sentence or two."""
        one = verdict.tested == 1
        text = f"{verdict.tested:,} image{' was' if one else 's were'} audited, of which {verdict.lost:,} got another "
        text += "label from the full run"
        if self.before:
            text += f"; the {self.before:,} that were there already do not count"
        return f"{text}. {str(verdict)[0].upper()}{str(verdict)[1:]}"


def open_results(directory: str, model: str) -> pa.ChunkedArray:
    """Opens a directory of results, made where there is none, and tells which images it has, by their names.

    Args:
        directory: full name.
        model: digest of what scores the images.

    Raises:
        ValueError: where it holds something else, or what another model scored.
        OSError: where it cannot be read or made.
    """
    kind = files.kind_of(directory)
    if kind == fs.FileType.File:
        raise ValueError(f"OUTPUT must be a directory, got the file {directory}.")
    if kind == fs.FileType.NotFound:
        files.make_directory(directory)
        return _NO_NAMES
    files.remove_parts(directory)
    start, end = _PARTS
    names = [str(PurePosixPath(name).relative_to(directory)) for name in files.files_below(directory)]
    parts = [name for name in names if name.startswith(start) and name.endswith(end) and "/" not in name]
    if len(parts) < len(names):
        other = next(name for name in names if name not in set(parts))
        raise ValueError(f"OUTPUT must be a directory of results alone, or a new one; {directory} has {other}.")
    with ThreadPoolExecutor(_READERS) as pool:
        done = pool.map(lambda name: _paths(f"{directory}/{name}", model), parts)
        return pa.chunked_array([chunk for paths in done for chunk in paths.chunks], pa.string())


def write_results(directory: str, model: str, results: pa.Table) -> None:
    """Writes rows to a file of their own, whole or not at all. The same images have the same file, however often.

    Raises:
        OSError: where it cannot be written.
    """
    buffer = io.BytesIO()
    pq.write_table(results.replace_schema_metadata({_MODEL: model}), buffer, compression="zstd")
    files.write_file(_file_of(directory, results), buffer.getvalue())


def written_results(directory: str, images: pa.Table) -> pa.Table | None:
    """The rows of images that have a file of their own, by their paths; None where they have none."""
    file = _file_of(directory, images)
    if files.kind_of(file) == fs.FileType.NotFound:
        return None
    return pq.read_table(io.BytesIO(files.read_file(file)))


def failed_results(images: pa.Table, error: str) -> pa.Table:
    """Rows of images that could not be scored, all for the same reason."""
    count = len(images)
    return pa.table(
        [images["path"], *(pa.nulls(count, kind.type) for kind in list(COLUMNS)[1:-1]), pa.repeat(error, count)],
        COLUMNS,
    )


def _file_of(directory: str, images: pa.Table) -> str:
    """The file that images have, by their paths."""
    digest = hashlib.sha256()
    for path in images["path"].to_pylist():
        digest.update(path.encode() + b"\0")
    start, end = _PARTS
    return f"{directory}/{start}{digest.hexdigest()[:24]}{end}"


def _paths(file: str, model: str) -> pa.ChunkedArray:
    """Names of the images in one file of results."""
    try:
        table = pq.read_table(io.BytesIO(files.read_file(file)), columns=["path"])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}; remove it, and its images are scored again.") from error
    scored_by = (table.schema.metadata or {}).get(_MODEL, b"").decode()
    if scored_by != model:
        raise ValueError(
            f"OUTPUT must be of this model as it is calibrated now, {model}; {file} is of "
            f"{scored_by or 'something else'}. Give another directory."
        )
    return table["path"]
