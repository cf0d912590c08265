// Copyright 2026 The MEViT authors.
// SPDX-License-Identifier: Apache-2.0
/**
 * Runs the cascade beside the page, so that the page stays responsive. Each message {id, kind, …} is answered by
 * {id, result} or {id, error}; messages {progress} tell how much has been loaded.
 */

import { Cascade, loadFastest, rowOf, softmax } from "./cascade_mevit.js";

const REPEAT_WITHIN = 500; // ms: short runs are timed several times, long ones once
const MOST_RUNS = 9;
const MAX_THREADS = 4;

/** What is loaded: the runtime once, and one cascade. */
let runtime = null;
let cascade = null;
/** Pixel values of the images on the page, to run them again. @type {Map<string, any>} */
const images = new Map();

const kinds = { load, classify, time, forget };

let last = Promise.resolve(); // messages are worked on in turn, or times would be of two runs at once
self.onmessage = ({ data: { id, kind, ...given } }) => {
  last = last.then(async () => {
    try {
      self.postMessage({ id, result: await kinds[kind](given) });
    } catch (error) {
      self.postMessage({ id, error: error.message });
    }
  });
};

/** Loads one of the export's cascades. `sizes` tells the bytes of each file, and `version` which files these are. */
async function load({ directory, sizes, version }) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const build = adapter
    ? { module: "ort.webgpu.min.mjs", wasm: "ort-wasm-simd-threaded.asyncify.wasm" }
    : { module: "ort.wasm.min.mjs", wasm: "ort-wasm-simd-threaded.wasm" };
  const here = directory === "." ? "" : `${directory}/`;
  const graphs = Object.keys(sizes).filter(
    (name) => /^(stage|query)_\d+\.onnx$/.test(name.slice(here.length)) && name.startsWith(here),
  );
  const awaited = new Set([...graphs, ...(runtime ? [] : [`ort/${build.wasm}`])]);
  let loaded = 0;
  const total = [...awaited].reduce((sum, name) => sum + sizes[name], 0);
  const count = (name) => (bytes) => {
    if (awaited.has(name)) self.postMessage({ progress: { loaded: (loaded += bytes), total } });
  };
  runtime ??= await loadRuntime(build, count(`ort/${build.wasm}`));
  const files = new Map(); // read once, where two providers load them
  const read = (name) => {
    if (!files.has(name)) files.set(name, download(here + name, count(here + name), version));
    return files.get(name);
  };
  const before = cascade;
  cascade = null;
  await before?.release();
  images.clear();
  const { cascade: opened, provider } = adapter
    ? await loadFastest(runtime, read)
    : { cascade: await Cascade.load(runtime, read), provider: "wasm" };
  await warmUp(opened);
  cascade = opened;
  const { config, labels, exitLayers, costs, precision } = cascade;
  return { config, labels, exitLayers, costs, precision, provider, threads: runtime.env.wasm.numThreads, bytes: total };
}

async function loadRuntime({ module, wasm }, progress) {
  const ort = await import(`./ort/${module}`).catch(() => {
    throw new Error(`ort/${module} is missing here, or there is no connection.`);
  });
  // without the headers that isolate a page from others, browsers give no memory that threads can share
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  ort.env.wasm.wasmBinary = (await download(`ort/${wasm}`, progress)).buffer;
  return ort;
}

/** The first run of a graph is slower than later ones. */
async function warmUp(opened) {
  const [height, width] = opened.imageSize;
  const zeros = { data: new Float32Array(3 * height * width), dims: [1, 3, height, width] };
  await opened.run(zeros, { earlyExit: false });
}

