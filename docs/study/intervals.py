"""Differences in top-1 between the rows of the same run folder.

Reads results.json of each folder, which evaluate.py writes. Prints, over all folders, the mean and
the standard deviation of each difference, the 95 % interval of the mean (Student's t), and the
number of folders in which the difference is above 0.

    python docs/study/intervals.py runs/study-* --against labeled_only.pt student_mean.pt
    python docs/study/intervals.py docs/study/seed-*.json --against student_random_alone.pt
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import UserError, command  # before numpy and torch: see its imports

import numpy as np

from evaluate import print_table, spread


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH",
                        help="run folders, or results.json of some")
    parser.add_argument("--against", nargs="+", default=["labeled_only.pt"], metavar="ROW",
                        help="rows that are subtracted from all others (default labeled_only.pt)")
    args = parser.parse_args(argv)
    runs = []  # of each folder {row's name: top-1}
    for path in args.paths:
        runs.append({name: row["top1"] for name, row in read_rows(path).items()})
    names = list(dict.fromkeys(name for run in runs for name in run))
    if absent := [name for name in args.against if name not in names]:
        raise UserError(f"--against {absent[0]}: no such row; there are {'; '.join(names)}")
    rows = []
    for name in names:
        top1 = [run[name] for run in runs if name in run]
        row = [name, len(top1), spread(top1)]
        for other in args.against:
            apart = [run[name] - run[other] for run in runs if name in run and other in run]
            row += compare(apart) if apart and name != other else ["", "", ""]
        rows.append(row)
    header = ["mean ± standard deviation", "runs", "top-1"]
    for other in args.against:
        header += [f"top-1 - {other}", "95 % interval", "above 0"]
    print_table(header, rows)


def read_rows(path):
    """{checkpoint: row} of results.json, or of that in a folder. UserError if it is not there, or
    has several rows of a checkpoint."""
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file}: not there, evaluate.py writes it")
    results = json.loads(file.read_text())
    rows = {row["checkpoint"]: row for row in results}
    if len(rows) < len(results):
        raise UserError(f"{file}: a checkpoint was evaluated in several ways: keep one row")
    return rows


def compare(apart):
    """Three cells of the table: of differences their mean ± standard deviation, the 95 % interval
    of the mean, and how many are positive."""
    above = f"{sum(x > 0 for x in apart)} of {len(apart)}"
    return [spread(apart, "+"), interval(apart), above]


def interval(values):
    """The 95 % interval of a mean by Student's t with n - 1 degrees of freedom, as text."""
    n = len(values)
    if n < 2:
        return ""
    # With t = sqrt(n - 1) tan(a), the density of a is proportional to cos(a) ** (n - 2).
    a = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]
    share = np.cumsum(np.cos(a) ** (n - 2))
    t = np.sqrt(n - 1) * np.tan(a[np.searchsorted(share, 0.975 * share[-1])])
    half = t * np.std(values, ddof=1) / np.sqrt(n)
    return f"{np.mean(values) - half:+.1f} to {np.mean(values) + half:+.1f}"


if __name__ == "__main__":
    main()
