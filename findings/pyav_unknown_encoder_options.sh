#!/bin/sh
# Expected: add_stream(codec, options=...) raises an error for an option that the encoder lacks.
# Guess before the first run: an error, and smaller files for a larger "qscale".
# What happens: unknown options are dropped without a word. "qscale" and "q:v", which set the
#   quality in the ffmpeg program, are among them: 3, 31 and none give equal bytes, at the default
#   200 kb/s of MPEG-4. What works is qmin with qmax, or flags=+qscale with global_quality (118 x
#   the quality).
# Versions: PyAV 18.1.0. 2026-11-30.
# Who is hit: who writes data sets with PyAV and believes in the quality that was asked for.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 av==18.1.0
cat > "$work/try.py" <<'EOF'
import io

import av
import numpy as np

noise = np.random.default_rng(0).integers(0, 256, (96, 228, 3), np.uint8)
for options in ({}, {"no_such_option": "1"}, {"qscale": "3"}, {"qscale": "31"}, {"q:v": "3"},
                {"flags": "+qscale", "global_quality": "354"}, {"qmin": "3", "qmax": "3"}):
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for t in range(25):
            picture = np.ascontiguousarray(noise[:, t:t + 128])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    print(f"{options}: {len(file.getvalue()) // 1000} kB")
EOF
"$work/venv/bin/python" "$work/try.py" > "$work/seen"
cat "$work/seen"
diff - "$work/seen" <<'EOF'
{}: 26 kB
{'no_such_option': '1'}: 26 kB
{'qscale': '3'}: 26 kB
{'qscale': '31'}: 26 kB
{'q:v': '3'}: 26 kB
{'flags': '+qscale', 'global_quality': '354'}: 130 kB
{'qmin': '3', 'qmax': '3'}: 98 kB
EOF
echo "as recorded on 2026-11-30"
