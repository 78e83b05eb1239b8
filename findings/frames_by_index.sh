#!/bin/sh
# Expected: a reader that takes a frame by its index gives the frame that a full decode has there.
# Guess before the first run: exact in MP4 and AVI, some frames off in MPEG-TS, which has no index.
# What happens: with B-frames in AVI, in MPEG-TS, and in MP4 with an open GOP or intra refresh,
#   decord and imageio's pyav plugin give other frames for many indices, seldom an error or none.
#   OpenCV is right but in MPEG-TS. AVI without B-frames and MP4 with closed GOPs are right in all.
# Versions: decord 0.6.0, imageio 2.38.1 (PyAV 18.1.0), OpenCV 5.0.0.93. 2026-11-30.
# Who is hit: action recognition. HMDB51 and much of UCF101 are AVI files with B-frames, in parts
#   packed (a B-frame shares its packet with another frame); who samples clips by index trains on
#   frames of other times.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 av==18.1.0 decord==0.6.0 imageio==2.38.1 \
    opencv-python-headless==5.0.0.93
cat > "$work/try.py" <<'EOF'
"""Each frame carries its number, as eight bars. Each reader is asked for 100 indices in a random
order. A frame is wrong if its number is not that of the full decode at this index."""
import os
from fractions import Fraction

import av
import cv2
import decord
import imageio.v3 as iio
import numpy as np

COUNT = 100
os.chdir(os.path.dirname(__file__))


def draw(number):
    picture = np.full((96, 128, 3), 90, np.uint8)
    for bit in range(8):
        picture[16:80, 16 * bit + 2:16 * bit + 14] = 235 if number >> bit & 1 else 20
    return picture


def read(picture):
    return sum(1 << bit for bit in range(8)
               if picture[40:60, 16 * bit + 5:16 * bit + 11].mean() > 128)


def write(path, codec, **options):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(draw(number), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_packed(path):
    """DivX's form: a B-frame lies behind the P-frame that follows it in time, in one packet; the
    next packet is a frame marked as not coded. The header says that it is so."""
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 128, 96, "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"g": "12", "bf": "1", "threads": "1"}
    packets = []
    for number in range(COUNT):
        frame = av.VideoFrame.from_ndarray(draw(number), "rgb24")
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    data = [bytes(packet) for packet in packets]
    start = data[0].index(b"\0\0\1\xb6")  # of the first picture
    header = data[0][:data[0].index(b"\0\0\1\xb2")] + b"\0\0\1\xb2DivX503b1393p"
    data[0] = header + data[0][start:]
    chunks = []
    for k, packet in enumerate(packets):
        if k and packet.pts < packets[k - 1].pts:
            chunks[-1] = (data[k - 1] + data[k], chunks[-1][1])
            chunks.append((b"\0\0\1\xb6\x50\xcf", False))
        else:
            chunks.append((data[k], packet.is_keyframe))
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.extradata = header
        for k, (content, key) in enumerate(chunks):
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), key
            packet.pts = packet.dts = k
            container.mux(packet)


def by_decord(path):
    reader = decord.VideoReader(path)
    return lambda i: reader[i].asnumpy()


def by_imageio(path):
    return lambda i: iio.imread(path, index=i, plugin="pyav")


def by_opencv(path):
    reader = cv2.VideoCapture(path)

    def take(i):
        reader.set(cv2.CAP_PROP_POS_FRAMES, i)
        return reader.read()[1][..., ::-1]
    return take


write("without B-frames.avi", "mpeg4", g="12")
write("B-frames.avi", "mpeg4", g="12", bf="1")
write_packed("packed B-frames.avi")
write("closed GOP.mp4", "libx264", g="30", bf="2")
write("open GOP.mp4", "libx264", **{"g": "30", "bf": "2", "x264-params": "open-gop=1:scenecut=0"})
write("intra refresh.mp4", "libx264", **{"g": "30", "x264-params": "intra-refresh=1"})
write("MPEG-TS.ts", "libx264", g="30", bf="2")
print("wrong frames of 100:    decord imageio opencv")
for path in sorted(os.listdir()):
    if not path.endswith((".avi", ".mp4", ".ts")):
        continue
    with av.open(path) as container:
        full = [read(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert full == list(range(COUNT)), path  # the file is valid
    wrong = []
    for open_reader in (by_decord, by_imageio, by_opencv):
        take = open_reader(path)
        wrong.append(0)
        for i in np.random.default_rng(0).permutation(COUNT).tolist():
            try:
                wrong[-1] += read(take(i)) != full[i]
            except (StopIteration, TypeError):  # no frame at all
                wrong[-1] += 1
    print(f"{path:22} {wrong[0]:7} {wrong[1]:7} {wrong[2]:6}")
EOF
"$work/venv/bin/python" "$work/try.py" > "$work/seen" 2> "$work/errors" || cat "$work/errors"
cat "$work/seen"
diff - "$work/seen" <<'EOF'
wrong frames of 100:    decord imageio opencv
B-frames.avi                88      90      0
MPEG-TS.ts                 100      94     31
closed GOP.mp4               0       0      0
intra refresh.mp4           34      31      0
open GOP.mp4                12       4      0
packed B-frames.avi         89      17      0
without B-frames.avi         0       0      0
EOF
echo "as recorded on 2026-11-30"
