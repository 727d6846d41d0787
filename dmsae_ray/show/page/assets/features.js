// The feature browser: search, sort, filter, and one feature in detail. Texts enter the page as text nodes only.
const browser = document.getElementById("browser");
let features = null; // read when the browser is first opened
let shownFeatures = [];
let currentFeature = null;

const share = (value) => (value == null ? "n/a" : value.toFixed(3));
const significant = (value, digits = 3) =>
  value == null ? "n/a" : value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
const signed = (value) => (value > 0 ? "+" : "") + significant(value);
const percent = (value) => (value == null ? "n/a" : `${significant(100 * value, 2)} %`);
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
const compareIds = new Intl.Collator("en", { numeric: true }).compare;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (value != null) made.setAttribute(attribute, value);
  }
  made.append(...children);
  return made;
}

const number = (value, words, unit = "") =>
  element("span", { class: "number", "data-value": value ?? "", title: value ?? "not available" }, words + (unit && value != null ? ` ${unit}` : ""));

function seedsOf(feature) {
  return `${feature.in_seeds} of ${feature.n_seeds} seed${feature.n_seeds === 1 ? "" : "s"}`;
}

function openFeatures() {
  if (features) return;
  features = JSON.parse(document.getElementById("data-features").textContent);
  for (const feature of features) {
    // Contexts joined without separators between tokens, so that words of several tokens are found.
    feature.words = [feature.id, ...feature.contexts.map((context) => context.tokens.join(""))].join("\n").toLowerCase();
    feature.item = listItem(feature);
  }
  applyFilters();
}

const TOKENS_IN_LABEL = 3;
// From here on, what a latent is most active on says little of what it is: it is active almost anywhere.
const DENSE = 0.5;

// The tokens on which it is most active, each once: one alone would pass for the meaning of a feature that has many.
function peaksOf(feature) {
  const found = new Map();
  for (const context of feature.contexts) {
    // Indentations of any depth are one token here, written as the space that one would not see.
    const token = context.tokens[context.peak];
    const word = visible(token.trim() || token.replace(/ +/g, "␣"));
    if (context.activations[context.peak] > 0 && !found.has(word.toLowerCase())) found.set(word.toLowerCase(), word);
  }
  return [...found.values()].slice(0, TOKENS_IN_LABEL);
}

function labelOf(feature) {
  const peaks = peaksOf(feature).join(" · ");
  if (!peaks) return element("span", { class: "peak dense" }, "never active");
  if (feature.density >= DENSE) {
    return element("span", { class: "peak dense", title: `strongest on ${peaks}` }, `on ${percent(feature.density)} of tokens`);
  }
  return element("code", { class: "peak", title: peaks }, peaks);
}

// What the list's last column shows: what it is sorted by.
const columns = {
  elsewhere: ["Share", (feature) => number(feature.score, share(feature.score))],
  density: ["Density", (feature) => number(feature.density, percent(feature.density))],
  cosine: ["Cosine", (feature) => number(feature.cosine, share(feature.cosine))],
};

function showColumn(sort) {
  const [heading, cell] = columns[sort] ?? columns.elsewhere;
  const place = document.getElementById("feature-column");
  if (place.textContent === heading) return;
  place.textContent = heading;
  for (const feature of features) feature.item.querySelector(".number").replaceWith(cell(feature));
}

function listItem(feature) {
  const item = element(
    "li",
    { role: "option", id: `option-${feature.id}`, "data-id": feature.id, "aria-selected": "false" },
    element("span", { class: "id" }, feature.id),
    labelOf(feature),
    element("span", { class: "seeds", title: `found in ${seedsOf(feature)}` }, `${feature.in_seeds}/${feature.n_seeds}`),
    number(feature.score, share(feature.score)),
  );
  const bar = element("span", { class: "meter", "aria-hidden": "true" });
  bar.style.setProperty("--share", feature.elsewhere ?? 0);
  item.append(bar);
  return item;
}

