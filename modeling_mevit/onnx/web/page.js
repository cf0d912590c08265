// Copyright 2026 The MEViT authors.
// SPDX-License-Identifier: Apache-2.0
/** The page: what the visitor gives and sees. The model runs in worker.js. */

import { exitTaken, promiseAt, thresholdPath } from "./path.js";

const MAX_PIXELS = 178_956_970; // above, Pillow takes an image for an attack
const SETTLED = 250; // ms without a move of the slider, after which times are taken anew
const MAX_RESULTS = 100;
const CAMERA = {
  NotAllowedError: "this browser does not allow it",
  NotReadableError: "another program may be using it",
  NotFoundError: "no camera was found",
};
const HEIC = ["heic", "heix", "hevc", "hevx", "heim", "heis", "mif1", "msf1"]; // brands
const CURRENT = "a current Chrome, Edge, Firefox or Safari";
// a function of one instruction of 128 bits (as of wasm-feature-detect)
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

const element = (id) => document.getElementById(id);
const slider = element("stop");

/** What page.json says of the files. */
let page = null;
/** What the worker says of the cascade that is loaded; null where none is. */
let model = null;
/** Why none can be, and whether to try again may help: {text, canTryAgain}. */
let broken = null;
let path = null;
/** Images on the page, the latest first: {key, file, url, node, answer, failed}. */
const results = [];
let count = 0; // of all images so far

// The worker

class Runner {
  #worker = null;
  #waiting = new Map();
  #count = 0;
  onprogress = () => {};

  ask(kind, given) {
    this.#worker ??= this.#start();
    const id = (this.#count += 1);
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, kind, ...given });
    });
  }

  #start() {
    const worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data }) => {
      if (data.progress) return this.onprogress(data.progress);
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.error === undefined) resolve(data.result);
      else reject(new Error(data.error));
    };
    worker.onerror = (event) => {
      event.preventDefault();
      this.#worker = null; // the next question starts another one
      const waiting = [...this.#waiting.values()];
      this.#waiting.clear();
      worker.terminate();
      for (const { reject } of waiting) reject(new Error(event.message || "a file of this page cannot be loaded."));
    };
    return worker;
  }
}

const runner = new Runner();

// Loading

/** Why this browser cannot run the model, or null. */
function whatIsMissing() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(Uint8Array.from(SIMD)))
    return `This browser has no WebAssembly SIMD, which running the model needs; ${CURRENT} has it.`;
  if (!hasModuleWorkers() || typeof OffscreenCanvas !== "function" || typeof createImageBitmap !== "function")
    return `This browser cannot read images in the background, which this page needs; ${CURRENT} can.`;
  return null;
}

function hasModuleWorkers() {
  let asked = false;
  const options = {
    get type() {
      asked = true; // by those alone that know modules
      return "module";
    },
  };
  const nothing = URL.createObjectURL(new Blob([]));
  try {
    new Worker(nothing, options).terminate();
  } catch {
    // no workers at all, or none of this kind
  }
  URL.revokeObjectURL(nothing);
  return asked;
}

/** Keeps the page for later, where the browser allows it. Waits until what is loaded from now on is kept. */
async function keepForLater() {
  try {
    const address = new URL(`service_worker.js?version=${page.version}`, document.baseURI).href;
    await navigator.serviceWorker.register(address);
    const controls = () => navigator.serviceWorker.controller?.scriptURL === address;
    const deadline = performance.now() + 5000;
    while (!controls() && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 50));
    return controls();
  } catch {
    return false; // no service workers here: all works, with a connection
  }
}

async function loadPage() {
  const response = await fetch("page.json", { cache: "no-cache" }).catch(() => null);
  if (!response?.ok) throw new Error("page.json is missing here; the export is not finished.");
  page = await response.json();
  element("name").textContent = page.name;
  document.title = `${page.name}: early exit in the browser`;
  if (page.card) {
    element("card").href = page.card;
    element("card").hidden = false;
  }
  showExamples();
  showPrecisions();
}

