"""Every project on the simulated npu device, by its own launch scripts: it trains, resumes and evaluates on two ranks
with the CPU's losses, and a step in the middle of a run neither waits for the device nor makes a shape from values."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ci.gates import forked_ranks
from ci.npu import fake as fake_npu
from ci.training_cases import CASES, COUNTED, ROOT
from common.profile import precision_compare
from common.run import result_file

pytestmark = pytest.mark.skipif(fake_npu.why_missing() is not None, reason=str(fake_npu.why_missing()))

STEPS, STOP, EVERY = 8, 4, 4  # of a whole run (an epoch of ViT and CLIP), of one that is cut off, between log lines
STEADY = (4, STOP)  # of a process's steps; DDP rebuilds its buckets before the third, a log line counts to the next
EXACT = {"rel": 1e-5, "abs": 1e-6}


@dataclass(frozen=True)
class Project:
    """How a project's scripts are called. What draws random numbers on the device is off: its stream is its own.

    Attributes:
        script: of the training; the arguments of the entry script are read from its --dry_run.
        flags: of the script.
        options: of the entry script, after `--`.
        resume: options that make a run go on in its folder.
        sharded: options for FSDP2, where the project has it.
    gelu: the first module whose GELU is the tanh form where the patch that makes it exact is left out.
        evaluation: (data, folder of the training run) -> flags and options of train_eval_1p.sh.
        late_imports: modules that the entry script imports late, to be imported once for all forked runs.
    """

    folder: str
    script: str
    entry: str
    flags: Callable[[Path], list[str]]
    options: Callable[[Path], list[str]]
    evaluation: Callable[[Path, Path], tuple[list[str], list[str]]]
    gelu: str
    resume: tuple[str, ...] = ()
    sharded: tuple[str, ...] | None = None
    prepare: Callable[[Path], None] | None = None
    late_imports: tuple[str, ...] = field(default_factory=tuple)


# -- the projects ------------------------------------------------------------------------------------------------------


def vit_options(data: Path) -> list[str]:
    pictures = ["--train_dataset_dir", str(data / "train"), "--eval_dataset_dir", str(data / "train")]
    model = ["model.name=vit_demo", "model.img_size=32", "model.drop_path=0", "data.auto_augment="]
    return [*pictures, *model, "--num_workers", "0", "--save_every", str(EVERY), "--log_every", str(EVERY)]


def vit_evaluation(data: Path, run: Path) -> tuple[list[str], list[str]]:
    flags = [f"--data_path={data}", f"--ckpt_path={run / 'checkpoints' / f'checkpoint-{STEPS}.pt'}"]
    return flags, ["--eval_dataset_dir", str(data / "train"), "model.name=vit_demo", "model.img_size=32"]


def beit2_options(data: Path) -> list[str]:
    case = CASES["Beit2_for_PyTorch"].arguments(data, COUNTED)
    case.remove("--no_auto_resume")
    return [*case, "--drop_path", "0", "--save_every", str(EVERY), "--log_every", str(EVERY)]


def beit2_evaluation(data: Path, run: Path) -> tuple[list[str], list[str]]:
    flags = [f"--data_path={data}", f"--ckpt_path={run / 'checkpoint.pth'}", "--batch_size=8", "--epochs=1"]
    options = ["--input_size", "64", "--eval_data_path", str(data / "train"), "--num_workers", "0"]
    return [*flags, "--model=beit_tiny_patch16_224", "--max_steps=2"], [*options, "--warmup_epochs", "0"]


def prepare_clip(data: Path) -> None:
    """COCO as it is downloaded, and a tiny model without dropout."""
    sys.path.insert(0, str(ROOT / "CLIP_for_PyTorch" / "test"))
    from clip_sample import write_coco_zips

    CASES["CLIP_for_PyTorch"].prepare(data, COUNTED)
    write_coco_zips(data / "coco", {"train": 32, "val": 8})
    config = data / "clip-roberta" / "config.json"
    content = json.loads(config.read_text())
    content["text_config"].update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.write_text(json.dumps(content))


def clip_options(data: Path) -> list[str]:
    quick = ["--retrieval_picture", "False", "--cache_dir", str(data / "cache"), "--skip_steps", "1"]
    rate = ["--lr_scheduler_type", "constant"]  # transformers' other schedules depend on --max_steps
    return [*quick, *rate, "--save_every", str(EVERY), "--log_every", str(EVERY)]


def clip_evaluation(data: Path, run: Path) -> tuple[list[str], list[str]]:
    flags = [f"--data_path={data / 'coco'}", f"--ckpt_path={run}", "--batch_size=4", "--workers=0"]
    return flags, ["--retrieval_picture", "False"]


def data2vec_options(data: Path) -> list[str]:
    case = CASES["Data2vec_for_PyTorch"].arguments(data, COUNTED)
    del case[case.index("--resume") : case.index("--resume") + 2]
    dropout = ["model.transformer.dropout=0", "model.transformer.attention_dropout=0"]
    files = ["checkpoint.no_save=false", "dataset.disable_validation=false", "dataset.required_batch_size_multiple=1"]
    return [*case, *dropout, *files, "--save_every", str(EVERY), "--log_every", str(EVERY)]


def data2vec_evaluation(data: Path, run: Path) -> tuple[list[str], list[str]]:
    checkpoint = run / "checkpoints" / "checkpoint_last.pt"
    flags = [f"--data_path={data / 'corpus'}", f"--checkpoint_path={checkpoint}", "--config_name=case"]
    return flags, ["--config-dir", str(data), "dataset.required_batch_size_multiple=1"]


def small_batches(*more: str) -> Callable[[Path], list[str]]:
    return lambda data: [f"--data_path={data}", "--batch_size=4", "--epochs=1000", *more]


PROJECTS = {
    project.folder: project
    for project in (
        Project(
            "ViT_for_PyTorch", "train_full_8p.sh", "run_vit.py", small_batches(), vit_options, vit_evaluation,
            "ClassifyingViT.blocks.0.mlp.act",
            resume=("--resume_training", "auto"), sharded=("--parallel", "fsdp"), late_imports=("vit.engine",),
        ),
        Project(
            "Beit2_for_PyTorch", "train_full_8p.sh", "run_beitv2_pretraining.py", small_batches(), beit2_options,
            beit2_evaluation, "VQKD.encoder.blocks.0.mlp.act", sharded=("--fsdp",),
        ),
        Project(
            "CLIP_for_PyTorch", "train_full_8p.sh", "run_clip.py",
            lambda data: [f"--data_path={data / 'coco'}", f"--model_path={data / 'clip-roberta'}", "--batch_size=4",
                          "--epochs=1000", "--workers=0"],
            clip_options, clip_evaluation,
            "VisionTextDualEncoderModel.text_model.encoder.layer.0.intermediate.intermediate_act_fn",
            resume=("--resume", "auto"), prepare=prepare_clip,
        ),
        Project(
            "Data2vec_for_PyTorch", "train_full_8p.sh", "train.py",
            lambda data: [f"--data_path={data / 'corpus'}", "--config_name=case"],
            data2vec_options, data2vec_evaluation, "SentenceEncoder.layers.0.activation",
        ),
    )
}  # fmt: skip


# -- running them ------------------------------------------------------------------------------------------------------


def shell(project: Project, script: str, flags: list[str], options: list[str], **kwargs) -> subprocess.CompletedProcess:
    command = ["bash", f"test/{script}", "--device=npu", "--precision=fp32", *flags, "--", *options]
    return subprocess.run(command, cwd=ROOT / project.folder, capture_output=True, text=True, **kwargs)


def entry_arguments(project: Project, data: Path, output: Path, steps: int, *more: str) -> list[str]:
    """What the launch script gives the entry script, as its --dry_run prints it."""
    flags = [*project.flags(data), "--nproc=2", f"--max_steps={steps}", f"--output_dir={output}", "--dry_run"]
    printed = shell(project, project.script, flags, [*project.options(data), *more], check=True).stdout
    words = shlex.split(printed.strip().splitlines()[-1])
    words = words[words.index(project.entry) + 1 :]
    return [str(ROOT / project.folder / word) if word.startswith("configs/") else word for word in words]


def on_cpu(arguments: list[str]) -> list[str]:
    changed = list(arguments)
    changed[changed.index("npu")] = "cpu"
    return changed


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Mean loss and gradient norm of each window of EVERY steps, by its last step."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}


def evaluations(run: Path) -> list[float]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] not in ("train", "pause")]
    return [value for line in kept for name, value in line.items() if "loss" in name]


def assert_same_losses(run: Path, expected: dict[int, tuple[float, float]]) -> None:
    found = losses(run)
    assert found.keys() == expected.keys()
    for step, (loss, norm) in expected.items():
        assert found[step][0] == pytest.approx(loss, **EXACT), f"loss of step {step} in {run.name}"
        assert found[step][1] == pytest.approx(norm, rel=1e-3, abs=1e-5), f"gradient norm of step {step} in {run.name}"


@dataclass
class Runs:
    """A project's runs: `cpu` whole, `npu` begun by the launch script, `sharded`; both resumed after STOP steps."""

    project: Project
    data: Path
    root: Path
    steady_events: list[fake_npu.Event]


