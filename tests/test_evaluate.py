"""evaluate.py, and the study's programs that read its results."""

import argparse
import csv
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import common as tb
import evaluate
from docs.study import cached, draw, intervals, unlabeled, weight
from test_common import EVALUATE, HERE, load, read_results, run_stage, same
from train_student import find_moved, weigh_videos

CPU = torch.device("cpu")


def make_folder(root, toy, counts):
    """A data set of --data folder: one training video and some test videos, {class: count}."""
    video = tb.read_videos("toy", toy, False).path(0)
    for c, count in counts.items():
        for part, n in (("train", 1), ("test", count)):
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                shutil.copy(video, root / part / c / f"{i}.avi")


def save_classifier(path, root, order=None, frames=4, **changes):
    """A checkpoint of stage 2 of a data set of make_folder, to which the k-th class of `order` (all
    classes as they come) has a probability in proportion to exp(-k), whatever the video."""
    classes = tb.read_videos("folder", root, True).classes
    model = tb.build_model("r3d_tiny", len(classes))
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = -torch.tensor([(order or classes).index(c) for c in classes]).float()
    args = {"init": "inv.pt", "data": "folder", "root": str(root), "split": 1, "percent": 10,
            "seed": 0, "frames": frames, "stride": 1, "size": 16, "epochs": 7,
            "pretrained": "gone"}
    content = {"stage": "finetune", "arch": "r3d_tiny", "classes": classes, "labeled": ["0.avi"],
               "epoch": 7, "finished": True, "args": args,
               "made_from": {"the set of labelled videos": "5e7"},
               "model": model.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, path)


@pytest.fixture
def classifier(toy, tmp_path):
    """Of three classes, a before b before c."""
    make_folder(tmp_path / "data", toy, dict.fromkeys("abc", 1))
    save_classifier(tmp_path / "student.pt", tmp_path / "data", stage="student")
    return tmp_path / "student.pt"


def cells(text, name):
    """The cells of the last row of a printed table that begins with a name."""
    row = [line for line in text.splitlines() if line.startswith(f"| {name} ")][-1]
    return [cell.strip() for cell in row.split("|")[1:-1]]


def read_predictions(path):
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["checkpoint", "video", "class", "predicted class", "probability"]
    return rows


# ---- The table, results.json and predictions.csv -------------------------------------------------

def test_two_classes_of_which_one_is_never_recognised(toy, tmp_path, capsys):
    """One of ten test videos cannot be decoded; two are too many."""
    make_folder(tmp_path / "data", toy, {"a": 6, "b, c": 4})
    (tmp_path / "data/test/b, c/1.avi").write_text("broken")
    run = tmp_path / "run"
    save_classifier(run / "x_ft.pt", tmp_path / "data")
    evaluate.main([str(run), *EVALUATE])
    printed = capsys.readouterr()
    assert printed.out.startswith("10 test videos of 2 classes: chance is 50.0 %, the most "
                                  "frequent class has 60.0 %\n")
    title = f"{run}, clips 2, scales 1.0 0.8 0.7"
    assert cells(printed.out, title) == [title, "labels", "right", "95 % interval", "top-1",
                                         "top-5", "mean class"]
    # Wilson's interval, by its quadratic equation: (p - 0.6)^2 = 1.96^2 p (1 - p) / 10
    roots = np.roots([1 + 0.38416, -1.2 - 0.38416, 0.36])
    assert cells(printed.out, "x_ft.pt") == [
        "x_ft.pt", "1", "6 of 10", f"{100 * min(roots):.1f} to {100 * max(roots):.1f}", "60.0",
        "90.0", "50.0"]
    assert ("worst classes of x_ft.pt: b, c 0.0 (taken for a 3, cannot be decoded 1); a 100.0 "
            "(taken for nothing else)" in printed.out)
    assert "1.avi" in printed.err and "1 test videos cannot be decoded" in printed.out
    assert sorted(read_predictions(run / "predictions.csv")) == [
        *(["x_ft.pt", f"test/a/{i}.avi", "a", "a", "0.7311"] for i in range(6)),
        ["x_ft.pt", "test/b, c/0.avi", "b, c", "a", "0.7311"],
        ["x_ft.pt", "test/b, c/1.avi", "b, c", "cannot be decoded", ""],
        *(["x_ft.pt", f"test/b, c/{i}.avi", "b, c", "a", "0.7311"] for i in (2, 3))]
    result, = read_results(run)
    assert result.pop("seconds") >= 0
    assert result == {
        "checkpoint": "x_ft.pt", "stage": "finetune", "init": "inv.pt", "arch": "r3d_tiny",
        "data": "folder", "root": str(tmp_path / "data"), "split": 1, "percent": 10,
        "labeled_count": 1, "labeled_set": "5e7", "seed": 0, "epochs": 7, "finished": True,
        "right": 6, "top1": 60, "top5": 90, "mean_class_accuracy": 50, "videos": 10,
        "unreadable": 1, "per_class": {"a": 100, "b, c": 0}, "clips": 2, "scales": [1, 0.8, 0.7]}
    (tmp_path / "data/test/a/0.avi").write_text("broken")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(run), *EVALUATE])
    assert "2 of 10 test videos cannot be decoded" in capsys.readouterr().err


