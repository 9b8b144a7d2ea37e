// The image that came back, its facts and timings, and the ones before it.

import { addressOf, hasKey, waiting } from "./api.js";
import { announce, byId, element, formatMs } from "./dom.js";

const HISTORY_LENGTH = 12;
const QUEUE_SHOWN_EVERY_MS = 1000;
const STAGES = [
  ["queue_ms", "Queue"],
  ["encode_ms", "Encode"],
  ["denoise_ms", "Denoise"],
  ["decode_ms", "Decode"],
];

export class Result extends EventTarget {
  #entries = [];
  #shown = null;
  #clock = null;
  #queue = null;

  constructor() {
    super();
    byId("smooth").addEventListener("change", (event) => {
      for (const id of ["stage", "frame"]) byId(id).classList.toggle("crisp", !event.target.checked);
    });
    byId("use-as-input").addEventListener("click", () => this.#tell("use-as-input", this.#shown));
    byId("compare").addEventListener("input", () => this.#compare());
    byId("copy-curl").addEventListener("click", () => this.#copyCommand());
  }

  /** Sets the frame's size before there is an image, so that nothing moves when it comes. */
  configure({ width, height }) {
    document.documentElement.style.setProperty("--image-width", `${width}px`);
    document.documentElement.style.setProperty("--image-ratio", `${width} / ${height}`);
  }

  /** Adds the images of one answer together with what was asked for, and the image that they came from; shows one. */
  add(answers, request, before) {
    const entries = answers.map((answer) => ({
      ...answer,
      ...request,
      url: URL.createObjectURL(answer.blob),
      beforeUrl: before && URL.createObjectURL(before),
    }));
    this.#entries.unshift(...entries);
    for (const old of this.#entries.splice(HISTORY_LENGTH)) {
      URL.revokeObjectURL(old.url);
      if (old.beforeUrl) URL.revokeObjectURL(old.beforeUrl);
    }
    this.#show(entries[0]);
    return entries[0];
  }

  /** Shows that a request runs; calls `tick(seconds)` meanwhile. */
  start(tick) {
    const begin = performance.now();
    byId("progress").hidden = false;
    this.#queue = setInterval(showQueue, QUEUE_SHOWN_EVERY_MS);
    byId("stage").classList.add("busy");
    byId("empty").textContent = "Making the image…";
    this.#clock = setInterval(() => tick((performance.now() - begin) / 1000), 100);
  }

  stop() {
    clearInterval(this.#clock);
    clearInterval(this.#queue);
    byId("waiting").hidden = true;
    byId("progress").hidden = true;
    byId("stage").classList.remove("busy");
    byId("empty").textContent = "The image appears here.";
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #show(entry) {
    this.#shown = entry;
    byId("empty").hidden = true;
    byId("details").hidden = false;
    Object.assign(byId("image"), { src: entry.url, alt: `${entry.label}, seed ${entry.seed}`, hidden: false });
    byId("before").hidden = byId("field-compare").hidden = !entry.beforeUrl;
    if (entry.beforeUrl) Object.assign(byId("before"), { src: entry.beforeUrl, alt: "The input image" });
    byId("compare").value = 0;
    this.#compare();
    Object.assign(byId("download"), { href: entry.url, download: fileName(entry) });
    this.#showFacts(entry);
    showTimings(entry);
    this.#showHistory();
  }

  /** Uncovers the input image from the left. */
  #compare() {
    const share = Number(byId("compare").value);
    byId("stage").style.setProperty("--uncovered", `${share}%`);
    byId("compare").setAttribute("aria-valuetext", share ? `${share}% of the input image` : "the result alone");
    byId("compare").style.setProperty("--filled", `${share}%`);
  }

  async #copyCommand() {
    const button = byId("copy-curl");
    try {
      await navigator.clipboard.writeText(commandOf(this.#shown));
      announce("Copied.");
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed to copy";
    }
    setTimeout(() => (button.textContent = "Copy as curl"), 2000);
  }

  #showFacts(entry) {
    const keep = element("button", { type: "button", className: "link", textContent: "keep" });
    keep.setAttribute("aria-label", `Keep seed ${entry.seed} for the next image`);
    keep.addEventListener("click", () => this.#tell("keep-seed", entry.seed));
    const rows = [
      [entry.subject, [entry.label]],
      ...(entry.body.seed === undefined ? [] : [["Seed", [String(entry.seed), " ", keep]]]),
      ["Steps", [String(entry.body.steps)]],
      ...(entry.body.sampler === undefined ? [] : [["Sampler", [entry.body.sampler]]]),
      ...(entry.body.method === undefined ? [] : [["Method", [entry.body.method]]]),
      ["Guidance", [String(entry.body.guidance_scale)]],
      ...(entry.body.strength === undefined ? [] : [["Strength", [String(Number(entry.body.strength.toFixed(4)))]]]),
      ["Size", [`${entry.width} × ${entry.height}`]],
    ];
    byId("facts").replaceChildren(...rows.map(([term, details]) => pair(term, ...details)));
  }

  #showHistory() {
    byId("history").hidden = this.#entries.length < 2;
    byId("history-list").replaceChildren(
      ...this.#entries.map((entry) => {
        const image = element("img", { src: entry.url, alt: `${entry.label}, seed ${entry.seed}` });
        const button = element("button", { type: "button", title: image.alt }, image);
        if (entry === this.#shown) button.setAttribute("aria-current", "true");
        button.addEventListener("click", () => {
          this.#show(entry);
          byId("history-list").querySelector("[aria-current]").focus();
        });
        return element("li", {}, button);
      }),
    );
  }
}

/** Says how many jobs wait, while the one of this page runs. */
async function showQueue() {
  const jobs = await waiting().catch(() => null);
  byId("waiting").hidden = !jobs || byId("progress").hidden;
  byId("waiting").textContent = jobs ? `${jobs} ${jobs === 1 ? "job waits" : "jobs wait"} in the queue.` : "";
}

/** The command that makes this very image. A here-document needs no quoting, whatever is in the prompt. */
function commandOf(entry) {
  const one = entry.body.seed === undefined ? {} : { n: 1, seed: entry.seed }; // what was encoded has no seed
  const body = JSON.stringify({ ...entry.body, ...one });
  // The key itself is left out: what is copied is soon pasted where others read.
  const key = hasKey() ? ' -H "Authorization: Bearer $FEWSTEP_KEY"' : "";
  const types = `-H 'Content-Type: application/json' -H 'Accept: image/png'${key}`;
  return `curl -s ${addressOf(entry.task)} ${types} -o ${fileName(entry)} -d @- <<'END'\n${body}\nEND\n`;
}

function pair(term, ...details) {
  return element("div", {}, element("dt", { textContent: term }), element("dd", {}, ...details));
}

function fileName(entry) {
  const words = entry.label.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40);
  return `${words || "image"}-${entry.seed}.png`;
}

function showTimings({ timings, ticks, roundTripMs }) {
  const known = STAGES.filter(([name]) => Number.isFinite(timings[name]));
  const rows = known.map(([name, title]) => [title, formatMs(timings[name]), name]);
  rows.push(["Total", formatMs(timings.total_ms)], ["Round trip", formatMs(roundTripMs)]);
  if (ticks.length) rows.push(["Rows per tick", ticks.join(", ")]);
  byId("timings").replaceChildren(
    ...rows.map(([title, text, stage]) => {
      const row = pair(title, text);
      if (stage) row.dataset.stage = stage;
      return row;
    }),
  );
  byId("timeline").replaceChildren(
    ...known.map(([name]) => {
      const part = element("span");
      part.dataset.stage = name;
      part.style.flexGrow = timings[name];
      return part;
    }),
  );
}
