# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit with compaction against a slow reference: every exit is computed, then one is picked."""

import pytest
import torch
from PIL import Image
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForImageClassification, pipeline

from modeling_mevit import MEViTForImageClassification
from modeling_mevit.data.image_processing import image_processor_for
from modeling_mevit.encoder_layer_mevit import encoder_layers
from modeling_mevit.exit_policy_mevit import EXIT_COMBINATIONS, EXIT_POLICIES, combine_exits, first_exit
from tests.helpers.models import thirds_as_thresholds, tiny_model


ATTENTIONS = ("sdpa", "eager")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def reference(model: MEViTForImageClassification, images: torch.Tensor, thresholds: list[float]):
    """Logits (B, L) and exit layers (B,) of an early-exit run, from all exits of all samples."""
    outputs = model(images, early_exit=False)
    place = first_exit(outputs.exit_scores[:, :-1] < torch.tensor(thresholds))
    logits = combine_exits(model.config.exit_combination, outputs.exit_logits)
    return logits[torch.arange(len(images)), place], torch.tensor(model.config.exit_layers)[place]


def assert_same(outputs, logits, exit_layer):
    assert outputs.exit_layer.tolist() == exit_layer.tolist()
    assert outputs.exit_layer.dtype == torch.int64
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("policy", EXIT_POLICIES)
@pytest.mark.parametrize("combination", EXIT_COMBINATIONS)
@torch.no_grad()
def test_compaction_equals_the_reference_and_one_by_one(images, attention, policy, combination):
    settings = {"num_hidden_layers": 5, "exit_layers": [2, 3, 4, 5], "exit_policy": policy}
    settings["exit_combination"] = combination
    wanted = 2 if policy == "patience" else 4
    for seed in range(6, 30):  # which exits agree depends on the versions of torch and Transformers
        model = tiny_model(seed=seed, attn_implementation=attention, **settings)
        thresholds = [1 - 1.5 / 4] * 3 if policy == "patience" else thirds_as_thresholds(model, images)
        logits, exit_layer = reference(model, images, thresholds)
        if len(exit_layer.unique()) >= wanted:
            break
    assert len(exit_layer.unique()) >= wanted

    outputs = model(images, early_exit=True, exit_thresholds=thresholds)
    assert_same(outputs, logits, exit_layer)
    one_by_one = [model(image[None], early_exit=True, exit_thresholds=thresholds) for image in images]
    assert_same(outputs, torch.cat([one.logits for one in one_by_one]), torch.cat([o.exit_layer for o in one_by_one]))
    assert outputs.exit_logits is None and outputs.loss is None
    places = (exit_layer - 2)[:, None]
    scores = model(images, early_exit=False).exit_scores.gather(1, places)[:, 0]
    torch.testing.assert_close(outputs.exit_score, scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("policy", EXIT_POLICIES)
@pytest.mark.parametrize("combination", EXIT_COMBINATIONS)
@torch.no_grad()
def test_bfloat16_equals_the_reference_and_one_by_one(images, policy, combination, autocast):
    """But for samples so near a threshold, or with two labels so near each other, that rounding decides."""
    model = tiny_model(seed=1, exit_policy=policy, exit_combination=combination)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        thresholds = [1 - 1.5 / 3] * 2 if policy == "patience" else thirds_as_thresholds(model, images)
        every_exit = model(images, early_exit=False)
        logits, exit_layer = reference(model, images, thresholds)
        outputs = model(images, early_exit=True, exit_thresholds=thresholds)
        one_by_one = [model(image[None], early_exit=True, exit_thresholds=thresholds) for image in images]
    assert every_exit.exit_logits.dtype == torch.bfloat16
    assert outputs.logits.dtype == (torch.bfloat16 if combination == "none" else torch.float32)
    assert every_exit.exit_scores.dtype == every_exit.exit_uncertainty.dtype == torch.float32

    best, second = combine_exits(combination, every_exit.exit_logits).float().topk(2).values.unbind(-1)
    distances = (every_exit.exit_scores[:, :-1] - torch.tensor(thresholds)).abs()
    is_sure = ((best - second) > 0.05).all(1) & (distances > 0.01).all(1)
    assert is_sure.sum() >= 12 and len(exit_layer[is_sure].unique()) >= 2
    alone = torch.cat([one.logits for one in one_by_one]), torch.cat([one.exit_layer for one in one_by_one])
    for expected_logits, expected_layer in ((logits, exit_layer), alone):
        assert outputs.exit_layer[is_sure].tolist() == expected_layer[is_sure].tolist()
        torch.testing.assert_close(outputs.logits[is_sure], expected_logits[is_sure], atol=0.05, rtol=0.02)


@torch.no_grad()
def test_scores_in_bfloat16_are_as_fine_as_in_float32():
    """Also the predictor's, of images that are all sure."""
    model = tiny_model(uncertainty_input="probabilities").bfloat16()
    logits = torch.linspace(4, 8, 64)[:, None] * torch.tensor([1.0, 0, 0, 0, 0])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert len(model.uncertainty(logits[:, None]).unique()) == 64


@pytest.mark.parametrize(("patience", "exits"), [(1, {2}), (2, {3, 4}), (3, {4})])
@torch.no_grad()
def test_patience_leaves_after_so_many_exits_that_agree(images, patience, exits):
    model = tiny_model(exit_policy="patience")
    labels = model(images).exit_logits.argmax(-1).tolist()
    outputs = model(images, early_exit=True, exit_thresholds=1 - (patience - 0.5) / 3)
    assert set(outputs.exit_layer.tolist()) == exits
    for predicted, exit_layer in zip(labels, outputs.exit_layer.tolist(), strict=True):
        agreeing = [len(set(predicted[place - patience + 1 : place + 1])) == 1 for place in range(patience - 1, 2)]
        assert exit_layer == ([*range(patience + 1, 4), 4][agreeing.index(True)] if any(agreeing) else 4)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@torch.no_grad()
def test_every_uncertainty_predictor(images, kind):
    model = tiny_model(uncertainty_input=kind)
    thresholds = thirds_as_thresholds(model, images)
    logits, exit_layer = reference(model, images, thresholds)
    assert set(exit_layer.tolist()) == {2, 3, 4}
    assert_same(model(images, early_exit=True, exit_thresholds=thresholds), logits, exit_layer)


@pytest.mark.parametrize(("policy", "calls"), [("uncertainty", 3), ("confidence", 0), ("patience", 0)])
@torch.no_grad()
def test_the_uncertainty_predictor_runs_for_its_policy_alone(images, policy, calls):
    model = tiny_model(exit_policy=policy)
    given = []
    model.uncertainty.register_forward_hook(lambda *args: given.append(args))
    model(images, early_exit=True, exit_thresholds=1e-9)  # nobody leaves
    assert len(given) == calls


@torch.no_grad()
def test_exits_need_not_be_neighbours(images):
    model = tiny_model(exit_layers=[1, 4])
    thresholds = thirds_as_thresholds(model, images)
    logits, exit_layer = reference(model, images, thresholds)
    assert set(exit_layer.tolist()) == {1, 4}
    assert_same(model(images, early_exit=True, exit_thresholds=thresholds), logits, exit_layer)


@pytest.mark.parametrize("samples", [0, 1, 24])
@pytest.mark.parametrize(("threshold", "layer"), [(2.0, 2), (-1.0, 4)])
@torch.no_grad()
def test_all_leave_at_once_or_none_does(images, samples, threshold, layer):
    model = tiny_model()
    outputs = model(images[:samples], early_exit=True, exit_thresholds=threshold)
    place = model.config.exit_layers.index(layer)
    expected = model(images, early_exit=False).exit_logits[:samples, place]
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=0)
    assert outputs.exit_layer.tolist() == [layer] * samples


