// Pictures as the API's JSON carries them.

/** A canvas as PNG without the data URI's prefix. */
export function canvasToBase64(canvas) {
  return canvas.toDataURL("image/png").split(",")[1];
}

// fetch("data:...") would be refused by the page's content security policy.
export function blobFromBase64(text, type = "image/png") {
  return new Blob([Uint8Array.from(atob(text), (character) => character.charCodeAt(0))], { type });
}

/** The address of a picture, for an image element. */
export function dataUri(text, type = "image/png") {
  return `data:${type};base64,${text}`;
}
