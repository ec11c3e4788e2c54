"""`model.initial_attention=neighbours`: every head looks at its neighbour before the first update."""

import pytest
import torch

from data2vec import build_model

VOCAB, PLACES = 100, 16


def small(**changes):
    encoder = {"embed_dim": 128, "ffn_embed_dim": 256, "layers": 2, "attention_heads": 4, "learned_pos": True}
    transformer = {"max_source_positions": 32, "dropout": 0.0, "encoder": encoder} | changes
    torch.manual_seed(0)
    start = {"initial_attention": "neighbours", "init_std": 0.06}
    return build_model({**start, "average_top_k_layers": 2, "transformer": transformer}, VOCAB).eval()


@torch.no_grad()
def test_each_head_of_each_layer_attends_to_its_neighbour():
    seen = []

    def weights(query, key, value, key_mask, dropout):
        assert key_mask is None
        seen.append((query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(dim=3))  # [B, H, T, T]
        return seen[-1] @ value

    encoder = small().encoder.student
    for layer in encoder.layers:
        layer.self_attn.attend = weights
    encoder(torch.randint(4, VOCAB, (32, PLACES)), has_padding=False)
    assert len(seen) == 2
    for attention in seen:
        for head, offset in enumerate((-1, 1, -2, 2)):
            share = attention[:, head].mean(dim=0).diagonal(offset)  # [T - |offset|]
            assert share.mean() > 0.5, (head, offset)  # an even look would be 1 / 16


def test_the_pad_has_no_place_and_the_teacher_starts_alike():
    model = small()
    student, teacher = model.encoder.student, model.encoder.make_teacher()
    assert not student.embed_positions.weight[student.config.pad_index].any()
    torch.testing.assert_close(teacher.layers[0].self_attn.q_proj.weight, student.layers[0].self_attn.q_proj.weight)


def test_more_places_than_the_heads_tell_apart_are_refused():
    with pytest.raises(ValueError, match="tells 32 places apart.*max_source_positions=64: take fewer"):
        small(max_source_positions=64)
    with pytest.raises(ValueError, match="initial_attention=neighbors: choose one of random, neighbours"):
        build_model({"initial_attention": "neighbors", "average_top_k_layers": 1}, VOCAB)
