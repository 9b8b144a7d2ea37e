// Shows an error in words beside the field that it names.

import { byId } from "./dom.js";

// The API's parameter name, or "key" for that of the header -> the control that takes the focus.
const CONTROLS = {
  key: () => byId("key"),
  prompt: () => byId("prompt"),
  class: () => byId("class"),
  image: () => byId("file"),
  mask: () => byId("mask"),
  strength: () => byId("strength"),
  sampler: () => byId("sampler").querySelector("input:checked"),
  method: () => byId("method").querySelector("input:checked"),
  source_prompt: () => byId("source-prompt"),
  source_class: () => byId("source-class"),
  steps: () => byId("steps").querySelector("input:checked") ?? byId("steps").querySelector("input"),
  guidance_scale: () => byId("guidance-value"),
  seed: () => byId("seed"),
};

export function clearErrors() {
  for (const element of document.querySelectorAll(".error")) {
    element.hidden = true;
    element.textContent = "";
  }
  for (const element of document.querySelectorAll("[aria-invalid]")) element.removeAttribute("aria-invalid");
}

export function clearError(param) {
  byId(`error-${param}`).hidden = true;
  CONTROLS[param]()?.removeAttribute("aria-invalid");
}

/** Puts `message` beside the field `param` and focuses it; without a visible field, above the buttons. */
export function showError(message, param = null, requestId = "") {
  const field = param?.split(/[.[]/)[0];
  const control = CONTROLS[field]?.();
  const place = control && isVisible(byId(`error-${field}`)) ? byId(`error-${field}`) : byId("problem");
  place.textContent = place.id === "problem" && requestId ? `${message} (request ${requestId})` : message;
  place.hidden = false;
  if (place.id === "problem") {
    place.scrollIntoView({ block: "nearest" });
    return;
  }
  control.setAttribute("aria-invalid", "true");
  control.focus({ preventScroll: true });
  place.scrollIntoView({ block: "center" });
}

function isVisible(element) {
  return element.closest("[hidden]:not(.error)") === null;
}
