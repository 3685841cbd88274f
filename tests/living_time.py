"How long a change takes on the living pages: `python tests/living_time.py nbs/analysis/living/*.html`"
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get('CPRFL_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
CHANGE_ALL = """async () => {
    const drawn = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
    const valuesOf = control => control.tagName == 'SELECT' ? [...control.options].map(option => option.value)
        : [control.min, control.max, (+control.min + +control.max) / 2]
    const times = []
    for (const control of document.querySelectorAll('select, input[type=range]'))
        for (const value of valuesOf(control).slice(0, 20)) {
            if (String(value) == control.value) continue
            const start = performance.now()
            control.value = value
            for (const name of ['input', 'change']) control.dispatchEvent(new Event(name, { bubbles: true }))
            const computed = performance.now() - start
            await drawn()
            times.push({ computed, shown: performance.now() - start })
        }
    return times
}"""


def main(files):
    "A row for each page: changes, and milliseconds until they are computed and shown (two frames of the screen)"
    rows = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1280, height=900))
        for file in files:
            page.goto(Path(file).resolve().as_uri(), wait_until='load')
            times = pd.DataFrame(page.evaluate(CHANGE_ALL))
            worst = {f'{name}, worst': value for name, value in times.max().items()}
            rows[Path(file).name] = dict(changes=len(times), **times.median(), **worst)
        browser.close()
    print(pd.DataFrame(rows).T.round(1).to_string())


if __name__ == '__main__': main(sys.argv[1:])
