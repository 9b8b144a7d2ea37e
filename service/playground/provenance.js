// What an image file says of how fewstep made it. Anyone may have written it, so it is checked.

const KEY = "fewstep";
const PNG_SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const TASKS = ["generate", "edit", "inpaint"];

/** The settings that a PNG, JPEG or WebP file was made with, or null where it says nothing of the kind. */
export async function settingsOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  try {
    return checked(JSON.parse(isPng(bytes) ? textOfPng(bytes) : textOfExif(bytes)));
  } catch {
    return null;
  }
}

function checked({ model, revision, task = null, steps, guidance_scale, seed, strength = null, prompt = null }) {
  const good =
    typeof model === "string" &&
    Number.isInteger(steps) &&
    Number.isFinite(guidance_scale) &&
    Number.isSafeInteger(seed) &&
    seed >= 0 &&
    (task === null || TASKS.includes(task)) &&
    (strength === null || Number.isFinite(strength)) &&
    (prompt === null || typeof prompt === "string");
  return good ? { model, revision, task, steps, guidance_scale, seed, strength, prompt } : null;
}

function isPng(bytes) {
  return PNG_SIGNATURE.every((value, index) => bytes[index] === value);
}

/** The text of the chunk `iTXt` whose keyword is ours. Throws where there is none. */
function textOfPng(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = PNG_SIGNATURE.length; ; at += view.getUint32(at) + 12) {
    const content = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    if (latin1(bytes.subarray(at + 4, at + 8)) !== "iTXt") continue;
    // keyword, 0, two bytes of compression (0, as there is none), language, 0, translated keyword, 0, text
    const [keyword, , , , , text] = new TextDecoder().decode(content).split("\0");
    if (keyword === KEY) return text;
  }
}

/** The same from the EXIF description of the other formats: JSON of keyword and text, up to a zero. */
function textOfExif(bytes) {
  const text = latin1(bytes);
  const begin = text.indexOf(`{"${KEY}": "`);
  return JSON.parse(text.slice(begin, text.indexOf("\0", begin)))[KEY];
}

function latin1(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}
