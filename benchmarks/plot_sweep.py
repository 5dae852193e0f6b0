"""Draws the record of `tidar bench --shape ... --decode-only`, where the machine that measured has no matplotlib.

python benchmarks/plot_sweep.py RECORD.json PICTURE.png
"""

import sys
from pathlib import Path

from tidar.bench.record import read_record
from tidar.bench.sweep_plot import save_sweep

if __name__ == "__main__":
    source, picture = map(Path, sys.argv[1:])
    save_sweep(read_record(source), picture)
