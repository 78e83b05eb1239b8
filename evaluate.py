"""Evaluation of TimeBalance: accuracy on the test videos, from 10 clips x 3 scales each (Sec. 4.2).

Takes run folders, of which it evaluates every classifier, or checkpoints. Prints a table that can
be pasted into Markdown and writes results.json beside the checkpoints. Where a folder holds both
teachers, two rows tell what their predictions give together, alike and weighted by TSTR: what the
student of stage 3 will learn from, before it is trained. Several folders (say, of different seeds)
add a table of means and of differences within each folder.

    python evaluate.py                                      # runs/toy
    torchrun --nproc-per-node 4 evaluate.py runs/ucf101     # processes share the videos
    python evaluate.py runs/toy-? --against labeled_only.pt student_mean.pt
    python evaluate.py --videos holiday.mp4 clips/ --checkpoint runs/ucf101/student.pt
                                                            # any videos' five most probable classes
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

import numpy as np

from common import (
    Parser, UserError, Videos, autocast, centre_crop, combine_teachers, command, find_checkpoint,
    load_classifier, load_embedder, map_videos, print0, ranged, rank, read_checkpoint, read_videos,
    settle_arguments, similarity_score, spaced_clips, start, to_input, video_similarity,
    walk_videos, write_bytes)  # before torch: see its imports

import torch

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}
TEACHERS = ("inv_ft.pt", "dist_ft.pt")


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add("checkpoints", "paths", "run folders or checkpoints (default runs/toy)", nargs="*",
               type=Path, default=[Path("runs/toy")], metavar="PATH")
    parser.add("checkpoints", "--against", "the rows from which several folders' others differ",
               nargs="+", default=["labeled_only.pt"], metavar="ROW")
    parser.add("data", "--root", "folder of the data set (default: as in training)", metavar="DIR")
    parser.add("clips", "--clips", "clips per video", type=ranged(int, 1), default=10, metavar="N")
    parser.add("clips", "--scales", "centre crops, as shares of the short side", nargs="+",
               type=ranged(float, 0.01, 1), default=[1.0, 0.8, 0.7], metavar="X")
    parser.add("prediction", "--videos", "name the classes of these videos, files or folders, "
               "instead", nargs="+", metavar="FILE_OR_DIR")
    parser.add("prediction", "--checkpoint", "by this classifier; writes predictions.json beside "
               "it", type=Path, metavar="FILE")
    args, device = start(parser, argv)
    settle_arguments(args)
    if bool(args.videos) != bool(args.checkpoint):
        raise UserError("--videos and --checkpoint go together")
    if args.videos:
        predict(args, device)
        return

    found = find_classifiers(args.paths)
    results = {}
    for folder, classifiers in found.items():
        results[folder] = evaluate_folder(folder, classifiers, args, device)
        save_results(folder, results[folder])
    if len(results) > 1:
        print_means(results, args.against)


def find_classifiers(paths):
    """{folder: {file name: content}}: the classifiers in run folders, or named themselves; the
    baseline comes first, students last."""
    def order(path):
        return path.stem.startswith("student"), path.stem != "labeled_only", path.stem

    found = {}
    for path in paths:
        files = sorted(path.glob("*.pt"), key=order) if path.is_dir() else [path]
        for file in files:
            saved = read_checkpoint(file)
            stage = saved.get("stage")
            if stage in ("finetune", "student"):
                found.setdefault(file.parent, {})[file.name] = saved
            elif not path.is_dir():
                raise UserError(f"{file}: written by {stage or 'another program'}, it classifies "
                                "nothing")
        if path.is_dir() and path not in found:
            raise UserError(f"{path}: no classifier here; finetune.py and train_student.py write "
                            "them")
    return found


def evaluate_folder(folder, classifiers, args, device):
    """The entries of results.json of one folder: its classifiers, and its teachers together."""
    groups = {}  # those that see the same clips: each video is decoded once for all of them
    for name, saved in classifiers.items():
        seen = {**saved["args"], "root": args.root or saved["args"]["root"]}
        seen = tuple(seen[k] for k in ("data", "root", "split", "frames", "stride", "size"))
        groups.setdefault(seen, {})[name] = saved
    results = dict.fromkeys(classifiers)  # in their order
    probabilities = {}
    videos_of = {}
    for group in groups.values():
        videos, rows, entries = evaluate_group(folder, group, args, device)
        videos_of |= dict.fromkeys(group, videos)
        probabilities |= rows
        results |= entries
    if all(name in classifiers for name in TEACHERS):
        saved_teachers = [classifiers[name] for name in TEACHERS]
        p_inv, p_dist = (probabilities[name] for name in TEACHERS)
        videos = videos_of[TEACHERS[0]]
        together = combine_on_test_videos(p_inv, p_dist, saved_teachers, folder, videos, args,
                                          device)
        for title, rows in together.items():
            results[title] = {**results[TEACHERS[0]], "checkpoint": title, "stage": "teachers",
                              "init": None, **accuracies(rows, videos)}
    return sorted(results.values(), key=lambda r: r["stage"] == "student")


def evaluate_group(folder, classifiers, args, device):
    """Of classifiers that see the same clips: the test videos, {name: {id: (C,)}} and {name: entry
    of results.json}."""
    begin = time.perf_counter()
    trained = next(iter(classifiers.values()))["args"]
    videos = read_videos(trained["data"], args.root or trained["root"], False, trained["split"])
    for name, saved in classifiers.items():
        if videos.classes != saved["classes"]:
            raise UserError(f"{folder / name}: made for other classes than those of "
                            f"{videos.folder}")
    rows, unreadable = class_probabilities(list(classifiers.values()), videos, args, device)
    if unreadable:
        print0(f"{len(unreadable)} test videos cannot be decoded and count as wrong")
    seconds = round(time.perf_counter() - begin, 1)
    results = {}
    probabilities = {}
    for k, (name, saved) in enumerate(classifiers.items()):
        probabilities[name] = {i: p[k] for i, p in rows.items()}
        trained = saved["args"]
        results[name] = {
            "checkpoint": name,
            "stage": saved["stage"],
            "init": trained["init"],
            "arch": saved["arch"],
            "data": trained["data"],
            "split": trained["split"],
            "percent": trained["percent"],
            "labeled_count": len(saved["labeled"]),
            "seed": trained["seed"],
            "epochs": saved["epoch"],
            "finished": saved["finished"],
            **accuracies(probabilities[name], videos),
            "unreadable": len(unreadable),
            "clips": args.clips,
            "scales": args.scales,
            "seconds": seconds,  # for all of them
        }
    return videos, probabilities, results


def accuracies(rows, videos):
    """Per cent of all videos, from class probabilities {id: (C,)}; absent ones are wrong."""
    top1 = np.zeros(len(videos), bool)
    top5 = np.zeros(len(videos), bool)
    for i, p in rows.items():
        best = p.topk(min(5, len(p))).indices.tolist()
        top1[i] = videos.labels[i] == best[0]
        top5[i] = videos.labels[i] in best
    per_class = {}
    for c, name in enumerate(videos.classes):
        members = videos.labels == c
        if members.any():
            per_class[name] = 100 * top1[members].mean()
    return {
        "top1": 100 * top1.mean(),
        "top5": 100 * top5.mean(),
        "mean_class_accuracy": float(np.mean(list(per_class.values()))),
        "videos": len(videos),
        "per_class": per_class,
    }


def combine_on_test_videos(p_inv, p_dist, saved_teachers, folder, videos, args, device):
    """{row's name: {id: (C,)}}: Eq. 7 on the test videos, with s = 1/2 and with s of Eq. 6, for
    which the teachers of stage 1 must be there. Empty where they learnt from different labels."""
    ids = sorted(p_inv.keys() & p_dist.keys())
    if not ids or saved_teachers[0]["labeled"] != saved_teachers[1]["labeled"]:
        return {}
    p_inv = torch.stack([p_inv[i] for i in ids])
    p_dist = torch.stack([p_dist[i] for i in ids])
    scores = {"teachers, mean": torch.full((len(ids),), 0.5)}
    try:
        c_inv, c_dist = (similarity_of_test_videos(saved, folder, videos, args, device)
                         for saved in saved_teachers)
    except UserError as error:
        print0(f"no row of TSTR, which needs the teachers of stage 1: {error}")
    else:
        score = torch.full((len(ids),), 0.5)  # of a video that breaks off before its middle, too
        for k, i in enumerate(ids):
            if i in c_inv and i in c_dist:
                score[k] = similarity_score(c_inv[i][None], c_dist[i][None])
        scores["teachers, TSTR"] = score
    return {title: dict(zip(ids, combine_teachers(p_inv, p_dist, score)))
            for title, score in scores.items()}


def similarity_of_test_videos(saved, folder, videos, args, device):
    """C of Eq. 5 of the test videos, {id: (n, n)}, by the teacher of stage 1 from which a teacher
    was fine-tuned; UserError if that is not there."""
    trained = saved["args"]
    path = Path(find_checkpoint(trained["init"], trained["pretrained"] or trained["out"]))
    if not path.exists():
        path = folder / path.name  # it has moved along
    stage_1 = read_checkpoint(path, ["pretrain_inv", "pretrain_dist"])
    settings = argparse.Namespace(**{**stage_1["args"], "workers": args.workers,
                                     "precision": args.precision})
    rows, _ = video_similarity(load_embedder(stage_1, device), videos, settings, device)
    return rows


def class_probabilities(classifiers, videos, args, device):
    """Softmax of checkpoints' classifiers, averaged over uniformly spaced clips and centre crops of
    the given shares of the short side (Sec. 4.2).

    classifiers: contents of checkpoints whose clips are alike. Returns {id: (classifiers, C)} and
    {id: reason} as map_videos does."""
    models = [load_classifier(saved, device) for saved in classifiers]
    trained = argparse.Namespace(**classifiers[0]["args"])

    def probabilities(frames):
        crops = []
        for video in frames:
            for clip in video.split(trained.frames):
                crops += [centre_crop(clip, trained.size, scale) for scale in args.scales]
        crops = torch.stack(crops)
        rows = []
        for model in models:
            with autocast(args, device):
                logits = model(to_input(crops, model))
            p = logits.float().softmax(1)
            rows.append(p.unflatten(0, (len(frames), -1)).mean(1))
        return torch.stack(rows, 1)

    spaced = functools.partial(spaced_clips, clips=args.clips, frames=trained.frames,
                               stride=trained.stride)
    return map_videos(probabilities, videos, spaced, 4, trained.size, args.workers, device,
                      "evaluation")


def predict(args, device):
    """Print the five most probable classes of each of --videos, and write them to a file."""
    found = find_classifiers([args.checkpoint])
    saved = found[args.checkpoint.parent][args.checkpoint.name]
    names = []
    for path in args.videos:
        files = [path] if os.path.isfile(path) else walk_videos(path)
        if not files:
            raise UserError(f"{path}: no video here")
        names += files
    videos = Videos("", names, [-1] * len(names), saved["classes"])
    rows, unreadable = class_probabilities([saved], videos, args, device)
    predictions = []
    for i, name in enumerate(names):
        top5 = {}
        if i in rows:
            best = rows[i][0].topk(min(5, len(saved["classes"])))
            for p, c in zip(best.values.tolist(), best.indices.tolist()):
                top5[saved["classes"][c]] = round(p, 4)
        predictions.append({"video": name, "top5": top5, "error": unreadable.get(i)})
        text = ", ".join(f"{c} {100 * p:.1f} %" for c, p in top5.items())
        print0(f"{name}:", text or "cannot be decoded")
    text = json.dumps(predictions, indent=1, ensure_ascii=False)
    write_bytes(args.checkpoint.with_name("predictions.json"),
                text.encode(errors="surrogateescape"))


# ---- Tables --------------------------------------------------------------------------------------
def save_results(folder, results):
    """Write a folder's results.json and print it as a table."""
    write_bytes(folder / "results.json", json.dumps(results, indent=1).encode())
    rows = []
    for r in results:
        name = r["checkpoint"]
        if not r["finished"]:
            name += f" (unfinished, epoch {r['epochs']})"
        rows.append([name, r["labeled_count"], *(f"{r[key]:.1f}" for key in METRICS)])
    print_table([f"{folder}", "labels", *METRICS.values()], rows)


def print_means(results, against):
    """Mean and standard deviation of each row over the folders, and of its difference from each row
    `against` of the same folder, with the 95 % interval of that difference."""
    def spread(values, sign=""):
        if not values:
            return ""
        return f"{np.mean(values):{sign}.1f} ± {np.std(values, ddof=len(values) > 1):.1f}"

    runs = []
    names = {}  # in order, each once
    for folder_results in results.values():
        runs.append({r["checkpoint"]: r for r in folder_results})
        names |= runs[-1]
    rows = []
    for name in names:
        same = [run for run in runs if name in run]
        row = [name, len(same)]
        for key in METRICS:
            row.append(spread([run[name][key] for run in same]))
        for other in against:
            paired = [run[name]["top1"] - run[other]["top1"] for run in same if other in run]
            row += [spread(paired, "+"), interval(paired) if name != other else ""]
        rows.append(row)
    header = ["mean ± standard deviation", "runs", *METRICS.values()]
    for other in against:
        header += [f"top-1 - {other}", "95 % interval"]
    print_table(header, rows)


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


def print_table(header, rows):
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print0("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print0()


if __name__ == "__main__":
    main()
