# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What Transformers' common model and config tests ask of every model: settings × checks, then loading and devices."""

import copy
import inspect
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoModel, AutoModelForImageClassification

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.encoder_layer_mevit import encoder_layers
from modeling_mevit.vit_backbone_mevit import to_2tuple
from tests.helpers.models import TINY, thirds_as_thresholds, tiny_model


SETTINGS = {
    "default": {},
    "eager": {"attn_implementation": "eager"},
    "no bias": {"qkv_bias": False},
    "grey": {"num_channels": 1},
    "oblong": {"image_size": [8, 24]},
    "probabilities": {"uncertainty_input": "probabilities"},
    "confidence": {"exit_policy": "confidence"},
    "patience": {"exit_policy": "patience"},
    "mean": {"exit_combination": "mean"},
    "mean of logits": {"exit_combination": "mean", "uncertainty_input": "logits", "exit_policy": "margin"},
    "first and last": {"exit_layers": [1, 4]},
    "one exit": {"exit_layers": [4]},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def settings(request) -> dict:
    return request.param


def images_for(model: MEViTForImageClassification, number: int = 6) -> torch.Tensor:
    sides = to_2tuple(model.config.image_size)
    return torch.randn(number, model.config.num_channels, *sides, generator=torch.Generator().manual_seed(1))


def assert_outputs_equal(given, expected, atol: float = 1e-5) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            given[name], value, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


# settings × checks


def test_every_parameter_is_initialised_as_told(settings):
    config = MEViTConfig(**{**TINY, **settings, "initializer_range": 1e-10})
    for auto_class in (AutoModel, AutoModelForImageClassification):
        model = auto_class.from_config(config)
        expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        for name, value in expected.items():
            if "norm" in name and name.endswith("weight"):
                value.fill_(1)
        if config.uncertainty_input == "probabilities":
            expected["uncertainty.weight"][:, 0] = -4
            expected["uncertainty.bias"].fill_(2)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-8, rtol=0, msg=name)


def test_outputs_are_finite_and_those_of_a_saved_model(settings, tmp_path):
    model = tiny_model(**settings)
    pixel_values = images_for(model)
    outputs = model(pixel_values, torch.arange(6) % 5)
    assert all(value.isfinite().all() for value in outputs.values())
    model.save_pretrained(tmp_path)
    attention = {"attn_implementation": model.config._attn_implementation}
    loaded, loading = MEViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True, **attention)
    assert not any(loading.values())
    assert_outputs_equal(loaded(pixel_values, torch.arange(6) % 5), outputs)


def test_a_tuple_holds_what_the_dict_does(settings):
    model = tiny_model(**settings)
    pixel_values = images_for(model)
    modes = [{}, {"labels": torch.arange(6) % 5}, {"output_hidden_states": True}]
    modes.append({"early_exit": True, "exit_thresholds": 0.5})
    if model.config._attn_implementation == "eager":
        modes.append({"output_attentions": True, "output_hidden_states": True})
    for mode in modes:
        outputs = model(pixel_values, **mode)
        values = model(pixel_values, return_dict=False, **mode)
        assert isinstance(values, tuple) and len(values) == len(outputs)
        torch.testing.assert_close(values, outputs.to_tuple(), atol=1e-6, rtol=0)


def test_hidden_states_and_attentions_can_retain_gradients(settings):
    model = tiny_model(**settings)
    is_eager = model.config._attn_implementation == "eager"
    outputs = model(images_for(model), output_hidden_states=True, output_attentions=is_eager)
    kept = [*outputs.hidden_states, *(outputs.attentions or ())]
    assert len(kept) == (9 if is_eager else 5)
    for value in kept:
        value.retain_grad()
    outputs.exit_logits.sum().backward()
    assert all(value.grad is not None and value.grad.ne(0).any() for value in kept)


