"""evaluate.py, and the scripts in docs/ that read its results."""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common as tb
import evaluate
from test_common import EVALUATE, HERE, load, read_results, run_stage

CPU = torch.device("cpu")


def make_folder(root, toy, counts):
    """A data set of --data folder: one training video and some test videos, {class: count}."""
    video = tb.read_videos("toy", toy, False).path(0)
    for c, count in counts.items():
        for part, n in (("train", 1), ("test", count)):
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                shutil.copy(video, root / part / c / f"{i}.avi")


def save_classifier(path, root, order=None, **changes):
    """A checkpoint of stage 2 of a data set of make_folder, to which the k-th class of `order` (all
    classes as they come) has a probability in proportion to exp(-k), whatever the video."""
    classes = tb.read_videos("folder", root, True).classes
    model = tb.build_model("r3d_tiny", len(classes))
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = -torch.tensor([(order or classes).index(c) for c in classes]).float()
    args = {"init": "inv.pt", "data": "folder", "root": str(root), "split": 1, "percent": 10,
            "seed": 0, "frames": 4, "stride": 1, "size": 16, "epochs": 7}
    args.update(changes.pop("args", {}))
    content = {"stage": "finetune", "arch": "r3d_tiny", "classes": classes, "labeled": ["0.avi"],
               "epoch": 7, "finished": True, "args": args, "model": model.state_dict()}
    path.parent.mkdir(exist_ok=True)
    torch.save(content | changes, path)


def cells(text, name):
    """The cells of the last row of a printed table that begins with a name."""
    row = [line for line in text.splitlines() if line.startswith(f"| {name} ")][-1]
    return [cell.strip() for cell in row.split("|")[1:-1]]


def read_predictions(path):
    return [tuple(row.values()) for row in csv.DictReader(io.StringIO(path.read_text()))]


# ---- The table, results.json and predictions.csv -------------------------------------------------

def test_two_classes_of_which_one_is_never_recognised(toy, tmp_path, capsys):
    """One of five test videos cannot be decoded."""
    make_folder(tmp_path / "data", toy, {"a": 3, "b, c": 2})
    (tmp_path / "data/test/b, c/1.avi").write_text("broken")
    run = tmp_path / "run"
    save_classifier(run / "x_ft.pt", tmp_path / "data")
    evaluate.main([str(run), *EVALUATE])
    printed = capsys.readouterr()
    assert ("5 test videos of 2 classes: chance is 50.0 %, the most frequent class has 60.0 %"
            in printed.out.splitlines()[0])
    assert cells(printed.out, run) == [str(run), "labels", "top-1", "mean class"]
    assert cells(printed.out, "x_ft.pt") == ["x_ft.pt", "1", "60.0", "50.0"]
    assert ("worst classes of x_ft.pt: b, c 0.0 (taken for a 1, cannot be decoded 1); a 100.0 "
            "(taken for nothing else)" in printed.out)
    assert "1.avi" in printed.err and "1 test videos cannot be decoded" in printed.out
    p = round(1 / (1 + math.exp(-1)), 4)
    assert sorted(read_predictions(run / "predictions.csv")) == [
        *(("x_ft.pt", f"test/a/{i}.avi", "a", "a", f"{p}") for i in range(3)),
        ("x_ft.pt", "test/b, c/0.avi", "b, c", "a", f"{p}"),
        ("x_ft.pt", "test/b, c/1.avi", "b, c", "cannot be decoded", "")]
    result, = read_results(run)
    assert result.pop("seconds") >= 0
    assert result == {
        "checkpoint": "x_ft.pt", "stage": "finetune", "init": "inv.pt", "arch": "r3d_tiny",
        "data": "folder", "split": 1, "percent": 10, "labeled_count": 1, "seed": 0, "epochs": 7,
        "finished": True, "top1": 60, "top5": 80, "mean_class_accuracy": 50, "videos": 5,
        "unreadable": 1, "per_class": {"a": 100, "b, c": 0}, "clips": 2, "scales": [1, 0.8, 0.7]}