@pytest.fixture(scope="module", params=PROJECTS)
def runs(request, tmp_path_factory) -> Runs:
    project = PROJECTS[request.param]
    root = tmp_path_factory.mktemp(project.folder)
    data, report = root / "data", root / "report"
    data.mkdir()
    (project.prepare or (lambda folder: CASES[project.folder].prepare(folder, COUNTED)))(data)

    flags = [*project.flags(data), "--nproc=2", f"--max_steps={STOP}", f"--output_dir={root / 'npu'}"]
    begun = shell(project, project.script, flags, project.options(data), env=fake_npu.environment(), timeout=500)
    assert begun.returncode == 0, begun.stdout[-3000:] + begun.stderr[-3000:]

    commands = [
        (2, on_cpu(entry_arguments(project, data, root / "cpu", STEPS))),
        (2, [*entry_arguments(project, data, root / "npu", STEPS), *project.resume]),
    ]
    if project.sharded:
        cut, whole = (entry_arguments(project, data, root / "sharded", n, *project.sharded) for n in (STOP, STEPS))
        commands += [(2, cut), (2, [*whole, *project.resume])]
    for name, off in (("dump", ""), ("dump_tanh", "exact_gelu")):
        variables = {"DUMP_PRECISION": "1", "NPU_PATCHES_OFF": off}
        commands.append((1, entry_arguments(project, data, root / name, 1), variables))
    environment = fake_npu.environment(report)
    environment.pop("OMP_NUM_THREADS")
    script = ROOT / project.folder / project.entry
    done = forked_ranks.run(script, project.late_imports, *commands, **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    reports = [r for r in fake_npu.read_reports(report) if r.steps == STOP]  # not those of a single step
    # two ranks of each run on npu but the sharded one that goes on: torch loads its optimizer with a step more
    assert len(reports) == 2 * (2 if project.sharded else 1)
    return Runs(project, data, root, [event for r in reports for event in r.between(*STEADY)])


def test_training_that_is_resumed_has_the_losses_of_the_cpu(runs):
    expected = losses(runs.root / "cpu")
    assert list(expected) == [STOP, STEPS]
    assert_same_losses(runs.root / "npu", expected)
    (result,) = (runs.root / "npu").glob("*_acc.log")
    stored = result_file.read(result)
    assert stored["Status"] == "OK" and stored["RankSize"] == "2" and "simulated" in stored["DeviceName"]


def test_evaluation_has_the_loss_of_the_cpu(runs):
    expected = evaluations(runs.root / "cpu")
    assert evaluations(runs.root / "npu")[-len(expected) :] == pytest.approx(expected, **EXACT)


def test_sharded_training_that_is_resumed_has_the_losses_of_the_cpu(runs):
    if runs.project.sharded is None:
        pytest.skip(f"{runs.project.folder} has no FSDP2")
    assert_same_losses(runs.root / "sharded", losses(runs.root / "cpu"))


def assert_steady(events: list[fake_npu.Event]) -> None:
    """No wait of the host, no shape that depends on values, no float64 and no type without documentation."""
    assert not events, "\n".join(map(str, events))


def test_a_step_does_not_wait_for_the_device(runs):
    assert_steady(runs.steady_events)


def test_a_planted_tanh_gelu_is_named_by_its_layer(runs, capsys):
    dumps = [str(runs.root / name) for name in ("dump", "dump_tanh")]
    assert precision_compare.main(dumps) == 1
    found = capsys.readouterr().out
    assert f"They part first at **{runs.project.gelu}**" in found and "of inputs that differ by 0." in found


def test_the_evaluation_script_runs(runs):
    flags, options = runs.project.evaluation(runs.data, runs.root / "npu")
    flags += [f"--output_dir={runs.root / 'evaluation'}"]
    done = shell(runs.project, "train_eval_1p.sh", flags, options, env=fake_npu.environment(), timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (result,) = (runs.root / "evaluation").glob("*_acc.log")
    stored = result_file.read(result)
    assert stored["Status"] == "OK" and "simulated" in stored["DeviceName"]
