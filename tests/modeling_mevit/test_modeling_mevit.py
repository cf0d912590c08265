# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from transformers import DeiTConfig, DeiTModel, ViTConfig, ViTForImageClassification, ViTModel

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.encoder_layer_mevit import encoder_layers
from modeling_mevit.loss_mevit import cross_entropy, uncertainty_loss, uncertainty_target
from modeling_mevit.modeling_mevit import interpolate_position_embeddings
from tests.helpers.models import TINY, tiny_model


def plain_vit(model: MEViTForImageClassification, **settings) -> ViTForImageClassification:
    """The library's ViT with the weights of the model's backbone and last exit."""
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "image_size", "patch_size", "num_labels")
    values = {name: getattr(model.config, name) for name in names}
    config = ViTConfig(**values, num_hidden_layers=model.config.num_hidden_layers, **settings)
    plain = ViTForImageClassification(config).eval()
    plain.vit.load_state_dict(model.vit.state_dict())
    plain.classifier.load_state_dict(model.exits[str(config.num_hidden_layers)].classifier.state_dict())
    return plain


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    """A float16 checkpoint of a ViT without a head, as pretrained backbones are."""
    torch.manual_seed(0)
    settings = {name: value for name, value in TINY.items() if name not in ("exit_layers", "num_labels")}
    vit = ViTModel(ViTConfig(**settings), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("backbone")
    vit.half().save_pretrained(directory)
    return str(directory)


def test_shapes(model, pixel_values, labels):
    outputs = model(pixel_values, labels)
    assert outputs.loss.shape == ()
    assert outputs.logits.shape == (6, 5)
    assert outputs.exit_logits.shape == (6, 3, 5)
    assert outputs.exit_scores.shape == outputs.exit_uncertainty.shape == (6, 3)
    assert outputs.logits.equal(outputs.exit_logits[:, -1])
    assert outputs.exit_scores.equal(outputs.exit_uncertainty)
    assert model(pixel_values).loss is None
    assert len(model(pixel_values, return_dict=False)) == 4


def test_the_last_exit_is_the_plain_vit(model, pixel_values):
    plain = plain_vit(model)
    torch.testing.assert_close(model(pixel_values).logits, plain(pixel_values).logits, atol=1e-5, rtol=0)


def test_an_early_exit_reads_the_cls_token_of_its_layer(model, pixel_values):
    hidden_state = plain_vit(model).vit(pixel_values, output_hidden_states=True).hidden_states[2][:, 0]
    exit_2 = model.exits["2"]
    expected = exit_2.classifier(
        torch.nn.functional.layer_norm(hidden_state, (32,), exit_2.norm.weight, exit_2.norm.bias, 1e-12)
    )
    torch.testing.assert_close(model(pixel_values).exit_logits[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [True, False])
def test_uncertainty_is_equation_3(pixel_values, share):
    model = tiny_model(share_uncertainty_predictor=share)
    outputs = model(pixel_values)
    for place in range(3):
        weight = model.uncertainty.weight[0 if share else place]
        bias = model.uncertainty.bias[0 if share else place]
        expected = torch.sigmoid(outputs.exit_logits[:, place] @ weight + bias)
        torch.testing.assert_close(outputs.exit_uncertainty[:, place], expected)
    assert model.uncertainty.weight.shape == (1 if share else 3, 5)


@pytest.mark.parametrize("kind", ["distance", "error"])
def test_loss_is_equation_1_summed_over_the_exits(pixel_values, labels, kind):
    model = tiny_model(uncertainty_target=kind)
    outputs = model(pixel_values, labels)
    target = uncertainty_target(outputs.exit_logits, labels, kind)
    expected = cross_entropy(outputs.exit_logits, labels).sum()
    expected += uncertainty_loss(outputs.exit_uncertainty, target).sum()
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_every_parameter_gets_a_gradient(model, pixel_values, labels, checkpointing):
    model.train()
    model(pixel_values, labels).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.ne(0).any() for name, gradient in gradients.items() if "key.bias" not in name)

    if checkpointing is not None:
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model(pixel_values.requires_grad_(), labels).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_the_uncertainty_loss_can_be_kept_from_the_backbone(model, pixel_values, labels):
    def gradients_of_the_uncertainty():
        model.zero_grad()
        outputs = model(pixel_values)
        uncertainty_loss(outputs.exit_uncertainty, uncertainty_target(outputs.exit_logits, labels)).sum().backward()
        moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        return moved

    assert "exits.2.classifier.weight" in gradients_of_the_uncertainty()
    model.uncertainty_reaches_backbone = False
    assert gradients_of_the_uncertainty() == {"uncertainty.weight", "uncertainty.bias"}


def test_hidden_states_are_those_of_the_library(model, pixel_values):
    expected = plain_vit(model)(pixel_values, output_hidden_states=True).hidden_states
    given = model(pixel_values, output_hidden_states=True).hidden_states
    assert len(given) == 5
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert model(pixel_values).hidden_states is None


def test_attentions_are_those_of_the_library_with_eager_attention(pixel_values):
    model = tiny_model(attn_implementation="eager")
    expected = plain_vit(model, attn_implementation="eager")(pixel_values, output_attentions=True).attentions
    given = model(pixel_values, output_attentions=True).attentions
    assert given[0].shape == (6, 4, 17, 17)
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert model(pixel_values).attentions is None
    with pytest.raises(ValueError, match="doesn't match model"):
        model(pixel_values[..., :12], output_attentions=True)
    assert not any(module._forward_hooks for module in model.modules())


def test_attentions_need_eager_attention(model, pixel_values):
    with pytest.raises(ValueError, match="output_attentions=True needs attn_implementation='eager'.*'sdpa'"):
        model(pixel_values, output_attentions=True)


def test_sdpa_and_eager_attention_agree(model, pixel_values):
    eager = tiny_model(attn_implementation="eager")
    assert model.config._attn_implementation == "sdpa"
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(pixel_values).exit_logits, eager(pixel_values).exit_logits, atol=1e-5, rtol=0)


