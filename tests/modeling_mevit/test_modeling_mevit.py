# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.configuration_mevit import promise_digest
from modeling_mevit.encoder_layer_mevit import encoder_layers
from modeling_mevit.exit_policy_mevit import EXIT_POLICIES, combine_exits, exit_scores
from modeling_mevit.loss_mevit import cross_entropy, uncertainty_loss, uncertainty_target
from modeling_mevit.modeling_mevit import weights_digest
from tests.helpers.models import TINY, tiny_model


def reference_vit(model: MEViTForImageClassification, **settings) -> ViTForImageClassification:
    """Transformers' ViT with the weights of the model's backbone and last exit, built without the model's help."""
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "image_size", "patch_size", "num_labels")
    values = {name: getattr(model.config, name) for name in names}
    config = ViTConfig(**values, num_hidden_layers=model.config.num_hidden_layers, **settings)
    plain = ViTForImageClassification(config).eval()
    plain.vit.load_state_dict(model.vit.state_dict())
    plain.classifier.load_state_dict(model.exits[str(config.num_hidden_layers)].classifier.state_dict())
    return plain


def test_shapes(model, pixel_values, labels):
    outputs = model(pixel_values, labels)
    assert outputs.loss.shape == ()
    assert outputs.logits.shape == (6, 5)
    assert outputs.exit_logits.shape == (6, 3, 5)
    assert outputs.exit_scores.shape == outputs.exit_uncertainty.shape == (6, 3)
    assert outputs.logits.equal(outputs.exit_logits[:, -1])
    assert outputs.exit_scores.equal(outputs.exit_uncertainty)
    assert model(pixel_values).loss is None


def test_the_last_exit_is_the_reference_vit(model, pixel_values):
    plain = reference_vit(model)
    torch.testing.assert_close(model(pixel_values).logits, plain(pixel_values).logits, atol=1e-5, rtol=0)


