"""Data sets as they lie on disk: official lists and trees, own folders, labelled lists, toy videos.

Those that read the official lists look for them in the folder that TIMEBALANCE_TEST_DATA names
(splits/), and are skipped where it is not set."""

import argparse
import ctypes
import os
import re
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest

import common as tb
from conftest import contents
from test_common import HERE, run_stage


def stand_in(folder, names):
    """Empty files under the names of videos."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def warned(function, *args):
    """What a function returns, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(warning.message) for warning in caught]


# ---- Official lists and trees --------------------------------------------------------------------

@pytest.fixture(scope="module")
def official(real_data, tmp_path_factory):
    """The folders of UCF101 and HMDB51: official lists, and stand-ins for the videos."""
    root = tmp_path_factory.mktemp("official")
    for data, lists in [("ucf101", "ucfTrainTestlist"), ("hmdb51", "testTrainMulti_7030_splits")]:
        shutil.copytree(real_data / "splits" / lists, root / data / lists)
    for file in root.glob("ucf101/*/*list0*.txt"):
        stand_in(root / "ucf101/UCF-101", {row.split()[0] for row in tb.read_lines(file)})
    for file in root.glob("hmdb51/*/*_test_split1.txt"):
        folder = root / "hmdb51/hmdb51_org" / file.name.removesuffix("_test_split1.txt")
        stand_in(folder, [row.split()[0] for row in tb.read_lines(file)])
    return root


def folders(names):
    return [name.split("/")[0] for name in names]


@pytest.mark.parametrize("data, split, in_train, in_test", [
    ("ucf101", 1, 9537, 3783), ("ucf101", 2, 9586, 3734), ("ucf101", 3, 9624, 3696),
    ("hmdb51", 1, 3570, 1530)])
def test_official_splits(data, split, in_train, in_test, official):
    train = tb.read_videos(data, official / data, True, split)
    test = tb.read_videos(data, official / data, False, split)
    assert (len(train), len(test)) == (in_train, in_test)
    for videos in (train, test):
        assert len(set(videos.labels)) == len(videos.classes) == {"u": 101, "h": 51}[data[0]]
        assert [videos.classes[label] for label in videos.labels] == folders(videos.names)
        assert os.path.exists(videos.path(len(videos) - 1))
    everything = set(tb.read_videos(data, official / data, True, split, pool="all").names)
    assert len(everything) == {"u": in_train, "h": 5236}[data[0]]
    assert set(train.names) <= everything and not everything & set(test.names)


def test_the_table_of_label_protocols_counts_what_is_there(official, real_data):
    """The row of docs/differences.md has these counts, and the ranges over classes."""
    rows = [line for line in (HERE / "docs/differences.md").read_text().splitlines()
            if re.match(r"\| (UCF101|HMDB51|Kinetics400), ", line)]

    def described(sets, classes):
        counts = [Counter(folders(names)) for names in sets]
        ranges = []
        for of_class in counts:
            low, high = min(of_class.values()), max(of_class.values())
            ranges.append(f"{low} to {high}" if low < high else f"{low}")
            if len(of_class) < classes:
                ranges[-1] += " (one class has none)"
        return f"| {', '.join(f'{len(s):,}' for s in sets)} | {', '.join(dict.fromkeys(ranges))} |"

    expected = []
    for data, pool, percents in [
            ("ucf101", "train", (5, 10, 20, 50)), ("hmdb51", "train", (40, 50, 60)),
            ("hmdb51", "all", (40, 50, 60))]:
        videos = tb.read_videos(data, official / data, True, 1, pool)
        ours = [{videos.names[i] for i in tb.labeled_subset(videos.names, videos.labels, p)}
                for p in percents]
        assert all(a < b for a, b in zip(ours, ours[1:]))
        lists = [real_data / f"splits/videossl/{data}/videossl_splits/{data}_train_{p}_percent_"
                 "labeled_split_1_rawframes.txt" for p in percents]
        theirs = [{row.split()[0] for row in tb.read_lines(path)} for path in lists]
        both = len(theirs[0] & theirs[1])
        if pool == "train":
            expected.append((described(theirs, len(videos.classes)), f"{both:,} are among the"
                             if data == "hmdb51" else f"only {both:,} are among the"))
        expected.append((described(ours, len(videos.classes)), ""))
        if data == "hmdb51" and pool == "train":
            in_split = {os.path.splitext(name)[0] for name in videos.names}
            neither = len(theirs[0] - in_split)
    lists = [real_data / f"splits/videossl/kinetics400/kinetics400_train_{p}_percent_labeled_"
             "videos.txt" for p in (1, 10)]
    theirs = [{row.split()[0] for row in tb.read_lines(path)} for path in lists]
    expected.append((described(theirs, 400), f"only {len(theirs[0] & theirs[1])} are among the"))
    assert len(rows) == len(expected) == 6
    for row, parts in zip(rows, expected):
        assert all(part in row for part in parts), (row, parts)
    assert f"split has {neither} neither" in rows[2]


