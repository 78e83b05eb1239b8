"""Data sets as they lie on disk: official lists and trees, own folders, labelled lists, toy videos.

Those that read the official lists look for them in the folder that TIMEBALANCE_TEST_DATA names
(splits/), and are skipped where it is not set."""

import argparse
import contextlib
import ctypes
import io
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import common as tb
from test_common import run_stage


def rows(file):
    return [line for line in file.read_text().splitlines() if line.strip()]


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


def contents(folder):
    """{path inside it: content} of all files in a folder and below."""
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def official(real_data, tmp_path_factory):
    """The folders of UCF101 and HMDB51: official lists, and stand-ins for the videos."""
    root = tmp_path_factory.mktemp("official")
    shutil.copytree(real_data / "splits/ucfTrainTestlist", root / "ucf101/ucfTrainTestlist")
    for file in root.glob("ucf101/*/*list0*.txt"):
        stand_in(root / "ucf101/UCF-101", {line.split()[0] for line in rows(file)})
    lists = "testTrainMulti_7030_splits"
    shutil.copytree(real_data / "splits" / lists, root / "hmdb51" / lists)
    for file in root.glob("hmdb51/*/*_test_split1.txt"):
        names = [line.rsplit(maxsplit=1)[0] for line in rows(file)]
        stand_in(root / "hmdb51/hmdb51_org" / file.name[:-16], names)
    return root


# ---- Official lists and trees --------------------------------------------------------------------

@pytest.mark.parametrize("data, split, in_train, in_test", [
    ("ucf101", 1, 9537, 3783), ("ucf101", 2, 9586, 3734), ("ucf101", 3, 9624, 3696),
    ("hmdb51", 1, 3570, 1530)])
def test_official_splits(data, split, in_train, in_test, official):
    train = tb.read_videos(data, official / data, True, split)
    test = tb.read_videos(data, official / data, False, split)
    assert (len(train), len(test)) == (in_train, in_test)
    assert not set(train.names()) & set(test.names())
    for videos in (train, test):
        assert len(set(videos.labels)) == len(videos.classes) == {"u": 101, "h": 51}[data[0]]
        for i in range(0, len(videos), 50):
            assert os.path.exists(videos.path(i))
            assert videos.classes[videos.labels[i]] == videos.name(i).split("/")[0]
    if data == "hmdb51":
        everything = tb.read_videos(data, official / data, True, pool="all").names()
        assert len(everything) == 5236 and set(train.names()) < set(everything)
        assert not set(everything) & set(test.names())


@pytest.mark.parametrize("data, percent, count", [
    ("ucf101", 5, 476), ("ucf101", 10, 953), ("ucf101", 20, 1907), ("ucf101", 50, 4768),
    ("hmdb51", 40, 2094), ("hmdb51", 50, 2618), ("hmdb51", 60, 3141)])
