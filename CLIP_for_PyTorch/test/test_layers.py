"""The layers of model/layers.py, and what cpu_patches.py makes of them, compute what those of `transformers` do.

Goldens: test_models.py.
"""

import copy

import clip_pretraining  # noqa: F401  mends torchvision for transformers

# isort: split
import pytest
import torch

from clip_pretraining import cpu_patches
from clip_pretraining.data.tokenization import pad_captions
from clip_pretraining.model import construction, layers
from common import cpu as cpu_kernels

CPU = torch.device("cpu")
CAPTIONS = ["a red box", "a green box on white ground", "a blue box, and a red one", "black"]


def tiny(
    family: str, dropout: float = 0.0, depth: int = 2, activation: str = "quick_gelu"
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of `transformers` with random weights, in training mode, and a batch of four captions of four lengths."""
    torch.manual_seed(0)
    model, tokenizer, settings = construction.from_scratch("tiny", family, CAPTIONS)
    for tower in (model.config.vision_config, model.config.text_config):
        tower.num_hidden_layers = depth
    model.config.vision_config.hidden_act = activation
    model = type(model)(model.config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    rows = tokenizer(CAPTIONS)["input_ids"]
    pixels = torch.randn(len(rows), 3, settings.size, settings.size)
    return model.train(), {"pixel_values": pixels, **pad_captions(rows, tokenizer.pad_token_id, 64)}


def install(model: torch.nn.Module, device: torch.device = CPU) -> torch.nn.Module:
    """As run_clip.py."""
    cpu_patches.apply(layers.install(model), device)
    return model


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss and the gradients of all parameters, one after the other [1 + P]."""
    model.zero_grad()
    loss = model(**batch, return_loss=True).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])


@pytest.mark.parametrize("family", ["dual", "clip"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("depth, activation", [(2, "quick_gelu"), (1, "gelu")])
def test_loss_and_gradients_are_those_of_transformers(family, device, depth, activation):
    """In float64. What is installed for other devices than the CPU ("meta") is run on the CPU here."""
    theirs, batch = tiny(family, depth=depth, activation=activation)
    theirs, batch["pixel_values"] = theirs.double(), batch["pixel_values"].double()
    ours = install(copy.deepcopy(theirs), torch.device(device))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch), rtol=1e-9, atol=1e-13)
    batch["attention_mask"].fill_(1)  # no padding to leave out
    torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch), rtol=1e-9, atol=1e-13)


def test_checkpointed_layers_have_the_same_gradients():
    model, batch = tiny("dual", dropout=0.1)
    install(model)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(gradients(model, batch))
        for tower in (model.vision_model, model.text_model):
            tower.gradient_checkpointing_enable({"use_reentrant": False})  # the name in both pinned transformers
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("place", ["attention.self", "attention.output", "output", "embeddings"])
def test_every_dropout_of_roberta_is_drawn_in_training_alone(place):
    model, batch = tiny("dual")
    install(model)
    for name, module in model.text_model.named_modules():
        if isinstance(module, torch.nn.Dropout) and name.endswith(f"{place}.dropout"):
            module.p = 0.5

    def features() -> torch.Tensor:
        return model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output

    assert not torch.equal(features(), features())
    model.eval()
    assert torch.equal(features(), features())


def test_captions_do_not_see_their_neighbours():
    """A caption alone, without any padding, has the features it has in a batch."""
    model, batch = tiny("dual")
    install(model)
    together = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        alone = model.get_text_features(batch["input_ids"][row : row + 1, :length]).pooler_output
        torch.testing.assert_close(alone[0], together[row])


def test_bf16_without_bf16_instructions_is_as_near_to_fp32_as_autocast(monkeypatch):
    model, batch = tiny("dual")
    exact = gradients(model, batch)
    install(model)
    distance = {}
    for native in (True, False):
        monkeypatch.setattr(cpu_kernels, "has_bf16_instructions", lambda native=native: native)
        with torch.autocast("cpu", torch.bfloat16):
            distance[native] = float((gradients(model, batch) - exact).norm() / exact.norm())
    assert 0 < distance[False] < 1.2 * distance[True] < 0.4  # random features are much alike: small gradients
    assert distance[False] != distance[True]
