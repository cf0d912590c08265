// Copyright 2026 The MEViT authors.
// SPDX-License-Identifier: Apache-2.0
/**
 * Runs an exported MEViT cascade in a browser or in Node, on onnxruntime-web. The counterpart of cascade_mevit.py.
 *
 *     import * as ort from "./ort/ort.wasm.min.mjs";
 *     const cascade = await Cascade.load(ort, fromUrl("."));
 *     const output = await cascade.run(cascade.preprocess([fromImageData(imageData)]));
 *     output.logits, output.exitLayer
 *
 * The directory holds config.json (labels, exit policy and thresholds), preprocessor_config.json, cascade.json (which
 * lists the graphs), and two graphs for each exit: a stage, from the exit before to the keys and values of this exit's
 * layer, and a query graph, which computes that layer for [CLS] first, and for the other tokens only where an image
 * goes on. Where exits are combined, query graphs also take and give the sum of the log-probabilities of the exits
 * passed. An export is data from anyone: what these files say is checked before anything of that size is made.
 *
 * Images are resized as Pillow does it, in its integers of 8 bits, and not by a canvas, which takes other pixels into
 * account: a model that was trained on the one answers differently on the other.
 *
 * B images, E exits, L labels, N tokens of width d, H heads.
 */

const PRECISIONS = ["float32", "float16", "bfloat16", "int8", "int8-dynamic"];
const BORDERLINE = Math.fround(1e-4); // of a score to its threshold: where rounding can decide

const PLAIN_NAME = /^[\p{L}\p{N}_][\p{L}\p{N}_.-]*$/u;
const MAX_EXITS = 1000;
const MAX_LAYER = 10_000;
const MAX_SIDE = 4096; // of an image that is resized or cropped, in pixels
const MAX_JSON = 2 ** 26; // bytes
const EXTERNAL_WEIGHTS = new TextEncoder().encode("location"); // a key in ONNX files, nowhere else in those exported
const CHANNELS = 3; // of an image that is read: red, green, blue
const LARGEST = 3.4028234663852886e38; // float32
// differences between WebGPU and WebAssembly, which add up in another order
const SAME_LOGIT = 1e-2;
const SAME_SCORE = 1e-3;
const STRIP = 2 ** 22; // pixels of an image that are read at a time

/**
 * Gives the content of a file of an export, by its plain name.
 *
 * @callback Reader
 * @param {string} name
 * @returns {Promise<Uint8Array>}
 */

/**
 * An image that is read by rows, so that a large one need not be held whole.
 *
 * @typedef {object} Pixels
 * @property {number} width
 * @property {number} height
 * @property {(top: number, bottom: number) => Uint8Array | Uint8ClampedArray} rows red, green, blue and alpha of the
 *     pixels of some rows; alpha is not looked at
 */

/**
 * What turns an image into pixel values.
 *
 * @typedef {object} Preprocessing
 * @property {[number, number] | null} resize height and width
 * @property {number} resample number of Pillow's filter
 * @property {[number, number] | null} crop height and width
 * @property {number} rescale
 * @property {number[]} mean
 * @property {number[]} std
 */

/**
 * Numbers and their shape: what onnxruntime-web calls a tensor.
 *
 * @typedef {object} Tensor
 * @property {Float32Array} data
 * @property {readonly number[]} dims
 */

/**
 * What {@link Cascade.run} gives.
 *
 * @typedef {object} CascadeOutput
 * @property {Tensor} logits (B, L), of the exit that each image took
 * @property {number[]} exitLayer (B,), the layer of that exit
 * @property {number[]} exitScore (B,), its score, low where the exit is sure
 * @property {boolean[]} borderline (B,), whether an image had, at an exit that it reached, a score within 1e-4 of its
 *     threshold; another runtime may let it leave at another exit
 */

/**
 * What happened at one exit.
 *
 * @typedef {object} ExitReached
 * @property {number} place of the exit among all, from 0 on
 * @property {number[]} samples (R,), which images reach it
 * @property {Record<string, Tensor>} answers of its query graph, such as `logits` (R, L)
 * @property {Float32Array} scores (R,)
 */

/** An exported cascade, whose later stages run only on the images that go on. */
export class Cascade {
  /**
   * Reads and opens an export.
   *
   * @param {any} ort the module onnxruntime-web, in whichever of its builds
   * @param {Reader} read
   * @param {object} [options]
   * @param {string[]} [options.executionProviders] in order of preference; WebAssembly by default
   * @returns {Promise<Cascade>}
   * @throws {Error} where a file is missing, malformed, damaged, or of an older version
   */
  static async load(ort, read, { executionProviders = ["wasm"] } = {}) {
    const description = await readJson(read, "cascade.json");
    const stages = readStages(description);
    const config = await readJson(read, "config.json");
    checkConfig(config, stages);
    const side = config.image_size;
    const imageSize = typeof side === "number" ? [side, side] : side;
    const preprocessing = readPreprocessing(await readJson(read, "preprocessor_config.json"), imageSize);
    const sessions = [];
    for (const stage of stages) {
      const open = (name) => openGraph(ort, read, name, executionProviders);
      sessions.push({ stage: await open(stage.stage), query: await open(stage.query) });
    }
    return new Cascade(ort, config, stages, sessions, preprocessing, imageSize, description.precision);
  }

