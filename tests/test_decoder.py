"""decode_frames against a full decode, on files of many kinds: intact, odd, damaged."""

import itertools
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.packet import PacketSideData, packet_sidedata_type_from_literal
from torchvision.transforms.v2 import functional as TF

import common as tb
from conftest import full_decode, moving_frames, write_video
from test_common import HERE


def check_exact(path, step=1):
    """decode_frames gives the frames that were asked for, whichever, and counts them right."""
    expected = full_decode(path)
    count = len(expected)
    starts = np.random.default_rng(0).integers(count, size=8)
    spans = [range(i, min(count, i + 1 + i % 39)) for i in starts]
    alone = [[i] for i in range(0, count, step)]
    for indices in [[count - 1, 0, count // 2, 0], *spans, *alone]:
        frames = tb.decode_frames(path, indices)
        assert frames.dtype == torch.uint8
        assert np.array_equal(frames.numpy(), expected[list(indices)]), indices
    assert np.array_equal(tb.decode_frames(path, range).numpy(), expected)  # range of the count
    with pytest.raises(IndexError):
        tb.decode_frames(path, [count])
    return count


# ---- Intact files --------------------------------------------------------------------------------

X264 = {"g": "30", "bf": "2"}
# without worker threads: with one, x265 has once crashed at the end of a file
X265 = {"g": "30", "x265-params": "log-level=none:pools=none"}
OPEN_GOP = {**X264, "x264-params": "open-gop=1:scenecut=0"}
STEPS = [t * 3 // 2 + t // 10 * 25 for t in range(96)]
SLOWING = [t * t // 8 + t for t in range(96)]
ODD = moving_frames(20, 47, 61)
ONE = moving_frames(1)
KINDS = {
    "xvid-like.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "b-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "dropped-frames.avi": {"codec": "mpeg4", "options": {"g": "12"}, "pts": STEPS},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264.avi": {"codec": "libx264", "options": X264},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12"}},
    "h264.mp4": {"codec": "libx264", "options": X264},
    "open-gop.mp4": {"codec": "libx264", "options": OPEN_GOP},
    "intra-refresh.mp4": {"codec": "libx264", "options": {"x264-params": "intra-refresh=1"}},
    "interlaced.mp4": {"codec": "libx264", "options": {**X264, "x264-params": "interlaced=1"}},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "30", "svtav1-params": "lp=1"}},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "h264.mkv": {"codec": "libx264", "options": X264},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "30"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "30"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "10-bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265},
    "bt709.mp4": {"codec": "libx264", "options": {"colorspace": "bt709", "color_range": "tv"}},
    "late-start.mp4": {"codec": "libx264", "options": X264, "pts": range(1000, 1096)},
    "variable-rate.mp4": {"codec": "libx264", "options": X264, "pts": STEPS},
    "variable-rate.mkv": {"codec": "libvpx-vp9", "options": {"g": "30"}, "pts": SLOWING},
    "audio-first.mp4": {"codec": "libx264", "options": X264, "before": [("aac", None)]},
    "two-videos.mp4": {"codec": "libx264", "extra": [("libx264", moving_frames(20, 32, 32))]},
    "web.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "web.flv": {"codec": "flv"},
    "web.wmv": {"codec": "wmv2"},
    "camera.mts": {"codec": "libx264", "options": X264},
    "camera.mxf": {"codec": "mpeg2video"},
    "raw.h264": {"codec": "libx264", "options": X264},
    "odd-444.mkv": {"codec": "libx264", "frames": ODD, "pix_fmt": "yuv444p"},
    "odd.avi": {"codec": "mjpeg", "frames": ODD, "pix_fmt": "yuvj420p"},
    "odd.webm": {"codec": "libvpx-vp9", "frames": ODD},
    "one.avi": {"codec": "mpeg4", "frames": ONE},
    "one.mp4": {"codec": "libx264", "frames": ONE},
    "one.webm": {"codec": "libvpx-vp9", "frames": ONE},
}


