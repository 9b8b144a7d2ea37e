// The page at /: joins the form, the input image, the mask and the result to the service.

import { ApiError, capabilities } from "./api.js";
import { blobFromBase64 } from "./base64.js";
import { announce, byId, choose, chosen, formatMs } from "./dom.js";
import { clearErrors, showError } from "./errors.js";
import { create } from "./jobs.js";
import "./key.js";
import { Models } from "./models.js";
import { Painter } from "./painter.js";
import { Progress } from "./progress.js";
import { settingsOf } from "./provenance.js";
import { Result } from "./result.js";
import { Settings } from "./settings.js";
import { Source } from "./source.js";
import { setState, showQueue, whenReady } from "./state.js";
import { Subject } from "./subject.js";
import { drawsNoise, offers, offerTasks, seedIn, titleOf } from "./tasks.js";

const CANCEL_SHOWN_AFTER_S = 0.3;

const models = new Models();
const subject = new Subject();
const settings = new Settings();
const source = new Source();
const painter = new Painter();
const result = new Result();
const progress = new Progress();
let running = null;

/** Waits for the service, then takes what its bundle offers. */
async function connect() {
  try {
    await whenReady(() => models.offer());
    await whenReady(useModel);
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
  showQueue();
}

function configure(bundle) {
  const { width, height } = bundle.image;
  byId("model").textContent = `${bundle.model}, ${width} × ${height}`;
  byId("model").title = `revision ${bundle.revision}`;
  offerTasks(bundle.tasks);
  subject.configure(bundle);
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
  byId("submit").textContent = titleOf(chosen("task"));
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
  const body = { model: models.chosen, ...subject.body };
  if (byId("with-prompt").checked) body.metadata = "full";
  if (task !== "generate" && source.isEmpty) return missing("Choose an image first.", "image");
  if (task === "inpaint" && painter.isEmpty) return missing("Paint over what should change first.", "mask");
  if (task !== "generate") body.image = source.toBase64();
  if (task === "inpaint") Object.assign(body, { mask: painter.toBase64(), mask_mode: "white" });
  try {
    return Object.assign(body, settings.takeBody());
  } catch (error) {
    return missing(error.message, "seed");
  }
}

/** Takes over what an image was made with, `said` in the API's words; says what could not be taken. */
async function useSettings(said, loadImages = () => {}) {
  clearErrors();
  if (byId("submit").disabled) return showError("Wait until the service is ready.");
  const missed = [];
  if (said.model !== models.chosen && models.has(said.model)) {
    models.choose(said.model);
    await whenReady(useModel);
  }
  if (said.model !== models.chosen) missed.push(`the model ${said.model}`);
  if (said.task && offers(said.task)) setTask(said.task);
  missed.push(...settings.use(said, said.task));
  if (said.prompt === null) missed.push("its prompt, which the file does not tell");
  else if (!subject.use(said.prompt)) missed.push(`the class ${said.prompt}`);
  await loadImages();
  byId("form").scrollIntoView({ block: "nearest" });
  byId("submit").focus({ preventScroll: true }); // the button that was pressed may be hidden now
  if (missed.length) showError(`Taken over, but for ${missed.join(", ")}.`);
  else announce(drawsNoise(said) ? `Settings taken over, seed ${said.seed} kept.` : "Settings taken over.");
}

/** The same for an image of this page, whose input and mask are known too. */
function useEntry({ body, task, label, seed }) {
  return useSettings({ ...body, task, prompt: label, seed }, async () => {
    if (body.image) await takeImage(blobFromBase64(body.image), drawsNoise(body) ? `The input of seed ${seed}` : "The input");
    if (body.mask) await painter.load(body.mask);
  });
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
  const label = subject.text;
  running = new AbortController();
  showRunning(true);
  try {
    const answers = await create(task, body, running.signal, (job) => progress.show(job));
    const entry = result.add(answers, { task, body, label, subject: subject.title });
    const what = answers.length > 1 ? `${answers.length} images` : "Image";
    announce(`${what} ready in ${formatMs(entry.roundTripMs)}${seedIn(body, entry.seed)}.`);
    result.reveal();
  } catch (error) {
    fail(error);
  } finally {
    showRunning(false);
    running = null;
  }
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
  showError(error.advice, error.param, error.requestId);
  // What is on offer may have changed since the page asked: the service was away, or its model is gone.
  const isGone = error.status === 404 && error.param === "model";
  if (isGone || error.status === 503 || error.status === 0) connect();
}

function showRunning(on) {
  const button = byId("submit");
  button.setAttribute("aria-disabled", String(on));
  if (!on) {
    // The focus must not fall off the page with the button that held it.
    if (document.activeElement === byId("cancel")) button.focus();
    byId("cancel").hidden = true;
    progress.stop();
    showQueue();
    nameSubmit();
    return;
  }
  progress.start((seconds) => {
    if (seconds < CANCEL_SHOWN_AFTER_S) return;
    if (byId("cancel").hidden) result.reveal();
    byId("cancel").hidden = false;
    button.textContent = `Working, ${seconds.toFixed(1)} s`;
  });
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
models.addEventListener("change", () => {
  clearErrors();
  setState("loading");
  whenReady(useModel).catch(unusable);
});
byId("cancel").addEventListener("click", () => running?.abort());
window.addEventListener("pagehide", () => running?.abort()); // nobody would see the image
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) running?.abort();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
byId("tasks").addEventListener("change", () => {
  clearErrors();
  setTask(chosen("task"));
});
source.addEventListener("offer", async ({ detail: file }) => {
  if (!(await takeImage(file, file.name || "The image"))) return;
  painter.reset();
  source.tell(await settingsOf(file));
});
source.addEventListener("use-settings", ({ detail: said }) => useSettings(said).catch(fail));
source.addEventListener("cleared", () => {
  painter.reset();
  setTask(chosen("task"));
});
result.addEventListener("use-as-input", async ({ detail: entry }) => {
  // The mask stays: refining the same place is the common case, and Clear is one press away.
  if (!(await takeImage(entry.blob, drawsNoise(entry.body) ? `Result with seed ${entry.seed}` : "The result"))) return;
  byId("field-image").scrollIntoView({ block: "nearest" });
  announce("The result is now the input image.");
});
result.addEventListener("use-settings", ({ detail: entry }) => useEntry(entry).catch(fail));
result.addEventListener("keep-seed", ({ detail: seed }) => {
  settings.keepSeed(seed);
  announce(`Seed ${seed} kept.`);
});
connect();
result.restore();
