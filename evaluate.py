"""Evaluation of TimeBalance: accuracy on the test videos, from 10 clips x 3 scales each (Sec. 4.2).

Takes run folders, of which it evaluates every classifier, or checkpoints. Prints a table that can be pasted into
Markdown and writes results.json beside the checkpoints; several folders (say, of different seeds) add a table of means
and of differences within each folder.

    python evaluate.py                                                # runs/toy
    torchrun --nproc-per-node 4 evaluate.py runs/ucf101               # the videos are shared among the processes
    python evaluate.py runs/toy-0 runs/toy-1 runs/toy-2 --against student_mean.pt
    python evaluate.py --figures                                      # draws figures 1 and 4 of the paper, too
    python evaluate.py --videos holiday.mp4 clips/ --checkpoint runs/ucf101/student.pt    # any videos' top five classes
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import (
    Parser, UserError, Videos, class_probabilities, command, decode_frames, load_classifier, load_finished, number,
    paired_similarity, print0, rank, read_checkpoint, read_videos, similarity_score, spaced_clips, start, walk_videos,
    write_atomically)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("runs/toy")], metavar="PATH",
                        help="run folders or checkpoints (default runs/toy)")
    parser.add("clips", "--clips", "clips per video", type=number(int, 1), default=10, metavar="N")
    parser.add("clips", "--scales", "centre crops, as shares of the short side", type=number(float, 0.01, 1), nargs="+",
               default=[1.0, 0.8, 0.7], metavar="X")
    parser.add_argument("--against", default="labeled_only.pt", metavar="CHECKPOINT",
                        help="the row from which several folders' others differ (default labeled_only.pt)")
    parser.add_argument("--figures", action="store_true", help="compare the two teachers by class, over all folders, "
                        "and the clips of three videos; draws classes.png and similarity.png in the first folder")
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

    found, tables = find_classifiers(args.paths), {}
    for folder, files in found.items() if args.figures else ():
        if missing := {"inv_ft.pt", "dist_ft.pt"} - {file.name for file in files}:
            raise UserError(f"{folder}: --figures compares the two teachers, {' and '.join(missing)} is not here")
    for folder, files in found.items():
        tables[folder] = [evaluate(file, args, device) for file in files]
        if rank() == 0:
            content = json.dumps(tables[folder], indent=1).encode()
            write_atomically(folder / "results.json", lambda file: file.write(content))
        rows = [[r["checkpoint"] + ("" if r["finished"] else f" (unfinished, epoch {r['epochs']})"),
                 r["labeled_count"], *(f"{r[key]:.1f}" for key in METRICS)] for r in tables[folder]]
        print_table([f"{folder}", "labels", *METRICS.values()], rows)
    if len(tables) > 1:
        print_means(tables, args.against)
    if args.figures:
        draw_figures(tables, args.root)


METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}


def find_classifiers(paths):
    """{folder: [file, ...]}: the finished and unfinished classifiers in run folders, or named themselves."""
    found = {}
    for path in paths:
        files = [path] if not path.is_dir() else sorted(
            path.glob("*.pt"), key=lambda p: (p.stem.startswith("student"), p.stem != "labeled_only", p.stem))
        for file in files:
            stage = read_checkpoint(file).get("stage")
            if stage in ("finetune", "student"):
                found.setdefault(file.parent, []).append(file)
            elif not path.is_dir():
                raise UserError(f"{file}: written by {stage or 'another program'}, it classifies nothing")
        if path.is_dir() and path not in found:
            raise UserError(f"{path}: no classifier here; finetune.py and train_student.py write them")
    return found


def evaluate(file, args, device):
    """Evaluate one classifier -> its entry of results.json, accuracies in per cent."""
    begin, saved = time.perf_counter(), read_checkpoint(file)
    settings = argparse.Namespace(**saved["args"])
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
            "finished": saved["finished"], "top1": 100 * hits[:, 0].mean(), "top5": 100 * hits[:, 1].mean(),
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
    (file,), = find_classifiers([args.checkpoint]).values()
    saved, names = read_checkpoint(file), []
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


def print_means(tables, against):
    """Mean and standard deviation of each row over folders, and of its difference from one row of the same folder."""
    def spread(values, sign=""):
        return f"{np.mean(values):{sign}.1f} ± {np.std(values, ddof=len(values) > 1):.1f}" if values else ""

    runs, rows = [{r["checkpoint"]: r for r in results} for results in tables.values()], []
    for name in dict.fromkeys(name for run in runs for name in run):
        same = [run for run in runs if name in run]
        rows.append([name, len(same), *(spread([run[name][key] for run in same]) for key in METRICS),
                     spread([run[name]["top1"] - run[against]["top1"] for run in same if against in run], "+")])
    print_table(["mean ± standard deviation", "runs", *METRICS.values(), f"top-1 - {against}"], rows)


def print_table(header, rows):
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print0("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print0()


# ---- Figures 1 and 4 of the paper ------------------------------------------------------------------------------------
def draw_figures(tables, root):
    """Compare the teachers by class over all folders (classes.png), and draw similarities of the first of them."""
    values = []
    for folder, results in tables.items():
        teachers = load_finished(["inv_ft.pt", "dist_ft.pt"], folder, ["finetune"])
        names, c_inv, c_dist = paired_similarity(teachers)
        s = similarity_score(c_inv, c_dist)
        class_of = np.array([os.path.basename(os.path.dirname(name)) for name in names])
        per_class = {r["checkpoint"]: r["per_class"] for r in results}
        p_inv, p_dist = per_class["inv_ft.pt"], per_class["dist_ft.pt"]
        values.append([[s[class_of == c].mean(), p_inv[c], p_dist[c], p_inv[c] - p_dist[c]] for c in p_inv])
        if len(values) == 1:
            pictures = {"similarity.png": draw_similarity(teachers["inv_ft.pt"], root, names, c_inv, c_dist, s)}
    rows = sorted(zip(np.mean(values, 0).tolist(), p_inv), key=lambda row: -row[0][3])
    print_table(["class", "s", "invariant", "distinctive", "difference"],
                [[c, f"{s:.2f}", f"{p_inv:.1f}", f"{p_dist:.1f}", f"{d:+.1f}"] for (s, p_inv, p_dist, d), c in rows])
    pictures["classes.png"] = draw_bars([(c, d) for (*_, d), c in rows])
    for name, image in pictures.items() if rank() == 0 else ():
        path = next(iter(tables)) / name
        write_atomically(path, lambda file: image.save(file, "png"))
        print0(f"wrote {path}")


def draw_bars(bars):
    """(name, value) pairs as horizontal bars; of more than 50 the outermost, as in figure 1."""
    bars = bars if len(bars) <= 50 else bars[:25] + bars[-25:]
    image = Image.new("RGB", (720, 22 * len(bars) + 40), "white")
    ink, font, middle = ImageDraw.Draw(image), ImageFont.load_default(14), 450
    ink.text((middle, 8), "top-1 of the invariant minus the distinctive teacher", "black", font, anchor="ma")
    for k, (name, value) in enumerate(bars):
        y, length = 36 + 22 * k, 200 * value / max(1, *(abs(v) for _, v in bars))
        ink.text((180, y + 9), name, "black", font, anchor="rm")
        colour, anchor, gap = ("steelblue", "lm", 6) if value > 0 else ("coral", "rm", -6)
        ink.rectangle([middle + min(0, length), y, middle + max(0, length), y + 17], colour)
        ink.text((middle + length + gap, y + 9), f"{value:+.1f}", "black", font, anchor)
    return image


def draw_similarity(saved, root, names, c_inv, c_dist, s):
    """Figure 4: of the videos with the highest, median and lowest s the middle of each clip, and both matrices."""
    settings, (n, frames, stride) = saved["args"], saved["similarity_clips"]
    folder = read_videos(settings["data"], root or settings["root"], True, settings["split"], settings["pool"]).folder
    cell, width, side = 36, 48 * n, 36 * n
    image = Image.new("RGB", (n * (width + 4) + 2 * (side + 16), 3 * (side + 32)), "white")
    ink, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for row, i in enumerate(s.argsort(descending=True)[[0, len(s) // 2, -1]].tolist()):
        top = row * (side + 32) + 28
        ink.text((0, top - 20), f"{('highest', 'median', 'lowest')[row]} s = {s[i]:.2f}: {names[i]}", "black", font)
        middles = lambda count: spaced_clips(None, count, 1, n * frames, stride)[frames // 2::frames]
        for t, frame in enumerate(decode_frames(os.path.join(folder, names[i]), middles)):
            frame = ImageOps.pad(Image.fromarray(frame.numpy()), (width, side), Image.Resampling.BOX, "white")
            image.paste(frame, (t * (width + 4), top))
        for k, (teacher, matrix) in enumerate([("invariant", c_inv[i]), ("distinctive", c_dist[i])]):
            left = n * (width + 4) + 12 + k * (side + 16)
            ink.text((left, top - 20), teacher, "black", font)
            for (a, b), c in np.ndenumerate(matrix.numpy()):
                x, y, blue = left + b * cell, top + a * cell, [int(255 - max(0, c) * d) for d in (200, 120, 40)]
                ink.rectangle([x, y, x + cell - 1, y + cell - 1], tuple(blue))
                ink.text((x + cell / 2, y + cell / 2), f"{c:.2f}", "black", font, "mm")
    return image


if __name__ == "__main__":
    main()
