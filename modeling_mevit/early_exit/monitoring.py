# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Watches in the field whether a calibrated model keeps its promise. Needs numpy alone.

    monitor = PromiseMonitor.from_calibration(config["calibration"], audit=0.01)
    audited = monitor.draw(len(images))  # which of them also run to the end
    monitor.update(early=early_labels[audited], full=full_labels[audited])
    print(monitor)

Images are audited at random, whatever they show, so that those audited are a fair sample. Of each, two answers are
known: that of the exit taken and that of the full run. Whether these differ can be seen without the image's own label.
Where such labels come later, the same images tell the accuracy drop ([`PromiseMonitor.update_labels`]).

Each statement, "the mean of these outcomes is at most the limit", is tested by betting against it (Waudby-Smith and
Ramdas, "Estimating means of bounded random variables by betting", 2024; for monitoring see Podkopaev and Ramdas,
"Tracking the risk of a deployed model and detecting harmful distribution shifts", 2022). Gamblers with constant stakes
begin at various times, and share one unit of capital. If the statement holds, the chance that they ever own 20 is at
most 1/20, however long the stream is and however often one looks.

A copy of this file lies in every exported cascade, as `monitoring_mevit.py`. It keeps to Python 3.8, as the runtime
there does.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


FORMAT = 2  # of states
BETS = 16
AWAKE = 0.5  # share of the capital that is at stake from the first image on
COUNTS = ("seen", "audited", "disagreements", "labelled", "harms", "corrections")
LARGEST = 1e300  # capital of a gambler; JSON has no infinity
MAX_STATE = 2**24  # bytes

# guarantee of a calibration → what it says of its limit
_CLAIMS = {
    "probability": "was promised",
    "expectation": "was promised on average over calibrations",
    None: "was aimed at, but not promised",
}
_ALLOWED = "is allowed"  # where the limits were given by hand
_BROKEN = "these images do not keep to it: calibrate again on images like them"
# where the limit of the disagreement comes from → its words, and what it means that it is exceeded
_BASES = {
    "own": ("{claim}", _BROKEN),
    "drop": (
        "{claim} of the accuracy drop, which is never above the disagreement",
        "the disagreement no longer vouches for the accuracy drop, which may be kept all the same: label the audited "
        "images that disagree, or calibrate again",
    ),
    "calibration": (
        "was to be expected from the calibration images, since the calibration is for an accuracy drop",
        "these images differ from those that calibrated; whether accuracy drops, labels of the audited images that "
        "disagree can tell",
    ),
}


class Evidence:
    """What gamblers own who bet against "each outcome has a mean of at most `limit`, given those before".

    A gambler with the stake λ multiplies its capital by 1 + λ(x − limit) at every outcome x. One unit is divided over
    16 stakes, and over starts: half of it is at stake from the first outcome on, and the rest joins little by little,
    about as 1/(n ln² n), so that a change after a long calm is met with capital that the calm has not used up.

    Why one may look at any time: under the statement a factor has a mean of at most 1, given all that was counted
    before. So what a gambler owns is a nonnegative supermartingale that starts at 1, and so is any mixture of gamblers
    that is fixed beforehand. By Ville's inequality it ever reaches 1/α with a probability of at most α.

    Args:
        limit: of the mean, above 0 and below 1.
        lowest: the lowest outcome, 0 or −1; outcomes are whole numbers up to 1.
        shape: of several streams that are tested side by side, each by itself.
    """

    def __init__(self, limit: float, lowest: int, shape: tuple[int, ...] = ()):
        self.limit = limit
        stakes = np.geomspace(0.3 * min(limit, 0.9), 0.9, BETS) / (limit - lowest)  # none can lose all that it owns
        self._gains = {outcome: np.log1p(stakes * (outcome - limit)) for outcome in range(lowest, 2)}
        self.capital = np.full((*shape, BETS), AWAKE / BETS)
        self.asleep = 1 - AWAKE
        self.tested = 0

    def add(self, outcomes: Mapping[int, Any]) -> None:
        """Counts a block of outcomes: outcome → how many there are, a number, or one for each stream.

        Within a block the order does not matter. Blocks of one outcome notice a change soonest.
        """
        # fixed before the block: it depends on what was tested until now alone
        still_asleep = min(self.asleep, (1 - AWAKE) / (1 + math.log1p(self.tested * self.limit)))
        joins, self.asleep = self.asleep - still_asleep, still_asleep
        gains = sum(np.multiply.outer(count, self._gains[outcome]) for outcome, count in outcomes.items())
        with np.errstate(over="ignore", under="ignore"):  # what is cut off or lost only makes an alarm rarer
            self.capital = np.minimum((self.capital + joins / BETS) * np.exp(np.minimum(gains, 600)), LARGEST)
        self.tested += int(np.max(sum(outcomes.values())))

    @property
    def value(self) -> Any:
        """What all gamblers own together: one number for each stream."""
        return self.capital.sum(-1) + self.asleep


