// Makes images as a job that is followed step by step. Knows nothing of the document.

import { ApiError, answerOf, call, errorOf } from "./api.js";
import { blobFromBase64 } from "./base64.js";
import { events } from "./events.js";
import { pause, unlessAborted } from "./waits.js";

const JSON_TYPES = { "Content-Type": "application/json", Accept: "application/json" };
const ASK_EVERY_S = 1;
const MAX_MISSES = 30;
const LOST = "The service lost this image: it was restarted, or kept it no longer. Ask for it again.";

/**
 * Asks for images at /generate, /edit or /inpaint and gives them. `onProgress` hears of the job whenever it moves.
 * Where its events fail, the job is asked after until it is over. Aborting `signal` cancels the job.
 */
export async function create(task, body, signal, onProgress) {
  const start = performance.now();
  const accepted = call(task, {
    method: "POST",
    headers: { ...JSON_TYPES, Prefer: "respond-async" },
    body: JSON.stringify({ ...body, output_format: "png" }),
  }).then(answerOf);
  let job;
  try {
    const { id } = await unlessAborted(accepted, signal);
    job = (await follow(id, signal, onProgress)) ?? (await askAfter(id, signal, onProgress));
  } catch (error) {
    accepted.then(({ id }) => cancel(id)).catch(() => {}); // what is not there needs no cancelling
    throw error;
  }
  if (!job.result) throw errorOf(job.error);
  return imagesOf(job.result, performance.now() - start);
}

/** The job once it is over, or null where its events do not tell of its end. */
async function follow(id, signal, onProgress) {
  try {
    const response = await call(`jobs/${id}/events?preview=true`, { headers: { Accept: "text/event-stream" }, signal });
    for await (const { name, data } of response.ok ? events(response.body) : []) {
      if (name === "error") break;
      const job = JSON.parse(data);
      if (isOver(job)) return job;
      onProgress(job);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  return null;
}

/** The same, asked for again and again. Throws ApiError where it is not told of, or not for a long while. */
async function askAfter(id, signal, onProgress) {
  let misses = 0;
  for (;;) {
    let waitS = ASK_EVERY_S;
    try {
      const job = await answerOf(await call(`jobs/${id}`, { headers: JSON_TYPES, signal }));
      if (isOver(job)) return job;
      onProgress(job);
      misses = 0;
    } catch (error) {
      if (error.status === 404) throw new ApiError(LOST, error);
      misses += 1;
      if (!error.passes || misses > MAX_MISSES) throw error;
      waitS = error.retryS;
    }
    await unlessAborted(pause(1000 * waitS), signal);
  }
}

function isOver(job) {
  return Boolean(job.result || job.error);
}

// It outlives the page: closing the tab gives the job up too.
function cancel(id) {
  return call(`jobs/${id}`, { method: "DELETE", keepalive: true });
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
