"""The options of run_clip.py: the reference's, those of `transformers` 5, and the repo's own spellings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from clip_pretraining.options import checks
from clip_pretraining.options.parser import OptionParser
from common.device import PRECISIONS, fused_adamw
from common.distributed import World
from common.errors import UsageError


@dataclass
class ModelArguments:
    """Which model, tokenizer and image processor."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model folder or hub name (clip-roberta)."})
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration folder: train from scratch (without --model_name_or_path)."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, when not in the model folder."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Image processor, likewise."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Hub downloads, unpacked COCO zips, lists of remote tars, the check of pictures."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    token: str | None = field(default=None, metadata={"help": "Access token for private hub models."})
    freeze_vision_model: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    freeze_text_model: bool = field(default=False, metadata={"help": "Do not train the text tower."})

    def hub(self) -> dict[str, str | None]:
        """Keyword arguments of every `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}


@dataclass
class DataArguments:
    """Which pairs: COCO (--data_dir), a table (--train_file) or tars (--train_shards)."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "ydshieh/coco_dataset_script, read from --data_dir; no script is run."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "COCO's year; 2017."})
    data_dir: str | None = field(default=None, metadata={"help": "COCO folder, or where a table's pictures lie."})
    image_column: str = field(default="image_path", metadata={"help": "Column of a table with the picture's file."})
    caption_column: str = field(default="caption", metadata={"help": "Column of a table with the caption."})
    train_file: str | None = field(
        default=None, metadata={"help": ".csv, .tsv, .txt, .json or .jsonl of pairs; A::B: both."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Likewise, for evaluation."})
    train_shards: str | None = field(
        default=None, metadata={"help": "WebDataset tars, files or http(s) URLs: a-{0000..0100}.tar::b-*.tar, or @LIST"}
    )
    validation_shards: str | None = field(default=None, metadata={"help": "Likewise, for evaluation."})
    validation_share: float | None = field(
        default=None, metadata={"help": "This share of the training pictures is kept for evaluation instead."}
    )
    caption_key: str = field(
        default="txt", metadata={"help": "In tars: suffix of the captions, or json:NAME for a value of KEY.json."}
    )
    delimiter: str | None = field(default=None, metadata={"help": "Between a table's columns; default by its suffix."})
    max_bad_share: float = field(
        default=0.01, metadata={"help": "Captions and pictures that may be missing or broken; they are left out."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longest caption in tokens; more is cut off."})
    clean_captions: bool = field(
        default=False, metadata={"help": "OpenAI's cleaning before tokenising: broken Unicode, HTML entities, case."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first N validation pairs."})
    check_images: bool = field(default=True, metadata={"help": "Decode every picture once before training."})
    random_crop: float = field(
        default=1.0, metadata={"help": "Train on random parts of at least this share of a picture (open_clip: 0.9)."}
    )
    crop_cache: str | None = field(
        default=None, metadata={"help": "Folder for decoded crops (150 KB a picture at 224): decode only once."}
    )


@dataclass
class ClipTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the loss, the evaluation and the repo's options."""

    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log (--log_every)."})
    report_to: str | None = field(default="none", metadata={"help": "Further trackers; TensorBoard is always written."})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Our log has a progress bar of its own."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Unused: a non-finite loss stops the run."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "No parameter goes unused."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "The models have no running statistics."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Nothing to remove; as the reference sets it."}
    )
    loss: str = field(
        default="contrastive", metadata={"help": "contrastive or siglip", "choices": ["contrastive", "siglip"]}
    )
    contrastive_scope: str = field(
        default="global",
        metadata={
            "help": "Negatives from all ranks, or from the rank's own batch (local: the published tables).",
            "choices": ["global", "local"],
        },
    )
    distinct_pairs: bool = field(
        default=False,
        metadata={"help": "No picture and no caption twice in a batch: equal ones are no negatives of each other."},
    )
    with_replacement: bool = field(
        default=False, metadata={"help": "Draw an epoch's pairs with replacement instead of each once."}
    )
    source_weights: str | None = field(
        default=None,
        metadata={"help": "3::1: how often the parts of --train_shards or --train_file are drawn, with replacement."},
    )
    mask_equal_captions: bool = field(
        default=False, metadata={"help": "A caption that comes twice in a batch is no negative of its other picture."}
    )
    keep_patches: float = field(
        default=1.0, metadata={"help": "Share of a picture's patches that training sees, drawn anew (FLIP: 0.5)."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Evaluate and save a moving average of the weights (0.9999); 0: none."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Train low-rank additions to the towers' layers; 0: all."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Their factor is alpha / rank; default 1."})
    clamp_logit_scale: bool = field(default=True, metadata={"help": "Keep logit_scale at or below ln 100."})
    zero_shot_dir: str | None = field(default=None, metadata={"help": "Folder of class folders: zero-shot accuracy."})
    class_names: str | None = field(
        default=None, metadata={"help": "File with one class name a line, in folder order."}
    )
    templates: str | None = field(default=None, metadata={"help": "File of prompts with {}; default ImageNet's 80."})
    retrieval_picture: bool = field(default=True, metadata={"help": "Draw queries and their answers after evaluation."})
    skip_steps: int = field(default=10, metadata={"help": "First steps that do not count in FPS."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start anew; old results move to earlier/."})
    replay: str | None = field(
        default=None, metadata={"help": "replay.json of a run that stopped: that one batch again, from the checkpoint."}
    )
    accept_changes: str = field(
        default="", metadata={"help": "Resume although these differ from the checkpoint's: names with commas, or all."}
    )
    loss_scale: float | None = field(
        default=None, metadata={"help": "fp16: a constant scale of the loss up to 65536; a larger one begins there."}
    )
    device_name: str = field(default="auto", metadata={"help": "auto, npu, cuda or cpu (--device)."})
    precision: str | None = field(default=None, metadata={"help": "fp32, bf16 or fp16 (also --bf16, --fp16)."})
    profile: bool = field(default=False, metadata={"help": "Record steps 10 to 12: OUTPUT_DIR/profile."})
    case_kind: str = field(default="acc", metadata={"help": "acc or perf: the kind in the result file's name."})

    def __post_init__(self):
        if self.precision is not None:
            if self.precision not in PRECISIONS:
                raise UsageError(f"--precision {self.precision}: choose one of {', '.join(PRECISIONS)}")
            self.fp16, self.bf16 = self.precision == "fp16", self.precision == "bf16"
        self.precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"
        if self.max_steps == 0:
            self.max_steps = -1
        checks.check_ranges(self)  # before `Trainer`'s own, which do not name the option
        self.lora_scale = (self.lora_alpha or self.lora_rank) / max(1, self.lora_rank)
        self.sharded = checks.wants_shards(self)
        self.fsdp = self.fsdp_config = None  # training/sharding.py does it: accelerate's cannot shard a scalar
        super().__post_init__()
        self._n_gpu = min(1, self._n_gpu)  # several cards are several processes, never DataParallel
        # The chunks of a large batch share one loss, so the Trainer must see one batch (training/trainer.py).
        self.micro_batch_size = self.per_device_train_batch_size
        self.per_device_train_batch_size *= self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The command line; of one that only names a .json file, the options in that file as they would be typed.

    Raises:
        UsageError: the file is missing, or not an object of options.
    """
    if len(argv) != 1 or not argv[0].endswith(".json"):
        return list(argv)
    try:
        options = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{argv[0]}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{argv[0]}: not valid JSON ({error})") from None
    if not isinstance(options, dict):
        raise UsageError(f'{argv[0]}: must hold one object, {{"option": value, ...}}')
    words: list[str] = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    return words


def device_of(argv: Sequence[str]) -> str:
    """The device asked for: it must be there before the rest can be parsed, since TrainingArguments looks at it."""
    given = [value for name, value in itertools.pairwise(argv) if name == "--device_name"]
    return given[-1] if given else "auto"


def parse(argv: Sequence[str], world: World) -> tuple[ModelArguments, DataArguments, ClipTrainingArguments]:
    """The three groups of options from a command line.

    Raises:
        UsageError: unknown option, wrong value, or options that do not go together.
    """
    model, data, training = parser().parse([*argv, "--use_cpu", str(world.device.type == "cpu")])
    checks.check(model, data, training)
    if training.optim == "adamw_torch_fused" and not fused_adamw(world.device):
        training.optim = "adamw_torch"  # the same update; this card lacks the operator
    return model, data, training


def parser() -> OptionParser:
    """Of run_clip.py's options."""
    return OptionParser((ModelArguments, DataArguments, ClipTrainingArguments), allow_abbrev=False)


def show_help(argv: Sequence[str], description: str) -> None:
    """Prints what --help or --help_all asks for and ends the program; returns without either."""
    if "--help_all" in argv:
        parser().print_help()
    elif "--help" in argv or "-h" in argv:
        print(parser().format_short_help(description))
    else:
        return
    raise SystemExit(0)