/** Loads the files of one precision, and classifies what is on the page with them. */
async function loadModel() {
  const missing = whatIsMissing();
  element("loading").hidden = missing !== null;
  broken = missing === null ? null : { text: missing, canTryAgain: false };
  showTrouble(null);
  if (missing) return;
  model = null;
  slider.disabled = true;
  element("progress").removeAttribute("value");
  element("progress-text").textContent = "Loading the model …";
  element("status").textContent = "";
  try {
    if (!page) await loadPage();
    const kept = await keepForLater();
    const chosen = document.querySelector("#precision input:checked")?.value ?? page.cascades[0].directory;
    model = await runner.ask("load", { directory: chosen, sizes: page.files, version: page.version });
    showModel(kept);
  } catch (error) {
    broken = { text: `The model cannot be loaded: ${error.message}`, canTryAgain: true };
    showTrouble(null);
  } finally {
    element("loading").hidden = true;
  }
  await classifyWaiting();
}

runner.onprogress = ({ loaded, total }) => {
  element("progress").value = loaded / total;
  const opening = loaded >= total ? " Opening it …" : "";
  element("progress-text").textContent =
    `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB.${opening}`;
};

function showModel(kept) {
  const { config, exitLayers, labels } = model;
  broken = null;
  showTrouble(null);
  path = thresholdPath(config, exitLayers.length, labels.length);
  slider.max = path.stops.length - 1;
  slider.value = path.start;
  slider.disabled = false;
  element("tick").hidden = path.calibrated === null;
  element("tick").textContent = config.calibration ? "calibrated" : "as set";
  element("back").textContent = `Back to the ${config.calibration ? "calibrated thresholds" : "thresholds as set"}`;
  element("tick").style.left = `${(100 * (path.calibrated ?? 0)) / (path.stops.length - 1)}%`;
  const threads = model.threads > 1 ? `${model.threads} threads` : "one thread";
  const where = model.provider === "webgpu" ? "WebGPU" : `WebAssembly, ${threads}`;
  element("status").textContent = `Ready: ${where}${kept ? "; kept for use without a connection" : ""}.`;
  showStop();
}

/** Shows what has just gone wrong, if anything, beside what keeps the model from running. */
function showTrouble(text) {
  const told = [broken?.text, text].filter(Boolean);
  element("trouble").hidden = told.length === 0;
  element("trouble-text").textContent = told.join(" ");
  element("again").hidden = !broken?.canTryAgain;
}

function showPrecisions() {
  const fieldset = element("precision");
  fieldset.hidden = page.cascades.length < 2;
  fieldset.querySelectorAll("label").forEach((label) => label.remove());
  page.cascades.forEach(({ precision, directory, bytes }, place) => {
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "precision", value: directory, checked: place === 0 });
    input.addEventListener("change", () => {
      for (const result of results) if (!result.failed) wait(result);
      loadModel();
    });
    const label = document.createElement("label");
    label.append(input, `${precision}, ${megabytes(bytes)} MB`);
    fieldset.append(label);
  });
}

