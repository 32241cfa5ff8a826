// What the reader moves: the size of the selection, the colouring; and the theme, which follows the system.

const SMOOTH_MS = 100;
const RESTING_MS = 200;
const selection = { size: page.selected, sizes: selectionSizes(), coloring: "selection", cost: 0, pending: 0 };

/** The sizes that the slider stops at: about 400, evenly apart on a logarithmic scale, and the one asked for. */
function selectionSizes() {
  const sizes = new Set([page.selected]);
  for (let i = 0; i <= 400; i++) sizes.add(Math.round(page.scored ** (i / 400)));
  return [...sizes].sort((a, b) => a - b);
}

/** As `Scores.select` counts: a share of all records, rounded down, at least one, at most what has a score. */
const sizeOfShare = (share) => Math.min(page.scored, Math.max(1, Math.floor(share * page.records * (1 + 1e-12))));

/** The percentage of fewest digits that selects `size` records: 10, not 9.75, where that is 31 of 318. */
function shortestPercent(size) {
  for (let digits = 0; digits < 8; digits++) {
    const rounded = Math.ceil((100 * size * 10 ** digits) / page.records) / 10 ** digits;
    if (rounded <= 100 && sizeOfShare(rounded / 100) === size) return rounded;
  }
  return (100 * size) / page.records;
}

/** Selects the best `size` records. Texts follow at once; plots too, unless the last time they took so long that a
 *  slider would stutter: then they follow when it rests. */
function select(size, { keepInput = false } = {}) {
  selection.size = size;
  const slider = document.getElementById("share");
  slider.value = selection.sizes.findIndex((each) => each >= size);
  slider.setAttribute("aria-valuetext", `${percent(size / page.records)}, ${count(size)} records`);
  if (!keepInput) {
    const box = document.getElementById("share-number");
    box.value = shortestPercent(size);
    box.removeAttribute("aria-invalid");
  }
  document.getElementById("selected-count").textContent = `${count(size)} of ${count(page.records)} records`;
  document.getElementById("selected-threshold").textContent = `MIWV ≥ ${signed(thresholdOf(size))} nats per token`;
  clearTimeout(selection.pending);
  selection.pending = setTimeout(draw, selection.cost > SMOOTH_MS ? RESTING_MS : 0);
}

function draw() {
  const begin = performance.now();
  moveSelection(selection.size);
  if (page.field) showShares(selection.size);
  showTable();
  requestAnimationFrame(() => setTimeout(() => (selection.cost = performance.now() - begin)));
}

function showShares(size) {
  const { values, counts } = page.field;
  const chosen = new Array(values.length).fill(0);
  for (let rank = 0; rank < size; rank++) chosen[groupByRank[rank]]++;
  const most = Math.max(...counts.map((all, i) => Math.max(all / page.records, chosen[i] / size)));
  const bar = (kind, share) => {
    const drawnBar = element("span", { class: `bar ${kind}`, "aria-hidden": "true" });
    drawnBar.style.width = `${(100 * share) / most}%`;
    return drawnBar;
  };
  const rows = values.map((value, i) => {
    const [whole, part] = [counts[i] / page.records, chosen[i] / size];
    const bars = element("td", { class: "bars" }, bar("whole", whole), bar("part", part));
    const numbers = [count(counts[i]), percent(whole), count(chosen[i]), percent(part), `${(part / whole).toFixed(2)}×`];
    const cells = numbers.map((text, place) => element("td", { class: place < 3 ? "number wide" : "number" }, text));
    return element("tr", {}, element("th", { scope: "row", class: "clip", dir: "auto" }, value), bars, ...cells);
  });
  document.getElementById("shares-body").replaceChildren(...rows);
}

function color(coloring) {
  selection.coloring = coloring;
  paintPlots(coloring);
  const groups = COLORINGS[coloring];
  const present = groups ? groups.names.slice(0, PALETTE_SIZE).map((name, i) => [name, `--group-${i}`]) : [["selected", "--accent"], ["not selected", "--muted"]];
  if (groups && groups.names.length > PALETTE_SIZE) present.push([`${groups.names.length - PALETTE_SIZE} others`, "--muted"]);
  const chips = present.map(([name, variable]) => {
    const chip = element("span", { class: "chip", "aria-hidden": "true" });
    chip.style.background = `var(${variable})`;
    return element("li", {}, chip, element("span", { class: "clip", dir: "auto" }, name));
  });
  document.getElementById("legend").replaceChildren(...chips);
}

function startControls() {
  const slider = document.getElementById("share");
  slider.max = selection.sizes.length - 1;
  slider.addEventListener("input", () => select(selection.sizes[slider.value]));
  document.getElementById("share-number").addEventListener("input", ({ target }) => {
    const share = Number(target.value) / 100;
    const valid = share > 0 && share <= 1;
    target.setAttribute("aria-invalid", String(!valid));
    if (valid) select(sizeOfShare(share), { keepInput: true });
  });
  document.getElementById("coloring").addEventListener("change", ({ target }) => {
    color(target.value);
    moveSelection(selection.size);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    color(selection.coloring);
    moveSelection(selection.size);
  });
}

async function start() {
  startTable();
  startControls();
  await drawPlots();
  color("selection");
  select(page.selected);
  clearTimeout(selection.pending);
  draw();
  document.documentElement.dataset.ready = "true";
}

start();