def test_six_classes_have_top_5_and_runs_have_means(toy, tmp_path, capsys):
    """The baseline comes first, students last; the worst classes are those of student.pt."""
    make_folder(tmp_path / "data", toy, dict.fromkeys("abcdef", 1) | {"b": 3})
    for run, order, names in [
            ("1", "abcdef", ["labeled_only.pt", "student.pt", "student_x.pt", "x_ft.pt"]),
            ("2", "bacdef", ["student.pt", "x_ft.pt"])]:
        for name in names:
            save_classifier(tmp_path / run / name, tmp_path / "data", order,
                            stage="student" if "student" in name else "finetune",
                            finished=name != "x_ft.pt", epoch=3)
    evaluate.main([str(tmp_path / "1"), str(tmp_path / "2"), *EVALUATE])
    first, second, means = re.split(r" \n\n", capsys.readouterr().out.strip())
    names = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("|")][2:]
    assert names == ["labeled_only.pt", "x_ft.pt (unfinished, epoch 3)", "student.pt",
                     "student_x.pt"]
    assert cells(first, "student.pt")[1:] == ["1", "12.5", "87.5", "16.7"]
    assert cells(second, "student.pt")[1:] == ["1", "37.5", "87.5", "16.7"]
    assert "worst classes of student.pt: b 0.0 (taken for a 3); c 0.0 (taken for a 1); d" in first
    assert cells(means, "student.pt") == ["student.pt", "2", "25.0 ± 17.7", "87.5 ± 0.0",
                                          "16.7 ± 0.0"]
    assert cells(means, "student_x.pt")[1:3] == ["1", "12.5 ± 0.0"]


def test_accuracy_counts_what_the_model_says(chain, toy, tmp_path):
    """The mean over two clips, first and last, in three sizes."""
    videos = tb.read_videos("toy", toy, False)
    saved = load(chain, "student")
    model = tb.load_classifier(saved, CPU)
    args = argparse.Namespace(clips=2, scales=[1, 0.8, 0.7], workers=0, precision="fp32")
    rows = evaluate.class_probabilities({"student.pt": saved}, videos, args, CPU,
                                        tmp_path / "predictions.csv")
    right = {}
    for i in range(8):
        p = []
        for start in (0, len(tb.decode_frames(videos.path(i), range)) - 8):
            clip = tb.decode_frames(videos.path(i), range(start, start + 8), short_side=20)
            for scale in args.scales:
                x = tb.to_input([tb.centre_crop(clip, 16, scale)], model)
                p.append(model(x).softmax(1))
        p = torch.cat(p).mean(0)
        assert rows[i][0].allclose(p, atol=1e-5)
        right[videos.classes[videos.labels[i]]] = 100 * (int(p.argmax()) == videos.labels[i])
    result = read_results(chain)[-1]
    assert result["checkpoint"] == "student.pt" and result["per_class"] == right
    assert result["top1"] == pytest.approx(np.mean(list(right.values())))


# ---- Both teachers together ----------------------------------------------------------------------

def test_teachers_are_combined_by_the_similarity_of_the_test_video(chain, toy):
    """Eq. 7, with s from the networks of stage 1 on the middle of each test video."""
    videos = tb.read_videos("toy", toy, False)
    teachers = {name: load(chain, name[:-3]) for name in evaluate.TEACHERS}
    p = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(2)
    p_inv, p_dist = map(dict, map(enumerate, p))
    args = argparse.Namespace(workers=0, precision="fp32")
    rows = evaluate.combine_on_test_videos(p_inv, p_dist, teachers, chain, videos, args, CPU)
    embedders = [evaluate.load_embedder(load(chain, name), CPU) for name in ("inv", "dist")]
    for i in range(8):
        first = (len(tb.decode_frames(videos.path(i), range)) - 15) // 2
        clip = tb.decode_frames(videos.path(i), range(first, first + 16), short_side=20)
        clips = [tb.centre_crop(half, 16) for half in clip.split(8)]
        s = 0
        for embedder in embedders:
            with torch.no_grad():
                a, b = embedder(tb.to_input(clips, embedder.backbone))
            s += float(a @ b) / 2
        s = min(1, max(0, s))
        assert rows["teachers, mean"][i].allclose((p[0, i] + p[1, i]) / 2)
        assert rows["teachers, TSTR"][i].allclose(s * p[0, i] + (1 - s) * p[1, i], atol=1e-4)


def test_teachers_that_have_moved_find_stage_1_beside_them(chain, tmp_path):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    for name in ("inv_ft", "dist_ft"):
        saved = load(tmp_path, name)
        saved["args"]["out"] = "gone"
        torch.save(saved, tmp_path / f"{name}.pt")
    evaluate.main([str(tmp_path), *EVALUATE])
    before, after = ([{**r, "seconds": 0} for r in read_results(out)] for out in (chain, tmp_path))
    assert before == after and after[4]["checkpoint"] == "teachers, TSTR"


def test_stage_1_with_different_clips_costs_one_line(chain, toy, tmp_path, capsys, complaint):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "student.pt").unlink()
    for name in ("dist", "dist_ft"):
        saved = load(chain, name)
        saved["similarity"] = torch.ones(24, 3, 3)
        saved["args"] |= {"out": str(tmp_path), "clips": 3}
        torch.save(saved, tmp_path / f"{name}.pt")
    evaluate.main([str(tmp_path), *EVALUATE])
    assert "no row for TSTR: " in capsys.readouterr().out
    assert "other --clips" in complaint(run_stage, "student", toy, tmp_path)


