# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `mevit`: from a trained checkpoint to one that leaves early, and to files for the edge."""

# Each command parses, calls the library and prints. What it needs is imported inside: help needs neither torch nor
# Transformers.

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ._extras import MissingExtraError, extras_named
from .version import __version__


if TYPE_CHECKING:
    from .modeling_mevit import MEViTForImageClassification

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Policy = Literal["uncertainty", "confidence", "entropy", "margin", "patience"]
Precision = Literal["float32", "float16", "bfloat16", "int8", "int8-dynamic"]
Target = Literal["arm64", "avx2", "avx512_vnni"]
Exporter = Literal["torch", "optimum"]


def _reachable(name: str | None) -> str | None:
    """Checks that a checkpoint is at hand, before torch is imported to load it."""
    if name is not None:
        from .hub import locate

        locate(name)
    return name


Checkpoint = Annotated[
    str,
    typer.Argument(help="Directory or Hub name of a trained model.", show_default=False, callback=_reachable),
]
Source = Annotated[
    str,
    typer.Argument(
        help="Directory or Hub name of a trained model, or an export.", show_default=False, callback=_reachable
    ),
]
Data = Annotated[str, typer.Option(help="A folder of images, a Hub data set, or 'demo'.", show_default=False)]
Half = Annotated[str | None, typer.Option(help="'first' or 'second' half of the split, at random by class, fixed.")]
Output = Annotated[Path | None, typer.Option(help="Directory to write to; the checkpoint's own by default.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of a Hub data set with the images.")]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column of a Hub data set with the labels; 'family' or 'manufacturer' for FGVC-Aircraft."),
]
BatchSize = Annotated[int, typer.Option(help="Images at a time.", min=1)]
Workers = Annotated[int, typer.Option(help="Processes that read images.", min=0)]
Cluster = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster, such as 10.0.0.1:6379 or 'auto'; this machine by default."),
]
Audit = Annotated[
    float | None,
    typer.Option(help="Share of the images that also run to the end, to watch the promise; none by default."),
]
AllowedDisagreement = Annotated[
    float | None,
    typer.Option(help="With --audit: share of the images that may disagree, in place of what calibration promised."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision to run in; by default the checkpoint's, which is the one that it was calibrated in."),
]
DtypeOrExports = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Precision to run in; the checkpoint's by default. Of an export with OpenVINO alone, by default its own."
    ),
]
Backend = Annotated[
    Literal["onnxruntime", "openvino"] | None,
    typer.Option(help="What runs an export; ONNX Runtime by default, for bfloat16 OpenVINO.", show_default=False),
]
Device = Annotated[str | None, typer.Option(help="Such as 'cpu' or 'cuda'; a GPU where there is one, by default.")]


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    data: Data,
    split: Annotated[
        str | None,
        typer.Option(
            help="'validation', the default, 'test', 'train' or 'all'; 'unlabelled' for every image in a folder.",
            show_default=False,
        ),
    ] = None,
    half: Half = None,
    max_cost: Annotated[float | None, typer.Option(help="Best accuracy within this mean cost (1: plain ViT).")] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Lowest cost within this drop against the last exit (0.01: one point).")
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Lowest cost that gives at most this share another label than the last exit; no labels are needed."
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(help="With a drop or a disagreement: certify it for other images, with this probability."),
    ] = None,
    guarantee: Annotated[
        Literal["probability", "expectation"] | None,
        typer.Option(help="'expectation' in place of a confidence: certify it on average; fewer images are enough."),
    ] = None,
    bound: Annotated[
        Literal["harm", "difference"] | None,
        typer.Option(help="With a drop and a confidence: test the harm rate, the default, or the drop itself."),
    ] = None,
    exits: Annotated[
        str | None, typer.Option(help="Layers whose exits images may leave at, such as 6,8; all by default.")
    ] = None,
    policy: Annotated[Policy | None, typer.Option(help="Exit policy; the checkpoint's by default.")] = None,
    output: Output = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    num_workers: Workers = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Chooses the thresholds of early exit on held-out images, and turns it on in the checkpoint's config."""
    from . import CalibrationTarget, DataSource
    from . import calibrate as run_calibration
    from .atomic import locked
    from .checkpoint import load_image_processor, output_directory, save_calibrated
    from .data.datasets import default_split

    layers = None if exits is None else tuple(_layers(exits))
    target = CalibrationTarget(max_cost, max_accuracy_drop, confidence, bound, max_disagreement, guarantee, layers)
    directory = output_directory(checkpoint, output)
    with locked(directory):
        model = _load_to_calibrate(checkpoint, device, dtype)
        source = DataSource(data, split or default_split(data, "validation"), half, image_column, label_column)
        dataset = source.load(model.config.label2id, load_image_processor(checkpoint))
        result = run_calibration(model, dataset, target, policy=policy, batch_size=batch_size, num_workers=num_workers)
        print(result)
        result.apply_to(model.config)
        save_calibrated(model, checkpoint, directory)
    print(f"Early exit is {'on' if model.config.early_exit else 'off'} in {directory}.")
    raise typer.Exit(0 if result.operating_point else 1)