@torch.no_grad()
def test_later_layers_run_on_those_who_go_on_alone(images):
    model = tiny_model(exit_layers=[2, 4])
    thresholds = thirds_as_thresholds(model, images)
    batches = []
    norms = [layer.layernorm_after for layer in model.vit.modules() if hasattr(layer, "layernorm_after")]
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: batches.append(tuple(output.shape[:2])))
    outputs = model(images, early_exit=True, exit_thresholds=thresholds)
    stay = int((outputs.exit_layer == 4).sum())
    # layer 1; layer 2 for [CLS], then for the patches of those who stay; layer 3; layer 4 for [CLS]
    assert batches == [(24, 17), (24, 1), (stay, 16), (stay, 17), (stay, 1)] and 0 < stay < 24


@pytest.mark.parametrize(
    ("exit_combination", "policy", "computed"),
    [
        ("none", "confidence", [3, 4]),
        ("none", "uncertainty", [3, 4]),
        ("none", "patience", [2, 3, 4]),
        ("mean", "confidence", [2, 3, 4]),
    ],
)
@torch.no_grad()
def test_an_exit_with_threshold_0_is_not_computed_unless_later_ones_depend_on_it(
    images, exit_combination, policy, computed
):
    model = tiny_model(exit_combination=exit_combination, exit_policy=policy)
    later = 0.4 if policy == "patience" else thirds_as_thresholds(model, images)[1]
    called = []
    for layer, exit in model.exits.items():
        exit.register_forward_hook(lambda *args, layer=int(layer): called.append(layer))
    outputs = model(images, early_exit=True, exit_thresholds=[0.0, later])
    assert called == computed
    logits, exit_layer = reference(model, images, [0.0, later])
    assert set(exit_layer.tolist()) == {3, 4}
    assert_same(outputs, logits, exit_layer)


