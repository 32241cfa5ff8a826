"use strict";
// The page's data, how numbers are written, and how elements are made: text goes in as text, never as HTML.

const page = JSON.parse(document.getElementById("page-data").textContent);
const ARRAYS = { f4: Float32Array, i4: Int32Array, u1: Uint8Array };
const columns = Object.fromEntries(Object.entries(page.columns).map(([name, packed]) => [name, unpack(packed)]));
// Of every scored record in rank order, where the other columns may hold a part of very large data.
const groupByRank = page.field ? unpack(page.field.codes) : null;
const drawn = columns.record.length;

function unpack({ type, base64 }) {
  return new ARRAYS[type](Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer);
}

const count = (number) => number.toLocaleString("en-US");
const percent = (share) => `${(100 * share).toLocaleString("en-US", { maximumSignificantDigits: 3 })} %`;
const loss = (nats) => nats.toFixed(3);
const signed = (nats) => `${nats < 0 ? "−" : "+"}${Math.abs(nats).toFixed(3)}`;

/** An element with attributes (true: present, null and false: absent, a function: a listener) and children. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** How many of the drawn records, which stand in rank order, are among the best `size`. */
function drawnAmongBest(size) {
  let low = 0, high = drawn;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (columns.rank[middle] < size) low = middle + 1;
    else high = middle;
  }
  return low;
}
