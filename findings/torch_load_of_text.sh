#!/bin/sh
# Expected: torch.load(file, weights_only=True) raises one kind of error for a file of text, such as
#   the page that a server sends in place of the weights.
# Guess before the first run: pickle.UnpicklingError for all.
# What happens: the kind depends on the first letter, which is taken for a pickle instruction. Of
#   the 100 printable ones 82 give UnpicklingError, 13 IndexError, 3 KeyError, 2 EOFError.
# Versions: torch 2.14.1. 2026-11-30.
# Who is hit: programs that catch UnpicklingError or RuntimeError to tell a broken download: an
#   "error: ..." or "Moved ..." ends them with a bare "pop from empty list".
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$work/try.py" <<'EOF'
import string
import sys
from collections import Counter

import torch

kinds = Counter()
examples = {}
for letter in string.printable:
    with open(sys.argv[1], "w") as file:
        file.write(letter + " these are no weights\n")
    try:
        torch.load(sys.argv[1], weights_only=True)
    except Exception as error:
        kinds[type(error).__name__] += 1
        examples.setdefault(type(error).__name__, f"{letter!r}: {str(error)[:30]!r}")
for kind, count in kinds.most_common():
    print(count, kind, *([examples[kind]] if kind != "UnpicklingError" else []))
EOF
"$work/venv/bin/python" "$work/try.py" "$work/a.pt" > "$work/seen" 2> "$work/errors" \
    || cat "$work/errors"
cat "$work/seen"
diff - "$work/seen" <<'EOF'
82 UnpicklingError
13 IndexError 'a': 'pop from empty list'
3 KeyError 'h': '32'
2 EOFError 'U': ''
EOF
echo "as recorded on 2026-11-30"
