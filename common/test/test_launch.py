"""The shell contract: what bash test/*.sh does with flags, paths, failures and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.run import result_file

COMMON = Path(__file__).resolve().parents[1]


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "ASCEND_DEVICE_ID", "RANK")}
    return {**clean, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **extra}


def bash(project: Path, *flags: str, folder: str = ".", **extra: str) -> subprocess.CompletedProcess:
    script = os.path.relpath(project / "test" / "trial.sh", project / folder)
    command = ["bash", script, *flags]
    return subprocess.run(command, cwd=project / folder, capture_output=True, text=True, env=environment(**extra))


def log_of(project: Path, name: str = "train_0.log", device_id: str = "0") -> str:
    return (project / "test" / "output" / device_id / name).read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path=.", "--bacth_size=8"], "unknown flag --bacth_size; did you mean --batch_size?"),
        ([], "--data_path is required"),
        (["--data_path=/no/such/place"], "--data_path=/no/such/place: no such file or folder"),
        (["--data_path=.", "--epochs=many"], "--epochs=many: must be a whole number"),
        (["--data_path=.", "--max_restarts=08"], "--max_restarts=08: must be a whole number"),  # 8 in octal
        (["--data_path=.", "--device=tpu"], "--device=tpu: choose auto, npu, cuda or cpu"),
        (["--data_path"], "--data_path needs a value"),
        (["--data_path", "--epochs=1"], "--data_path needs a value"),
        (["train", "--data_path=."], "unexpected argument 'train'"),
        (["--data_path=.", "--nnodes=2"], "--nnodes=2 needs --master_addr"),
        (["--data_path=.", "--ckpt_path=gone.pth"], "--ckpt_path=gone.pth: no such file"),
    ],
)
def test_bad_flags_are_one_clear_error_before_anything_runs(project, flags, message):
    process = bash(project, *flags)
    assert process.returncode == 2
    assert message in process.stderr and "ARGS" not in process.stdout
    assert not (project / "test" / "output").exists()


def test_a_flag_is_never_taken_from_the_environment(project):
    process = bash(project, "--data_path=.", max_steps="10")
    assert process.returncode == 2 and "max_steps=10 has the name of a flag: unset max_steps" in process.stderr
    process = bash(project, "--data_path=.", "--max_steps=3", "--dry_run", max_steps="10")
    assert process.returncode == 0 and process.stdout.rstrip().endswith("--max_steps 3")


@pytest.mark.parametrize("folder", [".", "test"])
@pytest.mark.parametrize("style", ["=", " "])
def test_both_flag_styles_spaces_and_pass_through_from_either_folder(project, folder, style):
    pictures = os.path.relpath(project.parent / "my pictures", project / folder)
    flags = [f"--data_path={pictures}"] if style == "=" else ["--data_path", pictures]
    process = bash(project, *flags, "--device=cpu", "--", "--note", "two words", "--batch_size=9", folder=folder)
    assert process.returncode == 0, process.stderr
    assert f'"--data", "{project.parent / "my pictures"}"' in process.stdout
    assert '"--device", "cpu"' in process.stdout
    assert '"--note", "two words", "--batch_size=9"]' in process.stdout
    assert "ARGS" in log_of(project)


def test_help_and_dry_run_run_nothing(project):
    process = bash(project, "--help")
    assert process.returncode == 0 and "A trial launch." in process.stdout and "--model_path=" in process.stdout
    process = bash(project, "--data_path=.", "--nproc=4", "--dry_run", "--profile")
    assert " --profile " in process.stdout
    assert process.returncode == 0 and "--nproc_per_node 4" in process.stdout and "ARGS" not in process.stdout


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--nproc=2"], ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "--standalone --max_restarts 2"]),
        (
            ["--nnodes=2", "--nproc=2", "--master_addr=127.0.0.1", "--min_nodes=1", "--node_rank=1"],
            ["--nnodes 1:2 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:29500", "is_host=0", "-u RANK_TABLE_FILE"],
        ),
    ],
)
def test_max_restarts_is_torchruns_with_a_new_store_for_every_attempt(project, flags, shown):
    process = bash(project, "--data_path=.", "--max_restarts=2", *flags, "--dry_run")
    assert process.returncode == 0, process.stderr
    assert all(text in process.stdout for text in shown), process.stdout
    assert "--max_restarts" not in bash(project, "--data_path=.", "--nproc=2", "--dry_run").stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_restarts=2"], "--max_restarts needs several ranks"),
        (["--nproc=2", "--min_nodes=1"], "--min_nodes=1 needs --max_restarts=N"),
        (["--nproc=2", "--min_nodes=2", "--max_restarts=1"], "--min_nodes=2: choose 1 to 1"),
        (["--max_restarts=often"], "--max_restarts=often: must be a whole number"),
    ],
)
def test_restarts_that_cannot_be_are_refused(project, flags, message):
    process = bash(project, "--data_path=.", *flags)
    assert process.returncode == 2 and message in process.stderr


def test_exit_code_is_the_programs_and_the_result_says_failed(project):
    process = bash(project, "--data_path=.", "--", "--die=0")
    assert process.returncode == 7
    assert "rank 0 failed with exit code 7" in process.stderr and "the cause is here" in process.stderr
    values = result_file.read(project / "test" / "output" / "0" / "Trial_bs4_1p_acc.log")
    assert values["Status"] == "FAILED" and "exit code 7" in values["Error"]


def test_a_failing_run_leaves_the_result_of_an_earlier_one(project):
    output = project / "test" / "output" / "0"
    output.mkdir(parents=True)
    name = "Trial_bs4_1p_acc.log"
    (output / name).write_text("ActualFPS = 3.5\nStatus = OK\n")
    for _ in range(2):
        assert bash(project, "--data_path=.", "--", "--die=0").returncode == 7
    assert result_file.read(output / name)["Status"] == "FAILED"
    (kept,) = (output / "earlier").glob(f"*/{name}")
    assert result_file.read(kept)["ActualFPS"] == "3.5"


def test_each_rank_has_a_log_and_the_first_failing_one_gives_the_exit_code(project):
    process = bash(project, "--data_path=.", "--nproc=2", "--", "--die=1")
    assert process.returncode == 7
    assert "rank 1 failed with exit code 7" in process.stderr and "| the cause is here" in process.stderr
    assert "the cause is here" in log_of(project, "train_1.log") and "the cause is here" not in log_of(project)
    assert (project / "test" / "output" / "0" / "Trial_bs4_2p_acc.log").exists()


def test_logs_are_appended_to_and_a_progress_bar_leaves_only_its_end(project):
    for _ in range(2):
        assert bash(project, "--data_path=.", "--", "--bar").returncode == 0
    assert log_of(project).count("ARGS") == 2
    assert log_of(project).count("100%") == 2 and "10%\r" not in log_of(project)


def test_ranks_share_the_cores_that_are_there(project):
    assert bash(project, "--data_path=.", "--nproc=2").returncode == 0
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2:
        share = len(cores) // 2
        assert f"cores {cores[:share]} {share} 0" in log_of(project)
        assert f"cores {cores[share : 2 * share]} {share} 0" in log_of(project, "train_1.log")
    assert bash(project, "--data_path=.", "--nproc=2", "--cpu_bind=off").returncode == 0
    assert f"cores {cores} " in log_of(project)


def test_device_id_names_the_output_folder(project):
    assert bash(project, "--data_path=.", "--device=cpu", "--device_id=3").returncode == 0
    assert "ARGS" in log_of(project, "train_3.log", "3")
    process = bash(project, "--data_path=.", "--device=cuda", "--device_id=3", CUDA_VISIBLE_DEVICES="0,1")
    assert process.returncode == 2 and "CUDA_VISIBLE_DEVICES=0,1: set only one" in process.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_ends_every_process_of_the_run(project, ranks):
    command = ["bash", "test/trial.sh", "--data_path=.", f"--nproc={ranks}", "--", "--sleep", f"--mark={project}"]
    process = subprocess.Popen(
        command, cwd=project, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not all((project / f"started{rank}").exists() for rank in range(ranks)):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and b"ended by a signal" in errors
    left = subprocess.run(["pgrep", "-f", f"mark={project}"], capture_output=True, text=True).stdout
    assert left == ""
    values = result_file.read(project / "test" / "output" / "0" / f"Trial_bs4_{ranks}p_acc.log")
    assert values["Status"] == "FAILED"


def test_cann_environment_is_found_set_and_skippable(project, tmp_path):
    cann = tmp_path / "Ascend"
    (cann / "ascend-toolkit").mkdir(parents=True)
    (cann / "ascend-toolkit" / "set_env.sh").write_text("export FOUND_CANN=$UNSET_VARIABLE_IS_FINE.yes\n")
    info = tmp_path / "ascend_cann_install.info"
    info.write_text(f"Toolkit_InstallPath={tmp_path}\nInstall_Path={cann}\n")
    script = f'source "{COMMON}/launch/env_npu.sh"; echo "found $FOUND_CANN $HCCL_CONNECT_TIMEOUT"'
    run = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, env=environment(CANN_INSTALL_INFO=str(info))
    )
    assert run.returncode == 0 and "found .yes 1200" in run.stdout

    process = bash(project, "--data_path=.", "--device=npu", CANN_INSTALL_INFO=str(info))
    assert "CANN environment:" in process.stdout
    process = bash(project, "--data_path=.", "--device=npu", CANN_INSTALL_INFO=str(info), etp_running_flag="true")
    assert "CANN environment:" not in process.stdout
