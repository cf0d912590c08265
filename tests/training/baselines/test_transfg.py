# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from baselines import TransFGConfig, TransFGForImageClassification, predict
from baselines.transfg import contrastive_loss, overlapping_grid, select_parts
from modeling_mevit.early_exit.cost import relative_cost
from tests.helpers import models
from tests.helpers.random_images import RandomImages


TINY = {**{name: value for name, value in models.TINY.items() if name != "exit_layers"}, "patch_stride": 3}


def tiny_transfg(**settings) -> TransFGForImageClassification:
    """With weights ten times larger than the initial ones, so that heads attend to different patches."""
    torch.manual_seed(0)
    model = TransFGForImageClassification(TransFGConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_attentions(layers: int = 3, tokens: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, tokens, tokens, generator=generator).mul(2).softmax(-1) for _ in range(layers)]


@pytest.mark.parametrize("by", ["row", "matrix_product"])
def test_each_head_selects_the_patch_that_reached_cls_most(by):
    attentions = random_attentions()
    parts = select_parts(attentions, by)
    for sample in range(2):
        for head in range(4):
            first, second, third = (attention[sample, head] for attention in attentions)
            reached = (third @ second @ first)[0]
            assert parts[sample, head] == 1 + reached[1:].argmax()


def test_cls_is_no_part():
    towards_cls = torch.zeros(1, 1, 4, 4)
    towards_cls[..., 0] = 0.9
    towards_cls[..., 2] = 0.1
    assert select_parts([towards_cls, towards_cls], "row").tolist() == [[2]]


def test_the_part_layer_sees_cls_and_the_selected_patches_alone(pixel_values):
    model = tiny_transfg()
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [state.shape[1] for state in outputs.hidden_states] == [26, 26, 26, 26, 5]
    assert len(outputs.attentions) == 3
    parts = select_parts(list(outputs.attentions), "matrix_product")
    assert len(parts.unique()) > 2  # else the choice could not be seen below

    layers = model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
    below = outputs.hidden_states[3]
    for number, sample in enumerate(below):
        rows = sample[[0, *parts[number].tolist()]][None]
        state = model.vit.layernorm(layers[3](rows))[:, 0]
        torch.testing.assert_close(model.classifier(state)[0], outputs.logits[number])


def test_both_ways_to_select_give_the_same_logits(pixel_values):
    published = tiny_transfg(part_selection="matrix_product")
    torch.testing.assert_close(tiny_transfg()(pixel_values).logits, published(pixel_values).logits)


def test_contrastive_loss_is_that_of_a_loop_over_pairs():
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    states[1] = states[0] + 0.1  # similar, of different classes
    labels = torch.tensor([0, 1, 0, 2, 1])
    total = 0.0
    for i in range(5):
        for j in range(5):
            similarity = F.cosine_similarity(states[i], states[j], dim=0).item()
            total += 1 - similarity if labels[i] == labels[j] else max(similarity - 0.4, 0.0)
    assert contrastive_loss(states, labels, 0.4).item() == pytest.approx(total / 25, abs=1e-5)


def test_loss_is_cross_entropy_and_contrast(pixel_values, labels):
    model = tiny_transfg(label_smoothing=0.1)
    outputs = model(pixel_values, labels=labels, output_hidden_states=True)
    state = model.vit.layernorm(outputs.hidden_states[-1][:, 0])
    smoothed = F.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(outputs.loss, smoothed + contrastive_loss(state, labels, 0.4))


def test_every_parameter_gets_a_gradient(pixel_values, labels):
    model = tiny_transfg().train()
    model(pixel_values, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_starts_from_a_vit(tmp_path, pixel_values):
    torch.manual_seed(0)
    shape = {name: value for name, value in TINY.items() if name not in ("patch_stride", "num_labels")}
    vit = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    vit.save_pretrained(tmp_path)
    model = TransFGForImageClassification.from_vit(str(tmp_path), patch_stride=3, num_labels=5)
    assert overlapping_grid(model.config) == (5, 5)
    assert model.vit.embeddings.position_embeddings.shape == (1, 26, 32)
    for name, weight in model.vit.state_dict().items():
        if "position_embeddings" not in name:
            torch.testing.assert_close(weight, vit.state_dict()[name])
    # at a stride of the patch size, patches and their states are the plain ViT's
    plain = TransFGForImageClassification.from_vit(str(tmp_path), patch_stride=4, num_labels=5)
    states = vit(pixel_values, output_hidden_states=True).hidden_states
    for own, theirs in zip(plain(pixel_values, output_hidden_states=True).hidden_states[:-1], states, strict=False):
        torch.testing.assert_close(own, theirs)


def test_saved_and_loaded_by_auto_model(tmp_path, pixel_values):
    model = tiny_transfg()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)


def test_predicts_a_whole_data_set():
    model, dataset = tiny_transfg(), RandomImages(10)
    predictions = predict(model, dataset, batch_size=4)
    with torch.no_grad():
        expected = model(dataset.pixel_values).logits.argmax(-1)
    assert predictions.predictions.tolist() == expected[:, None].tolist()
    assert predictions.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert predictions.exit_layers == [4] and predictions.costs == pytest.approx(
        [relative_cost(type(model), model.config)]
    )


@pytest.mark.slow
def test_costs_what_was_published():
    assert relative_cost(TransFGForImageClassification, TransFGConfig(image_size=448)) == pytest.approx(1.78, abs=5e-3)
    published = TransFGConfig(image_size=448, part_selection="matrix_product")
    assert relative_cost(TransFGForImageClassification, published) == pytest.approx(5.70, abs=6e-3)
    assert overlapping_grid(published) == (37, 37)
    assert relative_cost(ViTForImageClassification, ViTConfig(image_size=448)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"part_selection": "all"}, "part_selection must be one of row, matrix_product, got 'all'"),
        ({"patch_stride": 5}, "patch_stride must be from 1 to patch_size=4, got 5"),
        ({"patch_stride": 0}, "patch_stride must be from 1 to patch_size=4, got 0"),
        ({"num_hidden_layers": 1}, "num_hidden_layers must be 2 or more, got 1"),
        ({"image_size": (16, 24)}, r"image_size must be a whole number, .* got \(16, 24\)"),
        ({"image_size": 3}, "image_size must be at least patch_size=4, got 3"),
        ({"attn_implementation": "sdpa"}, "attn_implementation must be 'eager', .* got 'sdpa'"),
    ],
)
def test_bad_settings_get_a_message(settings, message):
    with pytest.raises(ValueError, match=message):
        TransFGConfig(**{**TINY, **settings})


def test_unknown_fields_are_refused(tmp_path):
    shape = {name: value for name, value in TINY.items() if name not in ("patch_stride", "num_labels")}
    ViTModel(ViTConfig(**shape), add_pooling_layer=False).save_pretrained(tmp_path)
    for name, value in {"stride": 10, "dtype": torch.float16}.items():
        with pytest.raises(ValueError, match=f"TransFGConfig has no field {name}"):
            TransFGForImageClassification.from_vit(str(tmp_path), **{name: value})
