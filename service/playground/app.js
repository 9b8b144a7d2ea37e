// The page at /: joins the form, the input image, the mask and the result to the service.

import { ApiError, capabilities, create, readiness } from "./api.js";
import { announce, byId, choose, chosen, element, formatMs } from "./dom.js";
import { clearError, clearErrors, showError } from "./errors.js";
import "./key.js";
import { Models } from "./models.js";
import { Painter } from "./painter.js";
import { Result } from "./result.js";
import { Settings } from "./settings.js";
import { Source } from "./source.js";

const RETRY_MS = 1000;
const WAITING = {
  loading: "Loading the model…",
  queue_unavailable: "Waiting for the queue…",
  failed: "The model did not load",
  draining: "Shutting down…",
  stopped: "Stopped",
};
const CANCEL_SHOWN_AFTER_S = 0.3;

const models = new Models();
const settings = new Settings();
const source = new Source();
const painter = new Painter();
const result = new Result();
let conditioning = "text";
let running = null;

function setState(state, text) {
  byId("state").dataset.state = state;
  if (byId("state").textContent !== text) byId("state").textContent = text; // else it is announced again
  byId("submit").disabled = state !== "ready";
}

/** Waits for the service, then takes what its bundle offers. */
async function connect() {
  for (;;) {
    try {
      const status = await readiness();
      if (status === "ready") break;
      setState(status === "failed" ? "down" : "loading", WAITING[status] ?? WAITING.loading);
    } catch {
      setState("down", "Service not reachable");
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
  try {
    await models.offer();
    await useModel();
  } catch (error) {
    unusable(error);
  }
}

function unusable(error) {
  setState("down", "Not usable");
  showError(error.message, null, error.requestId);
}

async function useModel() {
  configure(await capabilities(models.chosen));
  setState("ready", "Ready");
}

function configure(bundle) {
  const { width, height } = bundle.image;
  conditioning = bundle.conditioning;
  byId("model").textContent = `${bundle.model}, ${width} × ${height}`;
  byId("model").title = `revision ${bundle.revision}`;
  byId("field-prompt").hidden = conditioning !== "text";
  byId("field-class").hidden = conditioning !== "class";
  byId("class").replaceChildren(...(bundle.classes ?? []).map((name) => element("option", { textContent: name })));
  for (const input of document.querySelectorAll("input[name=task]")) {
    input.closest("label").hidden = !bundle.tasks.includes(input.value);
  }
  byId("tasks").hidden = bundle.tasks.length < 2;
  settings.configure(bundle);
  source.configure(bundle.image);
  painter.configure(bundle.image);
  result.configure(bundle.image);
  setTask(chosen("task"));
}

function setTask(task) {
  choose("task", task);
  byId("field-image").hidden = task === "generate";
  byId("mask").hidden = byId("field-mask").hidden = task !== "inpaint" || source.isEmpty;
  settings.setTask(task);
  if (!running) nameSubmit();
}

function nameSubmit() {
  byId("submit").textContent = { generate: "Generate", edit: "Edit", inpaint: "Repaint" }[chosen("task")];
}

function offers(task) {
  return !document.querySelector(`input[name=task][value=${task}]`).closest("label").hidden;
}

/** Makes `blob` the input image; from "generate" that means an edit. Returns whether it worked. */
async function takeImage(blob, name) {
  const task = chosen("task") === "generate" ? ["edit", "inpaint"].find(offers) : chosen("task");
  if (!task) {
    showError("This model only generates; it takes no input image.");
    return false;
  }
  clearErrors();
  setTask(task);
  try {
    await source.load(blob, name);
  } catch (error) {
    showError(error.message, "image");
    return false;
  }
  setTask(task);
  return true;
}

/** The request as the API takes it, or null after saying what is missing. */
function request(task) {
  const body = { model: models.chosen };
  body[conditioning === "text" ? "prompt" : "class"] = byId(conditioning === "text" ? "prompt" : "class").value;
  if (task !== "generate" && source.isEmpty) return missing("Choose an image first.", "image");
  if (task === "inpaint" && painter.isEmpty) return missing("Paint over what should change first.", "mask");
  if (task !== "generate") body.image = source.toBase64();
  if (task === "inpaint") Object.assign(body, { mask: painter.toBase64(), mask_mode: "white" });
  try {
    return Object.assign(body, settings.fields());
  } catch (error) {
    return missing(error.message, "seed");
  }
}

function missing(message, param) {
  showError(message, param);
  return null;
}

async function submit() {
  if (running || byId("submit").disabled) return;
  clearErrors();
  const task = chosen("task");
  const body = request(task);
  if (!body) return;
  running = new AbortController();
  showRunning(true);
  try {
    const answers = await create(task, body, running.signal);
    const label = byId(conditioning === "text" ? "prompt" : "class").value;
    const before = task === "generate" ? null : await source.toBlob();
    const entry = result.add(answers, { task, body, label, subject: subject() }, before);
    const what = answers.length > 1 ? `${answers.length} images` : "Image";
    announce(`${what} ready in ${formatMs(entry.roundTripMs)}, seed ${entry.seed}.`);
    reveal();
  } catch (error) {
    fail(error);
  } finally {
    showRunning(false);
    running = null;
  }
}

function subject() {
  return conditioning === "text" ? "Prompt" : "Class";
}

function fail(error) {
  if (error.name === "AbortError") {
    announce("Cancelled.");
    return;
  }
  if (!(error instanceof ApiError)) {
    showError("The service's answer could not be read.");
    throw error;
  }
  showError(error.message, error.param, error.requestId);
  if (error.status === 503 || error.status === 0) connect();
}

function showRunning(on) {
  const button = byId("submit");
  button.setAttribute("aria-disabled", String(on));
  if (!on) {
    // The focus must not fall off the page with the button that held it.
    if (document.activeElement === byId("cancel")) button.focus();
    byId("cancel").hidden = true;
    result.stop();
    nameSubmit();
    return;
  }
  announce("Making the image.");
  result.start((seconds) => {
    if (seconds < CANCEL_SHOWN_AFTER_S) return;
    byId("cancel").hidden = false;
    button.textContent = `Working, ${seconds.toFixed(1)} s`;
  });
}

/** On a narrow screen the result lies below the form. */
function reveal() {
  const box = byId("stage").getBoundingClientRect();
  if (box.bottom > window.innerHeight || box.top < 0) byId("result").scrollIntoView({ block: "start" });
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
models.addEventListener("change", () => {
  clearErrors();
  setState("loading", WAITING.loading);
  useModel().catch(unusable);
});
byId("cancel").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
byId("prompt").addEventListener("input", () => clearError("prompt"));
byId("class").addEventListener("change", () => clearError("class"));
byId("tasks").addEventListener("change", () => {
  clearErrors();
  setTask(chosen("task"));
});
source.addEventListener("offer", async ({ detail: file }) => {
  if (await takeImage(file, file.name || "The image")) painter.reset();
});
source.addEventListener("cleared", () => {
  painter.reset();
  setTask(chosen("task"));
});
result.addEventListener("use-as-input", async ({ detail: entry }) => {
  // The mask stays: refining the same place is the common case, and Clear is one press away.
  if (!(await takeImage(entry.blob, `Result with seed ${entry.seed}`))) return;
  byId("field-image").scrollIntoView({ block: "nearest" });
  announce("The result is now the input image.");
});
result.addEventListener("keep-seed", ({ detail: seed }) => {
  settings.keepSeed(seed);
  announce(`Seed ${seed} kept.`);
});
connect();
