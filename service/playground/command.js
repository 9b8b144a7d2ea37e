// The command that makes an image again, to be copied.

import { addressOf, hasKey } from "./api.js";
import { announce, byId } from "./dom.js";
import { drawsNoise } from "./tasks.js";

const SAID_FOR_MS = 2000;

/** Copies the command for an entry; where the browser does not allow it, shows it to be copied by hand. */
export async function copyCommand(entry) {
  const button = byId("copy-curl");
  const command = commandOf(entry);
  try {
    await navigator.clipboard.writeText(command);
  } catch {
    const field = byId("command");
    field.value = command;
    field.hidden = false;
    field.select();
    announce("The command is selected: copy it.");
    return;
  }
  announce("Copied.");
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy as curl"), SAID_FOR_MS);
}

/** What a file of this image is called. */
export function fileName(entry) {
  const words = entry.label.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40);
  return `${words || "image"}${drawsNoise(entry.body) ? `-${entry.seed}` : ""}.png`;
}

// A here-document needs no quoting, whatever is in the prompt.
function commandOf(entry) {
  const one = drawsNoise(entry.body) ? { n: 1, seed: entry.seed } : {};
  const body = JSON.stringify({ ...entry.body, ...one });
  // The key itself is left out: what is copied is soon pasted where others read.
  const key = hasKey() ? ' -H "Authorization: Bearer ${FEWSTEP_KEY:?set it to your API key}"' : "";
  const types = `-H 'Content-Type: application/json' -H 'Accept: image/png'${key}`;
  return `curl -fsS '${addressOf(entry.task)}' ${types} -o ${fileName(entry)} -d @- <<'END'\n${body}\nEND\n`;
}
