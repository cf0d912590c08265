// Copyright 2026 The MEViT authors.
// SPDX-License-Identifier: Apache-2.0
/**
 * Keeps the page's files, so that it opens without a connection and loads weights once.
 *
 * Weights and the runtime are of one version of the page, which the address of this file names: they are taken from
 * the cache where they are there. All else is asked for anew, and taken from the cache where nothing answers. The page
 * asks for weights by their version, so that a service worker that is not replaced yet has none for a newer page.
 */

const PREFIX = `mevit ${new URL(self.registration.scope).pathname} `;
const CACHE = PREFIX + new URL(self.location).searchParams.get("version");
const FRESH = { cache: "no-cache" }; // asks whether what the browser kept by itself still holds
const KEPT = /\.(onnx|wasm|mjs|jpg)$/;

self.addEventListener("install", (event) => {
  event.waitUntil(
    (async () => {
      const { files } = await (await fetch("page.json", FRESH)).json();
      const cache = await caches.open(CACHE);
      // what a visitor needs of the large ones is kept as it is fetched
      const small = Object.keys(files).filter((name) => !/\.(onnx|wasm|mjs)$/.test(name));
      await cache.addAll(["./", "page.json", ...small].map((name) => new Request(name, FRESH)));
      await self.skipWaiting();
    })(),
  );
});

self.addEventListener("activate", (event) => {
  event.waitUntil(
    (async () => {
      const names = await caches.keys();
      await Promise.all(
        names.filter((name) => name.startsWith(PREFIX) && name !== CACHE).map((name) => caches.delete(name)),
      );
      await self.clients.claim();
    })(),
  );
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== self.location.origin) return;
  event.respondWith(answer(request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request, { ignoreSearch: !new URL(request.url).pathname.endsWith(".onnx") });
  if (kept && KEPT.test(new URL(request.url).pathname)) return kept;
  try {
    const response = await fetch(request, request.mode === "navigate" ? {} : FRESH);
    if (response.ok && response.status === 200) await keep(cache, request, response.clone());
    return response;
  } catch (error) {
    if (kept) return kept;
    throw error;
  }
}

async function keep(cache, request, response) {
  try {
    await cache.put(request, response);
  } catch {
    // no room: the page works all the same, with a connection
  }
}
