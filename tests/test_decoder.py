"""decode_frames against a full decode, on files of many kinds: intact, odd, damaged."""

import contextlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from av.packet import PacketSideData, packet_sidedata_type_from_literal
from torchvision.transforms.v2 import functional as TF

import common as tb
from test_common import moving_frames, write_video

HERE = Path(tb.__file__).parent


# ---- What a decode is checked against ------------------------------------------------------------

def full_decode(path):
    """All frames of the first video stream, by PyAV's plainest means."""
    frames = []
    with av.open(str(path), **tb.OPEN) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            with contextlib.suppress(av.error.InvalidDataError):  # one frame less
                for frame in packet.decode():
                    frames.append(frame.to_ndarray(format="rgb24"))
    return np.stack(frames)


def check_exact(path, expected, step=1):
    """decode_frames gives the frames that were asked for, whichever, and counts them right."""
    count = len(expected)
    rng = np.random.default_rng(0)
    spans = [range(start, min(count, start + length)) for start, length in
             zip(rng.integers(count, size=8), rng.integers(1, 40, size=8))]
    alone = [[i] for i in range(0, count, step)]
    for indices in [[count - 1, 0, count // 2, 0], range(count), *spans, *alone]:
        frames = tb.decode_frames(path, indices)
        assert frames.dtype == torch.uint8
        assert np.array_equal(frames.numpy(), expected[list(indices)]), indices
    with pytest.raises(IndexError):
        tb.decode_frames(path, [count])
    last, counts = last_frame(path)
    assert np.array_equal(last[0].numpy(), expected[-1]) and counts[-1] == count


def last_frame(path):
    """The last frame, asked for by a function of the count, and the counts it was given."""
    counts = []
    frames = tb.decode_frames(path, lambda count: counts.append(count) or [count - 1])
    return frames, counts


# ---- Intact files --------------------------------------------------------------------------------

X264 = {"g": "30", "bf": "2"}
# without worker threads: with one, x265 has once crashed at the end of a file
X265 = {"x265-params": "log-level=none:pools=none"}
SVT_AV1 = {"g": "30", "svtav1-params": "lp=1"}
OPEN_GOP = {**X264, "x264-params": "open-gop=1:scenecut=0"}
BT709 = {**X264, "colorspace": "bt709", "color_range": "tv"}
LATE = [t + 1000 for t in range(96)]
STEPS = [t * 3 // 2 + t // 10 * 25 for t in range(96)]
SLOWING = [t * t // 8 + t for t in range(96)]
SECOND = [("libx264", moving_frames(20, 32, 32))]
KINDS = {
    "xvid-like.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "b-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "dropped-frames.avi": {"codec": "mpeg4", "options": {"g": "12"}, "pts": STEPS},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264.avi": {"codec": "libx264", "options": X264},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12"}},
    "b-frames.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "h264.mp4": {"codec": "libx264", "options": X264},
    "long-gop.mp4": {"codec": "libx264", "options": {"g": "250", "bf": "3"}},
    "open-gop.mp4": {"codec": "libx264", "options": OPEN_GOP},
    "intra-refresh.mp4": {"codec": "libx264", "options": {"x264-params": "intra-refresh=1"}},
    "interlaced.mp4": {"codec": "libx264", "options": {**X264, "x264-params": "interlaced=1"}},
    "hevc.mp4": {"codec": "libx265", "options": {"g": "30", **X265}},
    "av1.mp4": {"codec": "libsvtav1", "options": SVT_AV1},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "h264.mkv": {"codec": "libx264", "options": X264},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "30"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "30"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "h264.ts": {"codec": "libx264", "options": X264},
    "444.mp4": {"codec": "libx264", "pix_fmt": "yuv444p", "options": X264},
    "10-bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265},
    "12-bit.mkv": {"codec": "libx265", "pix_fmt": "yuv444p12le", "options": X265},
    "full-range.mp4": {"codec": "libx264", "pix_fmt": "yuvj420p", "options": X264},
    "bt709.mp4": {"codec": "libx264", "options": BT709},
    "late-start.mp4": {"codec": "libx264", "options": X264, "pts": LATE},
    "late-start.mkv": {"codec": "libx264", "options": X264, "pts": LATE},
    "variable-rate.mp4": {"codec": "libx264", "options": X264, "pts": STEPS},
    "variable-rate.mkv": {"codec": "libvpx-vp9", "options": {"g": "30"}, "pts": SLOWING},
    "audio-first.mp4": {"codec": "libx264", "options": X264, "before": [("aac", None)]},
    "two-videos.mp4": {"codec": "libx264", "options": X264, "extra": SECOND},
    "web.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "web.flv": {"codec": "flv"},
    "web.wmv": {"codec": "wmv2"},
    "phone.3gp": {"codec": "mpeg4"},
    "camera.mts": {"codec": "libx264", "options": X264},
    "camera.mxf": {"codec": "mpeg2video"},
    "raw.h264": {"codec": "libx264", "options": X264},
}


@pytest.fixture(scope="session")
def real_data():
    if "TIMEBALANCE_TEST_DATA" not in os.environ:
        pytest.skip("TIMEBALANCE_TEST_DATA is not set")
    return Path(os.environ["TIMEBALANCE_TEST_DATA"])


class TestDecoder:
    @pytest.mark.parametrize("name", KINDS)
    def test_frames_are_those_of_a_full_decode(self, name, tmp_path):
        path = write_video(tmp_path / name, moving_frames(96), **KINDS[name])
        expected = full_decode(path)
        assert len(expected) >= 95
        assert tb.list_folder(tmp_path)[1] == [name]  # its ending is a video's
        check_exact(path, expected, step=5)

    def test_frames_of_real_files_are_those_of_a_full_decode(self, real_data):
        paths = [p for p in (real_data / "videos").iterdir() if p.suffix in tb.SUFFIXES]
        assert {p.suffix for p in paths} == {".avi", ".mp4"}
        for path in paths:
            check_exact(path, full_decode(path), step=40)

    def test_frames_that_share_a_packet_are_counted_in_any_format(self, real_data, tmp_path):
        path = next((real_data / "videos").glob("TrumanShow*.avi"))  # DivX with B-frames
        full = lambda k, data: [data] if len(data) > 1 else []
        path = rewrite(path, tmp_path / "divx.mkv", full)
        expected = full_decode(path)
        check_exact(path, expected, step=40)
        assert last_frame(path)[1] == [len(expected)]

    @pytest.mark.parametrize("name, least, most", [
        # from the key frame before
        ("xvid-like.avi", 4, 16), ("h264.mp4", 4, 34), ("open-gop.mp4", 4, 40),
        ("hevc.mp4", 4, 34), ("av1.mp4", 4, 34), ("prores.mov", 4, 6), ("h264.mkv", 4, 34),
        ("vp8.webm", 4, 34), ("vp9.webm", 4, 34),
        # counted from the start, without a trial or after a short one
        ("b-frames.avi", 64, 64), ("h264.avi", 64, 64), ("mpeg2.mpg", 64, 64),
        ("mpeg2.ts", 64, 64), ("interlaced.mp4", 64, 68)])
    def test_no_more_is_decoded_than_must_be(self, name, least, most, tmp_path, monkeypatch):
        path = write_video(tmp_path / name, moving_frames(96), **KINDS[name])
        pick_frames = tb.pick_frames
        decoded = []

        def counted(frames, *rest):
            return pick_frames((decoded.append(frame.pts) or frame for frame in frames), *rest)

        monkeypatch.setattr(tb, "pick_frames", counted)
        frames = tb.decode_frames(path, range(60, 64))
        assert np.array_equal(frames.numpy(), full_decode(path)[60:64])
        assert least <= len(decoded) <= most

    def test_memory_does_not_grow_with_the_file(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (1, 720, 1280, 3), np.uint8)
        short = write_video(tmp_path / "short.avi", noise, "mjpeg", "yuvj420p", {"qmax": "2"})
        path = tmp_path / "long.avi"
        rewrite(short, path, lambda k, data: [data] * 150)
        assert path.stat().st_size > 100e6
        program = ("import common, resource, sys\n"
                   "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                   "common.decode_frames(sys.argv[1], [0])\n"
                   "before = peak()\n"
                   "common.decode_frames(sys.argv[2], [149])\n"
                   "print(peak() - before)\n")
        grown = subprocess.run([sys.executable, "-c", program, short, path], cwd=HERE, check=True,
                               capture_output=True, text=True).stdout
        assert int(grown) < 20e3  # kB

    def test_short_side_scales_down_and_never_up(self, tmp_path):
        tall = write_video(tmp_path / "tall.mp4", moving_frames(20, 96, 64), "libx264")
        assert tb.decode_frames(tall, [3], short_side=32).shape == (1, 48, 32, 3)
        assert tb.decode_frames(tall, [3], short_side=200).shape == (1, 96, 64, 3)

    def test_pictures_are_scaled_not_cropped(self, tmp_path):
        tall = write_video(tmp_path / "tall.mp4", moving_frames(20, 96, 64), "libx264")
        small = tb.decode_frames(tall, range(20), short_side=32)
        full = tb.decode_frames(tall, range(20)).permute(0, 3, 1, 2)
        resized = TF.resize(full, [48, 32], antialias=True)
        assert (small.float() - resized.permute(0, 2, 3, 1).float()).abs().mean() < 4

    @pytest.mark.parametrize("codec, pix_fmt", [
        ("libx264", "yuv444p"), ("mjpeg", "yuvj420p"), ("libvpx-vp9", "yuv420p")])
    def test_odd_sizes(self, codec, pix_fmt, tmp_path):
        path = write_video(tmp_path / "odd.mkv", moving_frames(20, 47, 61), codec, pix_fmt)
        check_exact(path, full_decode(path))

    @pytest.mark.parametrize("matrix, shown", [
        ((1, 0, 0, 1), lambda p: p),
        ((0, -1, 1, 0), lambda p: np.rot90(p)),  # counter-clockwise
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, 1, -1, 0), lambda p: np.rot90(p, 3)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1))])
    def test_phone_videos_are_upright(self, matrix, shown, tmp_path):
        """As FFmpeg shows them, which was tried."""
        path = write_video(tmp_path / "phone.mp4", moving_frames(5), "libx264", options=X264)
        a, b, c, d = matrix
        numbers = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14]) << 16
        content = bytearray(path.read_bytes())
        start = content.index(b"tkhd") + 44
        content[start:start + 36] = numbers.astype(">i4").tobytes()
        path.write_bytes(content)
        frames = tb.decode_frames(path, [4, 0])
        expected = full_decode(path)
        assert np.array_equal(frames[0].numpy(), shown(expected[4]))
        assert np.array_equal(frames[1].numpy(), shown(expected[0]))

    @pytest.mark.parametrize("name, codec", [
        ("one.avi", "mpeg4"), ("one.mp4", "libx264"), ("one.webm", "libvpx-vp9")])
    def test_a_single_frame_is_a_video(self, name, codec, tmp_path):
        path = write_video(tmp_path / name, moving_frames(1), codec)
        clip = tb.decode_frames(path, lambda count: tb.clip_indices(count, 16, 2))
        assert clip.shape == (16, 48, 64, 3)
        with pytest.raises(IndexError):
            tb.decode_frames(path, [1])

    @pytest.mark.parametrize("name", [
        "http:, %d #1 [x](y)'s & co.avi", "-dash.avi", "pipe:0.avi", "späße;.avi", "a b?.avi",
        "no_ending"])
    def test_names_that_look_like_something_else(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_video(tmp_path / "plain.avi", moving_frames(3)).rename(tmp_path / name)
        for path in (name, tmp_path / name):
            assert tb.decode_frames(path, [2]).shape == (1, 48, 64, 3)


# ---- Files whose packets mislead -----------------------------------------------------------------

def rewrite(source, target, change=lambda k, data: [data], key=None, pts=None, split=None):
    """Copy a file's packets. change: from the rank and data of a packet to the data of those to
    write. key: what all key flags are to be. pts: from the rank of a packet to its timestamp.
    split: a bitstream filter, which makes several packets of one."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [p for p in old.demux(stream) if p.size]
        if split:
            splitter = BitStreamFilterContext(split, stream)
            packets = [part for p in packets for part in splitter.filter(p)]
        written = 0
        for k, packet in enumerate(packets):
            for data in change(k, bytes(packet)):
                part = av.Packet(data)
                part.stream = copy
                part.time_base = packet.time_base
                part.pts = packet.pts
                part.dts = packet.dts
                if new.format.name == "avi":
                    part.time_base = Fraction(1, 25)
                    part.pts = part.dts = written
                if pts:
                    part.pts = part.dts = pts(k)
                part.is_keyframe = packet.is_keyframe if key is None else key
                new.mux(part)
                written += 1
    return target


def erase(path, box):
    """Let no player find an mp4's box."""
    content = path.read_bytes()
    path.write_bytes(content.replace(box, b"free", 1))
    return path


def hide(k, data):
    """Some VP8 frames as alternate reference frames: decoded, but not shown."""
    return [bytes([data[0] & ~16]) + data[1:] if k in (7, 20, 21, 40) else data]


def drop(k, data):
    """Some MPEG-4 frames as XviD writes those that it drops (N-VOP)."""
    return [b"\0\0\1\xb6\x50\xcf" if k in (5, 20, 21, 40) else data]


def without_tables(k, data):
    """All JPEG pictures but the first without their quantisation and Huffman tables."""
    kept = bytearray(data[:2])
    at = 2
    while k and data[at + 1] != 0xda:  # up to the scan
        end = at + 2 + int.from_bytes(data[at + 2:at + 4], "big")
        if data[at + 1] not in (0xc4, 0xdb):
            kept += data[at:end]
        at = end
    return [bytes(kept) + data[at:]]


def write_palette(path):
    """256 colours, which the first packet alone brings along."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for t in range(96):
            frame = av.VideoFrame(64, 48, "pal8")
            pixels, palette = frame.planes
            row = np.arange(pixels.line_size) + 3 * t
            pixels.update(np.add.outer(5 * np.arange(48), row).astype(np.uint8).tobytes())
            palette.update(np.outer(np.arange(256), [1, 3, 5, 7]).astype(np.uint8).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_two_encodings(path):
    """An mp4 of two parts whose H.264 parameters differ: the second has a sample description of its
    own. Without CABAC the wrong parameters give wrong pictures and no error."""
    with av.open(str(path), "w") as new:
        for part, qp in enumerate((20, 35)):
            options = {"g": "12", "bf": "0", "qp": str(qp), "x264-params": "scenecut=0:cabac=0"}
            source = write_video(path.with_name(f"{qp}.mp4"), moving_frames(48), "libx264",
                                 options=options)
            with av.open(str(source)) as old:
                stream = old.streams.video[0]
                if not part:
                    copy = new.add_stream_from_template(stream)
                parameters = stream.codec_context.extradata
                for k, packet in enumerate(p for p in old.demux(stream) if p.size):
                    if part and not k:
                        kind = packet_sidedata_type_from_literal("new_extradata")
                        side_data = PacketSideData(kind, len(parameters))
                        side_data.update(parameters)
                        packet.set_sidedata(side_data)
                    packet.pts = packet.dts = (48 * part + k) * 512
                    packet.stream = copy
                    new.mux(packet)
    return path


ARF = {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "25", "b": "300k",
       "deadline": "realtime", "cpu-used": "6"}
NO_B = {"codec": "libx264", "options": {"g": "30", "bf": "0"}}
TABLES = {"codec": "mjpeg", "pix_fmt": "yuvj420p",
          "options": {"huffman": "default", "qmin": "5", "qmax": "5"}}
MISLEADING = {  # what to encode, and what to do to it
    # packets that are no frame
    "hidden.webm": (KINDS["vp8.webm"], dict(change=hide)),
    "hidden-together.webm": (KINDS["vp8.webm"], dict(
        change=hide, pts=lambda k: 40 * (k + (k in (7, 20, 21, 40)) + (k == 20)))),
    "hidden.avi": (KINDS["vp8.webm"], dict(change=hide)),
    "hidden-vp9.avi": ({"codec": "libvpx-vp9", "options": ARF}, dict(split="vp9_superframe_split")),
    "dropped.avi": (KINDS["xvid-like.avi"], dict(change=drop)),
    "dropped.mp4": (KINDS["xvid-like.avi"], dict(change=drop)),
    "dropped.mkv": (KINDS["xvid-like.avi"], dict(change=drop)),
    # timestamps
    "equal.mkv": (KINDS["xvid-like.avi"], dict(pts=lambda k: 40 * (k // 2))),
    "in-order-of-decoding.mkv": (KINDS["h264.mp4"], dict(pts=lambda k: 40 * k)),
    # key flags that lie
    "all-key.avi": (NO_B, dict(key=True)),
    "no-key.mkv": (KINDS["mpeg4.mp4"], dict(key=False)),
    "begins-in-a-group.mkv": (KINDS["xvid-like.avi"], dict(
        change=lambda k, data: [data] if k > 4 else [])),
    # state that the first packet alone brings
    "tables.avi": (TABLES, dict(change=without_tables)),
    "tables.mkv": (TABLES, dict(change=without_tables)),
}


def write_misleading(folder, name):
    content, changes = MISLEADING[name]
    suffix = ".webm" if "vp" in content["codec"] else Path(name).suffix
    source = write_video(folder / f"source{suffix}", moving_frames(96), **content)
    return rewrite(source, folder / name, **changes)


class TestMisleadingFiles:
    @pytest.mark.parametrize("name", MISLEADING)
    def test_frames_are_those_of_a_full_decode(self, name, tmp_path):
        path = write_misleading(tmp_path, name)
        check_exact(path, full_decode(path))

    @pytest.mark.parametrize("codec, options", [
        ("mpeg4", {"g": "12"}), ("mpeg4", {"g": "12", "bf": "2"}), ("libx264", X264),
        ("libx264", OPEN_GOP), ("libx265", X265)])
    def test_an_mp4_that_does_not_name_its_key_frames(self, codec, options, tmp_path):
        path = write_video(tmp_path / "all.mp4", moving_frames(96), codec, options=options)
        expected = full_decode(path)
        check_exact(erase(path, b"stss"), expected, step=3)

    @pytest.mark.parametrize("write", [write_palette, write_two_encodings])
    def test_tables_that_come_once(self, write, tmp_path):
        path = write(tmp_path / ("once.avi" if write is write_palette else "once.mp4"))
        check_exact(path, full_decode(path))

    @pytest.mark.parametrize("name, count", [
        ("hidden.webm", 92), ("hidden-together.webm", 92), ("hidden.avi", 92),
        ("hidden-vp9.avi", 96)])
    def test_alternate_reference_frames_are_not_counted(self, name, count, tmp_path):
        assert last_frame(write_misleading(tmp_path, name))[1] == [count]


# ---- Damaged files -------------------------------------------------------------------------------

def damage(path, number, start, stop, filling):
    """Overwrite bytes start to stop of a packet."""
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    position, size = packets[number]
    stop = size if stop is None else stop
    content = bytearray(path.read_bytes())
    content[position + start:position + stop] = filling(stop - start)
    path.write_bytes(content)
    return path


class TestDamagedFiles:
    @pytest.mark.parametrize("name, number, start, stop, filling", [
        # a packet is gone, long before the frames that are asked for
        ("h264.mp4", 20, 0, None, bytes),
        ("h264.mp4", 20, 0, 16, np.random.default_rng(0).bytes),
        ("hevc.mp4", 20, 0, None, bytes),
        ("hevc.mp4", 20, 0, 16, np.random.default_rng(0).bytes),
        ("av1.mp4", 20, 0, None, bytes),
        ("mpeg4.mp4", 20, 0, None, bytes),
        ("xvid-like.avi", 20, 0, 16, np.random.default_rng(0).bytes),
        ("vp9.webm", 20, 4, None, bytes),
        ("mjpeg.avi", 20, 20, 500, bytes),
        # the headers of some
        ("xvid-like.avi", 20, -8, 500, bytes),
        ("mjpeg.avi", 20, -8, 500, bytes),
        # a part of a key frame, or of one that builds on it
        ("xvid-like.avi", 24, 60, 120, np.random.default_rng(0).bytes),
        ("xvid-like.avi", 27, 20, 60, np.random.default_rng(0).bytes)])
    def test_frames_are_those_of_a_full_decode(self, name, number, start, stop, filling, tmp_path):
        path = write_video(tmp_path / name, moving_frames(96), **KINDS[name])
        intact = full_decode(path)
        expected = full_decode(damage(path, number, start, stop, filling))
        assert len(expected) < 96 or (expected != intact).any()
        for i in range(len(expected)):
            assert np.array_equal(tb.decode_frames(path, [i])[0].numpy(), expected[i]), i

    @pytest.mark.parametrize("number, start, stop, count", [
        (18, 30, 50, 72), (21, 30, 50, 72), (22, 30, 50, 72), (30, 60, 120, 71), (32, 30, 60, 72)])
    def test_frames_that_build_on_a_damaged_one(self, number, start, stop, count, tmp_path):
        """Some come out before it, and FFmpeg may repair it by pictures from before the seek, as of
        packet 22. Given qp, x264 writes the same file in each run."""
        path = write_video(tmp_path / "damaged.mp4", moving_frames(72), "libx264",
                           options={**X264, "qp": "25"})
        expected = full_decode(damage(path, number, start, stop, np.random.default_rng(0).bytes))
        assert len(expected) == count
        for i in range(count):
            assert np.array_equal(tb.decode_frames(path, [i])[0].numpy(), expected[i]), i

    def test_a_lost_frame_moves_no_frame_behind_the_next_key_frame(self, tmp_path):
        path = write_video(tmp_path / "lost.mp4", moving_frames(96), **KINDS["mpeg4.mp4"])
        intact = full_decode(path)
        expected = full_decode(damage(path, 20, 5, 12, np.random.default_rng(0).bytes))
        assert len(expected) == 95
        for i in range(95):
            right = intact if i >= 24 else expected
            assert np.array_equal(tb.decode_frames(path, [i])[0].numpy(), right[i]), i

    def test_a_truncated_avi_gives_what_is_left(self, tmp_path):
        path = write_video(tmp_path / "cut.avi", moving_frames(96), **KINDS["xvid-like.avi"])
        content = path.read_bytes()
        path.write_bytes(content[:len(content) // 2])
        expected = full_decode(path)
        assert 20 < len(expected) < 70
        check_exact(path, expected)

    def test_a_cut_mp4_gives_what_is_left(self, tmp_path):
        path = write_video(tmp_path / "cut.mp4", moving_frames(96), **KINDS["h264.mp4"])
        content = path.read_bytes()  # the index, in front, promises more than is there
        path.write_bytes(content[:len(content) * 2 // 3])
        expected = full_decode(path)
        assert 40 < len(expected) < 90
        check_exact(path, expected)

    def test_what_holds_no_video_raises_a_decode_error(self, tmp_path):
        whole = write_video(tmp_path / "whole.mp4", moving_frames(20), "libx264")
        (tmp_path / "empty.avi").touch()
        (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
        (tmp_path / "text.avi").write_text("not a video\n" * 100)
        (tmp_path / "headless.mp4").write_bytes(whole.read_bytes()[1000:])
        (tmp_path / "folder.avi").mkdir()
        write_video(tmp_path / "sound.mp4", moving_frames(1, 32, 32), "mjpeg", "yuvj420p",
                    cover=True, extra=[("aac", None)])
        for name in ("empty.avi", "garbage.mp4", "text.avi", "headless.mp4", "folder.avi",
                     "absent.avi", "sound.mp4"):
            with pytest.raises(tb.DECODE_ERRORS):
                tb.decode_frames(tmp_path / name, [0])