  /** @hidden use {@link Cascade.load} */
  constructor(ort, config, stages, sessions, preprocessing, imageSize, precision = "float32") {
    /** What config.json holds. @type {Record<string, any>} */
    this.config = config;
    /** Names of the labels, in the order of the logits. @type {string[]} */
    this.labels = readLabels(config);
    /** @type {Preprocessing} */
    this.preprocessing = preprocessing;
    /** Height and width that the model needs. @type {[number, number]} */
    this.imageSize = imageSize;
    /** @type {number[]} */
    this.exitLayers = stages.map((stage) => stage.exit_layer);
    /** Of leaving at each exit, relative to the plain ViT. @type {number[]} */
    this.costs = stages.map((stage) => stage.cost);
    /** What the files compute in; those that are made for bfloat16 are in float32. @type {string} */
    this.precision = precision === "bfloat16" ? "float32" : precision;
    this.ort = ort;
    this.stages = sessions;
    this.#checkGraphs();
    const chosenIn = calibratedPrecision(config, precision);
    if (chosenIn !== null && chosenIn !== this.precision)
      console.warn(
        `the thresholds were chosen in ${chosenIn}, got ${this.precision}, where scores differ, so that nothing is ` +
          "promised about early exit here.",
      );
  }

  /**
   * Classifies images.
   *
   * @param {Tensor} pixelValues (B, C, H, W), as {@link Cascade.preprocess} gives them
   * @param {object} [options]
   * @param {boolean} [options.earlyExit] whether images leave early; what the config says by default
   * @param {number | number[]} [options.exitThresholds] one number, or one for each exit but the last; the config's by
   *     default
   * @returns {Promise<CascadeOutput>}
   * @throws {Error} where images have another shape, or thresholds are missing, of the wrong number, NaN, or given to
   *     a run that does not leave early
   */
  async run(pixelValues, { earlyExit, exitThresholds } = {}) {
    this.#checkPixelValues(pixelValues);
    const thresholds = this.thresholds(earlyExit, exitThresholds);
    const [size, labels] = [pixelValues.dims[0], this.labels.length];
    const logits = new Float32Array(size * labels);
    const exitLayer = new Array(size).fill(this.exitLayers.at(-1));
    const exitScore = new Array(size).fill(0);
    const borderline = new Array(size).fill(false);
    const counts = this.counts(thresholds);
    for await (const { place, samples, answers, scores } of this.exits(pixelValues, thresholds, counts)) {
      samples.forEach((sample, row) => {
        // images that go on are written again at their next exit
        logits.set(rowOf(answers.logits, row), sample * labels);
        exitLayer[sample] = this.exitLayers[place];
        exitScore[sample] = scores[row];
        const distance = Math.abs(Math.fround(scores[row] - thresholds[place]));
        borderline[sample] ||= place < thresholds.length && distance < BORDERLINE;
      });
    }
    return { logits: tensor(logits, [size, labels]), exitLayer, exitScore, borderline };
  }

  /**
   * Runs images (B, C, H, W) to the end: logits (B, E, L) and scores (B, E) of every exit.
   *
   * Logits are each exit's own also where exits are combined; scores are those of the combination.
   *
   * @param {Tensor} pixelValues
   * @returns {Promise<{logits: Tensor, scores: Tensor}>}
   * @throws {Error} where images have another shape
   */
  async everyExit(pixelValues) {
    this.#checkPixelValues(pixelValues);
    const [size, exits, labels] = [pixelValues.dims[0], this.exitLayers.length, this.labels.length];
    const logits = new Float32Array(size * exits * labels);
    const scores = new Float32Array(size * exits);
    for await (const { place, samples, answers, scores: found } of this.exits(pixelValues, this.thresholds(false))) {
      const own = answers.exit_logits ?? answers.logits;
      for (const sample of samples) {
        logits.set(rowOf(own, sample), (sample * exits + place) * labels);
        scores[sample * exits + place] = found[sample];
      }
    }
    return { logits: tensor(logits, [size, exits, labels]), scores: tensor(scores, [size, exits]) };
  }

  /**
   * Which exits a run needs (E,): those where an image can leave, since no score is below 0; and all of them where an
   * exit's answer depends on those before.
   *
   * @param {Float32Array} thresholds of {@link Cascade.thresholds}
   * @returns {boolean[]}
   */
  counts(thresholds) {
    const dependsOnAll = this.config.exit_policy === "patience" || combinesExits(this.stages[0].query);
    return [...Array.from(thresholds, (threshold) => dependsOnAll || threshold > 0), true];
  }