@torch.no_grad()
def test_early_exit_that_nobody_takes_runs_the_layers_of_the_plain_vit(images):
    model = tiny_model()
    queries = []
    for module in model.vit.modules():
        if hasattr(module, "layernorm_after"):
            module.layernorm_after.register_forward_hook(lambda _, args, output: queries.append(output.shape[1]))
    model(images, early_exit=True, exit_thresholds=0.0)
    assert queries == [17, 17, 17, 1]  # the last one for [CLS] alone


@torch.no_grad()
def test_a_sample_without_a_score_goes_on(images):
    model = tiny_model()
    model.exits["2"].classifier.weight.fill_(float("nan"))
    assert set(model(images, early_exit=True, exit_thresholds=2.0).exit_layer.tolist()) == {3}


@pytest.mark.parametrize("policy", EXIT_POLICIES)
@torch.no_grad()
def test_leaving_at_an_exit_is_the_model_cut_there(images, policy):
    model = tiny_model(exit_policy=policy, exit_combination="mean")
    thresholds = [1 - 1.5 / 3] * 2 if policy == "patience" else thirds_as_thresholds(model, images)
    outputs = model(images, early_exit=True, exit_thresholds=thresholds)
    assert len(outputs.exit_layer.unique()) > 1
    for exit_layer in outputs.exit_layer.unique().tolist():
        taken = outputs.exit_layer == exit_layer
        expected = model.truncate(exit_layer)(images[taken]).logits
        torch.testing.assert_close(outputs.logits[taken], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_patience_counts_labels_of_the_combination(images):
    model = tiny_model(exit_policy="patience", exit_combination="mean")
    exit_logits = model(images).exit_logits
    expected, alone = (combine_exits(name, exit_logits).argmax(-1) for name in EXIT_COMBINATIONS[::-1])
    agree, agree_alone = expected[:, 0] == expected[:, 1], alone[:, 0] == alone[:, 1]
    assert not agree.equal(agree_alone)  # so that the test can fail
    two_agree = 1 - 1.5 / 3
    exit_layer = model(images, early_exit=True, exit_thresholds=two_agree).exit_layer
    assert exit_layer.tolist() == torch.where(agree, 3, 4).tolist()


@pytest.mark.parametrize("policy", EXIT_POLICIES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@torch.no_grad()
def test_no_combination_with_an_exit_that_is_no_number_is_sure(images, policy, value):
    model = tiny_model(exit_policy=policy, exit_combination="mean", num_hidden_layers=5, exit_layers=[1, 2, 3, 4, 5])
    model.exits["3"].classifier.bias[1] = value
    thresholds = [-1.0, -1.0, 2.0, 2.0]  # exits 3 and 4 let everything go that they can
    assert set(model(images, early_exit=True, exit_thresholds=thresholds).exit_layer.tolist()) == {5}
    model.config.exit_combination = "none"
    assert set(model(images, early_exit=True, exit_thresholds=thresholds).exit_layer.tolist()) == {4}


@pytest.mark.parametrize("policy", EXIT_POLICIES)
@torch.no_grad()
def test_an_image_that_is_no_number_runs_to_the_end(images, policy):
    model = tiny_model(exit_policy=policy)
    images[3, 0, 0, 0] = float("nan")
    outputs = model(images, early_exit=True, exit_thresholds=2.0)
    assert outputs.exit_layer[3] == 4 and outputs.logits[3].isnan().all()
    assert set(outputs.exit_layer.tolist()) == {2, 4}


@pytest.mark.parametrize("policy", EXIT_POLICIES)
@torch.no_grad()
def test_an_exit_with_infinite_logits_is_never_sure(images, policy):
    model = tiny_model(exit_policy=policy)
    model.exits["2"].classifier.bias[1] = float("-inf")
    model.uncertainty.weight.fill_(1.0)  # of −∞, an uncertainty of 0
    assert set(model(images, early_exit=True, exit_thresholds=2.0).exit_layer.tolist()) == {3}


@torch.no_grad()
def test_an_exit_that_is_no_number_agrees_with_none(images):
    model = tiny_model(exit_policy="patience")
    for exit_layer in ("2", "3", "4"):  # all would agree on class 0, as the place of a NaN
        model.exits[exit_layer].classifier.weight.fill_(0)
        model.exits[exit_layer].classifier.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0]))
    two_agree = 0.5
    assert set(model(images, early_exit=True, exit_thresholds=two_agree).exit_layer.tolist()) == {3}
    model.exits["2"].classifier.bias[0] = float("nan")
    outputs = model(images, early_exit=True, exit_thresholds=two_agree)
    assert_same(outputs, *reference(model, images, [two_agree] * 2))
    assert set(outputs.exit_layer.tolist()) == {4}


