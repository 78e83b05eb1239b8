"""Evaluation of TimeBalance: accuracies on the test videos, or the classes of any other videos.

The prediction for a video is the mean over 10 clips and 3 scales (Sec. 4.2). If a folder holds both
teachers, their combined prediction is evaluated, too: by the plain mean and by TSTR (Eq. 7).

Reads:  run folders, of which every classifier is evaluated, or checkpoints; the test videos.
Writes: results.json and confusion.csv into the folder of the checkpoints.

    python evaluate.py
        All classifiers in runs/toy, in half a minute on a CPU. Prints chance, a table of accuracies
        and the worst classes.
    python evaluate.py runs/toy runs/toy-1
        Also prints the mean and the standard deviation over these folders.
    python evaluate.py --checkpoint runs/toy/student.pt --videos holiday.mp4 clips/
        Prints the five most probable classes of each video. Writes runs/toy/predictions.json.
"""

import argparse
import csv
import functools
import io
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np

from common import (
    Embedder, Parser, UserError, Videos, autocast, build_model, centre_crop, combine_teachers,
    command, default_precision, find_checkpoint, load_classifier, machine_arguments, map_videos,
    paired_similarity, prepare, print0, ranged, read_checkpoint, read_videos, similarity_score,
    spaced_clips, to_input, video_similarity, walk_videos, write_bytes)  # before torch

import torch

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}
TEACHERS = ("inv_ft.pt", "dist_ft.pt")
UNREADABLE = "cannot be decoded"  # in place of a predicted class


@command
def main(argv=None):
    parser = Parser(__doc__, parents=[machine_arguments()])
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH",
                        help="run folders or checkpoints (default: runs/toy)")
    parser.add_argument("--root", metavar="DIR",
                        help="folder of the data set (default: as in training)")
    parser.add_argument("--clips", type=ranged(int, 1), default=10, metavar="N",
                        help="clips per video")
    parser.add_argument("--scales", nargs="+", type=ranged(float, 0.01, 1),
                        default=[1.0, 0.8, 0.7], metavar="X",
                        help="sides of the centre crops, as shares of the frame's short side "
                        "(default: 1.0 0.8 0.7)")
    prediction = parser.add_argument_group("prediction, instead of accuracies")
    prediction.add_argument("--videos", nargs="+", metavar="FILE_OR_DIR",
                            help="print the most probable classes of these videos")
    prediction.add_argument("--checkpoint", type=Path, metavar="FILE",
                            help="the classifier, or a run folder (then its student.pt)")
    prediction.add_argument("--output", type=Path, metavar="FILE",
                            help="write the classes to this .json or .csv file (default: "
                            "predictions.json in the checkpoint's folder)")
    prediction.add_argument("--topk", type=ranged(int, 1), default=5, metavar="K",
                            help="number of classes per video")
    args = parser.parse_args(argv)
    device = prepare(args)
    args.precision = args.precision or default_precision(args.device)
    if args.videos and args.checkpoint and not args.paths:
        predict(args, device)
        return
    if args.videos or args.checkpoint or args.output:
        raise UserError("a prediction needs both --videos and --checkpoint, and takes no PATH")

    found = find_classifiers(args.paths or [Path("runs/toy")])
    results = {}
    for folder, classifiers in found.items():
        results[folder] = evaluate_folder(folder, classifiers, args, device)
        save_results(folder, results[folder])
    if len(results) > 1:
        print_means(sum(results.values(), []))


def find_classifiers(paths):
    """{folder: {file name: content}} of the classifiers in run folders, or of those named."""
    found = {}
    for path in paths:
        if not path.exists() and path.suffix != ".pt":
            runs = sorted({str(file.parent) for file in Path("runs").glob("*/*.pt")})
            raise UserError(f"{path}: no such run folder; there are {', '.join(runs) or 'none'}")
        folder = path if path.is_dir() else path.parent
        contents = {}
        for file in sorted(path.glob("*.pt")) if path.is_dir() else [path]:
            saved = read_checkpoint(file)
            if saved.get("stage") in ("finetune", "student"):
                contents[file.name] = saved
        if not contents:
            raise UserError(f"{path}: no trained classifier; finetune.py and train_student.py "
                            "write them")
        found.setdefault(folder, {}).update(contents)
    return found