async function download(name, progress, version) {
  let response;
  try {
    // what is kept of another version has another address
    const query = version && name.endsWith(".onnx") ? `?version=${encodeURIComponent(version)}` : "";
    response = await fetch(name.split("/").map(encodeURIComponent).join("/") + query);
  } catch {
    throw new Error(`${name} cannot be loaded: there is no connection, and this browser has not kept it.`);
  }
  if (!response.ok) throw new Error(`${name} is missing here: the server answers ${response.status}.`);
  const parts = [];
  let length = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    progress(value.length);
  }
  const bytes = new Uint8Array(length);
  let start = 0;
  for (const part of parts) {
    bytes.set(part, start);
    start += part.length;
  }
  return bytes;
}

/** Label, probability and score of every exit of an image, and its times under some thresholds and to the end. */
async function classify({ key, file, thresholds }) {
  if (!cascade) throw new Error("no model is loaded.");
  const decoded = await decode(file);
  images.set(key, cascade.preprocess([decoded.pixels]));
  const exits = [];
  for await (const { answers, scores } of cascade.exits(images.get(key), cascade.thresholds(false))) {
    const logits = rowOf(answers.logits, 0);
    const isFinite = logits.every(Number.isFinite);
    const probabilities = isFinite ? softmax(logits) : [];
    const best = probabilities.indexOf(Math.max(...probabilities));
    exits.push({
      label: isFinite ? best : null,
      probability: probabilities[best] ?? null,
      score: isFinite ? scores[0] : null,
    });
  }
  if (exits.at(-1).label === null) throw new Error("the model's last exit gives no finite numbers for it.");
  return { exits, transparent: decoded.transparent(), ...(await time({ key, thresholds })) };
}

/** Milliseconds of an image that leaves early under some thresholds, and of a run to the end, in turn. */
async function time({ key, thresholds }) {
  const pixelValues = images.get(key);
  if (!pixelValues) throw new Error("this image is no longer there.");
  const early = [];
  const full = [];
  const start = performance.now();
  let exitLayer;
  do {
    early.push(
      await timed(async () => {
        const options = thresholds ? { earlyExit: true, exitThresholds: thresholds } : { earlyExit: false };
        [exitLayer] = (await cascade.run(pixelValues, options)).exitLayer;
      }),
    );
    full.push(await timed(() => cascade.run(pixelValues, { earlyExit: false })));
  } while (early.length < MOST_RUNS && performance.now() - start < REPEAT_WITHIN);
  // what else the device does makes runs longer, never shorter
  return { early: Math.min(...early), full: Math.min(...full), exitLayer };
}

async function forget({ key }) {
  images.delete(key);
}

async function timed(run) {
  const start = performance.now();
  await run();
  return performance.now() - start;
}

/** The pixels of an image file, upright, with the colours that the file holds. */
async function decode(file) {
  checkCanvas();
  const bitmap = await createImageBitmap(file, {
    colorSpaceConversion: "none", // as Pillow, which training reads images with
    imageOrientation: "from-image",
  }).catch(() => {
    throw new Error("it cannot be decoded: it may be damaged, or too large for this browser.");
  });
  const { width, height } = bitmap;
  let transparent = false;
  const rows = (top, bottom) => {
    const { data } = readRows(bitmap, top, bottom);
    for (let place = 3; place < data.length && !transparent; place += 4) transparent = data[place] < 255;
    return data;
  };
  return { pixels: { width, height, rows }, transparent: () => transparent }; // known once the rows were read
}

/** Strips, since phones limit the size of a canvas. */
function readRows(bitmap, top, bottom) {
  const [width, height] = [bitmap.width, bottom - top];
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmap, 0, top, width, height, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Some browsers, asked to resist fingerprinting, give noise in place of pixels. */
function checkCanvas() {
  const context = new OffscreenCanvas(16, 16).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "rgb(200, 100, 50)";
  context.fillRect(0, 0, 16, 16);
  const { data } = context.getImageData(0, 0, 16, 16);
  if (data.some((value, place) => value !== [200, 100, 50, 255][place % 4]))
    throw new Error("this browser hides the pixels of images from pages; allow this page to read canvas data.");
}