class Audit(NamedTuple):
    """The audited images of a batch, (A,) each, int64.

    Args:
        images: which of the batch they are.
        early: labels of the exits that they took.
        full: labels of the full run; -1 where it predicts none.
    """

    images: np.ndarray
    early: np.ndarray
    full: np.ndarray


class Verdict(NamedTuple):
    """What is known of one statement. `str(verdict)` tells it in one sentence.

    Args:
        name: `"disagreement"` or `"accuracy drop"`.
        limit: the statement: at most this share of the images.
        tested: images that it was tested on.
        lost: those of them that disagree; for a drop, those harmed less those corrected.
        evidence: against the statement: 1 in the beginning, 1 / (1 − confidence) where it is refuted.
        needed: 1 / (1 − confidence).
        alarm_at: how many images had been tested when it was refuted; None where it is not. An alarm stays.
        allowed: where the limit comes from.
        meaning: of an alarm.
    """

    name: str
    limit: float
    tested: int
    lost: int
    evidence: float
    needed: float
    alarm_at: int | None
    allowed: str
    meaning: str

    @property
    def alarm(self) -> bool:
        """Whether the statement is refuted."""
        return self.alarm_at is not None

    @property
    def rate(self) -> float:
        """Share of the tested images that are lost; NaN where none is tested."""
        return self.lost / self.tested if self.tested else math.nan

    def __str__(self) -> str:
        if not self.tested:
            return f"{self.name}: nothing tested; at most {self.limit:.2%} {self.allowed}."
        found = f"{self.name}: {self.rate:.2%} of {self.tested} images; at most {self.limit:.2%} {self.allowed}"
        if self.alarm_at is None:
            return f"{found}. No alarm: the evidence against it is {self.evidence:.3g} of {self.needed:.3g}."
        return f"{found}. ALARM since image {self.alarm_at} of those tested: {self.meaning}."


