# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The service's HTTP: what a client sends is checked here, and answered from here.

It is an ASGI application of its own beside Ray Serve, not a replica. So an accepted request outlives every replica,
what is refused costs nothing further in, and no port of Ray has to be open.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .audits import Auditor
from .metrics import Metrics
from .outcomes import Answer, Failed
from .requests import Limits, Refusal, is_authorized, read_images
from .scorers import NamedContent


logger = logging.getLogger(__name__)

DISCARDED = 2.0  # seconds that the rest of a refused request is listened to, so that its sender hears the refusal
RETRY_AFTER = 1  # seconds

T = TypeVar("T")


class Front:
    """Accepts requests within limits, and answers them.

    Args:
        classify: runs an image to its exit.
        is_ready: whether every segment has a replica that runs.
        metrics: of the service.
        limits: of a request.
        queue: images that are accepted and not answered yet, at most.
        deadline: seconds after which a request that was accepted is given up.
        token: that every request must bear; None where none is asked for.
        auditor: of accepted images; None where none is audited.
    """

    def __init__(
        self,
        classify: Callable[[NamedContent], Awaitable[Answer | Failed]],
        is_ready: Callable[[], bool],
        metrics: Metrics,
        limits: Limits,
        queue: int,
        deadline: float,
        token: str | None,
        auditor: Auditor | None = None,
    ):
        self.classify, self.is_ready, self.metrics = classify, is_ready, metrics
        self.limits, self.queue, self.deadline, self.token = limits, queue, deadline, token
        self.auditor = auditor
        self.accepted = 0  # images
        # Decoding base64 and reading headers must not hold up other requests, nor `/healthz`, which has other threads.
        # One is enough: what it does keeps Python's lock, and Pillow's warnings are silenced for all threads together.
        self._reader = ThreadPoolExecutor(1)
        self.app = Starlette(
            routes=[
                Route("/predict", self._guarded(self._predict), methods=["POST"]),
                Route("/healthz", self._guarded(self._healthz), methods=["GET"]),
                Route("/metrics", self._guarded(self._metrics), methods=["GET"]),
            ],
            exception_handlers={HTTPException: self._not_found},
        )

    def _guarded(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A handler that runs for those with the token alone, and refuses in one sentence of JSON."""

        async def guarded(request: Request) -> Response:
            began = time.perf_counter()
            try:
                if self.token and not is_authorized(request.headers.get("authorization", ""), self.token):
                    raise Refusal(401, "the request must have the header 'Authorization: Bearer TOKEN' with the token")
                response = await handle(request)
            except Refusal as refusal:
                response = await self._refused(request, refusal)
            except ClientDisconnect:
                response = Response(status_code=499)  # which nobody hears
            except Exception:
                logger.exception("a request failed")
                response = _sentence(500, "the service failed to answer this request")
            if request.url.path == "/predict":
                self.metrics.answered(response.status_code, time.perf_counter() - began)
            return response

        return guarded

    async def _predict(self, request: Request) -> Response:
        until = time.monotonic() + self.deadline
        async with self._place(1):
            body = await self._body(request, until)
            content_type = request.headers.get("content-type", "")
            reading = asyncio.get_running_loop().run_in_executor(
                self._reader, read_images, body, content_type, self.limits
            )
            del body
            images = await self._in_time(reading, until)
            async with self._place(len(images) - 1):
                with self._audited(images):
                    outcomes = await self._in_time(self._outcomes(images), until)
        answers = [self._answer(outcome) for outcome in outcomes]  # all of them, before one is counted
        return JSONResponse({"predictions": [self._prediction(answer) for answer in answers]})

    async def _outcomes(self, images: Sequence[NamedContent]) -> list[Answer | Failed]:
        """What becomes of images. When it ends, in whatever way, none of them runs any more."""
        running = [asyncio.ensure_future(self.classify(image)) for image in images]
        try:
            return await asyncio.gather(*running)
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    @contextmanager
    def _audited(self, images: Sequence[NamedContent]) -> Iterator[None]:
        """Chooses images to audit before they run, and has them audited once they have run, whatever came of it."""
        if self.auditor is None:
            yield
            return
        # more than half full, beside this request: whoever waits for an answer comes first
        chosen = self.auditor.choose(images, is_busy=self.accepted - len(images) > self.queue // 2)
        try:
            yield
        finally:
            self.auditor.begin(chosen)

    def _answer(self, outcome: Answer | Failed) -> Answer:
        """Raises a `Refusal` where there is no answer."""
        if not isinstance(outcome, Failed):
            return outcome
        if outcome.is_clients_fault:
            raise Refusal(400, outcome.reason)
        raise Refusal(503, outcome.reason, RETRY_AFTER)

    def _prediction(self, outcome: Answer) -> dict[str, Any]:
        """What an answer says, for the client, and counted."""
        self.metrics.left(outcome.exit_layer, outcome.borderline)
        return {
            "label": outcome.label,
            "probability": outcome.probability,
            "exit_layer": outcome.exit_layer,
            "score": outcome.score,
        }

    @asynccontextmanager
    async def _place(self, images: int) -> AsyncIterator[None]:
        """Keeps places in the queue.

        Raises:
            Refusal: where too few are free.
        """
        if self.accepted + images > self.queue:
            raise Refusal(503, f"the service is full, with {self.queue} images at most; try again", RETRY_AFTER)
        self.accepted += images
        self.metrics.queued(self.accepted)
        try:
            yield
        finally:
            self.accepted -= images
            self.metrics.queued(self.accepted)

    async def _body(self, request: Request, until: float) -> bytes:
        """A request's body, as far as limits allow."""
        too_large = Refusal(413, f"a request must have at most {self.limits.megabytes:g} MB, got more")
        if int(request.headers.get("content-length") or 0) > self.limits.bytes:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            async for chunk in request.stream():
                if len(body) + len(chunk) > self.limits.bytes:
                    raise too_large
                body += chunk
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), until - time.monotonic())
        except asyncio.TimeoutError as error:  # noqa: UP041  Python 3.10 has two
            raise Refusal(408, f"the request must arrive within {self.deadline:g} s, and did not") from error

    async def _in_time(self, result: Awaitable[T], until: float) -> T:
        try:
            return await asyncio.wait_for(result, until - time.monotonic())
        except asyncio.TimeoutError as error:  # noqa: UP041  Python 3.10 has two
            reason = f"no answer within {self.deadline:g} s; the request was accepted and is given up, try again"
            raise Refusal(503, reason, RETRY_AFTER) from error

    async def _refused(self, request: Request, refusal: Refusal) -> Response:
        """The response to a request that may still be arriving: who is not heard out may not hear the response."""
        if "expect" not in request.headers:  # else nothing arrives
            # where all was read already, Starlette says so
            with suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):
                await asyncio.wait_for(self._hear_out(request), DISCARDED)
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
        if refusal.retry_after is not None:
            headers["Retry-After"] = str(refusal.retry_after)
        return _sentence(refusal.status, refusal.reason, headers)

    async def _hear_out(self, request: Request) -> None:
        """Takes what arrives of a request, up to the limit, and keeps nothing of it."""
        left = self.limits.bytes
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return

    async def _healthz(self, request: Request) -> Response:
        if await asyncio.to_thread(self.is_ready):
            return JSONResponse({"status": "ready"})
        return _sentence(503, "a segment has no replica that runs yet", {"Retry-After": str(RETRY_AFTER)})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _not_found(self, request: Request, error: Exception) -> Response:
        """The response to a path or a method that there is not; to those without the token as to any other path."""
        assert isinstance(error, HTTPException)
        path = f"POST /predict, GET /healthz or GET /metrics, got {request.method} {request.url.path[:100]}"
        status = error.status_code

        async def refuse(request: Request) -> Response:
            raise Refusal(status, f"a request must be {path}")

        return await self._guarded(refuse)(request)


def _sentence(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps({"error": reason if reason.endswith(".") else f"{reason}."}, ensure_ascii=False).encode(),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )
