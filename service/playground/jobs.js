// Makes images as a job that is followed step by step. Knows nothing of the document.

import { answerOf, call, errorOf } from "./api.js";
import { blobFromBase64 } from "./base64.js";
import { events } from "./events.js";

const JSON_TYPES = { "Content-Type": "application/json", Accept: "application/json" };

/** The events of a job ended before it did. */
class Silence extends Error {}

/**
 * Asks for images at /generate, /edit or /inpaint and gives them. `onProgress` hears of the job whenever it moves.
 * Where the events fail, the same request is sent again to be waited for; its key makes it the same job.
 * Aborting `signal` cancels the job.
 */
export async function create(task, body, signal, onProgress) {
  const start = performance.now();
  const request = {
    method: "POST",
    headers: { ...JSON_TYPES, "Idempotency-Key": randomKey() },
    body: JSON.stringify({ ...body, output_format: "png" }),
  };
  const accepted = call(task, { ...request, headers: { ...request.headers, Prefer: "respond-async" } }).then(answerOf);
  let answer;
  try {
    const job = await unlessAborted(accepted, signal);
    answer = await follow(job.id, signal, onProgress).catch(async (error) => {
      if (!(error instanceof Silence)) throw error;
      return { result: await answerOf(await call(task, { ...request, signal })) };
    });
  } catch (error) {
    accepted.then((job) => cancel(job.id)).catch(() => {}); // what is not there needs no cancelling
    throw error;
  }
  if (!answer.result) throw errorOf(answer.error);
  return imagesOf(answer.result, performance.now() - start);
}

/** The job once it is over. Throws Silence where its events do not tell of its end. */
async function follow(id, signal, onProgress) {
  try {
    const response = await call(`jobs/${id}/events?preview=true`, { headers: { Accept: "text/event-stream" }, signal });
    for await (const { name, data } of response.ok ? events(response.body) : []) {
      if (name === "error") break;
      const job = JSON.parse(data);
      if (job.result || job.error) return job;
      onProgress(job);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  throw new Silence();
}

// It outlives the page: closing the tab gives the job up too.
function cancel(id) {
  return call(`jobs/${id}`, { method: "DELETE", keepalive: true });
}

function unlessAborted(promise, signal) {
  const aborted = new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([promise, aborted]);
}

// Not randomUUID, which is missing where the page does not come by https.
function randomKey() {
  return [...crypto.getRandomValues(new Uint32Array(4))].map((word) => word.toString(16)).join("-");
}

function imagesOf({ id, images, timings, batch }, roundTripMs) {
  return images.map(({ b64_json, seed, width, height }) => ({
    blob: blobFromBase64(b64_json),
    batch: id,
    seed,
    width,
    height,
    timings,
    ticks: batch.ticks,
    roundTripMs,
  }));
}