def test_compiles_into_one_graph(model, pixel_values, labels):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(pixel_values, labels)
    given = compiled(pixel_values, labels)
    torch.testing.assert_close(given.exit_logits, expected.exit_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(given.loss, expected.loss)


def test_bfloat16(model, pixel_values, labels):
    expected = model(pixel_values).exit_logits
    outputs = model.bfloat16()(pixel_values, labels)
    assert outputs.exit_logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == outputs.exit_scores.dtype == torch.float32
    assert (outputs.exit_logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    outputs.loss.backward()


def test_images_need_not_be_square():
    model = tiny_model(image_size=[16, 24])
    pixel_values = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(model(pixel_values).logits, plain_vit(model)(pixel_values).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"\(16\*16\) doesn't match model \(16\*24\)"):
        model(torch.randn(2, 3, 16, 16))


def test_position_embeddings_can_be_interpolated_at_run_time(model):
    pixel_values = torch.randn(2, 3, 24, 32)
    expected = plain_vit(model)(pixel_values, interpolate_pos_encoding=True).logits
    given = model(pixel_values, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"needs position embeddings of a square grid; .*image_size=\[16, 24\]"):
        tiny_model(image_size=[16, 24])(pixel_values, interpolate_pos_encoding=True)


def test_interpolation_is_the_librarys(backbone):
    vit = ViTModel.from_pretrained(backbone, dtype=torch.float32, add_pooling_layer=False)
    positions = vit.embeddings.position_embeddings
    expected = vit.embeddings.interpolate_pos_encoding(torch.empty(1, 1 + 5 * 8, 32), 20, 32)
    torch.testing.assert_close(interpolate_position_embeddings(positions, (4, 4), (5, 8)), expected)
    assert interpolate_position_embeddings(positions, (4, 4), (4, 4)) is positions


def test_from_vit_takes_the_backbone_in_float32(backbone, pixel_values):
    model = MEViTForImageClassification.from_vit(backbone, num_labels=5, exit_layers=[1, 4]).eval()
    vit = ViTModel.from_pretrained(backbone, dtype=torch.float32, add_pooling_layer=False).eval()
    assert model.dtype == torch.float32
    assert model.config.exit_layers == [1, 4]
    assert model.config.num_labels == 5
    expected = model.exits["4"].classifier(vit(pixel_values).last_hidden_state[:, 0])
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)
    for name, value in vit.layernorm.state_dict().items():
        assert model.exits["1"].norm.state_dict()[name].equal(value)
    assert not MEViTForImageClassification.from_vit(backbone).training
    for dtype in (torch.bfloat16, "bfloat16"):
        assert MEViTForImageClassification.from_vit(backbone, dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layer": [4]}, "exit_layer is no field of MEViTConfig"),
        ({"num_hidden_layers": 6}, "num_hidden_layers=6 does not fit .*, whose num_hidden_layers is 4"),
        ({"patch_size": 8}, "patch_size=8 does not fit .*, whose patch_size is 4"),
        ({"image_size": 18}, "image_size=18 cannot be cut into patches"),
        ({"exit_layers": [2, 5]}, r"exit_layers=\[2, 5\] is out of range"),
    ],
)
def test_from_vit_refuses_what_does_not_fit_the_backbone(backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        MEViTForImageClassification.from_vit(backbone, **settings)


@pytest.mark.parametrize("image_size", [8, 32, [16, 24]])
def test_from_vit_interpolates_to_another_image_size(backbone, image_size):
    model = MEViTForImageClassification.from_vit(backbone, image_size=image_size).eval()
    vit = ViTModel.from_pretrained(backbone, dtype=torch.float32, add_pooling_layer=False).eval()
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    pixel_values = torch.randn(2, 3, height, width)
    expected = vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    given = model.vit.layernorm(model(pixel_values, output_hidden_states=True).hidden_states[-1])
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def test_from_vit_takes_a_checkpoint_with_a_head_and_keeps_its_labels(tmp_path, model, pixel_values):
    plain = plain_vit(model)
    plain.config.id2label = {label: f"kind {label}" for label in range(5)}
    plain.save_pretrained(tmp_path)
    loaded = MEViTForImageClassification.from_vit(tmp_path).eval()
    assert loaded.config.id2label[3] == "kind 3"
    expected = model(pixel_values, output_hidden_states=True).hidden_states[-1]
    given = loaded(pixel_values, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert MEViTForImageClassification.from_vit(tmp_path, num_labels=3).config.num_labels == 3


def test_from_vit_refuses_another_kind_of_checkpoint(tmp_path):
    DeiTModel(DeiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"holds a model of type 'deit'; from_vit starts from type 'vit'"):
        MEViTForImageClassification.from_vit(tmp_path)


def test_from_pretrained_refuses_another_kind_of_checkpoint(tmp_path, model, backbone):
    with pytest.raises(ValueError, match=r"holds a model of type 'vit' \(from_vit reads it\)"):
        MEViTForImageClassification.from_pretrained(backbone)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of type 'mevit' \(from_pretrained reads it\)"):
        MEViTForImageClassification.from_vit(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False would unpickle weights"):
        MEViTForImageClassification.from_pretrained(tmp_path, use_safetensors=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layers": [2, 9]}, "is out of range for 4 encoder layers"),
        ({"exit_layers": [3, 2]}, "is unsorted"),
        ({"num_hidden_layers": 3}, "is out of range for 3 encoder layers"),
        ({"image_size": 18}, "image_size=18 cannot be cut"),
        ({"exit_policy": "luck"}, "exit_policy='luck' is unknown"),
    ],
)
def test_fields_given_while_loading_are_checked_too(tmp_path, model, settings, message):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MEViTForImageClassification.from_pretrained(tmp_path, **settings)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path, exit_policy="margin")
    assert loaded.config.exit_policy == "margin"


def test_from_vit_refuses_a_checkpoint_that_lacks_weights(tmp_path, model):
    plain = plain_vit(model)
    weights = plain.state_dict()
    first_weight = next(name for name in weights if "layernorm_after" in name)
    del weights[first_weight]
    plain.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks weights of the backbone: .*layernorm_after"):
        MEViTForImageClassification.from_vit(tmp_path)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("exit_layer", [2, 3, 4])
def test_a_truncated_model_is_the_exit(tmp_path, pixel_values, exit_layer, share):
    model = tiny_model(share_uncertainty_predictor=share)
    before = copy.deepcopy(model.state_dict())
    small = model.truncate(exit_layer)
    full, cut = model(pixel_values), small(pixel_values)
    place = model.config.exit_layers.index(exit_layer)
    torch.testing.assert_close(cut.logits, full.exit_logits[:, place], atol=1e-5, rtol=0)
    torch.testing.assert_close(cut.exit_scores[:, 0], full.exit_scores[:, place], atol=1e-5, rtol=0)
    assert len(encoder_layers(small.vit)) == small.config.num_hidden_layers == exit_layer

    small.save_pretrained(tmp_path)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixel_values).logits, cut.logits)

    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert model.config.exit_layers == [2, 3, 4]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_truncating_where_there_is_no_exit_is_refused(model):
    with pytest.raises(ValueError, match=r"exit_layer=1 is no exit of this model; it has \[2, 3, 4\]"):
        model.truncate(1)


