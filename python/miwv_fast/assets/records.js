// The table of records: which are listed, in which order, and what a row shows when it is opened.

const PAGE_ROWS = 25;
// A row is a place among the drawn records, or `drawn` plus a place among the rejected ones.
const place = (row) => (row < drawn ? row : null);
const rejectedAt = (row) => page.rejected[row - drawn];
const recordOf = (row) => (row < drawn ? columns.record[row] : rejectedAt(row).record);
const statusOf = (row) => (row < drawn ? page.statuses[columns.status[row]] : rejectedAt(row).status);
const groupOf = (row) => page.field.values[row < drawn ? groupByRank[columns.rank[row]] : rejectedAt(row).group];
const textOf = (record) => page.texts[record];

const COLUMNS = [
  { key: "rank", title: "Rank", value: (row) => (row < drawn ? columns.rank[row] : Infinity), show: (row) => (row < drawn ? count(columns.rank[row] + 1) : "–") },
  numeric("miwv", "MIWV", signed, "One-shot minus zero-shot loss, nats per token"),
  { ...numeric("one", "One-shot", loss, "Loss behind the demonstration, nats per token"), wide: true },
  { ...numeric("zero", "Zero-shot", loss, "Loss of the record alone, nats per token"), wide: true },
  { ...numeric("tokens", "Tokens", count, "Response tokens that were scored"), wide: true },
  { ...numeric("similarity", "Similarity", loss, "Cosine of the record and its demonstration"), wide: true },
  { key: "status", title: "Status", value: statusOf, show: statusOf, wide: true },
  page.field && { key: "group", title: page.field.name, value: groupOf, show: groupOf, wide: true, text: true },
].filter(Boolean);

function numeric(key, title, format, help) {
  const value = (row) => (row < drawn ? columns[key][row] : -Infinity);
  return { key, title, help, value, show: (row) => (row < drawn ? format(columns[key][row]) : "–"), number: true };
}

const listed = { view: "top", query: "", key: "rank", descending: false, from: 0, open: new Set() };

function rowsOfView() {
  const ends = Math.min(page.extremes, drawn);
  const span = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);
  if (listed.view === "top") return span(0, ends);
  if (listed.view === "bottom") return span(drawn - ends, drawn).reverse();
  if (listed.view === "rejected") return span(drawn, drawn + page.rejected.length);
  return span(0, drawn + page.rejected.length);
}

function matches(row, query) {
  const record = recordOf(row);
  if (query.startsWith("#")) return String(record) === query.slice(1);
  const told = textOf(record);
  const parts = [String(record), statusOf(row), page.field ? groupOf(row) : "", told?.id, told?.system, told?.raw, told?.reason];
  return [...parts, ...(told?.turns ?? []).flat()].some((part) => part?.toLowerCase().includes(query));
}

function rowsInOrder() {
  const query = listed.query.trim().toLowerCase();
  const rows = query ? rowsOfView().filter((row) => matches(row, query)) : rowsOfView();
  if (listed.key === null) return rows;
  const { value } = COLUMNS.find(({ key }) => key === listed.key);
  const sign = listed.descending ? -1 : 1;
  return rows.sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    return left < right ? -sign : left > right ? sign : a - b;
  });
}

function showTable() {
  const rows = rowsInOrder();
  listed.from = Math.min(listed.from, Math.max(0, Math.ceil(rows.length / PAGE_ROWS) - 1) * PAGE_ROWS);
  const shown = rows.slice(listed.from, listed.from + PAGE_ROWS);
  document.getElementById("table-head").replaceChildren(headRow());
  document.getElementById("table-body").replaceChildren(...shown.flatMap(tableRows));
  const to = listed.from + shown.length;
  document.getElementById("table-count").textContent = rows.length
    ? `${count(listed.from + 1)}–${count(to)} of ${count(rows.length)} records`
    : "No record matches.";
  document.getElementById("previous").disabled = listed.from === 0;
  document.getElementById("next").disabled = to >= rows.length;
}

function headRow() {
  const cells = COLUMNS.map((column) => {
    const sorted = listed.key === column.key ? (listed.descending ? "descending" : "ascending") : null;
    const sort = () => {
      listed.descending = sorted ? !listed.descending : Boolean(column.number);
      listed.key = column.key;
      listed.from = 0;
      showTable();
      document.querySelector(`[data-sort="${column.key}"]`).focus();
    };
    const button = element("button", { type: "button", click: sort, "data-sort": column.key, title: column.help ?? null }, column.title);
    return element("th", { scope: "col", "aria-sort": sorted, class: cellClass(column) }, button);
  });
  return element("tr", {}, ...cells, element("th", { scope: "col", class: "prompt" }, "Prompt"));
}

const cellClass = ({ number, wide, key, text }) =>
  [number || key === "rank" ? "number" : "word", wide ? "wide" : "", text ? "clip" : ""].join(" ").trim();

