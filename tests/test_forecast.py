"""What a run will take, from those before it; steps as a sampler tells of them."""

import json

import pytest
import torch
from skein import engine, forecast, live
from skein.demo.sampling import sample
from skein.estimate import work_of
from skein.forecast import MEASURED, SCALED, Job, Time, Times
from skein.models import Network
from skein.pace import Pace
from skein.plan import AttentionConfig, CacheConfig
from skein.units import bytes_text, seconds_text

JOB = Job("1 x card", "network", "{}", "euler", 100.0)


def test_nothing_is_said_of_what_has_not_run():
    times = Times()
    times.add(JOB, [10.0, 2.0, 2.0])
    for other in ("device", "model", "techniques", "sampler"):
        assert times.forecast(Job(**{**vars(JOB), other: "another"}), 4) is None


def test_a_run_of_the_same_size_is_known():
    """Its first step was with compiling; the next run in this process has compiled blocks."""
    times = Times()
    times.add(JOB, [30.0, 2.0, 2.0, 2.0])
    known = times.forecast(JOB, 10)
    assert known.seconds == pytest.approx(10 * 2) and known.source == MEASURED
    times.add(JOB, [3.0, 2.0, 2.0, 2.0])
    assert times.forecast(JOB, 10).seconds == pytest.approx(1 + 10 * 2)


def test_a_new_process_compiles_again():
    before = Times()
    before.add(JOB, [30.0, 2.0, 2.0])
    before.add(JOB, [3.0, 2.0, 2.0])
    times = Times()
    times.times = before.times
    assert times.forecast(JOB, 10).seconds == pytest.approx(28 + 10 * 2)


def test_a_step_in_which_something_is_compiled_is_none_of_the_others():
    times = Times()
    times.add(JOB, [30.0, 2.0, 12.0, 2.0, 2.0])
    assert times.times[0].step == pytest.approx(2) and times.times[0].before == pytest.approx(38)


def test_dense_steps_before_sparse_ones_are_no_outliers():
    times = Times()
    times.add(JOB, [30.0, 3.0, 3.0, *[1.0] * 12])
    assert times.times[0].step == pytest.approx(18 / 14)


@pytest.mark.parametrize("reused", [1, 2, 3, 4, 5])
def test_steps_that_the_cache_has_left_to_compute_are_no_outliers(reused):
    """Of eight after the first."""
    seconds = [30.0, *[2.0] * (8 - reused), *[0.1] * reused]
    assert Time.of(JOB, seconds, "first").step == pytest.approx(sum(seconds[1:]) / 8)


def test_another_size_is_scaled_by_its_work_and_compiled_for_once():
    compiled = {**vars(JOB), "techniques": '{"compile": {}}'}
    first, second, third = (Job(**{**compiled, "work": work}) for work in (100.0, 200.0, 300.0))
    times = Times()
    times.add(first, [30.0, 2.0, 2.0])
    known = times.forecast(second, 10)
    assert known.step == pytest.approx(4) and known.source == SCALED and known.seconds == pytest.approx(28 / 4 + 40)
    times.add(second, [9.0, 5.0, 5.0])
    assert times.forecast(second, 10).seconds == pytest.approx(50)  # measured is better
    assert times.forecast(third, 10).seconds == pytest.approx(75)
    again = Times()
    again.times = times.times
    again.add(first, [30.0, 2.0, 2.0])
    assert again.forecast(second, 10).seconds == pytest.approx(4 + 50)


def test_a_run_of_one_step_says_nothing():
    times = Times()
    times.add(JOB, [3.0])
    assert times.forecast(JOB, 10) is None


def test_work_grows_with_the_square_of_many_tokens(tiny_model):
    network = Network(tiny_model.model.diffusion_model)
    small, large, batch = (work_of(network, (b, 16, t, 80, 80)) for b, t in ((1, 1), (1, 40), (2, 40)))
    assert 40 < large / small < 1600 and batch == 2 * large


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"job": {}}]', '{"a": 1}'])
def test_a_file_that_is_broken_is_written_anew(tmp_path, monkeypatch, caplog, content):
    path = tmp_path / "kept" / "times.json"
    monkeypatch.setattr(forecast, "_path", lambda: path)
    monkeypatch.setattr(forecast.host, "server", lambda: object())
    path.parent.mkdir()
    path.write_text(content)
    times = Times()
    assert times.forecast(JOB, 3) is None and "cannot be read" in caplog.text
    times.add(JOB, [3.0, 2.0])
    assert len(json.loads(path.read_text())) == 1
    again = Times()
    assert again.forecast(JOB, 3).seconds == pytest.approx(1 + 3 * 2)


def test_the_steps_of_a_run_are_told_and_timed(tiny_model, monkeypatch):
    told, expected = [], []
    monkeypatch.setattr(live, "at_step", lambda step, steps, left: told.append((step, steps)))
    monkeypatch.setattr(live, "expect", lambda *values: expected.append(values))
    seen = []
    model = engine.edit(tiny_model, attention=AttentionConfig())
    arguments = dict(shape=(1, 16, 3, 8, 8), steps=5)
    out = sample(model, "a red circle", callback=lambda step, *_: seen.append(step), **arguments)
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (4, 5)] and seen == [0, 1, 2, 3, 4]
    assert torch.equal(sample(model, "a red circle", **arguments), out)
    seconds, source, size, steps = expected[1]
    assert 0 < seconds < 60 and source == MEASURED and size > 0 and steps == 5


def test_a_run_that_is_stopped_says_nothing_of_the_next(tiny_model):
    def stop(step, *_):
        if step == 2:
            raise InterruptedError

    model = engine.edit(tiny_model, cache=CacheConfig(0.123))
    arguments = dict(shape=(1, 16, 1, 8, 8), steps=5)
    with pytest.raises(InterruptedError):
        sample(model, "a red circle", callback=stop, **arguments)
    assert not any("0.123" in time.job.techniques for time in forecast.TIMES.times)


def test_what_is_left_is_known_once_a_step_after_the_first_has_ended():
    pace = Pace(Job("cpu", "network", "none", "euler", 1.0), 4, torch.device("cpu"), lambda text: None)
    pace.step_ended()
    assert pace.seconds_left() is None
    pace.step_ended()
    assert pace.seconds_left() == pytest.approx(2 * pace.ended[1].ms / 1000)


@pytest.mark.parametrize(
    ("value", "text"), [(0.034, "0.034 s"), (9.6, "9.6 s"), (75.2, "75 s"), (150, "2 min 30 s"), (3675, "61 min")]
)
def test_seconds_as_people_say_them(value, text):
    assert seconds_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(5.6e6, "5.6 MB"), (230e6, "230 MB"), (13.2e9, "13.2 GB")])
def test_bytes_as_people_say_them(value, text):
    assert bytes_text(value) == text
