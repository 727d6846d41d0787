// Light or dark: as the system says until the reader says otherwise, remembered where the browser allows it.
const themeButton = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
try {
  chosenTheme = localStorage.getItem("dmsae-theme");
} catch {
  // Storage can be forbidden to a page opened from disk; the choice then lasts as long as the page.
}

function theme() {
  return chosenTheme ?? (systemDark.matches ? "dark" : "light");
}

function showTheme() {
  document.documentElement.dataset.theme = theme();
  themeButton.setAttribute("aria-pressed", String(theme() === "dark"));
  document.dispatchEvent(new Event("themechange"));
}

themeButton.addEventListener("click", () => {
  chosenTheme = theme() === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("dmsae-theme", chosenTheme);
  } catch {
    // As above.
  }
  showTheme();
});
systemDark.addEventListener("change", showTheme);
showTheme();
