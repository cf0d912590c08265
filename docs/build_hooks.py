# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What `mkdocs build` needs beside its plugins: figures outside docs/, and the cross-references in docstrings."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


RESULTS = Path("training/results")
CROSS_REFERENCE = re.compile(r"\[`(?P<short>~?)(?P<name>[\w.]+)`\](?![\[(])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the figures of training/results, which the pages show, to the site."""
    root = Path(config.config_file_path).parent
    for figure in sorted((root / RESULTS).rglob("*.png")):
        name = f"figures/{figure.relative_to(root / RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages name figures by their place in the repository, so that they show there too."""
    return markdown.replace(f"(../{RESULTS.as_posix()}/", "(figures/")


class CrossReferences(griffe.Extension):
    """Turns [`Name`] in a docstring into a link to where the name is documented, and into code where it is not."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = CROSS_REFERENCE.sub(
                lambda match: _link(obj, match["name"], match["short"]), obj.docstring.value
            )


def _link(obj: griffe.Object, name: str, short: str) -> str:
    first, *rest = name.split(".")
    shown = name.rpartition(".")[2] if short else name
    try:
        path = ".".join([obj.resolve(first), *rest])
    except griffe.NameResolutionError:  # a name of another package
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
