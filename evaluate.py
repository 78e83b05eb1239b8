"""Evaluation of TimeBalance: accuracies on the test videos, or the classes of any other videos.

The prediction for a video is the mean over 10 clips and 3 scales (Sec. 4.2). If a folder holds both
teachers, their combined prediction is evaluated, too: by the plain mean and by TSTR (Eq. 7).

Reads:  run folders, of which every classifier is evaluated, or checkpoints; the test videos.
Writes: results.json and predictions.csv into the folder of the checkpoints. Rows of results.json
        stay until the same checkpoint is evaluated on the same data with the same clips and scales;
        predictions.csv is that of the last command.

    python evaluate.py
        All classifiers in runs/toy, in half a minute on a CPU. Prints chance, a table of accuracies
        and the worst classes.
    python evaluate.py runs/toy runs/toy-1
        Also prints the mean and the standard deviation over these folders.
    python evaluate.py --checkpoint runs/toy/student.pt --videos holiday.mp4 clips/
        Prints the five most probable classes of each video. Writes runs/toy/predictions.csv.
"""

import argparse
import contextlib
import csv
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np

from common import (
    Embedder, Frames, UserError, Videos, autocast, barrier, build_model, centre_crop,
    combine_teachers, command, compare_clips, default_precision, fit_tstr, list_videos,
    load_classifier, map_videos, new_parser, order_teachers, prepare, print0, ranged, rank,
    read_checkpoint, read_videos, score_videos, to_input, weight_digest, write_text)  # before torch

import torch

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}
TEACHERS = ("inv_ft.pt", "dist_ft.pt")
UNREADABLE = "cannot be decoded"  # in place of a predicted class
ELSEWHERE = " (--output DIR writes into another folder)"


@command
def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH",
        help="run folders or checkpoints (default: runs/toy)")
    add("--root", metavar="DIR", help="folder of the data set (default: as in training)")
    add("--clips", type=ranged(int, 1), default=10, metavar="N", help="clips per video")
    add("--scales", nargs="+", type=ranged(float, 0.01, 1), default=[1.0, 0.8, 0.7], metavar="X",
        help="sides of the centre crops, as shares of the frame's short side")
    add("--output", type=Path, metavar="DIR",
        help="folder of results.json and predictions.csv (default: the checkpoints')")
    add = parser.add_argument_group("prediction, instead of accuracies").add_argument
    add("--videos", nargs="+", metavar="FILE_OR_DIR",
        help="print the most probable classes of these videos")
    add("--checkpoint", type=Path, metavar="FILE",
        help="the classifier, or a run folder (then its student.pt)")
    add("--topk", type=ranged(int, 1), default=5, metavar="K", help="number of classes per video")
    args = parser.parse_args(argv)
    device = prepare(args)
    args.precision = args.precision or default_precision(args.device)
    if bool(args.videos) != bool(args.checkpoint) or (args.videos and args.paths):
        raise UserError("a prediction needs both --videos and --checkpoint, and takes no PATH")
    if args.videos:
        predict(args, device)
        return

    found = find_classifiers(args.paths or [Path("runs/toy")])
    if args.output and len(found) > 1:
        raise UserError("--output takes the results of one folder")
    results = []
    problems = []
    for folder, classifiers in found.items():
        rows = evaluate_folder(folder, classifiers, args, device)
        results += rows
        if args.output:  # two run folders may share it
            rows = [{**row, "folder": str(folder)} for row in rows]
        try:
            open((args.output or folder) / "predictions.csv", "a").close()
            write_results(args.output or folder, rows)
        except (OSError, UserError) as error:
            problems.append(f"{error}{ELSEWHERE}")
    if len(found) > 1:
        print_means(results)
    if problems:
        raise UserError(problems[0])


def find_classifiers(paths):
    """{folder: {file name: content}} of the classifiers in run folders, or of those named."""
    found = {}
    for path in paths:
        if not path.exists() and path.suffix != ".pt":
            runs = sorted({str(file.parent) for file in Path("runs").glob("*/*.pt")})
            raise UserError(f"{path}: no such run folder; there are {', '.join(runs) or 'none'}")
        contents = {}
        for file in sorted(path.glob("*.pt")) if path.is_dir() else [path]:
            try:
                saved = read_checkpoint(file, ".", finished=False)
            except UserError as error:
                if file == path:
                    raise
                print0(f"passed over: {error}")
                continue
            if saved.get("stage") in ("finetune", "student"):
                contents[file.name] = saved
        if not contents:
            raise UserError(f"{path}: no trained classifier; finetune.py and train_student.py "
                            "write them")
        found.setdefault(path if path.is_dir() else path.parent, {}).update(contents)
    return found


