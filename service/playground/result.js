// The image that came back, those of its batch, and the ones before it.

import { dataUri } from "./base64.js";
import { copyCommand, fileName } from "./command.js";
import { announce, byId, chosen, element } from "./dom.js";
import { showFacts, showTimings } from "./facts.js";
import * as history from "./history.js";
import { seedIn } from "./tasks.js";

const NARROW = "(max-width: 52rem)"; // as in style.css

export class Result extends EventTarget {
  #entries = [];
  #shown = null;

  constructor() {
    super();
    byId("smooth").addEventListener("change", (event) => {
      for (const id of ["stage", "frame"]) byId(id).classList.toggle("crisp", !event.target.checked);
    });
    byId("use-as-input").addEventListener("click", () => this.#tell("use-as-input", this.#shown));
    byId("use-settings").addEventListener("click", () => this.#tell("use-settings", this.#shown));
    byId("compare").addEventListener("input", () => this.#compare());
    byId("compare-ways").addEventListener("change", () => this.#compare());
    byId("copy-curl").addEventListener("click", () => copyCommand(this.#shown));
    byId("history-clear").addEventListener("click", () => this.#clearHistory());
  }

  /** Sets the frame's size before there is an image, so that nothing moves when it comes. */
  configure({ width, height }) {
    const style = document.documentElement.style;
    style.setProperty("--image-width", `${width}px`);
    style.setProperty("--image-ratio", `${width} / ${height}`);
    style.setProperty("--pair-width", `${2 * width}px`);
    style.setProperty("--pair-ratio", `${2 * width} / ${height}`);
  }

  /** Shows what this browser kept from earlier visits. */
  async restore() {
    const kept = (await history.load()).map(withUrl);
    if (!kept.length) return;
    this.#entries.push(...kept);
    if (this.#shown) this.#showLists();
    else this.#show(kept[0]);
  }

  /** Adds the images of one answer together with what was asked for; shows the first. */
  add(answers, request) {
    const made = answers.map((answer) => ({ ...answer, ...request }));
    history.keep(made);
    const entries = made.map(withUrl);
    this.#entries.unshift(...entries);
    for (const old of this.#entries.splice(history.LENGTH)) URL.revokeObjectURL(old.url);
    this.#show(entries[0]);
    return entries[0];
  }

  /** On a narrow screen the result lies below the form. */
  reveal() {
    const box = byId("stage").getBoundingClientRect();
    const outside = box.bottom > window.innerHeight || box.top < 0;
    if (outside || matchMedia(NARROW).matches) byId("result").scrollIntoView({ block: "start" });
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #show(entry) {
    this.#shown = entry;
    byId("empty").hidden = true;
    byId("details").hidden = false;
    Object.assign(byId("image"), { src: entry.url, alt: titleOf(entry), hidden: false });
    const before = entry.body.image;
    byId("before").hidden = byId("field-compare").hidden = !before;
    if (before) Object.assign(byId("before"), { src: dataUri(before), alt: "The input image" });
    byId("compare").value = 0;
    this.#compare();
    Object.assign(byId("download"), { href: entry.url, download: fileName(entry) });
    byId("command").hidden = true;
    showFacts(entry, () => this.#tell("keep-seed", entry.seed));
    showTimings(entry);
    this.#showLists();
  }

  /** Shows the input image beside the result, or uncovers it from the left. */
  #compare() {
    const beside = !byId("field-compare").hidden && chosen("way") === "beside";
    byId("stage").classList.toggle("beside", beside);
    byId("captions").hidden = !beside;
    byId("compare").hidden = beside;
    const share = Number(byId("compare").value);
    byId("stage").style.setProperty("--uncovered", `${share}%`);
    byId("compare").setAttribute("aria-valuetext", share ? `${share}% of the input image` : "the result alone");
    byId("compare").style.setProperty("--filled", `${share}%`);
  }

  #showLists() {
    const batch = this.#entries.filter((entry) => entry.batch === this.#shown.batch);
    byId("picker").hidden = batch.length < 2;
    this.#fill("picker-list", batch);
    byId("history").hidden = this.#entries.length === 0;
    this.#fill("history-list", this.#entries);
  }

  #fill(id, entries) {
    const list = byId(id);
    list.replaceChildren(
      ...entries.map((entry) => {
        const image = element("img", { src: entry.url, alt: titleOf(entry) });
        const button = element("button", { type: "button", title: image.alt }, image);
        if (entry === this.#shown) button.setAttribute("aria-current", "true");
        button.addEventListener("click", () => {
          this.#show(entry);
          list.querySelector("[aria-current]").focus();
        });
        return element("li", {}, button);
      }),
    );
  }

  /** Forgets all but the image that is shown. */
  #clearHistory() {
    history.clear();
    for (const entry of this.#entries) if (entry !== this.#shown) URL.revokeObjectURL(entry.url);
    this.#entries = [];
    this.#showLists();
    byId("use-as-input").focus(); // the button that held it is gone
    announce("The history is cleared.");
  }
}

function withUrl(entry) {
  return { ...entry, url: URL.createObjectURL(entry.blob) };
}

function titleOf(entry) {
  return `${entry.label}${seedIn(entry.body, entry.seed)}`;
}
