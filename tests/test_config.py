import dataclasses
import subprocess

import pytest

from config import (
    EvalConfig,
    SampleConfig,
    SamplingConfig,
    TrainConfig,
    UserError,
    check,
    from_dict,
    parse,
    program,
)
from tests.conftest import shell

INF = float("inf")


def test_the_defaults_are_allowed():
    for kind in (TrainConfig, SampleConfig, EvalConfig):
        assert check(kind()) == kind() == parse(kind, "", [])


def test_the_experiment_name_is_made_of_the_settings():
    cfg = TrainConfig(epochs=200, lr=1e-4)
    assert cfg.experiment() == "diffusion_model_unet_200epochs_300timesteps_0.0001lr"
    own = TrainConfig(dataset="fashion_mnist").experiment()  # never the folder of other data
    assert own == "diffusion_model_unet_fashion_mnist_20epochs_300timesteps_0.004lr"
    own = TrainConfig(dataset="folder", data_dir="x/cats/").experiment()
    assert own.startswith("diffusion_model_unet_folder_cats_20epochs")
    assert TrainConfig(experiment_name="mine").experiment() == "mine"


def test_a_setting_that_is_on_can_be_turned_off():
    assert not parse(TrainConfig, "", ["--no-class_conditional"]).class_conditional
    assert parse(TrainConfig, "", ["--class_conditional"]).class_conditional


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3


def test_a_config_survives_the_way_through_a_dict():
    cfg = TrainConfig(model_type="cnn", width=32, max_minutes=3)
    assert from_dict(TrainConfig, dataclasses.asdict(cfg)) == cfg


@pytest.mark.parametrize("values", [{"colour": 1}, {"epochs": "3"}, {"width": 10**9}, [], None])
def test_a_config_from_a_file_is_checked(values):
    with pytest.raises(UserError):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0),
        ("epochs", True),
        ("epochs", 1.0),
        ("lr", float("nan")),
        ("lr", INF),
        ("lr", 0.0),
        ("timesteps", 1),
        ("batch_size", -1),
        ("ema_length", 0.3),
        ("ema_length", 1e-300),
        ("weight_decay", 1e300),
        ("max_minutes", 0.0),
        ("model_type", "vit"),
        ("experiment_name", "a/b"),
        ("experiment_name", ".."),
        ("experiment_name", " "),
        ("experiment_name", "é" * 101),
        ("experiment_name", "not text: \udcff"),
        ("experiment_name", ""),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(UserError, match=f"--{field} ") as error:
        check(dataclasses.replace(TrainConfig(), **{field: value}))
    assert "must" in str(error.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epochs", "0"], ("--epochs 0", "an integer >= 1")),
        (["--epochs", "two"], ("--epochs two", "an integer >= 1")),
        (["--lr", "nan"], ("--lr nan", "a number > 0 and <= 1")),
        (["--timesteps", "1"], ("--timesteps 1", ">= 2")),
        (["--model_type", "gan"], ("--model_type gan", "unet, cnn, resnet")),
        (["--experiment_name", "../x"], ("--experiment_name", "plain folder name")),
        (["--colour", "red"], ("--colour",)),
        (["--epochs"], ("--epochs", "expected one argument")),
    ],
)
def test_bad_flags_of_main(refuses, own_folder, argv, words):
    refuses("main", *argv, words=words)
    assert not list(own_folder.iterdir())


@pytest.mark.parametrize("script", ["main", "generate", "validation", "scoring.train_classifier"])
def test_help_shows_every_flag(cli, script):
    status, stdout, _ = cli(script, "--help")
    assert status == 0 and "--seed" in stdout and "--device" in stdout


def test_every_option_of_sampling_is_everywhere():
    options = {f.name for f in dataclasses.fields(SamplingConfig)}
    for kind in (SampleConfig, EvalConfig):
        assert options <= {f.name for f in dataclasses.fields(kind)}


def test_a_new_entry_of_a_table_is_a_new_value_of_its_flag(monkeypatch):
    import models

    with pytest.raises(UserError, match="--model_type mine: must be one of unet, cnn, resnet"):
        parse(TrainConfig, "", ["--model_type", "mine"])
    monkeypatch.setitem(models.MODELS, "mine", models.MODELS["cnn"])
    assert parse(TrainConfig, "", ["--model_type", "mine"]).model_type == "mine"


@pytest.mark.parametrize("script, words", [("classifier", "--epochs"), ("benchmark", "floors")])
def test_old_names_of_scripts_still_work(own_folder, script, words):
    process = shell(script, "--help", cwd=own_folder, stdout=subprocess.PIPE)
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and words in stdout, stderr


def test_errors_name_the_script_or_the_package(monkeypatch):
    for argument, name in (("/a/generate.py", "generate.py"), ("/a/app/__main__.py", "app")):
        monkeypatch.setattr("sys.argv", [argument])
        assert program() == name
