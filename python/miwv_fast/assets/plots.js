// The four plots: Bokeh draws them, this fills them, colours them and moves the selection.

const plots = {};
let strong = new Uint32Array(drawn);

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgba = (hex, alpha) => ((parseInt(hex.slice(1), 16) << 8) | alpha) >>> 0;

/** The groups that points can be coloured by: their names, and the group of each drawn record. */
const COLORINGS = {
  // The two that have a score stand first.
  status: { names: page.statuses.filter((name) => name === "ok" || name === "truncated"), of: (i) => columns.status[i] },
  field: page.field && { names: page.field.values, of: (i) => groupByRank[columns.rank[i]] },
};
const PALETTE_SIZE = 8;

async function drawPlots() {
  Bokeh.logger.set_level("warn");
  for (const [name, { item, x, y }] of Object.entries(page.figures)) {
    const [view] = await Bokeh.embed.embed_item(item, `plot-${name}`);
    const plot = view.model;
    // The table has what the plots show; Tab goes there at once.
    view.el.tabIndex = -1;
    const find = (model) => plot.document.get_model_by_name(model);
    plots[name] = { view, plot, find, x: columns[x], y: columns[y] };
    find("points")?.selected.properties.indices.change.connect(() => showRecordAt(find("points")));
  }
}

/** Colours of the page's theme, and of the points by what the user chose. */
function paintPlots(coloring) {
  const [ink, grid, accent] = ["--ink-soft", "--rule", "--accent"].map(style);
  for (const { plot, find } of Object.values(plots)) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.setv({ axis_label_text_color: ink, major_label_text_color: ink, major_tick_line_color: grid });
    }
    for (const line of plot.center) if ("grid_line_color" in line.attributes) line.setv({ grid_line_color: grid });
    find("bars")?.glyph.setv({ fill_color: style("--muted"), line_color: style("--surface") });
    find("shade")?.setv({ fill_color: accent });
    find("threshold").setv({ line_color: accent });
    find("diagonal")?.setv({ line_color: ink });
  }
  const chosen = COLORINGS[coloring];
  const palette = Array.from({ length: PALETTE_SIZE }, (_, group) => style(`--group-${group}`));
  const rest = style("--muted");
  const faint = Number(style("--faint-alpha"));
  const faded = new Uint32Array(drawn);
  strong = new Uint32Array(drawn);
  for (let i = 0; i < drawn; i++) {
    const hex = chosen ? palette[chosen.of(i)] ?? rest : null;
    faded[i] = rgba(hex ?? rest, faint);
    strong[i] = rgba(hex ?? accent, 0xe6);
  }
  const { record, miwv, one, zero, tokens, similarity } = columns;
  for (const { find, x, y } of scatterPlots()) {
    find("points").data = { x, y, color: faded, record, miwv, one, zero, tokens, similarity };
  }
}

/** The MIWV of the last of the best `size` records. */
const thresholdOf = (size) => columns.miwv[drawnAmongBest(size) - 1];

/** Puts the best `size` records into the layer on top and the threshold where the last of them lies. */
function moveSelection(size) {
  const best = drawnAmongBest(size);
  const threshold = thresholdOf(size);
  for (const { find, x, y } of scatterPlots()) {
    find("best").data = { x: x.subarray(0, best), y: y.subarray(0, best), color: strong.subarray(0, best) };
  }
  for (const [name, { find }] of Object.entries(plots)) {
    find("threshold").setv(name === "losses" ? { y_intercept: threshold } : { location: threshold });
    find("shade")?.setv({ left: threshold });
  }
}

function scatterPlots() {
  return Object.values(plots).filter(({ find }) => find("points"));
}

function showRecordAt(points) {
  const [place] = points.selected.indices;
  if (place !== undefined) showRecord(columns.record[place]);
}
