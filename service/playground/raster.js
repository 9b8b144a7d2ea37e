// A Mask as pixels of a canvas.

export function paint(canvas, mask, colour) {
  const { width, height } = mask;
  const image = new ImageData(width, height);
  mask.pixels.forEach((value, index) => {
    image.data.set(colour(value, index % width, Math.floor(index / width)), 4 * index);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
