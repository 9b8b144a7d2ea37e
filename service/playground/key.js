// The field for an API key, which shows itself when the service asks for one.

import { door, useKey } from "./api.js";
import { byId } from "./dom.js";

function give() {
  const key = byId("key").value.trim();
  if (!key) return;
  useKey(key);
  location.reload(); // everything is asked for anew, with the key
}

door.addEventListener("closed", () => {
  byId("field-key").hidden = false;
  byId("key").focus();
});
byId("key-use").addEventListener("click", give);
byId("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // it would submit the form
  give();
});
