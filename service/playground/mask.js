// What is to be repainted: one flag per pixel of the model's frame, painted in strokes. Knows no document.

const UNDO_DEPTH = 50;

export class Mask {
  #before = null;
  #history = [];

  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.pixels = new Uint8Array(width * height);
  }

  get painted() {
    return this.pixels.reduce((sum, value) => sum + value, 0);
  }

  get canUndo() {
    return this.#history.length > 0;
  }

  /** Opens one undoable change; `commit` closes it. */
  begin() {
    this.commit();
    this.#before = this.pixels.slice();
  }

  commit() {
    const before = this.#before;
    this.#before = null;
    if (!before || before.every((value, index) => value === this.pixels[index])) return;
    this.#history.push(before);
    if (this.#history.length > UNDO_DEPTH) this.#history.shift();
  }

  undo() {
    this.commit();
    this.pixels = this.#history.pop() ?? this.pixels;
  }

  /** Forgets the strokes and their history. */
  reset() {
    this.#before = null;
    this.#history = [];
    this.pixels.fill(0);
  }

  /** Sets every pixel by `rule(value, index)`, as one undoable change. */
  change(rule) {
    this.begin();
    this.pixels = this.pixels.map(rule);
    this.commit();
  }

  clear() {
    this.change(() => 0);
  }

  invert() {
    this.change((value) => 1 - value);
  }

  /** Sets the pixels whose centres lie within `diameter` / 2 of (x, y), and the one under it. */
  stamp({ x, y }, diameter, value) {
    const radius = diameter / 2;
    this.#set(Math.floor(x), Math.floor(y), value);
    for (let row = Math.floor(y - radius); row <= y + radius; row++) {
      for (let column = Math.floor(x - radius); column <= x + radius; column++) {
        if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) this.#set(column, row, value);
      }
    }
  }

  /** Stamps along the line between two points closely enough to leave no gaps. */
  stroke(from, to, diameter, value) {
    const count = Math.max(1, Math.ceil(2 * Math.hypot(to.x - from.x, to.y - from.y)));
    for (let k = 0; k <= count; k++) {
      const point = { x: from.x + ((to.x - from.x) * k) / count, y: from.y + ((to.y - from.y) * k) / count };
      this.stamp(point, diameter, value);
    }
  }

  #set(column, row, value) {
    if (column < 0 || row < 0 || column >= this.width || row >= this.height) return;
    this.pixels[row * this.width + column] = value;
  }
}
