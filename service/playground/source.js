// The input image: picked, dropped or pasted, and fitted to the model's frame.

import { canvasToBase64 } from "./base64.js";
import { byId, chosen } from "./dom.js";
import { seedIn } from "./tasks.js";

export class ImageError extends Error {}

export class Source extends EventTarget {
  #original = null;
  #name = "";
  #said = null;
  #canvas = byId("source");

  constructor() {
    super();
    byId("file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      event.target.value = ""; // so that picking the same file again counts as a change
      if (file) this.#offer(file);
    });
    byId("fits").addEventListener("change", () => this.#draw());
    byId("reuse").addEventListener("click", () => {
      this.dispatchEvent(new CustomEvent("use-settings", { detail: this.#said }));
    });
    byId("image-remove").addEventListener("click", () => {
      this.#clear();
      byId("file").focus();
    });
    this.#listenForDrops();
    document.addEventListener("paste", (event) => {
      const file = imageIn(event.clipboardData);
      // Office programs copy text as a picture too.
      const wantsText = event.target.matches?.("input, textarea") && event.clipboardData.types.includes("text/plain");
      if (!file || wantsText) return;
      event.preventDefault();
      this.#offer(file);
    });
  }

  configure({ width, height }) {
    if (this.#canvas.width === width && this.#canvas.height === height) return;
    Object.assign(this.#canvas, { width, height });
    this.#draw();
  }

  get isEmpty() {
    return this.#original === null;
  }

  toBase64() {
    return canvasToBase64(this.#canvas);
  }

  /** Takes an image file or blob. Throws ImageError when the browser cannot read it. */
  async load(blob, name) {
    const image = new Image();
    const url = URL.createObjectURL(blob);
    try {
      image.src = url;
      await image.decode();
    } catch {
      throw new ImageError(`${name} is not an image that this browser can read.`);
    } finally {
      URL.revokeObjectURL(url);
    }
    if (!image.naturalWidth || !image.naturalHeight) throw new ImageError(`${name} has no size.`);
    this.#original = image;
    this.#name = name;
    this.tell(null);
    this.#draw();
  }

  /** Offers the settings that the image's file tells, if any. */
  tell(said) {
    this.#said = said;
    byId("field-reuse").hidden = said === null;
    if (said === null) return;
    const strength = said.task === "generate" || said.strength === null ? "" : `, strength ${said.strength}`;
    const numbers = `${said.steps} steps, guidance ${said.guidance_scale}${strength}${seedIn(said, said.seed)}`;
    const from = said.task === "generate" ? "" : " The image it came from is not in the file.";
    byId("reuse-note").textContent = `Made by ${said.model}: ${numbers}.${from}`;
  }

  #clear() {
    this.#original = null;
    this.tell(null);
    this.#draw();
    this.dispatchEvent(new Event("cleared"));
  }

  // The app decides what an offered file means (it may switch the task), so it only hears of it here.
  #offer(file) {
    this.dispatchEvent(new CustomEvent("offer", { detail: file }));
  }

  #listenForDrops() {
    const marker = document.documentElement.classList;
    document.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      marker.add("dropping");
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) marker.remove("dropping");
    });
    document.addEventListener("drop", (event) => {
      marker.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (!file) return;
      event.preventDefault();
      this.#offer(file);
    });
  }

  #draw() {
    const image = this.#original;
    byId("frame").hidden = image === null;
    byId("image-remove").hidden = image === null;
    byId("file-label").textContent = image ? "Replace" : "Choose an image";
    byId("fits").hidden = image === null || !this.#changesShape(image);
    byId("image-note").textContent = image ? this.#note(image) : "or drop one anywhere on the page, or paste it.";
    if (image) fit(image, this.#canvas, chosen("fit"));
  }

  #changesShape(image) {
    return image.naturalWidth * this.#canvas.height !== image.naturalHeight * this.#canvas.width;
  }

  #note(image) {
    const how = { crop: ", centre cropped", pad: ", padded with white" }[chosen("fit")];
    const from = `${image.naturalWidth} × ${image.naturalHeight}`;
    const to = `${this.#canvas.width} × ${this.#canvas.height}`;
    if (from === to) return `${this.#name}, ${to}`;
    return `${this.#name}, ${from} to ${to}${this.#changesShape(image) ? how : ""}`;
  }
}

function imageIn(data) {
  return [...data.files].find((file) => file.type.startsWith("image/"));
}

/** Draws `image` over the whole canvas: "crop" fills the frame, "pad" shows all of it on white. */
function fit(image, canvas, how) {
  const { width, height } = canvas;
  const ratios = [width / image.naturalWidth, height / image.naturalHeight];
  const scale = how === "pad" ? Math.min(...ratios) : Math.max(...ratios);
  const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#fff"; // the service, too, flattens transparency on white
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(shrunk(image, w, h), (width - w) / 2, (height - h) / 2, w, h);
}

// Browsers filter one big reduction poorly; halving until near the target keeps thin lines.
function shrunk(image, targetWidth, targetHeight) {
  let current = image;
  let [w, h] = [image.naturalWidth, image.naturalHeight];
  while (w / 2 >= targetWidth && h / 2 >= targetHeight && Math.min(w, h) > 2) {
    [w, h] = [Math.round(w / 2), Math.round(h / 2)];
    const half = new OffscreenCanvas(w, h);
    const context = half.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(current, 0, 0, w, h);
    current = half;
  }
  return current;
}
