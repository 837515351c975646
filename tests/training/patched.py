"""The changes to training scripts that docs/how-to/loops.md shows, applied to loops with the same lines.

The scripts below are as small as they can be around the lines that a change names; what stands for the
model, its data and its schedule is the reference's.
"""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.training import loops
from tests.training import reference as ref

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "loops.md"

NANOGPT = """
import torch
from tests.training import reference as ref
from tests.training.loops import adamw

init_from = 'resume'
model = ref.model()
if init_from == 'resume':
    ckpt_path = out_dir + '/ckpt.pt'
    checkpoint = torch.load(ckpt_path)
    model.load_state_dict(checkpoint['model'])
    iter_num = checkpoint['iter_num']
optimizer = adamw(model.parameters())
if init_from == 'resume':
    optimizer.load_state_dict(checkpoint['optimizer'])
checkpoint = None # free up memory

while True:
    for param_group in optimizer.param_groups:
        param_group['lr'] = ref.BASE(iter_num)
    if iter_num == max_iters:
        checkpoint = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iter_num': iter_num}
        torch.save(checkpoint, out_dir + '/ckpt.pt')
        break
    model(ref.data(iter_num)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
"""

LITGPT = """
from pathlib import Path
from lightning.fabric import Fabric
from tests.training import reference as ref
from tests.training.loops import adamw


def main(fabric, resume, out_dir, max_steps):
    model = fabric.setup(ref.model())
    optimizer = adamw(model.parameters())
    optimizer = fabric.setup_optimizers(optimizer)
    state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}

    if resume:
        fabric.print(f"Resuming training from {resume}")
        fabric.load(resume, state)

    while state["step_count"] < max_steps:
        for param_group in optimizer.param_groups:
            param_group["lr"] = ref.BASE(state["step_count"])
        fabric.backward(model(ref.data(state["step_count"])))
        optimizer.step()
        optimizer.zero_grad()
        state["step_count"] += 1
    fabric.save(out_dir / "lit_model.pth", state)
    return model


model = main(Fabric(accelerator="cpu", precision="64-true"), Path("at/lit_model.pth"), Path("at"), max_iters)
"""

NANOCHAT = """
import torch
from types import SimpleNamespace
from tests.training import reference as ref
from tests.training.loops import adamw

args = SimpleNamespace(resume_from_step=first, num_iterations=max_iters)
checkpoint_dir = out_dir
resuming = args.resume_from_step != -1
model = ref.model()
if resuming:
    model_data = torch.load(f"{checkpoint_dir}/model_{args.resume_from_step:06d}.pt")
    optimizer_data = torch.load(f"{checkpoint_dir}/optim_{args.resume_from_step:06d}.pt")
    model.load_state_dict(model_data)
orig_model = model
model = torch.compile(model, backend="eager")
optimizer = adamw(orig_model.parameters())

if resuming:
    optimizer.load_state_dict(optimizer_data)
    del optimizer_data

step = args.resume_from_step
while True:
    if step == args.num_iterations:
        torch.save(orig_model.state_dict(), f"{checkpoint_dir}/model_{step:06d}.pt")
        torch.save(optimizer.state_dict(), f"{checkpoint_dir}/optim_{step:06d}.pt")
        break
    orig_model(ref.data(step)).backward()
    for group in optimizer.param_groups:
        group["lr"] = ref.BASE(step)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    step += 1
"""


def patches() -> dict[str, str]:
    """Name -> diff, as the page shows them."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r'```diff title="(\w+)\.patch"\n(.*?)```', text, flags=re.S))


def apply(patch: str, root: Path) -> None:
    """Change the file that the patch names."""
    (root / "change.patch").write_text(patch)
    done = subprocess.run(
        ["git", "apply", "--unsafe-paths", "-p1", "change.patch"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def runner(name: str, script: str, file: str, prepare: Callable[[Path], Path]) -> loops.Run:
    """Runs a script, changed as the page says, once for every leg."""

    def run(folder: Path, counts: tuple[int, ...]) -> dict[str, Tensor]:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        checkpoint = prepare(folder)
        loops.write_history(checkpoint)
        apply(patches()[name].replace('"wide/lit_model.pth"', repr(str(checkpoint))), folder)
        for _, first, last in loops.legs(counts):
            found = runpy.run_path(
                str(path), init_globals={"out_dir": str(folder), "first": first, "max_iters": last}
            )
        wrapped = found["model"]
        return ref.parameters(getattr(wrapped, "_orig_mod", getattr(wrapped, "module", wrapped)))

    return run


def prepare_nanogpt(folder: Path) -> Path:
    """``ckpt.pt``."""
    net, optimizer, _ = loops.start()
    kept = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": ref.TE}
    torch.save(kept, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def prepare_litgpt(folder: Path) -> Path:
    """``lit_model.pth``, as Fabric writes it."""
    net, optimizer, _ = loops.start()
    kept = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    path = folder / "at" / "lit_model.pth"
    path.parent.mkdir()
    torch.save({**kept, "iter_num": ref.TE, "step_count": ref.TE}, path)
    return path


def prepare_nanochat(folder: Path) -> Path:
    """One step of a run."""
    net, optimizer, _ = loops.start()
    torch.save(net.state_dict(), folder / f"model_{ref.TE:06d}.pt")
    torch.save(optimizer.state_dict(), folder / f"optim_{ref.TE:06d}.pt")
    return folder


nanogpt = runner("nanogpt", NANOGPT, "train.py", prepare_nanogpt)
litgpt = runner("litgpt", LITGPT.replace('"at', 'out_dir + "/at'), "litgpt/pretrain.py", prepare_litgpt)
nanochat = runner("nanochat", NANOCHAT, "scripts/base_train.py", prepare_nanochat)