def test_classifiers_that_want_other_clips_cost_one_line(toy, tmp_path, complaint):
    make_folder(tmp_path / "data", toy, {"a": 1, "b": 1})
    save_classifier(tmp_path / "run/x_ft.pt", tmp_path / "data")
    save_classifier(tmp_path / "run/y_ft.pt", tmp_path / "data", args={"frames": 8, "size": 24})
    error = complaint(evaluate.main, [str(tmp_path / "run"), *EVALUATE])
    assert "x_ft.pt and y_ft.pt differ in frames, size" in error


# ---- Prediction ----------------------------------------------------------------------------------

@pytest.fixture
def classifier(toy, tmp_path):
    """Of three classes, a before b before c."""
    make_folder(tmp_path / "data", toy, dict.fromkeys("abc", 1))
    save_classifier(tmp_path / "student.pt", tmp_path / "data", stage="student")
    return tmp_path / "student.pt"


P = [math.exp(-k) / (1 + math.exp(-1) + math.exp(-2)) for k in range(3)]  # of the classifier above


@pytest.mark.parametrize("flags, file, count", [
    ([], "predictions.csv", 3), (["--topk", 2, "--output", "new/x.csv"], "new/x.csv", 2)])
def test_prediction_of_one_s_own_videos(flags, file, count, classifier, toy, tmp_path,
                                        monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    video = tb.read_videos("toy", toy, False).path(0)
    (tmp_path / "clips/deep").mkdir(parents=True)
    shutil.copy(video, tmp_path / "clips/deep/a: #1, é.avi")
    (tmp_path / "clips/z.avi").write_text("broken")
    evaluate.main(["--videos", video, "clips", "--checkpoint", str(tmp_path), *map(str, flags),
                   *EVALUATE])
    printed = capsys.readouterr()
    best = ", ".join(f"{c} {100 * p:.1f} %" for c, p in zip("abc"[:count], P))
    names = [video, os.path.join("clips", "deep", "a: #1, é.avi")]
    assert printed.out.splitlines() == [f"{name}: {best}" for name in names]
    assert os.path.join("clips", "z.avi") in printed.err
    assert read_predictions(tmp_path / file) == [
        *(("student.pt", name, "", c, str(round(p, 4)))
          for name in names for c, p in zip("abc"[:count], P)),
        ("student.pt", os.path.join("clips", "z.avi"), "", "cannot be decoded", "")]


# ---- Mistakes ------------------------------------------------------------------------------------

def test_a_prediction_by_an_unfinished_classifier_says_so(classifier, toy, tmp_path, capsys):
    video = tb.read_videos("toy", toy, False).path(0)
    save_classifier(classifier, tmp_path / "data", finished=False, epoch=3)
    evaluate.main(["--videos", video, "--checkpoint", str(classifier), *EVALUATE])
    assert "student.pt is unfinished (epoch 3 of 7)" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_each_video_is_printed_as_soon_as_it_is_done(classifier, toy, tmp_path):
    """The second video is a pipe, which ends when the line of the first has come."""
    os.mkfifo(tmp_path / "pipe.avi")
    videos = [tb.read_videos("toy", toy, False).path(0), str(tmp_path / "pipe.avi")]
    with subprocess.Popen(
            [sys.executable, "-u", "evaluate.py", "--videos", *videos, "--checkpoint",
             str(classifier), *EVALUATE], cwd=HERE, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert select.select([process.stdout], [], [], 60)[0], "no line in a minute"
            assert process.stdout.readline().startswith(f"{videos[0]}: a 66.5 %")
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError):  # nobody reads
                    os.close(os.open(videos[1], os.O_WRONLY | os.O_NONBLOCK))
                time.sleep(0.05)
            assert process.poll() == 0
        finally:
            process.kill()


def test_nothing_that_can_be_decoded_ends_in_1(classifier, tmp_path, capsys):
    (tmp_path / "z.avi").write_text("broken")
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--videos", str(tmp_path / "z.avi"), "--checkpoint", str(classifier),
                       *EVALUATE])
    assert end.value.code == 1
    assert "none of these videos can be decoded" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("runs/x", "runs/x: no such run folder; there are runs/one, runs/two"),
    ("runs/one/inv_ft.pt", "inv_ft.pt: no such checkpoint"),
    ("runs/two", "runs/two: no trained classifier; finetune.py and train_student.py write them"),
    ("data --scales 2", "--scales"),
    ("runs/one --root nowhere", "nowhere"),
    ("runs/one --root other", "student.pt: made for other classes"),
    ("runs/one --videos data --checkpoint runs/one", "takes no PATH"),
    ("--videos data", "--checkpoint"),
    ("--checkpoint runs/one", "--videos"),
    ("--videos data/no.mp4 --checkpoint runs/one", "data/no.mp4: no such file"),
    ("--videos data --checkpoint runs/one --output data/train", "data/train cannot be written"),
    ("--videos data --checkpoint runs/two", "student.pt: no such checkpoint"),
    ("--videos data --checkpoint runs/two/inv.pt", "inv.pt: no trained classifier")])
