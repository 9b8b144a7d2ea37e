// Which tasks the model offers, and what their button says.

import { byId } from "./dom.js";

const TITLES = { generate: "Generate", edit: "Edit", inpaint: "Repaint" };

export function offerTasks(names) {
  for (const task of Object.keys(TITLES)) labelOf(task).hidden = !names.includes(task);
  byId("tasks").hidden = names.length < 2;
}

export function offers(task) {
  return !labelOf(task).hidden;
}

export function titleOf(task) {
  return TITLES[task];
}

/** Whether what is asked for, or was made so, begins with noise, which a seed draws. What is encoded does not. */
export function drawsNoise({ method }) {
  return method !== "encode";
}

/** The seed of an image, to be said after something else, if it has one. */
export function seedIn(said, seed) {
  return drawsNoise(said) ? `, seed ${seed}` : "";
}

function labelOf(task) {
  return document.querySelector(`input[name=task][value=${task}]`).closest("label");
}
