// Which model a request is for.

import { ApiError, models } from "./api.js";
import { byId, element } from "./dom.js";

export class Models extends EventTarget {
  constructor() {
    super();
    byId("models").addEventListener("change", () => this.dispatchEvent(new Event("change")));
  }

  /** Asks the service which there are. One needs no choice; what was chosen before stays, if it is still there. */
  async offer() {
    const found = await models();
    const main = found.find((one) => one.default);
    if (!main) throw new ApiError("The default model cannot be read now.", { status: 503 });
    const before = this.chosen;
    const names = [...new Set(found.map(({ name }) => name))];
    byId("models").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
    byId("models").value = names.includes(before) ? before : main.name;
    byId("field-model").hidden = names.length < 2;
  }

  has(name) {
    return [...byId("models").options].some((option) => option.value === name);
  }

  choose(name) {
    byId("models").value = name;
  }

  get chosen() {
    return byId("models").value;
  }
}
