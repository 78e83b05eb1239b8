"""Evaluation of TimeBalance: accuracy on the test videos, from 10 clips x 3 scales each (Sec. 4.2).

Takes run folders, of which it evaluates every classifier, or checkpoints. Prints a table that can be pasted into
Markdown and writes results.json beside the checkpoints; several folders (say, of different seeds) add a table of means.

    python evaluate.py                                                # runs/toy
    torchrun --nproc-per-node 4 evaluate.py runs/ucf101               # the videos are shared among the processes
    python evaluate.py runs/toy-0 runs/toy-1 runs/toy-2
    python evaluate.py --videos holiday.mp4 clips/ --checkpoint runs/ucf101/student.pt    # any videos' top five classes
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from common import (
    Parser, UserError, Videos, class_probabilities, command, load_classifier, number, print0, rank, read_checkpoint,
    read_videos, start, walk_videos, write_atomically)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("runs/toy")], metavar="PATH",
                        help="run folders or checkpoints (default runs/toy)")
    parser.add("clips", "--clips", "clips per video", type=number(int, 1), default=10, metavar="N")
    parser.add("clips", "--scales", "centre crops, as shares of the short side", type=number(float, 0.01, 1), nargs="+",
               default=[1.0, 0.8, 0.7], metavar="X")
    parser.add("data", "--root", "folder of the data set (default: as in training)", metavar="DIR")
    parser.add("prediction", "--videos", "name the classes of these videos, files or folders, instead", nargs="+",
               metavar="FILE_OR_DIR")
    parser.add("prediction", "--checkpoint", "by this classifier; writes predictions.json beside it", type=Path,
               metavar="FILE")
    args = parser.parse_args(argv)
    if bool(args.videos) != bool(args.checkpoint):
        raise UserError("--videos and --checkpoint go together")
    device = start(args)
    if args.videos:
        return predict(args, device)

    tables = {}
    for folder, files in find_classifiers(args.paths).items():
        tables[folder] = [evaluate(file, saved, args, device) for file, saved in files]
        if rank() == 0:
            content = json.dumps(tables[folder], indent=1).encode()
            write_atomically(folder / "results.json", lambda file: file.write(content))
        rows = [[r["checkpoint"] + ("" if saved["finished"] else f" (unfinished, epoch {r['epochs']})"),
                 r["labeled_count"], *(f"{r[key]:.1f}" for key in METRICS)]
                for r, (_, saved) in zip(tables[folder], files)]
        print_table([f"{folder}", "labels", *METRICS.values()], rows)
    if len(tables) > 1:
        names = dict.fromkeys(r["checkpoint"] for results in tables.values() for r in results)
        rows = []
        for name in names:
            same = [r for results in tables.values() for r in results if r["checkpoint"] == name]
            means = [f"{np.mean(v):.1f} ± {np.std(v, ddof=len(v) > 1):.1f}" for v in
                     ([r[key] for r in same] for key in METRICS)]
            rows.append([name, len(same), *means])
        print_table(["mean ± standard deviation", "runs", *METRICS.values()], rows)


METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}


def find_classifiers(paths):
    """{folder: [(file, content), ...]}: the finished and unfinished classifiers in run folders, or named themselves."""
    found = {}
    for path in paths:
        files = [path] if not path.is_dir() else sorted(
            path.glob("*.pt"), key=lambda p: (p.stem.startswith("student"), p.stem != "labeled_only", p.stem))
        for file in files:
            saved = read_checkpoint(file)
            if saved.get("stage") in ("finetune", "student"):
                found.setdefault(file.parent, []).append((file, saved))
            elif not path.is_dir():
                raise UserError(f"{file}: written by {saved.get('stage') or 'another program'}, it classifies nothing")
        if path.is_dir() and path not in found:
            raise UserError(f"{path}: no classifier here; finetune.py and train_student.py write them")
    return found


def evaluate(file, saved, args, device):
    """Evaluate one classifier -> its entry of results.json, accuracies in per cent."""
    begin, settings = time.perf_counter(), argparse.Namespace(**saved["args"])
    videos = read_videos(settings.data, args.root or settings.root, False, settings.split)
    if videos.classes != saved["classes"]:
        raise UserError(f"{file}: made for other classes than those of {videos.folder}")
    rows, unreadable = classify(videos, file, saved, args, device)
    if unreadable:
        print0(f"{len(unreadable)} test videos cannot be decoded and count as wrong")
    hits = np.zeros((len(videos), 2), bool)  # top-1, top-5
    for i, p in rows.items():
        best = p.topk(min(5, len(p))).indices.tolist()
        hits[i] = videos.labels[i] == best[0], videos.labels[i] in best
    per_class = {name: 100 * hits[videos.labels == c, 0].mean() for c, name in enumerate(videos.classes)
                 if (videos.labels == c).any()}
    return {"checkpoint": file.name, "stage": saved["stage"], "init": settings.init, "arch": saved["arch"],
            "data": settings.data, "split": settings.split, "percent": settings.percent,
            "labeled_count": len(saved["labeled"]), "seed": settings.seed, "epochs": saved["epoch"],
            "top1": 100 * hits[:, 0].mean(), "top5": 100 * hits[:, 1].mean(),
            "mean_class_accuracy": float(np.mean(list(per_class.values()))), "videos": len(videos),
            "unreadable": len(unreadable), "clips": args.clips, "scales": args.scales,
            "seconds": round(time.perf_counter() - begin, 1), "per_class": per_class}


def classify(videos, file, saved, args, device):
    """Class probabilities by a checkpoint's content, as class_probabilities gives them."""
    settings = argparse.Namespace(**{**saved["args"], "workers": args.workers, "precision": args.precision})
    model = load_classifier(saved, device)
    return class_probabilities(model, videos, args.clips, args.scales, settings, device, file.name)


def predict(args, device):
    """Print the five most probable classes of each of --videos, and write them beside the checkpoint."""
    (_, ((file, saved),)), = find_classifiers([args.checkpoint]).items()
    names = []
    for path in args.videos:
        found = [path] if os.path.isfile(path) else walk_videos(path)
        if not found:
            raise UserError(f"{path}: no video here")
        names += found
    videos = Videos("", names, [-1] * len(names), saved["classes"])
    rows, unreadable = classify(videos, file, saved, args, device)
    predictions = []
    for i, name in enumerate(names):
        best = rows[i].topk(min(5, len(saved["classes"]))) if i in rows else None
        top = {saved["classes"][c]: round(p, 4) for p, c in zip(*map(torch.Tensor.tolist, best))} if best else {}
        predictions.append({"video": name, "top5": top, "error": unreadable.get(i)})
        print0(f"{name}:", ", ".join(f"{c} {100 * p:.1f} %" for c, p in top.items()) or "cannot be decoded")
    if rank() == 0:
        content = json.dumps(predictions, indent=1, ensure_ascii=False).encode(errors="surrogateescape")
        write_atomically(file.with_name("predictions.json"), lambda file: file.write(content))


def print_table(header, rows):
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print0("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print0()


if __name__ == "__main__":
    main()