def evaluate_folder(folder, classifiers, args, device):
    """Evaluate a folder's classifiers, and both teachers combined: print the table, write
    predictions.csv -> the objects of results.json, the baseline first, students last."""
    begin = time.perf_counter()
    trained = classifiers.get("student.pt", next(iter(classifiers.values())))["args"]
    root = os.path.normpath(args.root or trained["root"])
    videos = read_videos(trained["data"], root, False, trained["split"])
    for name, saved in list(classifiers.items()):
        if videos.classes != saved["classes"]:
            print0(f"passed over: {folder / name}: made for other classes than those of {root}")
            del classifiers[name]
    if not classifiers:
        raise UserError(f"{folder}: no classifier for the classes of {root}")
    first = next(iter(classifiers))
    trained = classifiers[first]["args"]
    digests = {name: weight_digest(saved) for name, saved in classifiers.items()}
    for name, saved in classifiers.items():
        if different := [key for key in ("data", "split", "frames", "stride", "size")
                         if saved["args"][key] != trained[key]]:
            raise UserError(f"{folder}: {first} and {name} differ in {', '.join(different)}: "
                            "evaluate them one by one")
        for key, what in {"arch": "networks", "labeled": "labelled videos"}.items():
            if saved[key] != classifiers[first][key]:
                print0(f"note: {first} and {name} have different {what}")
        for source, digest in saved["made_from"].items():
            if digests.get(source, digest) != digest:
                print0(f"note: {source} has changed since {name} was made from it")
    share = 100 * np.bincount(videos.labels).max() / len(videos)
    print0(f"{len(videos)} test videos of {len(videos.classes)} classes: chance is "
           f"{100 / len(videos.classes):.1f} %, the most frequent class has {share:.1f} %")
    output = (args.output or folder) / "predictions.csv"
    rows = class_probabilities(classifiers, videos, args, device, output)
    if unreadable := len(videos) - len(rows):
        if unreadable > 0.1 * len(videos):
            raise UserError(f"{unreadable} of {len(videos)} test videos cannot be decoded: repair "
                            "or remove them")
        print0(f"{unreadable} test videos cannot be decoded and count as wrong")
    ids = list(rows)
    p = dict(zip(classifiers, torch.stack(list(rows.values()), 1)))  # (N, C) of each
    described = {name: describe(name, saved, p[name], ids, videos, root, args)
                 for name, saved in classifiers.items()}
    if all(name in classifiers for name in TEACHERS):
        teachers = order_teachers({name: classifiers[name] for name in TEACHERS})
        p_inv, p_dist = (p[name] for name in teachers)
        both = combine_on_test_videos(p_inv, p_dist, ids, teachers, folder, videos, args, device)
        p |= both
        for name in both:
            described[name] = {
                **described[TEACHERS[0]],
                "checkpoint": name,
                "stage": "teachers",
                "init": None,
                "epochs": min(saved["epoch"] for saved in teachers.values()),
                "finished": all(saved["finished"] for saved in teachers.values()),
                **accuracies(p[name], ids, videos),
            }
    seconds = round(time.perf_counter() - begin, 1)  # for all of them
    results = sorted(({**r, "seconds": seconds} for r in described.values()), key=lambda r: (
        r["stage"] == "student", r["checkpoint"] != "labeled_only.pt"))
    print_results(folder, results)
    if "teachers, mean" in p:
        agree = (p_inv.argmax(1) == p_dist.argmax(1)).double().mean()
        print0(f"both teachers predict the same class for {100 * agree:.1f} % of the test "
               "videos: there TSTR and the mean cannot differ")
    last = "student.pt" if "student.pt" in p else results[-1]["checkpoint"]
    print0(f"worst classes of {last}:", "; ".join(worst_classes(p[last], ids, videos)) + "\n")
    return results


def write_results(folder, results):
    """Put rows into results.json in the place of those of the same checkpoint, data, clips and
    scales. The teachers' combinations count as one."""
    def key(row):
        name = "teachers" if row["stage"] == "teachers" else row["checkpoint"]
        return [name, *(row.get(k) for k in (
            "folder", "data", "root", "split", "clips", "scales"))]

    path = folder / "results.json"
    new = [key(row) for row in results]
    new += [["teachers", *key(row)[1:]] for row in results if row["checkpoint"] in TEACHERS]
    try:
        kept = [row for row in json.loads(path.read_text()) if key(row) not in new]
    except FileNotFoundError:
        kept = []
    except (OSError, ValueError, TypeError, LookupError):
        raise UserError(f"{path} is damaged, so nothing was added: remove it") from None
    write_text(path, json.dumps(kept + results, indent=1))


