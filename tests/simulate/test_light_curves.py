"""Light curves have the flux of the alert at its time, and behave as their kind does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from broker_filter.simulate.light_curves import (
    SUPERNOVA_EXPLOSION_DAYS,
    LightCurve,
    active_nucleus,
    never_before,
    pulsating_star,
    supernova,
)

NOW = 61096.3


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("kind", "flux"), [(supernova, 5e4), (pulsating_star, 5e4), (pulsating_star, -3e4)])
def test_flux_at_the_time_of_the_alert_is_that_of_the_alert(
    kind: Callable[..., LightCurve], flux: float, seed: int
) -> None:
    curve = kind(NOW, "r", flux, np.random.default_rng(seed))
    assert curve.difference(np.array([NOW]), ["r"])[0] == pytest.approx(flux, rel=1e-6)
    assert curve.template >= 0
    assert curve.template + flux > 0  # the flux of a source is never negative


@pytest.mark.parametrize("seed", range(10))
def test_active_nucleus_starts_at_the_flux_of_the_alert(seed: int) -> None:
    curve = active_nucleus(NOW, "g", -2e4, np.random.default_rng(seed))
    minutes_ago = curve.difference(np.array([NOW - 1e-3]), ["g"])[0]
    assert minutes_ago == pytest.approx(-2e4, rel=0.1)


def test_supernova_shines_only_after_its_explosion() -> None:
    curve = supernova(NOW, "g", 1e5, np.random.default_rng(1))
    assert curve.began is not None
    times = curve.began + np.arange(-30, 200, 1.0)
    flux = curve.difference(times, ["g"] * len(times))
    assert (flux[times < curve.began] == 0).all()
    peak = times[flux.argmax()] - curve.began + SUPERNOVA_EXPLOSION_DAYS
    assert -2 < peak < 12  # days from the nominal peak
    assert flux[-1] < 0.01 * flux.max()


def test_pulsating_star_repeats() -> None:
    curve = pulsating_star(NOW, "g", 4e4, np.random.default_rng(3))
    times = NOW + np.linspace(0, 400, 20_000)
    flux = curve.difference(times, ["g"] * len(times))
    assert flux.min() < 0 < flux.max()
    spectrum = np.abs(np.fft.rfft(flux - flux.mean()))
    assert spectrum.max() > 10 * np.median(spectrum)


def test_a_moving_body_has_no_earlier_flux() -> None:
    assert not never_before(NOW).difference(np.linspace(NOW - 300, NOW - 1, 50), ["g"] * 50).any()
