// Copyright 2026 The MEViT authors.
// SPDX-License-Identifier: Apache-2.0
/**
 * The path of thresholds from "no image leaves early" over the calibrated ones to "every image leaves at once", and
 * what is promised on it. Calibration tries one threshold for all early exits after another, so the path does too.
 */

const STEPS = 50; // on either side of the calibrated thresholds, which are in the middle

/**
 * A place on the path.
 *
 * @typedef {object} Stop
 * @property {number[] | null} thresholds of the early exits; null where every image runs to the end
 * @property {boolean} calibrated whether they are the export's own
 */

/**
 * The path, and where the export stands on it.
 *
 * @param {Record<string, any>} config of the export
 * @param {number} exits E
 * @param {number} labels L
 * @returns {{stops: Stop[], start: number, calibrated: number | null}} places of the export's own setting and of the
 *     calibrated thresholds, if there are any
 */
export function thresholdPath(config, exits, labels) {
  const all = grid(config.exit_policy, exits, labels);
  const given = config.exit_thresholds ?? null;
  const own = given === null ? null : Array.isArray(given) ? given : new Array(exits - 1).fill(given);
  // calibration gives one threshold to all exits that images may leave at, and 0 to those that it left out
  const asked = own?.some((threshold) => threshold > 0) ? own.map((threshold) => threshold > 0) : null;
  const above0 = own?.filter((threshold, place) => !asked || asked[place]);
  const middle = own ? above0.reduce((a, b) => a + b, 0) / above0.length : all[Math.floor(all.length / 2)];
  const shared = (threshold) => ({
    thresholds: range(exits - 1).map((place) => (!asked || asked[place] ? threshold : 0)),
    calibrated: false,
  });
  const below = all.filter((threshold) => threshold < middle);
  const above = all.filter((threshold) => threshold > middle);
  const careful = sampled(below.length ? below : [0], STEPS - 1);
  const bold = sampled(above.length ? above : [middle + 1], STEPS);
  const centre = own ? { thresholds: own, calibrated: true } : shared(middle);
  const stops = [{ thresholds: null, calibrated: false }, ...careful.map(shared), centre, ...bold.map(shared)];
  const place = own ? stops.indexOf(centre) : null;
  return { stops, start: config.early_exit ? place : 0, calibrated: place };
}

/** The thresholds that calibration tries: `threshold_grid` in early_exit/calibration.py. */
export function grid(policy, exits, labels) {
  if (policy === "uncertainty") return range(1000).map((place) => 1e-3 + (place * (1 - 1e-3)) / 999);
  if (policy === "patience") return range(exits).map((place) => (place + 0.5) / exits);
  const largest = policy === "entropy" ? Math.log(labels) : 1;
  return range(201).map((place) => largest * 10 ** (-5 + place / 40));
}

/** So many of some values, evenly spread, with the first and the last; repeated where there are fewer. */
function sampled(values, count) {
  return range(count).map((place) => values[Math.round((place * (values.length - 1)) / (count - 1))]);
}

/**
 * Where an image leaves.
 *
 * @param {Array<number | null>} scores of every exit; null where an exit's logits are not finite
 * @param {Stop} stop
 * @returns {number} 0-based place of the exit
 */
export function exitTaken(scores, { thresholds }) {
  const found = thresholds?.findIndex((threshold, place) => {
    const score = scores[place];
    return score !== null && score < Math.fround(threshold);
  });
  return found === undefined || found < 0 ? scores.length - 1 : found;
}

/**
 * What holds at a place of the path, in words.
 *
 * @param {Record<string, any>} config of the export
 * @param {Stop} stop
 * @param {string} precision that the files compute in
 * @returns {{kind: "certified" | "chosen" | "none", text: string}}
 */
export function promiseAt(config, stop, precision) {
  const { target, operating_point: point, made_for: madeFor } = config.calibration ?? {};
  const own = (config.exit_thresholds ?? null) !== null;
  if (!stop.calibrated) {
    const left = isCertified(target) ? "The promise is gone: these" : "These";
    const which = target ? "the calibrated thresholds" : "those that were set";
    const text = own
      ? `${left} are not ${which}, and nothing is promised about them.`
      : "Nothing is promised: the model is not calibrated.";
    return {
      kind: "none",
      text: stop.thresholds ? text : "Every image runs to the end, so nothing is lost and nothing is saved.",
    };
  }
  const fits =
    target &&
    point?.policy === config.exit_policy &&
    equal(point.thresholds, stop.thresholds) &&
    (madeFor?.exit_combination ?? "none") === (config.exit_combination ?? "none") &&
    equal(madeFor?.exit_layers ?? config.exit_layers, config.exit_layers);
  if (!fits) return { kind: "none", text: "These thresholds were set by hand, and nothing is promised about them." };
  const chosenIn = madeFor?.dtype ?? precision;
  if (chosenIn !== precision)
    return {
      kind: "none",
      text: `These thresholds were chosen in ${chosenIn}, and nothing is promised about them in ${precision}.`,
    };
  const on = `on ${point.num_samples} calibration images`;
  if (target.max_cost !== undefined && target.max_cost !== null)
    return {
      kind: "chosen",
      text: `Best accuracy within a mean cost of ${target.max_cost} ${on}. Nothing is promised for other images.`,
    };
  const disagreement = target.max_disagreement ?? null;
  const limit = percent(disagreement ?? target.max_accuracy_drop);
  const keeps =
    disagreement === null
      ? `loses at most ${limit} in accuracy against the last exit`
      : `gives at most ${limit} of images another label than the last exit does`;
  if (!isCertified(target))
    return { kind: "chosen", text: `Early exit ${keeps} ${on}. Nothing is promised for other images.` };
  const certainty =
    target.confidence == null ? "on average" : `with probability ${Math.round(1e4 * target.confidence) / 100}%`;
  return {
    kind: "certified",
    text: `Promised ${certainty}: early exit ${keeps}, on images like those that it was calibrated on.`,
  };
}

function isCertified(target) {
  return (target?.confidence ?? target?.guarantee ?? null) !== null;
}

function percent(share) {
  return `${(100 * share).toFixed(2)}%`;
}

function equal(first, second) {
  return Array.isArray(first) && first.length === second.length && first.every((one, place) => one === second[place]);
}

function range(count) {
  return [...Array(count).keys()];
}