function applyFilters() {
  const field = (name) => document.getElementById(`feature-${name}`).value;
  const [words, kind, chain, least, sort] = [field("search").toLowerCase(), field("kind"), field("chain"), Number(field("least")), field("sort")];
  document.getElementById("feature-least-shown").textContent = `${Math.round(100 * least)} %`;
  shownFeatures = features.filter(
    (feature) =>
      (!kind || feature.kind === kind) &&
      (!chain || feature.chains.includes(chain)) &&
      (!least || (feature.elsewhere ?? 0) >= least) &&
      feature.words.includes(words),
  );
  showColumn(sort);
  const larger = (a, b) => (a[sort] == null) - (b[sort] == null) || b[sort] - a[sort] || (b.score ?? 0) - (a.score ?? 0);
  shownFeatures.sort((a, b) => (sort === "id" ? 0 : larger(a, b)) || compareIds(a.id, b.id));
  document.getElementById("feature-list").replaceChildren(...shownFeatures.map((feature) => feature.item));
  const count = shownFeatures.length === features.length ? features.length : `${shownFeatures.length} of ${features.length}`;
  document.getElementById("feature-count").textContent = `${count} features`;
}

function showFeature(id) {
  openFeatures();
  const feature = features.find((candidate) => candidate.id === id);
  const detail = document.getElementById("feature-detail");
  if (currentFeature) currentFeature.item.setAttribute("aria-selected", "false");
  currentFeature = feature ?? null;
  if (!feature) {
    const words = id ? `There is no feature ${id} on this page.` : "No feature fits. Clear the search or lower the bounds.";
    detail.replaceChildren(element("p", { class: "note" }, words));
    return;
  }
  feature.item.setAttribute("aria-selected", "true");
  document.getElementById("feature-list").setAttribute("aria-activedescendant", feature.item.id);
  feature.item.scrollIntoView({ block: "nearest" });
  detail.replaceChildren(...featureDetail(feature));
  detail.scrollTop = 0;
}

function featureDetail(feature) {
  const kind = feature.kind === "consensus" ? "consensus feature" : "latent of a single core";
  const interval = feature.interval ? ` (95 % interval ${share(feature.interval[0])} to ${share(feature.interval[1])})` : "";
  const fact = (name, ...value) => element("div", {}, element("dt", {}, name), element("dd", {}, ...value));
  return [
    element("h3", {}, feature.id, " ", element("small", {}, kind)),
    element(
      "dl",
      { class: "facts" },
      fact("Reproducibility", number(feature.elsewhere, share(feature.elsewhere)), ` of the other seeds${interval}; in ${seedsOf(feature)}, ${feature.in_chains} of ${feature.n_chains} chains`),
      fact("Attribution share", number(feature.score, share(feature.score)), " of its core"),
      fact("Density", number(feature.density, percent(feature.density)), feature.density >= DENSE ? " of tokens, so its strongest texts say little" : " of tokens"),
      fact("Cosine of members", number(feature.cosine, share(feature.cosine)), ...(feature.smallest_cosine == null ? [] : [", smallest ", number(feature.smallest_cosine, share(feature.smallest_cosine))])),
      fact("Largest activation", number(feature.max_activation, significant(feature.max_activation))),
      fact("Loss without it", number(feature.mean_loss_change, signed(feature.mean_loss_change)), " nats per token of the texts below"),
      fact("Shown latent", `${feature.representative.latent} of ${feature.representative.chain}`),
    ),
    element("h4", {}, "Where it is active"),
    ...(feature.contexts.length ? [contextList(feature)] : [element("p", { class: "note" }, "It was active on none of the tokens looked at.")]),
    element("h4", {}, "What its removal changes"),
    ...(feature.effects.length ? [effectTable(feature)] : [element("p", { class: "note" }, "No effect on the loss was measured for it.")]),
    element("h4", {}, "In other chains"),
    ...(feature.partners.length ? [partnerTable(feature)] : [element("p", { class: "note" }, "No other chain has it in its core.")]),
  ];
}

