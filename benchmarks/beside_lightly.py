"""fastssl beside lightly, minute by minute: the same photos, the same network, the same cores; what are the features
worth after 5, 10 and 20 minutes?

    pip install -e '.[peers]'
    fastssl convert-imagenet train/ train.beton && fastssl convert-imagenet val/ val.beton
    python -m fastssl.benchmarks.beside_lightly train.beton val.beton --epochs 40 --out beside-lightly

lightly's SimCLR and MoCo are trained as the examples in its documentation train them (batch 256, SGD at 0.06, a queue
of 4,096 keys, momentum 0.99), with its own transforms and losses and a DataLoader with one worker a core. fastssl runs
``fastssl pretrain``. All are started at once and have the machine in turns, a slice each while the others are stopped,
so that all meet the same machine; a contender's minutes are those in which it ran, its start included. One judge for
all: fastssl's kNN and linear probe of centre crops, behind the clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from fastssl.benchmarks.suites.peers import PillowPhotos
from fastssl.config.recipe import load_recipe
from fastssl.evaluate.online_probe import choose_split, probe_features
from fastssl.models.backbones import create_backbone, feature_dim
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.report.document import Table, table_markdown
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.cores import available_cores
from fastssl.utils.versions import describe_git, describe_host, describe_versions

METHODS = ("simclr", "moco")
#: Of lightly's examples.
BATCH, RATE, QUEUE, MOMENTUM = 256, 0.06, 4096, 0.99
#: Seconds of its own that a contender may lose between two snapshots.
_SNAPSHOT_S = 10.0
_MODULE = "fastssl.benchmarks.beside_lightly"


def train_lightly(method: str, data: str, arch: str, size: int, seed: int, out: str) -> None:
    """Train until stopped from outside; ``out`` (a file of weights) is written again every few seconds."""
    from lightly import loss, transforms
    from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import update_momentum

    torch.manual_seed(seed)
    backbone, moco = create_backbone(arch), method == "moco"
    head = (MoCoProjectionHead if moco else SimCLRProjectionHead)(feature_dim(backbone), 512, 128)
    transform = (transforms.MoCoV2Transform if moco else transforms.SimCLRTransform)(input_size=size)
    model = nn.Sequential(backbone, head).train()
    keys = copy.deepcopy(model).requires_grad_(False) if moco else model
    loss_of = loss.NTXentLoss(memory_bank_size=(QUEUE, 128)) if moco else loss.NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "persistent_workers": True}
    loader = DataLoader(PillowPhotos(Path(data), transform), BATCH, num_workers=available_cores(), **options)
    saved = time.monotonic()
    while True:
        for first, second in loader:
            if moco:
                update_momentum(model, keys, m=MOMENTUM)
            with torch.set_grad_enabled(not moco):
                other = keys(second)
            loss_of(model(first), other).backward()
            optimizer.step()
            optimizer.zero_grad()
            if time.monotonic() - saved > _SNAPSHOT_S:
                state = {name: value.contiguous() for name, value in backbone.state_dict().items()}
                write_atomically(Path(out), partial(save_file, state))
                saved = time.monotonic()


@dataclass
class Contender:
    """A process group that runs only while it has its turn.

    Attributes:
        name: in the table. command: what is run. snapshot: the file that it writes again and again.
        seconds: that it has run. marks: {minutes: copy of the snapshot}.
    """

    name: str
    command: list[str]
    snapshot: Path
    log: Path
    seconds: float = 0.0
    marks: dict[float, Path] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def turn(self, seconds: float) -> None:
        """Run for ``seconds``, or until the command ends."""
        if self.ended:
            return
        started = time.monotonic()
        if self.process is None:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGSTOP)
        self.seconds += time.monotonic() - started
        if self.ended and self.process.returncode:
            raise SystemExit(f"{self.name} failed; {self.log} says why")

    @property
    def ended(self) -> bool:
        """Whether the command has come to its own end."""
        return self.process is not None and self.process.poll() is not None

    def mark(self, minutes: float) -> None:
        """Keep what there is now as the state after ``minutes``."""
        if self.snapshot.exists():
            kept = self.snapshot.with_name(f"{self.snapshot.stem}-{minutes:g}{self.snapshot.suffix}")
            kept.write_bytes(self.snapshot.read_bytes())
            self.marks[minutes] = kept

    def stop(self) -> None:
        """End it, whatever it does."""
        if self.process is not None and not self.ended:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def race(contenders: list[Contender], marks: list[float], slice_s: float) -> None:
    """Give every contender ``max(marks)`` minutes, in slices; at each mark its state is kept."""
    try:
        for minutes in sorted(marks):
            while any(one.seconds < 60 * minutes and not one.ended for one in contenders):
                for one in contenders:
                    left = 60 * minutes - one.seconds
                    if left > 0:
                        one.turn(min(slice_s, left))
            for one in contenders:
                one.mark(minutes)
    finally:
        for one in contenders:
            one.stop()


def judge(weights: Path, arch: str, data: Path, val: Path, size: int, crop: float) -> dict[str, Any]:
    """kNN and linear probe of a snapshot, percent."""
    backbone = create_backbone(arch)
    backbone.load_state_dict(load_file(weights))
    with BetonReader(data) as train, BetonReader(val) as queries:
        split = choose_split(train, queries, 0, 0)
        features = split.features(backbone.eval(), size, device=torch.device("cpu"), crop=crop)
        row = probe_features("", *features, split.labelled)
    return {"knn": row["knn"], "linear": row["linear"]}


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a table, a row for each contender, kNN / linear for each mark."""
    marks = [f"{minutes:g}" for minutes in record["minutes"]]
    rows = []
    for row in record["rows"]:
        found = [row["marks"].get(mark) for mark in marks]
        rows.append((row["name"], *(f"{one['knn']:.1f} / {one['linear']:.1f}" if one else "-" for one in found)))
    return table_markdown(Table(("", *(f"{mark} min" for mark in marks)), rows, (False,) * (1 + len(marks))))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--arch", default="mobilenetv3_large")
    parser.add_argument("--recipe", default="few-photos")
    words = "of fastssl: they should fill the last mark's minutes"
    parser.add_argument("--epochs", type=int, required=True, help=words)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20])
    parser.add_argument("--slice", type=float, default=60, dest="slice_s", help="seconds of a turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for record.json and table.md")
    options = parser.parse_args(arguments)
    arch, data, probe = options.arch, options.data, load_recipe(options.recipe).probe
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        contenders = _contenders(options, probe.size, Path(scratch))
        race(contenders, options.minutes, options.slice_s)
        rows = []
        for one in contenders:
            judged = {
                f"{minutes:g}": judge(path, arch, data, options.val, probe.size, probe.crop)
                for minutes, path in one.marks.items()
            }
            rows.append({"name": one.name, "seconds": round(one.seconds, 1), "marks": judged})
    record = {
        "command": shlex.join(["python", "-m", _MODULE, *arguments]),
        "minutes": sorted(options.minutes),
        "size": probe.size,
        "rows": rows,
        "host": describe_host(),
        "versions": {**describe_versions(), "lightly": metadata.version("lightly")},
        "git": describe_git(),
    }
    (options.out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.out / "table.md").write_text(to_markdown(record))
    print(to_markdown(record))


def _contenders(options: argparse.Namespace, size: int, folder: Path) -> list[Contender]:
    """fastssl's own command, and `train_lightly` for each of lightly's methods."""
    arch, data, seed = options.arch, str(options.data), options.seed
    words = f"pretrain --arch {arch} --recipe {options.recipe} --epochs {options.epochs} --seed {seed} --device cpu"
    words += f" --set probe.every_epochs=0 --set train.checkpoint_minutes={_SNAPSHOT_S / 60:.2f}"
    ours = [sys.executable, "-m", "fastssl", *words.split(), "--data", data, "--out", str(folder / "fastssl")]
    weights = folder / "fastssl" / "checkpoints" / "last.safetensors"
    found = [Contender(f"fastssl, {options.recipe}", ours, weights, folder / "fastssl.log")]
    for method in METHODS:
        weights = folder / f"{method}.safetensors"
        call = f"train_lightly{(method, data, arch, size, seed, str(weights))}"
        theirs = [sys.executable, "-c", f"from {_MODULE} import train_lightly; {call}"]
        found.append(Contender(f"lightly, {method}", theirs, weights, folder / f"{method}.log"))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