function tableRows(row) {
  const record = recordOf(row);
  const open = listed.open.has(record);
  const toggle = () => {
    if (!listed.open.delete(record)) listed.open.add(record);
    showTable();
    document.getElementById(`row-${record}`).focus();
  };
  const cells = COLUMNS.map((column) =>
    element("td", { class: cellClass(column), dir: column.text ? "auto" : null }, String(column.show(row))),
  );
  const told = textOf(record);
  const line = told ? (told.turns?.[0][0] ?? told.raw).slice(0, 300) : "text not kept in this report";
  const opener = element(
    "button",
    { type: "button", id: `row-${record}`, class: "opener", "aria-expanded": String(open), "aria-controls": open ? `detail-${record}` : null, click: toggle },
    element("span", { class: "number-tag" }, `#${record}`),
    element("span", { class: told ? "line" : "line absent", dir: "auto" }, line),
  );
  const selected = row < drawn && columns.rank[row] < selection.size;
  const made = [element("tr", { class: selected ? "selected" : null }, ...cells, element("td", { class: "prompt" }, opener))];
  if (open) {
    const detail = element("td", { colspan: COLUMNS.length + 1 }, recordDetail(row));
    made.push(element("tr", { class: "detail", id: `detail-${record}` }, detail));
  }
  return made;
}

function recordDetail(row) {
  const record = recordOf(row);
  const told = textOf(record);
  const fact = (kind, title, value) => element("div", { class: kind }, element("dt", {}, title), element("dd", { dir: "auto" }, value));
  const facts = COLUMNS.map((column) => fact("narrow", column.title, String(column.show(row))));
  if (told?.id) facts.push(fact("", "Id", told.id));
  const parts = [element("dl", { class: "facts" }, ...facts)];
  if (told?.reason) parts.push(passage("Why it was rejected", told.reason), passage("As it came", told.raw));
  if (told?.system) parts.push(passage("System", told.system));
  const explained = page.explanations[record];
  for (const [prompt, response] of told?.turns ?? []) {
    parts.push(passage("Prompt", prompt));
    if (!explained || told.turns.length > 1) parts.push(passage("Response", response));
  }
  if (explained) parts.push(heatMap(explained));
  if (place(row) !== null) parts.push(demonstration(columns.neighbor[row], columns.similarity[row]));
  return element("div", {}, ...parts);
}

function demonstration(neighbor, similarity) {
  const told = textOf(neighbor);
  const summary = element("summary", {}, `Demonstration: record #${neighbor}, similarity ${loss(similarity)}`);
  if (!told) return element("p", { class: "note" }, summary.textContent);
  const turns = (told.turns ?? []).flatMap(([prompt, response]) => [passage("Its prompt", prompt), passage("Its response", response)]);
  return element("details", { open: true }, summary, ...turns);
}

function passage(title, text) {
  const body = element("div", { class: "text", dir: "auto", tabindex: text.length > 600 ? "0" : null }, text || "(empty)");
  return element("section", {}, element("h4", {}, title), body);
}

/** The response with each token shaded by what the demonstration did to its loss. */
function heatMap({ tokens, one, zero, left }) {
  const strongest = Math.max(0.5, ...one.map((nats, i) => Math.abs(nats - zero[i])));
  const shown = tokens.map((token, i) => {
    const difference = one[i] - zero[i];
    const depth = Math.round((70 * Math.abs(difference)) / strongest);
    const told = `${signed(difference)} nats: one-shot ${loss(one[i])}, zero-shot ${loss(zero[i])}`;
    const cell = element("span", { class: difference > 0 ? "hurts" : "helps", title: told }, token);
    cell.style.setProperty("--depth", `${depth}%`);
    return cell;
  });
  if (left) shown.push(`… (${count(left)} more tokens)`);
  const scale = `Red: the demonstration raises the token's loss; blue: it lowers it. The deepest shade is ${loss(strongest)} nats.`;
  return element("section", {}, element("h4", {}, "Response, token by token"), element("div", { class: "text heat", dir: "auto" }, ...shown), element("p", { class: "note" }, scale));
}

/** Lists one record alone, opened. */
function showRecord(record) {
  Object.assign(listed, { view: "all", query: `#${record}`, from: 0, open: new Set([record]) });
  document.getElementById("search").value = listed.query;
  document.querySelector('input[name="view"][value="all"]').checked = true;
  showTable();
  document.getElementById("records").scrollIntoView();
}

function startTable() {
  let pending;
  document.getElementById("search").addEventListener("input", ({ target }) => {
    clearTimeout(pending);
    pending = setTimeout(() => {
      Object.assign(listed, { query: target.value, from: 0 });
      showTable();
    }, 120);
  });
  for (const choice of document.querySelectorAll('input[name="view"]')) {
    choice.addEventListener("change", () => {
      Object.assign(listed, { view: choice.value, from: 0, key: "rank", descending: choice.value === "bottom" });
      showTable();
    });
  }
  for (const [id, step] of [["previous", -PAGE_ROWS], ["next", PAGE_ROWS]]) {
    document.getElementById(id).addEventListener("click", () => {
      listed.from += step;
      showTable();
    });
  }
  showTable();
}
