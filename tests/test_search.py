import json
import os
import signal
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pyspark import cloudpickle
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import plugin_data_pb2
from trainings import places

from fashion_mnist import RECIPE
from helpers.errors import TrainingError
from helpers.storage import open_storage
from helpers.tracking.tensorboard import read_scalars
from search import Rules, make_objective, open_study, search

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the tasks cannot import a test

SPACE = {"x": FloatDistribution(-4, 4), "kind": CategoricalDistribution(["up", "down"])}


def parabola(trial: optuna.Trial) -> float:
    """Best, with 1, at x = 2 and kind = up."""
    return (1.0 if trial.params["kind"] == "up" else 0.0) - (trial.params["x"] - 2) ** 2


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


@pytest.fixture(scope="module")
def found(spark, tmp_path_factory):
    """A search of a known function: its folder and its study."""
    run_dir = str(tmp_path_factory.mktemp("search"))
    return run_dir, search(spark, parabola, SPACE, run_dir, trials=24)


def test_the_search_beats_chance(found):
    _, study = found
    assert states(study) == ["COMPLETE"] * 24
    values = [trial.value for trial in study.trials]
    assert all(trial.value == pytest.approx(parabola(trial)) for trial in study.trials)
    # Five random trials come first; what follows has learned from them.
    assert sum(values[12:]) / 12 > sum(values[:5]) / 5
    assert study.best_value > 0 and study.best_params["kind"] == "up"


def test_another_program_reads_the_study_as_optunas_own_file(found):
    run_dir, study = found
    storage = JournalStorage(JournalFileBackend(str(Path(run_dir, "study.log"))))
    read = optuna.load_study(study_name="search", storage=storage)
    assert [trial.params for trial in read.trials] == [trial.params for trial in study.trials]
    assert read.best_value == study.best_value


def test_hparams_has_one_run_a_trial(found):
    run_dir, study = found
    events = EventMultiplexer().AddRunsFromDirectory(run_dir).Reload()
    assert sorted(events.Runs()) == [f"trial-{number:04d}" for number in range(24)]
    for trial in study.trials:
        content = events.GetAccumulator(f"trial-{trial.number:04d}").PluginTagToContent("hparams")
        start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
        values = start.session_start_info.hparams
        assert values["x"].number_value == pytest.approx(trial.params["x"])
        assert values["kind"].string_value == trial.params["kind"]
        scalars = read_scalars(f"{run_dir}/trial-{trial.number:04d}")
        assert scalars["final/objective"]["value"].tolist() == [pytest.approx(trial.value)]


def test_a_study_is_taken_up_where_it_was_left(spark, tmp_path):
    first = search(spark, parabola, SPACE, str(tmp_path), trials=3)
    second = search(spark, parabola, SPACE, str(tmp_path), trials=5)
    assert [trial.params for trial in second.trials[:3]] == [trial.params for trial in first.trials]
    assert len(second.trials) == 5 and len({trial.params["x"] for trial in second.trials}) == 5
    third = search(spark, parabola, SPACE, str(tmp_path), trials=5)
    assert len(third.trials) == 5  # nothing left to do
    fresh = search(spark, parabola, SPACE, str(tmp_path), trials=2, resume=False)
    assert len(fresh.trials) == 2
    assert sorted(path.name for path in tmp_path.glob("trial-*")) == ["trial-0000", "trial-0001"]


