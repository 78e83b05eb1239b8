"""Data sets as they lie on disk: official lists and trees, own folders, labelled lists, toy videos.

Those that read the official lists look for them in the folder that TIMEBALANCE_TEST_DATA names
(splits/), and are skipped where it is not set."""

import argparse
import contextlib
import ctypes
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import common as tb
import pretrain_inv
from test_common import moving_frames, write_video

PRETRAIN = ("--size 16 --frames 8 --clips 2 --epochs 1 --batch 4 --warmup 1 --arch r3d_tiny "
            "--precision fp32 --device cpu --workers 0").split()


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
    """{path: content} of all files in a folder and below."""
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def real_splits():
    if "TIMEBALANCE_TEST_DATA" not in os.environ:
        pytest.skip("TIMEBALANCE_TEST_DATA is not set")
    return Path(os.environ["TIMEBALANCE_TEST_DATA"]) / "splits"


@pytest.fixture(scope="module")
def ucf101(real_splits, tmp_path_factory):
    root = tmp_path_factory.mktemp("ucf101")
    shutil.copytree(real_splits / "ucfTrainTestlist", root / "ucfTrainTestlist")
    for file in root.glob("ucfTrainTestlist/*list0*.txt"):
        stand_in(root / "UCF-101", {line.split()[0] for line in rows(file)})
    return root


@pytest.fixture(scope="module")
def hmdb51(real_splits, tmp_path_factory):
    root = tmp_path_factory.mktemp("hmdb51")
    lists = "testTrainMulti_7030_splits"
    shutil.copytree(real_splits / lists, root / lists)
    for file in root.glob("testTrain*/*_test_split1.txt"):
        names = [line.rsplit(maxsplit=1)[0] for line in rows(file)]
        stand_in(root / "hmdb51_org" / file.name[:-16], names)
    return root


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    tb.render_toy(root, train=24, test=8)
    return root


@pytest.fixture
def mine(tmp_path):
    """A folder of one's own."""
    stand_in(tmp_path / "my", [
        "train/b/2.MP4", "train/b/1.mov", "train/a a/#1.avi", "test/b/3.webm", "unlabeled/x.mkv",
        "unlabeled/deep/er/y (1).avi"])
    return tmp_path / "my"


NAMES_OF_MINE = ["train/a a/#1.avi", "train/b/1.mov", "train/b/2.MP4",
                 "unlabeled/deep/er/y (1).avi", "unlabeled/x.mkv"]


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


