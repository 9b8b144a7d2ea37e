// The field for an API key, which shows itself when the service asks for one.

import { door, unfitIn, useKey } from "./api.js";
import { byId } from "./dom.js";
import { clearError, showError } from "./errors.js";

function give() {
  const key = byId("key").value.trim();
  if (!key) return;
  const unfit = unfitIn(key); // such as the quotes that a chat puts around what is copied from it
  if (unfit) {
    showError(`A key has no ${unfit} in it. Copy it again, by itself.`, "key");
    return;
  }
  try {
    useKey(key);
  } catch {
    showError("This browser keeps nothing for this page, not even a key. Allow it to, then try again.", "key");
    return;
  }
  location.reload(); // everything is asked for anew, with the key
}

door.addEventListener("closed", () => {
  byId("field-key").hidden = false;
  byId("key").focus();
});
byId("key").addEventListener("input", () => clearError("key"));
byId("key-use").addEventListener("click", give);
byId("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // it would submit the form
  give();
});