def test_six_classes_have_top_5_and_runs_have_means(toy, tmp_path, capsys):
    """The baseline comes first, students last; the worst classes are those of student.pt. Means are
    over runs of as many labels, and not over finished and unfinished ones."""
    make_folder(tmp_path / "data", toy, dict.fromkeys("abcdef", 1) | {"b": 3})
    for run, order, names in [
            ("1", "abcdef", ["labeled_only.pt", "student.pt", "student_x.pt", "x_ft.pt"]),
            ("2", "bacdef", ["student.pt", "student_x.pt", "x_ft.pt"])]:
        for name in names:
            save_classifier(tmp_path / run / name, tmp_path / "data", order,
                            stage="student" if "student" in name else "finetune",
                            finished=name != "x_ft.pt" and run + name != "2student_x.pt", epoch=3,
                            labeled=["1", "2"] if (run, name) == ("2", "x_ft.pt") else [run])
    evaluate.main([str(tmp_path / "1"), str(tmp_path / "2"), *EVALUATE])
    first, second, means = re.split(r"\n\n", capsys.readouterr().out.strip())
    names = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("|")][2:]
    assert names == ["labeled_only.pt", "x_ft.pt (unfinished, epoch 3)", "student.pt",
                     "student_x.pt"]
    assert cells(first, "student.pt")[1:] == ["1", "1 of 8", "2.2 to 47.1", "12.5", "87.5", "16.7"]
    assert cells(second, "student.pt")[4:] == ["37.5", "87.5", "16.7"]
    assert "worst classes of student.pt: b 0.0 (taken for a 3); c 0.0 (taken for a 1); d" in first
    settings = [str(tmp_path / "data"), "r3d_tiny", "1"]
    assert cells(means, "student.pt")[1:] == [
        *settings, "2", "25.0 ± 17.7", "87.5 ± 0.0", "16.7 ± 0.0"]
    assert cells(means, "student_x.pt (unfinished, epoch 3)")[1:6] == [
        *settings, "1", "37.5 ± 0.0"]
    note = "note: student.pt and x_ft.pt have different labelled videos"
    assert note in second and note not in first
    assert cells(means, "x_ft.pt")[3:5] == ["2", "1"]  # labels, runs


