# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The page that an export gets, the Space that it is, and where onnxruntime-web comes from."""

import io
import json
import re
import subprocess
import tarfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from modeling_mevit.onnx import onnxruntime_web
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.onnx.onnxruntime_web import FILES, VERSION, read_onnxruntime_web, version_of
from modeling_mevit.onnx.page import PROGRAM, RUNTIME, prepare_page, push_space
from modeling_mevit.onnx.serve import main as serve
from modeling_mevit.onnx.serve import page_server
from tests.helpers.hub import record_hub
from tests.helpers.images import noise, write_image


@pytest.fixture
def pretended_ort(tmp_path) -> Path:
    """A folder with files of the names of onnxruntime-web's."""
    folder = tmp_path / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    for name in FILES:
        (folder / "dist" / name).write_text(name)
    return folder


@pytest.fixture
def examples(tmp_path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif[0x010F] = "Camera of somebody"
    write_image(tmp_path / "examples" / "b.png", noise(20, 30))
    noise(1500, 3000).save(tmp_path / "examples" / "a.jpg", exif=exif)
    (tmp_path / "examples" / "notes.txt").write_text("no image")
    return tmp_path / "examples"


def read_page(directory: Path) -> dict:
    return json.loads((directory / "page.json").read_text())


def test_a_page_is_complete_and_lists_what_it_needs(mevit, calibrated, pretended_ort, examples, tmp_path):
    out = tmp_path / "out"
    options = ["--cascade", "--web", "--ort-dir", pretended_ort, "--examples", examples]
    code, printed = mevit("export", calibrated, out, *options)
    assert code == 0 and f"python -m modeling_mevit.onnx.serve {out}" in printed
    page = read_page(out)
    (cascade,) = page["cascades"]
    assert (cascade["precision"], cascade["directory"]) == ("float32", ".")
    assert cascade["bytes"] == sum(file.stat().st_size for file in out.glob("*_*.onnx") if "exit" not in file.name)
    assert page["files"] == {name: (out / name).stat().st_size for name in page["files"]}
    needed = {*PROGRAM, RUNTIME, *(f"ort/{name}" for name in FILES), "cascade.json", "config.json"}
    needed |= {f"{kind}_{layer}.onnx" for kind in ("stage", "query") for layer in (2, 3, 4)}
    assert needed <= set(page["files"])
    # the page asks for its own files only
    for name in ("index.html", "page.js", "worker.js", "path.js", "service_worker.js", "page.css"):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", (out / name).read_text())
    assert [example["name"] for example in page["examples"]] == ["a", "b"]
    with Image.open(out / page["examples"][0]["file"]) as image:
        assert image.size == (512, 1024) and not image.getexif()
    assert Cascade(out).labels  # it is an export as any other


def test_the_version_changes_with_any_file(mevit, calibrated, pretended_ort, tmp_path):
    export = ["export", calibrated, "--cascade", "--web", "--exits", "4", "--ort-dir", pretended_ort]
    versions = []
    for number, content in enumerate(["one", "one", "two"]):
        (pretended_ort / "dist" / FILES[0]).write_text(content)
        assert mevit(*export, tmp_path / str(number))[0] == 0
        versions.append(read_page(tmp_path / str(number))["version"])
    assert versions[0] == versions[1] != versions[2]


def test_a_lower_precision_keeps_float32_beside_it(mevit, calibrated, pretended_ort, photos, tmp_path):
    out = tmp_path / "out"
    export = ["export", calibrated, "--cascade", "--exits", "4"]
    assert mevit(*export, tmp_path / "float32")[0] == 0
    web = ["--web", "--ort-dir", pretended_ort, "--precision", "int8", "--target", "avx2", "--data", photos]
    assert mevit(*export, out, *web)[0] == 0
    cascades = read_page(out)["cascades"]
    assert [(one["precision"], one["directory"]) for one in cascades] == [("float32", "float32"), ("int8", ".")]
    for name in ("config.json", "cascade.json", "preprocessor_config.json", "stage_3.onnx", "query_3.onnx"):
        assert (out / "float32" / name).read_bytes() == (tmp_path / "float32" / name).read_bytes()
    assert (out / "stage_3.onnx").read_bytes() != (out / "float32" / "stage_3.onnx").read_bytes()
    assert json.loads((out / "cascade.json").read_text())["precision"] == "int8"


def test_a_space_is_pushed_with_the_files_of_the_page_alone(mevit, calibrated, pretended_ort, tmp_path, monkeypatch):
    hub = record_hub(monkeypatch)
    out = tmp_path / "out"
    push = ["--cascade", "--web", "--ort-dir", pretended_ort, "--push-to-hub", "us/colours", "--repo-type", "space"]
    code, printed = mevit("export", calibrated, out, *push)
    assert code == 0 and "https://huggingface.co/spaces/someone/colours" in printed
    assert hub.repositories == ["us/colours"]
    assert hub.kinds == [{"repo_type": "space", "space_sdk": "static", "exist_ok": True}]
    (upload,) = hub.uploads
    assert (upload["repo_id"], upload["repo_type"]) == ("someone/colours", "space")
    assert set(upload["files"]) == {*read_page(out)["files"], "page.json", "README.md", "MODEL_CARD.md"}
    assert not [name for name in upload["files"] if name.startswith("exit_") or name == "model.onnx"]
    metadata = ModelCard(upload["files"]["README.md"].decode()).data
    assert (metadata.get("sdk"), metadata.get("app_file")) == ("static", "index.html")
    assert metadata.get("custom_headers") == {
        "cross-origin-embedder-policy": "require-corp",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "cross-origin",
    }
    assert "[MODEL_CARD.md](MODEL_CARD.md)" in upload["files"]["README.md"].decode()


class NoConnection(Exception):
    """As the Hub's client raises it, which is no OSError."""


@pytest.mark.parametrize("step", ["whoami", "upload_folder"])
def test_a_page_that_cannot_be_pushed_is_told_in_a_line(mevit, calibrated, pretended_ort, tmp_path, monkeypatch, step):
    def fail(self: HfApi, *args: Any, **kwargs: Any) -> None:
        raise NoConnection("no route")

    hub = record_hub(monkeypatch)
    monkeypatch.setattr(HfApi, step, fail)
    out = tmp_path / "out"
    push = ["--cascade", "--web", "--ort-dir", pretended_ort, "--push-to-hub", "us/colours"]
    message, _ = mevit("export", calibrated, out, *push)
    assert "the Hub cannot be reached: NoConnection: no route" in message and "\n" not in message
    if step == "whoami":  # before the export
        assert not out.exists()
        return
    assert f"the page is in {out}" in message and "push_space(Path('" in message
    record_again = record_hub(monkeypatch)
    assert push_space(out, "us/colours") == "someone/colours"
    assert not hub.uploads and record_again.uploads[0]["repo_id"] == "someone/colours"


def test_a_model_of_the_hub_is_linked(pretended_ort, tmp_path, monkeypatch):
    card = ModelCard("---\nlicense: cc-by-4.0\n---\n\n# Groceries\n\nA model.\n")
    monkeypatch.setattr(ModelCard, "load", classmethod(lambda cls, name, **kwargs: card))
    page = prepare_page("us/groceries", ort_dir=pretended_ort)
    assert (page.title, page.model, page.license, page.card) == ("Groceries", "us/groceries", "cc-by-4.0", None)
    metadata = ModelCard(page.readme()).data
    assert metadata.get("models") == ["us/groceries"] and metadata.get("license") == "cc-by-4.0"
    assert "https://huggingface.co/us/groceries" in page.readme()

    def refuse(cls, name, **kwargs):
        raise OSError("not found")

    monkeypatch.setattr(ModelCard, "load", classmethod(refuse))
    page = prepare_page("us/groceries", ort_dir=pretended_ort)
    assert (page.title, page.license) == ("groceries", None)


def test_a_card_goes_along_without_its_figures(pretended_ort, tmp_path):
    card = "---\nlicense: mit\n---\n\n# Birds\n\n![Curve](training_curve.png)\n\nText.\n"
    (tmp_path / "README.md").write_text(card)
    page = prepare_page(str(tmp_path), ort_dir=pretended_ort)
    assert page.title == "Birds" and "Text." in page.card and "training_curve" not in page.card
    (tmp_path / "README.md").unlink()
    page = prepare_page(str(tmp_path), ort_dir=pretended_ort)
    assert page.title == tmp_path.name and page.card is None and "The model has no card." in page.readme()


def test_bad_input_is_named_before_anything_is_exported(mevit, calibrated, pretended_ort, tmp_path):
    out = tmp_path / "out"

    def message(*options) -> str:
        return str(mevit("export", calibrated, out, *options)[0])

    assert "--web is for the page of a cascade; add --cascade" in message("--web")
    assert "are for the page of --web" in message("--cascade", "--push-to-hub", "us/colours")
    assert "are for the page of --web" in message("--examples", "demo")
    empty = tmp_path / "empty"
    empty.mkdir()
    lacking = message("--cascade", "--web", "--ort-dir", empty)
    assert f"--ort-dir must name a folder with the files of onnxruntime-web {VERSION}, got {empty}" in lacking
    assert FILES[0] in lacking
    options = ["--cascade", "--web", "--ort-dir", pretended_ort, "--examples", empty]
    assert f"'demo', or a folder with 1 to 12 image files, got {empty} with 0" in message(*options)
    assert not out.exists()


# onnxruntime-web


def pretend_npm(monkeypatch, run) -> list[list[str]]:
    """Puts a function in place of npm. Returns the commands that it is given."""
    commands: list[list[str]] = []

    def recorded(command, cwd, **kwargs):
        commands.append(command)
        return run(Path(cwd))

    monkeypatch.setattr(onnxruntime_web.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(onnxruntime_web.subprocess, "run", recorded)
    return commands


def test_npm_brings_the_files(monkeypatch):
    def pack(folder: Path):
        with tarfile.open(folder / "package.tgz", "w:gz") as archive:
            for name in (*FILES, "other.mjs", "../../outside"):
                member = tarfile.TarInfo(f"package/dist/{name}")
                member.size = len(name)
                archive.addfile(member, io.BytesIO(name.encode()))
        return subprocess.CompletedProcess([], 0, "", "")

    commands = pretend_npm(monkeypatch, pack)
    assert read_onnxruntime_web() == {name: name.encode() for name in FILES}
    assert commands[0][:3] == ["/usr/bin/npm", "pack", f"onnxruntime-web@{VERSION}"]


def test_the_version_is_that_of_the_files(pretended_ort):
    assert version_of(read_onnxruntime_web(pretended_ort)) == "of unknown version"
    assert version_of({FILES[0]: b"/*!\n * ONNX Runtime Web v1.31.0-dev.2\n * Copyright"}) == "1.31.0-dev.2"


def test_what_npm_says_is_passed_on(monkeypatch):
    pretend_npm(monkeypatch, lambda folder: subprocess.CompletedProcess([], 1, "", "npm error\nno network"))
    with pytest.raises(ValueError, match=r"npm cannot get onnxruntime-web@.*: npm error no network. .* --ort-dir"):
        read_onnxruntime_web()


def test_without_npm_it_says_how(monkeypatch):
    monkeypatch.setattr(onnxruntime_web.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm, which brings it, is not installed. Install npm, or name a folder with"):
        read_onnxruntime_web()


# The server


def test_a_page_is_served_with_the_headers_that_threads_need(tmp_path):
    (tmp_path / "page.json").write_text("{}")
    (tmp_path / "a.mjs").write_text("")
    server = page_server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with urllib.request.urlopen(f"{address}/a.mjs") as answer:
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["Content-Type"].startswith("text/javascript")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/../../etc/passwd")
    server.shutdown()
    server.server_close()


def test_what_is_no_page_is_not_served(tmp_path):
    with pytest.raises(SystemExit, match="must be what `mevit export --cascade --web` wrote; it has no page.json"):
        serve([str(tmp_path)])
    with pytest.raises(SystemExit, match="usage"):
        serve([])
