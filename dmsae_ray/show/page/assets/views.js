// One view at a time, named by the address after #; #feature=<id> opens the browser at that feature.
function route() {
  const address = location.hash.slice(1);
  const feature = address.startsWith("feature=") ? decodeURIComponent(address.slice("feature=".length)) : null;
  const name = feature !== null ? "features" : address;
  const views = [...document.querySelectorAll(".view")];
  const view = views.find((candidate) => candidate.id === `view-${name}`) ?? views[0];
  for (const other of views) other.classList.toggle("current", other === view);
  for (const link of document.querySelectorAll("nav a")) {
    if (`view-${link.hash.slice(1)}` === view.id) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else {
      link.removeAttribute("aria-current");
    }
  }
  drawCharts(view);
  if (view.id === "view-features" && browser) {
    openFeatures();
    showFeature(feature ?? (currentFeature ?? shownFeatures[0])?.id);
  }
}

document.documentElement.classList.add("scripted");
addEventListener("hashchange", () => {
  route();
  if (!location.hash.startsWith("#feature=")) scrollTo(0, 0);
});
route();
document.documentElement.dataset.ready = "yes";