def test_how_often_the_teachers_agree_is_printed(toy, tmp_path, monkeypatch, capsys):
    """Their rows go with them, and are unfinished as long as one of both is. By s = 1 the invariant
    one alone counts."""
    monkeypatch.setattr(evaluate, "score_test_videos", lambda ids, *_: torch.ones(len(ids)))
    make_folder(tmp_path / "data", toy, dict.fromkeys("ab", 1))
    for name, order in {"inv_ft": "ab", "dist_ft": "ba"}.items():
        save_classifier(tmp_path / f"{name}.pt", tmp_path / "data", order,
                        pretrained_by=f"pretrain_{name[:-3]}", epoch=3 if order == "ba" else 7,
                        finished=order == "ab")
    evaluate.main([str(tmp_path), *EVALUATE])
    printed = capsys.readouterr().out
    assert "both teachers predict the same class for 0.0 % of the test videos" in printed
    assert "| teachers, mean (unfinished, epoch 3) " in printed
    found = {r["checkpoint"]: r["per_class"] for r in read_results(tmp_path)}
    assert found["teachers, TSTR"] == found["inv_ft.pt"] != found["dist_ft.pt"]
    save_classifier(tmp_path / "inv_ft.pt", tmp_path / "data", labeled=["another"])
    evaluate.main([str(tmp_path), *EVALUATE])
    printed = capsys.readouterr().out
    assert "fine-tuned on different labelled videos" in printed and "same class" not in printed
    names = [r["checkpoint"] for r in read_results(tmp_path)]
    assert list(found) == [*names, "teachers, mean", "teachers, TSTR"]


def test_rows_of_other_folders_and_settings_stay(classifier, tmp_path):
    """Where two run folders share an output."""
    (tmp_path / "other").mkdir()
    shutil.copy(classifier, tmp_path / "other")
    one, other = str(tmp_path), str(tmp_path / "other")
    for run, clips in [(one, 1), (other, 1), (one, 2), (one, 1)]:
        evaluate.main([f"{run}/student.pt", "--output", f"{one}/out", *EVALUATE[2:], "--clips",
                       str(clips)])
    assert [(r["folder"], r["clips"]) for r in read_results(tmp_path / "out")] == [
        (other, 1), (one, 2), (one, 1)]


def test_other_files_of_a_run_folder_are_passed_over(classifier, toy, tmp_path, capsys):
    """A tensor, an export, a checkpoint of other classes."""
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_text("export")
    make_folder(tmp_path / "other", toy, {"d": 1})
    save_classifier(tmp_path / "c.pt", tmp_path / "other")
    evaluate.main([str(tmp_path), *EVALUATE])
    passed = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert [f"{tmp_path}/{name}.pt" in line for name, line in zip("abc", passed)] == [True] * 3
    assert [r["checkpoint"] for r in read_results(tmp_path)] == ["student.pt"]


@pytest.mark.parametrize("videos, blocked", [
    ([], "predictions.csv"), ([], "results.json"), (["data/test"], "predictions.csv")])