  /**
   * Runs images from exit to exit; those whose score is under the exit's threshold leave the batch there.
   *
   * @param {Tensor} pixelValues (B, C, H, W)
   * @param {Float32Array} thresholds of {@link Cascade.thresholds}
   * @param {boolean[]} [counts] which exits are needed, all by default; at others, their layer is computed for all
   *     tokens at once
   * @returns {AsyncGenerator<ExitReached>} each exit that counts and is reached
   */
  async *exits(pixelValues, thresholds, counts = this.stages.map(() => true)) {
    let state = pixelValues;
    let samples = [...Array(state.dims[0]).keys()]; // which images are still in the batch
    let labels = samples.map(() => -1);
    let streak = samples.map(() => 0);
    const width = this.labels.length;
    let passed = tensor(new Float32Array(samples.length * width), [samples.length, width]); // log-probabilities' sum
    if (!samples.length) return;
    for (const [place, { stage, query }] of this.stages.entries()) {
      const outputs = await this.#feed(stage, { [stage.inputNames[0]]: state });
      // between neighbouring exits there is no layer, and the stage does not repeat its input
      let tokens = [outputs.hidden_state ?? state, outputs.normed, outputs.keys, outputs.values];
      if (!counts[place]) {
        state = (await this.#feed(query, queryInputs(query, tokens, allTokens, passed))).outputs;
        continue;
      }
      const answers = await this.#feed(query, queryInputs(query, tokens, firstToken, passed));
      passed = answers.log_probability_sum ?? passed;
      // an exit whose logits are not all finite predicts nothing, agrees with none, and is never sure
      const predicted = samples.map((_, row) => label(rowOf(answers.logits, row)));
      streak = streak.map((count, row) => (predicted[row] === labels[row] ? count + 1 : 1));
      labels = predicted;
      // patience is the only policy whose score depends on the exits before, so that no graph computes it
      const scores =
        answers.score?.data ??
        Float32Array.from(streak, (count, row) =>
          predicted[row] < 0 ? NaN : 1 - Math.fround(count / this.stages.length),
        );
      yield { place, samples, answers, scores };
      if (place === thresholds.length) return;

      const stay = [];
      samples.forEach((_, row) => {
        if (!(scores[row] < thresholds[place] && predicted[row] >= 0)) stay.push(row);
      });
      if (!stay.length) return;
      let cls = answers.outputs;
      if (stay.length < samples.length) {
        [samples, labels, streak] = [samples, labels, streak].map((all) => stay.map((row) => all[row]));
        [cls, passed, ...tokens] = [cls, passed, ...tokens].map((all) => select(all, stay));
      }
      const patches = await this.#feed(query, queryInputs(query, tokens, otherTokens, passed));
      state = joined(cls, patches.outputs);
    }
  }

  /**
   * Prepares images as the model's image processor does.
   *
   * @param {Pixels[]} images upright
   * @returns {Tensor} (B, C, H, W)
   */
  preprocess(images) {
    const { resize: size, resample, crop, rescale, mean, std } = this.preprocessing;
    const [height, width] = this.imageSize;
    const plane = height * width;
    const data = new Float32Array(images.length * CHANNELS * plane);
    const scale = Math.fround(rescale);
    images.forEach((image, index) => {
      let pixels = size ? resize(image, size[0], size[1], resample) : rgb(image);
      if (crop) pixels = centreCrop(pixels, crop[0], crop[1]);
      for (let channel = 0; channel < CHANNELS; channel++) {
        const [shift, deviation] = [Math.fround(mean[channel]), Math.fround(std[channel])];
        const start = (index * CHANNELS + channel) * plane;
        for (let place = 0; place < plane; place++) {
          const value = Math.fround(pixels.data[place * CHANNELS + channel] * scale);
          data[start + place] = Math.fround(value - shift) / deviation;
        }
      }
    });
    return tensor(data, [images.length, CHANNELS, height, width]);
  }

  /**
   * The thresholds of the early exits (E − 1,); below all scores where no image leaves early.
   *
   * @param {boolean} [earlyExit] what the config says by default
   * @param {number | number[]} [given] the config's by default
   * @returns {Float32Array}
   */
  thresholds(earlyExit = this.config.early_exit, given = undefined) {
    const count = this.exitLayers.length - 1;
    if (!earlyExit) {
      if (given !== undefined)
        throw new Error("exitThresholds need earlyExit: true; without it no image leaves early.");
      return new Float32Array(count).fill(-Infinity);
    }
    const thresholds = given ?? this.config.exit_thresholds ?? null;
    if (thresholds === null)
      throw new Error("early exit needs exitThresholds; neither the call nor the export has any.");
    const list = typeof thresholds === "number" ? new Array(count).fill(thresholds) : [...thresholds];
    if (list.length !== count)
      throw new Error(`exitThresholds must be one number or ${count}, got ${shown(thresholds)}.`);
    if (!list.every((one) => typeof one === "number" && !Number.isNaN(one)))
      throw new Error(`exitThresholds must be numbers, got ${shown(thresholds)}.`);
    return Float32Array.from(list);
  }

  /** Frees the memory of the graphs. */
  async release() {
    for (const { stage, query } of this.stages) {
      await stage.release();
      await query.release();
    }
  }

  /** Runs a graph: output name → value. */
  async #feed(session, inputs) {
    const feeds = {};
    for (const [name, { data, dims }] of Object.entries(inputs))
      feeds[name] = new this.ort.Tensor("float32", data, dims);
    try {
      return await session.run(feeds);
    } catch (error) {
      throw new Error(`a graph of the export does not run: ${oneLine(error)}`);
    }
  }

