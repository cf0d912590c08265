# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A page that runs an exported cascade in the browser, which is also a static Space of the Hub.

What it consists of lies in `web/`; the files of onnxruntime-web come from npm or from a folder. `page.json` lists all
files, their sizes and a version, which changes with any of them: the page keeps what it loaded under that version.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, SpaceCardData
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from ..data.demo import CLASS_NAMES, demo_images
from ..data.image_processing import read_image
from ..hub import told_as_os_errors
from .cascade_mevit import read_stages
from .onnxruntime_web import read_onnxruntime_web, version_of


FLOAT32 = "float32"  # where the files of that precision lie, beside those of a lower one
PROGRAM = ("index.html", "page.css", "page.js", "path.js", "worker.js", "service_worker.js", "icon.svg")
RUNTIME = "cascade_mevit.js"
SETTINGS = ("cascade.json", "config.json", "preprocessor_config.json")
CARD = "MODEL_CARD.md"
MAX_EXAMPLES = 12
EXAMPLE_SIDE = 1024  # pixels
_FIGURE = re.compile(r"^!\[.*\]\(.*\)\n?", re.MULTILINE)  # of a card, whose files are not copied
_DEMO_SEED = 16  # of none of the demo's splits


@dataclass(frozen=True)
class WebPage:
    """What a page shows and needs beside the cascade.

    Args:
        title: of the page.
        runtime: files of onnxruntime-web: name → content.
        examples: names and images that a visitor can try.
        model: name of the model on the Hub.
        card: text of the model's card, where it is not on the Hub.
        license: of the model, as the Hub abbreviates it.
    """

    title: str
    runtime: Mapping[str, bytes]
    examples: Sequence[tuple[str, Image.Image]] = ()
    model: str | None = None
    card: str | None = None
    license: str | None = None

    def write(self, directory: Path) -> None:
        """Adds the page to a finished export, with `README.md`, the metadata of a Space.

        Args:
            directory: of the export of a cascade, which may have a folder `float32` with the same one in that
                precision.
        """
        web = files(__package__).joinpath("web")
        for name in (*PROGRAM, RUNTIME):
            (directory / name).write_bytes(web.joinpath(name).read_bytes())
        (directory / "ort").mkdir()
        for name, content in self.runtime.items():
            (directory / "ort" / name).write_bytes(content)
        if self.card:
            (directory / CARD).write_text(self.card, "utf-8")
        examples = self._write_examples(directory)
        cascades = [
            _describe(directory, folder) for folder in (FLOAT32, ".") if (directory / folder / SETTINGS[0]).is_file()
        ]
        names = [
            *PROGRAM,
            RUNTIME,
            *(f"ort/{name}" for name in self.runtime),
            *(example["file"] for example in examples),
        ]
        names += [name for cascade in cascades for name in cascade.pop("files")]
        described = {
            "name": self.title,
            "card": f"https://huggingface.co/{self.model}" if self.model else None,
            "version": _version(directory, names),
            "cascades": cascades,
            "examples": examples,
            "files": {name: (directory / name).stat().st_size for name in names},
        }
        (directory / "README.md").write_text(self.readme(), "utf-8")
        (directory / "page.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")

    def _write_examples(self, directory: Path) -> list[dict[str, str]]:
        written = []
        if self.examples:
            (directory / "examples").mkdir()
        for number, (name, image) in enumerate(self.examples):
            file = f"examples/{number}.jpg"
            image = image.copy()
            image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
            image.save(directory / file, quality=95, exif=b"")  # without the place where it was taken
            written.append({"file": file, "name": name})
        return written

    def readme(self) -> str:
        """What `README.md` holds: the metadata that makes a directory a Space, and what is in it."""
        headers = {
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "cross-origin",
        }
        models: dict[str, Any] = {"models": [self.model]} if self.model else {}
        data = SpaceCardData(
            title=self.title,
            emoji="🚪",
            colorFrom="green",
            colorTo="gray",
            sdk="static",
            app_file="index.html",
            license=self.license,
            custom_headers=headers,
            **models,
        )
        card = "The model has no card."
        if self.model:
            card = f"The model is [{self.model}](https://huggingface.co/{self.model})."
        elif self.card:
            card = f"The model's card is [{CARD}]({CARD})."
        template = files(__package__).joinpath("web").joinpath("space.md").read_text("utf-8")
        values = {"title": self.title, "card": card, "onnxruntime_web": version_of(self.runtime)}
        return template.format(metadata=data.to_yaml().strip(), **values)