function contextList(feature) {
  const list = element("ol", { class: "contexts" });
  for (const context of feature.contexts) {
    const text = element("p", { class: "context" });
    for (const [place, token] of context.tokens.entries()) {
      const activation = context.activations[place];
      const span = element("span", { title: `${visible(token)} · activation ${activation}`, "data-value": activation }, visible(token));
      if (activation > 0) {
        span.className = place === context.peak ? "token active peak" : "token active";
        span.style.setProperty("--strength", feature.max_activation > 0 ? Math.min(1, activation / feature.max_activation) : 0);
      }
      text.append(span);
    }
    const peak = context.activations[context.peak];
    const where = element("span", { class: "where" }, number(peak, significant(peak)), ` at token ${context.document_token} of its document${context.spread ? ", one of its weaker texts" : ""}`);
    list.append(element("li", {}, text, where));
  }
  return list;
}

function smallTable(id, caption, headings, rows) {
  const head = element("tr", {}, ...headings.map((heading) => element("th", { scope: "col" }, heading)));
  const body = element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)))));
  const table = element("table", { id }, element("caption", {}, caption), element("thead", {}, head), body);
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
}

function effectTable(feature) {
  const rows = feature.effects.map((effect) => {
    const text = element("span", { class: "context" }, visible(effect.before), element("mark", {}, visible(effect.token)), visible(effect.after));
    return [text, number(effect.delta, signed(effect.delta)), effect.delta > 0 ? "▲ harder to predict" : "▼ easier to predict"];
  });
  return smallTable("feature-effects", "Tokens whose loss changes most without the feature", ["Token in its text", "Change (nats)", "Without it the token is"], rows);
}

function partnerTable(feature) {
  const rows = feature.partners.map((partner) => [
    partner.chain,
    number(partner.latent, String(partner.latent)),
    number(partner.cosine, share(partner.cosine)),
    number(partner.score, share(partner.score)),
    number(partner.density, percent(partner.density)),
  ]);
  return smallTable("feature-partners", "Latents of other chains that are this feature", ["Chain", "Latent", "Decoder cosine", "Attribution share", "Density (of tokens)"], rows);
}

function goToFeature(feature) {
  // Written without a new entry in the history: going back leaves the browser, not the last of many features.
  if (feature) history.replaceState(null, "", `#feature=${encodeURIComponent(feature.id)}`);
  showFeature(feature?.id);
}

function moveBy(step) {
  if (!shownFeatures.length) return;
  const at = shownFeatures.indexOf(currentFeature);
  const next = at < 0 ? 0 : Math.min(shownFeatures.length - 1, Math.max(0, at + step));
  goToFeature(shownFeatures[next]);
}

function changed() {
  applyFilters();
  if (!shownFeatures.includes(currentFeature)) goToFeature(shownFeatures[0]);
}

if (browser) {
  const search = document.getElementById("feature-search");
  const list = document.getElementById("feature-list");
  browser.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  browser.querySelector("form").addEventListener("input", changed);
  list.addEventListener("click", (event) => {
    const item = event.target.closest("[data-id]");
    if (item) goToFeature(features.find((feature) => feature.id === item.dataset.id));
  });
  document.addEventListener("keydown", (event) => {
    if (!document.getElementById("view-features").classList.contains("current")) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target.closest("input, select");
    if (event.key === "Escape") {
      search.value = "";
      changed();
      list.focus();
    } else if (field && !(field === search && event.key === "ArrowDown")) {
      return;
    } else if (event.key === "/") {
      search.focus();
      search.select();
    } else if (event.key === "ArrowDown" && field === search) {
      list.focus();
    } else if (event.key === "j" || (event.key === "ArrowDown" && !event.target.closest(".feature-detail"))) {
      moveBy(1);
    } else if (event.key === "k" || (event.key === "ArrowUp" && !event.target.closest(".feature-detail"))) {
      moveBy(-1);
    } else if (event.key === "Home" && event.target === list) {
      goToFeature(shownFeatures[0]);
    } else if (event.key === "End" && event.target === list) {
      goToFeature(shownFeatures.at(-1));
    } else {
      return;
    }
    event.preventDefault();
  });
}