def write_kind(folder, name):
    return write_video(folder / name, **{"frames": moving_frames(96), **KINDS[name]})


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_full_decode(name, tmp_path):
    path = write_kind(tmp_path, name)
    assert tb.list_videos(tmp_path) == {name}  # its ending is a video's
    check_exact(path, step=5)


def test_frames_of_real_files_are_those_of_a_full_decode(real_clips):
    assert {path.suffix for path in real_clips} == {".avi", ".mp4"}
    for path in real_clips:
        check_exact(path, step=40)


@pytest.mark.parametrize("name, least, most", [
    # from the key frame before
    ("xvid-like.avi", 4, 16), ("h264.mp4", 4, 34), ("open-gop.mp4", 4, 40), ("hevc.mp4", 4, 34),
    ("av1.mp4", 4, 34), ("prores.mov", 4, 6), ("h264.mkv", 4, 34), ("vp9.webm", 4, 34),
    # counted from the start, without a trial or after a short one
    ("b-frames.avi", 64, 64), ("h264.avi", 64, 64), ("mpeg4.mp4", 64, 64), ("vp8.webm", 64, 64),
    ("mpeg2.mpg", 64, 64), ("mpeg2.ts", 64, 64), ("interlaced.mp4", 64, 68)])
def test_no_more_is_decoded_than_must_be(name, least, most, tmp_path, monkeypatch):
    path = write_kind(tmp_path, name)
    pick_frames = tb.pick_frames
    decoded = []

    def counted(frames, *rest):
        return pick_frames((decoded.append(frame.pts) or frame for frame in frames), *rest)

    monkeypatch.setattr(tb, "pick_frames", counted)
    frames = tb.decode_frames(path, range(60, 64))
    assert np.array_equal(frames.numpy(), full_decode(path)[60:64])
    assert least <= len(decoded) <= most


def test_memory_does_not_grow_with_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1, 720, 1280, 3), np.uint8)
    short = write_video(tmp_path / "short.avi", noise, "mjpeg", "yuvj420p", {"qmax": "2"})
    path = rewrite(short, tmp_path / "long.avi", lambda k, data: [data] * 150)
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


def test_pictures_are_scaled_down_never_up_and_not_cropped(tmp_path):
    tall = write_video(tmp_path / "tall.mp4", moving_frames(20, 96, 64), "libx264")
    small = tb.decode_frames(tall, range(20), short_side=32)
    full = tb.decode_frames(tall, range(20), short_side=200)
    assert full.shape == (20, 96, 64, 3)
    resized = TF.resize(full.permute(0, 3, 1, 2), [48, 32], antialias=True).permute(0, 2, 3, 1)
    assert (small.float() - resized.float()).abs().mean() < 4


@pytest.mark.parametrize("matrix, shown", [
    ((1, 0, 0, 1), lambda p: p),
    ((0, -1, 1, 0), lambda p: np.rot90(p)),  # counter-clockwise
    ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    ((0, 1, -1, 0), lambda p: np.rot90(p, 3)),
    ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    ((1, 0, 0, -1), lambda p: p[::-1]),
    ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1))])
def test_phone_videos_are_upright(matrix, shown, tmp_path):
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


@pytest.mark.parametrize("name", [
    "http:, %d #1 [x](y)'s & co.avi", "-dash.avi", "pipe:0.avi", "späße;.avi", "a b?.avi",
    "no_ending"])
def test_names_that_look_like_something_else(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "plain.avi", moving_frames(3)).rename(tmp_path / name)
    for path in (name, tmp_path / name):
        assert tb.decode_frames(path, [2]).shape == (1, 48, 64, 3)


# ---- Files whose packets mislead -----------------------------------------------------------------