class PromiseMonitor:
    """Tests at any time whether a promise still holds, with a bounded rate of false alarms over the whole stream.

    It tests two statements, each by itself: that the disagreement between early exit and the full run is at most
    `max_disagreement`, which needs no labels, and that the accuracy drop is at most `max_accuracy_drop`, which needs
    labels of those audited images that disagree. Where a statement holds for every image, given those before, the
    probability that its alarm is ever raised is at most 1 − `confidence`.

    No alarm is no proof that all is well: with few audited images only a large excess is noticed. A monitor is for one
    thread at a time.

    **Replicas.** Each counts with a monitor of its own and sends its [`PromiseMonitor.state`] to one that merges them;
    the verdicts of that one count. A state can be merged again: nothing is counted twice. Replicas must report on a
    schedule, such as every minute or every thousand images, and not because of what they found: if those with
    disagreements report first, what is merged until then is no fair sample.

    Args:
        max_disagreement: share of all images, above 0 and below 1.
        max_accuracy_drop: the same; `max_disagreement` by default, since a drop is never above it.
        audit: share of the images that also run to the end, above 0 and up to 1.
        confidence: of an alarm.
        seed: of the draw of audited images; by default one from the operating system.

    Attributes:
        last_audit: which images of the batch that was drawn last were audited, and both labels of each ([`Audit`]):
            what to keep until their own labels come.

    Raises:
        ValueError: where one of them is out of range.

    Example:

    ```python
    >>> from modeling_mevit.early_exit.monitoring import PromiseMonitor

    >>> monitor = PromiseMonitor(max_disagreement=0.02, audit=0.5, seed=0)
    >>> int(monitor.draw(1000).sum())
    473
    >>> monitor.update(early=[3, 1, 4, 1], full=[3, 1, 4, 0])
    >>> monitor.disagreement.alarm, monitor.disagreement.rate
    (False, 0.25)

    ```
    """

    def __init__(
        self,
        max_disagreement: float,
        max_accuracy_drop: float | None = None,
        *,
        audit: float = 0.01,
        confidence: float = 0.95,
        seed: int | None = None,
    ):
        drop = max_disagreement if max_accuracy_drop is None else max_accuracy_drop
        for name, limit in (("max_disagreement", max_disagreement), ("max_accuracy_drop", drop)):
            _must(name, _is_number(limit) and 0 < limit < 1, "between 0 and 1", limit)
        _must("audit", _is_number(audit) and 0 < audit <= 1, "above 0 and at most 1", audit)
        _must("confidence", _is_number(confidence) and 0 < confidence < 1, "between 0 and 1", confidence)
        _must("seed", seed is None or _is_count(seed), "a whole number from 0 on, or None", seed)
        self.audit = audit
        self.seed = int.from_bytes(os.urandom(8), "big") if seed is None else seed
        self.replica = os.urandom(8).hex()
        self._promise: dict[str, Any] = {
            "max_disagreement": max_disagreement,
            "max_accuracy_drop": drop,
            "basis": "own",
            "claim": _ALLOWED,
            "confidence": confidence,
            "made_for": None,
        }
        self._counts = {self.replica: dict.fromkeys(COUNTS, 0)}
        self._evidence = {"disagreement": Evidence(max_disagreement, lowest=0), "drop": Evidence(drop, lowest=-1)}
        self._alarms: dict[str, int | None] = dict.fromkeys(self._evidence)
        self._drawn = np.zeros(0, dtype=np.int64)
        self.last_audit = Audit(*[self._drawn] * 3)

    @classmethod
    def from_calibration(
        cls,
        calibration: Mapping[str, Any] | None,
        *,
        audit: float = 0.01,
        confidence: float = 0.95,
        seed: int | None = None,
    ) -> PromiseMonitor:
        """A monitor of what a calibration promised: `config.calibration`, or that of an export's config.json.

        A promised disagreement is the limit of disagreement and drop. A promised accuracy drop is the limit of the
        drop; the disagreement then has the same limit, if the calibration images vouch for that, and else what they
        let expect of other images: the upper 95 % bound of their disagreement.

        Args:
            calibration: what `mevit calibrate` wrote.
            audit: share of the images that also run to the end.
            confidence: of an alarm.
            seed: of the draw of audited images; by default one from the operating system.

        Raises:
            ValueError: where there is no calibration, it is for a cost, or malformed.
        """
        if not calibration:
            raise ValueError(
                "a monitor needs a promise, and the config has no calibration; calibrate the model, or give "
                "max_disagreement to PromiseMonitor."
            )
        is_object = isinstance(calibration, Mapping)
        target, point = (calibration.get(name) if is_object else None for name in ("target", "operating_point"))
        are_objects = isinstance(target, Mapping) and isinstance(point, Mapping)
        _must("the calibration in the config", are_objects, "an object with target and operating_point", calibration)
        assert target is not None and point is not None
        if target.get("max_cost") is not None:
            raise ValueError(
                f"a monitor needs a promise about labels, and the model was calibrated for max_cost="
                f"{target['max_cost']}; calibrate it for max_disagreement or max_accuracy_drop, or give "
                f"max_disagreement to PromiseMonitor."
            )
        drop, limit = target.get("max_accuracy_drop"), target.get("max_disagreement")
        basis = "own"
        if limit is None:
            total, disagreements = point.get("num_samples"), point.get("disagreements")
            are_counts = _is_count(total) and _is_count(disagreements) and 0 <= disagreements <= total != 0  # type: ignore[operator]
            _must("num_samples and disagreements of a calibration", are_counts, "counts", (total, disagreements))
            expected = upper_bound(disagreements, total, 0.95)  # type: ignore[arg-type]
            _must("max_accuracy_drop of the calibration", _is_number(drop), "a number", drop)
            basis, limit = ("drop", drop) if expected <= drop else ("calibration", expected)  # type: ignore[operator]
        monitor = cls(limit, drop, audit=audit, confidence=confidence, seed=seed)  # type: ignore[arg-type]
        known = calibration.get("made_for") or {}
        _must("made_for of the calibration", isinstance(known, Mapping), "an object", known)
        made_for = {"target": target, **{name: point.get(name) for name in ("policy", "thresholds")}, **known}
        guarantee = target.get("guarantee") or ("probability" if target.get("confidence") else None)
        is_known = guarantee is None or (isinstance(guarantee, str) and guarantee in _CLAIMS)
        _must("guarantee of the calibration", is_known, f"one of {', '.join(map(repr, _CLAIMS))}", guarantee)
        claim = _CLAIMS[guarantee]
        monitor._promise.update(basis=basis, claim=claim, made_for=json.loads(json.dumps(made_for)))
        return monitor

    def for_replica(self, seed: int | None = None) -> PromiseMonitor:
        """Another monitor of the same promise, which has counted nothing yet: that of a replica.

        Args:
            seed: of its draw of audited images; by default one from the operating system.
        """
        limits = (self._promise[name] for name in ("max_disagreement", "max_accuracy_drop"))
        replica = PromiseMonitor(*limits, audit=self.audit, confidence=self._promise["confidence"], seed=seed)
        replica._promise = dict(self._promise)
        return replica

    def draw(self, count: int) -> np.ndarray:
        """(count,), bool: which of the next images to audit, each with the chance `audit`, whatever the images are."""
        own = self._counts[self.replica]
        # what was seen is saved, so that a monitor that goes on does not draw the same numbers again
        drawn = np.random.default_rng([self.seed, own["seen"]]).random(count)
        own["seen"] += count
        self._drawn = np.flatnonzero(drawn < self.audit)
        self.last_audit = Audit(*[self._drawn[:0]] * 3)
        return drawn < self.audit

    def update(self, early: Any, full: Any) -> None:
        """Counts audited images, and keeps what was said of them as `last_audit`.

        Args:
            early: (A,), labels of the exits that they took: an array, a tensor or a list.
            full: (A,), labels of the full run.

        Raises:
            ValueError: where these are no integers, or not equally many.
        """
        early, full = _labels("early", early), _labels("full", full, like=early)
        # of those that were drawn last, unless their answers come one by one
        images = self._drawn if len(self._drawn) == len(early) else np.arange(len(early))
        self.last_audit = Audit(images, early.astype(np.int64), full.astype(np.int64))
        own = self._counts[self.replica]
        for differs in (early != full).tolist():
            own["audited"] += 1
            own["disagreements"] += differs
            self._count("disagreement", {1: int(differs), 0: int(not differs)})

    def update_labels(self, early: Any, full: Any, labels: Any) -> None:
        """Counts audited images whose labels have come.

        Only images whose two answers differ need a label, since the others neither gain nor lose; what `labels` say of
        those, such as −1, is not looked at. Which images get labels must not depend on whether they disagree: count
        both kinds, of whole batches, or of all images of a day.

        Args:
            early: (B,), labels of the exits that they took.
            full: (B,), labels of the full run.
            labels: (B,), their own labels.

        Raises:
            ValueError: where these are no integers, or not equally many.
        """
        early = _labels("early", early)
        full, labels = _labels("full", full, like=early), _labels("labels", labels, like=early)
        differ = early != full
        harmed, corrected = differ & (full == labels), differ & (early == labels)
        own = self._counts[self.replica]
        for is_harmed, is_corrected in zip(harmed.tolist(), corrected.tolist()):  # noqa: B905  Python 3.8 has no strict
            own["labelled"] += 1
            own["harms"] += is_harmed
            own["corrections"] += is_corrected
            unchanged = not (is_harmed or is_corrected)
            self._count("drop", {1: int(is_harmed), 0: int(unchanged), -1: int(is_corrected)})

    def run(self, model: Any, pixel_values: Any) -> Any:
        """Runs a batch with early exit, audits some of its images, and counts them.

        An exported cascade that was given the monitor audits by itself, at less cost: there, audited images go on from
        where they left.

        Args:
            model: a `MEViTForImageClassification` in eval mode, on whose device the images are, or a `MEViTCascade`.
            pixel_values: (B, C, H, W), tensor.

        Returns:
            What `model(pixel_values, early_exit=True)` returns.

        Raises:
            ValueError: where early exit has no thresholds.
        """
        outputs = model(pixel_values, early_exit=True)
        audited = self.draw(len(pixel_values))
        if not audited.any():
            return outputs
        early = _predictions(outputs.logits[audited])
        full = early.copy()
        # an image that took the last exit has had its full run
        left = _array(outputs.exit_layer[audited]) != model.config.exit_layers[-1]
        if left.any():
            images = pixel_values[np.flatnonzero(audited)[left]]
            full[left] = _predictions(model(images, early_exit=False).logits)
        self.update(early, full)
        return outputs

    @property
    def disagreement(self) -> Verdict:
        """What is known of the disagreement."""
        words, meaning = _BASES[self._promise["basis"]]
        allowed = words.format(claim=self._promise["claim"])
        return self._verdict("disagreement", "disagreement", self.counts["disagreements"], allowed, meaning)

    @property
    def accuracy_drop(self) -> Verdict:
        """What is known of the accuracy drop, from labels that came later."""
        counts = self.counts
        lost = counts["harms"] - counts["corrections"]
        return self._verdict("drop", "accuracy drop", lost, self._promise["claim"], _BROKEN)

    @property
    def alarm(self) -> bool:
        """Whether one of the statements is refuted. An alarm stays; after a new calibration, begin a new monitor."""
        return self.disagreement.alarm or self.accuracy_drop.alarm

    @property
    def counts(self) -> dict[str, int]:
        """Of all replicas: images `seen` and `audited`, `disagreements`, and `harms` and `corrections` of those
        `labelled`."""
        return {name: sum(counts[name] for counts in self._counts.values()) for name in COUNTS}

    def __str__(self) -> str:
        """The verdicts, a line each."""
        verdicts = [self.disagreement, *([self.accuracy_drop] if self.accuracy_drop.tested else [])]
        return "\n".join(map(str, verdicts))

    def state(self) -> dict[str, Any]:
        """Everything that a monitor needs to go on, or another one to merge it, as JSON holds it: some kilobytes."""
        evidence = {
            name: {
                "capital": one.capital.tolist(),
                "asleep": one.asleep,
                "tested": one.tested,
                "alarm_at": self._alarms[name],
            }
            for name, one in self._evidence.items()
        }
        counts = {replica: dict(counts) for replica, counts in self._counts.items()}
        own = {"replica": self.replica, "seed": self.seed}
        return {"format": FORMAT, "promise": dict(self._promise), **own, "counts": counts, "evidence": evidence}

    def save(self, file: str | Path) -> None:
        """Writes the state to a JSON file, whole or not at all."""
        file = Path(file)
        temporary = file.with_name(f".{file.name}-{os.urandom(4).hex()}")
        try:
            with temporary.open("w", encoding="utf-8") as opened:
                json.dump(self.state(), opened)
                opened.flush()
                os.fsync(opened.fileno())  # on the disk before it takes the name
            os.replace(str(temporary), str(file))
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, state: Mapping[str, Any] | str | Path) -> None:
        """Goes on where a saved monitor stopped, as the same replica; only one process may do so.

        Args:
            state: what [`PromiseMonitor.state`] gave, or a file that [`PromiseMonitor.save`] wrote.

        Raises:
            ValueError: where it is of another promise, or malformed.
        """
        state = self._read(state)
        self.replica, self.seed = state["replica"], state["seed"]
        self._counts = {replica: dict(counts) for replica, counts in state["counts"].items()}
        for name, one in self._evidence.items():
            saved = state["evidence"][name]
            one.capital, one.asleep = np.array(saved["capital"], dtype=np.float64), saved["asleep"]
            one.tested, self._alarms[name] = saved["tested"], saved["alarm_at"]

    def merge(self, state: Mapping[str, Any] | str | Path) -> None:
        """Counts what other monitors of the same promise counted, as far as it is not counted yet.

        Args:
            state: what [`PromiseMonitor.state`] of another gave, or a file that its [`PromiseMonitor.save`] wrote.

        Raises:
            ValueError: where it is of another promise, malformed, or contradicts what is known of a replica, as where
                two processes went on from one state.
        """
        state = self._read(state)
        news = {}
        for replica, counts in state["counts"].items():
            known = self._counts.get(replica, dict.fromkeys(COUNTS, 0))
            more = {name: counts[name] - known[name] for name in COUNTS}
            if max(more.values()) > 0 > min(more.values()):
                raise ValueError(
                    f"a replica's counts must grow from one state to the next, got {counts} after {known} of replica "
                    f"{replica}; did two processes go on from one state?"
                )
            if max(more.values()) > 0:
                news[replica] = counts, more
        # What a replica brings is a block of outcomes. Under the statement each has a mean of at most the limit, given
        # all that was merged before and those of the block that came before it; so the factors of a block, multiplied
        # one by one, have a mean of at most 1 given what was merged before, and the merged capital stays a
        # supermartingale along the one sequence of merges that there was, in whatever order replicas report. It would
        # not if outcomes that are not merged yet decided which replica is next. Only counts enter a factor, so the
        # order inside a block does not matter; where in it a change began is lost, so merging often notices it sooner.
        for replica, (counts, more) in news.items():
            self._counts[replica] = dict(counts)
            agreements = more["audited"] - more["disagreements"]
            self._count("disagreement", {1: more["disagreements"], 0: agreements})
            unchanged = more["labelled"] - more["harms"] - more["corrections"]
            self._count("drop", {1: more["harms"], 0: unchanged, -1: more["corrections"]})

    def _count(self, name: str, outcomes: dict[int, int]) -> None:
        if not any(outcomes.values()):
            return
        evidence = self._evidence[name]
        evidence.add(outcomes)
        if self._alarms[name] is None and evidence.value >= 1 / (1 - self._promise["confidence"]):
            self._alarms[name] = evidence.tested

    def _verdict(self, kind: str, name: str, lost: int, allowed: str, meaning: str) -> Verdict:
        evidence, needed = self._evidence[kind], 1 / (1 - self._promise["confidence"])
        value = float(evidence.value)
        return Verdict(
            name, evidence.limit, evidence.tested, lost, value, needed, self._alarms[kind], allowed, meaning
        )

    def _read(self, given: Mapping[str, Any] | str | Path) -> dict[str, Any]:
        """A state that was given, checked."""
        if isinstance(given, Mapping):
            state: Any = given
        else:
            file = Path(given)
            if file.stat().st_size > MAX_STATE:
                raise ValueError(f"{file} must have at most {MAX_STATE} bytes, got {file.stat().st_size}.")
            try:
                state = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} must be JSON: {' '.join(str(error).split())}.") from error
        _must("the state of a monitor", isinstance(state, Mapping), "a JSON object", state)
        _must("the format of a monitor's state", state.get("format") == FORMAT, f"{FORMAT}", state.get("format"))
        if state.get("promise") != self._promise:
            raise ValueError(
                f"the state of a monitor must be of the same promise, {self._promise}, got one of "
                f"{state.get('promise')}; after a new calibration, begin a new monitor."
            )
        counts = state.get("counts")
        are_counts = isinstance(counts, Mapping) and all(map(_are_counts, counts.values()))
        _must("the counts of a monitor's state", are_counts, f"{', '.join(COUNTS)} of each replica", counts)
        _must(
            "the replica of a monitor's state", state.get("replica") in counts, "in its counts", state.get("replica")
        )
        _must("the seed of a monitor's state", _is_count(state.get("seed")), "a whole number", state.get("seed"))
        evidence = state.get("evidence")
        is_whole = isinstance(evidence, Mapping) and all(_is_evidence(evidence.get(name)) for name in self._evidence)
        _must("the evidence of a monitor's state", is_whole, f"of {BETS} bets for each statement", evidence)
        return state


