"""The tables of docs/scale.md: arithmetic on assumptions that stand here with their sources, and figures from the committed records. Nobody types one in.

python -m fastssl.benchmarks.scale_page docs/scale.md benchmarks/results/scale/*.jsonl benchmarks/results/cpu-2core-epyc/train.jsonl

Replaces what stands between ``<!-- scale: NAME -->`` and ``<!-- /scale -->``. A test holds the page to what this makes of the code and the records.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fastssl.benchmarks.records import Record, read_records
from fastssl.benchmarks.scale import Cluster, daly_s, gather_s, reduce_s, simulate, worlds, young_s
from fastssl.benchmarks.scale_order import Windows, neighbours
from fastssl.benchmarks.scale_traffic import Traffic, traffic
from fastssl.pipelines.errors import FastSSLError
from fastssl.recipe import load_recipe

#: The run of the page.
IMAGES, HOSTS, GPUS = 10**9, 64, 8
#: Assumption: bytes of a photo of short side 256 at quality 90, between what was measured and FFCV's published 40 GB for ImageNet at a longest side of 384.
PHOTO = 32e3
#: Assumptions: a process's link (a port of 400 Gb/s at half of its rate), latency of a message, a step's launches without a CUDA graph (about 970 kernels of 8 us).
LINK, HOP, FIXED = 25e9, 10e-6, 8e-3
#: Assumption: bytes a second between the GPUs of one host (NVLink at less than half of its 450 GB/s).
INSIDE = 200e9
#: Assumption: bytes of a GPU's memory.
MEMORY = 80e9
#: Assumption: samples a second of one GPU, in large batches; no GPU was measured.
RATES = (1000, 4000, 10000)
#: Seconds between unexpected interruptions for a host of 8 GPUs: 419 of them in 54 days of 16,384 GPUs (Llama 3, arXiv 2407.21783), and worse.
MTBF = 54 * 86400 * (16384 / 8) / 419
#: Photos a second of short side 375 that one thread decodes, by benchmarks/results/cpu-2core-epyc/ceilings.jsonl; and those that a core converts.
DECODE, CONVERT = 1187, 198
RECIPES = (
    "light-moco-mobilenetv3",
    "light-moco-efficientnet_b0",
    "moco-v2-resnet50",
    "dino-mobilenetv2-sslight",
    "dino-vit_tiny-sslight",
    "swav-mobilenetv2-sslight",
    "simclr-mobilenetv3",
)
BATCH = 4096

_PLACE = re.compile(r"(<!-- scale: ([\w-]+) -->\n).*?(<!-- /scale -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def seconds(value: float) -> str:
    """A time as one says it: 35 µs, 12 ms, 3.4 s, 7 min, 5.2 h, 3 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= (2 if size >= 60 else 1) * size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns" if value else "0"