  #checkPixelValues({ data, dims }) {
    const expected = [this.config.num_channels, ...this.imageSize];
    if (!(data instanceof Float32Array)) throw new Error("pixelValues must have data of a Float32Array.");
    if (dims.length !== 4 || !same(dims.slice(1), expected) || data.length !== dims.reduce((a, b) => a * b))
      throw new Error(`pixelValues must have shape (B, ${expected.join(", ")}), got (${dims.join(", ")}).`);
  }

  /** Throws where graphs are not those of this cascade, or of other sizes than the config says. */
  #checkGraphs() {
    for (const [place, { stage, query }] of this.stages.entries()) {
      const exit = `exit ${this.exitLayers[place]}`;
      const combines = combinesExits(query);
      const needed = ["outputs", "logits", ...(combines ? ["exit_logits", "log_probability_sum"] : [])];
      const missing = ["normed", "keys", "values"].filter((name) => !stage.outputNames.includes(name));
      missing.push(...needed.filter((name) => !query.outputNames.includes(name)));
      if (missing.length)
        throw new Error(
          `the graphs of ${exit} must have all outputs of a stage and a query graph; missing are ` +
            `${missing.sort().join(", ")}.`,
        );
      const logits = query.outputMetadata.find((one) => one.name === "logits");
      must(
        "id2label in config.json",
        same(logits.shape.slice(1), [this.labels.length]),
        `of as many labels as the logits of ${exit}`,
        `${this.labels.length} labels`,
      );
      const combination = combines ? "mean" : "none";
      const given = this.config.exit_combination ?? "none"; // a config leaves out what it has by default
      must(
        "exit_combination in config.json",
        given === combination,
        `${shown(combination)}, which the graphs of ${exit} compute`,
        given,
      );
    }
    const expected = [this.config.num_channels, ...this.imageSize];
    const found = this.stages[0].stage.inputMetadata[0].shape.slice(1);
    must(
      "num_channels and image_size in config.json",
      same(found, expected),
      `${shown(found)}, the first graph's`,
      expected,
    );
  }
}

/**
 * Reads the files of an export that a server has.
 *
 * @param {string | URL} directory
 * @returns {Reader}
 */
export function fromUrl(directory) {
  const base = new URL(`${directory}`.replace(/\/?$/, "/"), globalThis.location?.href);
  return async (name) => {
    let response;
    try {
      response = await fetch(new URL(encodeURIComponent(name), base));
    } catch (error) {
      throw new Error(`${name} cannot be loaded: ${oneLine(error)}`);
    }
    if (!response.ok) throw new Error(`${name} is missing: the server answers ${response.status}.`);
    return new Uint8Array(await response.arrayBuffer());
  };
}

/**
 * The pixels of what a canvas gives.
 *
 * @param {{data: Uint8Array | Uint8ClampedArray, width: number, height: number}} imageData with alpha
 * @returns {Pixels}
 */
export function fromImageData({ data, width, height }) {
  return { width, height, rows: (top, bottom) => data.subarray(top * width * 4, bottom * width * 4) };
}

/**
 * An export on WebGPU where that gives the same answers on a probe as WebAssembly does, in less time; else on
 * WebAssembly.
 *
 * @param {any} ort a build of onnxruntime-web that has both
 * @param {Reader} read
 * @returns {Promise<{cascade: Cascade, provider: "webgpu" | "wasm"}>}
 */
export async function loadFastest(ort, read) {
  const reference = await Cascade.load(ort, read);
  let candidate = null;
  try {
    candidate = await Cascade.load(ort, read, { executionProviders: ["webgpu"] });
    const ours = await probe(candidate);
    const theirs = await probe(reference);
    if (agree(ours.answers, theirs.answers) && ours.time < theirs.time) {
      await reference.release();
      return { cascade: candidate, provider: "webgpu" };
    }
  } catch {
    // a driver that cannot run the graphs, for which WebAssembly is there
  }
  await candidate?.release();
  return { cascade: reference, provider: "wasm" };
}