def upper_bound(count: int, total: int, confidence: float) -> float:
    """The largest rate under which so few are to be expected, at a confidence (Chernoff's bound, by Kullback and
    Leibler's divergence): never below the exact binomial one.

    Args:
        count: k, of those that were lost.
        total: n.
        confidence: of the bound.

    Returns:
        The largest u with n·KL(k/n ‖ u) ≤ ln(1 / (1 − confidence)).
    """
    share = count / total
    low, high = share, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        divergence = -(share * math.log(middle) + (1 - share) * math.log1p(-middle)) if middle < 1 else math.inf
        entropy = -sum(one * math.log(one) for one in (share, 1 - share) if one > 0)
        if total * (divergence - entropy) <= -math.log(1 - confidence):
            low = middle
        else:
            high = middle
    return high


def _labels(name: str, given: Any, like: np.ndarray | None = None) -> np.ndarray:
    """Labels (B,) as an array."""
    labels = _array(given)
    is_empty = labels.shape == (0,)  # of a list, whose type numpy takes for float
    _must(name, labels.ndim == 1 and (is_empty or labels.dtype.kind in "iu"), "one whole number for each image", given)
    if like is not None and len(labels) != len(like):
        raise ValueError(f"{name} must have as many labels as early, {len(like)}, got {len(labels)}.")
    return labels


