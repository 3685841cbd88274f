"Write the explorers of the site from the runs of `make demo`: `python tests/living.py`"
import os
from pathlib import Path

from cprfl.look.attention import gives_attention
from cprfl.look.choice import choose_runs
from cprfl.look.explorers import AttentionExplorer, DriftExplorer, PredictionExplorer
from cprfl.look.living import write_page
from cprfl.look.run_page import run_page

FOLDER = Path(__file__).parents[1] / 'nbs/analysis/living'


def main():
    os.environ.setdefault('CPRFL_RUNS', 'runs/demo')
    runs = choose_runs(None, random=False)
    name = [name for name, run in runs.items() if gives_attention(run.model())][-1]
    prompts = choose_runs(None, having='prompts.safetensors')
    predictions = PredictionExplorer(runs)
    attention = {name: AttentionExplorer(run) for name, run in runs.items() if run.recipe.learns}
    drift = {name: DriftExplorer(run) for name, run in sorted(prompts.items(), key=lambda item: item[0] != name)}
    files = [*write_page(FOLDER / 'top3.html', {'': predictions}, 'Best labels'),
             *write_page(FOLDER / 'attention.html', {'': attention}, 'Where the models look'),
             *write_page(FOLDER / 'drift.html', {'': drift}, 'How the prompts move'),
             *run_page(runs.pop(name), FOLDER / 'report.html', runs)]
    for file in files: print(f'{file.name}: {file.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__': main()
