// What is known of an image that came back: how it was made, and where the time went.

import { byId, element, formatMs } from "./dom.js";
import { drawsNoise } from "./tasks.js";

const STAGES = [
  ["queue_ms", "Queue"],
  ["encode_ms", "Encode"],
  ["denoise_ms", "Denoise"],
  ["decode_ms", "Decode"],
];

/** Shows how an entry was made; `keep` hears when its seed is to be kept. */
export function showFacts(entry, keep) {
  const button = element("button", { type: "button", className: "link", textContent: "keep" });
  button.setAttribute("aria-label", `Keep seed ${entry.seed} for the next image`);
  button.addEventListener("click", keep);
  const rows = [
    [entry.subject, [entry.label]],
    ...(drawsNoise(entry.body) ? [["Seed", [String(entry.seed), " ", button]]] : []),
    ...(entry.body.method === undefined ? [] : [["Method", [entry.body.method]]]),
    ...(entry.body.sampler === undefined ? [] : [["Sampler", [entry.body.sampler]]]),
    ["Steps", [String(entry.body.steps)]],
    ["Guidance", [String(entry.body.guidance_scale)]],
    ...(entry.body.strength === undefined ? [] : [["Strength", [String(Number(entry.body.strength.toFixed(4)))]]]),
    ["Size", [`${entry.width} × ${entry.height}`]],
  ];
  byId("facts").replaceChildren(...rows.map(([term, details]) => pair(term, ...details)));
}

export function showTimings({ timings, ticks, roundTripMs }) {
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

function pair(term, ...details) {
  return element("div", {}, element("dt", { textContent: term }), element("dd", {}, ...details));
}