def test_trials_of_a_driver_that_died_are_failed_and_tried_anew(spark, tmp_path):
    open_study(open_storage(str(tmp_path)), Rules()).ask(SPACE)
    study = search(spark, parabola, SPACE, str(tmp_path), trials=2)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_trials_run_at_the_same_time_in_processes_of_their_own(spark, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()

    def wait_for_the_other(trial: optuna.Trial) -> float:
        (meeting / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(meeting.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return float(len(list(meeting.iterdir())))

    study = search(spark, wait_for_the_other, SPACE, str(tmp_path / "run"), trials=2)
    assert [trial.value for trial in study.trials] == [2.0, 2.0]
    first, second = (trial.user_attrs for trial in study.trials)
    assert max(first["started"], second["started"]) < min(first["ended"], second["ended"])


def test_a_failing_trial_is_recorded_and_the_others_go_on(spark, tmp_path):
    def fail_below_zero(trial: optuna.Trial) -> float:
        if trial.params["x"] < 0:
            raise ValueError(f"x is {trial.params['x']:.3f}")
        return parabola(trial)

    study = search(spark, fail_below_zero, SPACE, str(tmp_path), trials=12, rules=Rules(n_startup_trials=12))
    failed = study.get_trials(states=(TrialState.FAIL,))
    assert failed and len(study.get_trials(states=(TrialState.COMPLETE,))) == 12 - len(failed)
    assert all(trial.user_attrs["error"] == f"ValueError: x is {trial.params['x']:.3f}" for trial in failed)
    assert not Path(tmp_path, f"trial-{failed[0].number:04d}").exists()


def test_a_value_that_is_no_number_is_a_failure(spark, tmp_path):
    with pytest.raises(TrainingError, match="none of 2 trials succeeded.*not a number"):
        search(spark, lambda trial: float("nan"), SPACE, str(tmp_path), trials=2)


def test_a_killed_task_is_repeated_with_the_same_parameters(spark, tmp_path):
    seen = tmp_path / "seen"

    def die_once(trial: optuna.Trial) -> float:
        with seen.open("a") as file:
            file.write(json.dumps(trial.params) + "\n")
        if len(seen.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return parabola(trial)

    study = search(spark, die_once, SPACE, str(tmp_path / "run"), trials=1)
    assert states(study) == ["COMPLETE"]
    assert [json.loads(line) for line in seen.read_text().splitlines()] == [study.trials[0].params] * 2


def test_poor_trials_are_pruned_and_shown_as_far_as_they_went(spark, tmp_path):
    def climb(trial: optuna.Trial) -> float:
        for step in range(1, 11):
            trial.report(step * trial.params["slope"], step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 10 * trial.params["slope"]

    rules, space = Rules(n_startup_trials=4, n_warmup_steps=2), {"slope": FloatDistribution(0, 1)}
    study = search(spark, climb, space, str(tmp_path), trials=16, rules=rules, parallel=1)
    pruned = study.get_trials(states=(TrialState.PRUNED,))
    assert pruned and states(study)[:4] == ["COMPLETE"] * 4
    for trial in pruned:
        earlier = [t for t in study.trials[: trial.number] if t.state == TrialState.COMPLETE]
        slopes = sorted(t.params["slope"] for t in earlier)
        assert trial.params["slope"] < slopes[len(slopes) // 2]
        assert len(trial.intermediate_values) == 2  # not before what is free
        reports = read_scalars(f"{tmp_path}/trial-{trial.number:04d}")["objective"]
        assert reports["value"].tolist() == pytest.approx(list(trial.intermediate_values.values()))
    best = max(study.trials, key=lambda trial: trial.params["slope"])
    assert best.state == TrialState.COMPLETE and study.best_params == best.params


def test_the_smallest_can_be_the_best(spark, tmp_path):
    def parabola_upwards(trial: optuna.Trial) -> float:
        return -parabola(trial)

    study = search(spark, parabola_upwards, SPACE, str(tmp_path), trials=4, rules=Rules("minimize"))
    assert study.best_value == min(trial.value for trial in study.trials)
    with pytest.raises(TrainingError, match="not to maximize.*another folder"):
        search(spark, parabola, SPACE, str(tmp_path), trials=8)


def test_two_searches_in_one_folder_are_refused(spark, tmp_path):
    with open_storage(str(tmp_path)).lock("search.lock"), pytest.raises(TrainingError, match="another search"):
        search(spark, parabola, SPACE, str(tmp_path))


def test_the_recipe_is_searched_by_its_arguments(spark, fashion_mnist_root, tmp_path):
    space = {"learning_rate": FloatDistribution(0.01, 0.3, log=True), "shift": IntDistribution(0, 2)}
    few = [*RECIPE, "--epochs", "2", "--evaluate-every", "1", "--width", "2", "--train-images", "512"]
    objective = make_objective([*few, "--validation-images", "300", *places(fashion_mnist_root)])
    study = search(spark, objective, space, str(tmp_path), trials=2)
    assert states(study) == ["COMPLETE", "COMPLETE"]
    assert [list(trial.intermediate_values) for trial in study.trials] == [[1, 2]] * 2
    assert all(0 < trial.value < 1 for trial in study.trials)