def _predictions(logits: Any) -> np.ndarray:
    """(B,), int64: labels of logits (B, L), and −1 where not all are finite, which predicts nothing."""
    array = _array(logits)
    return np.where(np.isfinite(array).all(-1), array.argmax(-1), -1)


def _array(given: Any) -> np.ndarray:
    """An array of one, of a list, or of a tensor on any device and of any precision."""
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() else given
    return np.asarray(given)


def _are_counts(counts: Any) -> bool:
    if not isinstance(counts, Mapping) or set(counts) != set(COUNTS) or not all(map(_is_count, counts.values())):
        return False
    seen, audited, disagreements, labelled, harms, corrections = (counts[name] for name in COUNTS)
    return disagreements <= audited and harms + corrections <= labelled and seen >= 0


def _is_evidence(given: Any) -> bool:
    if not isinstance(given, Mapping):
        return False
    capital, alarm_at = given.get("capital"), given.get("alarm_at")
    is_list = isinstance(capital, list) and len(capital) == BETS
    is_capital = is_list and all(_is_number(one) and 0 <= one <= LARGEST for one in capital)  # type: ignore[union-attr]
    asleep = given.get("asleep")
    is_asleep = _is_number(asleep) and 0 < asleep <= 1 - AWAKE  # type: ignore[operator]
    return is_capital and is_asleep and _is_count(given.get("tested")) and (alarm_at is None or _is_count(alarm_at))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _must(name: str, is_so: Any, allowed: str, given: Any) -> None:
    """Raises a `ValueError` unless `is_so`."""
    if not is_so:
        raise ValueError(f"{name} must be {allowed}, got {given!r:.200}.")