def test_an_early_exit_reads_the_cls_token_of_its_layer(model, pixel_values):
    hidden_state = reference_vit(model).vit(pixel_values, output_hidden_states=True).hidden_states[2][:, 0]
    exit_2 = model.exits["2"]
    expected = exit_2.classifier(
        torch.nn.functional.layer_norm(hidden_state, (32,), exit_2.norm.weight, exit_2.norm.bias, 1e-12)
    )
    torch.testing.assert_close(model(pixel_values).exit_logits[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_uncertainty_is_equation_3_with_one_predictor(pixel_values, kind):
    model = tiny_model(uncertainty_input=kind)
    outputs = model(pixel_values)
    weight, bias = model.uncertainty.weight, model.uncertainty.bias
    assert weight.shape == (1, 5) and bias.shape == (1,)
    features = outputs.exit_logits
    if kind == "probabilities":
        features = features.softmax(-1).sort(-1, descending=True).values
    torch.testing.assert_close(outputs.exit_uncertainty, torch.sigmoid(features @ weight[0] + bias))


def test_loss_is_equation_1_summed_over_the_exits(model, pixel_values, labels):
    outputs = model(pixel_values, labels)
    expected = cross_entropy(outputs.exit_logits, labels).sum()
    expected += uncertainty_loss(outputs.exit_uncertainty, uncertainty_target(outputs.exit_logits, labels)).sum()
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


def test_hidden_states_are_those_of_transformers(model, pixel_values):
    expected = reference_vit(model)(pixel_values, output_hidden_states=True).hidden_states
    given = model(pixel_values, output_hidden_states=True).hidden_states
    assert len(given) == 5
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert model(pixel_values).hidden_states is None


def test_attentions_are_those_of_transformers_with_eager_attention(pixel_values):
    model = tiny_model(attn_implementation="eager")
    expected = reference_vit(model, attn_implementation="eager")(pixel_values, output_attentions=True).attentions
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


@pytest.mark.slow
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
    torch.testing.assert_close(
        model(pixel_values).logits, reference_vit(model)(pixel_values).logits, atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match=r"\(16\*16\) doesn't match model \(16\*24\)"):
        model(torch.randn(2, 3, 16, 16))


def test_position_embeddings_can_be_interpolated_at_run_time(model):
    pixel_values = torch.randn(2, 3, 24, 32)
    expected = reference_vit(model)(pixel_values, interpolate_pos_encoding=True).logits
    given = model(pixel_values, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"needs position embeddings of a square grid; .*image_size=\[16, 24\]"):
        tiny_model(image_size=[16, 24])(pixel_values, interpolate_pos_encoding=True)


def test_from_pretrained_refuses_another_kind_of_checkpoint(tmp_path, model):
    reference_vit(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be 'mevit', got 'vit'; MEViTForImageClassification\.from_vit starts"):
        MEViTForImageClassification.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors must be True, got False"):
        MEViTForImageClassification.from_pretrained(tmp_path, use_safetensors=False)
    for use_safetensors in (True, None):
        MEViTForImageClassification.from_pretrained(tmp_path, use_safetensors=use_safetensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layers": [2, 9]}, r"exit_layers must be .* got \[2, 9\]"),
        ({"num_hidden_layers": 3}, r"exit_layers must be .* from 1 to 3.* got \[2, 3, 4\]"),
        ({"image_size": 18}, "image_size must be a positive multiple"),
        ({"exit_policy": "luck"}, "exit_policy must be one of"),
        ({"problem_type": "multi_label_classification"}, "problem_type must be one of"),
    ],
)
def test_fields_given_while_loading_are_checked_too(tmp_path, model, settings, message):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MEViTForImageClassification.from_pretrained(tmp_path, **settings)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path, exit_policy="margin")
    assert loaded.config.exit_policy == "margin"


@pytest.mark.parametrize("exit_layer", [2, 3, 4])
def test_a_truncated_model_is_the_exit(tmp_path, pixel_values, exit_layer):
    model = tiny_model(attn_implementation="eager").bfloat16()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    small = model.truncate(exit_layer)
    assert torch.get_rng_state().equal(random_state)
    full, cut = model(pixel_values), small(pixel_values)
    place = model.config.exit_layers.index(exit_layer)
    torch.testing.assert_close(cut.logits, full.exit_logits[:, place], atol=0.05, rtol=0.02)
    torch.testing.assert_close(cut.exit_scores[:, 0], full.exit_scores[:, place], atol=0.02, rtol=0)
    assert len(encoder_layers(small.vit)) == small.config.num_hidden_layers == exit_layer
    assert small.dtype == torch.bfloat16 and small.config._attn_implementation == "eager" and not small.training
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert model.train().truncate(exit_layer).training

    small.save_pretrained(tmp_path)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    torch.testing.assert_close(loaded(pixel_values).logits, cut.logits)

    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert model.config.exit_layers == [2, 3, 4]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


class NewMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operators make."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        outputs = operator(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)}
        is_new = isinstance(outputs, torch.Tensor) and outputs.untyped_storage()._cdata not in given
        self.bytes += outputs.nbytes if is_new and not outputs.is_meta else 0
        return outputs


def test_truncating_copies_what_it_keeps_and_no_more(model):
    with NewMemory() as memory:
        small = model.truncate(2)
    copies = {parameter.data_ptr(): parameter.nbytes for parameter in small.parameters()}
    assert not copies.keys() & {parameter.data_ptr() for parameter in model.parameters()}
    assert memory.bytes == sum(copies.values()) < 0.6 * sum(parameter.nbytes for parameter in model.parameters())


def test_a_truncated_model_can_share_its_weights(model, pixel_values):
    with NewMemory() as memory:
        small = model.truncate(2, copy=False)
    assert memory.bytes == 0
    assert {one.data_ptr() for one in small.parameters()} < {one.data_ptr() for one in model.parameters()}
    torch.testing.assert_close(small(pixel_values).logits, model(pixel_values).exit_logits[:, 0])


def test_truncating_where_there_is_no_exit_is_refused(model):
    with pytest.raises(ValueError, match=r"layer 1 has no exit; the model has exits on \[2, 3, 4\]"):
        model.truncate(1)


def test_to_vit_is_the_plain_vit_on_the_same_weights(tmp_path, pixel_values):
    model = tiny_model(id2label={label: f"kind {label}" for label in range(5)}, attn_implementation="eager")
    plain = model.to_vit()
    assert type(plain) is ViTForImageClassification and plain.config.model_type == "vit"
    assert plain.config.id2label[3] == "kind 3" and plain.config._attn_implementation == "eager"
    assert not plain.training and model.train().to_vit().training
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in own for parameter in plain.parameters())
    expected = model.eval()(pixel_values).logits
    torch.testing.assert_close(plain.eval()(pixel_values).logits, expected, atol=1e-5, rtol=0)
    plain.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixel_values).logits, expected, atol=1e-5, rtol=0)


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
    with pytest.raises(ValueError, match="labels must be from 0 to 4, .*; got 0 to 5"):
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
    uncertainty = predictor(logits)[:, 0]
    assert (uncertainty.diff() < -0.04).all()
    assert uncertainty[0] > 0.65 and uncertainty[-1] < 0.15


