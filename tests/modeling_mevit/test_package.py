# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What importing the package does, and what it does without, each in a process of its own."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import modeling_mevit
from modeling_mevit.data.image_processing import image_processor_for
from tests.helpers.models import tiny_model


ROOT = Path(modeling_mevit.__file__).parents[1]
LOADS = """
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({directory!r})
assert type(model) is type(AutoModel.from_pretrained({directory!r}))
assert type(model).__module__ == "modeling_mevit.modeling_mevit"
import modeling_mevit
assert type(model) is modeling_mevit.MEViTForImageClassification
"""
# Transformers asks for the distributions that are installed, so they are hidden there too
WITHOUT = """
import importlib.metadata, importlib.util, sys
hidden = {hidden!r}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)
"""
EXTRAS = ["datasets", "scipy", "matplotlib", "torchvision", "accelerate", "evaluate", "onnx", "onnxruntime"]
EXTRAS += ["onnxscript", "onnx_ir", "optimum", "sklearn", "pandas", "pyarrow", "ray"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_model(id2label={0: "A318", 1: "A319", 2: "A320", 3: "A321", 4: "A330"}).save_pretrained(directory)
    return str(directory)


def test_importing_costs_nothing():
    heavy = ("torch", "transformers", "datasets", "scipy", "matplotlib", "accelerate")
    assert run(f"import sys, modeling_mevit; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


@pytest.mark.parametrize(
    "first",
    [
        "import modeling_mevit",
        pytest.param("import transformers, modeling_mevit", marks=pytest.mark.slow),
        pytest.param("from modeling_mevit import MEViTConfig", marks=pytest.mark.slow),
        pytest.param("import modeling_mevit.configuration_mevit", marks=pytest.mark.slow),
        pytest.param("from modeling_mevit.early_exit.calibration import calibrate", marks=pytest.mark.slow),
        pytest.param(
            "import importlib.util, modeling_mevit; importlib.util.find_spec('transformers')", marks=pytest.mark.slow
        ),
    ],
)
def test_importing_registers_the_auto_classes(directory, first):
    run(first + LOADS.format(directory=directory))


@pytest.mark.slow
def test_a_checkpoint_loads_with_the_core_alone(directory):
    run(WITHOUT.format(hidden=EXTRAS) + "import modeling_mevit\n" + LOADS.format(directory=directory))


@pytest.mark.slow
def test_images_are_classified_with_the_core_alone(directory):
    """What `mevit predict` does, in the environment of a device."""
    image = Path(directory, "image.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(image)
    image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(directory)
    code = f"""
import sys
import zipfile
sys.argv = ["mevit", "predict", {directory!r}, {str(image)!r}]
from modeling_mevit.cli import main
main()
"""
    file, label, probability, layer = run(WITHOUT.format(hidden=EXTRAS) + code).strip().split("\t")
    assert (file, layer) == (str(image), "exit 4") and label.startswith("A3") and 0.2 <= float(probability) <= 1


@pytest.mark.parametrize(
    ("command", "module"), [("score", "ray"), ("score", "pyarrow"), ("serve", "python_multipart")]
)
def test_scoring_and_serving_name_the_extra_before_anything_is_done(directory, tmp_path, command, module):
    pytest.importorskip("ray", reason="needs the extra mevit[scale]")
    words = ["score", directory, directory, str(tmp_path / "output")] if command == "score" else ["serve", directory]
    code = f"""
import sys
import zipfile
sys.argv = ["mevit", *{words!r}]
from modeling_mevit.cli import main
try:
    main()
except SystemExit as stopped:
    print(stopped.code)
"""
    out = run(WITHOUT.format(hidden=[module]) + code)
    expected = f"this command needs {module}, which is not installed: pip install 'mevit[scale]'"
    assert out == f"mevit: error: {expected}\n" and not (tmp_path / "output").exists()


def test_a_command_names_the_extra_that_it_lacks(directory):
    code = f"""
import sys
import zipfile
sys.argv = ["mevit", "calibrate", {directory!r}, "--data", "demo", "--max-cost", "0.6"]
from modeling_mevit.cli import main
try:
    main()
except SystemExit as stopped:
    print(stopped.code)
"""
    out = run(WITHOUT.format(hidden=["scipy", "sklearn"]) + code)  # the latter needs the former
    assert out == "mevit: error: calibrate needs scipy, which is not installed: pip install 'mevit[data]'\n"


@pytest.mark.parametrize(
    ("name", "hidden", "message"),
    [
        pytest.param("MEViTTrainer", "accelerate", "pip install 'mevit[train]'", marks=pytest.mark.slow),
        ("calibrate", "scipy", "pip install 'mevit[data]'"),
        ("export", "onnx_ir", "pip install 'mevit[onnx]'"),
    ],
)
def test_what_an_extra_brings_is_named(name, hidden, message):
    code = f"""
import modeling_mevit
try:
    modeling_mevit.{name}
except ImportError as error:
    print(error)
"""
    out = run(WITHOUT.format(hidden=[hidden]) + code)
    assert message in out and out.count("\n") == 1


def test_all_names_can_be_imported():
    pytest.importorskip("onnxscript", reason="needs the extra mevit[onnx]")
    for name in modeling_mevit.__all__:
        assert getattr(modeling_mevit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        modeling_mevit.nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.one_major
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    kept = ("modeling_mevit", "training", "tests", "setup.py", "setup.cfg", "README.md", "LICENSE")
    source.mkdir()
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "mevit = modeling_mevit.cli:main" in archive.read(entry_points).decode()
    assert {name.split("/")[0] for name in names} == {"modeling_mevit", entry_points.split("/")[0]}
    assert {"modeling_mevit/py.typed", "modeling_mevit/reports/model_card.md"} <= names
    web = {f"modeling_mevit/onnx/web/{file.name}" for file in (ROOT / "modeling_mevit/onnx/web").iterdir()}
    assert len(web) > 5 and web <= names
