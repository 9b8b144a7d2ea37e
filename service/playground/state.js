// Whether the service is ready, and how many jobs wait in its queue.

import { readiness, waiting } from "./api.js";
import { byId } from "./dom.js";
import { pause } from "./waits.js";

const LOOK_EVERY_MS = 1000;
const QUEUE_EVERY_MS = 10_000;
const WAITING = {
  loading: "Loading the model…",
  queue_unavailable: "Waiting for the queue…",
  failed: "The model did not load",
  draining: "Shutting down…",
  stopped: "Stopped",
};

export function setState(state, text = WAITING[state]) {
  byId("state").dataset.state = state;
  if (byId("state").textContent !== text) byId("state").textContent = text; // else it is announced again
  byId("submit").disabled = state !== "ready";
}

/** What `ask` gives once the service is ready and has time for it; says what is waited for. Throws what does not pass. */
export async function whenReady(ask) {
  for (;;) {
    await untilReady();
    try {
      return await ask();
    } catch (error) {
      if (!error.passes) throw error;
      if (error.status) setState("loading", `${error.message} Trying again in ${error.retryS} s.`);
      await pause(1000 * error.retryS);
    }
  }
}

async function untilReady() {
  for (;;) {
    try {
      const status = await readiness();
      if (status === "ready") return;
      setState(status === "failed" ? "down" : "loading", WAITING[status] ?? WAITING.loading);
    } catch {
      setState("down", "Service not reachable");
    }
    await pause(LOOK_EVERY_MS);
  }
}

/** Says how many jobs wait, of all clients; nothing where the service does not tell. */
export async function showQueue() {
  if (document.hidden || byId("state").dataset.state !== "ready") return;
  const jobs = await waiting().catch(() => null);
  byId("queue").hidden = jobs === null;
  byId("queue").textContent = jobs ? `${jobs} ${jobs === 1 ? "job" : "jobs"} in the queue` : "Queue empty";
}

setInterval(showQueue, QUEUE_EVERY_MS);
document.addEventListener("visibilitychange", showQueue);