def test_a_loaded_predictor_is_as_it_was_saved(tmp_path):
    model = tiny_model(uncertainty_input="probabilities")
    model.save_pretrained(tmp_path)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.uncertainty.weight, model.uncertainty.weight, rtol=0, atol=0)
    torch.testing.assert_close(loaded.uncertainty.bias, model.uncertainty.bias, rtol=0, atol=0)


CERTIFIED = {"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": "harm"}


def certified_model(target: dict = CERTIFIED, dtype: torch.dtype = torch.float32) -> MEViTForImageClassification:
    """A model with a certificate, and weights that are the same in every version of torch."""
    model = MEViTForImageClassification(MEViTConfig(**TINY, exit_policy="margin", exit_thresholds=0.5)).eval()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(weights_on_disk(model).items())):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) % 7 * 0.0625 - number * 0.015625)
    model.to(dtype)
    model.config.early_exit = True
    model.config.calibration = {
        "target": dict(target),
        "operating_point": {"policy": "margin", "thresholds": [0.5, 0.5]},
        "data": None,
        "made_for": model.made_for(),
    }
    model.config.calibration["made_for"]["promise"] = promise_digest(model.config.calibration)
    return model


def weights_on_disk(model: MEViTForImageClassification) -> dict[str, torch.Tensor]:
    """The model's weights under the names of files, which Transformers 5 changes in memory."""
    names = {
        "vit.layers.": "vit.encoder.layer.",
        "attention.o_proj": "attention.output.dense",
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    weights = {}
    for name, parameter in model.named_parameters():
        for here, there in names.items():
            name = name.replace(here, there)
        weights[name] = parameter
    return weights


def test_a_certificate_holds_while_nothing_changes(tmp_path):
    model = certified_model()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert model.certificate == CERTIFIED
        assert MEViTForImageClassification.from_pretrained(tmp_path).certificate == CERTIFIED
    # of both major versions of Transformers, and of every other
    assert model.made_for()["weights"] == "08a2bb0abe2aec79"
    assert weights_digest(load_file(tmp_path / "model.safetensors").items()) == "08a2bb0abe2aec79"
    assert tiny_model().certificate is None


@pytest.mark.parametrize(
    "target",
    [
        {"max_disagreement": 0.01, "confidence": 0.95, "guarantee": "probability"},
        {"max_accuracy_drop": 0.01, "guarantee": "expectation"},
    ],
)
def test_every_guarantee_is_a_certificate(target):
    model = certified_model(target)
    assert model.certificate == target
    change_a_weight(model)
    with pytest.warns(UserWarning, match="the certificate of early exit is gone"):
        assert model.certificate is None
    model.config.calibration["target"] = {"max_disagreement": 0.01}
    assert model.certificate is None


def change_a_weight(model):
    with torch.no_grad():
        next(model.exits["2"].parameters())[0] += 1e-3


def swap_layers(model):
    layers = encoder_layers(model.vit)
    first, second = layers[1].state_dict(), copy.deepcopy(layers[2].state_dict())
    layers[2].load_state_dict(first)
    layers[1].load_state_dict(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.config, "exit_thresholds", [0.5, 0.6]), r"exit_thresholds are \[0.5, 0.6\], not"),
        (lambda model: setattr(model.config, "exit_policy", "entropy"), "exit_policy is 'entropy', not 'margin'"),
        (
            lambda model: setattr(model.config, "exit_combination", "mean"),
            "exit_combination is 'mean', not 'none'",
        ),
        (lambda model: model.to(torch.bfloat16), "the precision is bfloat16, not float32"),
        (change_a_weight, "the weights are different ones"),
        (swap_layers, "the weights are different ones"),
        (lambda model: model.config.calibration.pop("made_for"), "does not say which weights it was made for"),
        (
            lambda model: model.config.calibration["target"].update(max_accuracy_drop=0.001),
            "the target, or what was measured for it, is not what calibration wrote",
        ),
    ],
    ids=["thresholds", "policy", "combination", "precision", "a weight", "layers", "older calibration", "target"],
)
@torch.no_grad()
def test_a_certificate_is_gone_with_what_it_was_made_for(pixel_values, change, message):
    model = certified_model()
    change(model)
    with pytest.warns(UserWarning, match=f"certificate of early exit is gone: .*{message}"):
        assert model.certificate is None
    assert model(pixel_values).exit_layer is not None  # early exit still runs