def prepare_page(checkpoint: str, examples: str | None = None, ort_dir: Path | None = None) -> WebPage:
    """The page of a checkpoint.

    Args:
        checkpoint: directory or Hub name.
        examples: folder of image files that a visitor can try, or `"demo"`; none by default.
        ort_dir: folder with the files of onnxruntime-web, which npm brings by default.

    Raises:
        ValueError: where these files cannot be had, or the examples cannot be read.
    """
    is_local = Path(checkpoint).is_dir()
    card = _read_card(checkpoint, is_local)
    heading = next(
        (line[2:].strip() for line in (card.text if card else "").splitlines() if line.startswith("# ")), ""
    )
    name = Path(checkpoint).resolve().name if is_local else checkpoint.split("/")[-1]
    return WebPage(
        title=heading or name,
        runtime=read_onnxruntime_web(ort_dir),
        examples=_read_examples(examples) if examples else (),
        model=None if is_local else checkpoint,
        card=_FIGURE.sub("", card.text).strip() + "\n" if card and is_local else None,
        license=card.data.get("license") if card else None,
    )


def check_space(name: str) -> None:
    """Checks that a page can be pushed: the name of the Space, the connection and the login.

    Raises:
        OSError: where the Hub cannot be reached, or there is no login.
        ValueError: where the name is none.
    """
    validate_repo_id(name)
    with told_as_os_errors():
        HfApi().whoami()


def push_space(directory: Path, name: str) -> str:
    """Uploads a page to a static Space, which is made where it does not exist yet: files of the page, and no others.

    Args:
        directory: of an export with a page.
        name: of the Space, such as "someone/aircraft", or "aircraft" for one of your own.

    Returns:
        The whole name of the Space.

    Raises:
        OSError: where the Hub cannot be reached or refuses it; the page is there to be pushed again.
    """
    content = json.loads((directory / "page.json").read_text("utf-8"))
    public = [*content["files"], "page.json", "README.md", CARD]
    api = HfApi()
    try:
        with told_as_os_errors():
            space = str(api.create_repo(name, repo_type="space", space_sdk="static", exist_ok=True).repo_id)
            api.upload_folder(
                repo_id=space,
                repo_type="space",
                folder_path=directory,
                commit_message="Early exit in the browser",
                allow_patterns=public,
            )
    except OSError as error:
        raise OSError(
            f"the page is in {directory}, and was not uploaded: {error}. To try again, call push_space(Path("
            f"{str(directory)!r}), {name!r}) of modeling_mevit.onnx.page."
        ) from error
    return space


def keep_float32(directory: Path, names: Sequence[str]) -> Path:
    """Copies files of a float32 export to its folder `float32`, before their precision is lowered. Returns that."""
    kept = directory / FLOAT32
    kept.mkdir()
    for name in names:
        shutil.copyfile(directory / name, kept / name)
    return kept


def _describe(directory: Path, folder: str) -> dict[str, Any]:
    """What page.json tells of a cascade, and its files."""
    home = directory / folder
    stages = read_stages(home)
    graphs = [stage[kind] for stage in stages for kind in ("stage", "query")]
    prefix = "" if folder == "." else f"{folder}/"
    return {
        "precision": json.loads((home / SETTINGS[0]).read_text("utf-8"))["precision"],
        "directory": folder,
        "bytes": sum((home / name).stat().st_size for name in graphs),
        "files": [prefix + name for name in (*SETTINGS, *graphs, *(["cascade_mevit.py"] if folder == "." else []))],
    }


def _version(directory: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{hashlib.sha256((directory / name).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _read_card(checkpoint: str, is_local: bool) -> ModelCard | None:
    file = Path(checkpoint, "README.md")
    if is_local and not file.is_file():
        return None
    try:
        return ModelCard.load(file if is_local else checkpoint, ignore_metadata_errors=True)
    except (OSError, ValueError):  # a Hub model without a card, or one that is no card
        return None


def _read_examples(given: str) -> list[tuple[str, Image.Image]]:
    if given == "demo":
        images, labels = demo_images(1, seed=_DEMO_SEED)
        return [(CLASS_NAMES[label], image) for image, label in zip(images, labels, strict=True)]
    names = sorted(path for path in Path(given).glob("*") if path.suffix.lower() in Image.registered_extensions())
    if not 0 < len(names) <= MAX_EXAMPLES:
        raise ValueError(
            f"--examples must be 'demo', or a folder with 1 to {MAX_EXAMPLES} image files, got {given} with "
            f"{len(names)}."
        )
    return [(path.stem, read_image(path)) for path in names]