def evaluate_folder(folder, classifiers, args, device):
    """The objects of results.json, with the confusion matrix in each: of a folder's classifiers,
    and of both teachers combined; the baseline first, students last."""
    groups = {}  # those that see the same clips: each video is decoded once for all of them
    for name, saved in classifiers.items():
        seen = {**saved["args"], "root": args.root or saved["args"]["root"]}
        seen = tuple(seen[k] for k in ("data", "root", "split", "frames", "stride", "size"))
        groups.setdefault(seen, {})[name] = saved
    results = {}
    seen_by = {}  # name: the test videos, and its class probabilities for them, {id: (C,)}
    for (data, root, split, *_), group in groups.items():
        begin = time.perf_counter()
        videos = read_videos(data, root, False, split)
        for name, saved in group.items():
            if videos.classes != saved["classes"]:
                raise UserError(f"{folder / name}: made for other classes than those of "
                                f"{videos.folder}")
        share = 100 * np.bincount(videos.labels).max() / len(videos)
        print0(f"{len(videos)} test videos of {len(videos.classes)} classes: chance is "
               f"{100 / len(videos.classes):.1f} %, the most frequent class has {share:.1f} %")
        rows, unreadable = class_probabilities(list(group.values()), videos, args, device)
        if unreadable:
            print0(f"{len(unreadable)} test videos cannot be decoded and count as wrong")
        seconds = round(time.perf_counter() - begin, 1)
        for k, (name, saved) in enumerate(group.items()):
            probabilities = {i: p[k] for i, p in rows.items()}
            seen_by[name] = videos, probabilities
            trained = saved["args"]
            results[name] = {
                "checkpoint": name,
                "stage": saved["stage"],
                "init": trained["init"],
                "arch": saved["arch"],
                "data": data,
                "split": split,
                "percent": trained["percent"],
                "labeled_count": len(saved["labeled"]),
                "seed": trained["seed"],
                "epochs": saved["epoch"],
                "finished": saved["finished"],
                **accuracies(probabilities, videos),
                "unreadable": len(unreadable),
                "clips": args.clips,
                "scales": args.scales,
                "seconds": seconds,  # for all of the group
            }
    if all(name in classifiers for name in TEACHERS):
        (videos, p_inv), (_, p_dist) = (seen_by[name] for name in TEACHERS)
        teachers = {name: classifiers[name] for name in TEACHERS}
        together = combine_on_test_videos(p_inv, p_dist, teachers, folder, videos, args, device)
        for title, probabilities in together.items():
            results[title] = {**results[TEACHERS[0]], "checkpoint": title, "stage": "teachers",
                              "init": None, **accuracies(probabilities, videos)}
    return sorted(results.values(), key=lambda r: (
        r["stage"] == "student", r["checkpoint"] != "labeled_only.pt"))


def accuracies(probabilities, videos):
    """Per cent of all videos, from {id: (C,)}; a video without probabilities is wrong. And the
    confusion matrix, which does not go into results.json: {class: Counter of predicted classes}."""
    confusion = {c: Counter() for c in videos.classes}
    in_top5 = 0
    for i, label in enumerate(videos.labels.tolist()):
        best = [UNREADABLE]
        if i in probabilities:
            p = probabilities[i]
            best = [videos.classes[c] for c in p.topk(min(5, len(p))).indices.tolist()]
        confusion[videos.classes[label]][best[0]] += 1
        in_top5 += videos.classes[label] in best
    per_class = {}
    for c, predicted in confusion.items():
        if predicted:
            per_class[c] = 100 * (predicted[c] / predicted.total())
    return {
        "top1": 100 * (sum(predicted[c] for c, predicted in confusion.items()) / len(videos)),
        "top5": 100 * (in_top5 / len(videos)),
        "mean_class_accuracy": float(np.mean(list(per_class.values()))),
        "videos": len(videos),
        "per_class": per_class,
        "confusion": confusion,
    }


