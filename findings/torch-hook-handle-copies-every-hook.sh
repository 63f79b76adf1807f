#!/usr/bin/env bash
# Expected: copy.deepcopy of an object that keeps the handle of a hook it registered on all optimizers
# (register_optimizer_step_post_hook), so that it can remove it later, copies that object.
# Really: the handle's state is the dictionary of all such hooks in the process, so the copy brings
# along whatever every other hook is bound to: here 64 MB that the copied object has no part in.
# Seen with torch 2.13.0 on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" numpy 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import copy

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

copies = []


class Stranger:
    def __init__(self):
        self.table = torch.zeros(16 << 20)

    def note(self, *_):
        pass

    def __deepcopy__(self, memo):
        copies.append(self.table.nbytes)
        return type(self)()


class Owner:
    def __init__(self):
        self.handle = register_optimizer_step_post_hook(lambda *_: None)


stranger = Stranger()
register_optimizer_step_post_hook(stranger.note)
copy.deepcopy(Owner())
print("torch", torch.__version__, "strangers copied with the owner:", len(copies), "bytes:", sum(copies))
assert copies == [64 << 20], "a handle's copy no longer copies the other hooks"
PYTHON
