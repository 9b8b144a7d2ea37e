// The image in the making: a preview of it, how many steps have run, what waits before it.

import { dataUri } from "./base64.js";
import { byId } from "./dom.js";

export class Progress {
  #clock = null;

  /** Shows that a request runs; calls `tick(seconds)` meanwhile. */
  start(tick) {
    const begin = performance.now();
    byId("stage").classList.add("busy");
    byId("progress").hidden = false;
    this.#say("Making the image…");
    this.#clock = setInterval(() => tick((performance.now() - begin) / 1000), 100);
  }

  /** Shows how far a job is, as GET /jobs/{id} tells it. */
  show({ status, position, progress: { done, total }, preview }) {
    this.#say(status === "queued" ? waitingText(position) : `${done} of ${total} steps`);
    const bar = byId("progress");
    bar.setAttribute("aria-valuemax", total);
    if (done > 0) bar.setAttribute("aria-valuenow", done);
    bar.style.setProperty("--done", `${(100 * done) / total}%`);
    if (!preview) return;
    byId("preview").src = dataUri(preview, "image/webp");
    byId("preview").hidden = false;
  }

  stop() {
    clearInterval(this.#clock);
    byId("stage").classList.remove("busy");
    byId("progress").hidden = byId("preview").hidden = true;
    byId("preview").removeAttribute("src");
    byId("progress").removeAttribute("aria-valuenow");
    byId("progress").style.removeProperty("--done");
    this.#say("");
  }

  #say(text) {
    if (byId("waiting").textContent !== text) byId("waiting").textContent = text; // else it is announced again
  }
}

function waitingText(position) {
  if (position === null) return "Waits in the queue.";
  if (position === 0) return "Next in the queue.";
  return `${position} ${position === 1 ? "job waits" : "jobs wait"} before this one.`;
}
