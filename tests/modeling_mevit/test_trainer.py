# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import functools
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalPrediction

import modeling_mevit
from modeling_mevit import MEViTForImageClassification
from modeling_mevit import trainer as trainer_module
from modeling_mevit.exit_policy_mevit import combine_exits
from modeling_mevit.trainer import (
    ExitAccuracy,
    MEViTTrainer,
    MEViTTrainingArguments,
    draw_exits,
    get_last_checkpoint,
    load_checkpoint,
    training_is_complete,
)
from tests.helpers.hub import RecordedHub, record_hub
from tests.helpers.models import tiny_model
from tests.helpers.trainers import assert_same_weights, losses, make_trainer, random_images


# The draw


def test_the_draw_holds_first_and_last_and_k_others():
    for step in range(20):
        drawn = draw_exits(7, 2, seed=0, step=step)
        assert drawn[0] == drawn[-1] == 1
        assert drawn.sum() == 4
    assert draw_exits(7, 0, seed=0, step=0).tolist() == [1, 0, 0, 0, 0, 0, 1]
    assert draw_exits(3, 2, seed=0, step=0).tolist() == [1, 1, 1]
    assert draw_exits(1, 2, seed=0, step=0).tolist() == [1]


def test_the_draw_depends_on_seed_and_step_alone():
    torch.manual_seed(0)
    first = [draw_exits(12, 2, seed=5, step=step) for step in range(30)]
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(draw_exits(12, 2, seed=5, step=step).equal(drawn) for step, drawn in reversed(list(enumerate(first))))
    assert len({tuple(drawn.tolist()) for drawn in first}) > 10
    assert torch.stack(first).sum(0).min() > 0
    assert not all(draw_exits(12, 2, seed=6, step=step).equal(drawn) for step, drawn in enumerate(first))


# The loss


def test_loss_against_a_loop_over_the_drawn_exits(tmp_path):
    model = tiny_model(num_hidden_layers=6, exit_layers=[2, 3, 4, 5, 6])
    trainer = make_trainer(
        tmp_path,
        model=model,
        num_random_exits=1,
        distillation_weight=0.3,
        uncertainty_weight=0.7,
        distillation_temperature=2.0,
    )
    trainer.state.global_step = 4
    pixel_values, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = trainer.compute_loss(model.train(), {"pixel_values": pixel_values, "labels": labels})

    outputs = model(pixel_values)
    last = outputs.exit_logits[:, -1].detach()
    expected = 0
    for place, is_drawn in enumerate(draw_exits(5, 1, seed=0, step=4)):
        if not is_drawn:
            continue
        logits = outputs.exit_logits[:, place]
        probabilities = logits.detach().softmax(-1)
        distance = (probabilities - F.one_hot(labels, 5)).abs().sum(-1).tanh()
        error = outputs.exit_uncertainty[:, place] - distance
        expected += F.cross_entropy(logits, labels) + 0.7 * (error**2).mean()
        if place < 4:
            teacher, student = (last / 2).softmax(-1), (logits / 2).softmax(-1)
            expected += 0.3 * 4 * (teacher * (teacher / student).log()).sum(-1).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("uncertainty_weight", "distillation_weight"), [(1.0, 1.0), (0.0, 0.0)])
def test_every_parameter_gets_a_gradient_and_exits_not_drawn_get_0(tmp_path, uncertainty_weight, distillation_weight):
    trainer = make_trainer(tmp_path, uncertainty_weight=uncertainty_weight, distillation_weight=distillation_weight)
    inputs = {"pixel_values": torch.randn(5, 3, 16, 16), "labels": torch.arange(5)}
    trainer.compute_loss(trainer.model.train(), inputs).backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    for layer in (2, 6):
        assert gradients[f"exits.{layer}.classifier.weight"].ne(0).any()
    for layer in (3, 4, 5):
        assert gradients[f"exits.{layer}.classifier.weight"].eq(0).all()
    assert gradients["uncertainty.weight"].ne(0).any() == (uncertainty_weight > 0)