/** What every exit says of a probe, a colourful image, the same each time; and how long a run to the end takes. */
async function probe(cascade) {
  const [height, width] = cascade.imageSize;
  const data = new Uint8ClampedArray(height * width * 4);
  for (let place = 0; place < data.length; place++) data[place] = (place * 2654435761) >>> 24;
  const pixelValues = cascade.preprocess([fromImageData({ data, width, height })]);
  const answers = await cascade.everyExit(pixelValues);
  await cascade.run(pixelValues, { earlyExit: false }); // the first run compiles
  const start = performance.now();
  await cascade.run(pixelValues, { earlyExit: false });
  return { answers, time: performance.now() - start };
}

/** Whether two runtimes say the same of an image at every exit, up to rounding: its label, logits and score. */
function agree(first, second) {
  const [, exits, labels] = first.logits.dims;
  const isSame = (place) => {
    const [ours, theirs] = [first, second].map(({ logits }) =>
      logits.data.subarray(place * labels, (place + 1) * labels),
    );
    return (
      label(ours) === label(theirs) &&
      ours.every((value, index) => Math.abs(value - theirs[index]) <= SAME_LOGIT) &&
      Math.abs(first.scores.data[place] - second.scores.data[place]) <= SAME_SCORE
    );
  };
  return [...Array(exits).keys()].every(isSame);
}

/**
 * Softmax of the logits of one image.
 *
 * @param {Float32Array} logits (L,)
 * @returns {number[]} (L,)
 * @throws {Error} where they are not all finite
 */
export function softmax(logits) {
  if (!logits.every(Number.isFinite)) throw new Error(`logits must be finite, got ${shown([...logits])}.`);
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const exponentials = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map((value) => value / sum);
}

/** One row of a tensor whose rows are (first dimension, …). */
export function rowOf({ data, dims }, row) {
  const width = data.length / dims[0];
  return data.subarray(row * width, (row + 1) * width);
}

// Images, as Pillow resizes them: src/libImaging/Resample.c of Pillow

/** Width of each of Pillow's filters on either side of its centre, and its weight there. By Pillow's numbers. */
const FILTERS = {
  1: { support: 3, weight: (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0) }, // Lanczos
  2: { support: 1, weight: (x) => Math.max(1 - Math.abs(x), 0) }, // bilinear
  3: { support: 2, weight: bicubic },
  4: { support: 0.5, weight: (x) => (-0.5 < x && x <= 0.5 ? 1 : 0) }, // box
  5: { support: 1, weight: hamming },
};
const NEAREST = 0;
const PRECISION = 22; // bits of a weight behind the point

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

function hamming(x) {
  x = Math.abs(x);
  if (x === 0) return 1;
  return x < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)) : 0;
}

/**
 * Resizes an image as the `Image.resize` of Pillow 13 does, with the same rounding: rows first, then columns, but
 * columns first where the height loses more than twice as many pixels as the width. (Older versions always take rows
 * first, which rounds otherwise.)
 *
 * @param {Pixels} image
 * @param {number} height of the result
 * @param {number} width of the result
 * @param {number} resample number of Pillow's filter, from 0 to 5
 * @returns {{data: Uint8ClampedArray, width: number, height: number}} red, green and blue of each pixel
 */
export function resize(image, height, width, resample) {
  if (resample === NEAREST && (height !== image.height || width !== image.width)) return nearest(image, height, width);
  const across = width === image.width ? null : weights(image.width, width, FILTERS[resample]);
  const down = height === image.height ? null : weights(image.height, height, FILTERS[resample]);
  const lost = image.height - height;
  if (across && down && lost > 0 && lost > 2 * (image.width - width)) {
    const data = new Uint8ClampedArray(height * width * CHANNELS);
    resampleAcross(columns(image, down), image.width, CHANNELS, across, data);
    return { data, width, height };
  }
  const wide = rgb(image, across);
  return { data: down ? resampleDown(wide, down) : wide.data, width, height };
}

/** For each pixel of a side of the result, which pixels it is made of, and their weights in fixed point. */
function weights(from, to, { support, weight }) {
  const scale = from / to;
  const stretch = Math.max(scale, 1); // a smaller image takes in all pixels of the larger one
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support * stretch + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support * stretch + 0.5), from);
    const taken = [];
    for (let x = 0; x < last - first; x++) taken.push(weight((x + first - centre + 0.5) * (1 / stretch)));
    const sum = taken.reduce((a, b) => a + b, 0);
    const normed = sum === 0 ? taken : taken.map((one) => one / sum);
    return {
      first,
      taken: Int32Array.from(normed, (one) => Math.trunc((one < 0 ? -0.5 : 0.5) + one * 2 ** PRECISION)),
    };
  });
}

/** An image in strips of rows, with red, green, blue and alpha of each pixel: where a strip begins, and its bytes. */
function* strips(image) {
  const step = Math.max(Math.floor(STRIP / image.width), 1);
  for (let top = 0; top < image.height; top += step) {
    yield { top, strip: image.rows(top, Math.min(top + step, image.height)) };
  }
}

