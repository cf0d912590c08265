# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.exit_initialization import standardize_exits
from modeling_mevit.vit_backbone_mevit import interpolate_position_embeddings, patch_grid, to_2tuple
from tests.helpers.models import tiny_model


# every setting differs from the default of a ViT, so that one that is forgotten shows
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-3,
    "hidden_dropout_prob": 0.25,
    "attention_probs_dropout_prob": 0.125,
    "initializer_range": 0.03,
}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 16,
}
TYPES = {
    "vit": (ViTForImageClassification, ViTConfig, {"intermediate_size": 64}),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, {"mlp_ratio": 2, "drop_path_rate": 0.5}),
    "vit_mae": (ViTMAEForPreTraining, ViTMAEConfig, {"intermediate_size": 64, "mask_ratio": 0.75, **DECODER}),
    "vit_msn": (ViTMSNForImageClassification, ViTMSNConfig, {"intermediate_size": 64}),
}
every_type = pytest.mark.parametrize("model_type", TYPES)
from_vit = MEViTForImageClassification.from_vit


@torch.no_grad()
def own_model(model_type, **settings):
    """A model of Transformers with a head, none of whose weights is what it starts as."""
    model_class, config_class, own_settings = TYPES[model_type]
    torch.manual_seed(0)
    model = model_class(config_class(**{**COMMON, **LABELS, **own_settings, **settings})).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (1 if "lambda1" in name else 0.2))
    return model


@torch.no_grad()
def own_states(backbone, pixel_values):
    """Hidden states, and the normalised [CLS] state, of a model of Transformers for images of any size."""
    arguments = {}
    if backbone.config.model_type != "dinov2":  # DINOv2 interpolates unasked
        arguments["interpolate_pos_encoding"] = True
    if isinstance(backbone, ViTMAEModel):
        backbone.config.mask_ratio = 0.0
        num_patches = pixel_values[0, 0].numel() // 16
        arguments["noise"] = torch.arange(num_patches).expand(len(pixel_values), -1)  # keeps the order of patches
    outputs = backbone(pixel_values, output_hidden_states=True, **arguments)
    return outputs.hidden_states, outputs.last_hidden_state[:, 0]


@torch.no_grad()
def assert_states_equal(model, backbone, pixel_values):
    expected_states, expected_cls = own_states(backbone, pixel_values)
    states = model(pixel_values, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, expected_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.vit.layernorm(states[-1][:, 0]), expected_cls, atol=1e-5, rtol=1e-5)


@every_type
@pytest.mark.parametrize("has_head", [True, False])
def test_states_are_those_of_the_checkpoints_own_model(tmp_path, pixel_values, model_type, has_head):
    own = own_model(model_type)
    (own if has_head else own.base_model).save_pretrained(tmp_path)
    model = from_vit(tmp_path, num_labels=5, exit_layers=[1, 3])
    assert not model.training
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_states_equal(model, own.base_model, pixel_values)
    for name, value in own.base_model.layernorm.state_dict().items():
        assert model.exits["1"].norm.state_dict()[name].equal(value)


@every_type
def test_the_config_has_all_settings_of_the_backbone_and_nothing_else(tmp_path, model_type):
    own_model(model_type, problem_type="multi_label_classification").save_pretrained(tmp_path)
    config = from_vit(tmp_path).config
    for name, value in {**COMMON, "intermediate_size": 64, "qkv_bias": True}.items():
        assert getattr(config, name) == value, name
    assert config.model_type == "mevit"
    assert config.problem_type is None
    assert config.to_dict().keys() - {"dtype"} == MEViTConfig().to_dict().keys() - {"dtype"}


@every_type
def test_queries_keys_and_values_without_bias(tmp_path, pixel_values, model_type):
    own = own_model(model_type, qkv_bias=False)
    own.save_pretrained(tmp_path)
    model = from_vit(tmp_path)
    assert model.config.qkv_bias is False
    assert_states_equal(model, own.base_model, pixel_values)


