// Dark or light, before anything is painted: what was chosen here before, else what the system prefers.
(() => {
  const chosen = localStorage.getItem("engine-health.theme");
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
