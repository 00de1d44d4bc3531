"use strict";
// The theme button, and the hint on tables that scroll. The button cycles through system, dark and light; the choice is stored if storage is allowed.
(() => {
  const button = document.getElementById("theme");
  const words = { "": "Theme: system", dark: "Theme: dark", light: "Theme: light" };
  const order = ["", "dark", "light"];
  let theme = "";
  const stored = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("dynarank-theme") || "";
      localStorage.setItem("dynarank-theme", value);
    } catch { /* a page opened as a file may have no storage */ }
    return "";
  };
  const show = (next) => {
    theme = order.includes(next) ? next : "";
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    button.textContent = words[theme];
    document.dispatchEvent(new Event("themechange"));
  };
  show(stored());
  button.hidden = false;
  button.addEventListener("click", () => {
    show(order[(order.indexOf(theme) + 1) % order.length]);
    stored(theme);
  });

  const tables = [...document.querySelectorAll(".wide")];
  const hint = () => {
    for (const table of tables) table.classList.toggle("scrolls", table.scrollWidth > table.clientWidth + 1);
  };
  hint();
  const observer = new ResizeObserver(hint);
  for (const table of tables) observer.observe(table);
})();
