// Set dark or light colours before the page is painted: the earlier choice, otherwise the preference of the system.
(() => {
  const chosen = localStorage.getItem("engine-health.theme");
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