def test_a_folder_that_cannot_be_written_costs_no_result(videos, blocked, classifier, tmp_path,
                                                         capsys, monkeypatch):
    """Neither the table nor the printed classes; --output takes the files elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / blocked).mkdir(parents=True)  # in the file's place
    classifier.rename("run/student.pt")
    flags = ["--videos", *videos, "--checkpoint", "run"] if videos else ["run"]
    with pytest.raises(SystemExit) as end:
        evaluate.main([*flags, *EVALUATE])
    printed = capsys.readouterr()
    assert end.value.code == 2 and "student.pt" in printed.out or ": a 66.5 %" in printed.out
    assert blocked in printed.err and printed.err.count("--output") == 1
    evaluate.main([*flags, "--output", "elsewhere", *EVALUATE])
    assert len(read_predictions("elsewhere/predictions.csv")) > 2
    assert videos or read_results("elsewhere")


def test_accuracy_counts_what_the_model_says(chain, toy, tmp_path):
    """The mean over two clips, first and last, in three sizes."""
    videos = tb.read_videos("toy", toy, False)
    saved = load(chain, "student")
    model = tb.load_classifier(saved, CPU)
    args = argparse.Namespace(clips=2, scales=[1, 0.8, 0.7], workers=0, precision="fp32")
    rows = evaluate.class_probabilities({"x": saved}, videos, args, CPU, tmp_path / "x.csv")
    right = {}
    for i in range(8):
        frames = tb.decode_frames(videos.path(i), range, short_side=20)
        crops = [tb.centre_crop(clip, 16, scale)
                 for clip in (frames[:15:2], frames[-15::2]) for scale in args.scales]
        p = model(tb.to_input(torch.stack(crops), model)).softmax(1).mean(0)
        assert rows[i][0].allclose(p, atol=1e-5)
        right[videos.classes[videos.labels[i]]] = 100 * (int(p.argmax()) == videos.labels[i])
    result = read_results(chain)[-1]
    assert result["checkpoint"] == "student.pt" and result["per_class"] == right
    assert result["top1"] == pytest.approx(np.mean(list(right.values())))


# ---- Both teachers together ----------------------------------------------------------------------

def test_teachers_are_combined_by_the_similarity_of_the_test_video(chain, toy, tmp_path, capsys):
    """Eq. 7, with s from the networks of stage 1 on the middle of each test video. inv.pt has
    moved along with inv_ft.pt. There is no row for TSTR if it is for other clips, nor if it is
    another run's, as where both were written into runs/folder."""
    videos = tb.read_videos("toy", toy, False)
    teachers = {name: load(chain, name[:-3]) for name in evaluate.TEACHERS}
    teachers["inv_ft.pt"]["args"]["out"] = "gone"
    stage_1 = load(chain, "inv")
    stage_1["args"]["clips"] = 3
    torch.save(stage_1, tmp_path / "inv.pt")
    p = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(2)
    args = argparse.Namespace(workers=0, precision="fp32")
    other = load(chain, "inv")
    other["model"]["stem.0.weight"] += 1
    (tmp_path / "other").mkdir()
    torch.save(other, tmp_path / "other/inv.pt")
    rows, *fewer = (
        evaluate.combine_on_test_videos(*p, range(8), teachers, folder, videos, args, CPU)
        for folder in (chain, tmp_path, tmp_path / "other"))
    assert [list(fewer_rows) for fewer_rows in fewer] == 2 * [["teachers, mean"]]
    printed = capsys.readouterr().out
    assert "no row for TSTR: the teachers come from stage 1 with other --clips" in printed
    assert "no row for TSTR: gone/inv.pt, from which a teacher was made" in printed
    embedders = []
    for saved in (load(chain, "inv"), load(chain, "dist")):
        embedders.append(tb.Embedder(tb.build_model("r3d_tiny", 8)).eval())
        embedders[-1].backbone.load_state_dict(saved["model"])
        embedders[-1].head.load_state_dict(saved["head"])
    for i in range(8):
        frames = tb.decode_frames(videos.path(i), range, short_side=20)
        first = (len(frames) - 30) // 2
        clips = [tb.centre_crop(half, 16) for half in frames[first:first + 31:2].split(8)]
        s = 0
        for embedder in embedders:
            with torch.no_grad():
                a, b = embedder(tb.to_input(torch.stack(clips), embedder.backbone))
            s += float(a @ b) / 2
        s = min(1, max(0, s))
        assert rows["teachers, mean"][i].allclose((p[0, i] + p[1, i]) / 2)
        assert rows["teachers, TSTR"][i].allclose(s * p[0, i] + (1 - s) * p[1, i], atol=1e-4)


