"""Run the command over two processes of Lightning, torchrun or SLURM.

torchrun and SLURM start one process on each of two machines.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import ROOT, TINY, Result, clean_environment, folders, metrics, start, train_py
from tests.helpers.resuming import STOP_AT, checkpoint

PAGE = (ROOT / "docs/several_processes.md").read_text()
TASK = ("--config", "configs/grok_aga.yaml", *TINY, "--data.train_fraction", "0.6", "--trainer.callbacks", "null")
OVERLAY = ("--config", "configs/overlays/ddp.yaml", "--trainer.accelerator", "cpu")
INTERRUPTED = "--trainer.callbacks+=tests.helpers.resuming.Interrupt"
SRUN = """#!{python}
# Starts what it is given as two tasks on two machines; its exit code is the greater of the two.
import os, subprocess, sys
common = {{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0", "SLURM_NODELIST": "127.0.0.1"}}
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | common | {{"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)}})
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def by_lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run over two processes that Lightning started."""
    home = tmp_path_factory.mktemp("by_lightning")
    result = train_py("fit", *TASK, *OVERLAY, "--trainer.devices", 2, "--runs", home / "runs", home=home)
    assert result.code == 0, result.err
    assert result.out.count("Run finished after 2 epochs") == 1
    (folder,) = folders(home / "runs")
    return folder


@pytest.mark.slow
def test_an_average_a_plateau_and_another_logger_are_those_of_one_process(tmp_path: Path) -> None:
    plateau = (
        "--model.scheduler.monitor",
        "val/loss",
        "--model.scheduler.patience",
        0,
        "--model.scheduler.threshold",
        0.9,
    )
    options = (
        *(*TASK, "--config", "configs/overlays/ema.yaml", "--trainer.callbacks.decay", 0.5),
        *("--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", *plateau),
        *("--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir", tmp_path),
    )
    saved = []
    for devices in (1, 2):
        result = train_py(
            "fit", *options, *OVERLAY, "--trainer.devices", devices, "--runs", tmp_path / f"{devices}", home=tmp_path
        )
        assert result.code == 0, result.err
        saved.append(checkpoint(folders(tmp_path / f"{devices}")[0]))
    for key in ("state_dict", "current_model_state"):
        for name, tensor in saved[0][key].items():
            assert torch.allclose(saved[1][key][name].float(), tensor.float(), atol=1e-6), name
    rates = [part["optimizer_states"][0]["param_groups"][0]["lr"] for part in saved]
    assert rates == pytest.approx([1e-4, 1e-4])
    assert len([*tmp_path.rglob("events.out.tfevents.*")]) == 2


def test_lightning_starts_them_and_one_folder_has_it_all(by_lightning: Path) -> None:
    assert len(metrics(by_lightning)) == 4
    for name in ("config.yaml", "protocol.yaml", "summary.json", "parameters.txt", "checkpoints/last.ckpt"):
        assert (by_lightning / name).is_file(), name


@pytest.mark.slow
def test_questions_are_answered_once_in_the_order_asked(by_lightning: Path, tmp_path: Path) -> None:
    options = (*OVERLAY, "--trainer.devices", 2, "--data.questions", "[1+1, 2+3, 0+4]")
    result = train_py("predict", *TASK, *options, "--ckpt_path", by_lightning / "checkpoints/last.ckpt", home=tmp_path)
    assert result.code == 0, result.err
    assert re.findall(r"^(\d \+ \d) =", result.out, re.M) == ["1 + 1", "2 + 3", "0 + 4"]


def torchrun(home: Path, *options: object, stop: str = "") -> list[tuple[int, str]]:
    """Run the documented line on two machines, of one process each.

    Both are this one. Return the output of each.
    """
    (line,) = re.findall(r"^torchrun (?:.*\\\n)*.*$", PAGE, re.M)
    line = re.sub(r"<.*?>:\d+", f"127.0.0.1:{free_port()}", line.replace("\\\n", "")).replace("8 --rdzv", "1 --rdzv")
    line = line.replace("configs/cifar_sync.yaml", "configs/grok_aga.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", *line.split()[1:], *TASK[2:], *OVERLAY[2:]]
    command += ["--trainer.devices", "1", *map(str, options), "--runs", str(home / "runs")]
    environment = clean_environment(home, **{STOP_AT: stop})
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_two_processes_of_a_launcher_share_a_run_and_resume_together(by_lightning: Path, tmp_path: Path) -> None:
    """The environment is the one of torchrun on each of two machines."""

    def run(stop: str = "") -> list[Result]:
        port = str(free_port())
        options = (
            *TASK,
            *OVERLAY,
            "--trainer.devices",
            1,
            "--trainer.num_nodes",
            2,
            INTERRUPTED,
            "--ckpt_path",
            "last",
        )
        with contextlib.ExitStack() as stack:
            both = []
            for rank in "01":
                launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
                launched |= {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", STOP_AT: stop}
                process = start("fit", *options, "--runs", tmp_path / "runs", home=tmp_path, **launched)
                both.append(stack.enter_context(process))
            outputs = [process.communicate(120) for process in both]
            return [Result(process.returncode, *output) for process, output in zip(both, outputs, strict=True)]

    stopped = run(stop="SIGTERM:2")
    assert [result.code for result in stopped] == [143, 143], stopped
    assert sum(result.out.count("no unfinished run with these options") for result in stopped) == 1
    finished = run()
    assert [result.code for result in finished] == [0, 0], finished
    assert sum(result.out.count("resuming") for result in finished) == 1
    (folder,) = folders(tmp_path / "runs")
    assert metrics(folder) == metrics(by_lightning)


@pytest.mark.slow
def test_torchrun_starts_them_on_two_machines_and_they_resume_together(by_lightning: Path, tmp_path: Path) -> None:
    stopped = torchrun(tmp_path, INTERRUPTED, stop="SIGTERM:2")
    assert [code != 0 for code, _ in stopped] == [True, True]
    assert sum(text.count("no unfinished run with these options") for _, text in stopped) == 1
    finished = torchrun(tmp_path, INTERRUPTED)
    assert [code for code, _ in finished] == [0, 0], finished
    assert sum(text.count("resuming ") for _, text in finished) == 1
    (folder,) = folders(tmp_path / "runs")
    assert metrics(folder) == metrics(by_lightning)


def job(folder: Path) -> Path:
    """Return the documented SLURM job, beside stand-ins for SLURM's programs."""
    (script,) = re.findall(r"^#!/bin/bash\n#SBATCH.*?(?=```)", PAGE, re.M | re.S)
    for name, text in {
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "srun": SRUN.format(python=sys.executable),
        "scontrol": f"#!/bin/sh\necho $* > {folder}/asked\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "train.sh").write_text(script.replace("configs/cifar_sync.yaml", "configs/grok_aga.yaml"))
    return folder / "train.sh"


def sbatch(script: Path, stop: str = "") -> subprocess.CompletedProcess[str]:
    path = f"{script.parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_NNODES": "2", "SLURM_JOB_NAME": "ars2", STOP_AT: stop}
    options = [*TASK[2:], *OVERLAY[2:], "--trainer.devices", "1", INTERRUPTED, "--runs", str(script.parent / "runs")]
    environment = clean_environment(script.parent, **slurm, PATH=path)
    environment.pop("PYTHONHOME", None)
    return subprocess.run(
        ["bash", str(script), *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_resumes_when_it_is_requeued(by_lightning: Path, tmp_path: Path) -> None:
    script = job(tmp_path)
    stopped = sbatch(script, stop="SIGTERM:2")
    assert stopped.returncode == 143, stopped.stderr
    assert (tmp_path / "asked").read_text().startswith("requeue ")
    (tmp_path / "asked").unlink()
    finished = sbatch(script)
    assert finished.returncode == 0, finished.stderr
    assert not (tmp_path / "asked").exists()
    assert finished.stdout.count("resuming ") == 1
    (folder,) = folders(tmp_path / "runs")
    assert metrics(folder) == metrics(by_lightning)


def test_the_slurm_job_is_sound_bash(tmp_path: Path) -> None:
    script = job(tmp_path)
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    # The job requests from SLURM what the command states to Lightning.
    text = script.read_text()
    assert re.findall(r"--(?:ntasks|gpus)-per-node=(\d+)", text) == ["8", "8"]


@pytest.mark.slow
def test_an_error_before_training_is_reported_and_no_process_waits(tmp_path: Path) -> None:
    begin = time.monotonic()
    outputs = torchrun(tmp_path, "--trainer.max_epochs", "-7")
    assert all(code != 0 for code, _ in outputs)
    assert time.monotonic() - begin < 120
    assert any("error: " in text for _, text in outputs)
    assert signal.SIGKILL not in {-code for code, _ in outputs}