@app.command()
def evaluate(
    checkpoint: Source,
    data: Data,
    split: Annotated[
        str | None, typer.Option(help="'test', the default, 'validation', 'train' or 'all'.", show_default=False)
    ] = None,
    half: Half = None,
    plain: Annotated[
        str | None,
        typer.Option(help="Checkpoint of a plain ViT to compare with on the same images.", callback=_reachable),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also evaluate on images that chose the thresholds.")] = False,
    output: Output = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    num_workers: Annotated[int, typer.Option(help="Processes that read images; they disturb times.", min=0)] = 0,
    device: Device = None,
    dtype: DtypeOrExports = None,
    backend: Backend = None,
) -> None:
    """Measures every exit, every policy and the early-exit run, of a checkpoint or of an exported cascade.

    Writes evaluation.json, evaluation.md and accuracy_cost.png, and renders the checkpoint's card anew.
    """
    from . import DataSource
    from . import evaluate as run_evaluation
    from .atomic import locked
    from .checkpoint import load_image_processor, load_predictor, output_directory, plain_accuracy, save_evaluation
    from .data.datasets import default_split

    directory = output_directory(checkpoint, output)
    with locked(directory):
        predictor = load_predictor(checkpoint, device, dtype, backend)
        source = DataSource(data, split or default_split(data, "test"), half, image_column, label_column)
        dataset = source.load(predictor.config.label2id, load_image_processor(checkpoint))
        loading = {"batch_size": batch_size, "num_workers": num_workers}
        evaluation = run_evaluation(predictor, dataset, allow_calibration_images=force, **loading)
        if plain:
            evaluation = evaluation.with_plain(plain_accuracy(plain, source, device, dtype, **loading))
        print(save_evaluation(evaluation, directory))
    print(f"\nevaluation.json, evaluation.md and accuracy_cost.png are in {directory}.")


@app.command()
def predict(
    checkpoint: Source,
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DtypeOrExports = None,
    backend: Backend = None,
) -> None:
    """Prints label, probability and exit layer of each image, or why there are none."""
    from .checkpoint import load_image_processor, load_predictor
    from .early_exit.inference import Failure, predict_files

    predictor = load_predictor(checkpoint, device, dtype, backend)
    failed = False
    for answer in predict_files(predictor, load_image_processor(checkpoint), images, batch_size=batch_size):
        if isinstance(answer, Failure):
            failed = True
            print(f"{answer.file}\terror: {_one_line(answer.reason)}")
        else:
            print(f"{answer.file}\t{answer.label}\t{answer.probability:.3f}\texit {answer.exit_layer}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Directory that does not exist yet.", show_default=False)],
    exits: Annotated[
        str | None,
        typer.Option(
            help="Exit layers to export a file for, such as 6,9; all by default, with --cascade only the last one."
        ),
    ] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Export the chain of stages between exits too.")] = False,
    early_exit: Annotated[bool, typer.Option(help="Whether the cascade leaves early by default.")] = True,
    precision: Annotated[Precision, typer.Option(help="Precision of weights and activations.")] = "float32",
    target: Annotated[
        Target | None, typer.Option(help="Processor that int8 files are made for; this machine's by default.")
    ] = None,
    exporter: Annotated[
        Exporter, typer.Option(help="What writes the exits' files; 'optimum' needs mevit[optimum], Transformers 4.57.")
    ] = "torch",
    data: Annotated[
        str | None, typer.Option(help="With a lower precision: the data set that the model was trained on.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of --data to choose new thresholds on; by default, the images that calibrated."),
    ] = None,
    half: Half = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    web: Annotated[
        bool, typer.Option("--web", help="With the cascade, add a page that runs it in a browser.")
    ] = False,
    examples: Annotated[
        str | None, typer.Option(help="With --web: folder of images that a visitor can try, or 'demo'.")
    ] = None,
    ort_dir: Annotated[
        Path | None, typer.Option(help="With --web: folder with the files of onnxruntime-web; npm's by default.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="With --web: name of the Space to upload the page to.")
    ] = None,
    triton: Annotated[
        bool, typer.Option("--triton", help="With the cascade, add a model repository for Triton Inference Server.")
    ] = False,
    repo_type: Annotated[Literal["space"], typer.Option(help="What --push-to-hub uploads to.")] = "space",
) -> None:
    """Writes ONNX files that were compared with PyTorch: one for each exit, and the cascade."""
    from . import DataSource
    from . import export as run_export
    from .checkpoint import load_image_processor, quantization_for
    from .onnx.page import check_space, prepare_page, push_space

    if precision == "float32" and (data or split or half or target):
        raise ValueError("--data, --split, --half and --target are for a lower --precision, got float32.")
    if not web and (examples or ort_dir or push_to_hub):
        raise ValueError("--examples, --ort-dir and --push-to-hub are for the page of --web, which is not asked for.")
    if web and not cascade:
        raise ValueError("--web is for the page of a cascade; add --cascade.")
    if triton and not cascade:
        raise ValueError("--triton is for the stages of a cascade; add --cascade.")
    layers = None if exits is None else _layers(exits)
    # in float32 also where it was calibrated in another precision, whose weights would be rounded
    model, quantization = _load_to_calibrate(checkpoint, "cpu", "float32"), None
    image_processor = load_image_processor(checkpoint)
    if precision != "float32":
        if data is None:
            raise ValueError(f"--precision {precision} needs --data, for ranges of activations and for thresholds.")
        source = DataSource(data, split or "", half, image_column, label_column)
        quantization = quantization_for(model.config, image_processor, source, precision, target)
    page = prepare_page(checkpoint, examples, ort_dir) if web else None
    if push_to_hub:
        check_space(push_to_hub)  # before the export, which takes longer
    done = run_export(
        model,
        image_processor,
        output,
        exits=layers,
        cascade=cascade,
        early_exit=early_exit,
        quantization=quantization,
        exporter=exporter,
        page=page,
        triton=triton,
    )
    print(done)
    if web:
        print(f"To see the page: python -m modeling_mevit.onnx.serve {output}")
    if push_to_hub:
        print(f"The page is in https://huggingface.co/spaces/{push_space(done.directory, push_to_hub)}")
    raise typer.Exit(1 if done.lost_early_exit else 0)