@pytest.mark.parametrize("thresholds", [{0.5: 2}, [0.5], [float("inf")] * 2, "no"], ids=str)
def test_thresholds_that_are_none_leave_no_certificate(thresholds):
    model = certified_model()
    model.config.exit_thresholds = thresholds
    with pytest.warns(UserWarning, match="certificate of early exit is gone: exit_thresholds are"):
        assert model.certificate is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (CERTIFIED, "certificate of early exit is gone: the precision is {}, not {}"),
        ({"max_cost": 0.6}, "exit_thresholds were chosen in {1}, got {0}, where scores differ"),
    ],
)
@pytest.mark.parametrize("precisions", [("float32", "bfloat16"), ("bfloat16", "float32")])
@torch.no_grad()
def test_another_precision_than_that_of_the_calibration_is_told(tmp_path, pixel_values, target, message, precisions):
    chosen, other = precisions
    model = certified_model(target, dtype=getattr(torch, chosen))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error", category=UserWarning):
        same = MEViTForImageClassification.from_pretrained(tmp_path, dtype=chosen)
        assert same(pixel_values).exit_layer is not None
        assert same.certificate == (target if target == CERTIFIED else None)
    told = re.escape(message.format(other, chosen))
    with pytest.warns(UserWarning, match=told):
        loaded, _ = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=other, output_loading_info=True)
    with pytest.warns(UserWarning, match=told):
        assert loaded(pixel_values).exit_layer is not None  # it still runs
    with pytest.warns(UserWarning, match=told), torch.inference_mode():
        same.to(getattr(torch, other))(pixel_values)
    with warnings.catch_warnings(action="error", category=UserWarning):
        loaded(pixel_values, early_exit=True, exit_thresholds=0.5)  # these are nobody's promise
        loaded(pixel_values, early_exit=False)


@torch.no_grad()
def test_loading_tells_the_precision_of_weights_alone(tmp_path):
    """Whether autocast will be on is not known yet."""
    config = tiny_model(exit_thresholds=[0.5, 0.5]).config
    config.calibration = {
        "operating_point": {"thresholds": [0.5, 0.5]},
        "made_for": {"dtype": "float32 with autocast to bfloat16"},
    }
    assert config.precision_warning("float32", of_weights=True) is None
    assert "got bfloat16" in config.precision_warning("bfloat16", of_weights=True)
    assert "got float32, where" in config.precision_warning("float32")