def describe(name, saved, p, ids, videos, root, args):
    """The object of results.json of a classifier, but for the seconds."""
    return {
        "checkpoint": name,
        "stage": saved["stage"],
        "arch": saved["arch"],
        **{key: saved["args"][key] for key in ("init", "data", "split", "percent", "seed")},
        "root": root,
        "labeled_count": len(saved["labeled"]),
        "labeled_set": saved["made_from"]["the set of labelled videos"],
        "epochs": saved["epoch"],
        "finished": saved["finished"],
        **accuracies(p, ids, videos),
        "unreadable": len(videos) - len(ids),
        "clips": args.clips,
        "scales": args.scales,
    }


def accuracies(p, ids, videos):
    """Per cent of all videos, from p (N, C) of those with these ids; the others are wrong."""
    hits = np.zeros((len(videos), min(5, len(videos.classes))), bool)  # by each of the top five
    hits[ids] = p.topk(hits.shape[1]).indices.numpy() == videos.labels[ids, None]
    right = hits[:, 0]
    per_class = {videos.classes[c]: 100 * float(right[videos.labels == c].mean())
                 for c in np.unique(videos.labels)}
    return {
        "right": int(right.sum()),
        "top1": 100 * float(right.mean()),
        "top5": 100 * float(hits.any(1).mean()),
        "mean_class_accuracy": float(np.mean(list(per_class.values()))),
        "videos": len(videos),
        "per_class": per_class,
    }


def worst_classes(p, ids, videos):
    """Of the three classes with the lowest accuracies: what their videos were taken for."""
    predicted = dict(zip(ids, p.argmax(1)))
    taken_for = {}
    for i, label in enumerate(videos.labels.tolist()):
        best = videos.classes[predicted[i]] if i in predicted else UNREADABLE
        taken_for.setdefault(videos.classes[label], Counter())[best] += 1
    share = {c: counts[c] / counts.total() for c, counts in taken_for.items()}
    for c in sorted(share, key=share.get)[:3]:
        wrong = [f"{name} {count}" for name, count in taken_for[c].most_common() if name != c]
        yield f"{c} {100 * share[c]:.1f} (taken for {', '.join(wrong[:3]) or 'nothing else'})"


def combine_on_test_videos(p_inv, p_dist, ids, teachers, folder, videos, args, device):
    """Eq. 7 on the test videos with these ids, {row's name: (N, C)}: with s = 1/2, and with s of
    Eq. 6 if the networks of stage 1 are there. Empty if the teachers' labelled videos differ.

    p_inv, p_dist: (N, C). teachers: {name: content} of their checkpoints."""
    inv, dist = teachers.values()
    if inv["labeled"] != dist["labeled"]:
        print0("no rows of both teachers: they were fine-tuned on different labelled videos")
        return {}
    scores = {"teachers, mean": torch.full((len(ids),), 0.5)}
    try:
        scores["teachers, TSTR"] = score_test_videos(ids, teachers, folder, videos, args, device)
    except UserError as error:
        print0(f"no row for TSTR: {error}")
    return {title: combine_teachers(p_inv, p_dist, score) for title, score in scores.items()}


def score_test_videos(ids, teachers, folder, videos, args, device):
    """s of Eq. 6 of the test videos with these ids: (N,). UserError without the networks of stage 1
    from which the teachers were made."""
    if not fit_tstr(teachers):
        raise UserError("it needs a teacher of pretrain_inv.py and one of pretrain_dist.py")
    matrices = []
    for saved in teachers.values():
        stage_1 = read_stage_1(saved, folder)
        settings = argparse.Namespace(**{**stage_1["args"], "workers": args.workers,
                                         "precision": args.precision})
        embedder = Embedder(build_model(stage_1["arch"], len(stage_1["classes"])))
        embedder.backbone.load_state_dict(stage_1["model"])
        embedder.head.load_state_dict(stage_1["head"])
        embedder.to(device, memory_format=torch.channels_last_3d)
        matrices.append(compare_clips(embedder, videos, settings, device))
    try:
        return score_videos(ids, *matrices)
    except ValueError:
        raise UserError("the teachers come from stage 1 with other --clips") from None


def read_stage_1(saved, folder):
    """The checkpoint of stage 1 from which a teacher was fine-tuned, from the folder or from where
    it lay then; UserError if it is in neither."""
    trained = saved["args"]
    then = Path(trained["init"])
    if not os.path.dirname(then):
        then = Path(trained["pretrained"] or trained["out"], then)
    for path in (folder / then.name, then):
        if path.exists():
            stage_1 = read_checkpoint(path, ".", finished=False)
            if weight_digest(stage_1) == saved["made_from"][trained["init"]]:
                return stage_1
    raise UserError(f"{then}, from which a teacher was made, is not there or has changed")


