// The settings of a request: how it is made, in how many steps, its guidance scale, strength and seed.

import { clearError } from "./errors.js";
import { byId, choose, chosen, offer } from "./dom.js";
import { drawsNoise } from "./tasks.js";
import { Ways } from "./ways.js";

const SEEDS = 2 ** 32;
const COUNTS = [1, 2, 4, 8];

export class Settings {
  #ways = new Ways();
  #defaultSteps = 1;
  #maxImages = 1;
  #strengths = {};
  #defaultStrength = {};
  #kept = { edit: null, inpaint: null };
  #task = "generate";
  #seedIsUsed = false;

  constructor() {
    const [slider, number] = [byId("guidance"), byId("guidance-value")];
    slider.addEventListener("input", () => this.#setGuidance(shortened(slider.value)));
    number.addEventListener("input", () => {
      if (number.value !== "") slider.value = number.value;
      this.#fill(slider);
      clearError("guidance_scale");
    });
    number.addEventListener("change", () => {
      if (number.value === "") this.#setGuidance(shortened(slider.value));
    });
    byId("strength").addEventListener("input", () => {
      this.#kept[this.#task] = this.#strength;
      this.#describeStrength();
    });
    byId("steps").addEventListener("change", () => {
      clearError("steps");
      this.#offerStrengths();
    });
    this.#ways.addEventListener("change", () => this.#arrange());
    byId("seed").addEventListener("input", () => {
      this.#seedIsUsed = false;
      this.#lock(byId("seed").value.trim() !== "");
      clearError("seed");
    });
    byId("seed-dice").addEventListener("click", () => this.#roll());
    byId("seed-lock").addEventListener("click", () => this.#lock(!this.#locked));
    byId("brush-size").addEventListener("input", (event) => this.#fill(event.target));
    this.#roll();
    this.#lock(false);
  }

  /** Takes the ranges and choices from the answer of GET /capabilities. */
  configure(capabilities) {
    this.#strengths = capabilities.strengths;
    this.#defaultStrength = capabilities.default_strength;
    this.#defaultSteps = capabilities.default_steps;
    this.#maxImages = capabilities.limits.max_images;
    this.#ways.configure(capabilities);
    const { minimum, maximum, default: initial } = capabilities.guidance_scale;
    Object.assign(byId("guidance"), { min: minimum, max: maximum, step: sliderStep(maximum - minimum) });
    Object.assign(byId("guidance-value"), { min: minimum, max: maximum });
    byId("guidance").disabled = minimum === maximum;
    byId("steps").hidden = byId("field-guidance").hidden = false;
    const shown = byId("guidance-value").value;
    if (shown === "" || Number(shown) < minimum || Number(shown) > maximum) this.#setGuidance(shortened(initial));
    this.#arrange();
  }

  /** Strength counts for edit and inpaint only; each keeps its own choice. */
  setTask(task) {
    this.#task = task;
    this.#ways.setTask(task);
    this.#arrange();
  }

  /** Offers what the chosen way has. What is encoded draws no noise, so it has no strength, no seed and one image. */
  #arrange() {
    const steps = this.#ways.steps;
    if (steps.length === 0) return; // before the service told what it can do
    offer("steps", steps, steps.includes(this.#defaultSteps) ? this.#defaultSteps : steps.at(-1));
    const counts = COUNTS.filter((count) => count <= this.#maxImages);
    offer("count", counts, 1);
    byId("count").hidden = this.#ways.encodes || counts.length < 2;
    byId("field-seed").hidden = this.#ways.encodes;
    byId("field-strength").hidden = this.#ways.encodes || this.#task === "generate";
    this.#offerStrengths();
  }

  /** As fields of the request; a seed is taken. Throws RangeError for one that is none. */
  takeBody() {
    const body = { steps: this.#steps, guidance_scale: this.#guidanceScale, ...this.#ways.body };
    if (this.#ways.encodes) return body;
    if (this.#task !== "generate") body.strength = this.#strength;
    return { ...body, n: Number(chosen("count")), seed: this.#takeSeed() };
  }

  get #steps() {
    return Number(chosen("steps"));
  }

  get #guidanceScale() {
    return Number(byId("guidance-value").value || byId("guidance").value);
  }

  get #strength() {
    return this.#choices()[Number(byId("strength").value) - 1];
  }

  /** The seed of the next request: the one shown if it is locked or was never used, else a new one. */
  #takeSeed() {
    if (byId("seed").value.trim() === "" || (this.#seedIsUsed && !this.#locked)) this.#roll();
    const text = byId("seed").value.trim();
    if (!/^\d+$/.test(text) || !Number.isSafeInteger(Number(text))) {
      throw new RangeError(`A seed is a whole number from 0 to ${Number.MAX_SAFE_INTEGER}.`);
    }
    this.#seedIsUsed = true;
    return Number(text);
  }

  /** Takes over how an image was made, for one image; gives what this model cannot do of it, in words. */
  use(said, task) {
    const { steps, guidance_scale: guidance, seed, strength } = said;
    const missed = this.#ways.use(said);
    this.#arrange();
    choose("count", 1);
    if (this.#ways.steps.includes(steps)) choose("steps", steps);
    else missed.push(`${steps} steps`);
    const { min, max } = byId("guidance-value");
    if (guidance >= min && guidance <= max) this.#setGuidance(guidance);
    else missed.push(`a guidance scale of ${guidance}`);
    // A strength between two acts as the lower one.
    const acting = this.#choices().filter((choice) => choice <= strength).pop();
    if (task !== "generate" && acting) this.#kept[task] = acting;
    this.#offerStrengths();
    if (drawsNoise(said)) this.keepSeed(seed);
    return missed;
  }

  keepSeed(seed) {
    byId("seed").value = seed;
    this.#lock(true);
    clearError("seed");
  }

  get #locked() {
    return byId("seed-lock").getAttribute("aria-pressed") === "true";
  }

  #lock(locked) {
    byId("seed-lock").setAttribute("aria-pressed", String(locked));
    byId("seed-note").textContent = locked ? "Kept: same settings, same image." : "Each image gets a new seed.";
  }

  #roll() {
    byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS;
    this.#seedIsUsed = false;
    clearError("seed");
  }

  #setGuidance(value) {
    const slider = byId("guidance");
    slider.value = value;
    byId("guidance-value").value = value;
    this.#fill(slider);
    clearError("guidance_scale");
  }

  /** The strengths that keep 1, 2, ... N of the N steps. */
  #choices() {
    return this.#strengths[this.#steps] ?? [1];
  }

  #offerStrengths() {
    const choices = this.#choices();
    const slider = byId("strength");
    const initial = this.#task === "inpaint" ? 1 : this.#defaultStrength[this.#steps];
    const wanted = this.#kept[this.#task] ?? initial ?? 1;
    const distance = (value) => Math.abs(value - wanted);
    const nearest = choices.reduce((best, value) => (distance(value) < distance(best) ? value : best));
    slider.max = choices.length;
    slider.value = choices.indexOf(nearest) + 1;
    slider.disabled = choices.length < 2;
    this.#describeStrength();
  }

  #describeStrength() {
    const count = this.#choices().length;
    const kept = Number(byId("strength").value);
    const value = Number(this.#strength.toFixed(4));
    byId("strength-value").textContent = value;
    byId("strength").setAttribute("aria-valuetext", `${value}, ${kept} of ${count} steps run`);
    byId("strength-note").textContent = strengthNote(this.#task, kept, count);
    this.#fill(byId("strength"));
    clearError("strength");
  }

  #fill(slider) {
    const span = slider.max - slider.min;
    slider.style.setProperty("--filled", `${span > 0 ? (100 * (slider.value - slider.min)) / span : 100}%`);
  }
}

function shortened(value) {
  return Number(Number(value).toFixed(2));
}

// Tenths, unless the slider could then not reach its end.
function sliderStep(span) {
  return Number.isInteger(Number((span * 10).toFixed(6))) ? 0.1 : span / 100;
}

function strengthNote(task, kept, count) {
  if (count === 1) return "One step leaves one strength. More steps let more of the input through.";
  const part = task === "inpaint" ? "what lies under the mask" : "the input";
  if (kept === count) return `All ${count} steps run: ${part} counts for little or nothing.`;
  return `${kept} of ${count} steps run; fewer keep more of ${part}.`;
}
