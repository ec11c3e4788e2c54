"""--help of the entry scripts: groups, units, defaults and choices, dead options last."""

import re

import pytest

import convert_weight
import run_vit
from vit.config import options
from vit.config import run_config as config


def help_of(main, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_options_are_grouped_and_say_their_defaults(capsys):
    text = help_of(run_vit.main, capsys)
    groups = ["what to do:", "prediction:", *(f"{title}:" for title in options.GROUPS), "any other key:"]
    places = [
        text.index(f"\n{title}") for title in [*groups, "accepted from MindFormers' command lines, without effect:"]
    ]
    assert places == sorted(places), "dead options last"
    flat = re.sub(r"\s+", " ", text[places[2] :])
    defaults = config.values_by_key(config.Config())
    for name, option in options.OPTIONS.items():
        shown = "none" if defaults[option.key] == "" else str(defaults[option.key])
        said = re.search(rf" --{name} [^-].*?\(default: ([^)]*)\)", flat)
        assert said and said[1].lower() == shown.lower(), name
    assert all(f"--{name} [VALUE]" in text[places[-1] :] for name in options.DEAD_OPTIONS)


def test_every_key_is_listed_with_what_it_may_be(capsys):
    text = help_of(run_vit.main, capsys)
    assert all(f"\n  {key}=" in text for key in config.known_keys())
    assert re.search(r"optimizer.layer_decay=0.65 +a number from 0 to 1, not 0", text)
    assert re.search(r"class_weights=none +none, balanced", text)


def test_help_of_the_conversion(capsys):
    text = re.sub(r"\s+", " ", help_of(convert_weight.main, capsys))
    assert "what becomes what" in text and "(default: mindspore)" in text
    assert "--to {mindspore,torch,timm,huggingface,onnx}" in text
