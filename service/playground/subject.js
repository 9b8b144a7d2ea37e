// What to show: a prompt, or one of the model's classes.

import { byId, element } from "./dom.js";
import { clearError } from "./errors.js";

export class Subject {
  #field = "prompt"; // the API's name of it, and the id of its control

  constructor() {
    byId("prompt").addEventListener("input", () => clearError("prompt"));
    byId("class").addEventListener("change", () => clearError("class"));
  }

  configure({ conditioning, classes }) {
    this.#field = conditioning === "text" ? "prompt" : "class";
    for (const field of ["prompt", "class"]) byId(`field-${field}`).hidden = field !== this.#field;
    byId("class").replaceChildren(...(classes ?? []).map((name) => element("option", { textContent: name })));
  }

  get title() {
    return this.#field === "prompt" ? "Prompt" : "Class";
  }

  get text() {
    return byId(this.#field).value;
  }

  /** As a field of the request. */
  get body() {
    return { [this.#field]: this.text };
  }

  /** Takes a prompt or a class; gives whether the model knows it. */
  use(text) {
    byId(this.#field).value = text;
    clearError(this.#field);
    return this.text === text;
  }
}