def test_the_weights_of_stage_3(chain, capsys):
    """Videos without a similarity are counted, teachers of other clips refused."""
    teachers = {name: load(chain, name) for name in ("inv_ft", "dist_ft")}
    first, *names = teachers["inv_ft"]["similarity_names"]
    names = [f"moved/{first}", *names, "added/since.avi"]
    assert weigh_videos("tstr", teachers, names)[-1] == 0.5
    assert "1 of 25 videos have no similarity from stage 1 (added since" in capsys.readouterr().out
    for count, reweight, expected in [(2, "mean", 0.5), (2, 0.7, 0.7), (1, "tstr", 1)]:
        some = dict(list(teachers.items())[:count])
        assert weigh_videos(reweight, some, names).tolist() == pytest.approx([expected] * 25)
    teachers["dist_ft"]["similarity"] = torch.ones(24, 3, 3)
    with pytest.raises(tb.UserError, match="other --clips"):
        weigh_videos("tstr", teachers, names)


def test_tstr_knows_a_teacher_by_its_stage_1(chain, toy, tmp_path, capsys, complaint):
    """Whichever comes first; and refuses two of a kind."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    run_stage("student", toy, tmp_path, "--teachers", "dist_ft.pt", "inv_ft.pt", "--name", "b")
    assert same(load(tmp_path, "b")["model"], load(chain, "student")["model"])
    shutil.copy(chain / "inv_ft.pt", tmp_path / "inv2_ft.pt")
    two = ["--teachers", "inv_ft.pt", "inv2_ft.pt", "--name", "c"]
    assert "--reweight mean" in complaint(run_stage, "student", toy, tmp_path, *two)
    run_stage("student", toy, tmp_path, *two, "--reweight", "mean", "--epochs", 1)


def test_a_video_that_got_a_label_since_keeps_its_similarity():
    """By its file name, where that is unique and the old path is gone."""
    c = {name: torch.eye(2) for name in ("u/a.avi", "u/b.avi", "u/c.avi", "v/c.avi", "u/d.avi")}
    names = ["t/a.avi", "t/b.avi", "w/b.avi", "t/c.avi", "v/c.avi", "u/d.avi", "t/d.avi"]
    found = find_moved(c, names)
    assert found.keys() - c.keys() == {"t/a.avi"} and found["t/a.avi"] is c["u/a.avi"]


def test_evaluation_knows_teachers_by_their_stage_1_too(chain, tmp_path, capsys):
    """Files that have changed names; and two of a kind."""
    rows = []
    for k, (inv, dist) in enumerate([("inv_ft", "dist_ft"), ("dist_ft", "inv_ft"),
                                     ("inv_ft", "inv_ft")]):
        shutil.copytree(chain, tmp_path / f"{k}")
        shutil.copy(chain / f"{inv}.pt", tmp_path / f"{k}/inv_ft.pt")
        shutil.copy(chain / f"{dist}.pt", tmp_path / f"{k}/dist_ft.pt")
        evaluate.main([str(tmp_path / f"{k}"), *EVALUATE])
        rows.append([r["top1"] for r in read_results(tmp_path / f"{k}")
                     if r["checkpoint"] == "teachers, TSTR"])
    assert rows[0] == rows[1] != [] and not rows[2]
    assert "note: dist_ft.pt has changed since student.pt was made" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["null", "[1]", '{"a": 1}', "[{"])
def test_a_damaged_file_of_results_stays(content, classifier, tmp_path, complaint):
    (tmp_path / "results.json").write_text(content)
    assert "results.json is damaged" in complaint(evaluate.main, [str(classifier), *EVALUATE])
    assert (tmp_path / "results.json").read_text() == content


# ---- Prediction ----------------------------------------------------------------------------------

def test_prediction_of_one_s_own_videos(classifier, toy, tmp_path, monkeypatch, capsys, complaint):
    """By a classifier that is unfinished. If none can be decoded, it ends in 1."""
    monkeypatch.chdir(tmp_path)
    save_classifier(classifier, tmp_path / "data", stage="student", finished=False, epoch=3)
    names = [tb.read_videos("toy", toy, False).path(0), "clips/deep/a: #1, é.avi", "clips/z.avi"]
    os.makedirs("clips/deep")
    shutil.copy(names[0], names[1])
    (tmp_path / names[2]).write_text("broken")
    flags = ["--checkpoint", str(tmp_path), "--topk", "2", "--output", "new", *EVALUATE]
    evaluate.main(["--videos", names[0], "clips", *flags])
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"note: {classifier} is unfinished (epoch 3 of 7)",
        *(f"{name}: a 66.5 %, b 24.5 %" for name in names[:2])]
    assert names[2] in printed.err
    assert read_predictions("new/predictions.csv") == [
        *(["student.pt", name, "", *top]
          for name in names[:2] for top in (["a", "0.6652"], ["b", "0.2447"])),
        ["student.pt", names[2], "", "cannot be decoded", ""]]
    assert names[2] in complaint(evaluate.main, ["--videos", names[2], *flags], status=1)


def test_each_video_is_printed_as_soon_as_it_is_done(classifier, toy, tmp_path):
    """The second video is a pipe into which nobody writes."""
    os.mkfifo(tmp_path / "pipe.avi")
    videos = [tb.read_videos("toy", toy, False).path(0), str(tmp_path / "pipe.avi")]
    with subprocess.Popen(
            [sys.executable, "evaluate.py", "--videos", *videos, "--checkpoint",
             str(classifier), *EVALUATE], cwd=HERE, text=True, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": ""}) as process:  # set, it flushes each line
        limit = threading.Timer(120, process.kill)
        limit.start()
        line = process.stdout.readline()
        limit.cancel()
        rows = read_predictions(tmp_path / "predictions.csv")
        process.kill()
    assert line.startswith(f"{videos[0]}: a 66.5 %")
    assert [row[1] for row in rows] == [videos[0]] * 3


@pytest.mark.parametrize("flags, words", [
    ("runs/x", "runs/x: no such run folder; there are runs/one, runs/three, runs/two"),
    ("runs/one/inv_ft.pt", "inv_ft.pt: no such checkpoint"),
    ("runs/two", "runs/two: no trained classifier; finetune.py and train_student.py write them"),
    ("runs/three", "runs/three: student.pt and x_ft.pt differ in frames"),
    ("runs/one --root other", "runs/one: no classifier for the classes of other"),
    ("runs/one runs/three --output x", "--output takes the results of one folder"),
    ("runs/one --videos data --checkpoint runs/one", "takes no PATH"),
    ("--videos data", "a prediction needs both --videos and --checkpoint"),
    ("--videos data/no.mp4 --checkpoint runs/one", "data/no.mp4: no such file"),
    ("--videos data --checkpoint runs/two/inv.pt", "inv.pt: no trained classifier")])
def test_a_mistake_costs_one_line(flags, words, classifier, toy, tmp_path, monkeypatch,
                                  complaint):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "other", toy, {"d": 1})
    for name, changes in {"one/student": {}, "two/inv": {"stage": "pretrain_inv"},
                          "three/student": {}, "three/x_ft": {"frames": 8}}.items():
        save_classifier(tmp_path / f"runs/{name}.pt", tmp_path / "data", **changes)
    assert words in complaint(evaluate.main, [*flags.split(), "--device", "cpu"])
    assert not [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.csv")]


# ---- docs/study/: cached frames, differences, unlabelled videos, two figures of the paper --------

def test_frames_from_the_cache_are_those_of_the_file(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE", str(tmp_path))
    path = tb.read_videos("toy", toy, True).path(0)
    for short_side in (None, 20, 20):  # the last one is there
        for indices in ([9, 0, 9], lambda count: np.arange(count)[::-2].copy()):
            frames = cached.read_frames(path, indices, short_side)
            assert torch.equal(frames, tb.decode_frames(path, indices, short_side))
    assert len(list(tmp_path.iterdir())) == 2


def test_differences_within_runs(tmp_path, capsys):
    """Of three runs, of which one lacks a row; folders and files are read alike."""
    top1 = {"labeled_only.pt": [50, 40], "dist_ft.pt": [55, 47, 58], "student.pt": [54, 50, 66]}
    for k in range(3):
        (tmp_path / f"{k}").mkdir()
        (tmp_path / f"{k}/results.json").write_text(json.dumps([
            {"checkpoint": name, "top1": values[k]}
            for name, values in top1.items() if k < len(values)]))
    paths = [str(tmp_path / path) for path in ("0", "1/results.json", "2")]
    intervals.main([*paths, "--against", "labeled_only.pt", "dist_ft.pt"])
    printed = capsys.readouterr().out
    half = 4.3027 * statistics.stdev([-1, 3, 8]) / math.sqrt(3)
    assert cells(printed, "student.pt")[1:] == [
        "3", "56.7 ± 8.3", "+7.0 ± 4.2", "-31.1 to +45.1", "2 of 2", "+3.3 ± 4.5",
        f"{10 / 3 - half:+.1f} to {10 / 3 + half:+.1f}", "2 of 3"]
    assert cells(printed, "labeled_only.pt")[1:6] == ["2", "45.0 ± 7.1", "", "", ""]


def test_what_is_known_of_the_unlabelled_videos(chain, toy, monkeypatch, capsys):
    """By each video's middle clip, one after the other; of toy's groups two clips each count."""
    assert unlabeled.group_of("Diving/v_Diving_g08_c02.avi") == "Diving/v_Diving_g08"
    monkeypatch.setattr(unlabeled, "group_of", lambda name: (name[:-5], int(name[-5]) // 2))
    unlabeled.main([str(chain), "--rows", "student.pt", "inv_ft.pt", *EVALUATE[2:]])
    printed = capsys.readouterr().out
    labeled = load(chain, "inv_ft")["labeled"]
    groups = set(map(unlabeled.group_of, labeled))
    videos = tb.read_videos("toy", toy, True)
    rest = [i for i, name in enumerate(videos.names) if name not in labeled]
    easy = np.array([unlabeled.group_of(videos.names[i]) in groups for i in rest])
    clips = []
    for i in rest:
        frames = tb.decode_frames(videos.path(i), range, short_side=20)
        clips.append(tb.centre_crop(frames[tb.clip_indices(len(frames), 8, 2)], 16))
    right = []
    for name in ("student", "inv_ft"):
        model = tb.load_classifier(load(chain, name), CPU)
        best = model(tb.to_input(torch.stack(clips), model)).argmax(1).numpy()
        right.append(100 * (best == videos.labels[rest]))
    of_student = [rows.mean() for rows in (right[0], right[0][easy], right[0][~easy])]
    assert cells(printed, "student.pt")[1:4] == [f"{mean:.1f} ± 0.0" for mean in of_student]
    apart = right[0].mean() - right[1].mean()
    assert cells(printed, "student.pt")[5].startswith(f"{apart:+.1f} ")
    assert printed.splitlines()[-7].startswith(f"{100 * easy.mean():.1f} ")


def test_the_weight_is_compared_with_a_fixed_one(chain, capsys):
    """Of four videos, two classes. s knows for the first two which teacher is right. Then a run."""
    p_inv = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.6, 0.4]])
    p_dist = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.7, 0.3], [0.3, 0.7]])
    row = weight.weigh((p_inv, p_dist), torch.tensor([0.9, 0.1, 0.5, 0.5]), np.zeros(4, int))
    assert row == pytest.approx([0.5, 0.3266, 3, 0.8660, 75, 50, 50], abs=1e-3)
    weight.main([str(chain), *EVALUATE[2:]])
    assert len(cells(capsys.readouterr().out, str(chain))) == 8


def test_figures_are_drawn(chain, tmp_path, capsys):
    draw.main([str(chain), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(cells(printed, c) for c in load(chain, "inv_ft")["classes"])
    for name in ("classes", "similarity"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