def size(value: float) -> str:
    """Bytes, in powers of 1000."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def machine(record: Record) -> str:
    """The machine and the versions behind a record."""
    names = ", ".join(f"{name} {record.versions[name]}" for name in ("python", "torch", "fastssl") if name in record.versions)
    return f"{record.host.get('cpu')}, {record.host.get('cores')} cores ({names}, commit {record.git}), `{record.details['command']}`"


# ---------------------------------------------------------------------- from the records


def _of(records: Sequence[Record], part: str) -> list[Record]:
    found = [record for record in records if (record.details or {}).get("part") == part]
    if not found:
        raise FastSSLError(f"scale: no record of {part}; `fastssl bench scale --parts` and `--check` make them")
    return found


def order_table(records: Sequence[Record]) -> str:
    """Orders at the sizes that were measured, and the sorted one at IMAGES by n log n."""
    rows, found = [], _of(records, "order")
    whole = {record.details["samples"]: record for record in found if record.details["order"] == "sorted"}
    for count, record in sorted(whole.items()):
        once = count / record.pair_per_s
        others = [
            f"{1e9 / one.pair_per_s:,.0f} ns"
            for name in ("Feistel", "windows")
            for asked in (512, 65536)
            for one in found
            if (one.details["samples"], one.details["order"], one.details["asked"]) == (count, name, asked)
        ]
        rows.append((f"{count:,}", seconds(once), size(record.details["bytes_per_sample"] * count), size(8 * count), *others))
    count, record = max(whole.items())
    once = count / record.pair_per_s * IMAGES * math.log(IMAGES) / (count * math.log(count))
    rows.append(
        (f"{IMAGES:,} (extrapolated)", seconds(once), size(record.details["bytes_per_sample"] * IMAGES), size(8 * IMAGES), *[""] * 4)
    )
    head = ("samples", "sorted: time", "touched", "kept", "Feistel, 512 at a time", "65,536", "windows, 512", "65,536")
    return table(head, rows) + f"\n{machine(record)}; nanoseconds an index.\n"


def opening_table(records: Sequence[Record]) -> str:
    """Opening a file, measured, and a billion photos of it in one file by proportion."""
    rows, found = [], sorted(_of(records, "opening"), key=lambda record: record.details["samples"])
    for record, count in [(record, record.details["samples"]) for record in found] + [(found[-1], IMAGES)]:
        details, share = record.details, count / record.details["samples"]
        told = f"{count:,}{' (in proportion)' if share != 1 else ''}"
        opened = count / record.pair_per_s
        sizes = (details[f"{name}_bytes_per_sample"] * count for name in ("table", "kept", "peak"))
        rows.append((told, seconds(opened), seconds(details["checksum_s"] * share), *map(size, sizes)))
    return table(("photos", "open", "checksum of the tables", "tables", "kept", "at the peak"), rows) + f"\n{machine(found[-1])}.\n"


def start_table(records: Sequence[Record]) -> str:
    """What was measured of starting, reading and saving."""
    (start,), (read,) = _of(records, "starting"), _of(records, "reads")
    processes, get = HOSTS * GPUS, start.details["store_get_s"]
    rows = [
        ("importing fastssl.train", seconds(start.median_s), f"{1 / start.fraction_of_ceiling:.1f} times torch alone"),
        (
            "a question to the store at which processes meet",
            seconds(get),
            f"gloo's full mesh asks {processes * (processes - 1):,}: {seconds(processes * (processes - 1) * get)}",
        ),
        (
            f"a random read of {size(read.details['bytes'])}, one thread",
            seconds(read.details["read_s"]),
            f"{read.pair_per_s:,.0f} a second, {read.fraction_of_ceiling:.0%} of the bytes that come in order",
        ),
    ]
    for record in _of(records, "checkpoint"):
        total = sum(record.details["bytes"].values())
        rows.append(
            (
                f"writing the checkpoint of {record.recipe}",
                seconds(record.median_s),
                f"{size(total)} in {len(record.details['bytes'])} files",
            )
        )
    return table(("what", "time", ""), rows) + f"\n{machine(start)}.\n"


def check_table(records: Sequence[Record]) -> str:
    """Predicted and measured images a second."""
    rows = []
    for record in _of(records, "check"):
        details, parts = record.details, record.details["parts"]
        rows.append(
            (
                f"{record.arch}, {details['size']} px, decoding on {record.workers}, step on {details['threads']}",
                *(f"{1e3 * parts[f'{name}_cpu_s']:.2f}" for name in ("engine", "colour", "step")),
                f"{details['others']:.2f}",
                f"{details['predicted']['images_per_s']:,.0f}",
                f"{record.pair_per_s:,.0f}",
                f"{details['predicted_over_measured']:.2f}",
                details["predicted"]["limit"],
            )
        )
    off = sorted(abs(record.details["predicted_over_measured"] - 1) for record in _of(records, "check"))
    within = sum(value <= 0.15 for value in off)
    head = ("loop (threads)", "decode + crop, ms", "colour", "step", "cores of others", "predicted/s", "measured/s", "ratio", "limit")
    told = f"Off by {off[len(off) // 2]:.0%} in the median and {off[-1]:.0%} at most; {within} of {len(off)} within 15 %."
    return table(head, rows) + f"\n{told} {machine(_of(records, 'check')[0])}.\n"


def earlier_table(records: Sequence[Record]) -> str:
    """The model on the records of ``fastssl bench train``, whose parts were measured alone and whose loop was measured in turns with them; nobody else ran then."""
    rows, found = [], [record for record in records if record.bench == "train"]
    if not found:
        raise FastSSLError("scale: no record of `fastssl bench train`; name the file that holds them, too")
    for record in found:
        model = record.details["model"]
        outcome = simulate(
            Cluster(
                hosts=1,
                gpus=1,
                cores=model["cores"],
                workers=model["threads"],
                batch=record.batch_size,
                cached=0.0,
                storage_rate=math.inf,
                decode_s=model["loader_s"] * min(model["threads"], model["cores"]),
                gpu_rate=1 / model["step_s"],
                gpu_fixed_s=0.0,
                step_threads=record.details["threads"],
                jitter=0.0,
                checkpoint_s=0.0,
                host_mtbf_s=1e12,
            )
        )
        loop = f"{record.recipe}, {record.arch}, decoding on {record.workers}"
        alone = (f"{1e3 * model[name]:.2f}" for name in ("loader_s", "step_s"))
        rates = (f"{value:,.1f}" for value in (outcome.images_per_s, record.pair_per_s))
        rows.append((loop, *alone, *rates, f"{outcome.images_per_s / record.pair_per_s:.2f}"))
    head = ("loop (step on 2 threads)", "loader alone, ms", "step alone, ms", "predicted/s", "measured/s", "ratio")
    return table(head, rows)


# ---------------------------------------------------------------------- arithmetic


@lru_cache(maxsize=64)
def sent(name: str, world: int = HOSTS * GPUS, batch: int = BATCH) -> Traffic:
    """Traffic of a recipe, counted once."""
    return traffic(load_recipe(name), batch, world)


def storage_table(_: Sequence[Record]) -> str:
    """The set as files of so many photos."""
    rows = []
    for photos in (IMAGES, 10**7, 10**6, 10**5):
        count = -(-IMAGES // photos)
        rows.append(
            (
                f"{photos:,}",
                f"{count:,}",
                size(photos * PHOTO),
                f"{count / HOSTS:.3g}",
                seconds(photos * PHOTO / 1e9),
                seconds(photos / CONVERT / 96),
                size(photos * 57),
            )
        )
    return table(
        (
            "photos a file",
            "files",
            "bytes each",
            "files a host",
            "copied at 1 GB/s",
            "converted again on 96 cores",
            "memory of a process that has it open",
        ),
        rows,
    )


def order_choice_table(_: Sequence[Record]) -> str:
    """Window sizes: memory, read length, and how many of a batch come from one place."""
    rows = []
    for chunk, chunks in ((1, 65536), (64, 1024), (256, 256), (256, 1024), (1024, 1024)):
        windows = Windows(chunk, chunks)
        rows.append(
            (
                f"{chunk:,} x {chunks:,}",
                size(windows.samples * PHOTO),
                size(chunk * PHOTO),
                f"{8 * 4000 / chunk:,.0f}",
                *(f"{neighbours(batch, windows):.2f}" for batch in (64, 512, 4096)),
            )
        )
    return table(
        (
            "chunk x chunks",
            "a window in memory",
            "a read",
            "reads/s of a host at 8 x 4,000 samples/s",
            "neighbours in a batch of 64",
            "512",
            "4,096",
        ),
        rows,
    )


def rate_table(_: Sequence[Record]) -> str:
    """What a host must read and decode at each assumed rate."""
    rows = []
    for rate in (500, *RATES):
        host = GPUS * rate
        day = IMAGES / (HOSTS * host)
        rows.append(
            (
                f"{rate:,}",
                f"{host:,}",
                f"{rate / DECODE:.1f}",
                f"{host / DECODE:.0f}",
                size(host * PHOTO) + "/s",
                size(HOSTS * host * PHOTO) + "/s",
                seconds(day),
            )
        )
    return table(("samples/s a GPU (assumed)", "a host", "decoding cores a GPU", "a host", "read by a host", "by all", "an epoch"), rows)


def traffic_table(_: Sequence[Record]) -> str:
    """Bytes and latency of a step of BATCH on all GPUs."""
    rows, world = [], HOSTS * GPUS
    for name in RECIPES:
        one = sent(name)
        latency = one.collectives * reduce_s(0, world, HOP, LINK)
        rows.append(
            (
                name,
                f"{one.parameters / 1e6:.1f} M",
                f"{size(one.gradient_bytes)}, {seconds(reduce_s(one.gradient_bytes, world, 0, LINK))}",
                one.batchnorm_passes,
                size(one.batchnorm_bytes),
                f"{one.collectives}, {seconds(latency)}",
                f"{size(one.image_bytes)}, {seconds(gather_s(one.image_bytes, world, 0, LINK))}" if one.image_bytes else "none",
                size(one.embedding_bytes),
                size(one.checkpoint_bytes),
            )
        )
    head = (
        "recipe",
        "trained",
        "gradients",
        "BatchNorm passes over all",
        "gathered for them",
        "collectives, their latency",
        "images gathered",
        "keys, scores, sums",
        "checkpoint",
    )
    return table(head, rows)


def cluster(name: str, world: int, batch: int, rate: float, built: bool) -> Cluster:
    """A recipe on ``world`` GPUs: as the code is, or with what the page says must be built (BatchNorm over a host's 8, key images exchanged and not gathered, a
    CUDA graph that leaves 2 ms of a step fixed)."""
    one, gpus = sent(name, world, batch), min(GPUS, world)
    calls, gathered = one.collectives - (world > 1), one.gathered_bytes
    if built:
        # Latency is a number of messages: fewer for a host's processes than for all.
        near = math.ceil(math.log2(gpus)) / max(1, math.ceil(math.log2(world)))
        calls = round(calls - one.batchnorm_collectives * (1 - near))
        gathered = one.embedding_bytes + one.image_bytes / world + one.batchnorm_bytes * gpus / world
    return Cluster(
        hosts=max(1, world // GPUS),
        gpus=gpus,
        images=IMAGES,
        batch=batch // world,
        image_bytes=PHOTO,
        gpu_rate=rate,
        gpu_fixed_s=2e-3 if built else FIXED,
        reduced_bytes=one.gradient_bytes,
        gathered_bytes=gathered,
        collectives=calls,
        hop_s=HOP,
        link_rate=LINK if world > gpus else INSIDE,
        host_mtbf_s=MTBF,
    )


def useful_table(_: Sequence[Record]) -> str:
    """Speed-up over 8 GPUs of the same batch, as it is and with what must be built."""
    rows, rate = [], RATES[1]
    counts = (8, 16, 32, 64, 128, 256, 512)
    for name in ("light-moco-mobilenetv3", "moco-v2-resnet50", "dino-mobilenetv2-sslight", "dino-vit_tiny-sslight"):
        for built in (False, True):
            found = {world: simulate(replace(cluster(name, world, BATCH, rate, built), decode_s=0.0)) for world in counts}
            first = found[8].images_per_s
            best = max((world for world in counts if found[world].images_per_s * 8 / (first * world) >= 0.7), default=8)
            cells = [f"{found[world].images_per_s / first:.1f}" for world in counts[1:]]
            rows.append((f"{name}, {'built' if built else 'as it is'}", f"{first:,.0f}", *cells, best))
    return table(("batch 4,096", "8 GPUs: samples/s", *map(str, counts[1:]), "GPUs at 70 %"), rows)


def run_table(_: Sequence[Record]) -> str:
    """The run of the page at each assumed rate: an epoch of IMAGES on all GPUs."""
    rows, world = [], HOSTS * GPUS
    for batch in (BATCH, 8 * BATCH, 64 * BATCH):
        for rate in RATES:
            for built in (False, True):
                images = sent("light-moco-mobilenetv3", world, batch).image_bytes
                if not built and images > MEMORY:
                    rows.append(
                        (f"{batch:,} ({batch // world} a GPU), {rate:,}/s, as it is", "", "", f"does not fit: {size(images)} of images")
                    )
                    continue
                outcome = simulate(cluster("light-moco-mobilenetv3", world, batch, rate, built))
                shares = ", ".join(
                    f"{name} {share:.0%}" for name, share in sorted(outcome.shares.items(), key=lambda pair: -pair[1]) if share >= 0.01
                )
                rows.append(
                    (
                        f"{batch:,} ({batch // world} a GPU), {rate:,}/s, {'built' if built else 'as it is'}",
                        f"{outcome.images_per_s:,.0f}",
                        seconds(outcome.days * 86400),
                        shares,
                    )
                )
    return table(("global batch, a GPU's rate", "samples/s", "an epoch", "time of a step"), rows)


def failure_table(_: Sequence[Record]) -> str:
    """What failures cost a run of ten days, with checkpoints at Young's interval and at the ends of epochs alone."""
    rows, work, restart = [], 10 * 86400.0, 300.0
    for hours in (MTBF / 3600, 2000, 500):
        mtbf = hours * 3600 / HOSTS
        for cost in (1.0, 10.0):
            best = young_s(cost, mtbf)
            lost = [daly_s(work, every, cost, mtbf, restart) / work - 1 for every in (best, 3600, 8 * 3600)]
            rows.append((f"{hours:,.0f} h, {seconds(mtbf)}, {cost:.0f} s", seconds(best), *(f"{share:.1%}" for share in lost)))
    return table(
        ("a host's time between failures, all hosts', a checkpoint", "Young's interval", "lost with it", "every hour", "every 8 hours"),
        rows,
    )