class TestOfficialLists:
    @pytest.mark.parametrize("split, in_train, in_test", [
        (1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
    def test_ucf101_has_its_official_splits(self, split, in_train, in_test, ucf101):
        train = tb.read_videos("ucf101", ucf101, True, split)
        test = tb.read_videos("ucf101", ucf101, False, split)
        assert (len(train), len(test)) == (in_train, in_test) and len(train.classes) == 101
        assert not set(train.names()) & set(test.names())
        assert train.labels.min() == 0 and train.labels.max() == 100 == test.labels.max()
        for i in range(0, len(train), 100):
            assert os.path.exists(train.path(i))
            assert train.classes[train.labels[i]] == train.name(i).split("/")[0]

    def test_hmdb51_has_its_official_split(self, hmdb51):
        train = tb.read_videos("hmdb51", hmdb51, True)
        test = tb.read_videos("hmdb51", hmdb51, False)
        assert np.bincount(train.labels).tolist() == [70] * 51
        assert np.bincount(test.labels).tolist() == [30] * 51
        for videos in (train, test):
            for i in range(len(videos)):
                assert os.path.exists(videos.path(i))
                assert videos.classes[videos.labels[i]] == videos.name(i).split("/")[0]

    def test_hmdb51_s_pool_is_all_but_the_test_videos(self, hmdb51):
        train = tb.read_videos("hmdb51", hmdb51, True)
        test = tb.read_videos("hmdb51", hmdb51, False)
        everything = tb.read_videos("hmdb51", hmdb51, True, pool="all")
        assert len(everything) == 5236
        assert set(train.names()) < set(everything.names())
        assert not set(everything.names()) & set(test.names())

    @pytest.mark.parametrize("data, percent, count", [
        ("ucf101", 5, 476), ("ucf101", 10, 953), ("ucf101", 20, 1907), ("ucf101", 50, 4768),
        ("hmdb51", 40, 2094), ("hmdb51", 50, 2618), ("hmdb51", 60, 3141)])
    def test_published_list_alone_is_labelled(self, data, percent, count, real_splits, tmp_path,
                                              request):
        """Each of its videos has the label of its folder; all other labels are hidden."""
        path = real_splits / "videossl" / data / "videossl_splits"
        path /= f"{data}_train_{percent}_percent_labeled_split_1_rawframes.txt"
        args = argparse.Namespace(data=data, root=request.getfixturevalue(data), split=1,
                                  pool="all", labeled_list=path, out=tmp_path)
        with contextlib.redirect_stdout(io.StringIO()) as text:
            (labeled, videos), warning = warned(tb.labeled_and_all_videos, args)
        assert not warning
        listed = {line.split()[0] for line in rows(path)}
        assert len(labeled) == count and listed == {videos.name(i)[:-4] for i in labeled}
        for i in labeled:
            assert videos.classes[videos.labels[i]] == videos.name(i).split("/")[0]
        assert (np.delete(videos.labels, labeled) == -1).all()
        text = text.getvalue()
        assert f"{count} of {len(videos)} training videos have a label" in text
        assert ("no labelled video of CliffDiving" in text) == ((data, percent) == ("ucf101", 5))
        assert len(rows(tmp_path / "labeled.txt")) == count

    def test_kinetics400_is_read_from_class_folders(self, real_splits, tmp_path):
        """Copies mix formats; files may be links, as arrange_by_classes.py makes them. Five listed
        videos are not there."""
        path = real_splits / "videossl/kinetics400/kinetics400_train_1_percent_labeled_videos.txt"
        names = []
        for i, line in enumerate(rows(path)):
            label, name = line.split()[0].split("/")
            suffix = (".mkv", ".webm", ".mp4")[i % 3]
            names.append(f"{label.replace('_', ' ')}/{name[:-4]}{suffix}")
        stand_in(tmp_path / "train", names[5:])
        stand_in(tmp_path / "val", [*names[:5], "baking cookies/x.mp4"])
        link = tmp_path / "val/baking cookies/-dash.mp4"
        (tmp_path / "val/baking cookies/x.mp4").rename(tmp_path / "x.mp4")
        link.symlink_to(tmp_path / "x.mp4")
        train = tb.read_videos("kinetics400", tmp_path, True)
        test = tb.read_videos("kinetics400", tmp_path, False)
        assert len(train) == len(set(names)) - 5 and len(test) == 6
        assert test.classes == train.classes and len(train.classes) == 400
        labeled, warning = warned(tb.read_labeled_list, path, train)
        assert len(labeled) == len(train) and "5 rows name no training video" in warning[0]


def two_hundred(root):
    """A tree of UCF101's form with 200 listed videos, of which the first ten are not there -> names
    of the others."""
    names = [f"Ring/v{i}.avi" for i in range(200)]
    stand_in(root / "UCF-101", names[10:])
    (root / "ucfTrainTestlist").mkdir()
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 Ring\r\n")
    lines = "".join(f"{name} 1\r\n" for name in names)
    (root / "ucfTrainTestlist/trainlist01.txt").write_text(lines)
    return names[10:]


class TestTrees:
    @pytest.mark.parametrize("data, files, problem, found", [
        ("ucf101", [], "no UCF-101 and no ucfTrainTestlist", "nothing"),
        ("ucf101", ["UCF101.rar", "lists.zip"], "no UCF-101 and no ucfTrainTestlist",
         "UCF101.rar, lists.zip"),
        ("hmdb51", ["hmdb51_org/x/y.avi", "b.rar"], "no testTrainMulti_7030_splits",
         "hmdb51_org/x/y.avi, b.rar"),
        ("kinetics400", ["up/train/a/x.mp4"], "no train", "up/train/a"),
        ("kinetics400", ["train/x.mp4"], "no training videos", "train/x.mp4"),
        ("folder", ["train/a/x.txt"], "no training videos", "train/a/x.txt"),
        ("folder", ["train/UCF-101/a/x.avi"], "no training videos", "train/UCF-101/a")])
    def test_a_wrong_tree_is_one_line(self, data, files, problem, found, tmp_path):
        """What is missing, what the tree should be, what the folder holds: no warning before it."""
        stand_in(tmp_path, files)
        with pytest.raises(tb.UserError) as error, warnings.catch_warnings():
            warnings.simplefilter("error")
            tb.read_videos(data, tmp_path, True)
        expected = " and ".join(tb.TREES[data])
        assert str(error.value) == f"{tmp_path}: {problem}; expected {expected}, found {found}"

    def test_a_level_too_deep_is_told(self, tmp_path):
        two_hundred(tmp_path)
        (tmp_path / "UCF-101").rename(tmp_path / "x")
        (tmp_path / "UCF-101").mkdir()
        (tmp_path / "x").rename(tmp_path / "UCF-101/UCF-101")
        with pytest.raises(tb.UserError, match="200 of 200 listed .* found UCF-101/UCF-101/Ring"):
            tb.read_videos("ucf101", tmp_path, True)

    def test_a_few_missing_files_are_counted(self, tmp_path):
        present = two_hundred(tmp_path)
        with pytest.warns(UserWarning, match="10 of 200 listed videos are not in .*UCF-101, such"):
            assert tb.read_videos("ucf101", tmp_path, True).names() == present

    def test_too_many_missing_files_are_refused(self, tmp_path):
        present = two_hundred(tmp_path)
        (tmp_path / "UCF-101" / present[0]).unlink()
        with pytest.raises(tb.UserError, match="11 of 200 .*Ring/v0.avi"):
            tb.read_videos("ucf101", tmp_path, True)

    def test_a_video_of_a_class_that_is_not_listed_is_refused(self, tmp_path):
        two_hundred(tmp_path)
        (tmp_path / "ucfTrainTestlist/classInd.txt").write_text("1 Bars\n")
        with pytest.raises(tb.UserError, match="Ring"):
            tb.read_videos("ucf101", tmp_path, True)

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
    def test_a_byte_order_mark_changes_no_list(self, mark, toy, tmp_path):
        texts = {"ucfTrainTestlist/classInd.txt": b"1 a\n",
                 "ucfTrainTestlist/trainlist01.txt": b"a/1.avi 1\n",
                 "testTrainMulti_7030_splits/a_test_split1.txt": b"1.avi 1 \n"}
        stand_in(tmp_path, ["UCF-101/a/1.avi", "hmdb51_org/a/1.avi", *texts])
        for name, text in texts.items():
            (tmp_path / name).write_bytes(mark + text)
        for data in ("ucf101", "hmdb51"):
            videos = tb.read_videos(data, tmp_path, True)
            assert videos.names() == ["a/1.avi"] and videos.classes == ["a"]
        (tmp_path / "list.txt").write_bytes(mark + b"a/1.avi 3\n")
        assert tb.read_labeled_list(tmp_path / "list.txt", videos).tolist() == [0]


class TestOwnFolders:
    def test_classes_are_folders_and_unlabeled_videos_have_none(self, mine):
        train, warning = warned(tb.read_videos, "folder", mine, True)
        test = tb.read_videos("folder", mine, False)
        assert train.names() == NAMES_OF_MINE and not warning
        assert train.labels.tolist() == [0, 1, 1, -1, -1]
        assert train.classes == ["a a", "b"] == test.classes
        assert test.names() == ["test/b/3.webm"] and test.labels.tolist() == [1]

    def test_hidden_folders_and_files_are_neither_classes_nor_videos(self, mine):
        stand_in(mine, [
            "train/.ipynb_checkpoints/1-checkpoint.mp4", "train/@eaDir/1.mp4", "train/b/._1.mov",
            "train/b/.ipynb_checkpoints/1.mov", "train/#recycle/old.mp4", "unlabeled/.git/x.mp4",
            "unlabeled/__MACOSX/x.mp4", "unlabeled/@eaDir/x.mp4", "train/.DS_Store"])
        train, warning = warned(tb.read_videos, "folder", mine, True)
        assert train.names() == NAMES_OF_MINE and train.classes == ["a a", "b"] and not warning

    def test_what_is_no_class_is_named_and_left_out(self, mine):
        stand_in(mine, ["train/aa/notes.txt", "train/loose.mp4", "test/a a/4.mp4", "test/c/5.mp4"])
        (mine / "train/empty").mkdir()
        train, warning = warned(tb.read_videos, "folder", mine, True)
        assert train.classes == ["a a", "b"]
        assert train.names() == NAMES_OF_MINE and train.labels.tolist() == [0, 1, 1, -1, -1]
        assert any(line.endswith(": aa, empty, loose.mp4") for line in warning)
        test, warning = warned(tb.read_videos, "folder", mine, False)
        assert test.names() == ["test/a a/4.mp4", "test/b/3.webm"]
        assert test.classes == train.classes and test.labels.tolist() == [0, 1]
        assert any(f"{mine}/test: left out" in line and line.endswith(": c") for line in warning)

    def test_other_files_are_counted_in_one_line(self, mine):
        stand_in(mine, ["train/b/1.srt", "train/a a/1.SRT", "train/b/1.txt", "train/b/README"])
        train, warning = warned(tb.read_videos, "folder", mine, True)
        assert train.names() == NAMES_OF_MINE
        assert warning == [f"{mine}/train: 4 other files left out: .srt, .txt, no ending"]

    def test_the_line_is_printed_once_by_a_stage(self, toy, tmp_path, capsys):
        videos = tb.read_videos("toy", toy, True)
        for name in videos.names()[:8]:
            stand_in(tmp_path / "my/train", [name])
            shutil.copy(toy / "UCF-101" / name, tmp_path / "my/train" / name)
        stand_in(tmp_path / "my", [f"train/{name}.txt" for name in videos.names()[:3]])
        pretrain_inv.main([*PRETRAIN, "--data", "folder", "--root", str(tmp_path / "my"),
                           "--out", str(tmp_path / "out")])
        assert capsys.readouterr().err.count("3 other files left out: .txt") == 1

    @pytest.mark.parametrize("name", """1.3GP 1.asf 1.avi 1.f4v 1.flv 1.gif 1.h264 1.m2ts 1.m4v
        1.mkv 1.MOV 1.mp4 1.mpeg 1.mpg 1.MTS 1.mxf 1.ogv 1.qt 1.ts 1.VOB 1.webm 1.wmv""".split())
    def test_endings_of_cameras_and_of_the_web_are_videos(self, name, tmp_path):
        stand_in(tmp_path, [f"train/a/{name}"])
        assert tb.read_videos("folder", tmp_path, True).names() == [f"train/a/{name}"]

    def test_a_gif_is_decoded(self, tmp_path):
        write_video(tmp_path / "1.gif", moving_frames(9), "gif", "rgb8")
        assert tb.decode_frames(tmp_path / "1.gif", [0, 8]).shape == (2, 48, 64, 3)

    def test_linked_folders_are_followed(self, mine, tmp_path):
        stand_in(tmp_path / "elsewhere", ["1.mp4", "below/2.mp4"])
        (mine / "unlabeled/more").symlink_to(tmp_path / "elsewhere")
        (mine / "train/c").symlink_to(tmp_path / "elsewhere")
        train = tb.read_videos("folder", mine, True)
        more = ["unlabeled/more/1.mp4", "unlabeled/more/below/2.mp4"]
        assert train.classes == ["a a", "b", "c"] and "train/c/1.mp4" in train.names()
        assert [name for name in train.names() if "more" in name] == more

    @pytest.mark.parametrize("links", [
        {"unlabeled/loop": "unlabeled"}, {"unlabeled/deep/up": "."}, {"unlabeled/loop": "/"},
        {"unlabeled/deep/er/x": "other", "other/y": "unlabeled/deep"},
        {"unlabeled/once": "other", "unlabeled/twice": "other"},
        {"unlabeled/itself": "unlabeled/itself"}], ids=str)
    def test_no_linked_folder_is_read_twice_or_for_ever(self, links, mine):
        (mine / "other").mkdir()
        for link, target in links.items():
            (mine / link).symlink_to(mine / target)
        stand_in(mine, ["other/z.mp4"])
        names = [os.path.relpath(path, mine) for path in tb.walk_videos(mine / "unlabeled")]
        others = [name for name in names if name not in NAMES_OF_MINE]
        assert [name for name in names if name in NAMES_OF_MINE] == NAMES_OF_MINE[3:]
        assert [os.path.basename(name) for name in others] == ["z.mp4"] * ("other" in str(links))

    @pytest.mark.parametrize("locked", ["train", "train/b", "unlabeled/deep", "."])
    def test_a_folder_without_permission_is_one_line(self, locked, mine, no_privileges):
        (mine / locked).chmod(0)
        try:
            with pytest.raises(tb.UserError) as error:
                tb.read_videos("folder", mine, True)
        finally:
            (mine / locked).chmod(0o700)
        assert str(error.value) == f"{mine / locked}: Permission denied"

    def test_an_out_without_permission_is_one_line(self, toy, tmp_path, no_privileges, capsys):
        tmp_path.chmod(0)
        try:
            with pytest.raises(SystemExit) as end:
                pretrain_inv.main([*PRETRAIN, "--root", str(toy), "--out", str(tmp_path / "out")])
        finally:
            tmp_path.chmod(0o700)
        error = capsys.readouterr().err.strip()
        assert end.value.code == 2 and "\n" not in error
        assert error.startswith(f"pretrain_inv.py: {tmp_path}") and "Permission denied" in error


class TestLabeledList:
    def read(self, lines, videos, folder):
        (folder / "list.txt").write_text("\r\n".join(lines))
        labeled, warning = warned(tb.read_labeled_list, folder / "list.txt", videos)
        return [videos.name(i) for i in labeled], warning

    def test_lists_of_many_forms_are_read(self, toy, tmp_path):
        videos = tb.read_videos("toy", toy, True)
        names = videos.names()[:5]
        folder, file = names[4].split("/")
        lines = [f"/home/someone/UCF 101/{names[0]} 7", names[1], f"{names[2][:-4]} 80 3",
                 f"{names[3][:-4]}.mp4", f"train/{folder[:2].lower()} {folder[2:]}_/{file}\t 1", "",
                 "Nowhere/v_x.avi 3"]
        chosen, warning = self.read(lines, videos, tmp_path)
        assert chosen == names
        assert "1 rows name no training video, such as Nowhere/v_x.avi 3" in warning[0]

    CLASHES = ["train/walk 1/a.mp4", "train/walk1/a.mp4", "train/walk1/b.avi", "train/walk1/b.mp4",
               "train/walk1/c 12.mp4", "train/walk1/c.mp4", "train/run/d 2019 5.mp4"]

    @pytest.mark.parametrize("row, name", [
        ("walk 1/a.mp4 5", 0), ("walk1/a.mp4", 1), ("walk1/a 64 5", 1), ("walk 1/a", 0),
        ("walk1/b.mp4", 3), ("walk1/b.avi 3 4", 2), ("walk1/c 12.mp4 5", 4), ("walk1/c.mp4 12", 5),
        ("run/d 2019 5", 6), ("run/d 2019 5 64 3", 6), ("Run/d 2019 5.webm 3", 6)])
    def test_exact_names_come_first(self, row, name, tmp_path):
        stand_in(tmp_path, self.CLASHES)
        videos = tb.read_videos("folder", tmp_path, True)
        chosen, warning = self.read([row], videos, tmp_path)
        assert chosen == [self.CLASHES[name]] and not warning

    @pytest.mark.parametrize("row", ["Walk_1/a.mp4", "walk_1/a 64 5", "walk1/b", "walk1/b.webm 5",
                                     "walk1/c 12"])
    def test_a_row_that_fits_two_videos_is_refused(self, row, tmp_path):
        stand_in(tmp_path, self.CLASHES)
        videos = tb.read_videos("folder", tmp_path, True)
        with pytest.raises(tb.UserError, match=f"list.txt: {row} fits train/walk.* and train/walk"):
            self.read(["run/d 2019 5.mp4", row], videos, tmp_path)

    def test_a_list_that_names_no_video_is_refused(self, toy, tmp_path):
        with pytest.raises(tb.UserError, match="list.txt: names no video"):
            self.read(["Nowhere/v_x.avi 3"], tb.read_videos("toy", toy, True), tmp_path)

    def test_a_missing_list_is_one_line(self, toy, tmp_path):
        with pytest.raises(tb.UserError, match="none.txt: No such file"):
            tb.read_labeled_list(tmp_path / "none.txt", tb.read_videos("toy", toy, True))


class TestToy:
    def test_interrupted_rendering_goes_on_and_gives_the_same_files(self, toy, tmp_path,
                                                                    monkeypatch):
        encode = tb.encode_video
        calls = []

        def interrupted(file, frames):
            calls.append(1)
            if len(calls) == 10:
                file.write(b"half")
                raise KeyboardInterrupt
            encode(file, frames)

        monkeypatch.setattr(tb, "encode_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tb.render_toy(tmp_path, train=24, test=8)
        killed = tmp_path / "UCF-101/Ring/.v_Ring_g01_c02.avi.1"  # what a kill would leave
        killed.write_bytes(b"half")
        assert not (tmp_path / "toy.json").exists()
        tb.render_toy(tmp_path, train=24, test=8)
        assert len(calls) == 32 + 1
        killed.unlink()
        files = {path.relative_to(tmp_path): text for path, text in contents(tmp_path).items()}
        assert files == {path.relative_to(toy): text for path, text in contents(toy).items()}

    @pytest.mark.parametrize("names, words", [
        (["train/walk/1.mp4"], "holds train/: --data folder?"),
        (["train/walk/1.mp4", "test/walk/2.mp4"], "--data folder?"),
        (["train/walk/1.mp4", "val/walk/2.mp4"], "--data kinetics400?"),
        (["UCF-101/Archery/v.avi", "ucfTrainTestlist/trainlist01.txt"],
         "holds UCF-101/: --data ucf101?"),
        (["ucfTrainTestlist/trainlist01.txt"], "--data ucf101?"),
        (["hmdb51_org/wave/v.avi", "testTrainMulti_7030_splits/wave_test_split1.txt"],
         "--data hmdb51?"),
        (["UCF-101/Ring/v.avi", "train/walk/1.mp4"], "holds train/"),
        (["thesis.txt"], "holds thesis.txt: ")])
    def test_it_is_rendered_into_no_folder_of_other_things(self, names, words, tmp_path, capsys):
        stand_in(tmp_path / "my2", names)
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as end:
            pretrain_inv.main([*PRETRAIN, "--root", str(tmp_path / "my2"),
                               "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err.strip()
        assert end.value.code == 2 and "\n" not in error and words in error
        assert contents(tmp_path) == before

    def test_it_is_rendered_into_a_new_or_empty_folder(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty/.DS_Store").touch()
        for name in ("new", "empty"):
            tb.render_toy(tmp_path / name, train=8, test=8)
            assert len(tb.read_videos("toy", tmp_path / name, True)) == 8

    def test_another_version_is_refused(self, toy, tmp_path):
        settings = json.loads((toy / "toy.json").read_text())
        (tmp_path / "toy.json").write_text(json.dumps({**settings, "version": 1}))
        with pytest.raises(tb.UserError, match="another version"):
            tb.render_toy(tmp_path)