def test_one_exit_on_the_last_layer(pixel_values, labels):
    model = tiny_model(exit_layers=[4])
    assert model(pixel_values, labels).exit_logits.shape == (6, 1, 5)
    assert not any("norm" in name for name in model.exits.state_dict())


def test_no_name_collides_with_what_transformers_5_renames(model):
    renamed = ("layers.", "encoder.layer", "_proj", "mlp.fc", "attention.", "intermediate.dense", "output.dense")
    own = [name for name, _ in model.named_parameters() if not name.startswith("vit.")]
    assert not [name for name in own if any(part in name for part in renamed)]
    assert {name.split(".")[0] for name in own} == {"exits", "uncertainty"}


def test_a_label_out_of_range_is_refused(model, pixel_values):
    with pytest.raises(ValueError, match="labels go from 0 to 5; allowed are 0 to 4"):
        model(pixel_values, torch.tensor([0, 1, 2, 3, 4, 5]))


def test_the_default_config_makes_the_papers_model():
    with torch.device("meta"):
        model = MEViTForImageClassification(MEViTConfig())
    assert list(model.exits) == ["6", "7", "8", "9", "10", "11", "12"]


def test_a_new_predictor_on_probabilities_finds_the_sure_less_uncertain():
    config = MEViTConfig(**{**TINY, "uncertainty_input": "probabilities"})
    predictor = MEViTForImageClassification(config).uncertainty
    largest = torch.tensor([0.3, 0.5, 0.7, 0.9, 0.999])
    others = (1 - largest)[:, None].expand(-1, 4) / 4
    logits = torch.cat((others, largest[:, None]), dim=1).log()[:, None]  # (5, 1, L)
    uncertainty = predictor(torch.zeros(5, 1, 32), logits)[:, 0]
    assert (uncertainty.diff() < -0.04).all()
    assert uncertainty[0] > 0.65 and uncertainty[-1] < 0.15


def test_a_loaded_predictor_is_as_it_was_saved(tmp_path):
    model = tiny_model(uncertainty_input="probabilities")
    model.save_pretrained(tmp_path)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.uncertainty.weight, model.uncertainty.weight, rtol=0, atol=0)
    torch.testing.assert_close(loaded.uncertainty.bias, model.uncertainty.bias, rtol=0, atol=0)