@every_type
@pytest.mark.parametrize("image_size", [8, 32, (16, 24)])
def test_another_image_size_interpolates_as_the_checkpoints_own_model_does(tmp_path, model_type, image_size):
    own = own_model(model_type)
    own.save_pretrained(tmp_path)
    model = from_vit(tmp_path, image_size=image_size)
    pixel_values = torch.randn(2, 3, *to_2tuple(image_size))
    assert patch_grid(model.config) == (pixel_values.shape[2] // 4, pixel_values.shape[3] // 4)
    assert_states_equal(model, own.base_model, pixel_values)


def test_interpolation_keeps_cls_and_an_equal_grid():
    embeddings = torch.randn(1, 1 + 4 * 4, 8)
    assert interpolate_position_embeddings(embeddings, (4, 4), (4, 4)) is embeddings
    interpolated = interpolate_position_embeddings(embeddings, (4, 4), (3, 6))
    assert interpolated.shape == (1, 1 + 3 * 6, 8)
    assert interpolated[:, 0].equal(embeddings[:, 0])


def test_a_grid_that_is_not_square_is_interpolated_by_rows_and_columns(tmp_path):
    own = own_model("vit", image_size=[8, 24])
    with torch.no_grad():
        own.vit.embeddings.position_embeddings[0, 1:] = torch.randn(6, 32).repeat(2, 1)  # both rows are equal
    own.save_pretrained(tmp_path)
    model = from_vit(tmp_path, image_size=(16, 32))
    positions = model.vit.embeddings.position_embeddings[0, 1:].unflatten(0, (4, 8))
    torch.testing.assert_close(positions, positions[:1].expand(4, 8, 32))
    assert not torch.allclose(positions[:, 0], positions[:, 7])


@every_type
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_read_in_float32(tmp_path, pixel_values, model_type, dtype):
    own = own_model(model_type).to(dtype)
    own.save_pretrained(tmp_path)
    assert_states_equal(from_vit(tmp_path), own.float().base_model, pixel_values)


def test_the_dtype_can_be_chosen(tmp_path):
    own_model("dinov2").save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, "bfloat16"):
        assert from_vit(tmp_path, dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", ["vit", "dinov2", "vit_msn"])
def test_labels_are_the_checkpoints_unless_others_are_given(tmp_path, model_type):
    own_model(model_type).save_pretrained(tmp_path)
    assert from_vit(tmp_path).config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    assert from_vit(tmp_path, num_labels=3).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    given = from_vit(tmp_path, id2label={0: "ant", 1: "bee"}, label2id={"ant": 0, "bee": 1}).config
    assert (given.num_labels, given.id2label[1], given.label2id["bee"]) == (2, "bee", 1)


def test_registers_are_refused(tmp_path):
    settings = {**COMMON, "mlp_ratio": 2, "num_register_tokens": 2}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings)).save_pretrained(tmp_path)
    message = (
        r"must be one of 'vit', 'mevit', 'dinov2', 'vit_mae', 'vit_msn'; "
        r"got 'dinov2_with_registers', whose register tokens have no place in a ViT\.$"
    )
    with pytest.raises(ValueError, match=message):
        from_vit(tmp_path)


