"""Draws records of `tidar bench --shape ... --decode-only`, where the machine that measured has no matplotlib.

python benchmarks/plot_sweep.py RECORD.json [OTHER.json ...] PICTURE.png

Cells that the first record lacks, because it was interrupted, come from the others.
"""

import sys
from pathlib import Path

from tidar.bench.record import read_record
from tidar.bench.sweep_plot import save_sweep

if __name__ == "__main__":
    *sources, picture = map(Path, sys.argv[1:])
    record, *others = map(read_record, sources)
    known = {(cell["context"], cell["batch"]) for cell in record["cells"]}
    for other in others:
        added = [c for c in other["cells"] if (c["context"], c["batch"]) not in known]
        known |= {(cell["context"], cell["batch"]) for cell in added}
        record["cells"] += added
    save_sweep(record, picture)
