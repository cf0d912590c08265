// Copyright 2026 The MEViT authors.
// SPDX-License-Identifier: Apache-2.0
// Runs one function of the JavaScript runtime on what stdin says, and writes what it gives to stdout.

import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { pathToFileURL } from "node:url";

const { Cascade, fromImageData, loadFastest, resize } = await import(
  new URL("../../../../modeling_mevit/onnx/web/cascade_mevit.js", import.meta.url)
);

const { exitTaken, grid, promiseAt, thresholdPath } = await import(
  new URL("../../../../modeling_mevit/onnx/web/path.js", import.meta.url)
);

const TYPES = { uint8: Uint8Array, float32: Float32Array };

function decoded(value) {
  if (Array.isArray(value)) return value.map(decoded);
  if (typeof value !== "object" || value === null) return value;
  if ("array" in value) {
    const bytes = Buffer.from(value.array, "base64");
    return { data: new TYPES[value.type](Uint8Array.from(bytes).buffer), dims: value.dims };
  }
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, decoded(one)]));
}

function encoded({ data, dims }) {
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  return { array: bytes.toString("base64"), type: data instanceof Float32Array ? "float32" : "uint8", dims };
}

async function load(ortDirectory, directory, options) {
  const ort = await import(pathToFileURL(`${ortDirectory}/ort.wasm.min.mjs`));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await readFile(`${ortDirectory}/ort-wasm-simd-threaded.wasm`);
  const fed = [];
  const read = async (name) => {
    try {
      return new Uint8Array(await readFile(`${directory}/${name}`));
    } catch {
      throw new Error(`${name} is missing.`);
    }
  };
  const cascade = await Cascade.load(ort, read, options);
  for (const [place, stage] of cascade.stages.entries()) {
    for (const kind of ["stage", "query"]) {
      const session = stage[kind];
      const run = session.run.bind(session);
      session.run = (feeds) => {
        fed.push([place, kind, Object.values(feeds)[0].dims[0]]); // how many images a graph ran on
        return run(feeds);
      };
    }
  }
  return { cascade, fed };
}

/** An array (height, width, 4) of bytes. */
const image = ({ data, dims: [height, width] }) => fromImageData({ data, width, height });

const functions = {
  resize: ({ images, sizes, resample }) =>
    images.map((one, index) => {
      const [height, width] = sizes[index];
      return encoded({ data: resize(image(one), height, width, resample).data, dims: [height, width, 3] });
    }),

  async preprocess({ directory, images }, ort) {
    const { cascade } = await load(ort, directory);
    return encoded(cascade.preprocess(images.map(image)));
  },

  async run({ directory, pixelValues, options = [{}] }, ort) {
    const { cascade, fed } = await load(ort, directory);
    const outputs = [];
    for (const one of options) {
      fed.length = 0;
      const { logits, exitLayer, exitScore, borderline } = await cascade.run(pixelValues, one);
      outputs.push({ logits: encoded(logits), exitLayer, exitScore, borderline, fed: [...fed] });
    }
    const { logits, scores } = await cascade.everyExit(pixelValues);
    return { outputs, logits: encoded(logits), scores: encoded(scores), labels: cascade.labels };
  },

  grid: ({ policy, exits, labels }) => grid(policy, exits, labels),

  path: ({ config, exits, labels }) => {
    const { stops, start, calibrated } = thresholdPath(config, exits, labels);
    return { stops, start, calibrated, promises: stops.map((stop) => promiseAt(config, stop, "float32")) };
  },

  taken: ({ scores, stops }) => stops.map((thresholds) => scores.map((one) => exitTaken(one, { thresholds }))),

  /** Which provider is taken, where another one answers otherwise, or not at all, or slowly. */
  async fastest({ directory, shift, shifted = "logits", delays, fails }, ort) {
    const module = await import(pathToFileURL(`${ort}/ort.wasm.min.mjs`));
    const create = module.InferenceSession.create.bind(module.InferenceSession);
    const released = [];
    const pretending = {
      Tensor: module.Tensor,
      InferenceSession: {
        async create(bytes, { executionProviders: [provider] }) {
          if (provider === "webgpu" && fails) throw new Error("no device");
          const session = await create(bytes, { executionProviders: ["wasm"] });
          const wrapper = {
            inputNames: session.inputNames,
            outputNames: session.outputNames,
            inputMetadata: session.inputMetadata,
            outputMetadata: session.outputMetadata,
            async run(feeds) {
              const outputs = await session.run(feeds);
              await new Promise((resolve) => setTimeout(resolve, delays[provider]));
              if (provider === "webgpu" && outputs[shifted]) outputs[shifted].data[0] += shift;
              return outputs;
            },
            release: async () => released.push(provider),
          };
          return wrapper;
        },
      },
    };
    module.env.wasm.numThreads = 1;
    module.env.wasm.wasmBinary = await readFile(`${ort}/ort-wasm-simd-threaded.wasm`);
    const read = async (name) => new Uint8Array(await readFile(`${directory}/${name}`));
    const { provider } = await loadFastest(pretending, read);
    return { provider, released: [...new Set(released)] };
  },

  /** The message of each error, or null where there is none. */
  async messages({ directories, calls }, ort) {
    const messages = [];
    for (const [index, directory] of directories.entries()) {
      try {
        const { cascade } = await load(ort, directory);
        if (calls) await cascade.run(calls[index].pixelValues, calls[index].options);
        messages.push(null);
      } catch (error) {
        messages.push(error.message);
      }
    }
    return messages;
  },
};

const { function: name, arguments: given, ort } = JSON.parse(await text(process.stdin));
process.stdout.write(JSON.stringify(await functions[name](decoded(given), ort)));