def test_a_mistake_costs_one_line(flags, words, classifier, toy, tmp_path, monkeypatch,
                                 complaint):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "other", toy, {"d": 1})
    for name in ("one/student.pt", "two/inv.pt"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True)
        shutil.copy(classifier, tmp_path / "runs" / name)
    save_classifier(tmp_path / "runs/two/inv.pt", tmp_path / "data", stage="pretrain_inv")
    assert words in complaint(evaluate.main, [*flags.split(), "--device", "cpu"])
    assert not list(tmp_path.rglob("*.json")) + list(tmp_path.rglob("*.csv"))


# ---- docs/study/: differences, unlabelled videos, two figures of the paper -----------------------

def script(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"docs/study/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_differences_within_runs(tmp_path, capsys):
    """Of three runs, of which one lacks a row; folders and files are read alike."""
    top1 = {"labeled_only.pt": [50, 40], "dist_ft.pt": [55, 47, 58], "student.pt": [54, 50, 66]}
    for k in range(3):
        results = [{"checkpoint": name, "top1": values[k]}
                   for name, values in top1.items() if k < len(values)]
        (tmp_path / f"{k}").mkdir()
        (tmp_path / f"{k}/results.json").write_text(json.dumps(results))
    paths = [tmp_path / "0", tmp_path / "1/results.json", tmp_path / "2"]
    script("intervals").main([*map(str, paths), "--against", "labeled_only.pt", "dist_ft.pt"])
    printed = capsys.readouterr().out
    half = 4.3027 * statistics.stdev([-1, 3, 8]) / math.sqrt(3)
    assert cells(printed, "student.pt") == [
        "student.pt", "3", "56.7 ± 8.3", "+7.0 ± 4.2", "-31.1 to +45.1", "2 of 2",
        "+3.3 ± 4.5", f"{10 / 3 - half:+.1f} to {10 / 3 + half:+.1f}", "2 of 3"]
    assert cells(printed, "labeled_only.pt")[1:6] == ["2", "45.0 ± 7.1", "", "", ""]


def test_what_is_known_of_the_unlabelled_videos(chain, capsys):
    """By each video's middle clip, one after the other; of toy's groups two clips each count."""
    unlabeled = script("unlabeled")
    assert unlabeled.group_of("Diving/v_Diving_g08_c02.avi") == "Diving/v_Diving_g08"

    def group_of(name):
        return name[:-5], int(name[-5]) // 2

    unlabeled.group_of = group_of
    unlabeled.main([str(chain), "--rows", "student.pt", "inv_ft.pt", "--device", "cpu",
                    "--precision", "fp32", "--workers", "0"])
    printed = capsys.readouterr().out
    labeled = load(chain, "inv_ft")["labeled"]
    args = argparse.Namespace(**load(chain, "inv_ft")["args"])
    groups = {group_of(name) for name in labeled}
    videos = tb.read_videos("toy", args.root, True)
    rest = [i for i, name in enumerate(videos.names) if name not in labeled]
    easy = np.array([group_of(videos.names[i]) in groups for i in rest])
    right = {}
    for name in ("student", "inv_ft"):
        model = tb.load_classifier(load(chain, name), CPU)
        best = []
        for i in rest:
            clip = tb.decode_frames(videos.path(i), range)
            clip = clip[tb.clip_indices(len(clip), args.frames, args.stride)]
            clip = tb.centre_crop(clip, args.size)
            best.append(model(tb.to_input([clip], model)).argmax().item())
        right[name] = 100 * (np.array(best) == videos.labels[rest])
    of_student = [right["student"], right["student"][easy], right["student"][~easy]]
    assert cells(printed, "student.pt")[1:4] == [f"{x.mean():.1f} ± 0.0" for x in of_student]
    apart = right["student"].mean() - right["inv_ft"].mean()
    assert cells(printed, "student.pt")[5].startswith(f"{apart:+.1f} ")
    assert printed.splitlines()[-7].startswith(f"{100 * easy.mean():.1f} ")


def test_figures_are_drawn(chain, tmp_path, capsys):
    script("draw").main([str(chain), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(cells(printed, c) for c in load(chain, "inv_ft")["classes"])
    for name in ("classes", "similarity"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
