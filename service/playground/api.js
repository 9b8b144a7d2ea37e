// The service's HTTP interface as the page uses it. Knows nothing of the document.

// The page may be served below a prefix, so paths are taken relative to this module.
const BASE = new URL("..", import.meta.url);
const FRESH = { cache: "no-store" };
const KEY = "fewstep-key";

/** Says "closed" when the service asks for a key, and has none or another than it knows. */
export const door = new EventTarget();

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", param = null, requestId = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.requestId = requestId;
  }
}

async function call(path, options) {
  try {
    const headers = { ...options.headers, ...authorization() };
    const response = await fetch(new URL(path, BASE), { ...options, headers });
    if (response.status === 401) door.dispatchEvent(new Event("closed"));
    return response;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service cannot be reached. Check that it is running, then try again.");
  }
}

/** The API key of every request from now on, until the tab is closed. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Whether requests have a key. */
export function hasKey() {
  try {
    return sessionStorage.getItem(KEY) !== null;
  } catch {
    return false; // the browser may keep nothing for any page
  }
}

function authorization() {
  return hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {};
}

async function errorFrom(response) {
  const text = await response.text();
  let body;
  try {
    body = JSON.parse(text).error;
  } catch {
    body = null;
  }
  const retryAfter = Number(response.headers.get("Retry-After"));
  let message = body?.message || `The service answered ${response.status} without saying why.`;
  if (retryAfter > 0) message = `${sentence(message)} Try again in ${retryAfter} s.`;
  return new ApiError(sentence(message), {
    status: response.status,
    code: body?.code,
    param: body?.param ?? null,
    requestId: body?.request_id ?? "",
  });
}

// The API's messages start in lower case, or with a field's name, which stays as it is.
function sentence(text) {
  const trimmed = text.trim().replace(/^[a-z]+(?![a-z_])/, (word) => word[0].toUpperCase() + word.slice(1));
  return /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
}

/** What GET /readyz says: "ready", "loading", "draining", "failed" ... Throws ApiError when out of reach. */
export async function readiness() {
  const response = await call("readyz", FRESH);
  if (response.ok) return "ready";
  try {
    return (await response.json()).status ?? "loading";
  } catch {
    return "loading";
  }
}

/** What a model can do, the default one if none is named. */
export async function capabilities(model = "") {
  return answerOf(await call(model ? `capabilities?model=${encodeURIComponent(model)}` : "capabilities", FRESH));
}

/** The models that a request may name. */
export async function models() {
  return (await answerOf(await call("models", FRESH))).models;
}

/** How many jobs wait in the queue, or null where the service does not tell. */
export async function waiting() {
  const response = await call("metrics", FRESH);
  const found = response.ok && (await response.text()).match(/^fewstep_queue_depth (\S+)$/m);
  return found ? Number(found[1]) : null;
}

/** Where a request can be sent from elsewhere. */
export function addressOf(task) {
  return new URL(task, BASE).href;
}

async function answerOf(response) {
  if (!response.ok) throw await errorFrom(response);
  return response.json();
}

/** Posts one request to /generate, /edit or /inpaint; gives its images. Aborting `signal` abandons it. */
export async function create(task, body, signal) {
  const start = performance.now();
  const response = await call(task, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "application/json" },
    body: JSON.stringify({ ...body, output_format: "png" }),
    signal,
  });
  if (!response.ok) throw await errorFrom(response);
  const answer = await response.json();
  const roundTripMs = performance.now() - start;
  return answer.images.map((image) => ({
    blob: blobFromBase64(image.b64_json, "image/png"),
    seed: image.seed,
    width: image.width,
    height: image.height,
    timings: answer.timings,
    ticks: answer.batch?.ticks ?? [],
    roundTripMs,
  }));
}

// fetch("data:...") would be refused by the page's content security policy.
function blobFromBase64(text, type) {
  return new Blob([Uint8Array.from(atob(text), (character) => character.charCodeAt(0))], { type });
}

/** A canvas as base64 PNG without the data URI's prefix. */
export function canvasToBase64(canvas) {
  return canvas.toDataURL("image/png").split(",")[1];
}