def test_autocast_is_a_precision_of_its_own(pixel_values):
    model = certified_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.precision == model.made_for()["dtype"] == "float32 with autocast to bfloat16"
        told = "the precision is float32 with autocast to bfloat16, not float32"
        with pytest.warns(UserWarning, match=told):
            model(pixel_values)
        with pytest.warns(UserWarning, match=told):
            assert model.certificate is None
        model.config.calibration["made_for"]["dtype"] = model.precision  # as calibrating here writes it
        with warnings.catch_warnings(action="error", category=UserWarning):
            model(pixel_values)
            assert model.certificate == CERTIFIED
    assert model.precision == "float32"
    with pytest.warns(UserWarning, match="the precision is float32, not float32 with autocast to bfloat16"):
        assert model.certificate is None


class QuantizedLinear(torch.nn.Linear):
    """Has other things than tensors in its state, as quantized modules do."""

    def get_extra_state(self):
        return "qint8", 0.5


def test_a_model_that_was_quantized_in_place_has_no_certificate():
    model = certified_model()
    model.exits["2"].classifier = QuantizedLinear(*reversed(model.exits["2"].classifier.weight.shape))
    with pytest.warns(UserWarning, match="certificate of early exit is gone: the weights are different ones"):
        assert model.certificate is None


def test_an_edited_file_is_told_and_runs(tmp_path, pixel_values):
    certified_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "exit_thresholds": [0.5, 0.7]}))
    with pytest.warns(UserWarning, match="certificate of early exit is gone: exit_thresholds are"):
        model = MEViTForImageClassification.from_pretrained(tmp_path)
    assert model(pixel_values).exit_layer is not None
    with pytest.warns(UserWarning, match="certificate of early exit is gone"):
        assert model.certificate is None


def test_a_cut_model_is_no_edit(tmp_path):
    with warnings.catch_warnings(action="error", category=UserWarning):
        small = certified_model().truncate(3)
        small.save_pretrained(tmp_path)
        assert MEViTForImageClassification.from_pretrained(tmp_path).certificate is None