def test_a_batch_gives_what_its_samples_give(settings):
    model = tiny_model(**settings)
    pixel_values = images_for(model)
    for mode in ({}, {"early_exit": True, "exit_thresholds": 0.5}):
        outputs = model(pixel_values, **mode)
        singles = [model(image[None], **mode) for image in pixel_values]
        for name, value in outputs.items():
            torch.testing.assert_close(torch.cat([one[name] for one in singles]), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_near_full_precision(settings, dtype):
    model = tiny_model(**settings)
    pixel_values = images_for(model)
    expected = model(pixel_values).exit_logits
    outputs = model.to(dtype)(pixel_values, torch.arange(6) % 5)
    assert outputs.exit_logits.dtype == dtype and outputs.exit_scores.dtype == torch.float32
    assert (outputs.exit_logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    early = model(pixel_values, early_exit=True, exit_thresholds=-1.0)
    torch.testing.assert_close(early.logits, outputs.logits, atol=0.05, rtol=0.05)


def test_a_config_comes_back_as_it_was(settings, tmp_path):
    config = MEViTConfig(**{**TINY, **settings})

    def fields(of: MEViTConfig) -> dict:
        left_out = ("auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
        return {name: value for name, value in of.to_dict().items() if name not in left_out}

    config.save_pretrained(tmp_path)
    config.to_json_file(tmp_path / "other.json")
    others = [
        MEViTConfig.from_pretrained(tmp_path),
        MEViTConfig.from_json_file(tmp_path / "other.json"),
        MEViTConfig.from_dict(config.to_dict()),
        MEViTConfig(**json.loads(config.to_json_string())),
        copy.deepcopy(config),
    ]
    for other in others:
        assert fields(other) == fields(config)
    changed, unused = MEViTConfig.from_pretrained(
        tmp_path, num_labels=7, early_exit=True, exit_thresholds=0.5, no_field=1, return_unused_kwargs=True
    )
    assert (changed.num_labels, changed.early_exit, changed.exit_thresholds, unused) == (7, True, 0.5, {"no_field": 1})


# the class, and loading


def test_forward_takes_pixel_values_first_and_nothing_unnamed():
    parameters = inspect.signature(MEViTForImageClassification.forward).parameters
    assert list(parameters)[:3] == ["self", "pixel_values", "labels"]
    assert "kwargs" not in parameters  # with it a Trainer would not divide the loss by its accumulation steps


def test_input_embeddings_can_be_found(model):
    assert model.get_input_embeddings() is model.vit.embeddings.patch_embeddings


@pytest.mark.parametrize(
    ("settings", "resized"),
    [
        ({"num_labels": 3}, {*(f"exits.{layer}.classifier" for layer in (2, 3, 4)), "uncertainty"}),
        ({"image_size": 32}, {"vit.embeddings.position_embeddings"}),
    ],
    ids=["labels", "positions"],
)
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_weights_of_another_size_are_new_and_all_others_loaded(tmp_path, settings, resized, kind):
    saved = tiny_model(uncertainty_input=kind)
    saved.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        MEViTForImageClassification.from_pretrained(tmp_path, **settings)
    model = MEViTForImageClassification.from_pretrained(tmp_path, **settings, ignore_mismatched_sizes=True)
    outputs = model(images_for(model))
    assert all(value.isfinite().all() for value in outputs.values())
    before = saved.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith(tuple(resized)):
            assert value.equal(before[name]), name
        elif value.shape != before[name].shape:
            expected = torch.zeros_like(value)
            if name == "uncertainty.weight" and kind == "probabilities":
                expected[:, 0] = -4
            torch.testing.assert_close(value, expected, atol=0.1, rtol=0, msg=name)
            assert value.ne(0).any() == ("bias" not in name), name


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_is_not_tested_is_refused(model, attention):
    with pytest.raises(ValueError, match="MEViTForImageClassification does not support"):
        tiny_model(attn_implementation=attention)
    with pytest.raises(ValueError, match="MEViTForImageClassification does not support"):
        model.set_attn_implementation(attention)


# devices


class RecordCalls(ModelHook):
    """Counts, as an accelerate hook, how many tokens of how many samples its layer is called for."""

    def __init__(self, calls: list, layer: int) -> None:
        self.calls, self.layer = calls, layer

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append((self.layer, *args[0].shape[:2]))
        return args, kwargs


def test_accelerates_hooks_are_called_for_every_layer(model):
    pixel_values, calls = images_for(model, 24), []
    thresholds = thirds_as_thresholds(model, pixel_values)
    every_exit, early = model(pixel_values), model(pixel_values, early_exit=True, exit_thresholds=thresholds)
    for number, layer in enumerate(encoder_layers(model.vit), start=1):
        add_hook_to_module(layer, RecordCalls(calls, number))
    assert_outputs_equal(model(pixel_values), every_exit)
    assert calls == [(1, 24, 17), (2, 24, 17), (3, 24, 17), (4, 24, 17)]
    calls.clear()
    assert_outputs_equal(model(pixel_values, early_exit=True, exit_thresholds=thresholds), early)
    at_3, at_4 = (int((early.exit_layer >= layer).sum()) for layer in (3, 4))
    assert calls == [(1, 24, 17), (2, 24, 17), (3, at_3, 17), (4, at_4, 17)] and 0 < at_4 < at_3 < 24


def split(model: MEViTForImageClassification, first: str | int, second: str | int) -> dict:
    """A device map that puts every other layer, the embeddings and the predictor on `first`, all else on `second`."""
    layers = next(name for name, module in model.named_modules() if module is encoder_layers(model.vit))
    by_turns = {f"{layers}.{index}": (first, second)[index % 2] for index in range(model.config.num_hidden_layers)}
    others = {"vit.embeddings": first, "vit.layernorm": second, "exits": second, "uncertainty": first}
    return {**by_turns, **others}


def reload_on_disk(model, folder):
    model.save_pretrained(folder)
    options = {"device_map": split(model, "cpu", "disk"), "offload_folder": folder / "offload"}
    return MEViTForImageClassification.from_pretrained(folder, **options)


OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "dispatch_model": lambda model, folder: dispatch_model(
        model, split(model, "cpu", "disk"), main_device="cpu", offload_dir=folder, force_hooks=True
    ),
    "device_map": reload_on_disk,
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("policy", ["uncertainty", "confidence", "patience"])
@torch.no_grad()
def test_an_offloaded_model_gives_what_it_gave_before(tmp_path, offload, policy):
    model = tiny_model(exit_policy=policy)
    pixel_values = images_for(model, 24)
    thresholds = [0.5, 0.5] if policy == "patience" else thirds_as_thresholds(model, pixel_values)
    every_exit, early = model(pixel_values), model(pixel_values, early_exit=True, exit_thresholds=thresholds)
    assert len(early.exit_layer.unique()) > 1
    offloaded = offload(model, tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())

    calls: list[tuple[int, int, int]] = []
    layers = {number: layer for number, layer in enumerate(encoder_layers(offloaded.vit), start=1)}
    on_a_device = {number: layer for number, layer in layers.items() if hasattr(layer, "_hf_hook")}
    assert len(on_a_device) == (
        4 if hasattr(offloaded, "hf_device_map") else 0
    )  # else hooks are on what has weights itself
    for number, layer in on_a_device.items():
        add_hook_to_module(layer, RecordCalls(calls, number), append=True)
    assert_outputs_equal(offloaded(pixel_values), every_exit)
    assert calls == [(number, 24, 17) for number in on_a_device]
    calls.clear()
    assert_outputs_equal(offloaded(pixel_values, early_exit=True, exit_thresholds=thresholds), early)
    assert [number for number, *_ in calls] == list(on_a_device)


@pytest.fixture
def on_gpu() -> torch.device:
    return torch.accelerator.current_accelerator()


def to_cpu(outputs) -> dict:
    return {name: value.cpu() for name, value in outputs.items()}


@pytest.mark.gpu
@torch.no_grad()
def test_an_accelerator_gives_what_the_cpu_does(settings, on_gpu):
    model = tiny_model(**settings)
    pixel_values, labels = images_for(model, 24), torch.arange(24) % 5
    thresholds = [0.5] * 2 if model.config.exit_policy == "patience" else thirds_as_thresholds(model, pixel_values)
    modes = [{"labels": labels}, {"early_exit": True, "exit_thresholds": thresholds[: len(model.exits) - 1]}]
    expected = [dict(model(pixel_values, **mode)) for mode in modes]
    model.to(on_gpu)
    for mode, outputs in zip(modes, expected, strict=True):
        assert_outputs_equal(to_cpu(model(pixel_values.to(on_gpu), **mode)), outputs, atol=1e-3)


@pytest.mark.gpu
@torch.no_grad()
def test_layers_may_lie_on_different_devices(on_gpu):
    model = tiny_model()
    pixel_values = images_for(model, 24)
    mode = {"early_exit": True, "exit_thresholds": thirds_as_thresholds(model, pixel_values)}
    every_exit, early = dict(model(pixel_values)), dict(model(pixel_values, **mode))
    model = dispatch_model(model, split(model, on_gpu.index or 0, "cpu"), force_hooks=True)
    assert_outputs_equal(to_cpu(model(pixel_values)), every_exit, atol=1e-3)
    assert_outputs_equal(to_cpu(model(pixel_values, **mode)), early, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_accelerator_trains_in_half_precision(model, on_gpu, dtype):
    model.to(on_gpu).train()
    with torch.autocast(on_gpu.type, dtype):
        loss = model(images_for(model).to(on_gpu), torch.arange(6)[:6] % 5).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