/** Reads an image, and resizes its rows where `across` has weights. Leaves alpha out. */
function rgb(image, across = null) {
  const width = across ? across.length : image.width;
  const data = new Uint8ClampedArray(image.height * width * CHANNELS);
  const taken = across ?? Array.from({ length: width }, (_, first) => ({ first, taken: null }));
  for (const { top, strip } of strips(image)) {
    resampleAcross(strip, image.width, 4, taken, data.subarray(top * width * CHANNELS));
  }
  return { data, width, height: image.height };
}

/** Resizes rows of `width` pixels, each of which has `size` bytes, into red, green and blue. */
function resampleAcross(rows, width, size, across, data) {
  let target = 0;
  for (let row = 0; row < rows.length; row += width * size) {
    for (const { first, taken } of across) {
      let place = row + first * size;
      if (!taken) {
        for (let channel = 0; channel < CHANNELS; channel++) data[target++] = rows[place + channel];
        continue;
      }
      let red = HALF;
      let green = HALF;
      let blue = HALF;
      for (let k = 0; k < taken.length; k++, place += size) {
        red += rows[place] * taken[k];
        green += rows[place + 1] * taken[k];
        blue += rows[place + 2] * taken[k];
      }
      data[target++] = red >> PRECISION; // clamped to a byte
      data[target++] = green >> PRECISION;
      data[target++] = blue >> PRECISION;
    }
  }
}

/** Reads an image, and resizes its columns: red, green and blue of `down.length` rows. */
function columns(image, down) {
  const row = image.width * CHANNELS;
  const sums = new Int32Array(down.length * row).fill(HALF);
  for (const { top, strip } of strips(image)) {
    const bottom = top + strip.length / (4 * image.width);
    down.forEach(({ first, taken }, place) => {
      for (let y = Math.max(first, top); y < Math.min(first + taken.length, bottom); y++) {
        let source = (y - top) * image.width * 4;
        for (let target = place * row; target < (place + 1) * row; source += 4) {
          for (let channel = 0; channel < CHANNELS; channel++) sums[target++] += strip[source + channel] * taken[y - first];
        }
      }
    });
  }
  return Uint8ClampedArray.from(sums, (sum) => sum >> PRECISION);
}

const HALF = 2 ** (PRECISION - 1); // to round

function resampleDown({ data, width }, down) {
  const row = width * CHANNELS;
  const resized = new Uint8ClampedArray(down.length * row);
  const sums = new Int32Array(row);
  down.forEach(({ first, taken }, y) => {
    sums.fill(HALF);
    for (let k = 0; k < taken.length; k++) {
      const source = (first + k) * row;
      for (let x = 0; x < row; x++) sums[x] += data[source + x] * taken[k];
    }
    for (let x = 0; x < row; x++) resized[y * row + x] = sums[x] >> PRECISION;
  });
  return resized;
}

function nearest(image, height, width) {
  // Pillow adds up steps, which rounds otherwise than a product
  const places = (from, to) => {
    const step = from / to;
    let place = step * 0.5;
    return Array.from({ length: to }, () => {
      const found = Math.trunc(place);
      place += step;
      return Math.min(found, from - 1);
    });
  };
  const columns = places(image.width, width);
  const data = new Uint8ClampedArray(height * width * CHANNELS);
  places(image.height, height).forEach((y, row) => {
    const source = image.rows(y, y + 1);
    columns.forEach((x, column) => {
      for (let channel = 0; channel < CHANNELS; channel++)
        data[(row * width + column) * CHANNELS + channel] = source[x * 4 + channel];
    });
  });
  return { data, width, height };
}

/** The centre of an image; black where it has none. */
function centreCrop({ data, width, height }, rows, columns) {
  const cropped = new Uint8ClampedArray(rows * columns * CHANNELS);
  const top = Math.floor((height - rows) / 2);
  const left = Math.floor((width - columns) / 2);
  const [first, last] = [Math.max(left, 0), Math.min(left + columns, width)];
  for (let y = Math.max(top, 0); y < Math.min(top + rows, height); y++) {
    const part = data.subarray((y * width + first) * CHANNELS, (y * width + last) * CHANNELS);
    cropped.set(part, ((y - top) * columns + first - left) * CHANNELS);
  }
  return { data: cropped, width: columns, height: rows };
}

// Tensors

function tensor(data, dims) {
  return { data, dims };
}

/** Some rows of a tensor, by place. */
function select(all, rows) {
  const width = all.data.length / all.dims[0];
  const data = new Float32Array(rows.length * width);
  rows.forEach((row, place) => data.set(rowOf(all, row), place * width));
  return tensor(data, [rows.length, ...all.dims.slice(1)]);
}