@torch.no_grad()
def test_attentions_of_two_threads_are_not_mixed():
    model = tiny_model(attn_implementation="eager")
    images = torch.randn(2, 1, 3, 16, 16)
    expected = [model(one, output_attentions=True).attentions for one in images]

    @torch.no_grad()
    def run(place: int) -> list[tuple[torch.Tensor, ...]]:
        return [model(images[place], output_attentions=True).attentions for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        for answers, attentions in zip(threads.map(run, range(2)), expected, strict=True):
            for answer in answers:
                assert len(answer) == 4
                torch.testing.assert_close(answer, attentions)


@pytest.mark.parametrize("policy", EXIT_POLICIES)
@torch.no_grad()
def test_predictions_and_scores_are_those_of_the_combination(pixel_values, labels, policy):
    settings = {"exit_policy": policy, "uncertainty_input": "probabilities"}
    model, alone = (tiny_model(exit_combination=name, **settings) for name in ("mean", "none"))
    outputs, raw = model(pixel_values), alone(pixel_values)
    assert outputs.exit_logits.equal(raw.exit_logits)
    combined = combine_exits("mean", raw.exit_logits)
    assert outputs.logits.equal(combined[:, -1]) and not outputs.logits.equal(raw.logits)
    assert outputs.exit_uncertainty.equal(model.uncertainty(combined))
    assert outputs.exit_scores.equal(exit_scores(policy, combined, model.uncertainty(combined)))
    # losses, and all of training, are of each exit by itself
    assert model(pixel_values, labels).loss.equal(alone(pixel_values, labels).loss)
    outputs, raw = (one.train()(pixel_values, labels) for one in (model, alone))
    for name in ("loss", "logits", "exit_logits", "exit_scores", "exit_uncertainty"):
        assert outputs[name].equal(raw[name])


@pytest.mark.parametrize("exit_layer", [2, 3, 4])
@pytest.mark.parametrize("policy", ["uncertainty", "margin"])
@torch.no_grad()
def test_a_truncated_model_of_combined_exits_keeps_those_passed(tmp_path, pixel_values, exit_layer, policy):
    model = tiny_model(exit_policy=policy, exit_combination="mean")
    place = model.config.exit_layers.index(exit_layer)
    outputs, small = model(pixel_values), model.truncate(exit_layer)
    assert small.config.exit_layers == [2, 3, 4][: place + 1] and small.config.exit_combination == "mean"
    small.save_pretrained(tmp_path)
    for one in (small, MEViTForImageClassification.from_pretrained(tmp_path)):
        given = one(pixel_values)
        expected = combine_exits("mean", outputs.exit_logits)[:, place]
        torch.testing.assert_close(given.logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(given.exit_logits, outputs.exit_logits[:, : place + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(given.exit_scores[:, -1], outputs.exit_scores[:, place], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_plain_vit_is_that_of_the_last_exit_however_exits_are_combined(tmp_path, pixel_values):
    model = tiny_model(exit_combination="mean")
    expected = reference_vit(model)(pixel_values).logits
    plain = model.to_vit()
    torch.testing.assert_close(plain(pixel_values).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(pixel_values).exit_logits[:, -1], expected, atol=1e-5, rtol=0)
    assert not hasattr(plain.config, "exit_combination")
    # a trained model is switched while it is loaded
    tiny_model(uncertainty_input="probabilities").save_pretrained(tmp_path)
    switched = MEViTForImageClassification.from_pretrained(tmp_path, exit_combination="mean")
    torch.testing.assert_close(switched(pixel_values).logits, model(pixel_values).logits)
    switched.save_pretrained(tmp_path)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)


@torch.no_grad()
def test_a_predictor_of_logits_does_not_read_combinations(tmp_path, pixel_values, labels):
    message = (
        "exit_policy='uncertainty' needs exit_combination='none' or uncertainty_input='probabilities', .*; got "
        "exit_combination='mean' and uncertainty_input='logits'"
    )
    model, alone = (
        tiny_model(exit_policy="margin", uncertainty_input="logits", exit_combination=name)
        for name in ("mean", "none")
    )
    outputs = model(pixel_values, labels)
    assert outputs.exit_uncertainty is None and outputs.exit_scores.shape == (6, 3)
    raw = alone(pixel_values, labels)
    assert outputs.loss.equal(raw.loss) and raw.exit_uncertainty is not None
    model, alone = model.train(), alone.train()
    assert model(pixel_values).exit_uncertainty.equal(alone(pixel_values).exit_uncertainty)
    tiny_model(uncertainty_input="logits").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MEViTForImageClassification.from_pretrained(tmp_path, exit_combination="mean")


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@torch.no_grad()
def test_exits_are_combined_in_float32_whatever_the_precision(pixel_values, labels, kind):
    model = tiny_model(exit_policy="margin", exit_combination="mean", uncertainty_input=kind).to(torch.bfloat16)
    outputs = model(pixel_values, labels)
    assert outputs.exit_logits.dtype == torch.bfloat16 and outputs.logits.dtype == torch.float32
    empty = model(pixel_values[:0], early_exit=True, exit_thresholds=0.5)
    assert empty.logits.dtype == torch.float32 and empty.logits.shape == (0, 5)
    assert outputs.loss.isfinite() and outputs.exit_scores.dtype == torch.float32
    early = model(pixel_values, early_exit=True, exit_thresholds=-1.0)
    torch.testing.assert_close(early.logits, outputs.logits, atol=0.05, rtol=0)