function showExamples() {
  element("examples").hidden = page.examples.length === 0;
  const buttons = page.examples.map(({ file, name }) => {
    const button = document.createElement("button");
    button.type = "button";
    const image = document.createElement("img");
    Object.assign(image, { src: file, alt: name, title: name });
    button.append(image);
    button.addEventListener("click", async () => {
      const response = await fetch(file).catch(() => null);
      const blob = response?.ok ? await response.blob() : new Blob([]);
      await add([new File([blob], `Example: ${name}`, { type: blob.type })]);
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  element("examples")
    .querySelector("ul")
    .replaceChildren(...buttons);
}

// Images

/** Puts images on the page, and classifies them once a model is there. */
async function add(files) {
  const dropped = results.length + files.length - MAX_RESULTS;
  showTrouble(dropped > 0 ? `At most ${MAX_RESULTS} images are shown; the first ${dropped} were removed.` : null);
  for (const file of files) {
    const node = element("result").content.firstElementChild.cloneNode(true);
    const result = { key: (count += 1), file, node, url: URL.createObjectURL(file) };
    node.querySelector(".file").textContent = file.name;
    node.querySelector(".thumbnail").src = result.url;
    node.querySelector(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    node.querySelector(".remove").addEventListener("click", () => remove(result));
    results.unshift(result);
    element("list").prepend(node);
    wait(result);
  }
  while (results.length > MAX_RESULTS) remove(results.at(-1));
  showSummary();
  await classifyWaiting();
}

function wait(result) {
  result.answer = null;
  result.node.classList.add("waiting");
  result.node.querySelector(".label").textContent = "…";
  result.node.querySelector(".note").textContent = "";
}

function remove(result) {
  results.splice(results.indexOf(result), 1);
  result.node.remove();
  URL.revokeObjectURL(result.url);
  runner.ask("forget", { key: result.key }).catch(() => {});
  showSummary();
}

async function classifyWaiting() {
  const [current, stop] = [model, currentStop()];
  if (!current) return;
  const waiting = results.filter((result) => !result.answer && !result.failed && !result.asked).reverse();
  await Promise.all(
    waiting.map(async (result) => {
      result.asked = true;
      try {
        await checkImage(result);
        const answer = await runner.ask("classify", {
          key: result.key,
          file: result.file,
          thresholds: stop.thresholds,
        });
        if (model === current) show(result, { ...answer, timedAt: stop });
      } catch (error) {
        if (model === current) fail(result, error.message);
      } finally {
        result.asked = false;
      }
    }),
  );
  showSummary();
  if (model && model !== current)
    await classifyWaiting(); // other files were chosen meanwhile
  else if (currentStop() !== stop) settle();
}

/** Throws where a file is no image that can be run, in words for the visitor. */
async function checkImage({ file, url }) {
  if (file.size === 0) throw new Error("it is empty.");
  if (file.type === "image/svg+xml") throw new Error("it is a drawing (SVG) and has no pixels; save it as PNG.");
  const image = new Image(); // reads the size, and does not decode yet
  image.src = url;
  const loaded = await new Promise((resolve) => {
    image.onload = () => resolve(true);
    image.onerror = () => resolve(false);
  });
  if (!loaded) {
    const head = new TextDecoder("latin1").decode(await file.slice(4, 12).arrayBuffer());
    if (head.startsWith("ftyp") && HEIC.includes(head.slice(4)))
      throw new Error("it is a HEIC image, which this browser cannot read; save it as JPEG or PNG.");
    throw new Error("it is not an image that this browser can read.");
  }
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  if (width * height > MAX_PIXELS)
    throw new Error(
      `it has ${width} × ${height} pixels, more than ${Math.floor(MAX_PIXELS / 1e6)} million; make it smaller.`,
    );
}

function fail(result, reason) {
  result.failed = true;
  result.node.classList.remove("waiting");
  result.node.classList.add("failed");
  result.node.querySelector(".note").textContent = `${result.file.name} cannot be classified: ${reason}`;
}

// Results

function show(result, answer) {
  result.answer = answer;
  result.node.classList.remove("waiting");
  draw(result);
}

/** Shows where an image leaves under the thresholds of the slider. */
function draw({ node, answer }) {
  const { exits, transparent } = answer;
  const place = exitTaken(
    exits.map(({ score }) => score),
    currentStop(),
  );
  const { label, probability } = exits[place];
  const last = exits.at(-1);
  const [layer, depth] = [model.exitLayers[place], model.exitLayers.at(-1)];
  answer.place = place;
  node.querySelector(".label").textContent = model.labels[label];
  node.querySelector(".probability .number").textContent = `${(100 * probability).toFixed(1)}%`;
  node.querySelector(".probability .bar span").style.width = `${100 * probability}%`;
  const notes = [];
  if (label !== last.label) notes.push(`The last exit says ${model.labels[last.label]}.`);
  if (transparent) notes.push("Transparent parts count as black here.");
  node.querySelector(".note").textContent = notes.join(" ");
  node.querySelector(".drawing").replaceChildren(drawing(answer, place));
  const told = exits.map((_, number) => Object.assign(document.createElement("li"), { textContent: said(exits, number) }));
  node.querySelector(".exits ol").replaceChildren(...told);
  const leaves = place < exits.length - 1;
  node.querySelector(".early").hidden = !leaves; // else both runs are the same
  node.querySelector(".early dt").textContent = `to exit ${layer}`;
  node.setAttribute("aria-label", `${model.labels[label]}, left at exit ${layer} of ${depth} layers`);
  const isCurrent = answer.exitLayer === layer; // where it left when times were taken
  const longest = leaves && isCurrent ? Math.max(answer.early, answer.full) : answer.full;
  const faster = ` · ${(answer.full / answer.early).toFixed(1)}×`;
  for (const [name, time, known] of [
    ["early", answer.early, isCurrent],
    ["full", answer.full, true],
  ]) {
    node.querySelector(`.${name} .number`).textContent = known
      ? `${milliseconds(time)}${name === "early" ? faster : ""}`
      : "…";
    node.querySelector(`.${name} .bar span`).style.width = known ? `${(100 * time) / longest}%` : "0";
  }
}

/** What an exit says, in words. */
function said(exits, place) {
  const { label, probability, score } = exits[place];
  const threshold = currentStop().thresholds?.[place];
  const limit = threshold === undefined ? "" : `, threshold ${threshold.toPrecision(3)}`;
  const told =
    label === null
      ? "gives no finite numbers"
      : `${model.labels[label]}, ${(100 * probability).toFixed(1)}%; score ${score.toPrecision(3)}${limit}`;
  return `Exit ${model.exitLayers[place]}: ${told}`;
}

/** The layers, those that ran in colour, with the exits under them. */
function drawing({ exits }, taken) {
  const depth = model.exitLayers.at(-1);
  const step = 480 / depth;
  const block = Math.min(step - 6, 64);
  const svg = shape("svg", { viewBox: "0 0 480 62", role: "img" });
  const layer = model.exitLayers[taken];
  svg.append(titled(`Left at exit ${layer}: ${layer} of ${depth} layers ran.`));
  for (let number = 1; number <= depth; number++) {
    const x = (number - 0.5) * step - block / 2;
    svg.append(
      shape("rect", { x, y: 2, width: block, height: 22, rx: 4, class: number <= layer ? "layer run" : "layer" }),
    );
  }
  exits.forEach((_, place) => {
    const x = (model.exitLayers[place] - 0.5) * step;
    const kind = place === taken ? "taken" : place < taken ? "passed" : "";
    const group = shape("g", {});
    group.append(
      titled(said(exits, place)),
      shape("line", { x1: x, x2: x, y1: 24, y2: 33, class: `stem ${kind}` }),
      shape("circle", { cx: x, cy: 38, r: 5, class: `exit ${kind}` }),
    );
    const text = shape("text", { x, y: 58, class: kind });
    text.textContent = model.exitLayers[place];
    group.append(text);
    svg.append(group);
  });
  return svg;
}

function shape(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function titled(text) {
  const title = shape("title", {});
  title.textContent = text;
  return title;
}

function milliseconds(time) {
  return `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`;
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(1);
}

function showSummary() {
  element("results").hidden = results.length === 0;
  const answered = results.filter(({ answer }) => answer);
  if (!answered.length) {
    element("summary").textContent = "";
    return;
  }
  const cost = answered.reduce((sum, { answer }) => sum + model.costs[answer.place], 0) / answered.length;
  const changed = answered.filter(
    ({ answer }) => answer.exits[answer.place].label !== answer.exits.at(-1).label,
  ).length;
  const images = answered.length === 1 ? "1 image" : `${answered.length} images`;
  const labels =
    changed === 0 ? "the labels are those of the last exit" : `${changed} with another label than the last exit`;
  element("summary").textContent = `${images}: mean cost ${cost.toFixed(2)} of the plain ViT; ${labels}.`;
}

// The slider

function currentStop() {
  return path?.stops[Number(slider.value)] ?? { thresholds: null, calibrated: false };
}

function showStop() {
  const stop = currentStop();
  const { config, precision } = model;
  const { kind, text } = promiseAt(config, stop, precision);
  const isCertified = promiseAt(config, path.stops[path.calibrated] ?? stop, precision).kind === "certified";
  element("promise").textContent = text;
  element("promise").className = kind === "certified" ? "certified" : isCertified && stop.thresholds ? "gone" : "";
  element("back").hidden = stop.calibrated || path.calibrated === null;
  const ends = stop.thresholds === null ? "every image to the end" : stop.calibrated ? "calibrated" : "moved";
  slider.setAttribute("aria-valuetext", ends);
  const point = stop.calibrated && kind !== "none" ? model.config.calibration.operating_point : null;
  element("expected").hidden = point === null;
  if (point) showExpected(point);
  for (const result of results) if (result.answer) draw(result);
  showSummary();
}

/** What calibration measured at its thresholds. */
function showExpected({ accuracy, full_model_accuracy: full, cost, disagreement, num_samples: count }) {
  element("expected").setAttribute("aria-label", `On ${count} calibration images`);
  const rows = [["mean cost", cost?.toFixed(2)]];
  if (accuracy !== undefined && accuracy !== null)
    rows.unshift(["accuracy", `${(100 * accuracy).toFixed(1)}%`], ["last exit", `${(100 * full).toFixed(1)}%`]);
  else if (disagreement !== undefined) rows.unshift(["other labels", `${(100 * disagreement).toFixed(1)}%`]);
  const names = rows.map(([name]) => Object.assign(document.createElement("dt"), { textContent: name }));
  const values = rows.map(([, value]) => Object.assign(document.createElement("dd"), { textContent: value }));
  element("expected").style.gridTemplateColumns = `repeat(${rows.length}, auto)`;
  element("expected").replaceChildren(...names, ...values);
}

let settling;

/** Takes times anew once the slider rests. */
function settle() {
  clearTimeout(settling);
  settling = setTimeout(async () => {
    const [current, stop] = [model, currentStop()];
    for (const result of results.filter(({ answer }) => answer)) {
      if (model !== current || currentStop() !== stop) return;
      const answer = result.answer;
      try {
        const times = await runner.ask("time", { key: result.key, thresholds: stop.thresholds });
        if (result.answer !== answer || model !== current) continue;
        Object.assign(answer, times);
        draw(result);
      } catch {
        // it was removed meanwhile
      }
    }
  }, SETTLED);
}

slider.addEventListener("input", () => {
  showStop();
  settle();
});
element("back").addEventListener("click", () => {
  slider.value = path.calibrated;
  showStop();
  settle();
  slider.focus();
});

// Giving images

element("files").addEventListener("change", async ({ target }) => {
  const files = [...target.files];
  target.value = ""; // so that the same file can be chosen again
  await add(files);
});
element("clear").addEventListener("click", () => [...results].forEach(remove));
element("again").addEventListener("click", loadModel);

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  await add([...event.dataTransfer.files]);
});

const viewfinder = element("viewfinder");
const video = viewfinder.querySelector("video");

element("camera").addEventListener("click", async () => {
  if (!navigator.mediaDevices)
    return showTrouble("The camera cannot be used: this browser gives it to pages with an https address alone.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return showTrouble(`The camera cannot be used: ${CAMERA[error.name] ?? error.message}.`);
  }
  showTrouble(null);
  video.srcObject = stream;
  viewfinder.showModal();
});
video.addEventListener("loadeddata", () => (element("take").disabled = false));
element("take").addEventListener("click", async () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  viewfinder.close();
  await add([new File([blob], "camera.png", { type: blob.type })]);
});
element("close").addEventListener("click", () => viewfinder.close());
viewfinder.addEventListener("close", () => {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
  element("take").disabled = true;
});

loadModel();