def test_logs_each_term_of_each_exit(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    first = trainer.state.log_history[0]
    terms = {name.removeprefix("loss_") for name in first if name.startswith("loss_")}
    assert terms == {
        *(f"{term}/exit_{layer}" for term in ("cross_entropy", "uncertainty") for layer in (2, 3, 4, 5, 6)),
        *(f"distillation/exit_{layer}" for layer in (2, 3, 4, 5)),
    }
    updated = ("cross_entropy/exit_2", "cross_entropy/exit_6", "uncertainty/exit_2", "uncertainty/exit_6")
    parts = [first[f"loss_{name}"] for name in (*updated, "distillation/exit_2")]
    assert first["loss"] == pytest.approx(sum(parts), rel=1e-3)


def test_evaluation_reports_every_exit(tmp_path):
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate()
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert predictions.shape == (10, 5)
    for place, layer in enumerate((2, 3, 4, 5, 6)):
        expected = np.mean(predictions[:, place] == np.arange(10) % 5)
        assert metrics[f"eval_accuracy/exit_{layer}"] == pytest.approx(expected)
    assert metrics["eval_accuracy"] == metrics["eval_accuracy/exit_6"]


def test_accuracy_by_hand():
    predictions, labels = np.array([[0, 1], [2, 2], [1, 0], [1, 0]]), np.array([0, 2, 0, 0])
    given = ExitAccuracy().compute(predictions=predictions, references=labels, exit_layers=[6, 12])
    assert given == {"accuracy": 0.75, "accuracy/exit_6": 0.5, "accuracy/exit_12": 0.75}


def test_metrics_of_ones_own_replace_the_accuracy_of_every_exit(tmp_path):
    def first_exit(evaluation: EvalPrediction) -> dict[str, float]:
        return {"first_exit": float(np.mean(evaluation.predictions[:, 0]))}

    trainer = make_trainer(tmp_path)
    trainer = MEViTTrainer(
        model=trainer.model, args=trainer.args, eval_dataset=trainer.eval_dataset, compute_metrics=first_exit
    )
    metrics = trainer.evaluate()
    assert metrics["eval_first_exit"] == np.mean(trainer.predict(trainer.eval_dataset).predictions[:, 0])
    assert not any("accuracy" in name for name in metrics)


def test_exits_and_predictor_have_a_learning_rate_of_their_own(tmp_path):
    settings = {"learning_rate": 0.0, "exit_learning_rate": 1e-3, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, num_random_exits=3, max_steps=3, **settings)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    decayed = {"exits.2.classifier.weight", "vit.embeddings.patch_embeddings.projection.weight"}
    groups = trainer.create_optimizer().param_groups
    place = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
    assert len(place) == len(before) == sum(len(group["params"]) for group in groups)
    for name, parameter in trainer.model.named_parameters():
        group = groups[place[id(parameter)]]
        assert group["lr"] == (0.0 if name.startswith("vit.") else 1e-3)
        if name in decayed or name.endswith("bias"):
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0)
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name in before if not name.startswith("vit.")}


def test_exits_are_standardised_on_training_images_unless_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_mevit.trainer.IMAGES_TO_STANDARDIZE", 24)
    trainer = make_trainer(tmp_path, standardize_exits=True, learning_rate=0.0, save_strategy="steps", max_steps=1)
    images = []
    standardize = trainer_module.standardize_exits
    monkeypatch.setattr(
        "modeling_mevit.trainer.standardize_exits",
        lambda model, batches: standardize(model, [images.append(batch) or batch for batch in batches]),
    )
    before = torch.get_rng_state()
    list(trainer._some_images())
    assert torch.get_rng_state().equal(before)
    trainer.train()
    assert torch.cat(images).shape == (24, 3, 16, 16)
    assert trainer.model.exits["3"].norm.weight.mean() > 1.5  # 1 at first; deviations are far below 1
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    trainer.train()  # nor is what was trained
    assert len(torch.cat(images)) == 24


def test_standardising_needs_a_model(tmp_path):
    with pytest.raises(ValueError, match="give `model` in place of `model_init`"):
        MEViTTrainer(
            model_init=lambda: tiny_model(),
            args=MEViTTrainingArguments(str(tmp_path), standardize_exits=True, report_to="none", use_cpu=True),
        )


def test_one_trainer_can_train_and_then_resume(tmp_path):
    trainer = make_trainer(tmp_path, exit_learning_rate=2e-3, save_strategy="steps", save_steps=5, max_steps=5)
    trainer.train()
    trainer.args.max_steps = 8
    assert trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5").global_step == 8
    assert len(trainer.create_optimizer().param_groups) == 4


