"""Presets: each is a whole experiment, with settings for every method it names."""

import pytest

from classp_jax.continual import presets
from classp_jax.continual.config import ConfigError, Experiment
from classp_jax.continual.methods.registry import method, resolve_settings
from classp_jax.continual.options import ExperimentOptions, out_folder, parse


def options_of(command_line):
    found = parse(command_line.split())
    assert isinstance(found, ExperimentOptions)
    return found


PRESETS = [(name, size) for name, sizes in presets.sizes().items() for size in sizes]


@pytest.mark.parametrize(("name", "size"), PRESETS)
def test_every_preset_is_a_whole_experiment(name, size):
    experiment = presets.load(name, size)
    assert experiment.data.data_dir is None
    assert set(experiment.settings) >= set(experiment.methods)
    for owner, values in experiment.settings.items():
        # Nothing is left to the defaults, which were not tuned for this stream.
        assert set(values) == set(method(owner).settings), owner
        resolved = resolve_settings(method(owner), experiment.settings)
        assert resolved == pytest.approx(values)


@pytest.mark.parametrize(("name", "size"), PRESETS)
def test_a_preset_s_header_says_how_it_was_tuned(name, size):
    text = (presets.FOLDER / f"{name}.{size}.toml").read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    said = ("classp-jax sweep", "the settings are those of", "nothing was tuned")
    assert any(words in " ".join(header).lower() for words in said)
    assert "tries" not in " ".join(header)


def test_a_preset_s_size_is_small_unless_there_is_none():
    assert presets.load("phrasebank-imdb") == presets.load("phrasebank-imdb", "small")
    assert presets.load("phrasebank-imdb", "paper").network.width == 600
    assert presets.load("mnist-fashion-published").training.epochs == (4, 1)


def test_unknown_presets_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'mnist-fashion'"):
        presets.load("mnist-fashon")
    with pytest.raises(ConfigError, match="no size 'huge'; it has paper, small"):
        presets.load("mnist-fashion", "huge")


def test_what_was_tuned_on_digits_holds_for_digits_alone():
    digits = presets.load("digits")
    assert digits.data == Experiment().data
    assert options_of("run").settings == digits.settings
    assert options_of("run --epochs 3").settings == digits.settings
    # Nothing like the library's default, 0.1.
    assert digits.settings["classp"]["eps"] < 0.01
    for elsewhere in (
        "--model cnn",
        "--stream split",
        "--source tfds:mnist",
    ):
        assert options_of(f"run {elsewhere}").settings == {}


def test_the_command_line_wins_over_a_preset_and_a_sweep_leaves_its_settings():
    run = options_of("run --preset permuted-mnist --tasks 3")
    assert (run.data.tasks, run.training.epochs) == (3, (1,))
    assert run.settings
    sweep = options_of("sweep --preset phrasebank-imdb --preset-size paper")
    assert sweep.network.width == 600
    assert sweep.settings == {}


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ("run", "runs/digits"),
        ("run --preset permuted-mnist", "runs/permuted-mnist"),
        ("run --preset mnist-fashion", "runs/mnist-fashion-small"),
        ("sweep --preset mnist-fashion --preset-size paper", "mnist-fashion-paper"),
        ("run --preset mnist-fashion --out x/y", "x/y"),
    ],
)
def test_a_preset_gives_its_name_to_the_folder(arguments, folder):
    assert str(out_folder(options_of(arguments))).endswith(folder)


def test_a_changed_preset_has_a_folder_of_its_own():
    changed = options_of("run --preset permuted-mnist --epochs 2")
    assert str(out_folder(changed)) != "runs/permuted-mnist"
