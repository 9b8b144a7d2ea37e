// The service's HTTP interface as the page uses it. Knows nothing of the document.

// The page may be served below a prefix, so paths are taken relative to this module.
const BASE = new URL("..", import.meta.url);
const FRESH = { cache: "no-store" };
const KEY = "fewstep-key";

/** Says "closed" when the service asks for a key, and has none or another than it knows. */
export const door = new EventTarget();

// Where the service does not say when to come back.
const RETRY_S = 1;

export class ApiError extends Error {
  /** `status` is that of the answer, 0 without one. */
  constructor(message, { status = 0, param = null, requestId = "", retryAfterS = 0 } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.requestId = requestId;
    this.retryS = retryAfterS || RETRY_S;
    /** For a person, who may try again. */
    this.advice = retryAfterS ? `${message} Try again in ${retryAfterS} s.` : message;
  }

  /** Whether the same request may be served in `retryS` seconds. */
  get passes() {
    return [0, 429, 503].includes(this.status);
  }
}

/** One request, with the key if there is one. Throws ApiError when the service is out of reach. */
export async function call(path, options) {
  const headers = new Headers({ ...options.headers, ...authorization() });
  const response = await reach(path, { ...options, headers });
  if (response.status === 401) door.dispatchEvent(new Event("closed"));
  return response;
}

async function reach(path, options) {
  try {
    return await fetch(new URL(path, BASE), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service cannot be reached. Check that it is running, then try again.");
  }
}

/** The first character of `key` that no request can carry, or undefined. */
export function unfitIn(key) {
  return key.match(/[^\x20-\x7e\xa0-\xff]/u)?.[0];
}

/** The API key of every request from now on, until the tab is closed. Throws where the browser keeps nothing. */
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
  const said = body?.message ? body : { message: `The service answered ${response.status} without saying why.` };
  const seconds = Number(response.headers.get("Retry-After")); // NaN where it is a date
  return errorOf(said, response.status, seconds > 0 ? seconds : 0);
}

/** The error of a body that tells of one; `status` is that of the answer, null in a job's own. */
export function errorOf({ message, param = null, request_id }, status = null, retryAfterS = 0) {
  return new ApiError(sentence(message), { status, param, requestId: request_id, retryAfterS });
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

let metricsAreOpen = true;

/** How many jobs wait in the queue, or null where the service does not tell without a key, whose rate is for images. */
export async function waiting() {
  if (!metricsAreOpen) return null;
  const response = await reach("metrics", FRESH);
  metricsAreOpen = response.status !== 401;
  const found = response.ok && (await response.text()).match(/^fewstep_queue_depth (\S+)$/m);
  return found ? Number(found[1]) : null;
}

/** Where a request can be sent from elsewhere. */
export function addressOf(task) {
  return new URL(task, BASE).href;
}

/** The JSON of an answer. Throws ApiError where it is an error. */
export async function answerOf(response) {
  if (!response.ok) throw await errorFrom(response);
  return response.json();
}