def test_the_config_turns_it_on_in_eval_mode_alone(images):
    model = tiny_model(exit_thresholds=0.5, early_exit=True)
    explicit = model(images, early_exit=True, exit_thresholds=[0.5, 0.5])
    assert_same(model(images), explicit.logits, explicit.exit_layer)
    labels = torch.zeros(24, dtype=torch.int64)
    model.set_attn_implementation("eager")
    for settings in ({"labels": labels}, {"output_hidden_states": True}, {"output_attentions": True}):
        outputs = model(images, **settings)
        assert outputs.exit_logits.shape == (24, 3, 5) and outputs.exit_layer is None
        with pytest.raises(ValueError, match=f"early_exit=True is not supported with {next(iter(settings))}"):
            model(images, early_exit=True, **settings)
    model.train()
    assert model(images).exit_layer is None
    with pytest.raises(ValueError, match="early_exit=True is not supported in training mode"):
        model(images, early_exit=True)


@torch.no_grad()
@pytest.mark.slow
def test_a_record_of_the_model_holds_all_exits(images):
    model = tiny_model(exit_thresholds=0.5, early_exit=True)
    others = torch.randn(24, 3, 16, 16)
    every_exit = model(others, early_exit=False)
    assert len(model(others).exit_layer.unique()) > 1

    class AllExits(torch.nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            self.model, self.arguments = model, arguments

        def forward(self, pixel_values):
            return self.model(pixel_values, **self.arguments).exit_logits

    traced = torch.jit.trace(AllExits(), images)
    exported = torch.export.export(AllExits(), (images,)).module()
    compiled = torch.compile(AllExits(), backend="eager", fullgraph=True)
    rewritten = make_fx(AllExits())(images)
    for record in (traced, exported, compiled, rewritten):
        torch.testing.assert_close(record(others), every_exit.exit_logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="is not supported while the model is traced, compiled or exported"):
        torch.jit.trace(AllExits(early_exit=True), images)


@torch.no_grad()
def test_a_cut_model_has_no_early_exit_left(images):
    model = tiny_model(exit_thresholds=[0.5, 0.6], early_exit=True)
    small = model.truncate(3)
    assert small.config.early_exit is False and small.config.exit_thresholds is None
    torch.testing.assert_close(small(images).logits, model(images, early_exit=False).exit_logits[:, 1])


def test_a_cut_model_of_patience_can_be_saved_and_loaded(images, tmp_path):
    small = tiny_model(exit_policy="patience", exit_thresholds=0.5, early_exit=True).truncate(3)
    small.save_pretrained(tmp_path)
    loaded = MEViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).logits, small(images).logits)
    assert loaded(images[:2]).exit_scores.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("policy", ["confidence", "patience"])
