// Small helpers for the document.

export function byId(id) {
  return document.getElementById(id);
}

/** element("li", {className: "x"}, child, "text") */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function chosen(name) {
  return document.querySelector(`input[name="${name}"]:checked`)?.value;
}

export function choose(name, value) {
  document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
}

/** Radio buttons of values, by their titles if they have any; what was chosen before stays, if it is still there. */
export function offer(name, values, initial, titles = {}) {
  const before = chosen(name);
  byId(`${name}-choices`).replaceChildren(
    ...values.map((value) =>
      element(
        "label",
        {},
        element("input", { type: "radio", name, value }),
        element("span", { textContent: titles[value] ?? value }),
      ),
    ),
  );
  choose(name, values.some((value) => String(value) === before) ? before : initial);
}

let announcing;

/** Says `text` to screen readers, once things have been still for `delayMs`. */
export function announce(text, delayMs = 0) {
  clearTimeout(announcing);
  announcing = setTimeout(() => {
    byId("announcer").textContent = text;
  }, delayMs);
}

export function formatMs(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 10 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}