def test_published_list_alone_is_labelled(data, percent, count, official, real_data, tmp_path):
    """Each of its videos has the label of its folder; all other labels are hidden."""
    path = real_data / "splits/videossl" / data / "videossl_splits"
    path /= f"{data}_train_{percent}_percent_labeled_split_1_rawframes.txt"
    args = argparse.Namespace(data=data, root=official / data, split=1, pool="all",
                              labeled_list=path, out=tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        (labeled, videos), warning = warned(tb.labeled_and_all_videos, args)
    without = ["no labelled video of CliffDiving"] * ((data, percent) == ("ucf101", 5))
    assert warning == without
    assert len(labeled) == count == len(rows(tmp_path / "labeled.txt"))
    assert {line.split()[0] for line in rows(path)} == {videos.name(i)[:-4] for i in labeled}
    for i in labeled:
        assert videos.classes[videos.labels[i]] == videos.name(i).split("/")[0]
    assert (np.delete(videos.labels, labeled) == -1).all()
    assert f"{count} of {len(videos)} training videos have a label" in text.getvalue()


def test_kinetics400_is_read_from_class_folders(real_data, tmp_path):
    """Copies mix formats; the published list has five videos that are not there."""
    path = real_data / "splits/videossl/kinetics400"
    path /= "kinetics400_train_1_percent_labeled_videos.txt"
    names = []
    for i, line in enumerate(rows(path)):
        label, name = line.split()[0].split("/")
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


@pytest.mark.parametrize("data, files, problem, found", [
    ("ucf101", ["UCF101.rar", "lists.zip"], "no UCF-101 and no ucfTrainTestlist",
     "UCF101.rar, lists.zip"),
    ("hmdb51", ["hmdb51_org/x/y.avi", "b.rar"], "no testTrainMulti_7030_splits",
     "hmdb51_org/x/y.avi, b.rar"),
    ("kinetics400", ["up/train/a/x.mp4"], "no train", "up/train/a"),
    ("folder", ["train/UCF-101/a/x.avi"], "no training videos", "train/UCF-101/a")])
def test_a_wrong_tree_is_one_line(data, files, problem, found, tmp_path):
    """What is missing, what the tree should be, what the folder holds: no warning before it."""
    stand_in(tmp_path, files)
    with pytest.raises(tb.UserError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        tb.read_videos(data, tmp_path, True)
    expected = " and ".join(tb.TREES[data])
    assert str(error.value) == f"{tmp_path}: {problem}; expected {expected}, found {found}"


def test_a_few_missing_files_are_counted_and_many_are_refused(tmp_path):
    """Of 200 listed videos 10, then 11."""
    names = [f"Ring/v{i}.avi" for i in range(200)]
    stand_in(tmp_path / "UCF-101", names[10:])
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Ring\n")
    (lists / "trainlist01.txt").write_text("".join(f"{name} 1\n" for name in names))
    with pytest.warns(UserWarning, match="10 of 200 listed videos are not in .*UCF-101, such"):
        assert tb.read_videos("ucf101", tmp_path, True).names() == names[10:]
    (tmp_path / "UCF-101" / names[10]).unlink()
    with pytest.raises(tb.UserError, match="11 of 200 .*Ring/v0.avi"):
        tb.read_videos("ucf101", tmp_path, True)


def test_a_byte_order_mark_changes_no_list(tmp_path):
    texts = {"ucfTrainTestlist/classInd.txt": b"1 a\n",
             "ucfTrainTestlist/trainlist01.txt": b"a/1.avi 1\n",
             "testTrainMulti_7030_splits/a_test_split1.txt": b"1.avi 1 \n",
             "list.txt": b"a/1.avi 3\n"}
    stand_in(tmp_path, ["UCF-101/a/1.avi", "hmdb51_org/a/1.avi", *texts])
    for name, text in texts.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
    for data in ("ucf101", "hmdb51"):
        videos = tb.read_videos(data, tmp_path, True)
        assert videos.names() == ["a/1.avi"] and videos.classes == ["a"]
    assert tb.read_labeled_list(tmp_path / "list.txt", videos).tolist() == [0]


# ---- Folders of one's own ------------------------------------------------------------------------

NAMES_OF_MINE = ["train/a a/#1.avi", "train/b/1.mov", "train/b/2.MP4",
                 "unlabeled/deep/er/y (1).avi", "unlabeled/x.mkv"]


@pytest.fixture
def mine(tmp_path):
    stand_in(tmp_path / "my", [*NAMES_OF_MINE, "test/b/3.webm"])
    return tmp_path / "my"


@pytest.fixture
def no_privileges():
    """Root, too, needs permission: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are given up."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522)
    rights = (ctypes.c_uint32 * 6)()
    libc.capget(header, rights)
    without = (ctypes.c_uint32 * 6)(rights[0] & ~6, *rights[1:])
    libc.capset(header, without)
    yield
    libc.capset(header, rights)


def test_classes_are_folders_that_are_not_hidden(mine):
    stand_in(mine, [
        "train/.ipynb_checkpoints/1-checkpoint.mp4", "train/@eaDir/1.mp4", "train/b/._1.mov",
        "train/#recycle/old.mp4", "unlabeled/.git/x.mp4", "unlabeled/__MACOSX/x.mp4"])
    train, warning = warned(tb.read_videos, "folder", mine, True)
    test = tb.read_videos("folder", mine, False)
    assert train.names() == NAMES_OF_MINE and not warning
    assert train.labels.tolist() == [0, 1, 1, -1, -1]
    assert train.classes == ["a a", "b"] == test.classes
    assert test.names() == ["test/b/3.webm"] and test.labels.tolist() == [1]


def test_what_is_no_class_or_no_video_is_named_and_left_out(mine):
    stand_in(mine, ["train/aa/1.srt", "train/loose.mp4", "train/b/1.SRT", "test/c/5.mp4"])
    train, (files, folders) = warned(tb.read_videos, "folder", mine, True)
    assert train.names() == NAMES_OF_MINE and train.classes == ["a a", "b"]
    assert folders.endswith(": aa, loose.mp4")
    assert files == f"{mine}/train: 2 other files left out: .srt"
    test, (*_, warning) = warned(tb.read_videos, "folder", mine, False)
    assert test.names() == ["test/b/3.webm"] and test.classes == train.classes
    assert warning.startswith(f"{mine}/test: ignored") and warning.endswith(": c")


@pytest.mark.parametrize("links, more", [
    ({"unlabeled/more": "other"}, ["more/below/z.mp4"]),
    ({"unlabeled/loop": "unlabeled"}, []),
    ({"unlabeled/loop": "/"}, []),
    ({"unlabeled/deep/er/x": "other", "other/below/y": "unlabeled/deep"}, ["x/below/z.mp4"]),
    ({"unlabeled/once": "other", "unlabeled/twice": "other"}, ["once/below/z.mp4"])], ids=str)
def test_linked_folders_are_read_once(links, more, mine):
    stand_in(mine, ["other/below/z.mp4"])
    for link, target in links.items():
        (mine / link).symlink_to(mine / target)
    names = [os.path.relpath(path, mine) for path in tb.walk_videos(mine / "unlabeled")]
    assert [name for name in names if not name.endswith("z.mp4")] == NAMES_OF_MINE[3:]
    found = [name for name in names if name.endswith("z.mp4")]
    assert len(found) == len(more) and all(map(str.endswith, found, more))


@pytest.mark.parametrize("locked", ["train/b", "unlabeled/deep", "."])
def test_a_folder_without_permission_is_one_line(locked, mine, no_privileges, complaint):
    (mine / locked).chmod(0)
    try:
        with pytest.raises(tb.UserError) as error:
            tb.read_videos("folder", mine, True)
        if locked == ".":
            line = complaint(run_stage, "inv", mine, mine / "out", "--data", "toy")
            assert line.startswith(f"pretrain_inv.py: {mine}") and "Permission denied" in line
    finally:
        (mine / locked).chmod(0o700)
    assert str(error.value) == f"{mine / locked}: Permission denied"


# ---- Lists of labelled videos --------------------------------------------------------------------

def read_list(lines, videos, folder):
    (folder / "list.txt").write_text("\r\n".join(lines))
    labeled, warning = warned(tb.read_labeled_list, folder / "list.txt", videos)
    return [videos.name(i) for i in labeled], warning


def test_lists_of_many_forms_are_read(toy, tmp_path):
    videos = tb.read_videos("toy", toy, True)
    names = videos.names()[:5]
    folder, file = names[4].split("/")
    lines = [f"/home/someone/UCF 101/{names[0]} 7", names[1], f"{names[2][:-4]} 80 3",
             f"{names[3][:-4]}.mp4", f"train/{folder[:2].lower()} {folder[2:]}_/{file}\t 1", "",
             "Nowhere/v_x.avi 3"]
    chosen, warning = read_list(lines, videos, tmp_path)
    assert chosen == names
    assert "1 rows name no training video, such as Nowhere/v_x.avi 3" in warning[0]


ALIKE = ["train/walk 1/a.mp4", "train/walk1/a.mp4", "train/walk1/b.avi", "train/walk1/b.mp4",
         "train/walk1/c 12.mp4", "train/walk1/c.mp4", "train/run/d 2019 5.mp4"]


@pytest.mark.parametrize("row, name", [
    ("walk 1/a.mp4 5", 0), ("walk1/a 64 5", 1), ("walk1/b.avi 3 4", 2), ("walk1/c 12.mp4 5", 4),
    ("walk1/c.mp4 12", 5), ("run/d 2019 5", 6), ("Run/d 2019 5.webm 3", 6),
    ("Walk_1/a.mp4", None), ("walk1/b", None), ("walk1/c 12", None)])
def test_exact_names_come_first_and_a_row_that_fits_two_videos_is_refused(row, name, tmp_path):
    stand_in(tmp_path, ALIKE)
    videos = tb.read_videos("folder", tmp_path, True)
    if name is not None:
        assert read_list([row], videos, tmp_path) == ([ALIKE[name]], [])
    else:
        with pytest.raises(tb.UserError, match=f"list.txt: {row} fits train/walk.* and train/walk"):
            read_list(["run/d 2019 5.mp4", row], videos, tmp_path)


# ---- Toy videos ----------------------------------------------------------------------------------

def test_interrupted_rendering_goes_on_and_gives_the_same_files(toy, tmp_path):
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    for path in sorted(tmp_path.glob("UCF-101/*/*.avi"))[5:]:
        path.unlink()
    (tmp_path / "toy.json").unlink()
    tb.render_toy(tmp_path, train=24, test=8)
    assert contents(tmp_path) == contents(toy)


@pytest.mark.parametrize("names, words", [
    (["train/walk/1.mp4"], "holds train/: --data folder?"),
    (["train/walk/1.mp4", "val/walk/2.mp4"], "--data kinetics400?"),
    (["UCF-101/Archery/v.avi", "ucfTrainTestlist/trainlist01.txt"],
     "holds UCF-101/: --data ucf101?"),
    (["thesis.txt"], "holds thesis.txt: ")])
def test_toy_videos_are_rendered_into_no_folder_of_other_things(names, words, tmp_path, complaint):
    stand_in(tmp_path / "my", names)
    before = contents(tmp_path)
    assert words in complaint(run_stage, "inv", tmp_path / "my", tmp_path / "out")
    assert contents(tmp_path) == before
