"""``fastssl estimate``: words on stderr, JSON on stdout, one line for what cannot be estimated."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastssl.benchmarks.estimate import estimate as bench
from fastssl.cli import main
from fastssl.cli.estimate import describe
from fastssl.errors import FastSSLError

SMALL = (
    "--recipe",
    "few-photos-moco",
    "--set",
    "views.0.size=32",
    "--set",
    "probe.size=32",
    "--set",
    "moco.queue=64",
    "--batch-size",
    8,
    "--workers",
    1,
    "--device",
    "cpu",
)
MADE = dict(
    recipe="light-moco-mobilenetv3",
    arch="mobilenetv3_large_100",
    pipeline="native",
    device="cpu",
    workers=2,
    devices=1,
    data={"name": "train.beton", "samples": 1281167},
    epochs=200,
    batch_size=512,
    accumulate=1,
    steps_per_epoch=2502,
    step_s=36.57,
    epoch_s=91500.0,
    run_s=18300000.0,
    device_hours=5083.3,
    small_epochs=0,
    probes=39,
    probe_s=80.0,
    final_probe_s=1600.0,
    loader_pair_per_s=1100.4,
    step_pair_per_s=14.2,
    pair_per_s=14.0,
    limit="step",
    memory_bytes=44 * 2**30,
    static_bytes=113 * 2**20,
    activation_bytes=42 * 2**30,
    data_bytes=2 * 2**30,
    host_bytes=0,
    checkpoint_bytes=129 * 2**20,
    available_bytes=60 * 2**30,
    usable_bytes=54 * 2**30,
    total_bytes=64 * 2**30,
    fits=True,
    largest_batch=512,
    largest_batch_limit="memory",
    fitting_accumulate=None,
    recomputed_bytes=None,
    measured={"step": [{"batch_size": 8}, {"batch_size": 16}]},
    extrapolated=["time and memory of a step: linearly from batch 16 to 512"],
    left_out=["writing checkpoints"],
    seconds=38.0,
)


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of the command line."""
    with pytest.raises(SystemExit) as stop:
        main(["estimate", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_figures_as_json_and_words_beside_them(capsys, beton):
    status, out, err = run(
        capsys, "--arch", "mobilenetv3_small_050", "--data", beton, *SMALL, "--epochs", 3, "--seconds", 3, "--json", "-"
    )
    assert status == 0
    record = json.loads(out)  # one object, and nothing else on standard output
    assert (record["recipe"], record["arch"], record["epochs"], record["batch_size"]) == (
        "few-photos-moco",
        "mobilenetv3_small_050",
        3,
        8,
    )
    assert record["data"] == {"name": beton.name, "samples": 48} and record["steps_per_epoch"] == 6
    assert record["host"]["cores"] >= 1 and "torch" in record["versions"]
    assert record["seconds"] < 4.5
    for words in (
        "One epoch: ",
        "(6 steps of 8). 3 epochs: ",
        "Limit: ",
        "Memory: ",
        "Largest batch that fits",
        "Measured in ",
        "Not counted: ",
    ):
        assert words in err


def test_the_sample_set_without_data(capsys, monkeypatch, beton):
    from fastssl.data import sample_set

    asked = {}
    monkeypatch.setattr(sample_set, "ensure_sample_set", lambda: sample_set.SampleSet(beton, beton))
    monkeypatch.setattr(
        bench, "run", lambda *arguments: asked.update(zip(("recipe", "name", "data", "val"), arguments)) or MADE
    )
    assert run(capsys, "--arch", "resnet18", "--device", "cpu")[0] == 0
    assert (asked["name"], asked["recipe"].arch, asked["data"], asked["val"]) == (
        "quickstart",
        "resnet18",
        beton,
        beton,
    )


def test_words_that_a_person_understands():
    lines = describe(MADE)
    assert (
        lines[0]
        == "One epoch: 25 h 25 min (2,502 steps of 512). 200 epochs: 211.8 days on this CPU, 5,083 device hours."
    )
    assert lines[1] == "Limit: the step, 14 pair/s; the loader alone could feed 1,100. Both together: 14 pair/s."
    assert (
        "44.0 GiB at the peak of a step" in lines[2]
        and "of 60.0 GiB free" in lines[2]
        and "129 MiB on disk" in lines[2]
    )
    assert lines[3] == "Largest batch that fits and that the recipe allows: 512 (memory is the limit)."
    assert lines[4] == "Included: 39 online probes of 1 min 20 s, 27 min for the features of the final probe."
    assert lines[5].endswith(
        "the step at batch 8, 16. Extrapolated: time and memory of a step: linearly from batch 16 to 512."
    )
    gpu = dict(
        MADE,
        device="cuda",
        limit="data",
        loader_pair_per_s=900.0,
        step_pair_per_s=9000.0,
        pair_per_s=900.0,
        host_bytes=3 * 2**30,
        epochs=1,
    )
    lines = describe(gpu)
    assert "1 epoch: 211.8 days on this GPU, 5,083 GPU-hours." in lines[0]
    assert (
        lines[1]
        == "Limit: the data, 900 pair/s from 2 decoding threads; the step alone could take 9,000. Both together: "
        "900 pair/s."
    )
    assert "3.0 GiB on the host for the loader" in lines[2]


def test_what_would_fit_instead():
    big = dict(MADE, fits=False, largest_batch=128, fitting_accumulate=4)
    assert "100 epochs (75 with small views): " in describe({**big, "epochs": 100, "small_epochs": 75})[0]
    assert describe(big)[3] == "The batch of 512 does not fit; --batch-size 128 or --set train.accumulate=4 does."
    lean = dict(big, recomputed_bytes=10 * 2**30)
    same = "--set train.checkpoint=true (10.0 GiB, the same steps) or "
    assert (
        describe(lean)[3] == f"The batch of 512 does not fit; {same}--batch-size 128 or --set train.accumulate=4 does."
    )
    assert describe(dict(lean, recomputed_bytes=55 * 2**30)) == describe(big), "more than there is"
    assert describe(dict(big, fitting_accumulate=None))[3] == "The batch of 512 does not fit; --batch-size 128 does."
    assert (
        describe(dict(big, largest_batch=None, fitting_accumulate=None))[3]
        == "The batch of 512 does not fit, and no smaller one does."
    )


def assert_one_line(status, err, *words):
    assert status == 1
    lines = [
        line for line in err.splitlines() if line.startswith("fastssl:") and not line.startswith("fastssl: warning: ")
    ]
    assert len(lines) == 1 and "Traceback" not in err
    for word in words:
        assert word in lines[0]


def test_what_cannot_be_estimated(capsys, beton, tmp_path):
    def fails(*arguments):
        status, _, err = run(capsys, *arguments, "--seconds", 1)
        return status, err

    assert_one_line(*fails("--arch", "mobilnet", "--data", beton), "unknown network", "nearest")
    assert_one_line(*fails("--arch", "resnet18", "--data", tmp_path / "none.beton"), "none.beton")
    wrong = tmp_path / "wrong.beton"
    wrong.write_bytes(b"not a beton file")
    assert_one_line(*fails("--arch", "resnet18", "--data", wrong), "wrong.beton")
    assert_one_line(
        *fails("--arch", "resnet18", "--data", beton, *SMALL[:6], "--set", "moco.queue=60", *SMALL[8:]),
        "moco.queue=60",
        "twice the batch",
    )
    assert_one_line(*fails(*SMALL[:2], "--data", beton, "--set", "moco.queu=64"), "no key moco.queu", "queue")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--arch", "resnet18", "--seconds", "0"),
        ("--arch", "resnet18", "--seconds", "nan"),
        ("--arch", "resnet18", "--batch-size", "64", "--set", "train.batch_size=32"),
    ],
)
def test_wrong_usage(capsys, arguments):
    assert run(capsys, *arguments)[0] == 2


def test_help_has_an_example_and_waits_for_no_torch():
    code = (
        "import sys; from fastssl.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: print('torch' in "
        "sys.modules)"
    )
    for arguments in (["--help"], ["estimate", "--help"]):
        out = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        ).stdout
        assert "estimate" in out and out.endswith("False\n")
    assert "fastssl estimate --arch" in out


def test_errors_of_the_measurement_are_one_line(capsys, monkeypatch, beton):
    def refuse(*arguments):
        raise FastSSLError("resnet18: out of memory with 8 pictures a step on this cpu device")

    monkeypatch.setattr(bench, "run", refuse)
    assert_one_line(*(run(capsys, "--arch", "resnet18", "--data", beton)[::2]), "out of memory")