def test_swiglu_is_refused(tmp_path):
    own_model("dinov2", use_swiglu_ffn=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_swiglu_ffn of .* must be False, .*; got True"):
        from_vit(tmp_path)


def test_another_type_is_refused(tmp_path):
    DeiTModel(DeiTConfig(**COMMON, intermediate_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type of .* must be one of 'vit', .*, 'vit_msn'; got 'deit'\.$"):
        from_vit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    with pytest.raises(ValueError, match=r"; got None\.$"):
        from_vit(tmp_path)


def test_a_mevit_with_several_exits_is_refused_with_a_hint(tmp_path, model):
    model.save_pretrained(tmp_path)
    message = (
        r"must have one exit, got .* with exits on \[2, 3, 4\]; MEViTForImageClassification.from_pretrained reads"
    )
    with pytest.raises(ValueError, match=message):
        from_vit(tmp_path)


@pytest.fixture(params=["vit", "mevit"])
def fine_tuned(request, tmp_path):
    """A plain ViT, and its checkpoint, as Transformers or as this package saves it."""
    own = tiny_model(seed=1, num_labels=3, exit_layers=[4], layer_norm_eps=1e-3, **LABELS)
    plain = own.to_vit()
    (own if request.param == "mevit" else plain).save_pretrained(tmp_path)
    return plain, tmp_path


@torch.no_grad()
def test_the_last_exit_starts_as_the_fine_tuned_vit_and_stays_so_when_exits_are_standardised(fine_tuned, pixel_values):
    plain, checkpoint = fine_tuned
    for settings in ({}, {"id2label": LABELS["id2label"], "label2id": LABELS["label2id"]}):
        model = from_vit(checkpoint, exit_layers=[2, 3, 4], **settings)
        expected = plain(pixel_values).logits
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)
        early = model(pixel_values).exit_logits[:, 0]
        standardize_exits(model, [torch.randn(8, 3, 16, 16)])
        outputs = model(pixel_values)
        torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(outputs.exit_logits[:, 0], early)
        assert_states_equal(model, plain.vit, pixel_values)


def test_a_training_of_the_plain_vit_can_go_on_from_it(fine_tuned, pixel_values):
    plain, checkpoint = fine_tuned
    model = from_vit(checkpoint, exit_layers=[4])
    standardize_exits(model, [torch.randn(8, 3, 16, 16)])
    torch.testing.assert_close(model(pixel_values).logits, plain(pixel_values).logits, atol=1e-5, rtol=0)


def test_images_that_trained_the_checkpoint_count_as_images_that_trained_the_model(tmp_path):
    tiny_model(exit_layers=[4], training_images="AAAAAAAA").save_pretrained(tmp_path)
    assert from_vit(tmp_path).config.training_images == "AAAAAAAA"


@pytest.mark.parametrize("id2label", [{0: "dog", 1: "cat", 2: "owl"}, {0: "cat", 1: "dog"}])
def test_a_classifier_of_other_labels_is_not_taken(fine_tuned, pixel_values, id2label):
    plain, checkpoint = fine_tuned
    random_state = torch.get_rng_state()
    model = from_vit(checkpoint, id2label=id2label, exit_layers=[2, 4])
    torch.set_rng_state(random_state)
    again = from_vit(checkpoint, id2label=id2label, exit_layers=[2, 4])
    classifier = model.exits["4"].classifier
    assert classifier.weight.equal(again.exits["4"].classifier.weight)
    assert classifier.weight.std() < 0.03 < plain.classifier.weight.std()  # new
    assert not model.starts_with_classifier


@pytest.mark.parametrize("kind", ["vit", "mevit"])
def test_placeholders_do_not_tell_that_labels_are_the_same(tmp_path, kind):
    own = tiny_model(num_labels=3, exit_layers=[4])  # LABEL_0, LABEL_1, LABEL_2
    (own if kind == "mevit" else own.to_vit()).save_pretrained(tmp_path)
    assert from_vit(tmp_path).starts_with_classifier
    for settings in ({"num_labels": 3}, {"id2label": own.config.id2label}):
        model = from_vit(tmp_path, **settings)
        assert not model.starts_with_classifier
        assert model.exits["4"].classifier.weight.std() < 0.03 < own.exits["4"].classifier.weight.std()  # new


def test_a_vit_without_a_classifier_starts_with_a_new_one(tmp_path, pixel_values):
    own = own_model("vit")
    own.vit.save_pretrained(tmp_path)
    model = from_vit(tmp_path)
    assert_states_equal(model, own.vit, pixel_values)
    assert not model.starts_with_classifier


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layer": [3]}, "MEViTConfig has no field exit_layer"),
        ({"mlp_ratio": 2}, "MEViTConfig has no field mlp_ratio"),
        ({"num_hidden_layers": 6}, "num_hidden_layers must be 3, as in .*, got 6"),
        ({"intermediate_size": 128}, "intermediate_size must be 64, as in .*, got 128"),
        ({"patch_size": 8}, "patch_size must be 4, as in .*, got 8"),
        ({"image_size": 18}, "image_size must be a positive multiple of patch_size=4, got 18"),
        ({"exit_layers": [2, 5]}, "exit_layers must be .* from 1 to 3"),
    ],
)
def test_settings_that_need_another_backbone_are_refused(tmp_path, settings, message):
    own_model("dinov2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_vit(tmp_path, **settings)


@pytest.mark.parametrize(
    ("model_type", "lost"),
    [
        ("vit", "embeddings.position_embeddings"),
        ("dinov2", "encoder.layer.1.layer_scale2.lambda1"),
        ("vit_mae", "embeddings.position_embeddings"),
        ("vit_msn", "layernorm.bias"),
    ],
)
def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, model_type, lost):
    own_model(model_type).base_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks weights of the backbone: {lost}\."):
        from_vit(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    own = own_model("dinov2")
    own.config.save_pretrained(tmp_path)
    torch.save(own.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        from_vit(tmp_path)
