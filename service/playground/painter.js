// Paints a Mask over the input image, by pointer or by keyboard.

import { canvasToBase64, dataUri } from "./base64.js";
import { announce, byId, choose, chosen } from "./dom.js";
import { clearError } from "./errors.js";
import { Mask } from "./mask.js";
import { paint } from "./raster.js";

// Two alternating tints, so that the mask shows on any image.
const TINTS = [
  [226, 40, 120, 190],
  [255, 255, 255, 120],
];
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Painter {
  #mask = null;
  #canvas = byId("mask");
  #cursor = { x: 0, y: 0 };
  #pointer = null; // the one that paints: others, of more fingers, do not
  #spaceHeld = false;
  #penDown = false;

  constructor() {
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => this.#onPointerDown(event));
    canvas.addEventListener("pointermove", (event) => this.#onPointerMove(event));
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => event.pointerId === this.#pointer && this.#endStroke());
    }
    canvas.addEventListener("pointerleave", () => this.#showRing(document.activeElement === canvas));
    canvas.addEventListener("keydown", (event) => this.#onKeyDown(event));
    canvas.addEventListener("keyup", (event) => {
      if (event.key !== " ") return;
      this.#spaceHeld = false;
      if (!this.#penDown) this.#endStroke();
    });
    canvas.addEventListener("focus", () => this.#showRing(true));
    canvas.addEventListener("blur", () => {
      this.#endStroke();
      this.#showRing(false);
    });
    byId("brush-size").addEventListener("input", () => this.#moveRing());
    this.#button("mask-undo", () => this.#mask.undo());
    this.#button("mask-clear", () => this.#mask.clear());
    this.#button("mask-invert", () => this.#mask.invert());
  }

  configure({ width, height }) {
    if (this.#mask?.width === width && this.#mask.height === height) return;
    this.#mask = new Mask(width, height);
    Object.assign(this.#canvas, { width, height });
    const size = byId("brush-size");
    size.max = Math.max(2, Math.round(Math.min(width, height) / 2));
    this.#setSize(Math.max(1, Math.round(Math.min(width, height) / 8)));
    this.#cursor = { x: Math.floor(width / 2) + 0.5, y: Math.floor(height / 2) + 0.5 };
    this.#refresh();
  }

  get isEmpty() {
    return this.#mask.painted === 0;
  }

  reset() {
    this.#mask?.reset();
    this.#refresh();
  }

  /** The mask as PNG in base64: white is to be repainted, black is kept. */
  toBase64() {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: this.#mask.width, height: this.#mask.height });
    paint(canvas, this.#mask, (value) => (value ? [255, 255, 255, 255] : [0, 0, 0, 255]));
    return canvasToBase64(canvas);
  }

  /** Takes a mask that `toBase64` gave; it can be undone. */
  async load(base64) {
    const { width, height } = this.#mask;
    const image = new Image();
    image.src = dataUri(base64);
    await image.decode();
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    this.#mask.change((_, index) => (data[4 * index] > 127 ? 1 : 0));
    this.#refresh();
  }

  get #size() {
    return Number(byId("brush-size").value);
  }

  get #value() {
    return chosen("brush") === "paint" ? 1 : 0;
  }

  #button(id, action) {
    byId(id).addEventListener("click", () => {
      this.#change(action);
      // A button that just became useless would drop the focus.
      if (byId(id).disabled) this.#canvas.focus();
    });
  }

  /** Changes the mask. A stroke that goes on ends before. */
  #change(action) {
    this.#endStroke();
    action();
    this.#refresh();
  }

  #onPointerDown(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    event.preventDefault();
    this.#canvas.focus({ preventScroll: true });
    this.#canvas.setPointerCapture(event.pointerId);
    this.#endStroke();
    this.#pointer = event.pointerId;
    this.#moveTo(this.#locate(event));
    this.#beginStroke();
  }

  #onPointerMove(event) {
    const paints = event.pointerId === this.#pointer;
    if (this.#pointer !== null && !paints) return;
    this.#showRing(true);
    const passed = event.getCoalescedEvents?.() ?? [];
    for (const point of passed.length ? passed : [event]) {
      const to = this.#locate(point);
      if (paints) this.#mask.stroke(this.#cursor, to, this.#size, this.#value);
      this.#moveTo(to);
    }
    if (paints) this.#refresh();
  }

  #locate(event) {
    const box = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.#mask.width,
      y: ((event.clientY - box.top) / box.height) * this.#mask.height,
    };
  }

  #onKeyDown(event) {
    const arrow = ARROWS[event.key];
    const key = event.key.toLowerCase();
    if ((event.ctrlKey || event.metaKey) && key === "z" && !event.shiftKey) this.#change(() => this.#mask.undo());
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else if (arrow) this.#step(arrow, event.shiftKey ? Math.max(4, this.#size) : 1);
    else if (key === " ") this.#press(event.repeat);
    else if (key === "enter") this.#togglePen(event.repeat);
    else if (key === "e") choose("brush", this.#value ? "erase" : "paint");
    else if (key === "[") this.#setSize(this.#size - 1);
    else if (key === "]") this.#setSize(this.#size + 1);
    else return;
    event.preventDefault();
  }

  #step([dx, dy], pixels) {
    const { width, height } = this.#mask;
    const to = {
      x: Math.min(width - 0.5, Math.max(0.5, Math.floor(this.#cursor.x) + 0.5 + dx * pixels)),
      y: Math.min(height - 0.5, Math.max(0.5, Math.floor(this.#cursor.y) + 0.5 + dy * pixels)),
    };
    if (this.#penDown || this.#spaceHeld) {
      this.#mask.stroke(this.#cursor, to, this.#size, this.#value);
      this.#refresh();
    }
    this.#moveTo(to);
    this.#showRing(true);
    announce(`column ${Math.ceil(to.x)}, row ${Math.ceil(to.y)}`, 400);
  }

  #press(isRepeat) {
    if (isRepeat) return;
    this.#spaceHeld = true;
    if (this.#penDown) this.#mask.stamp(this.#cursor, this.#size, this.#value);
    else this.#beginStroke();
    this.#refresh();
  }

  #togglePen(isRepeat) {
    if (isRepeat) return;
    if (this.#penDown) {
      this.#endStroke();
      announce("Brush up");
      return;
    }
    this.#beginStroke();
    this.#penDown = true;
    byId("brush-ring").classList.add("down");
    announce("Brush down: arrows paint");
  }

  #beginStroke() {
    this.#mask.begin();
    this.#mask.stamp(this.#cursor, this.#size, this.#value);
    this.#refresh();
  }

  #endStroke() {
    this.#pointer = null;
    this.#penDown = this.#spaceHeld = false;
    byId("brush-ring").classList.remove("down");
    if (!this.#mask) return;
    this.#mask.commit();
    this.#refresh();
  }

  #setSize(size) {
    const slider = byId("brush-size");
    slider.value = size;
    slider.dispatchEvent(new Event("input"));
  }

  #moveTo(point) {
    this.#cursor = point;
    this.#moveRing();
  }

  #showRing(shown) {
    byId("brush-ring").hidden = !shown;
  }

  #moveRing() {
    byId("brush-size-value").textContent = `${this.#size} px`;
    const ring = byId("brush-ring").style;
    ring.left = `${(100 * this.#cursor.x) / this.#mask.width}%`;
    ring.top = `${(100 * this.#cursor.y) / this.#mask.height}%`;
    ring.width = `${(100 * this.#size) / this.#mask.width}%`;
  }

  #refresh() {
    if (!this.#mask) return;
    paint(this.#canvas, this.#mask, (value, x, y) => (value ? TINTS[(x + y) % 2] : [0, 0, 0, 0]));
    const painted = this.#mask.painted;
    const percent = (100 * painted) / this.#mask.pixels.length;
    const share = percent > 0 && percent < 1 ? "under 1" : Math.round(percent);
    byId("mask-coverage").textContent = painted ? `${share}% will be repainted.` : "Paint over what should change.";
    byId("mask-undo").disabled = !this.#mask.canUndo;
    byId("mask-clear").disabled = painted === 0;
    if (painted) clearError("mask");
  }
}
