#!/bin/sh
# Expected: frame.side_data of a Motion-JPEG picture with EXIF is empty, or has an entry for it.
# Guess before the first run: empty.
# What happens: reading the attribute raises ValueError, since FFmpeg hands PyAV a kind of side data
#   (31, EXIF) for which PyAV has no name. So a program that looks for a rotation takes an intact
#   file for a broken one. frame.rotation works, and has EXIF's orientation.
# Versions: PyAV 18.1.0. 2026-11-30.
# Who is hit: readers of camera files (Motion-JPEG with EXIF) that turn videos upright.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 av==18.1.0
cat > "$work/try.py" <<'EOF'
import sys

import av
import numpy as np

path = sys.argv[1]
with av.open(path, "w") as container:
    stream = container.add_stream("mjpeg", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
    container.mux(stream.encode())
with open(path, "rb") as file:
    picture = file.read()
# One entry: the orientation (0x112), a short, one value: 6, to be turned by 90 degrees.
tiff = b"II*\0" + (8).to_bytes(4, "little") + bytes.fromhex("0100 1201 0300 01000000 0600 0000")
exif = b"Exif\0\0" + tiff + bytes(4)
segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
for name, content in {"without": picture, "with": picture[:2] + segment + picture[2:]}.items():
    with open(path, "wb") as file:
        file.write(content)
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        try:
            seen = list(frame.side_data)
        except ValueError as error:
            seen = f"ValueError: {error}"
        print(f"{name} EXIF: picture {frame.width} x {frame.height}, rotation {frame.rotation}, "
              f"side data {seen}")
EOF
"$work/venv/bin/python" "$work/try.py" "$work/a.mjpeg" > "$work/seen"
cat "$work/seen"
diff - "$work/seen" <<'EOF'
without EXIF: picture 64 x 48, rotation 0, side data []
with EXIF: picture 64 x 48, rotation -90, side data ValueError: 31 is not a valid Type
EOF
echo "as recorded on 2026-11-30"