@pytest.mark.parametrize("data, percent, count", [
    ("ucf101", 5, 476), ("ucf101", 10, 953), ("ucf101", 20, 1907), ("ucf101", 50, 4768),
    ("hmdb51", 40, 2094), ("hmdb51", 50, 2618), ("hmdb51", 60, 3141)])
def test_published_list_alone_is_labelled(data, percent, count, official, real_data):
    """Each of its videos has the label of its folder; all other labels are hidden."""
    path = real_data / "splits/videossl" / data / "videossl_splits"
    path /= f"{data}_train_{percent}_percent_labeled_split_1_rawframes.txt"
    args = argparse.Namespace(data=data, root=official / data, split=1, pool="all",
                              labeled_list=path)
    (labeled, videos), warning = warned(tb.labeled_and_all_videos, args)
    assert not warning and len(labeled) == count
    names = [videos.names[i] for i in labeled]
    assert {row.split()[0] for row in tb.read_lines(path)} == {name[:-4] for name in names}
    assert [videos.classes[label] for label in videos.labels[labeled]] == folders(names)
    assert (np.delete(videos.labels, labeled) == -1).all()


def test_kinetics400_is_read_from_class_folders(real_data, tmp_path):
    """Copies mix formats; the published list has five videos that are not there."""
    path = real_data / "splits/videossl/kinetics400"
    path /= "kinetics400_train_1_percent_labeled_videos.txt"
    names = []
    for i, row in enumerate(tb.read_lines(path)):
        label, name = row.split()[0].split("/")
        suffix = (".mkv", ".webm", ".mp4")[i % 3]
        names.append(f"{label.replace('_', ' ')}/{name[:-4]}{suffix}")
    stand_in(tmp_path / "train", names[5:])
    stand_in(tmp_path / "val", names[:5])
    train = tb.read_videos("kinetics400", tmp_path, True)
    test = tb.read_videos("kinetics400", tmp_path, False)
    assert len(train) == len(set(names)) - 5 and len(test) == 5
    assert test.classes == train.classes and len(train.classes) == 400
    labeled, [warning] = warned(tb.read_labeled_list, path, train)
    assert len(labeled) == len(train) and "5 rows name no training video" in warning


@pytest.mark.parametrize("data, files, problem", [
    ("ucf101", ["UCF101.rar", "lists.zip"], "no UCF-101"),
    ("hmdb51", ["hmdb51_org/x/y.avi", "b.rar"], "no testTrainMulti_7030_splits"),
    ("kinetics400", ["up/train/a/x.mp4"], "no train"),
    ("folder", ["train/a/notes.txt"], "no training videos")])
