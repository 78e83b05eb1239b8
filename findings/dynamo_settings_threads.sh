#!/bin/sh
# Expected: torch._dynamo.config.recompile_limit, once set, holds for the process.
# Guess before the first run: a thread that is started later reads 64, too, and compiles all 20
#   variants of a function.
# What happens: settings are kept per thread. Another thread reads the default, 8: the ninth variant
#   and all later ones run without being compiled, with a warning. On a GPU the backward pass runs
#   in a thread of its own, and activation checkpointing calls the network there again: what it has
#   to compile anew counts against the 8. Checkpointing can take an uncompiled second pass for an
#   error, since it saves other tensors (not tried: no GPU here).
# Versions: torch 2.14.1 on a CPU. 2026-11-30.
# Who is hit: torch.compile with activation checkpointing on one GPU, more than 8 blocks that share
#   one forward function, and a setting that guards read and the second pass changes, as
#   BatchNorm's momentum.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$work/try.py" <<'EOF'
import threading

import torch

graphs = []


def keep(graph, _):
    graphs.append(graph)
    return graph


def report(where):
    torch._dynamo.reset()
    graphs.clear()
    scale = torch.compile(lambda x, factor: x * factor, backend=keep, dynamic=False)
    for k in range(20):
        scale(torch.ones(2), k + 0.5)
    print(f"{where}: limit {torch._dynamo.config.recompile_limit}, {len(graphs)} of 20 compiled")


torch._dynamo.config.recompile_limit = 64
report("where it was set")
thread = threading.Thread(target=report, args=("another thread",))
thread.start()
thread.join()
EOF
"$work/venv/bin/python" "$work/try.py" > "$work/seen" 2> "$work/errors" || cat "$work/errors"
cat "$work/seen"
diff - "$work/seen" <<'EOF'
where it was set: limit 64, 20 of 20 compiled
another thread: limit 8, 8 of 20 compiled
EOF
echo "as recorded on 2026-11-30"
