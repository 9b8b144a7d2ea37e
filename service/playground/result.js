// The image that came back, its facts and timings, and the ones before it.

import { byId, element, formatMs } from "./dom.js";

const HISTORY_LENGTH = 12;
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

  constructor() {
    super();
    byId("smooth").addEventListener("change", (event) => {
      for (const id of ["stage", "frame"]) byId(id).classList.toggle("crisp", !event.target.checked);
    });
    byId("use-as-input").addEventListener("click", () => this.#tell("use-as-input", this.#shown));
  }

  /** Sets the frame's size before there is an image, so that nothing moves when it comes. */
  configure({ width, height }) {
    document.documentElement.style.setProperty("--image-width", `${width}px`);
    document.documentElement.style.setProperty("--image-ratio", `${width} / ${height}`);
  }

  /** Adds one answer of the service together with what was asked for, and shows it. */
  add(answer, request) {
    const entry = { ...answer, ...request, url: URL.createObjectURL(answer.blob) };
    this.#entries.unshift(entry);
    for (const old of this.#entries.splice(HISTORY_LENGTH)) URL.revokeObjectURL(old.url);
    this.#show(entry);
    return entry;
  }

  /** Shows that a request runs; calls `tick(seconds)` meanwhile. */
  start(tick) {
    const begin = performance.now();
    byId("progress").hidden = false;
    byId("stage").classList.add("busy");
    byId("empty").textContent = "Making the image…";
    this.#clock = setInterval(() => tick((performance.now() - begin) / 1000), 100);
  }

  stop() {
    clearInterval(this.#clock);
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
    Object.assign(byId("download"), { href: entry.url, download: fileName(entry) });
    this.#showFacts(entry);
    showTimings(entry);
    this.#showHistory();
  }

  #showFacts(entry) {
    const keep = element("button", { type: "button", className: "link", textContent: "keep" });
    keep.setAttribute("aria-label", `Keep seed ${entry.seed} for the next image`);
    keep.addEventListener("click", () => this.#tell("keep-seed", entry.seed));
    const rows = [
      [entry.subject, [entry.label]],
      ["Seed", [String(entry.seed), " ", keep]],
      ["Steps", [String(entry.steps)]],
      ["Guidance", [String(entry.guidance_scale)]],
      ...(entry.strength === undefined ? [] : [["Strength", [String(Number(entry.strength.toFixed(4)))]]]),
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