def test_a_calibrated_model_is_evaluated_at_every_exit(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.config.early_exit, trainer.model.config.exit_thresholds = True, 0.5
    unlabelled = [{"pixel_values": sample["pixel_values"]} for sample in trainer.eval_dataset]
    assert trainer.predict(unlabelled).predictions.shape == (10, 5)


@pytest.mark.parametrize("combination", ["none", "mean"])
def test_the_accuracy_of_an_exit_is_that_of_its_combination(tmp_path, combination):
    model = tiny_model(num_hidden_layers=6, exit_layers=[2, 3, 4, 5, 6], exit_combination=combination)
    trainer = make_trainer(tmp_path, model=model)
    pixel_values = torch.stack([sample["pixel_values"] for sample in trainer.eval_dataset])
    with torch.no_grad():
        exit_logits = model.eval()(pixel_values).exit_logits
    predictions = combine_exits(combination, exit_logits).argmax(-1)
    assert combination == "none" or not predictions.equal(exit_logits.argmax(-1))  # so that the test can fail
    assert trainer.predict(trainer.eval_dataset).predictions.tolist() == predictions.tolist()
    metrics = trainer.evaluate()
    for place, layer in enumerate(model.config.exit_layers):
        correct = predictions[:, place] == torch.arange(10) % 5
        assert metrics[f"eval_accuracy/exit_{layer}"] == pytest.approx(correct.float().mean().item())


def test_the_trainer_of_transformers_can_train_and_evaluate_it(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        model=tiny_model(),
        args=arguments,
        train_dataset=random_images(16),
        eval_dataset=random_images(10),
        compute_metrics=lambda evaluation: {
            "accuracy": (evaluation.predictions.argmax(1) == evaluation.label_ids).mean()
        },
    )
    assert trainer.train().global_step == 2
    logits = trainer.predict(trainer.eval_dataset).predictions
    assert logits.shape == (10, 5)
    assert trainer.evaluate()["eval_accuracy"] == np.mean(logits.argmax(1) == np.arange(10) % 5)


def test_no_search_for_unused_parameters_unless_asked_for(tmp_path):
    assert make_trainer(tmp_path).args.ddp_find_unused_parameters is False
    assert make_trainer(tmp_path, ddp_find_unused_parameters=True).args.ddp_find_unused_parameters is True


def test_another_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        MEViTTrainer(
            model=tiny_model(),
            args=MEViTTrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
            compute_loss_func=lambda outputs, labels, **kwargs: outputs.loss,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_random_exits": -1}, "num_random_exits must be 0 or more, got -1"),
        ({"distillation_weight": -0.5}, "distillation_weight must be 0 or more, got -0.5"),
        ({"uncertainty_weight": -1.0}, "uncertainty_weight must be 0 or more, got -1.0"),
        ({"exit_learning_rate": -1e-3}, "exit_learning_rate must be 0 or more, got -0.001"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be above 0, got 0.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, .* got 0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (0.25, 3)])
def test_warm_up_is_in_steps_or_a_fraction_of_all(tmp_path, warmup, steps):
    trainer = make_trainer(tmp_path, warmup_steps=warmup)
    assert trainer.args.warmup_steps == warmup
    assert trainer.args.get_warmup_steps(10) == steps
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    rates = []
    for _ in range(10):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates.index(max(rates)) == steps


@pytest.mark.parametrize("has_metrics", [True, False])
def test_the_card_is_rendered_where_there_are_metrics(tmp_path, monkeypatch, has_metrics):
    written = []
    monkeypatch.setattr("modeling_mevit.trainer.write_card", written.append)
    trainer = make_trainer(tmp_path)
    if has_metrics:
        (tmp_path / "metrics.json").write_text("{}")
    trainer.create_model_card()
    assert written == ([str(tmp_path)] if has_metrics else [])
    assert (tmp_path / "README.md").is_file() is not has_metrics  # else the draft of Transformers


def test_without_accelerate_one_line_tells_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else "found")
    monkeypatch.delitem(sys.modules, "modeling_mevit.trainer")
    with pytest.raises(ImportError, match=r"^training needs accelerate, .*: pip install 'mevit\[train\]'$"):
        importlib.import_module("modeling_mevit.trainer")


