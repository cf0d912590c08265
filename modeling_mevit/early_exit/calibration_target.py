# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What thresholds are chosen for, and the words for what is certified of them. It needs no scipy; calibration does."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any


BOUNDS = ("harm", "difference")
GUARANTEES = ("probability", "expectation")
WHAT_THE_AVERAGE_COUNTS = "The average counts calibration sets that certify nothing, which lose nothing."


@dataclass(frozen=True)
class CalibrationTarget:
    """What the thresholds are chosen for: a cost, an accuracy, or the labels of the full run.

    - `max_cost` alone: the best accuracy within this mean cost, on the calibration images.
    - `max_accuracy_drop` alone: the lowest mean cost that loses at most this much accuracy against the last exit, on
      the calibration images.
    - `max_accuracy_drop` and `confidence`: the lowest mean cost that is certified. With this probability over the
      draw of the calibration images, early exit loses at most that much accuracy on images like them.
    - `max_accuracy_drop` and `guarantee="expectation"`: the lowest mean cost for which it loses at most that much on
      average over calibration images and others like them. Fewer images carry it, and it says less: one set of
      calibration images may lead to a larger drop.
    - `max_disagreement` in place of `max_accuracy_drop`: that early exit gives another label than the last exit to at
      most this share of images. It needs no labels, and it implies the same bound on the accuracy drop, since an
      image that is harmed is given another label.

    Args:
        max_cost: mean cost relative to the plain ViT.
        max_accuracy_drop: share of all images, 0.01 for one point.
        confidence: probability of the certificate.
        bound: what a drop is tested by, with a confidence. `"harm"`, the default: how often the exit taken is wrong
            and the last one right, by the exact binomial tail. `"difference"`: the drop itself, so that corrections
            count too ([`most_harms`]). A disagreement has the exact binomial tail only, and `bound` stays None.
        max_disagreement: share of all images, 0.01 for one of a hundred.
        guarantee: `"probability"`, which a confidence implies, or `"expectation"`, which has none.
        exits: layers of the exits that images may leave at, `[6, 8, 12]` say; all by default. The others get the
            threshold 0, under which no image leaves, so that their layers run whole. Under the combination `mean` and
            the policy `patience` they are computed all the same, since later exits build on them. The last exit is
            always one of those that images may leave at.

    Raises:
        ValueError: where the arguments do not fit together, or one is no number or out of range.

    Example:

    ```python
    >>> from modeling_mevit.early_exit.calibration_target import CalibrationTarget

    >>> CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95).bound
    'harm'
    >>> CalibrationTarget(max_disagreement=0.01, confidence=0.95).to_dict()
    {'confidence': 0.95, 'max_disagreement': 0.01, 'guarantee': 'probability'}

    ```
    """

    max_cost: float | None = None
    max_accuracy_drop: float | None = None
    confidence: float | None = None
    bound: str | None = None
    max_disagreement: float | None = None
    guarantee: str | None = None
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.exits is not None:
            exits = tuple(self.exits) if isinstance(self.exits, Iterable) else ()
            if not exits or any(not isinstance(layer, Integral) or isinstance(layer, bool) for layer in exits):
                raise ValueError(f"exits must be layer numbers, at least one, got {self.exits!r}.")
            object.__setattr__(self, "exits", tuple(sorted({int(layer) for layer in exits})))
        if [self.max_cost, self.max_accuracy_drop, self.max_disagreement].count(None) != 2:
            raise ValueError(
                f"a calibration target needs one of max_cost, max_accuracy_drop and max_disagreement, got "
                f"max_cost={self.max_cost}, max_accuracy_drop={self.max_accuracy_drop} and "
                f"max_disagreement={self.max_disagreement}."
            )
        for name in ("max_cost", "max_accuracy_drop", "max_disagreement", "confidence"):
            given = getattr(self, name)
            if given is not None and (not isinstance(given, Real) or isinstance(given, bool)):
                raise ValueError(f"{name} must be a number, got {given!r}.")
        if self.max_cost is not None and not self.max_cost > 0:
            raise ValueError(f"max_cost must be above 0 (1 is the plain ViT's cost), got {self.max_cost}.")
        if self.guarantee not in (None, *GUARANTEES):
            raise ValueError(f"guarantee must be one of {', '.join(map(repr, GUARANTEES))}, got {self.guarantee!r}.")
        self._check_guarantee()
        if self.confidence is not None:
            object.__setattr__(self, "guarantee", "probability")
        if self.max_cost is not None:
            return
        name = "max_accuracy_drop" if self.max_disagreement is None else "max_disagreement"
        if self.guarantee is None and not 0 <= self.limit < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {self.limit}.")
        if self.guarantee is not None and not 0 < self.limit < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {self.limit}.")
        if self.confidence is None:
            return
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}.")
        if self.bound is None and self.max_accuracy_drop is not None:
            object.__setattr__(self, "bound", BOUNDS[0])
        if self.bound not in (None, *BOUNDS):
            raise ValueError(f"bound must be one of {', '.join(map(repr, BOUNDS))}, got {self.bound!r}.")

    def _check_guarantee(self) -> None:
        """That confidence, guarantee and bound fit together, and to what is bounded."""
        confidence, guarantee = self.confidence, self.guarantee
        if self.max_cost is not None:
            for name, given in (("confidence", confidence), ("guarantee", guarantee)):
                if given is not None:
                    raise ValueError(
                        f"{name}={given!r} needs max_accuracy_drop or max_disagreement; a cost is not certified, it "
                        f"is measured."
                    )
        if guarantee == "expectation" and confidence is not None:
            raise ValueError(
                f"guarantee='expectation' has no confidence, since it bounds an average; leave out one of the two, "
                f"got confidence={confidence}."
            )
        if guarantee == "probability" and confidence is None:
            raise ValueError("guarantee='probability' needs confidence, such as 0.95, got None.")
        if self.bound is not None and confidence is None:
            raise ValueError(f"bound={self.bound!r} needs confidence; without it nothing is tested.")
        if self.bound is not None and self.max_disagreement is not None:
            raise ValueError(
                f"bound={self.bound!r} is for max_accuracy_drop; a disagreement is tested by the exact binomial tail "
                f"alone."
            )

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "CalibrationTarget":
        """The target that [`CalibrationTarget.to_dict`] wrote; what follows from the rest may be left out.

        Raises:
            ValueError: where it has other fields, or values that are no target.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(stored.keys() - known)
        if unknown:
            raise ValueError(f"the fields of a calibration target must be some of {', '.join(known)}; got {unknown}.")
        return cls(**stored)

    @property
    def needs_labels(self) -> bool:
        """Whether the calibration images need labels; a disagreement needs predictions alone."""
        return self.max_disagreement is None

    @property
    def limit(self) -> float:
        """The share of images that may be lost: `max_accuracy_drop`, or `max_disagreement`.

        Raises:
            ValueError: where the target is a cost.
        """
        limit = self.max_accuracy_drop if self.max_disagreement is None else self.max_disagreement
        if limit is None:
            raise ValueError(f"a bound needs max_accuracy_drop or max_disagreement, got max_cost={self.max_cost}.")
        return limit

    @property
    def certainty(self) -> str:
        """How sure a certificate is, in words: "with probability 95%", or "on average"."""
        return "on average" if self.confidence is None else f"with probability {100 * self.confidence:g}%"

    @property
    def claim(self) -> str:
        """What is certified, in words, such as "a drop of at most 1.00% with probability 95%"."""
        kind = "drop" if self.max_disagreement is None else "disagreement"
        return f"a {kind} of at most {self.limit:.2%} {self.certainty}"

    def among_exits(self, thresholds: Sequence[float], exit_layers: Sequence[int]) -> list[float]:
        """The thresholds of a model's early exits, 0 where the target leaves the exit out."""
        early = zip(exit_layers[:-1], thresholds, strict=True)
        return [threshold if self.exits is None or layer in self.exits else 0.0 for layer, threshold in early]

    def check_exits(self, exit_layers: Sequence[int]) -> None:
        """Checks that a model has the exits that images may leave at.

        Raises:
            ValueError: where it lacks one, or has only the last one of them.
        """
        if self.exits is None:
            return
        if set(self.exits) - set(exit_layers) or not set(self.exits) & set(exit_layers[:-1]):
            raise ValueError(
                f"exits must be some of the model's, on layers {', '.join(map(str, exit_layers))}, one of them before "
                f"the last, got {', '.join(map(str, self.exits))}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The arguments that are set, as JSON holds them."""
        values = {**asdict(self), "exits": self.exits and list(self.exits)}
        return {name: value for name, value in values.items() if value is not None}
