"""A report of the size of Alpaca: its bytes, how long writing, opening and moving the selection take.

    python benchmarks/report.py --output benchmarks/results/report.json

The texts are Alpaca's, the scores are drawn at random. Needs MIWV_DATA (a folder with alpaca_52002.jsonl.xz), the
extra `test`, and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

import bokeh
import numpy as np
import pyarrow as pa
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from command_line import processor
from miwv_fast.scores import SCHEMA, Scores
from miwv_fast.sources import open_source

FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --window-size=1280,900"
MOVE = """
const done = arguments[0], frame = () => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)));
(async () => {
  const times = {};
  for (const share of [0.1, 1, 5, 10, 50, 100]) {
    const begin = performance.now();
    select(sizeOfShare(share / 100));
    clearTimeout(selection.pending);
    draw();
    await frame();
    times[`${share}%`] = Math.round(performance.now() - begin);
  }
  done(times);
})();
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row.value for row in open_source(Path(os.environ["MIWV_DATA"]) / "alpaca_52002.jsonl.xz").rows()]
    for number, row in enumerate(rows):
        row["source"] = f"source {number % 5}"
    scores = Scores(random_table(rows), {}, open_source(rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        begin = time.process_time()
        scores.report(path)
        summary = {
            "script": "python benchmarks/report.py",
            "date": date.today().isoformat(),
            "device": processor(),
            "load": os.getloadavg()[0],
            "bokeh": bokeh.__version__,
            "records": len(scores),
            "bytes": path.stat().st_size,
            "writing_cpu_seconds": round(time.process_time() - begin, 2),
            **open_in_chromium(path),
        }
    arguments.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def random_table(rows: list[dict[str, str]]) -> pa.Table:
    """Losses as a small model gives them, roughly; records with an empty output have none."""
    state = np.random.default_rng(0)
    n = len(rows)
    empty = np.array([not row["output"].strip() for row in rows])
    tokens = np.array([max(1, len(row["output"]) // 4) for row in rows], np.int32)
    zero = state.gamma(4, 0.35, n).astype(np.float32)
    one = zero + (state.standard_t(4, n) / np.sqrt(tokens) - 0.1).astype(np.float32)
    neighbor, similarity = state.permutation(n), state.beta(9, 3, n).astype(np.float32)
    numbers = (one - zero, one, zero, tokens, neighbor, similarity)
    columns = [pa.array(np.arange(n)), pa.nulls(n, pa.string()), *(pa.array(each, mask=empty) for each in numbers)]
    return pa.table([*columns, pa.array(np.where(empty, "empty_response", "ok"))], schema=SCHEMA)


def open_in_chromium(path: Path) -> dict[str, object]:
    """Milliseconds from opening the file to all of it being drawn, and of moving the selection to some sizes."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS.split():
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get(path.as_uri())
        wait = WebDriverWait(browser, 120, poll_frequency=0.02)
        wait.until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
        ready = browser.execute_script("return Math.round(performance.now())")
        version = browser.capabilities["browserVersion"]
        return {"chromium": version, "ready_ms": ready, "move_selection_ms": browser.execute_async_script(MOVE)}
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
