# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Takes progress bars and warnings, which name the machine, out of stored notebooks: `without_stderr.py FILE…`."""

import sys

import nbformat


for file in sys.argv[1:]:
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, file)