def combine_on_test_videos(p_inv, p_dist, teachers, folder, videos, args, device):
    """Eq. 7 on the test videos, {row's name: {id: (C,)}}: with s = 1/2, and with s of Eq. 6 if the
    networks of stage 1 are there. Empty if both teachers were fine-tuned on different labels.

    p_inv, p_dist: {id: (C,)}. teachers: {name: content} of their checkpoints."""
    ids = sorted(p_inv.keys() & p_dist.keys())
    labeled = [saved["labeled"] for saved in teachers.values()]
    if not ids or labeled[0] != labeled[1]:
        return {}
    p_inv = torch.stack([p_inv[i] for i in ids])
    p_dist = torch.stack([p_dist[i] for i in ids])
    scores = {"teachers, mean": torch.full((len(ids),), 0.5)}
    try:
        stage_1 = {name: read_stage_1(saved, folder) for name, saved in teachers.items()}
        paired_similarity(stage_1)  # UserError if they were not measured alike
    except UserError as error:
        print0(f"no row for TSTR: {error}")
    else:
        c = []
        for saved in stage_1.values():
            settings = argparse.Namespace(**{**saved["args"], "workers": args.workers,
                                             "precision": args.precision})
            c.append(video_similarity(load_embedder(saved, device), videos, settings, device)[0])
        c_inv, c_dist = c
        score = torch.full((len(ids),), 0.5)  # of a video that breaks off before its middle, too
        for k, i in enumerate(ids):
            if i in c_inv and i in c_dist:
                score[k] = similarity_score(c_inv[i][None], c_dist[i][None])
        scores["teachers, TSTR"] = score
    return {title: dict(zip(ids, combine_teachers(p_inv, p_dist, score)))
            for title, score in scores.items()}


def read_stage_1(saved, folder):
    """The checkpoint of stage 1 from which a teacher was fine-tuned; UserError if it is not
    there."""
    trained = saved["args"]
    path = Path(find_checkpoint(trained["init"], trained["pretrained"] or trained["out"]))
    if not path.exists():
        path = folder / path.name  # it has moved along
    return read_checkpoint(path, ["pretrain_inv", "pretrain_dist"])


def load_embedder(saved, device):
    """The backbone and projection head of a checkpoint of stage 1, in eval mode."""
    embedder = Embedder(build_model(saved["arch"], len(saved["classes"])))
    embedder.backbone.load_state_dict(saved["model"])
    embedder.head.load_state_dict(saved["head"])
    return embedder.to(device, memory_format=torch.channels_last_3d).eval()


def class_probabilities(classifiers, videos, args, device, show=None):
    """Softmax of checkpoints' classifiers, averaged over uniformly spaced clips and centre crops of
    the given shares of the short side (Sec. 4.2).

    classifiers: contents of checkpoints whose clips are alike. show(id, (classifiers, C)): called
    after each video. Returns {id: (classifiers, C)} and {id: reason} as map_videos does."""
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
    return map_videos(probabilities, videos, spaced, 1 if show else 4, trained.size, args.workers,
                      device, "evaluation", show)


