"""Figures 1 and 4 of the paper, for your own run folders.

Reads results.json, which evaluate.py writes, and both teachers of each folder. Writes classes.png,
the difference of the two teachers in each class (mean over all folders), and similarity.png, the
clips and similarity matrices of three videos of the first folder.

    python docs/study/draw.py runs/study-*       # writes both pictures into docs/
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import (
    UserError, clip_indices, command, decode_frames, read_checkpoint, read_videos, score_videos,
    write_atomically)  # before torch: see its imports

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps  # Pillow comes with torchvision

from docs.study.intervals import read_rows
from evaluate import TEACHERS, print_table, read_stage_1


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--root", help="folder of the data set (default: as in training)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args(argv)
    values = []  # of each folder and class: mean s, both accuracies
    for folder in args.folders:
        per_class = {name: row["per_class"] for name, row in read_rows(folder).items()}
        if missing := [name for name in TEACHERS if name not in per_class]:
            raise UserError(f"{folder}: the figures compare both teachers, {missing[0]} is not "
                            "among its results")
        p_inv, p_dist = (per_class[name] for name in TEACHERS)
        teachers = [read_checkpoint(name, folder, ["finetune"]) for name in TEACHERS]
        c_inv, c_dist = (dict(zip(saved["similarity_names"], saved["similarity"]))
                         for saved in teachers)
        names = [name for name in c_inv if name in c_dist]
        s = score_videos(names, c_inv, c_dist)
        trained = teachers[0]["args"]
        videos = read_videos(trained["data"], args.root or trained["root"], True,
                             trained["split"], trained["pool"])
        label_of = dict(zip(videos.names, videos.labels))
        labels = torch.tensor([label_of[name] for name in names])
        mean_s = [s[labels == videos.classes.index(c)].mean() for c in p_inv]
        values.append(list(zip(mean_s, p_inv.values(), p_dist.values())))
        if len(values) == 1:
            made = read_stage_1(teachers[0], folder)["args"]
            clips = made["clips"], made["frames"], made["stride"]
            similarity = draw_similarity(videos.folder, clips, names, c_inv, c_dist, s)
    rows = []
    for c, (mean_s, inv, dist) in zip(p_inv, np.mean(values, 0)):
        rows.append((c, mean_s, inv, dist, inv - dist))
    rows.sort(key=lambda row: -row[-1])
    print_table(["class", "s", "invariant", "distinctive", "difference"],
                [[c, f"{s:.2f}", f"{inv:.1f}", f"{dist:.1f}", f"{d:+.1f}"]
                 for c, s, inv, dist, d in rows])
    classes = draw_bars([(row[0], row[-1]) for row in rows])
    for name, image in {"classes.png": classes, "similarity.png": similarity}.items():
        write_atomically(args.out / name, lambda file: image.save(file, "png"))
        print(f"wrote {args.out / name}")


def draw_bars(bars):
    """(name, value) pairs as horizontal bars; of more than 50 the outermost, as in figure 1."""
    bars = bars if len(bars) <= 50 else bars[:25] + bars[-25:]
    top, step, middle = 36, 22, 450  # pixels
    image = Image.new("RGB", (720, step * len(bars) + 40), "white")
    ink = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    ink.text((middle, 8), "top-1 of the invariant minus the distinctive teacher", "black", font,
             anchor="ma")
    longest = max(1, *(abs(value) for _, value in bars))
    for k, (name, value) in enumerate(bars):
        y = top + step * k
        length = 200 * value / longest
        left, right = sorted((middle, middle + length))
        positive = value > 0
        ink.rectangle([left, y, right, y + 17], "steelblue" if positive else "coral")
        ink.text((180, y + 9), name, "black", font, "rm")
        ink.text((right + 6 if positive else left - 6, y + 9), f"{value:+.1f}", "black", font,
                 "lm" if positive else "rm")
    return image


def draw_similarity(folder, clips, names, c_inv, c_dist, s):
    """Figure 4: of the videos with the highest, median and lowest s the middle of each clip, and
    both teachers' matrices.

    clips: of each video n, their frames, and the stride."""
    n, frames, stride = clips
    cell = 36  # pixels, of a matrix
    side = n * cell
    width = 48 * n  # of a frame
    image = Image.new("RGB", (n * (width + 4) + 2 * (side + 16), 3 * (side + 32)), "white")
    ink = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)

    def middles(count):
        return clip_indices(count, n * frames, stride)[frames // 2::frames]

    ranking = s.argsort(descending=True).tolist()
    shown = {"highest": ranking[0], "median": ranking[len(s) // 2], "lowest": ranking[-1]}
    top = 28
    for title, i in shown.items():
        ink.text((0, top - 20), f"{title} s = {s[i]:.2f}: {names[i]}", "black", font)
        left = 0
        for frame in decode_frames(os.path.join(folder, names[i]), middles):
            frame = Image.fromarray(frame.numpy())
            frame = ImageOps.pad(frame, (width, side), Image.Resampling.BOX, "white")
            image.paste(frame, (left, top))
            left += width + 4
        left += 12
        for teacher, c_of in {"invariant": c_inv, "distinctive": c_dist}.items():
            ink.text((left, top - 20), teacher, "black", font)
            for (a, b), c in np.ndenumerate(c_of[names[i]].numpy()):
                x = left + b * cell
                y = top + a * cell
                colour = tuple(int(255 - max(0, c) * depth) for depth in (200, 120, 40))  # blue
                ink.rectangle([x, y, x + cell - 1, y + cell - 1], colour)
                ink.text((x + cell / 2, y + cell / 2), f"{c:.2f}", "black", font, "mm")
            left += side + 16
        top += side + 32
    return image


if __name__ == "__main__":
    main()
