# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The runtime that needs numpy and onnxruntime alone."""

import ast
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from modeling_mevit import MEViTCascade, MEViTConfig
from modeling_mevit.onnx import cascade_mevit
from modeling_mevit.onnx.cascade_mevit import Cascade, large_blocks_apart, read_image, read_labels, read_stages
from tests.helpers.exports import run_in_parts
from tests.helpers.models import TINY


pytestmark = pytest.mark.one_major


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """A copy of the export, which a test may damage."""
    return shutil.copytree(exported, tmp_path / "copied")


def test_runs_where_neither_torch_nor_transformers_can_be_imported(exported, calibrated_model, image_file, tmp_path):
    program = tmp_path / "without.py"
    lines = [
        "import runpy, sys",
        "for name in ('torch', 'transformers', 'optimum', 'openvino', 'modeling_mevit'):",
        "    sys.modules[name] = None",
        f"sys.argv = ['cascade_mevit.py', {str(exported)!r}, {str(image_file)!r}]",
        f"runpy.run_path({str(exported / 'cascade_mevit.py')!r}, run_name='__main__')",
    ]
    program.write_text("\n".join(lines))
    answer = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout
    processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    with torch.no_grad():
        outputs = calibrated_model(processor(Image.open(image_file), return_tensors="pt")["pixel_values"])
    probability, label = outputs.logits.softmax(-1).max(-1)
    file, name, given, exit_layer = answer.strip().split("\t")
    assert (file, name, exit_layer) == (str(image_file), f"LABEL_{label.item()}", f"exit {outputs.exit_layer.item()}")
    assert float(given) == pytest.approx(probability.item(), abs=2e-3)


def test_keeps_to_the_syntax_of_python_3_8():
    source = Path(cascade_mevit.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    # `X | None` and `list[int]` are annotations only, which then are not evaluated
    assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")]
    _fields_ += [(f"other_{number}", ctypes.c_size_t) for number in range(5)]


def test_while_a_session_opens_large_blocks_are_apart_from_the_heap():
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or newer")
    library.mallinfo2.restype = MallInfo
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]

    def is_apart(size: int) -> bool:
        before = library.mallinfo2().hblkhd
        block = library.malloc(size)
        taken = library.mallinfo2().hblkhd - before
        library.free(block)
        return taken >= size

    with large_blocks_apart():
        assert is_apart(2**21) and not is_apart(2**16)
    assert not is_apart(2**21)
    with pytest.raises(RuntimeError), large_blocks_apart():
        raise RuntimeError
    assert not is_apart(2**21)


def test_without_glibc_a_session_opens_too(exported, images, monkeypatch):
    def no_library(name):
        raise TypeError("no name was given, as Windows says")

    monkeypatch.setattr(cascade_mevit.ctypes, "CDLL", no_library)
    assert len(Cascade(exported)(images.numpy()).exit_layer) == 8


@pytest.mark.parametrize("open_export", [Cascade, MEViTCascade.from_pretrained])
def test_sessions_go_with_the_last_reference_to_a_cascade(exported, open_export):
    """Not at some later garbage collection: that of a forked process would wait for threads that it does not have."""
    gc.disable()
    try:
        cascade = open_export(exported)
        stages = getattr(cascade, "cascade", cascade).stages
        sessions = [weakref.ref(graph.session) for stage in stages for graph in stage]
        del cascade, stages
        assert [session() for session in sessions] == [None] * 6
    finally:
        gc.enable()


def test_reads_images_as_the_image_processor_does(exported, image_file):
    processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    expected = processor(Image.open(image_file), return_tensors="np")["pixel_values"]
    given = Cascade(exported).preprocess([image_file, Image.open(image_file)])
    np.testing.assert_allclose(given, np.concatenate([expected, expected]), atol=1e-5)


def test_settings_are_those_of_the_config(copied, images):
    file = copied / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "exit_thresholds": 10.0}))
    assert Cascade(copied)(images.numpy()).exit_layer.tolist() == [2] * 8
    file.write_text(json.dumps({**settings, "early_exit": False}))
    assert Cascade(copied)(images.numpy()).exit_layer.tolist() == [4] * 8