def worlds_table(_: Sequence[Record]) -> str:
    """Numbers of GPUs on whole hosts that a global batch allows, at least 8 samples each."""
    rows = [
        (f"{batch:,}", ", ".join(map(str, [n for n in worlds(batch, least=8) if 256 <= n <= 512])) or "none")
        for batch in (4096, 4032, 8064, 16384, 20160, 32256)
    ]
    return table(("global batch", "256 to 512 GPUs on whole hosts of 8"), rows)


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "storage": storage_table,
    "opening": opening_table,
    "orders": order_table,
    "windows": order_choice_table,
    "rates": rate_table,
    "starting": start_table,
    "traffic": traffic_table,
    "useful": useful_table,
    "run": run_table,
    "failures": failure_table,
    "worlds": worlds_table,
    "check": check_table,
    "earlier": earlier_table,
}


def fill(text: str, records: Sequence[Record]) -> str:
    """``text`` with its marked places filled.

    Raises:
        FastSSLError: a place has a name that is not one of TABLES, or a record is missing.
    """

    def replaced(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise FastSSLError(f"scale: {found[2]} is not one of {', '.join(TABLES)}")
        return f"{found[1]}{TABLES[found[2]](records).rstrip()}\n{found[3]}"

    return _PLACE.sub(replaced, text)


def main(argv: Sequence[str]) -> int:
    """Fill a file in place; 0 done, 1 unreadable, 2 wrong usage."""
    if len(argv) < 2:
        print("usage: python -m fastssl.benchmarks.scale_page docs/scale.md RESULTS.jsonl...", file=sys.stderr)
        return 2
    try:
        records = [record for path in argv[1:] for record in read_records(path)]
        page = Path(argv[0])
        page.write_text(fill(page.read_text(), records))
    except (OSError, FastSSLError) as error:
        print(f"scale_page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
