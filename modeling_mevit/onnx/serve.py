# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Serves a page on this machine, to try it out, with the headers that threads in a browser need.

python -m modeling_mevit.onnx.serve DIRECTORY [PORT]
"""

import sys
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


PORT = 8765


class PageHandler(SimpleHTTPRequestHandler):
    """Files of a directory, isolated from other pages."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }
    isolates = True

    def end_headers(self) -> None:
        if self.isolates:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def page_server(directory: Path, port: int = 0, handler: type[PageHandler] = PageHandler) -> ThreadingHTTPServer:
    """A server of this machine alone, which runs once its `serve_forever` is called. Port 0 takes a free one.

    Raises:
        ValueError: where the directory has no page.
    """
    if not (directory / "page.json").is_file():
        raise ValueError(f"{directory} must be what `mevit export --cascade --web` wrote; it has no page.json.")
    return ThreadingHTTPServer(("127.0.0.1", port), partial(handler, directory=str(directory)))


def main(arguments: list[str]) -> None:
    """Serves until it is interrupted."""
    if not 1 <= len(arguments) <= 2 or not all(number.isdigit() for number in arguments[1:]):
        sys.exit("usage: python -m modeling_mevit.onnx.serve DIRECTORY [PORT]")
    try:
        server = page_server(Path(arguments[0]), int(arguments[1]) if arguments[1:] else PORT)
    except (ValueError, OSError) as error:
        sys.exit(f"serve: error: {error}")
    print(f"The page is at http://localhost:{server.server_port}/ (Ctrl+C ends it).", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
