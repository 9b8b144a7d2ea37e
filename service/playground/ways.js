// Which sampler makes the image, and how an edit begins: shown only where the model offers a choice.

import { clearError } from "./errors.js";
import { byId, choose, chosen, element, offer } from "./dom.js";

const TITLES = { deterministic: "Deterministic", stochastic: "Stochastic", sdedit: "Add noise", encode: "Encode" };
const METHOD_NOTES = {
  sdedit: "The image with noise added is where the edit begins.",
  encode: "The image is taken back to its noise, and made anew in another style.",
};

export class Ways extends EventTarget {
  #samplers = {};
  #methods = {};
  #conditioning = "text";
  #task = "generate";

  constructor() {
    super();
    for (const name of ["sampler", "method"]) {
      byId(name).addEventListener("change", () => {
        clearError(name);
        this.#arrange();
        this.dispatchEvent(new Event("change"));
      });
    }
    byId("source-prompt").addEventListener("input", () => clearError("source_prompt"));
    byId("source-class").addEventListener("change", () => clearError("source_class"));
  }

  /** Takes the choices from the answer of GET /capabilities. */
  configure({ samplers, edit_methods: methods, conditioning, classes }) {
    this.#samplers = samplers;
    this.#methods = methods;
    this.#conditioning = conditioning;
    offer("sampler", Object.keys(samplers), "deterministic", TITLES);
    offer("method", Object.keys(methods), "sdedit", TITLES);
    byId("source-class").replaceChildren(...classes.map((name) => element("option", { textContent: name })));
    this.#arrange();
  }

  setTask(task) {
    this.#task = task;
    this.#arrange();
  }

  /** Whether the image is encoded, which draws no noise. */
  get encodes() {
    return this.#task === "edit" && chosen("method") === "encode";
  }

  /** The numbers of steps that there are. */
  get steps() {
    return this.encodes ? this.#methods.encode : (this.#samplers[chosen("sampler")] ?? []);
  }

  /** As fields of the request: none where nothing was chosen. */
  get body() {
    if (!this.encodes) return chosen("sampler") === "stochastic" ? { sampler: "stochastic" } : {};
    const name = this.#conditioning === "text" ? "source_prompt" : "source_class";
    return { method: "encode", [name]: byId(name.replace("_", "-")).value };
  }

  /** Takes over how an image was made; gives what this model cannot do of it, in words. */
  use({ sampler, method, source_prompt: prompt, source_class: name }) {
    const missed = [];
    const take = (what, value, offered) => {
      if (Object.hasOwn(offered, value)) choose(what, value);
      else missed.push(`the ${what} ${value}`);
    };
    take("sampler", sampler ?? "deterministic", this.#samplers);
    take("method", method ?? "sdedit", this.#methods);
    const source = prompt ?? name ?? "";
    byId("source-prompt").value = source;
    const classes = byId("source-class");
    if ([...classes.options].some((option) => option.value === source)) classes.value = source;
    this.#arrange();
    return missed;
  }

  #arrange() {
    byId("sampler").hidden = this.encodes || Object.keys(this.#samplers).length < 2;
    byId("method").hidden = this.#task !== "edit" || Object.keys(this.#methods).length < 2;
    byId("method-note").textContent = METHOD_NOTES[chosen("method")] ?? "";
    byId("field-source-prompt").hidden = !this.encodes || this.#conditioning !== "text";
    byId("field-source-class").hidden = !this.encodes || this.#conditioning !== "class";
  }
}