@app.command()
def benchmark(
    checkpoint: Checkpoint,
    exported: Annotated[Path, typer.Argument(help="What `mevit export --cascade` wrote.", show_default=False)],
    data: Data,
    split: Annotated[str, typer.Option(help="Split of --data to run on.")] = "test",
    images: Annotated[int, typer.Option(help="How many of them, drawn at random.", min=1)] = 100,
    threads: Annotated[
        int, typer.Option(help="Threads of one operator; by default, the library's choice.", min=0)
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    dtype: DtypeOrExports = None,
    backend: Backend = None,
) -> None:
    """Measures size, latency, memory and energy at batch 1, beside the plain ViT, in PyTorch and as exported."""
    from . import DataSource
    from .checkpoint import check_export_of, draw_images, load_image_processor, load_model, save_benchmark
    from .onnx.benchmark import benchmark as run_benchmark
    from .onnx.benchmark import find_energy_monitor

    model = load_model(checkpoint, "cpu", dtype)
    check_export_of(model.config, exported)
    source = DataSource(data, split, None, image_column, label_column)
    arrays = draw_images(source.load(model.config.label2id, load_image_processor(checkpoint)), images)
    monitor, why_no_energy = find_energy_monitor()
    settings = {"threads": threads, "energy_monitor": monitor, "backend": backend, "dtype": dtype}
    rows = run_benchmark(checkpoint, exported, arrays, **settings)
    print(save_benchmark([row.to_dict() for row in rows], why_no_energy, len(arrays), threads, output))


@app.command()
def score(
    checkpoint: Source,
    source: Annotated[
        str,
        typer.Argument(help="Images: a folder, a glob, Parquet files, or a URI such as s3://…", show_default=False),
    ],
    output: Annotated[str, typer.Argument(help="Directory or URI for Parquet files of results.", show_default=False)],
    cluster: Cluster = None,
    actors: Annotated[
        int | None, typer.Option(help="Processes with the model; as many as there is room for, by default.", min=1)
    ] = None,
    cpus: Annotated[int, typer.Option(help="CPUs of an actor.", min=1)] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs of an actor; a part of one where several share it.", min=0)] = 0,
    memory: Annotated[
        float | None, typer.Option(help="Memory of an actor in GiB, to put no more on a machine than fit.", min=0)
    ] = None,
    batch_size: BatchSize = 32,
    image_column: Annotated[
        str | None, typer.Option(help="Column of Parquet files with images or their names.")
    ] = None,
    audit: Audit = None,
    max_disagreement: AllowedDisagreement = None,
) -> None:
    """Scores any number of images on Ray Data; run again, it scores only those that OUTPUT lacks."""
    from .scale.score import score as run_score

    report = run_score(
        checkpoint,
        source,
        output,
        cluster=cluster,
        actors=actors,
        cpus=cpus,
        gpus=gpus,
        memory=memory,
        batch_size=batch_size,
        image_column=image_column,
        audit=audit,
        max_disagreement=max_disagreement,
    )
    print(report)


@app.command()
def serve(
    words: Annotated[
        list[str],
        typer.Argument(metavar="EXPORT", help="What `mevit export --cascade` wrote.", show_default=False),
    ],
    segments: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", help="Exits to cut the cascade at, such as 6 9 12; each part has replicas of its own."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other needs a token in MEVIT_SERVE_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    cluster: Cluster = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch, at most.", min=1)] = 8,
    batch_wait: Annotated[float, typer.Option(help="ms that an image waits for others, at most.", min=0)] = 5,
    replicas: Annotated[
        int | None, typer.Option(help="Most replicas of a segment; by default, as many as there are CPUs for.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of a replica; segments share that many CPUs.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Most images accepted and not answered yet.", min=1)] = 64,
    deadline: Annotated[float, typer.Option(help="Seconds until an accepted request is given up.")] = 30,
    max_images: Annotated[int, typer.Option(help="Most images in a request.", min=1)] = 32,
    max_megabytes: Annotated[float, typer.Option(help="Largest request, in megabytes.")] = 16,
    max_megapixels: Annotated[float, typer.Option(help="Largest image, up to 178; told before it is decoded.")] = 50,
    audit: Audit = None,
    max_disagreement: AllowedDisagreement = None,
    audit_state: Annotated[
        str | None, typer.Option(help="With --audit: file that keeps the audit's findings across restarts.")
    ] = None,
) -> None:
    """Serves an exported cascade by HTTP on Ray Serve: POST /predict, GET /healthz and /metrics."""
    from .scale.requests import Limits
    from .scale.serve import Service, token_from_environment
    from .scale.serve import serve as run_serve

    # `--segments 6 9 12`: layers after the first one arrive as arguments
    layers = [] if segments is None else [segments, *(word for word in words if word.isdigit())]
    exports = words if segments is None else [word for word in words if not word.isdigit()]
    if len(exports) != 1:
        raise ValueError(f"EXPORT must be one directory, got {len(exports)}: {', '.join(exports)}.")
    service = Service(
        exports[0],
        _layers(",".join(layers), "--segments"),
        host,
        port,
        batch_size,
        batch_wait,
        replicas,
        threads,
        queue,
        deadline,
        Limits(max_megabytes, max_images, max_megapixels),
        token_from_environment(),
        audit,
        max_disagreement,
        audit_state,
    )
    run_serve(service, cluster)


def _one_line(message: object) -> str:
    return " ".join(line.strip() for line in str(message).splitlines() if line.strip())


def _load_to_calibrate(checkpoint: str, device: str | None, dtype: str | None) -> "MEViTForImageClassification":
    """The model, in a precision that its thresholds may not be of, without a warning of that: they are chosen anew, or
    refused."""
    from .checkpoint import load_model

    with warnings.catch_warnings():
        for told in ("exit_thresholds were chosen in", "the certificate of early exit is gone: the precision is"):
            warnings.filterwarnings("ignore", message=told, category=UserWarning)
        return load_model(checkpoint, device, dtype)


def _layers(text: str, option: str = "--exits") -> list[int]:
    numbers = text.replace(",", " ").split()
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"{option} must be layer numbers with commas between, such as 6,9,12, got {text!r}.")
    return [int(number) for number in numbers]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mevit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Multi-exit Vision Transformers: calibrate, evaluate, predict, export, score, serve."""


def main() -> None:
    """The console script: bad input ends with one line."""
    try:
        with extras_named("this command"):
            app()
    except (ValueError, OSError, MissingExtraError) as error:
        sys.exit(f"mevit: error: {_one_line(error)}")
