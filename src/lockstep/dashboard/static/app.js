// App: which page this is, light or dark, and what went wrong.

import { linkTo } from "./api.js";
import { comparePage } from "./compare_page.js";
import { el } from "./dom.js";
import { listPage } from "./list_page.js";
import { runPage } from "./run_page.js";

const main = document.getElementById("main");
const root = document.documentElement;
const THEME = "lockstep-theme";

function setTheme(theme) {
  if (theme) root.dataset.theme = theme;
  window.dispatchEvent(new Event("themed"));
}

setTheme(localStorage.getItem(THEME));
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem(THEME, dark ? "light" : "dark");
  setTheme(dark ? "light" : "dark");
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(null));
document.getElementById("home").href = linkTo("/");

export function fail(error) {
  const what = error.status === 401
    ? "This address has no token, or an old one."
    : error.message;
  const fix = error.status === 401
    ? "Open the address that lockstep watch printed."
    : error.fix ?? "";
  main.replaceChildren(el("h1", {}, what), el("p", { class: "soft" }, fix));
}

async function show() {
  const [, kind, name] = location.pathname.split("/");
  try {
    if (kind === "run") await runPage(main, decodeURIComponent(name));
    else if (kind === "compare") await comparePage(main, new URLSearchParams(location.search));
    else await listPage(main);
  } catch (error) {
    fail(error);
  }
}

show();