# Nothing private leaves


SECRET = "hf_secret"


@pytest.fixture
def hub(monkeypatch) -> RecordedHub:
    return record_hub(monkeypatch)


CODE = {file.name for file in Path(modeling_mevit.__file__).parent.glob("*_mevit.py")}


@pytest.fixture
def pushing(tmp_path, hub, monkeypatch) -> Callable[..., MEViTTrainer]:
    """Makes a trainer that is given a token, and whose output directory holds what others put there."""
    monkeypatch.setattr("socket.gethostname", lambda: "host-of-the-test")
    output = tmp_path / "colours"
    planted = ("runs/today/events.out.tfevents.1.host", "another/checkpoint-1/model.safetensors", "optimizer.pt")
    for name in (*planted, ".env", "train.log", "wandb/run-1/metadata.json", "state.ckpt", "secrets.json", "own.py"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("private")
    settings = {"push_to_hub": True, "hub_token": SECRET, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    return lambda **more: make_trainer(output, **{**settings, **more})


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_only_the_model_its_code_and_its_card_are_pushed(hub, pushing, strategy):
    trainer = pushing(hub_strategy=strategy)
    trainer.train()
    trainer.save_state()
    trainer.push_to_hub()
    output = Path(trainer.args.output_dir)
    for name in ("training_args.bin", "trainer_state.json", "checkpoint-2/optimizer.pt", "checkpoint-2/scheduler.pt"):
        assert (output / name).is_file()  # and yet they are not uploaded
    messages = [upload["commit_message"] for upload in hub.uploads]
    in_progress = [f"Training in progress, step {step}" for step in (1, 2)]
    assert messages == [*(in_progress if strategy == "every_save" else []), "End of training"]
    for upload in hub.uploads:
        names = set(upload["files"])
        assert names >= {"model.safetensors", "config.json", "modeling_mevit.py"}
        assert names <= {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", *CODE}
        assert SECRET.encode() not in b"".join(upload["files"].values())
        assert upload["token"] == SECRET and upload["repo_id"] == "someone/colours"
    assert "README.md" in hub.uploads[-1]["files"]


def test_what_is_pushed_at_a_save_is_the_model_of_that_save(hub, pushing):
    trainer = pushing()
    trainer.train()
    for step, upload in enumerate(hub.uploads, 1):
        checkpoint = Path(trainer.args.output_dir, f"checkpoint-{step}")
        for name in ("model.safetensors", "config.json"):
            assert upload["files"][name] == (checkpoint / name).read_bytes()
    assert hub.uploads[0]["files"]["model.safetensors"] != hub.uploads[1]["files"]["model.safetensors"]


def test_a_push_that_is_under_way_is_not_joined_by_another_unless_asked_for(hub, pushing, monkeypatch):
    monkeypatch.setattr("modeling_mevit.trainer.PushInProgress.is_done", lambda self: False)
    pushing(max_steps=3).train()
    assert len(hub.uploads) == 1
    pushing(max_steps=3, hub_always_push=True).train()
    assert len(hub.uploads) == 1 + 3


def test_saving_by_hand_pushes_too(hub, pushing):
    trainer = pushing(hub_revision="draft")
    trainer.save_model()
    assert [(upload["commit_message"], upload["revision"]) for upload in hub.uploads] == [("Model save", "draft")]
    assert "training_args.bin" not in hub.uploads[0]["files"]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_states_of_a_training_are_never_pushed(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"hub_strategy must be 'end' or 'every_save', .* got '{strategy}'"):
        MEViTTrainingArguments(str(tmp_path), hub_strategy=strategy, report_to="none", use_cpu=True)


def test_saved_arguments_hold_neither_token_nor_paths(pushing, tmp_path):
    trainer = pushing(push_to_hub=False, hub_strategy="end", run_name=str(tmp_path / "colours"))
    trainer.train()
    output = trainer.args.output_dir
    trainer.save_model()
    for file in (Path(output, "training_args.bin"), Path(output, "checkpoint-1", "training_args.bin")):
        content = file.read_bytes()
        assert not [text for text in (SECRET, str(tmp_path), "host-of-the-test") if text.encode() in content]
        saved = torch.load(file, weights_only=False)
        assert (saved.learning_rate, saved.max_steps, saved.run_name) == (1e-3, 2, "colours")
        assert saved.output_dir is None and saved.hub_token is None
    assert output == str(tmp_path / "colours") and trainer.args.hub_token == SECRET  # those in use stay

    resumed = pushing(push_to_hub=False, max_steps=3, resume_from_checkpoint=f"{output}/checkpoint-2")
    assert resumed.train(resume_from_checkpoint=resumed.args.resume_from_checkpoint).global_step == 3
    content = Path(output, "checkpoint-3", "training_args.bin").read_bytes()
    assert os.fsencode(tmp_path) not in content


# One trajectory


@pytest.mark.slow
def test_accumulating_4_batches_of_4_equals_one_of_16(tmp_path):
    whole = make_trainer(tmp_path, images=48, optim="sgd", per_device_train_batch_size=16)
    parts = make_trainer(
        tmp_path, images=48, optim="sgd", per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert len(losses(whole)) == 6
    assert_same_weights(parts.model, whole.model)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 2 epochs of 5 steps with a checkpoint at each step, once for each combination of settings."""

    @functools.cache
    def run(workers: int, best: bool) -> MEViTTrainer:
        trainer = make_trainer(tmp_path_factory.mktemp("whole"), **resumable(workers, best))
        trainer.train()
        return trainer

    return run


def resumable(workers: int, best: bool) -> dict:
    settings = {"dataloader_num_workers": workers, "num_random_exits": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"standardize_exits": True, "exit_learning_rate": 2e-3}
    if best:
        # the loss falls from step to step, so that the "best" one is the first and not what training ends with
        settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
        settings |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5, 7])
@pytest.mark.parametrize(("workers", "best"), [(0, False), (2, False), (0, True), (2, True)])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path, uninterrupted, workers, best, step):
    whole = uninterrupted(workers, best)
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = make_trainer(tmp_path, **resumable(workers, best))
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()  # what is not read from the checkpoint shows
    torch.rand(100)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))

    assert list(losses(resumed)) == list(range(1, 11))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert len(set(losses(whole).values())) == 10
    assert_same_weights(resumed.model, whole.model)
    if best:
        chosen = whole.state.best_model_checkpoint
        assert not chosen.endswith("checkpoint-10")
        assert_same_weights(whole.model, MEViTForImageClassification.from_pretrained(chosen))


# Faults


def test_a_truncated_checkpoint_is_named(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded into the model"):
        load_checkpoint(model, str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layers": [3, 4]}, "is of another model: .*missing keys, first exits.2"),
        ({"exit_layers": [1, 2, 3, 4]}, "is of another model: .*unexpected keys, first exits.1"),
        ({"num_labels": 6}, "cannot be loaded into the model|is of another model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, settings, message):
    tiny_model(**settings).save_pretrained(tmp_path)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, str(tmp_path))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded into the model"):
        load_checkpoint(tiny_model(), str(tmp_path))


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path, caplog):
    assert get_last_checkpoint(str(tmp_path / "nothing")) is None
    for step in (9, 10, 100, "best"):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert get_last_checkpoint(str(tmp_path)) is None
    for step in (9, 10):
        TrainerState().save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    whole = (tmp_path / "checkpoint-10" / "trainer_state.json").read_text()
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text(whole[: len(whole) // 2])
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-100 was not written to its end" in caplog.text


@pytest.mark.parametrize(
    ("state", "settings", "is_complete"),
    [
        ({"global_step": 10, "epoch": 2.0}, {"num_train_epochs": 2}, True),
        ({"global_step": 9, "epoch": 1.8}, {"num_train_epochs": 2}, False),
        ({"global_step": 10, "epoch": 2.0}, {"num_train_epochs": 3}, False),
        ({"global_step": 4, "epoch": 0.8}, {"max_steps": 4}, True),
        ({"global_step": 4, "epoch": 0.8}, {"max_steps": 5}, False),
        ({"global_step": 4, "epoch": 0.8}, {"max_steps": -1, "num_train_epochs": 1}, False),
    ],
)
def test_a_checkpoint_is_complete_when_it_is_as_far_as_wanted(tmp_path, state, settings, is_complete):
    TrainerState(**state).save_to_json(str(tmp_path / "trainer_state.json"))
    args = MEViTTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **settings)
    assert training_is_complete(str(tmp_path), args) is is_complete
