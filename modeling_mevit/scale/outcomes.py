# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What may become of an image that is served."""

from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What the exit where an image left says of it; the score is low where it is sure.

    `borderline` is whether it had, at an exit that it reached, a score within 1e-4 of the threshold.
    """

    label: str
    probability: float
    exit_layer: int
    score: float
    borderline: bool


class Onward(NamedTuple):
    """The state of an image that goes on to the next segment: a reference in a list, which Ray leaves as it is."""

    state: list[Any]
    borderline: bool


class Audited(NamedTuple):
    """An audited image that goes on to the next segment: its state, as of others, and what the exit that it took says,
    the number of a label; None where it did not leave in this segment."""

    state: list[Any]
    early: int | None


class Compared(NamedTuple):
    """Of an audited image, by their numbers: the labels of the exit that it took and of the full run; -1 is none.

    What a segment tells has None where the image left in one before.
    """

    early: int | None
    full: int


class Failed(NamedTuple):
    """Why an image gets no answer; whether that is the image's fault."""

    reason: str
    is_clients_fault: bool


class Lost(NamedTuple):
    """The replica that made the image's state is gone, and the state with it."""


class Told(NamedTuple):
    """What a segment says of an image, and how many went through it in the same batch."""

    outcome: Answer | Onward | Audited | Compared | Failed | Lost
    batch: int