@pytest.mark.parametrize(
    "id2label", [{0: "LABEL_0", 1: "LABEL_1"}, {index: f"species {index}" for index in range(12)}]
)
def test_labels_are_in_the_order_of_the_logits(tmp_path, id2label):
    MEViTConfig(**{**TINY, "num_labels": len(id2label), "id2label": id2label}).save_pretrained(tmp_path)
    assert read_labels(json.loads((tmp_path / "config.json").read_text())) == list(id2label.values())


def test_images_near_a_threshold_are_told_for_each_call(exported, images):
    cascade = Cascade(exported)
    _, scores = cascade.every_exit(images.numpy())
    # one image goes on although it is near the first exit's threshold; another is near the second's, which it reaches
    first, second = np.argsort(scores[:, 0])[[4, 6]]
    thresholds = [float(scores[first, 0]) - 5e-5, float(scores[second, 1]) - 5e-5]
    output = cascade(images.numpy(), early_exit=True, exit_thresholds=thresholds)
    assert output.exit_layer[first] > 2 and output.exit_layer[second] > 2
    assert np.flatnonzero(output.borderline).tolist() == sorted([first, second])
    # an image that left before is not near a threshold that it never met
    output = cascade(images.numpy(), early_exit=True, exit_thresholds=[10.0, thresholds[1]])
    assert not output.borderline.any()
    assert not cascade(images.numpy(), early_exit=False).borderline.any()


def test_later_stages_run_on_the_images_that_go_on(exported, images, monkeypatch):
    _, scores = Cascade(exported).every_exit(images.numpy())
    first = np.sort(scores[:, 0])[2:4].mean()
    second = np.sort(scores[scores[:, 0] >= first, 1])[1:3].mean()
    batches = {}
    run = cascade_mevit.run

    def counted(session, inputs):
        batches.setdefault(id(session), []).append(len(next(iter(inputs.values()))))
        return run(session, inputs)

    monkeypatch.setattr(cascade_mevit, "run", counted)
    cascade = Cascade(exported)
    exit_layer = cascade(images.numpy(), early_exit=True, exit_thresholds=[first, second]).exit_layer
    after = [8, int((exit_layer > 2).sum()), int((exit_layer > 3).sum())]
    assert 8 > after[1] > after[2] > 0  # so that the test can fail
    for place, (stage, query) in enumerate(cascade.stages):
        assert batches[id(stage)] == [after[place]]
        # [CLS] of all that come, the other tokens of those that go on
        assert batches[id(query)] == [after[place], *after[place + 1 : place + 2]]


def test_an_exit_where_nobody_can_leave_is_not_asked(exported, images, monkeypatch):
    cascade = Cascade(exported)
    logits, scores = cascade.every_exit(images.numpy())
    queries = {}
    run = cascade_mevit.run

    def recorded(session, inputs):
        if "hidden_queries" in inputs:
            queries.setdefault(id(session), []).append(inputs["hidden_queries"].shape[:2])
        return run(session, inputs)

    monkeypatch.setattr(cascade_mevit, "run", recorded)
    second = np.sort(scores[:, 1])[3:5].mean()
    output = cascade(images.numpy(), early_exit=True, exit_thresholds=[0.0, second])
    leaves = scores[:, 1] < second
    assert output.exit_layer.tolist() == np.where(leaves, 3, 4).tolist() and 0 < leaves.sum() < 8
    np.testing.assert_allclose(output.logits, np.where(leaves[:, None], logits[:, 1], logits[:, 2]), atol=1e-5)
    num_tokens = 17
    stay = int((~leaves).sum())
    assert [queries[id(query)] for _, query in cascade.stages] == [
        [(8, num_tokens)],  # all tokens at once
        [(8, 1), (stay, num_tokens - 1)],
        [(stay, 1)],
    ]
    queries.clear()
    np.testing.assert_allclose(cascade(images.numpy(), early_exit=False).logits, logits[:, 2], atol=1e-5)
    assert [queries[id(query)] for _, query in cascade.stages] == [[(8, num_tokens)], [(8, num_tokens)], [(8, 1)]]


@pytest.mark.parametrize("cuts", [[1], [2], [1, 2]])
@pytest.mark.parametrize("first", [None, 0.0])  # images leave at each exit; the first exit is not asked
def test_a_cascade_can_be_cut_at_any_exit(exported, images, cuts, first):
    cascade = Cascade(exported)
    logits, scores = cascade.every_exit(images.numpy())
    second = float(np.sort(scores[:, 1])[3]) + 5e-5  # an image is near it
    thresholds = [float(np.sort(scores[:, 0])[1:3].mean()) if first is None else first, second]
    whole = cascade(images.numpy(), early_exit=True, exit_thresholds=thresholds)
    assert set(whole.exit_layer) == ({2, 3, 4} if first is None else {3, 4}) and whole.borderline.any()
    parts = run_in_parts(exported, images.numpy(), cuts, early_exit=True, exit_thresholds=thresholds)
    assert parts.exit_layer.tolist() == whole.exit_layer.tolist()
    assert parts.borderline.tolist() == whole.borderline.tolist()
    np.testing.assert_array_equal(parts.logits, whole.logits)
    np.testing.assert_array_equal(parts.exit_score, whole.exit_score)
    places = (whole.exit_layer - 2)[:, None]
    np.testing.assert_allclose(whole.exit_score, np.take_along_axis(scores, places, axis=1)[:, 0], atol=1e-6)
    np.testing.assert_allclose(whole.logits, np.take_along_axis(logits, places[..., None], axis=1)[:, 0], atol=1e-5)


def test_a_part_has_only_its_own_graphs(copied, images):
    for file in ("stage_2.onnx", "query_2.onnx", "stage_4.onnx", "query_4.onnx"):
        (copied / file).write_bytes(b"no graph")
    assert len(Cascade(copied, places=range(1, 2)).stages) == 1
    for places in (range(1, 3), None):
        with pytest.raises(ValueError, match="is damaged"):
            Cascade(copied, places=places)


def test_a_part_does_not_answer_for_the_whole(exported, images):
    part = Cascade(exported, places=range(2))
    for run in (part, part.every_exit):
        with pytest.raises(ValueError, match=r"must have all places, range\(0, 3\), got range\(0, 2\)"):
            run(images.numpy())


@pytest.mark.parametrize(
    "given", [{"backend": "onnxruntime"}, {"precision": "float32"}, {"threads": 1}, {"providers": "CPU"}]
)
def test_what_runs_the_graphs_is_said_once(exported, given):
    opened = Cascade(exported)
    assert opened.backend == "onnxruntime" and Cascade(exported, graphs=opened.open).backend is None
    with pytest.raises(ValueError, match="must be left out with graphs, which something else runs"):
        Cascade(exported, graphs=opened.open, **given)


def test_another_provider_is_another_precision(copied, monkeypatch):
    config = json.loads((copied / "config.json").read_text())
    operating_point = {"thresholds": config["exit_thresholds"]}
    (copied / "config.json").write_text(json.dumps({**config, "calibration": {"operating_point": operating_point}}))
    opened = Cascade(copied)
    assert opened.precision == opened.open("stage_2.onnx").precision_of("float32") == "float32"
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["CUDAExecutionProvider"])
    assert opened.open("stage_2.onnx").precision_of("float32") == "float32 by CUDAExecutionProvider"
    with pytest.warns(UserWarning, match="chosen in float32, got float32 by CUDAExecutionProvider"):
        Cascade(copied)


@pytest.mark.parametrize("places", [range(0), range(2, 4), range(-1, 1), range(0, 3, 2), range(2, 0, -1)])
def test_parts_that_there_are_not_are_named(exported, places):
    with pytest.raises(ValueError, match=r"places must be some of range\(0, 3\) in a row, got range"):
        Cascade(exported, places=places)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (np.zeros((1, 3, 18, 16), np.float32), r"shape \(B, 3, 16, 16\), got \(1, 3, 18, 16\)"),
        (np.zeros((3, 16, 16), np.float32), r"got \(3, 16, 16\)"),
        (np.zeros((1, 3, 16, 16), np.uint8), "pixel_values must be a numpy array of float32, got uint8"),
        ([[1.0]], "got list"),
    ],
)
def test_images_of_another_kind_are_named(exported, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        Cascade(exported)(pixel_values)


@pytest.mark.parametrize("name", ["cascade.json", "config.json", "preprocessor_config.json"])
def test_an_unfinished_export_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"copied is not a finished export of a cascade; it has no {name}"):
        Cascade(copied)


