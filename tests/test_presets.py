"""Presets: each is a whole configuration, with settings for every method it names."""

import pytest

from classp_jax.continual import cli
from classp_jax.continual.config import (
    ConfigError,
    RunConfig,
    SweepConfig,
    check,
    methods_and_settings,
    preset_sizes,
    read_preset,
    with_options,
)

PRESETS = [(name, size) for name, sizes in preset_sizes().items() for size in sizes]


@pytest.mark.parametrize(("name", "size"), PRESETS)
def test_every_preset_is_a_whole_configuration(name, size):
    options = read_preset(name, size)
    for kind in (RunConfig, SweepConfig):
        config = with_options(kind(), options)
    config = with_options(RunConfig(), options)
    check(config)
    assert config.data_dir is None
    assert config.out == f"runs/{name}-{size}"
    for method, settings in methods_and_settings(config):
        # Nothing is left to the defaults, which were tuned for another stream.
        assert config.settings[method.name] == settings


def test_a_preset_s_size_is_small_unless_there_is_none():
    assert read_preset("phrasebank-imdb") == read_preset("phrasebank-imdb", "small")
    assert read_preset("phrasebank-imdb", "paper")["width"] == 600
    assert preset_sizes()["mnist-fashion-published"] == ("paper",)
    assert read_preset("mnist-fashion-published")["epochs"] == [4, 1]


def test_unknown_presets_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'mnist-fashion'"):
        read_preset("mnist-fashon")
    with pytest.raises(ConfigError, match="no size 'huge'; it has paper, small"):
        read_preset("mnist-fashion", "huge")


def test_the_command_line_wins_over_a_preset():
    default, rest = cli._with_file(
        SweepConfig,
        ["--preset", "phrasebank-imdb", "--preset-size=paper", "--tries", "2"],
    )
    assert (default.width, rest) == (600, ["--tries", "2"])
    assert default.out == "runs/sweep-phrasebank-imdb-paper"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset"], "--preset needs a name"),
        (["--preset-size", "small"], "--preset-size goes with --preset"),
        (["--preset", "nothing"], "unknown preset 'nothing'"),
    ],
)
def test_a_wrong_preset_is_one_line(arguments, message, capsys):
    assert cli.main(["run", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