/** Tokens from `first` on, `count` of them, of each image: (B, N, d) → (B, count, d). */
function slice({ data, dims: [size, tokens, width] }, first, count) {
  const taken = new Float32Array(size * count * width);
  for (let row = 0; row < size; row++) {
    const start = (row * tokens + first) * width;
    taken.set(data.subarray(start, start + count * width), row * count * width);
  }
  return tensor(taken, [size, count, width]);
}

const firstToken = (all) => slice(all, 0, 1); // [CLS]
const allTokens = (all) => all;
const otherTokens = (all) => slice(all, 1, all.dims[1] - 1);

/** Puts the tokens of each image one behind another: (B, 1, d) and (B, N − 1, d) → (B, N, d). */
function joined(cls, patches) {
  const [size, count, width] = patches.dims;
  const data = new Float32Array(size * (count + 1) * width);
  for (let row = 0; row < size; row++) {
    data.set(rowOf(cls, row), row * (count + 1) * width);
    data.set(rowOf(patches, row), (row * (count + 1) + 1) * width);
  }
  return tensor(data, [size, count + 1, width]);
}

/** What a query graph is fed, to compute its layer for some of the tokens that its stage handed on. */
function queryInputs(query, [hidden, normed, keys, values], queries, passed) {
  const inputs = { hidden_queries: queries(hidden), normed_queries: queries(normed), keys, values };
  return combinesExits(query) ? { ...inputs, previous_sum: passed } : inputs;
}

/** Whether a query graph is of a cascade whose exits are combined. */
function combinesExits(query) {
  return query.inputNames.includes("previous_sum");
}

/** The place of the largest of some logits, or −1 where they are not all finite. */
function label(logits) {
  if (!logits.every(Number.isFinite)) return -1;
  let best = 0;
  for (let place = 1; place < logits.length; place++) if (logits[place] > logits[best]) best = place;
  return best;
}

// Files of an export

async function readJson(read, name) {
  const bytes = await read(name);
  if (bytes.length > MAX_JSON) throw new Error(`${name} must have at most ${MAX_JSON} bytes, got ${bytes.length}.`);
  let content;
  try {
    content = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new Error(`${name} must be JSON: ${oneLine(error)}.`);
  }
  must(name, isObject(content), "a JSON object", content);
  return content;
}

async function openGraph(ort, read, name, executionProviders) {
  const bytes = await read(name);
  if (contains(bytes, EXTERNAL_WEIGHTS))
    throw new Error(`${name} must hold its weights itself, got a graph that has them in another file.`);
  try {
    return await ort.InferenceSession.create(bytes, { executionProviders, logSeverityLevel: 3 });
  } catch (error) {
    throw new Error(`${name} cannot be opened, it may be damaged: ${oneLine(error)}`);
  }
}

function contains(bytes, part) {
  let start = bytes.indexOf(part[0]);
  while (start >= 0) {
    if (part.every((byte, place) => bytes[start + place] === byte)) return true;
    start = bytes.indexOf(part[0], start + 1);
  }
  return false;
}

/**
 * What the thresholds of a config were chosen in; null where they are not those of a calibration.
 *
 * @param {Record<string, any>} config
 * @param {string} precision in cascade.json, for which older calibrations, that do not tell, were made
 * @returns {string | null}
 */
export function calibratedPrecision({ calibration, exit_thresholds: given = null }, precision) {
  const chosen = calibration?.operating_point?.thresholds;
  if (given === null || !Array.isArray(chosen)) return null;
  const own = Array.isArray(given) ? given : chosen.map(() => given);
  return same(own, chosen) ? (calibration.made_for?.dtype ?? precision) : null;
}

/**
 * The graphs of an exported cascade, from what cascade.json holds.
 *
 * @returns {Array<{exit_layer: number, stage: string, query: string, score: string, cost: number}>}
 * @throws {Error} where it is malformed or of an older version
 */
export function readStages(description) {
  const { stages, precision = "float32" } = description;
  const areObjects = Array.isArray(stages) && stages.every(isObject);
  if ("thresholds" in description || (areObjects && stages.some((stage) => !("query" in stage))))
    throw new Error("cascade.json is of an older version; export the checkpoint again with `mevit export`.");
  must("precision in cascade.json", PRECISIONS.includes(precision), `one of ${PRECISIONS.join(", ")}`, precision);
  const isCounted = areObjects && stages.length > 0 && stages.length <= MAX_EXITS;
  must("stages in cascade.json", isCounted, `1 to ${MAX_EXITS} objects`, stages);
  const layers = stages.map((stage) => stage.exit_layer);
  must(
    "exit_layer in cascade.json",
    layers.every((layer) => isCount(layer, MAX_LAYER)),
    "a layer number",
    layers,
  );
  const ascend = layers.every((layer, place) => place === 0 || layer > layers[place - 1]);
  must("the exit layers in cascade.json", ascend, "in ascending order", layers);
  for (const { stage, query } of stages)
    for (const name of [stage, query])
      must(
        "the name of a file in cascade.json",
        typeof name === "string" && PLAIN_NAME.test(name),
        "letters, digits, '_', '-' and '.'",
        name,
      );
  return stages;
}