def rewrite(source, target, change=lambda k, data: [data], key=None, timestamp=lambda i: i):
    """Copy a file's packets. change: from the rank and data of a packet to the data of those to
    write. key: what all key flags are to be. timestamp: from the rank of a packet written."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        written = 0
        for k, packet in enumerate(p for p in old.demux(stream) if p.size):
            for data in change(k, bytes(packet)):
                part = av.Packet(data)
                part.stream = copy
                part.time_base = Fraction(1, 25)
                part.pts = part.dts = timestamp(written)
                part.duration = 1  # PyAV 17 would write none, and the last frame would be cut off
                part.is_keyframe = packet.is_keyframe if key is None else key
                new.mux(part)
                written += 1
    return target


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


def with_exif(k, data):
    """PyAV 18.1 has no name for this side data, and raises. The orientation is not applied."""
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # orientation 6
    part = b"Exif\0\0" + tiff
    return [data[:2] + b"\xff\xe1" + (len(part) + 2).to_bytes(2, "big") + part + data[2:]]


NO_B = {"codec": "libx264", "options": {"g": "30", "bf": "0"}}
FIXED = {"huffman": "default", "qmin": "5", "qmax": "5"}  # tables that all pictures share
MISLEADING = {  # what to encode, what to do to it, and how many frames it has then
    # packets that are no frame
    "hidden.webm": (KINDS["vp8.webm"], dict(change=hide), 92),
    "hidden.avi": (KINDS["vp8.webm"], dict(change=hide), 92),
    "dropped.avi": (KINDS["xvid-like.avi"], dict(change=drop), 92),
    "dropped.mp4": (KINDS["xvid-like.avi"], dict(change=drop), 92),
    # timestamps
    "equal.mkv": (NO_B, dict(timestamp=lambda i: i // 2), 96),
    "in-order-of-decoding.mkv": (KINDS["h264.mp4"], {}, 96),
    # key flags that lie
    "all-key.avi": (NO_B, dict(key=True), 96),
    "no-key.mkv": (NO_B, dict(key=False), 96),
    "begins-in-a-group.avi": (
        KINDS["xvid-like.avi"], dict(change=lambda k, data: [data] if k > 4 else []), 91),
    # state that the first packet alone brings
    "tables.avi": ({**KINDS["mjpeg.avi"], "options": FIXED}, dict(change=without_tables), 96),
    "exif.avi": (KINDS["mjpeg.avi"], dict(change=with_exif), 96),
}


@pytest.mark.parametrize("name", MISLEADING)
def test_misleading_packets_change_no_frame(name, tmp_path):
    content, changes, count = MISLEADING[name]
    source = write_video(tmp_path / f"source_of_{name}", moving_frames(96), **content)
    assert check_exact(rewrite(source, tmp_path / name, **changes)) == count


@pytest.mark.parametrize("name", ["h264.mp4", "open-gop.mp4", "hevc.mp4"])
def test_an_mp4_that_does_not_name_its_key_frames(name, tmp_path):
    path = write_kind(tmp_path, name)
    content = path.read_bytes()
    assert b"stss" in content
    path.write_bytes(content.replace(b"stss", b"free", 1))
    check_exact(path, step=3)


def test_an_empty_packet_is_passed_over(tmp_path):
    """Theora repeats a picture so. No encoder here writes one, so they are put in between."""
    path = write_kind(tmp_path, "b-frames.avi")
    container, stream = tb.open_video(path)
    with container:
        packets = itertools.chain.from_iterable((p, av.Packet()) for p in container.demux(stream))
        frames = [frame.to_ndarray(format="rgb24") for frame in tb.decode(packets, stream)]
    assert np.array_equal(frames, full_decode(path))


def test_of_two_video_streams_the_default_one_is_read(tmp_path):
    """Whichever comes first; of one without a mark, the first."""
    none, default = av.stream.Disposition(0), av.stream.Disposition.default
    for marks, shape in [((), (20, 47, 61, 3)), ((none, default), (7, 48, 64, 3))]:
        path = write_video(tmp_path / "two.mkv", ODD, "ffv1", marks=marks,
                           extra=[("ffv1", moving_frames(7))])
        assert tb.decode_frames(path, range).shape == shape


def test_two_encodings_in_one_mp4(tmp_path):
    """H.264 parameters of the second part differ: it has a sample description of its own. Without
    CABAC the wrong parameters give wrong pictures and no error."""
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as new:
        for part, qp in enumerate((20, 35)):
            options = {"g": "12", "bf": "0", "qp": str(qp), "x264-params": "scenecut=0:cabac=0"}
            source = write_video(tmp_path / f"{qp}.mp4", moving_frames(48), "libx264",
                                 options=options)
            with av.open(str(source)) as old:
                stream = old.streams.video[0]
                packets = [packet for packet in old.demux(stream) if packet.size]
                if part:
                    parameters = stream.codec_context.extradata
                    kind = packet_sidedata_type_from_literal("new_extradata")
                    side_data = PacketSideData(kind, len(parameters))
                    side_data.update(parameters)
                    packets[0].set_sidedata(side_data)
                else:
                    copy = new.add_stream_from_template(stream)
                for k, packet in enumerate(packets, 48 * part):
                    packet.pts = packet.dts = 512 * k
                    packet.stream = copy
                    new.mux(packet)
    assert check_exact(path) == 96


# ---- Damaged files -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "xvid-like.avi", "mjpeg.avi", "h264.mp4", "hevc.mp4", "av1.mp4", "vp9.webm", "mpeg2.ts"])
@pytest.mark.parametrize("filling", [bytes, np.random.default_rng(0).bytes], ids=["zeros", "noise"])
def test_a_damaged_file_gives_frames_and_those_before_the_damage_are_right(name, filling, tmp_path):
    path = write_kind(tmp_path, name)
    intact = full_decode(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 2000] = filling(2000)
    path.write_bytes(content)
    assert np.array_equal(tb.decode_frames(path, range(20)).numpy(), intact[:20])
    clips = tb.decode_frames(path, lambda count: np.concatenate(
        [tb.clip_indices(count, 8, 2, p) for p in np.linspace(0, 1, 5)]), short_side=24)
    assert clips.shape == (40, 24, 32, 3)


@pytest.mark.parametrize("name", ["xvid-like.avi", "h264.mp4"])  # the latter's index is in front
def test_a_truncated_file_gives_what_is_left(name, tmp_path):
    path = write_kind(tmp_path, name)
    intact = full_decode(path)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) * 3 // 5])
    frames = tb.decode_frames(path, range)  # of the count
    assert 40 < len(frames) < 70
    right = frames[:-1].numpy()  # the last one may lack a part
    assert np.array_equal(right, intact[:len(right)])


def test_what_holds_no_video_raises_a_decode_error(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", moving_frames(20), "libx264")
    (tmp_path / "empty.avi").touch()
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (tmp_path / "text.avi").write_text("not a video\n" * 100)
    (tmp_path / "headless.mp4").write_bytes(whole.read_bytes()[1000:])
    (tmp_path / "folder.avi").mkdir()
    known = write_video(tmp_path / "known.avi", moving_frames(3)).read_bytes()
    (tmp_path / "no-decoder.avi").write_bytes(known.replace(b"FMP4", b"ZQZQ"))
    write_video(tmp_path / "animated.webp", moving_frames(3), "libwebp_anim")
    write_video(tmp_path / "sound.mp4", moving_frames(1, 32, 32), "mjpeg", "yuvj420p",
                marks=[av.stream.Disposition.attached_pic], extra=[("aac", None)])
    for name in ("empty.avi", "garbage.mp4", "text.avi", "headless.mp4", "folder.avi",
                 "absent.avi", "sound.mp4", "no-decoder.avi", "animated.webp"):
        with pytest.raises(tb.DECODE_ERRORS) as error:
            tb.decode_frames(tmp_path / name, range)
        assert "frames [] asked for" not in str(error.value)