def test_a_wrong_tree_is_one_line(data, files, problem, tmp_path):
    stand_in(tmp_path, files)
    with pytest.raises(tb.UserError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        tb.read_videos(data, tmp_path, True)
    assert str(error.value) == f"{tmp_path}: {problem}; expected {' and '.join(tb.TREES[data])}"


def test_a_few_missing_files_are_counted_and_many_are_refused(tmp_path):
    """Of 200 listed videos 10, then 11. The lists begin with a byte order mark."""
    names = [f"Ring/v{i:03}.avi" for i in range(200)]
    stand_in(tmp_path / "UCF-101", names[10:])
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Ring", "utf-8-sig")
    (lists / "trainlist01.txt").write_text("\n".join(names), "utf-8-sig")
    videos, [warning] = warned(tb.read_videos, "ucf101", tmp_path, True)
    assert videos.names == names[10:] and videos.classes == ["Ring"]
    assert f"10 of 200 listed videos are not in {tmp_path}/UCF-101, such as Ring/v0" in warning
    (tmp_path / "UCF-101" / names[10]).unlink()
    with pytest.raises(tb.UserError, match="11 of 200 .*Ring/v000.avi"):
        tb.read_videos("ucf101", tmp_path, True)


# ---- Folders of one's own ------------------------------------------------------------------------

NAMES_OF_MINE = ["train/a a/#1.avi", "train/b/1.mov", "train/b/deep/er/2.MP4",
                 "unlabeled/deep/er/y (1).avi", "unlabeled/x.mkv"]


@pytest.fixture
def mine(tmp_path):
    stand_in(tmp_path / "my", [*NAMES_OF_MINE, "test/b/3.webm"])
    return tmp_path / "my"


def test_classes_are_first_folders_and_what_is_left_out_is_counted_unless_hidden(mine):
    stand_in(mine, [
        "train/.ipynb_checkpoints/1-checkpoint.mp4", "train/@eaDir/1.mp4", "train/b/._1.mov",
        "train/#recycle/old.mp4", "unlabeled/.git/x.mp4", "unlabeled/__MACOSX/x.mp4"])
    train, warning = warned(tb.read_videos, "folder", mine, True)
    assert train.names == NAMES_OF_MINE and not warning
    assert train.classes == ["a a", "b"] and train.labels.tolist() == [0, 1, 1, -1, -1]
    stand_in(mine, ["train/aa/1.srt", "train/loose.mp4", "train/b/1.SRT", "test/c/5.mp4",
                    "unlabelled/deep/x.mp4", "runs/inv.log", ".cache/y.mp4", "loose.mp4"])
    train, (files, loose, folder) = warned(tb.read_videos, "folder", mine, True)
    assert train.names == NAMES_OF_MINE and train.classes == ["a a", "b"]
    assert files == f"{mine}/train: 2 files of other endings left out: .SRT, .srt"
    assert loose == f"1 videos are in no class of train/, such as {mine}/train/loose.mp4: ignored"
    assert folder == f"{mine}/unlabelled is not read: only train/, test/ and unlabeled/ are"
    test, (_, unknown) = warned(tb.read_videos, "folder", mine, False)
    assert test.names == ["test/b/3.webm"] and test.labels.tolist() == [1]
    assert test.classes == train.classes and f"{mine}/test/c/5.mp4" in unknown


def test_test_videos_among_the_training_videos_are_counted(mine):
    """By file name and size: so two others do not count."""
    for name, content in {"test/b/x.mkv": "1", "test/b/y.avi": "12", "unlabeled/new/x.mkv": "1",
                          "unlabeled/x.mkv": "2", "train/b/y.avi": "123"}.items():
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(content)
    _, [warning] = warned(tb.read_videos, "folder", mine, True)
    assert warning.startswith("2 training videos are test videos, too")
    assert warning.count("x.mkv") == 1
    _, none = warned(tb.read_videos, "folder", mine, False)
    assert not none


@pytest.mark.parametrize("links, more", [
    ({"more": "other"}, ["more/below/z.mp4"]),
    ({"loop": "unlabeled"}, []),
    ({"loop": "/"}, []),
    ({"deep/er/x": "other", "../other/below/y": "unlabeled/deep"}, ["deep/er/x/below/z.mp4"]),
    ({"once": "other", "twice": "other"}, ["once/below/z.mp4"])], ids=str)
def test_linked_folders_are_read_once(links, more, mine):
    stand_in(mine, ["other/below/z.mp4"])
    for link, target in links.items():
        (mine / "unlabeled" / link).symlink_to(mine / target)
    assert tb.list_videos(mine / "unlabeled") == {"deep/er/y (1).avi", "x.mkv", *more}


@pytest.fixture
def no_privileges():
    """Root, too, needs permission: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are given up."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522)
    rights = (ctypes.c_uint32 * 6)()
    libc.capget(header, rights)
    libc.capset(header, (ctypes.c_uint32 * 6)(rights[0] & ~6, *rights[1:]))
    yield
    libc.capset(header, rights)


@pytest.mark.parametrize("locked", ["train/b", "unlabeled/deep", "train"])
def test_a_folder_without_permission_is_one_line(locked, mine, no_privileges, complaint):
    (mine / locked).chmod(0)
    try:
        line = complaint(run_stage, "inv", mine, mine / "out", "--data", "folder")
    finally:
        (mine / locked).chmod(0o700)
    assert line == f"pretrain_inv.py: {mine / locked}: Permission denied"


def test_toy_videos_below_a_folder_without_permission_are_one_line(tmp_path, no_privileges,
                                                                  complaint):
    (tmp_path / "locked").mkdir(mode=0)
    line = complaint(run_stage, "inv", tmp_path / "locked", tmp_path / "out")
    assert "Permission denied" in line and "locked" in line


# ---- Lists of labelled videos --------------------------------------------------------------------

LISTED = ["train/Run/d 2019 5.mp4", "train/walk1/a.mp4", "train/walk1/b.avi", "train/walk1/b.mp4",
          "train/walk1/c 12.mp4", "train/walk1/c.mp4", "train/walk1/e.5.mp4"]


@pytest.mark.parametrize("row, fits", [
    ("/home/someone/UCF 101/walk1/a.mp4 7", [1]), ("walk1/a.mp4", [1]), ("walk1/a 80 3", [1]),
    ("train/WAL k1_/a.webm\t 1", [1]), ("walk1/c 12.mp4 5", [4]), ("run/d 2019 5.webm 3", [0]),
    ("walk1/e.5 1", [6]), ("walk1/b.avi 3 4", [2, 3]), ("walk1/b", [2, 3]), ("walk1/c 12", [4, 5])])
def test_rows_of_many_forms_are_read_and_those_that_fit_two_videos_refused(row, fits, tmp_path):
    stand_in(tmp_path, LISTED)
    videos = tb.read_videos("folder", tmp_path, True)
    file = tmp_path / "list.txt"
    file.write_text(f"{row}\r\n\r\nNowhere/v_x.avi 3", "utf-8-sig")  # as Windows writes it
    if len(fits) == 1:
        labeled, [warning] = warned(tb.read_labeled_list, file, videos)
        assert [videos.names[i] for i in labeled] == [LISTED[fits[0]]]
        assert "1 rows name no training video, such as Nowhere/v_x.avi 3" in warning
    else:
        with pytest.raises(tb.UserError) as error:
            tb.read_labeled_list(file, videos)
        assert str(error.value) == f"{file}: {row} fits {' and '.join(LISTED[i] for i in fits)}"


# ---- Toy videos ----------------------------------------------------------------------------------

@pytest.mark.parametrize("percent, seed, per_class", [(50, 1, None), (None, 0, 2)])
def test_the_labelled_videos_are_those_of_the_flags(percent, seed, per_class, toy):
    args = argparse.Namespace(data="toy", root=toy, split=1, pool="train", labeled_list=None,
                              percent=percent, subset_seed=seed, per_class=per_class)
    videos = tb.read_videos("toy", toy, True)
    expected = tb.labeled_subset(videos.names, videos.labels, percent or 100, seed, per_class)
    labeled, _ = tb.labeled_and_all_videos(args)
    assert len(labeled) == 16 and labeled.tolist() == expected.tolist()


def test_rendering_that_was_interrupted_gives_the_same_files(toy, tmp_path):
    shutil.copytree(toy / "UCF-101/Bars", tmp_path / "toy.part/UCF-101/Bars")
    next(tmp_path.glob("*/*/*/*.avi")).write_bytes(b"half a video")
    tb.render_toy(tmp_path / "toy", train=24, test=8)
    assert os.listdir(tmp_path) == ["toy"] and contents(tmp_path / "toy") == contents(toy)


def test_toy_videos_are_rendered_into_no_folder_of_other_things(tmp_path, complaint):
    stand_in(tmp_path, ["my/UCF-101/Ring/v.avi", "my/thesis.txt"])
    before = contents(tmp_path)
    line = complaint(run_stage, "inv", tmp_path / "my", tmp_path / "out")
    assert line.startswith(f"pretrain_inv.py: {tmp_path}/my is not empty") and "--data" in line
    assert contents(tmp_path) == before