function checkConfig(config, stages) {
  const { image_size: size, num_channels: channels, early_exit: earlyExit, exit_policy: policy } = config;
  const sides = Array.isArray(size) ? size : [size, size];
  const areSides = sides.length === 2 && sides.every((side) => isCount(side, MAX_SIDE));
  must("image_size in config.json", areSides, `one number or two from 1 to ${MAX_SIDE}`, size);
  must("num_channels in config.json", channels === CHANNELS, `${CHANNELS}, as images in a browser have`, channels);
  must("early_exit in config.json", typeof earlyExit === "boolean", "true or false", earlyExit);
  const scores = stages.map((stage) => stage.score);
  must(
    "exit_policy in config.json",
    scores.every((one) => one === policy),
    `that of the graphs, ${shown(scores[0])}`,
    policy,
  );
  const layers = stages.map((stage) => stage.exit_layer);
  must(
    "exit_layers in config.json",
    same(config.exit_layers, layers),
    `those of the graphs, ${shown(layers)}`,
    config.exit_layers,
  );
  const thresholds = config.exit_thresholds ?? null;
  must(
    "exit_thresholds in config.json",
    thresholds === null || isNumber(thresholds) || areNumbers(thresholds, stages.length - 1),
    `null, one number or ${stages.length - 1}`,
    thresholds,
  );
}

function readLabels(config) {
  // a config leaves out what it has by default: two labels of these names
  const names = config.id2label ?? { 0: "LABEL_0", 1: "LABEL_1" };
  const count = isObject(names) ? Object.keys(names).length : 0;
  const labels = Array.from({ length: count }, (_, number) => names[number]);
  const areNamed = count > 0 && labels.every((name) => typeof name === "string");
  must("id2label in config.json", areNamed, "names of the labels 0, 1, and so on", names);
  return labels;
}

/**
 * What an image processor does, from what preprocessor_config.json holds.
 *
 * @param {Record<string, any>} config
 * @param {[number, number]} imageSize height and width that the model needs
 * @returns {Preprocessing}
 * @throws {Error} where it resizes or crops otherwise than to a height and width, its images are of another size, or a
 *     field is missing or malformed
 */
export function readPreprocessing(config, imageSize) {
  const sides = (name) => {
    const given = config[name];
    const isSize = isObject(given) && same(Object.keys(given).sort(), ["height", "width"]);
    must(`the image processor's ${name}`, isSize, "height and width", given);
    const areSides = isCount(given.height, MAX_SIDE) && isCount(given.width, MAX_SIDE);
    must(`the image processor's ${name}`, areSides, `of sides from 1 to ${MAX_SIDE}`, given);
    return [given.height, given.width];
  };
  const size = config.do_resize ? sides("size") : null;
  const crop = config.do_center_crop ? sides("crop_size") : null;
  must(
    "the image processor's images",
    same(crop ?? size, imageSize),
    `of ${shown(imageSize)}, which the model needs`,
    crop ?? size,
  );
  const { resample } = config;
  const isFilter = resample === NEAREST || (typeof resample === "number" && resample in FILTERS);
  must("the image processor's resample", isFilter, "a number from 0 to 5", resample);
  const rescale = config.do_rescale ? config.rescale_factor : 1;
  must("the image processor's rescale_factor", isNumber(rescale), "a number", rescale);
  const mean = config.do_normalize ? config.image_mean : [0, 0, 0];
  const std = config.do_normalize ? config.image_std : [1, 1, 1];
  must("the image processor's image_mean", areNumbers(mean, CHANNELS), `${CHANNELS} numbers`, mean);
  const areDeviations = areNumbers(std, CHANNELS) && std.every((value) => value > 0);
  must("the image processor's image_std", areDeviations, `${CHANNELS} numbers above 0`, std);
  return { resize: size, resample, crop, rescale, mean, std };
}

/** Throws unless `isSo`. */
function must(name, isSo, allowed, given) {
  if (!isSo) throw new Error(`${name} must be ${allowed}, got ${shown(given)}.`);
}

function shown(value) {
  return `${JSON.stringify(value)}`.slice(0, 100);
}

function same(given, expected) {
  return (
    Array.isArray(given) && given.length === expected.length && expected.every((one, place) => one === given[place])
  );
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whether it is one that float32 holds. */
function isNumber(value) {
  return typeof value === "number" && -LARGEST <= value && value <= LARGEST;
}

function areNumbers(values, count) {
  return Array.isArray(values) && values.length === count && values.every(isNumber);
}

/** Whether it is a whole number from 1 on. */
function isCount(value, largest) {
  return Number.isInteger(value) && value >= 1 && value <= largest;
}

function oneLine(error) {
  return `${error?.message ?? error}`.split(/\s+/).join(" ");
}