def class_probabilities(classifiers, videos, args, device, output, topk=None):
    """Softmax of classifiers, averaged over uniformly spaced clips and centre crops of the given
    shares of the short side (Sec. 4.2): {id: (classifiers, C)}, without unreadable videos.

    classifiers: {name: content} of checkpoints whose clips are alike. output: the file that gets
    the most probable class of each video as soon as it is known. topk: so many, printed, too."""
    models = [load_classifier(saved, device) for saved in classifiers.values()]
    trained = argparse.Namespace(**next(iter(classifiers.values()))["args"])

    def probabilities(video):
        crops = torch.stack([centre_crop(clip, trained.size, scale)
                             for clip in video.split(trained.frames) for scale in args.scales])
        p = []
        for model in models:
            with autocast(args, device):
                logits = model(to_input(crops, model))
            p.append(logits.float().softmax(1).mean(0))
        return torch.stack(p)

    def write(i, p):
        c = videos.classes[videos.labels[i]] if videos.labels[i] >= 0 else None
        for k, name in enumerate(classifiers):
            top = {UNREADABLE: None}
            if p is not None:
                best = p[k].argsort(descending=True)[:topk or 1].tolist()
                top = {videos.classes[j]: round(p[k, j].item(), 4) for j in best}
            for predicted, share in top.items():
                lines.writerow([name, videos.names[i], c, predicted, share])
            if topk and p is not None:  # in each process of torchrun, of its share of the videos
                classes = ", ".join(f"{c} {100 * share:.1f} %" for c, share in top.items())
                print0(f"{videos.names[i]}:", classes, everywhere=True)

    with contextlib.suppress(OSError):
        if rank() == 0:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            Path(output).write_text("checkpoint,video,class,predicted class,probability\n")
    barrier()
    how = {"newline": "", "errors": "surrogateescape", "buffering": 1}
    try:
        file = open(output, "a", **how)
    except OSError:
        file = open(os.devnull, "a", **how)  # what is printed comes first, then the error
    with file:
        lines = csv.writer(file, lineterminator="\n")
        dataset = Frames(videos, trained.frames, trained.stride, trained.size)
        positions = [0.5] if args.clips == 1 else np.linspace(0, 1, args.clips)
        return map_videos(probabilities, dataset, positions, args.workers, device, "evaluation",
                          write)


def predict(args, device):
    """Print the most probable classes of each of --videos when it is done."""
    if args.checkpoint.is_dir():
        args.checkpoint /= "student.pt"
    classifiers = find_classifiers([args.checkpoint])[args.checkpoint.parent]
    [saved] = classifiers.values()
    if not saved["finished"]:
        print0(f"note: {args.checkpoint} is unfinished (epoch {saved['epoch']} of "
               f"{saved['args']['epochs']})")
    names = []
    for path in args.videos:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in sorted(list_videos(path))]
        if not files:
            raise UserError(f"{path}: no video here")
        names += files

    videos = Videos("", names, [-1] * len(names), saved["classes"])
    output = (args.output or args.checkpoint.parent) / "predictions.csv"
    rows = class_probabilities(classifiers, videos, args, device, output, args.topk)
    if not rows:
        print0("none of these videos can be decoded")
        raise SystemExit(1)
    try:
        open(output, "a").close()
    except OSError as error:
        raise UserError(f"{error}{ELSEWHERE}") from None


# ---- Tables --------------------------------------------------------------------------------------
def print_results(folder, results):
    rows = []
    for r in results:
        low, high = wilson_interval(r["right"], r["videos"])
        rows.append([title(r), r["labeled_count"], f"{r['right']} of {r['videos']}",
                     f"{low:.1f} to {high:.1f}", *(f"{r[key]:.1f}" for key in METRICS)])
    scales = " ".join(map(str, results[0]["scales"]))
    print_table([f"{folder}, clips {results[0]['clips']}, scales {scales}", "labels", "right",
                 "95 % interval", *METRICS.values()], rows)


def title(result):
    if result["finished"]:
        return result["checkpoint"]
    return f"{result['checkpoint']} (unfinished, epoch {result['epochs']})"


def wilson_interval(right, count):
    """The 95 % interval of an accuracy in per cent (Wilson), if other videos had been drawn."""
    z = 1.96
    share = right / count
    middle = share + z**2 / (2 * count)
    reach = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return 100 * (middle + np.array([-reach, reach])) / (1 + z**2 / count)


def print_means(results):
    """Mean and standard deviation over run folders of their rows of one name, which agree in data,
    network and number of labels."""
    rows_of = {}
    for r in results:
        data = r["root"] if r["data"] == "folder" else f"{r['data']} {r['split']}"
        row = title(r), data, r["arch"], r["labeled_count"]
        rows_of.setdefault(row, []).append(r)
    rows = []
    for row, same in rows_of.items():
        rows.append([*row, len(same), *(spread([r[key] for r in same]) for key in METRICS)])
    print_table(["mean ± standard deviation", "data, split", "network", "labels", "runs",
                 *METRICS.values()], rows)


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