@torch.no_grad()
def test_hooks_on_every_layer_see_whole_layers(images, policy):
    model = tiny_model(exit_policy=policy)
    thresholds = [0.5, 0.5] if policy == "patience" else thirds_as_thresholds(model, images)
    expected = model(images)
    expected_early = model(images, early_exit=True, exit_thresholds=thresholds)
    shapes = []
    for layer in encoder_layers(model.vit):
        layer.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape)))
    torch.testing.assert_close(model(images).exit_logits, expected.exit_logits, atol=1e-5, rtol=0)
    assert shapes == [(24, 17, 32)] * 4

    shapes.clear()
    early = model(images, early_exit=True, exit_thresholds=thresholds)
    assert_same(early, expected_early.logits, expected_early.exit_layer)
    left = [int((expected_early.exit_layer == layer).sum()) for layer in (2, 3, 4)]
    assert 0 < left[1] < 24 and left[2] > 0
    assert shapes == [(24, 17, 32), (24, 17, 32), (24 - left[0], 17, 32), (left[2], 17, 32)]


def test_a_pipeline_leaves_early_with_no_further_argument(images, tmp_path):
    tiny_model(exit_thresholds=2.0, early_exit=True).save_pretrained(tmp_path)
    image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.exit_thresholds == 2.0
    reached = []
    model.exits["3"].register_forward_hook(lambda *args: reached.append(3))
    classify = pipeline("image-classification", model=model, image_processor=str(tmp_path))
    assert len(classify(Image.new("RGB", (20, 20)), top_k=2)) == 2
    assert not reached


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {}, "early exit needs exit_thresholds, 2 numbers"),
        ({"exit_policy": "patience"}, {}, "early exit needs exit_thresholds, 2 numbers"),
        ({}, {"exit_thresholds": [0.5]}, r"must be one number, or 2 for exits \[2, 3, 4\], .*; got \[0.5\]"),
        ({}, {"exit_thresholds": [0.5, float("nan")]}, "must be one number, or 2 for exits"),
        ({}, {"early_exit": False, "exit_thresholds": 0.5}, "exit_thresholds need early_exit=True"),
    ],
)
def test_bad_thresholds_are_named(images, settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**settings)(images, **{"early_exit": True, **arguments})