def test_damaged_graphs_are_named(copied):
    (copied / "stage_3.onnx").write_bytes((copied / "stage_3.onnx").read_bytes()[:1000])
    with pytest.raises(ValueError, match="stage_3.onnx is damaged"):
        Cascade(copied)
    (copied / "stage_3.onnx").unlink()
    with pytest.raises(ValueError, match="stage_3.onnx is missing, or is not a regular file"):
        Cascade(copied)


@pytest.mark.parametrize(
    ("description", "lacks"),
    [
        (
            {"stages": [{"exit_layer": 2, "stage": "stage_2.onnx", "rows": "rows_2.onnx", "cost": 0.5}]},
            ", whose cascade.json lacks query and score",
        ),
        (
            {"stages": [{"exit_layer": 2, "stage": "stage_2.onnx", "query": "query_2.onnx", "cost": 0.5}]},
            ", whose cascade.json lacks score",
        ),
        ({"stages": [], "policy": "margin", "thresholds": [0.5], "early_exit": True}, ""),
    ],
)
def test_an_export_of_an_older_version_is_refused(copied, description, lacks):
    (copied / "cascade.json").write_text(json.dumps(description))
    message = f"older version{lacks}; export the checkpoint again with `mevit export`"
    with pytest.raises(ValueError, match=message) as raised:
        Cascade(copied)
    assert "\n" not in str(raised.value)


def test_thresholds_are_checked_as_the_model_checks_them(exported):
    cascade, image = Cascade(exported), np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(ValueError, match=r"exit_thresholds must be one number or 2, got \[0.5\]"):
        cascade(image, exit_thresholds=[0.5])
    with pytest.raises(ValueError, match="exit_thresholds must be numbers, got nan"):
        cascade(image, exit_thresholds=float("nan"))
    with pytest.raises(ValueError, match="exit_thresholds need early_exit=True"):
        cascade(image, early_exit=False, exit_thresholds=0.5)
    cascade.config["exit_thresholds"] = None
    with pytest.raises(ValueError, match="neither the call nor the export has any"):
        cascade(image)


def test_providers_by_name_and_with_options(exported):
    image = np.zeros((1, 3, 16, 16), np.float32)
    expected = Cascade(exported)(image).logits
    for providers in ("CPUExecutionProvider", [("CPUExecutionProvider", {})]):
        np.testing.assert_array_equal(Cascade(exported, providers=providers)(image).logits, expected)
    for providers in (["NoProvider"], [("NoProvider", {"option": "1"})]):
        with pytest.raises(ValueError, match="NoProvider is not installed; these are: .*CPUExecutionProvider"):
            Cascade(exported, providers=providers)


