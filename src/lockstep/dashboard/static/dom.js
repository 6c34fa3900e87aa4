// DOM: elements made of parts. Texts are set as text, so nothing that a run says becomes markup.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && typeof value !== "string") node[name] = value;
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Replace the text of a node only where it differs: selections and screen readers stay.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function pairs(rows) {
  return el("table", { class: "pairs" }, el("tbody", {},
    ...rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))));
}

export function section(title, ...children) {
  return el("section", {}, el("h2", {}, title), ...children);
}

export function folded(title, ...children) {
  return el("details", {}, el("summary", {}, title), ...children);
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
