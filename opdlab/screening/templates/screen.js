"use strict";
/** The button of the theme; the choice is kept for the other pages too, where a browser keeps anything for files. */
function remembered(value) {
  try {
    if (value) localStorage.setItem("opdlab-theme", value);
    return localStorage.getItem("opdlab-theme");
  } catch { return null; }
}

const themes = ["auto", "light", "dark"];
const button = document.getElementById("theme");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  button.textContent = `theme: ${theme}`;
}

button.addEventListener("click", () => {
  setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
  remembered(document.documentElement.dataset.theme);
});
setTheme(themes.find((theme) => theme === remembered()) || "auto");