def predict(args, device):
    """Print the most probable classes of each of --videos when it is done; write all to a file."""
    if args.checkpoint.is_dir():
        args.checkpoint /= "student.pt"
    output = args.output or args.checkpoint.with_name("predictions.json")
    if output.suffix not in (".json", ".csv"):
        raise UserError(f"--output {output}: expected a name that ends in .json or .csv")
    saved = find_classifiers([args.checkpoint])[args.checkpoint.parent][args.checkpoint.name]
    if not saved["finished"]:
        print0(f"note: {args.checkpoint} is unfinished (epoch {saved['epoch']} of "
               f"{saved['args']['epochs']})")
    names = []
    for path in args.videos:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        files = walk_videos(path) if os.path.isdir(path) else [path]
        if not files:
            raise UserError(f"{path}: no video here")
        names += files
    classes = saved["classes"]
    predictions = [{"video": name, "classes": {}, "error": None} for name in names]

    def show(i, rows):
        best = rows[0].topk(min(args.topk, len(classes)))
        top = {classes[c]: round(p, 4) for p, c in zip(best.values.tolist(), best.indices.tolist())}
        predictions[i]["classes"] = top
        print0(f"{names[i]}:", ", ".join(f"{c} {100 * p:.1f} %" for c, p in top.items()))

    videos = Videos("", names, [-1] * len(names), classes)
    rows, unreadable = class_probabilities([saved], videos, args, device, show)
    for i, row in rows.items():
        if not predictions[i]["classes"]:  # torchrun's other processes have done it
            show(i, row)
    for i, reason in unreadable.items():
        predictions[i]["error"] = reason
    if output.suffix == ".json":
        text = json.dumps(predictions, indent=1, ensure_ascii=False)
        write_bytes(output, text.encode(errors="surrogateescape"))
    else:
        lines = [["video", "class", "probability", "error"]]
        for video, top, error in map(dict.values, predictions):
            lines += [[video, c, p, error] for c, p in top.items()] or [[video, None, None, error]]
        write_csv(output, lines)
    if not rows:
        print0("none of these videos can be decoded")
        raise SystemExit(1)


# ---- Tables --------------------------------------------------------------------------------------
def save_results(folder, results):
    """Write a folder's results.json and confusion.csv, print its table and the worst classes.

    A row of confusion.csv: checkpoint, class, its accuracy, how many of its videos were taken for
    which class."""
    entries = [{k: v for k, v in r.items() if k != "confusion"} for r in results]
    write_bytes(folder / "results.json", json.dumps(entries, indent=1).encode())
    columns = list(dict.fromkeys(c for r in results for c in r["confusion"])) + [UNREADABLE]
    lines = [["checkpoint", "class", "accuracy", *columns]]
    for r in results:
        for c, accuracy in r["per_class"].items():
            counts = [r["confusion"][c][predicted] for predicted in columns]
            lines.append([r["checkpoint"], c, f"{accuracy:.2f}", *counts])
    write_csv(folder / "confusion.csv", lines)
    metrics = metrics_of(results)
    rows = []
    for r in results:
        name = r["checkpoint"]
        if not r["finished"]:
            name += f" (unfinished, epoch {r['epochs']})"
        rows.append([name, r["labeled_count"], *(f"{r[key]:.1f}" for key in metrics)])
    print_table([f"{folder}", "labels", *metrics.values()], rows)
    last = next((r for r in results if r["checkpoint"] == "student.pt"), results[-1])
    worst = sorted(last["per_class"].items(), key=lambda item: item[1])[:3]
    print0(f"worst classes of {last['checkpoint']}:", ", ".join(f"{c} {x:.1f}" for c, x in worst),
           f"(all: {folder / 'confusion.csv'})\n")


def write_csv(path, lines):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))


def metrics_of(results):
    """METRICS, top-5 only where there are more than five classes."""
    many = any(len(r["per_class"]) > 5 for r in results)
    return {key: title for key, title in METRICS.items() if many or key != "top5"}


def print_means(results):
    """Mean and standard deviation over run folders of all their rows of one name."""
    rows_of = {}
    for r in results:
        rows_of.setdefault(r["checkpoint"], []).append(r)
    metrics = metrics_of(results)
    rows = []
    for name, same in rows_of.items():
        rows.append([name, len(same), *(spread([r[key] for r in same]) for key in metrics)])
    print_table(["mean ± standard deviation", "runs", *metrics.values()], rows)


def spread(values, sign=""):
    return f"{np.mean(values):{sign}.1f} ± {np.std(values, ddof=len(values) > 1):.1f}"


def print_table(header, rows):
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print0("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


if __name__ == "__main__":
    main()