@pytest.mark.parametrize("arguments", [["nowhere", "image.png"], ["EXPORTED", "nowhere.png"], ["EXPORTED", __file__]])
def test_the_runtime_file_ends_with_one_line(exported, arguments):
    arguments = [str(exported) if argument == "EXPORTED" else argument for argument in arguments]
    result = subprocess.run(
        [sys.executable, exported / "cascade_mevit.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("cascade_mevit.py: error: ")


# An export is data from anyone


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", ["../stage_2.onnx", "/tmp/stage_2.onnx", "a\\b.onnx", "..", ".", "", "C:x", "x\n", 3])
def test_files_have_plain_names(copied, name):
    stages = read_stages(copied)
    shutil.copy(copied / "stage_2.onnx", copied.parent)
    change(copied / "cascade.json", stages=[{**stages[0], "stage": name}, *stages[1:]])
    with pytest.raises(ValueError, match="the name of a file of .*copied must be letters, digits, .*, got ") as raised:
        Cascade(copied)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["stage_3.onnx", "config.json"])
def test_links_lead_to_files_of_the_directory_only(copied, images, name):
    (copied / name).rename(copied / "other")
    (copied / name).symlink_to("other")
    assert Cascade(copied)(images.numpy()).logits.shape == (8, 5)
    (copied / "other").rename(copied.parent / "other")
    (copied / name).unlink()
    (copied / name).symlink_to("../other")
    with pytest.raises(ValueError, match=f"{name} must lie in that directory itself, got a link to .*other"):
        Cascade(copied)


def test_the_layout_of_the_hubs_cache_loads(exported, images, tmp_path):
    repository = tmp_path / "models--someone--export"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(exported, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    np.testing.assert_array_equal(Cascade(snapshot)(images.numpy()).logits, Cascade(exported)(images.numpy()).logits)
    # blobs of another repository are not this one's
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(ValueError, match="must lie in that directory itself"):
        Cascade(snapshot)


def test_what_is_no_regular_file_is_refused(copied):
    (copied / "stage_2.onnx").unlink()
    os.mkfifo(copied / "stage_2.onnx")  # opening it would wait for ever
    with pytest.raises(ValueError, match="stage_2.onnx is missing, or is not a regular file"):
        Cascade(copied)


def test_weights_in_other_files_are_refused(copied, monkeypatch):
    model = onnx.load(copied / "stage_2.onnx")
    onnx.save(model, copied / "stage_2.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    monkeypatch.setattr(cascade_mevit, "READ_AT_ONCE", 3)  # so that the key is found across reads
    with pytest.raises(ValueError, match="stage_2.onnx must hold its weights itself"):
        Cascade(copied)


def test_graphs_in_other_formats_are_refused(copied):
    """OpenVINO, which tells them apart by their names, would read weights from a file that nothing checks."""
    (copied / "stage_2.onnx").rename(copied / "stage_2.xml")
    (copied / "cascade.json").write_text((copied / "cascade.json").read_text().replace("stage_2.onnx", "stage_2.xml"))
    with pytest.raises(ValueError, match=r"must be one that ends with .onnx, got 'stage_2.xml'"):
        Cascade(copied)


@pytest.mark.parametrize("name", ["cascade.json", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"[]", b"3", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_files_that_are_no_json_objects_are_named(copied, name, content):
    (copied / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} must be (JSON: .*|a JSON object, got )") as raised:
        Cascade(copied)
    assert "\n" not in str(raised.value)


def test_large_json_is_not_read(copied, monkeypatch):
    monkeypatch.setattr(cascade_mevit, "MAX_JSON", 10)
    with pytest.raises(ValueError, match="cascade.json must have at most 10 bytes, got "):
        Cascade(copied)


HUGE = 10**400
SIZE = {"height": 16, "width": 16}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("cascade", {"stages": None}, "stages in cascade.json must be 1 to 1000 objects, got None"),
        ("cascade", {"stages": []}, "stages in cascade.json must be 1 to 1000 objects"),
        ("cascade", {"stages": [3]}, "stages in cascade.json must be 1 to 1000 objects"),
        (
            "cascade",
            {"stages": [{"query": "q.onnx", "score": "margin"}] * 1001},
            "stages in cascade.json must be 1 to 1000 objects",
        ),
        (
            "cascade",
            {"stages": [{"query": "q.onnx", "score": "margin"}]},
            r"exit_layer in cascade.json must be a layer number, got \[None",
        ),
        (
            "cascade",
            {"stages": [{"query": "q.onnx", "score": "margin", "exit_layer": HUGE**4}]},
            "exit_layer in cascade.json must be a l",
        ),
        (
            "cascade",
            {"stages": [{"query": "q.onnx", "score": "margin", "exit_layer": 2}] * 2},
            "must be in ascending order",
        ),
        (
            "cascade",
            {"stages": [{"query": "q.onnx", "score": "margin", "exit_layer": 2}]},
            "the name of a file of .* got None",
        ),
        (
            "config",
            {"image_size": "16"},
            "image_size in config.json must be one number or two from 1 to 4096, got '16'",
        ),
        ("config", {"image_size": 10**9}, "image_size in config.json must be one number or two from 1 to 4096"),
        ("config", {"image_size": [16, 16, 16]}, "image_size in config.json must be one number or two"),
        ("config", {"image_size": None}, "image_size in config.json .*, got None"),
        ("config", {"num_channels": HUGE}, "num_channels in config.json must be a number from 1 to 4096, got 1000"),
        ("config", {"num_channels": 1}, r"must be those of the first graph, \[3, 16, 16\], got \[1, 16, 16\]"),
        ("config", {"early_exit": "yes"}, "early_exit in config.json must be true or false, got 'yes'"),
        ("config", {"exit_policy": 3}, "exit_policy in config.json must be that of the graphs, 'uncertainty', got 3"),
        (
            "config",
            {"exit_thresholds": [0.5] * 3},
            "exit_thresholds in config.json must be null, one number or 2, got",
        ),
        ("config", {"exit_thresholds": HUGE}, "exit_thresholds in config.json must be null"),
        ("config", {"exit_thresholds": [0.5, float("nan")]}, "exit_thresholds in config.json must be null"),
        ("config", {"exit_thresholds": "0.5"}, "exit_thresholds in config.json must be null"),
        ("config", {"id2label": ["a"]}, "id2label in config.json must be names of the labels 0, 1, and so on, got"),
        ("config", {"id2label": {"one": "a"}}, "id2label in config.json must be names"),
        ("config", {"id2label": {"0": "a", "2": "b"}}, "id2label in config.json must be names"),
        ("config", {"id2label": {"0": 3}}, "id2label in config.json must be names"),
        ("config", {"id2label": {"0": "a"}}, "of as many labels as the logits of exit 2, got '1 labels'"),
        ("preprocessor_config", {"size": 16}, "the image processor's size must be height and width, got 16"),
        (
            "preprocessor_config",
            {"size": {**SIZE, "width": HUGE}},
            "the image processor's size must be of sides from 1",
        ),
        ("preprocessor_config", {"crop_size": {**SIZE, "height": "a"}}, "the image processor's crop_size must be of"),
        ("preprocessor_config", {"resample": 7}, "the image processor's resample must be a number from 0 to 5, got 7"),
        ("preprocessor_config", {"resample": [1]}, "the image processor's resample must be"),
        ("preprocessor_config", {"rescale_factor": "a"}, "the image processor's rescale_factor must be a number"),
        ("preprocessor_config", {"image_mean": [0.5]}, "the image processor's image_mean must be 3 numbers"),
        (
            "preprocessor_config",
            {"image_std": [0.5, 0, 0.5]},
            "the image processor's image_std must be 3 numbers above 0",
        ),
    ],
)
def test_malformed_fields_are_named(copied, file, fields, message):
    change(copied / f"{file}.json", **fields)
    with pytest.raises(ValueError, match=message) as raised:
        Cascade(copied)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"exit_policy": "entropy"},
            "exit_policy in config.json must be that of the graphs, 'uncertainty', got 'entro",
        ),
        (
            {"exit_layers": [1, 3, 4]},
            r"exit_layers in config.json must be those of the graphs, \[2, 3, 4\], got \[1, 3",
        ),
    ],
)
def test_a_config_of_other_graphs_is_refused(copied, fields, message):
    change(copied / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        Cascade(copied)


def test_thresholds_that_are_gone_are_told(copied):
    config = json.loads((copied / "config.json").read_text())
    del config["exit_thresholds"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="early exit needs exit_thresholds; neither the call nor the export has any"):
        Cascade(copied)(np.zeros((1, 3, 16, 16), dtype=np.float32))


def test_graphs_of_another_kind_are_named(copied):
    shutil.copy(copied / "exit_2.onnx", copied / "query_3.onnx")
    with pytest.raises(ValueError, match="the graphs of exit 3 in .* must have all outputs .*; missing are outputs"):
        Cascade(copied)
    shutil.copy(copied / "query_2.onnx", copied / "query_3.onnx")
    shutil.copy(copied / "stage_2.onnx", copied / "stage_3.onnx")
    with pytest.raises(ValueError, match="a graph of the export does not run: ") as raised:
        Cascade(copied).every_exit(np.zeros((1, 3, 16, 16), np.float32))
    assert "\n" not in str(raised.value)


# Images that are not sure, and images of other kinds


@pytest.mark.parametrize("policy", ["uncertainty", "patience"])
def test_an_exit_without_finite_logits_is_never_sure(exported, images, monkeypatch, policy):
    cascade, run = Cascade(exported), cascade_mevit.run
    first = cascade.stages[0][1]

    def broken(session, inputs):
        answers = run(session, inputs)
        if policy == "patience":
            answers.pop("score", None)
        if session is first:
            answers["logits"] = answers["logits"].copy()
            answers["logits"][:, 0] = [np.nan, np.inf, -np.inf, 0, 0, 0, 0, 0][: len(answers["logits"])]
        return answers

    monkeypatch.setattr(cascade_mevit, "run", broken)
    exit_layer = cascade(images.numpy(), early_exit=True, exit_thresholds=[10.0, -10.0]).exit_layer
    assert exit_layer.tolist() == [4, 4, 4, 2, 2, 2, 2, 2]
    if policy == "patience":
        _, scores = cascade.every_exit(images.numpy())
        assert np.isnan(scores[:3, 0]).all() and scores[3:, 0] == pytest.approx([2 / 3] * 5)
        assert scores[:3, 1] == pytest.approx([2 / 3] * 3)  # which agrees with no exit before


@pytest.mark.parametrize("policy", ["uncertainty", "patience"])
def test_images_that_are_nan_run_to_the_end(exported, images, monkeypatch, policy):
    run = cascade_mevit.run

    def without_score(session, inputs):
        return {name: value for name, value in run(session, inputs).items() if name != "score"}

    if policy == "patience":
        monkeypatch.setattr(cascade_mevit, "run", without_score)
    pixel_values = images.numpy().copy()
    pixel_values[2] = np.nan
    cascade = Cascade(exported)
    output = cascade(pixel_values, early_exit=True, exit_thresholds=10.0)
    assert output.exit_layer.tolist() == [2, 2, 4, 2, 2, 2, 2, 2]
    assert np.isnan(output.logits[2]).all() and np.isfinite(np.delete(output.logits, 2, axis=0)).all()
    assert np.isnan(cascade.every_exit(pixel_values)[1][2]).all()


@pytest.mark.parametrize("file", ["image.png", "image.tiff"])
def test_grey_values_of_16_bits_are_scaled(tmp_path, file):
    values = np.array([[0, 128, 129], [257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / file)
    expected = [[0, 0, 1], [1, 128, 255]]
    for source in (tmp_path / file, Image.open(tmp_path / file), Image.fromarray(values.astype(np.int32))):
        image = read_image(source)
        assert image.mode == "RGB" and np.asarray(image)[..., 1].tolist() == expected


@pytest.mark.parametrize("value", [-1, 65536])
def test_images_of_other_depths_are_refused(tmp_path, value):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "image.tiff")
    with pytest.raises(
        ValueError, match=r"image.tiff: images must have 8 or 16 bits per channel, got a floating-point"
    ):
        read_image(tmp_path / "image.tiff")
    with pytest.raises(ValueError, match=f"must have 8 or 16 bits per channel, got values from {value} to {value}"):
        read_image(Image.fromarray(np.full((4, 4), value, dtype=np.int32)))


def test_a_decompression_bomb_is_one_line(exported, image_file, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(SystemExit) as raised:
        cascade_mevit.main([str(exported), str(image_file)])
    message = str(raised.value)
    assert message.startswith(f"cascade_mevit.py: error: cannot read the image {image_file}: ")
    assert "decompression bomb" in message and "\n" not in message


def test_answers_that_are_no_numbers_are_told(exported, image_file, monkeypatch):
    monkeypatch.setattr(Cascade, "preprocess", lambda self, images: np.full((1, 3, 16, 16), np.nan, np.float32))
    with pytest.raises(SystemExit, match="error: the logits of .*image.png must be finite, got "):
        cascade_mevit.main([str(exported), str(image_file)])
